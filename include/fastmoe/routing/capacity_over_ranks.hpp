// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A capacity that counts the tokens of all ranks: the ranks drop what one rank would drop of the joined batch. Sums of
/// integers over the ranks are all that it asks of the communicator. Part of capacity.hpp.
#pragma once

#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/routing/drop_choices.hpp>
#include <fastmoe/routing/rank_threshold.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// The bucket of a choice: its expert, or its place in the token and then its expert.
struct line_of_choice {
    const int32_t* ids; // (C)
    int32_t* lines;     // (C)
    int64_t experts, places;

    FASTMOE_HOST_DEVICE void operator()(int64_t c) const
    {
        lines[c] = ids[c] < 0 ? -1 : static_cast<int32_t>(c % places * experts + ids[c]);
    }
};

/// Own counts in the own row of a table of all ranks, zeros in the others; then the own number of choices.
struct write_row {
    const int32_t* counts; // (W)
    int64_t* table;        // (R*W+1)
    int64_t width, rank, ranks, choices;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        const int64_t r = i / width;
        table[i] = i == ranks * width ? choices : r == rank ? counts[i % width] : 0;
    }
};

/// base(line): how many choices of its expert come before this rank's first of that line. Lines of an expert go by place,
/// within a place by rank.
struct add_before {
    const int64_t* table; // (R*W+1)
    int64_t* base;        // (W)
    int64_t experts, places, rank, ranks;

    FASTMOE_HOST_DEVICE void operator()(int64_t e) const
    {
        const int64_t width = experts * places;
        int64_t before = 0;
        for (int64_t p = 0; p < places; ++p)
            for (int64_t r = 0; r < ranks; ++r) {
                const int64_t line = p * experts + e;
                if (r == rank) base[line] = before;
                before += table[r * width + line];
            }
    }
};

/// Stays if fewer than the capacity of all ranks' choices come before it.
struct before_limit_of_all {
    const int32_t* ranks;  // (C)  within the line
    const int64_t* base;   // (W)
    const int64_t* choices; // (1) of all ranks
    double factor;
    int64_t experts, places;

    FASTMOE_HOST_DEVICE bool operator()(int64_t c, int64_t place, int32_t expert) const
    {
        const int64_t line = places > 1 ? place * experts + expert : expert;
        return base[line] + ranks[c] < capacity_of(factor, *choices, experts);
    }
};

struct limit_of_all {
    int64_t* limit; // (1)  choices of all ranks, then their capacity
    double factor;
    int64_t experts;

    FASTMOE_HOST_DEVICE void operator()(int64_t) const { *limit = capacity_of(factor, *limit, experts); }
};

/// Own counts of keys above and equal to an expert's least, in the own row of a table of all ranks.
template <class Key>
struct count_around {
    using vectorized = void;
    sorted_choices<Key> by_expert;
    const Key* least; // (E)
    int64_t* table;   // (R,2E)
    int64_t rank;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t e) const
    {
        const int64_t experts = by_expert.counts.extent(0), n = by_expert.counts(e);
        const Key* keys = by_expert.keys.data_handle() + by_expert.offsets(e);
        const Key bound = least[e];
        const int32_t above = team.reduce(
            n, int32_t{0}, adds{}, [=](int64_t i) { return static_cast<int32_t>(keys[i] > bound); });
        const int32_t equal = team.reduce(
            n, int32_t{0}, adds{}, [=](int64_t i) { return static_cast<int32_t>(keys[i] == bound); });
        if (team.lane() != 0) return;
        table[rank * 2 * experts + e] = above;
        table[rank * 2 * experts + experts + e] = equal;
    }
};

template <class Key>
struct keep_greatest_of_all {
    sorted_choices<Key> by_expert;
    const Key* least;     // (E)
    const int64_t* table; // (R,2E)
    const int64_t* limit; // (1)
    int64_t rank, ranks;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t e) const
    {
        const int64_t experts = by_expert.counts.extent(0), n = by_expert.counts(e);
        const Key* keys = by_expert.keys.data_handle() + by_expert.offsets(e);
        int32_t* kept = by_expert.kept.data_handle() + by_expert.offsets(e);
        if (*limit == 0) return team.for_each(n, [=](int64_t i) { kept[i] = 0; });
        int64_t room = *limit;
        for (int64_t r = 0; r < ranks; ++r) {
            room -= table[r * 2 * experts + e];
            if (r < rank) room -= table[r * 2 * experts + experts + e];
        }
        mark_kept(team, keys, n, least[e], room, kept);
    }
};

/// Keeps what comes first, by token (one place) or by place in the token.
template <class Executor, class Real, class Communicator>
void drop_last_of_all(Executor& ex, const safe_choices<Real>& safe, double factor, after_drop weights, int64_t places,
                      const Communicator& c, arena& scratch)
{
    const int64_t choices = safe.route.choices(), experts = safe.route.total_experts, width = experts * places;
    const int64_t ranks = c.size(), rank = c.rank();
    expects(width <= INT32_MAX, "experts * k", width, "at most 2^31 - 1 to bound choices by place over ranks");
    const auto lines = scratch.vector<int32_t>(places > 1 ? choices : 0);
    const auto order = scratch.vector<int32_t>(choices);
    const auto counts = scratch.vector<int32_t>(width);
    const auto table = scratch.vector<int64_t>(ranks * width + 1);
    const auto base = scratch.vector<int64_t>(width);
    if (!scratch.measuring() && places > 1)
        fastmoe::for_each(ex, choices, line_of_choice{safe.ids.data_handle(), lines.data_handle(), experts, places});
    bucket(ex, places > 1 ? lines : safe.ids, counts, order, scratch);
    if (scratch.measuring()) return;
    fastmoe::for_each(ex, table.extent(0),
                      write_row{counts.data_handle(), table.data_handle(), width, rank, ranks, choices});
    c.all_reduce(ex, table);
    fastmoe::for_each(ex, experts, add_before{table.data_handle(), base.data_handle(), experts, places, rank, ranks});
    drop(ex, safe, weights,
         before_limit_of_all{order.data_handle(), base.data_handle(), table.data_handle() + ranks * width, factor, experts,
                             places});
}

/// Keeps the greatest weights; ties by rank, then by token.
template <class Executor, class Real, class Communicator>
void drop_least_of_all(Executor& ex, const safe_choices<Real>& safe, double factor, after_drop weights,
                       const Communicator& c, arena& scratch)
{
    using key = order_key<Real>;
    const int64_t choices = safe.route.choices(), experts = safe.route.total_experts, ranks = c.size(), rank = c.rank();
    const auto limit = scratch.vector<int64_t>(1);
    const auto least = scratch.vector<key>(experts);
    const auto table = scratch.vector<int64_t>(ranks * 2 * experts);
    const auto sorted = sort_by_weight(ex, safe, scratch);
    const bool live = !scratch.measuring();
    if (live) {
        fastmoe::for_each(ex, 1, write_row{nullptr, limit.data_handle(), 1, 0, 0, choices});
        c.all_reduce(ex, limit);
        fastmoe::for_each(ex, 1, limit_of_all{limit.data_handle(), factor, experts});
    }
    const int64_t mean = experts > 0 ? choices / experts + 1 : 1;
    const int64_t* cap = limit.data_handle();
    kth_over_ranks(ex,
                   grouped_keys<key>{sorted.keys.data_handle(), sorted.offsets.data_handle(), sorted.counts.data_handle(),
                                     experts},
                   cap, c, least, mean, scratch);
    if (!live) return;
    const key* bounds = least.data_handle();
    int64_t* around = table.data_handle();
    fastmoe::for_each(ex, table.extent(0), fill<int64_t>{around, 0});
    fastmoe::for_each_row(ex, experts, count_around<key>{sorted, bounds, around, rank}, {.width = 2 * mean});
    c.all_reduce(ex, table);
    fastmoe::for_each_row(ex, experts, keep_greatest_of_all<key>{sorted, bounds, around, cap, rank, ranks},
                          {.width = mean});
    drop(ex, safe, weights, marks_of(sorted));
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
