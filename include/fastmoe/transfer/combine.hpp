// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Combine: sums each token's expert rows, and its backward. No atomics: every token reads its own slots in choice order.
#pragma once

#include <fastmoe/ops/rows.hpp>
#include <fastmoe/routing/plan.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace verbs {
struct combine;
struct combine_weights_backward;
} // namespace verbs

namespace detail {

template <class Real>
struct choice_weight {
    vector_view<const Real> weights; // (C)

    FASTMOE_HOST_DEVICE Real operator()(int64_t c) const noexcept { return weights(c); }
};

template <class Real>
void expects_same_plan(const routing<Real>& route, const plan& p)
{
    expects_routing(route);
    expects(route.tokens == p.tokens, "routing.tokens", route.tokens, "the plan's T = ", p.tokens);
    expects_shape(p.slot_of, "plan.slot_of (C)", route.choices());
}

} // namespace detail

template <class Executor>
struct implementation<verbs::combine, Executor> {
    template <class Real, class T, class Y, class Scale>
    static void run(Executor& ex, matrix_view<const T> rows, const routing<Real>& route, const plan& p, matrix_view<Y> y,
                    const Scale& scale, write_mode mode)
    {
        fastmoe::for_each_row(
            ex, y.extent(0),
            detail::sum_row_lists<Real, T, Y, routing<Real>, Scale>{rows, p.slot_of, y, mode, route, scale},
            {.width = y.extent(1)});
    }
};

/// Sums each token's rows, weighted, in choice order: y[t] (+)= sum_c weights[c] * rows[slot_of[c]].
/// Accumulates in accumulate_t and rounds once, so the result does not depend on the executor's schedule.
/// @param rows   expert outputs                                // (S,D)
/// @param route  choices and weights; dropped choices add 0     // (C)
/// @param y      overwritten, or added to                       // (T,D)
/// @throws invalid_argument if shapes disagree with the plan, or y and rows overlap
template <executor Executor, class T, class Real, class Y>
void combine(Executor& ex, matrix_view<T> rows, const routing<Real>& route, const plan& p, matrix_view<Y> y,
             write_mode mode = write_mode::overwrite)
{
    detail::expects_same_plan(route, p);
    expects_shape(rows, "rows (S,D)", p.slots, y.extent(1));
    expects_shape(y, "y (T,D)", p.tokens, rows.extent(1));
    detail::expects_apart(y, "y (T,D)", rows, "rows (S,D)");
    implementation<verbs::combine, Executor>::run(ex, matrix_view<const T>(rows), route, p, y,
                                                  detail::choice_weight<Real>{route.weights}, mode);
}

/// The same with every weight 1: the adjoint of dispatch(), which sums gradients of rows into gradients of tokens.
/// @throws invalid_argument if shapes disagree with the plan
template <executor Executor, class T, class Real, class Y>
void combine_unweighted(Executor& ex, matrix_view<T> rows, const routing<Real>& route, const plan& p, matrix_view<Y> y,
                        write_mode mode = write_mode::overwrite)
{
    detail::expects_same_plan(route, p);
    expects_shape(rows, "rows (S,D)", p.slots, y.extent(1));
    expects_shape(y, "y (T,D)", p.tokens, rows.extent(1));
    detail::expects_apart(y, "y (T,D)", rows, "rows (S,D)");
    implementation<verbs::combine, Executor>::run(ex, matrix_view<const T>(rows), route, p, y, unit_scale<Real>{}, mode);
}

template <class Executor>
struct implementation<verbs::combine_weights_backward, Executor> {
    template <class Real, class T>
    static void run(Executor& ex, matrix_view<const T> dy, matrix_view<const T> rows, const routing<Real>& route,
                    const plan& p, vector_view<Real> dweights)
    {
        fastmoe::for_each_row(ex, dy.extent(0),
                              detail::dot_row_lists<Real, T, routing<Real>>{dy, rows, p.slot_of, dweights, route},
                              {.width = dy.extent(1)});
    }
};

/// The gradient of combine() with respect to the weights: dweights[c] = <dy[t], rows[slot_of[c]]>, 0 for dropped choices.
/// The gradient with respect to the rows is dispatch(ex, dy, weights, plan, drows).
/// @param dy        gradient of y                   // (T,D)
/// @param rows      what combine() read              // (S,D)
/// @param dweights  overwritten                      // (C)
/// @throws invalid_argument if shapes disagree with the plan
template <executor Executor, class T, class Real>
void combine_weights_backward(Executor& ex, matrix_view<T> dy,
                              type_identity_t<matrix_view<const std::remove_const_t<T>>> rows,
                              const routing<Real>& route, const plan& p, type_identity_t<vector_view<Real>> dweights)
{
    detail::expects_same_plan(route, p);
    expects_shape(dy, "dy (T,D)", p.tokens, rows.extent(1));
    expects_shape(rows, "rows (S,D)", p.slots, dy.extent(1));
    expects_shape(dweights, "dweights (C)", route.choices());
    const matrix_view<const std::remove_const_t<T>> read = dy;
    implementation<verbs::combine_weights_backward, Executor>::run(ex, read, rows, route, p, dweights);
}

} // namespace fastmoe::inline FASTMOE_ABI
