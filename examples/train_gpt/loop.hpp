// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The training loop around a trainer: log, progress, validation, checkpoints, and a clean end on a signal.
#pragma once

#include <optional>

#include "train_gpt/program.hpp"
#include "train_gpt/trainer.hpp"

namespace train_gpt {

struct loop_result {
    std::vector<log_row> rows; ///< of this process
    double seconds = 0;        ///< that steps took, earlier processes of the run included where the log tells
    double tokens_per_second = 0;
    int signal = 0; ///< that has ended it; 0: none
};

/// Runs steps until the last one, a signal or a limit of the options, and leaves a checkpoint behind. Collective: rank 0
/// keeps the log and shows progress, and all stop after the same step.
template <class Trainer>
loop_result train(Trainer& t, const loop_options& o)
{
    using clock = std::chrono::steady_clock;
    constexpr bool many = std::remove_cvref_t<decltype(t.ranks())>::many;
    const bool speaks = t.ranks().speaks();
    loop_result out;
    std::optional<csv_log> log;
    std::optional<progress_line> progress;
    if (speaks) {
        std::filesystem::create_directories(many ? o.parts_path() : o.out);
        if (t.steps_done() > 0 && std::filesystem::exists(o.log_path()))
            for (const log_row& row : read_log(o.log_path()))
                if (row.step <= t.steps_done()) out.seconds = row.seconds;
        log.emplace(o.log_path(), t.steps_done());
        progress.emplace(t.config().steps);
    }
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
        const bool wanted = t.finished() || (o.stop_at > 0 && row.step >= o.stop_at) || (o.seconds > 0 && seconds >= o.seconds);
        const step_end end = t.agree(wanted);
        stop = end.stops;
        out.signal = end.signal;
        if (t.finished() || every(o.validate_every)) row.val_loss = t.validate(o.validation_windows).loss;
        if (speaks) {
            log->write(row);
            progress->show(row);
        }
        out.rows.push_back(row);
        out.tokens_per_second = row.tokens_per_second;
        if (stop || every(o.checkpoint_every)) t.save(many ? o.parts_path() : o.checkpoint_path());
    }
    // A signal may have come since: not during a step, but all ranks must take it alike.
    if (out.signal == 0) out.signal = t.agree(false).signal;
    return out;
}

} // namespace train_gpt
