// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Token and position embedding. The gradient of the token table is a sum over groups, and which tokens share an id is
/// what the library's plan finds: a token is a "choice", its id the "expert".
#pragma once

#include <fastmoe/ops/reduce.hpp>
#include <fastmoe/routing/plan.hpp>

#include "train_gpt/team_math.hpp"

namespace train_gpt {

namespace detail {

template <class Real>
struct embed {
    using vectorized = void;
    const int32_t* ids;     // (T)
    int64_t length, width;
    const Real* table;      // (V,D)
    const Real* positions;  // (L,D)
    Real* x;                // (T,D)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const Real* a = table + ids[t] * width;
        const Real* b = positions + t % length * width;
        Real* out = x + t * width;
        team.for_each(width, [=](int64_t d) { out[d] = a[d] + b[d]; });
    }
};

/// The gradient of a position: the sum over sequences, in their order; zero where no sequence reaches.
template <class Real>
struct position_gradient {
    using vectorized = void;
    int64_t batch, length, width;
    const Real* dx;  // (B*L,D)
    Real* dpositions; // (context,D)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t p) const
    {
        Real* out = dpositions + p * width;
        team.for_each(width, [=](int64_t d) { out[d] = Real(0); });
        if (p >= length) return;
        for (int64_t b = 0; b < batch; ++b) {
            const Real* from = dx + (b * length + p) * width;
            team.for_each(width, [=](int64_t d) { out[d] += from[d]; });
        }
    }
};

} // namespace detail

/// x[t] = table[ids[t]] + positions[t mod length].
/// @param ids  tokens of sequences of `length` positions, in [0, V)   // (T)
template <class Real, class Executor>
void embed(Executor& ex, vector_view<const int32_t> ids, int64_t length, matrix_view<const type_identity_t<Real>> table,
           matrix_view<const type_identity_t<Real>> positions, matrix_view<Real> x)
{
    fm::expects(length <= positions.extent(0), "length", length, "at most ", positions.extent(0), " positions");
    fm::for_each_row(ex, x.extent(0),
                     detail::embed<Real>{ids.data_handle(), length, x.extent(1), table.data_handle(),
                                         positions.data_handle(), x.data_handle()},
                     {.width = x.extent(1)});
}

/// @param dtable      added to: the head shares the table and has written its part   // (V,D)
/// @param dpositions  overwritten                                                    // (context,D)
/// @param scratch     taken and given back; on a measuring arena only counted
template <class Real, class Executor>
void embed_backward(Executor& ex, vector_view<const int32_t> ids, int64_t length,
                    matrix_view<const type_identity_t<Real>> dx, matrix_view<Real> dtable,
                    matrix_view<type_identity_t<Real>> dpositions, fm::arena& scratch)
{
    const int64_t tokens = dx.extent(0), width = dx.extent(1), mark = scratch.used();
    auto route = fm::reserve_routing<Real>(scratch, tokens, dtable.extent(0), 1);
    const auto plan = fm::reserve_plan(scratch, tokens, tokens, dtable.extent(0));
    if (!scratch.measuring()) // the plan only reads ids
        route.experts = vector_view<int32_t>(const_cast<int32_t*>(ids.data_handle()), tokens);
    fm::make_plan(ex, route, plan, scratch);
    if (!scratch.measuring()) {
        fm::sum_groups(ex, fm::indexed_rows<Real>{dx, plan.token_of}, plan.counts, plan.offsets, fm::unit_scale<Real>{},
                       dtable, fm::write_mode::accumulate);
        fm::for_each_row(ex, dpositions.extent(0),
                         detail::position_gradient<Real>{tokens / length, length, width, dx.data_handle(),
                                                         dpositions.data_handle()},
                         {.width = tokens / length * width});
    }
    scratch.rewind(mark);
}

} // namespace train_gpt
