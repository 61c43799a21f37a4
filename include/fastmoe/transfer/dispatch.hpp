// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Dispatch: copies each token to the slots of its experts. GEMMs that gather need no copy; see gathered().
#pragma once

#include <fastmoe/ops/rows.hpp>
#include <fastmoe/routing/plan.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace verbs {
struct dispatch;
}

namespace detail {

/// The routing weight of a slot; 0 for padding.
template <class Real>
struct slot_weight {
    vector_view<const Real> weights;      // (C)
    vector_view<const int32_t> choice_of; // (S)

    FASTMOE_HOST_DEVICE Real operator()(int64_t s) const noexcept
    {
        const int64_t c = choice_of(s);
        return c < 0 ? Real(0) : weights(c);
    }
};

template <class T>
void expects_dispatch(matrix_view<const T> x, const plan& p, matrix_view<T> rows)
{
    expects_shape(x, "x (T,D)", p.tokens, rows.extent(1));
    expects_shape(rows, "rows (S,D)", p.slots, x.extent(1));
    expects_shape(p.token_of, "plan.token_of (S)", p.slots);
    expects_apart(rows, "rows (S,D)", x, "x (T,D)");
}

} // namespace detail

/// The rows that dispatch would copy, as a view.                                  // (S,D)
/// Looks at extents alone, so it serves a plan from a measuring arena too.
/// @param x  tokens                                     // (T,D)
/// @throws invalid_argument if x has not the plan's tokens, or the plan not an entry for every slot
template <class T>
indexed_rows<std::remove_const_t<T>> gathered(matrix_view<T> x, const plan& p)
{
    expects(x.extent(0) == p.tokens, "x (T,D)", x.extent(0), "the plan's T = ", p.tokens);
    expects(p.token_of.extent(0) == p.slots, "plan.token_of (S)", p.token_of.extent(0), "S = ", p.slots);
    return {x, p.token_of};
}

template <class Executor>
struct implementation<verbs::dispatch, Executor> {
    template <class Real, class T, class Scale>
    static void run(Executor& ex, const indexed_rows<T>& from, matrix_view<T> rows, const Scale& scale)
    {
        fastmoe::for_each_row(ex, rows.extent(0), detail::gather_rows<Real, T, Scale>{from, rows, scale},
                              {.width = rows.extent(1)});
    }
};

/// rows[s] = x[token_of[s]], and zeros for padding slots. Its adjoint is combine() without weights.
/// @param x     tokens                                  // (T,D)
/// @param rows  overwritten                             // (S,D)
/// @throws invalid_argument if shapes disagree with the plan, or rows and x overlap
template <executor Executor, class T>
void dispatch(Executor& ex, type_identity_t<matrix_view<const T>> x, const plan& p, matrix_view<T> rows)
{
    detail::expects_dispatch(x, p, rows);
    using Real = accumulate_t<T>;
    implementation<verbs::dispatch, Executor>::template run<Real>(ex, indexed_rows<T>{x, p.token_of}, rows,
                                                                  unit_scale<Real>{});
}

/// rows[s] = weights[choice_of[s]] * x[token_of[s]], rounded once: routing weights applied on the input.
/// Also the gradient of combine() with respect to its rows, with dy for x.
/// @param weights  of the choices                       // (C)
/// @throws invalid_argument if shapes disagree with the plan
template <executor Executor, class T>
void dispatch(Executor& ex, type_identity_t<matrix_view<const T>> x,
              type_identity_t<vector_view<const accumulate_t<T>>> weights, const plan& p, matrix_view<T> rows)
{
    detail::expects_dispatch(x, p, rows);
    expects_shape(weights, "weights (C)", p.slot_of.extent(0));
    expects_shape(p.choice_of, "plan.choice_of (S)", p.slots);
    using Real = accumulate_t<T>;
    implementation<verbs::dispatch, Executor>::template run<Real>(ex, indexed_rows<T>{x, p.token_of}, rows,
                                                                  detail::slot_weight<Real>{weights, p.choice_of});
}

} // namespace fastmoe::inline FASTMOE_ABI
