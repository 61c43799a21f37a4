// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What happens to a row of an mlp between its products: activation and routing weight, forward and backward, as epilogues.
/// Part of mlp.hpp.
#pragma once

#include <fastmoe/expert/expert.hpp>
#include <fastmoe/ops/activate_rows.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Where a row's routing weight is multiplied in: on the expert's output (most models), on the activation between its
/// matrices, or on its input (Llama 4). With biases the three differ; without them only rounding does, as long as the
/// activation is not involved.
enum class weigh_at : std::uint8_t { output, activation, input };

namespace detail {

/// Pairs need gate and up side by side, and rows of results in whole lines of 16 bytes.
template <class Activation, class T>
bool takes_pairs(const gated_columns& columns, const matrix_view<T>& a) noexcept
{
    return (!Activation::gated || columns.step == 2) && a.extent(1) % 8 == 0 && reinterpret_cast<std::uintptr_t>(a.data_handle()) % 16 == 0;
}

/// activate, by pairs: of gate and up, or of two units. The activation is of the rounded pre-activation, as backward reads it.
template <class Activation, class T>
struct activate_pairs {
    static constexpr int more = Activation::gated ? 1 : 2;
    static constexpr bool has_sums = false;
    matrix_view<T> a; // (S,H)
    expert_input<T> in;
    bool weighted;
    bool keeps_pre; ///< for a backward pass
    Activation activation;

    FASTMOE_HOST_DEVICE const matrix_view<T>& result() const noexcept { return a; }
    FASTMOE_HOST_DEVICE bool writes_y() const noexcept { return keeps_pre; }
    FASTMOE_HOST_DEVICE float begin(int64_t s) const { return weighted ? in.weight(s) : 1.0f; }
    struct nothing {};
    FASTMOE_HOST_DEVICE nothing read(int64_t, int64_t) const noexcept { return {}; }
    FASTMOE_HOST_DEVICE float pair(float w, nothing, const float (&sums)[2], T (&y)[2], T (&out)[more]) const
    {
        y[0] = T(sums[0]), y[1] = T(sums[1]);
        if constexpr (Activation::gated) {
            out[0] = T(w * activation.value(float(y[0]), float(y[1])));
        } else {
            out[0] = T(w * activation.value(float(y[0])));
            out[1] = T(w * activation.value(float(y[1])));
        }
        return 0;
    }
};

/// activate_backward, by pairs of hidden units.
template <class Activation, class T>
struct activate_backward_pairs {
    static constexpr int each = Activation::gated ? 2 : 1, more = 2 * each;
    static constexpr bool has_sums = true;
    matrix_view<const T> pre; // (S,H')
    matrix_view<T> dpre;      // (S,H')
    expert_input<T> in;
    bool weighted;
    Activation activation;

    FASTMOE_HOST_DEVICE const matrix_view<T>& result() const noexcept { return dpre; }
    FASTMOE_HOST_DEVICE static constexpr bool writes_y() noexcept { return true; }
    FASTMOE_HOST_DEVICE float begin(int64_t s) const { return weighted ? in.weight(s) : 1.0f; }
    struct alignas(2 * each * sizeof(T)) units {
        T of[2][each];
    };
    FASTMOE_HOST_DEVICE units read(int64_t s, int64_t n) const
    {
        return *reinterpret_cast<const units*>(pre.data_handle() + s * pre.extent(1) + each * n);
    }
    FASTMOE_HOST_DEVICE float pair(float w, const units& x, const float (&sums)[2], T (&y)[2], T (&dx)[more]) const
    {
        float product = 0;
        FASTMOE_UNROLL
        for (int v = 0; v < 2; ++v) {
            const float d = float(T(sums[v])); // rounded where a product that is stored would be: one result for all policies
            float value;
            if constexpr (Activation::gated) {
                const auto back = activation.gradient(float(x.of[v][0]), float(x.of[v][1]), w * d);
                value = activation.value(float(x.of[v][0]), float(x.of[v][1]));
                dx[2 * v] = T(back.gate), dx[2 * v + 1] = T(back.up);
            } else {
                value = activation.value(float(x.of[v][0]));
                dx[v] = T(w * d * activation.derivative(float(x.of[v][0])));
            }
            product += d * value;
            y[v] = T(w * value);
        }
        return product;
    }
};

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
    bool keeps_pre; ///< where a policy can do without: pairs
    Activation activation;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t, int64_t s) const
    {
        const real w = weighted ? in.weight(s) : real(1);
        activate_row<Activation, real>(team, activation, pre.data_handle() + s * pre.extent(1),
                                       a.data_handle() + s * a.extent(1), a.extent(1), columns, w);
    }
    bool takes_pairs() const noexcept { return detail::takes_pairs<Activation>(columns, a); }
    activate_pairs<Activation, T> in_pairs() const noexcept { return {a, in, weighted, keeps_pre, activation}; }
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
        finish(team, e, s,
               activate_row_backward<Activation, real>(team, activation, pre.data_handle() + s * pre.extent(1),
                                                       a.data_handle() + s * a.extent(1), dpre.data_handle() + s * dpre.extent(1),
                                                       a.extent(1), columns, w));
    }
    bool takes_pairs() const noexcept
    {
        return detail::takes_pairs<Activation>(columns, a) && detail::takes_pairs<Activation>(columns, pre) &&
               detail::takes_pairs<Activation>(columns, dpre);
    }
    activate_backward_pairs<Activation, T> in_pairs() const noexcept { return {pre, dpre, in, where != weigh_at::input, activation}; }

    /// @param product  <d, activation> of the row
    template <class Team>
    FASTMOE_HOST_DEVICE void finish(Team& team, int64_t e, int64_t s, real product) const
    {
        if (where == weigh_at::output && down_bias.data_handle()) product += dot(team, dy.row(s), row(down_bias, e));
        const int64_t c = in.choice_of(s);
        if (where != weigh_at::input && team.lane() == 0 && c >= 0) dweights(c) = product;
    }

    template <class Team>
    FASTMOE_HOST_DEVICE static real dot(Team& team, const T* left, vector_view<const T> right)
    {
        const T* b = right.data_handle();
        const int64_t n = right.extent(0);
        constexpr int64_t across = line_elements<T>;
        return sum_over_lines<across, real>(team, n, in_lines<across>(n, left, b), [=](int64_t at, auto size) {
            if (!left) return real(0);
            const auto x = widened_line<real, size>(left + at), y = widened_line<real, size>(b + at);
            real sum = 0;
            FASTMOE_UNROLL
            for (int64_t j = 0; j < size; ++j) sum += x.of[j] * y.of[j];
            return sum;
        });
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
        const int64_t n = dx.extent(1);
        constexpr int64_t across = line_elements<T>;
        const real product = sum_over_lines<across, real>(team, n, in_lines<across>(n, d, x), [=](int64_t at, auto size) {
            auto value = widened_line<real, size>(d + at);
            const auto input = widened_line<real, size>(x + at);
            real sum = 0;
            FASTMOE_UNROLL
            for (int64_t j = 0; j < size; ++j) {
                sum += value.of[j] * input.of[j];
                value.of[j] = w * value.of[j];
            }
            write_rounded<T>(value, d + at);
            return sum;
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
