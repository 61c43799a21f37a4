// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A routing that may be indexed by, whatever a gate has written: ids in range, no expert twice in a token, offsets in order.
#pragma once

#include <fastmoe/ops/bucket.hpp>
#include <fastmoe/routing/routing.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// Of a token, that are compared with each other.
inline constexpr int64_t few_choices = 16;

/// Copies ids, with -1 for those that are out of range or stand earlier in the same token, and records both: each choice
/// is compared with those before it in its token.
template <class Real>
struct check_choice {
    routing<Real> route;
    fault_recorder faults;

    /// The expert of choice c, whose token's choices begin at `begin`.
    FASTMOE_HOST_DEVICE int32_t operator()(int64_t c, int64_t begin) const
    {
        const int32_t e = route.experts(c);
        if (e == -1) return -1;
        if (e < -1 || e >= route.total_experts) {
            faults.record(fault_kind::expert_out_of_range, route.origin + c, e);
            return -1;
        }
        bool repeated = false;
        for (int64_t earlier = begin; earlier < c; ++earlier) repeated |= route.experts(earlier) == e;
        if (repeated) faults.record(fault_kind::expert_repeated, route.origin + c, e);
        return repeated ? -1 : e;
    }
};

/// That, of a token's few choices.
template <class Real>
struct check_few {
    check_choice<Real> checked;
    vector_view<int32_t> ids; // (C)

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        const int64_t begin = t * checked.route.k;
        for (int64_t c = begin; c < begin + checked.route.k; ++c) ids(c) = checked(c, begin);
    }
};

/// That, of many, which the lanes share. Where a lane stands alone, they are looked up in a table of the token that last
/// chose an expert.
template <class Real>
struct check_many {
    using vectorized = void;
    check_choice<Real> checked;
    vector_view<int32_t> ids;    // (C)
    matrix_view<int32_t> chosen; // (blocks,E), or (0,E): no table
    int64_t block_size;          // tokens of a row: 1 without a table

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t b) const
    {
        const auto& route = checked.route;
        const auto& self = *this;
        if (chosen.extent(0) > 0) {
            int32_t* last = chosen.data_handle() + b * chosen.extent(1);
            for (int64_t e = 0; e < chosen.extent(1); ++e) last[e] = -1;
            const int64_t end = (b + 1) * block_size < route.tokens ? (b + 1) * block_size : route.tokens;
            for (int64_t t = b * block_size; t < end; ++t)
                for (int64_t c = route.begin(t); c < route.end(t); ++c) ids(c) = looked_up(t, c, last);
        } else {
            const int64_t begin = route.begin(b);
            team.for_each(route.end(b) - begin, [&self, begin](int64_t j) { self.ids(begin + j) = self.checked(begin + j, begin); });
        }
    }

    FASTMOE_HOST_DEVICE int32_t looked_up(int64_t t, int64_t c, int32_t* last) const
    {
        const int32_t e = checked(c, c); // alone
        if (e < 0) return -1;
        const bool repeated = last[e] == t;
        last[e] = static_cast<int32_t>(t);
        if (repeated) checked.faults.record(fault_kind::expert_repeated, checked.route.origin + c, e);
        return repeated ? -1 : e;
    }
};

struct clear_ids {
    using vectorized = void;
    int32_t* ids; // (C)

    FASTMOE_HOST_DEVICE void operator()(int64_t c) const { ids[c] = -1; }
};

/// body(safe, ids): the routing with `first` repaired, and its ids with -1 for those that are out of range or stand twice in
/// one token, all recorded as faults.                                                                            // ids (C)
template <class Executor, class Real, class Body>
void with_checked_choices(Executor& ex, const routing<Real>& route, arena& scratch, const Body& body)
{
    constexpr bool alone = has_readable_memory<Executor>; // the lanes of a host
    const auto ids = scratch.vector<int32_t>(route.choices());
    const auto blocks = alone ? bucket_blocks::of<Executor>(route.tokens) : bucket_blocks{1, route.tokens};
    const bool many = route.ragged() || route.k > few_choices;
    const auto chosen = scratch.matrix<int32_t>(many && alone ? blocks.count : 0, route.total_experts);
    routing<Real> safe = route;
    if (route.ragged()) {
        const auto repaired = scratch.vector<int32_t>(route.tokens + 1);
        safe.first = repaired;
        if (!scratch.measuring()) {
            fastmoe::for_each_row(ex, 1, repair_first<Real>{route, repaired, ex.faults()}, {.width = route.tokens});
            fastmoe::for_each(ex, route.choices(), clear_ids{ids.data_handle()});
        }
    }
    if (!scratch.measuring()) {
        const check_choice<Real> check_one{safe, ex.faults()};
        if (many)
            fastmoe::for_each_row(ex, blocks.count, check_many<Real>{check_one, ids, chosen, blocks.size},
                                  {.width = blocks.size * (route.ragged() ? few_choices : route.k)});
        else fastmoe::for_each(ex, route.tokens, check_few<Real>{check_one, ids});
    }
    body(safe, ids);
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
