// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The k-th greatest of keys that lie on several ranks, exactly, with integer sums alone: what capacity by weight and
/// quantile balancing cut at.
#pragma once

#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/exec/executor.hpp>
#include <fastmoe/exec/memory.hpp>
#include <fastmoe/ops/rows.hpp>
#include <fastmoe/routing/score.hpp>
#include <fastmoe/routing/select.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// A rank's keys, in groups.
template <class Key>
struct grouped_keys {
    const Key* keys;        // (N)
    const int64_t* offsets; // (G)  first key of each group
    const int32_t* counts;  // (G)  keys of each group
    int64_t groups;
};

/// Digits of four bits, the highest first: a round counts, for each digit but 0, the keys that are at least as great as
/// what is known followed by that digit.
template <class Key>
struct count_digits {
    using vectorized = void;
    using bits = std::make_unsigned_t<Key>;
    static constexpr int digit = 4;
    static constexpr int64_t bounds = (1 << digit) - 1;
    static constexpr bits bias = bits(1) << (sizeof(Key) * 8 - 1);

    grouped_keys<Key> from;
    const bits* known; // (G)
    int64_t* at_least; // (G,15)
    int shift;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t row) const
    {
        const int64_t g = row / bounds;
        const bits bound = known[g] | static_cast<bits>(row % bounds + 1) << shift;
        const int32_t n = count_at_least(team, from.keys + from.offsets[g], from.counts[g], static_cast<Key>(bound ^ bias));
        if (team.lane() == 0) at_least[row] = n;
    }
};

/// The greatest digit that k keys reach.
template <class Key>
struct take_digit {
    using counter = count_digits<Key>;
    const int64_t* at_least; // (G,15)  over all ranks
    const int64_t* k;        // (1)
    typename counter::bits* known; // (G)
    int shift;

    FASTMOE_HOST_DEVICE void operator()(int64_t g) const
    {
        typename counter::bits reached = 0;
        for (int64_t d = 1; d <= counter::bounds; ++d)
            if (at_least[g * counter::bounds + d - 1] >= *k) reached = static_cast<typename counter::bits>(d);
        known[g] |= reached << shift;
    }
};

template <class Key>
struct keys_of_bits {
    const typename count_digits<Key>::bits* known;
    Key* least;

    FASTMOE_HOST_DEVICE void operator()(int64_t g) const { least[g] = static_cast<Key>(known[g] ^ count_digits<Key>::bias); }
};

/// least(g) = the k-th greatest key of group g over all ranks; no_key where there are fewer. The same on all ranks. A sum
/// over ranks of 15 G integers for each four bits of a key.
/// @param k      1 or more, memory of the executor, the same on all ranks                       // (1)
/// @param least  overwritten                                                                   // (G)
template <executor Executor, class Key, class Communicator>
void kth_over_ranks(Executor& ex, const grouped_keys<Key>& from, const int64_t* k, const Communicator& c,
                    vector_view<Key> least, int64_t mean, arena& scratch)
{
    using counter = count_digits<Key>;
    const arena::scope lent(scratch);
    const auto known = scratch.vector<typename counter::bits>(from.groups);
    const auto at_least = scratch.vector<int64_t>(from.groups * counter::bounds);
    if (!scratch.measuring()) {
        fastmoe::for_each(ex, from.groups, fill<typename counter::bits>{known.data_handle(), 0});
        for (int shift = sizeof(Key) * 8 - counter::digit; shift >= 0; shift -= counter::digit) {
            fastmoe::for_each_row(ex, at_least.extent(0),
                                  counter{from, known.data_handle(), at_least.data_handle(), shift},
                                  {.width = mean + 1});
            c.all_reduce(ex, at_least);
            fastmoe::for_each(ex, from.groups, take_digit<Key>{at_least.data_handle(), k, known.data_handle(), shift});
        }
        fastmoe::for_each(ex, from.groups, keys_of_bits<Key>{known.data_handle(), least.data_handle()});
    }
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
