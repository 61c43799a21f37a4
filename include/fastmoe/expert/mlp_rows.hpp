// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What happens to a row of an mlp between its products: activation and routing weight, forward and backward, as epilogues.
/// Part of mlp.hpp.
#pragma once

#include <fastmoe/expert/expert.hpp>
#include <fastmoe/ops/activate.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Where a row's routing weight is multiplied in: on the expert's output (most models), on the activation between its
/// matrices, or on its input (Llama 4). With biases the three differ; without them only rounding does, as long as the
/// activation is not involved.
enum class weigh_at : std::uint8_t { output, activation, input };

namespace detail {

/// After the first GEMM: a(s) = weight * activation(pre(s)).
template <class Activation, class T>
struct activate {
    using vectorized = void;
    using real = accumulate_t<T>;
    matrix_view<const T> pre; // (S,H')
    matrix_view<T> a;         // (S,H)
    gated_columns columns;
    expert_input<T> in;
    bool weighted;
    Activation activation;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t, int64_t s) const
    {
        const real w = weighted ? in.weight(s) : real(1);
        activate_row<Activation, real>(team, activation, pre.data_handle() + s * pre.extent(1),
                                       a.data_handle() + s * a.extent(1), a.extent(1), columns, w);
    }
};

/// After the second GEMM's dgrad: from d = dy W2 in `a`, the gradient of the pre-activation, the weighted activation
/// over `a`, and the weight's gradient <d, activation> (+ <dy, b2> where the output is weighted).
template <class Activation, class T>
struct activate_backward {
    using vectorized = void;
    using real = accumulate_t<T>;
    matrix_view<const T> pre;        // (S,H')
    matrix_view<T> a;                // (S,H)
    matrix_view<T> dpre;             // (S,H')
    indexed_rows<T> dy;              // (S,D)
    matrix_view<const T> down_bias;  // (E,D), or without memory
    vector_view<real> dweights;      // (C)
    gated_columns columns;
    expert_input<T> in;
    weigh_at where;
    Activation activation;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t e, int64_t s) const
    {
        const real w = where == weigh_at::input ? real(1) : in.weight(s);
        real product = activate_row_backward<Activation, real>(
            team, activation, pre.data_handle() + s * pre.extent(1), a.data_handle() + s * a.extent(1),
            dpre.data_handle() + s * dpre.extent(1), a.extent(1), columns, w);
        if (where == weigh_at::output && down_bias.data_handle()) product += dot(team, dy.row(s), row(down_bias, e));
        const int64_t c = in.choice_of(s);
        if (where != weigh_at::input && team.lane() == 0 && c >= 0) dweights(c) = product;
    }

    template <class Team>
    FASTMOE_HOST_DEVICE static real dot(Team& team, const T* left, vector_view<const T> right)
    {
        const T* b = right.data_handle();
        return team.reduce(
            right.extent(0), real(0), [](real x, real y) { return x + y; },
            [=](int64_t j) { return left ? real(left[j]) * real(b[j]) : real(0); });
    }
};

/// After the first GEMM's dgrad when the input was weighted: dw = <dx', x>, dx = w dx'.
template <class T>
struct unweigh_input {
    using vectorized = void;
    using real = accumulate_t<T>;
    matrix_view<T> dx;          // (S,D)
    vector_view<real> dweights; // (C)
    expert_input<T> in;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t, int64_t s) const
    {
        const int64_t c = in.choice_of(s);
        const T* x = in.x.row(s);
        if (c < 0 || !x) return;
        T* d = dx.data_handle() + s * dx.extent(1);
        const real w = in.weights(c);
        const real product = team.reduce(
            dx.extent(1), real(0), [](real a, real b) { return a + b; },
            [=](int64_t j) {
                const real value = real(d[j]);
                d[j] = T(w * value);
                return value * real(x[j]);
            });
        if (team.lane() == 0) dweights(c) = product;
    }
};

template <class T>
struct input_weight {
    expert_input<T> in;
    FASTMOE_HOST_DEVICE accumulate_t<T> operator()(int64_t s) const noexcept { return in.weight(s); }
};

} // namespace detail

} // namespace fastmoe::inline FASTMOE_ABI
