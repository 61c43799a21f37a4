// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The lists behind an exchange: which token goes to which group of ranks, and where its row and its choices stand in what is
/// sent. Part of the exchanges.
#pragma once

#include <fastmoe/ops/bucket.hpp>
#include <fastmoe/ops/rows.hpp>
#include <fastmoe/parallel/exchange.hpp>
#include <fastmoe/routing/plan.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// What stays of the lists until backward is done. Entries are by choice and slice: those of choice c begin at c * slices.
struct sent_choices {
    vector_view<int32_t> row_of;   // (C*slices)  row that is sent, at a token's first choice on a group of ranks; -1 at others
    vector_view<int32_t> at;       // (C*slices)  place of the choice among those that are sent; -1: not sent
    vector_view<int32_t> token_of; // (N)         token of a row; -1: none
    int64_t slices = 1;
};

inline sent_choices reserve_sent_choices(arena& memory, int64_t choices, int64_t rows, int64_t slices)
{
    expects(choices <= INT32_MAX / slices, "choices * slices", choices, "at most ", INT32_MAX / slices, " choices");
    sent_choices s;
    s.row_of = memory.vector<int32_t>(choices * slices);
    s.at = memory.vector<int32_t>(choices * slices);
    s.token_of = memory.vector<int32_t>(rows);
    s.slices = slices;
    return s;
}

/// The group of each choice, and again at a token's first choice on a group; -1 elsewhere.
template <class Real, class Rule>
struct find_groups {
    routing<Real> route;
    placed_experts<Rule> place;
    vector_view<const int32_t> ids; // (C)
    vector_view<int32_t> group;     // (C)
    vector_view<int32_t> leads;     // (C)

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        const int64_t begin = route.begin(t), end = route.end(t);
        for (int64_t c = begin; c < end; ++c) {
            const int32_t g = ids(c) < 0 ? -1 : place.of(ids(c)).group;
            bool first = g >= 0;
            for (int64_t earlier = begin; first && earlier < c; ++earlier) first = group(earlier) != g;
            group(c) = g;
            leads(c) = first ? g : -1;
        }
    }
};

/// Who goes where: choices and tokens of each group, and the rank of each within its group, in choice order.
struct grouped_choices {
    vector_view<const int32_t> group;       // (C)
    vector_view<const int32_t> choice_rank; // (C)
    vector_view<const int32_t> row_rank;    // (C)  -1: not the token's first on its group
    vector_view<const int32_t> choices;     // (P)
    vector_view<const int32_t> rows;        // (P)
};

/// body(safe, ids, grouped): the routing with its choices sorted by group. Faults of the gate are recorded.
template <class Executor, class Real, class Rule, class Body>
void with_grouped_choices(Executor& ex, const routing<Real>& route, const placed_experts<Rule>& place, arena& scratch,
                          const Body& body)
{
    with_checked_choices(ex, route, scratch, [&](const routing<Real>& safe, vector_view<int32_t> ids) {
        const int64_t choices = route.choices(), groups = place.groups;
        const auto group = scratch.vector<int32_t>(choices), leads = scratch.vector<int32_t>(choices);
        const auto choice_rank = scratch.vector<int32_t>(choices), row_rank = scratch.vector<int32_t>(choices);
        const auto choice_count = scratch.vector<int32_t>(groups), row_count = scratch.vector<int32_t>(groups);
        if (!scratch.measuring() && route.ragged()) { // choices that belong to no token
            fastmoe::for_each(ex, choices, clear_ids{group.data_handle()});
            fastmoe::for_each(ex, choices, clear_ids{leads.data_handle()});
        }
        if (!scratch.measuring())
            fastmoe::for_each(ex, route.tokens, find_groups<Real, Rule>{safe, place, ids, group, leads});
        bucket(ex, group, choice_count, choice_rank, scratch);
        bucket(ex, leads, row_count, row_rank, scratch);
        body(safe, vector_view<const int32_t>(ids), grouped_choices{group, choice_rank, row_rank, choice_count, row_count});
    });
}

/// The rows that are sent; zeros where there is none.                                             // (T,D) -> (N,D)
template <class Executor, class T>
void gather_sent(Executor& ex, matrix_view<const T> x, const sent_choices& lists, matrix_view<T> rows)
{
    using scale = unit_scale<accumulate_t<T>>;
    fastmoe::for_each_row(ex, rows.extent(0),
                          gather_rows<accumulate_t<T>, T, scale>{{x, lists.token_of}, rows, scale{}},
                          {.width = x.extent(1)});
}

/// y (T,D) = the sums of what came back.
template <class Executor, class P, class Real, class Y>
void sum_returned(Executor& ex, const returned_rows<P, Real>& back, matrix_view<Y> y)
{
    using sum = sum_row_lists<Real, P, Y, token_lists<Real>, unit_scale<Real>>;
    fastmoe::for_each_row(ex, y.extent(0), sum{back.rows, back.row_of, y, write_mode::overwrite, back.lists, {}},
                          {.width = y.extent(1)});
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
