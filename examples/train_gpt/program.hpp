// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the program was asked to do, and its bodies, two for each type of the model, on one rank and on many: a file for
/// each, so that they compile side by side.
#pragma once

#include <filesystem>
#include <optional>
#include <string>

#include <fastmoe/exec/host_executor.hpp>

#include "train_gpt/any_ranks.hpp"
#include "train_gpt/corpus.hpp"
#include "train_gpt/rank_options.hpp"
#include "train_gpt/run_config.hpp"
#include "train_gpt/saved_run.hpp"

namespace train_gpt {

/// What a run does beside its numbers.
struct loop_options {
    std::string out = "train_gpt.out"; ///< folder for the checkpoint, the log and the report
    std::string log;                   ///< CSV; empty: log.csv in `out`
    int64_t validate_every = 100;      ///< steps; 0: at the end only
    int64_t validation_windows = 64;   ///< in the run; the last validation takes eight times as many
    int64_t checkpoint_every = 200;    ///< steps; 0: at the end only
    int64_t stop_at = 0;               ///< stop after this step, as if interrupted; 0: do not
    double seconds = 0;                ///< stop when this much time went into steps; 0: do not

    /// Of a run on one rank, a file; of one over many ranks, a folder.
    std::string parts_path() const { return (std::filesystem::path(out) / "checkpoint").string(); }
    std::string checkpoint_path() const { return (std::filesystem::path(out) / "checkpoint.safetensors").string(); }
    std::string log_path() const { return log.empty() ? (std::filesystem::path(out) / "log.csv").string() : log; }
};

struct sample_options {
    int64_t length = 400;     ///< bytes after the prompt, at most
    double temperature = 0.7; ///< 0: always the likeliest byte
    std::uint64_t seed = 1;
};

enum class device { cpu, cuda };

struct program_options {
    run_config config;
    loop_options loop;
    bool demo = false;
    int threads = 0;
    device on = device::cpu;
    rank_options parallel;
    std::optional<saved_run> resume;
    std::optional<std::string> prompt;    ///< to be continued at the end
    sample_options sample;
};

/// Trains, or runs the demo, with weights and activations of one type. @return the exit status
int run_float32(fm::host_executor& ex, program_options& o, const corpus& text);
int run_bfloat16(fm::host_executor& ex, program_options& o, const corpus& text);

/// The same as one rank of many. Collective over world.
int run_team_float32(fm::host_executor& ex, program_options o, const corpus& text, const host_ranks& world);
int run_team_bfloat16(fm::host_executor& ex, program_options o, const corpus& text, const host_ranks& world);

/// One rank on the GPU that is current, where the build has found nvcc and was asked for it. Over ranks: see launch.hpp.
/// @throws error if there is no GPU
int run_on_cuda(program_options& o, const corpus& text);

} // namespace train_gpt
