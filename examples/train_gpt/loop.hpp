// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The training loop around a trainer: log, progress, validation, checkpoints, and a clean end on a signal.
#pragma once

#include <csignal>
#include <optional>

#include "train_gpt/program.hpp"
#include "train_gpt/trainer.hpp"

namespace train_gpt {

/// The signal that asks the loop to save and stop; 0 while there is none.
inline volatile std::sig_atomic_t caught_signal = 0;

/// From now on the first SIGINT or SIGTERM is noted for the loop; a second one ends the process at once.
inline void catch_signals()
{
    struct sigaction action{};
    action.sa_handler = [](int number) { caught_signal = number; };
    action.sa_flags = static_cast<int>(SA_RESETHAND | SA_RESTART);
    sigaction(SIGINT, &action, nullptr);
    sigaction(SIGTERM, &action, nullptr);
}

struct loop_result {
    std::vector<log_row> rows; ///< of this process
    double seconds = 0;        ///< that steps took, earlier processes of the run included where the log tells
    double tokens_per_second = 0;
};

/// Runs steps until the last one, a signal or a limit of the options, and leaves a checkpoint behind.
template <class Trainer>
loop_result train(Trainer& t, const loop_options& o)
{
    using clock = std::chrono::steady_clock;
    std::filesystem::create_directories(o.out);
    loop_result out;
    if (t.steps_done() > 0 && std::filesystem::exists(o.log_path()))
        for (const log_row& row : read_log(o.log_path()))
            if (row.step <= t.steps_done()) out.seconds = row.seconds;
    csv_log log(o.log_path(), t.steps_done());
    progress_line progress(t.config().steps);
    double seconds = 0;
    bool stop = t.finished();
    const auto every = [&](int64_t n) { return n > 0 && t.steps_done() % n == 0; };
    while (!stop) {
        const auto before = clock::now();
        log_row row = t.step();
        const double took = std::chrono::duration<double>(clock::now() - before).count();
        seconds += took;
        out.seconds += took;
        row.seconds = out.seconds;
        row.tokens_per_second =
            double((int64_t(out.rows.size()) + 1) * t.config().tokens_per_step()) / seconds;
        stop = t.finished() || caught_signal != 0 || (o.stop_at > 0 && row.step >= o.stop_at) ||
               (o.seconds > 0 && seconds >= o.seconds);
        if (t.finished() || every(o.validate_every)) row.val_loss = t.validate(o.validation_windows).loss;
        log.write(row);
        progress.show(row);
        out.rows.push_back(row);
        out.tokens_per_second = row.tokens_per_second;
        if (stop || every(o.checkpoint_every)) t.save(o.checkpoint_path());
    }
    return out;
}

} // namespace train_gpt
