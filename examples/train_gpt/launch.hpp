// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Where the ranks come from: threads of this process, or processes that mpirun has started. Each way is compiled on its
/// own, in launch_threads.cpp and launch_mpi.cpp.
#pragma once

#include <chrono>
#include <cstdlib>
#include <functional>
#include <optional>
#include <string>

#include "train_gpt/any_ranks.hpp"

namespace train_gpt {

/// What a launcher of processes has told this one.
struct launched {
    int rank = 0, size = 1;
    int neighbours = 1; ///< ranks on this machine, this one included

    /// Reads the environment of Open MPI's mpirun. Empty: this process was started by itself.
    static std::optional<launched> find()
    {
        const auto number = [](const char* name, int otherwise) {
            const char* text = std::getenv(name);
            return text ? std::atoi(text) : otherwise;
        };
        launched out{number("OMPI_COMM_WORLD_RANK", -1), number("OMPI_COMM_WORLD_SIZE", 0),
                     number("OMPI_COMM_WORLD_LOCAL_SIZE", 1)};
        if (out.rank < 0 || out.rank >= out.size) return std::nullopt;
        return out;
    }
};

/// How long ranks wait for one that does not come; one that fails is known at once.
inline constexpr std::chrono::seconds rank_deadline{120};

/// One rank's part of the program. @return the exit status
using rank_body = std::function<int(const any_ranks& world)>;

/// Runs the body on R threads. @return the status of rank 0. @throws what a rank threw, once all have ended
int run_on_threads(int ranks, const rank_body& body);

#if defined(TRAIN_GPT_MPI)
/// Runs the body as the rank that mpirun made this process. @return its status. @throws what it threw; the others learn of it
int run_on_mpi(const rank_body& body);
#endif

} // namespace train_gpt
