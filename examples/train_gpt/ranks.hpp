// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The ranks that train a model together, as its trainer sees them: one, for which all of this is nothing, or a team that
/// shares the sequences of each batch, and the experts.
#pragma once

#include <fastmoe/comm/self.hpp>

#include "train_gpt/copies.hpp"
#include "train_gpt/signals.hpp"

namespace train_gpt {

/// Of n things in order, those of one rank.
struct rank_share {
    int64_t first = 0, count = 0;

    /// As even as can be; where n is less than the ranks, some have none.
    static rank_share of(int64_t n, int rank, int ranks)
    {
        const int64_t first = n * rank / ranks;
        return {first, n * (rank + 1) / ranks - first};
    }
    /// What no rank has more of.
    static int64_t largest(int64_t n, int ranks) { return (n + ranks - 1) / ranks; }
};

/// What all ranks know alike at the end of a step.
struct step_end {
    int signal = 0;     ///< that one of them has caught; 0: none
    bool stops = false; ///< that, or what rank 0 asked
};

/// One rank: the numbers and the speed of a program that has never heard of ranks.
struct one_rank {
    static constexpr bool many = false;
    using parallel_type = fm::self;

    static constexpr int rank() noexcept { return 0; }
    static constexpr int size() noexcept { return 1; }
    static constexpr bool speaks() noexcept { return true; }
    /// What its layers take for their communicator.
    static constexpr fm::self parallel(int64_t) noexcept { return {}; }
    /// The ranks for the dense twin.
    static constexpr one_rank without_experts() noexcept { return {}; }

    template <class Executor, class T>
    void sum(Executor&, vector_view<T>) const
    {
    }
    template <class Executor>
    int from_first(Executor&, int number) const
    {
        return number;
    }
    template <class Executor>
    step_end agree(Executor&, bool stops) const
    {
        const int signal = caught_signal;
        return {signal, stops || signal != 0};
    }
};

} // namespace train_gpt
