// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Where the ranks come from: threads of this process, or processes that mpirun has started. Each way is compiled on its
/// own, in launch_threads.cpp and launch_mpi.cpp, and both for a GPU in team_cuda.cu.
#pragma once

#include <chrono>
#include <cstdlib>
#include <functional>
#include <optional>
#include <string>

#include "train_gpt/any_ranks.hpp"

namespace train_gpt {

struct corpus;
struct program_options;

/// What a launcher of processes has told this one.
struct launched {
    int rank = 0, size = 1;
    int neighbours = 1; ///< ranks on this machine, this one included
    int local_rank = 0; ///< of this one among them

    /// Reads the environment of Open MPI's mpirun. Empty: this process was started by itself.
    static std::optional<launched> find()
    {
        const auto number = [](const char* name, int otherwise) {
            const char* text = std::getenv(name);
            return text ? std::atoi(text) : otherwise;
        };
        launched out{number("OMPI_COMM_WORLD_RANK", -1), number("OMPI_COMM_WORLD_SIZE", 0),
                     number("OMPI_COMM_WORLD_LOCAL_SIZE", 1), number("OMPI_COMM_WORLD_LOCAL_RANK", 0)};
        if (out.rank < 0 || out.rank >= out.size) return std::nullopt;
        return out;
    }
};

/// How long ranks wait for one that does not come; one that fails is known at once.
inline constexpr std::chrono::seconds rank_deadline{120};

/// One rank's part of the program. @return the exit status
using rank_body = std::function<int(const host_ranks& world)>;

/// Runs the body on R threads. @return the status of rank 0. @throws what a rank threw, once all have ended
int run_on_threads(int ranks, const rank_body& body);

#if defined(TRAIN_GPT_MPI)
/// Runs the body as the rank that mpirun made this process. @return its status. @throws what it threw; the others learn of it
int run_on_mpi(const rank_body& body);
#endif

/// All of a run over ranks on GPUs, where the build was asked for it: threads share the first GPU, each with a stream; processes
/// of a machine take its GPUs in turn. @return the status of rank 0, or of this process. @throws error if there is no GPU
int run_team_on_cuda(const program_options& o, const corpus& text, const std::optional<launched>& place);

} // namespace train_gpt
