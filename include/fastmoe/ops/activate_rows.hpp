// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// An activation of a whole row between an expert's products, forward and backward. Part of the expert's mlp.hpp.
#pragma once

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/ops/activate.hpp>
#include <fastmoe/ops/lines.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// Columns of gate and up for hidden unit j: gate at j * step, up at j * step + up_offset.
struct gated_columns {
    int64_t step, up_offset;

    static constexpr gated_columns of(gated_layout layout, int64_t hidden) noexcept
    {
        return layout == gated_layout::concatenated ? gated_columns{1, hidden} : gated_columns{2, 1};
    }
};

/// Gate and up of N hidden units.
template <class Real, int64_t N>
struct line_halves {
    line<Real, N> gate, up;
};

/// The gate and up of N hidden units whose pre-activation begins at `pre`.
template <class Real, int64_t N, class T>
FASTMOE_HOST_DEVICE line_halves<Real, N> read_halves(const T* pre, gated_columns at)
{
    if (at.step == 1) return {widened_line<Real, N>(pre), widened_line<Real, N>(pre + at.up_offset)};
    const auto both = read_line<2 * N, (N > 1)>(pre);
    line_halves<Real, N> out;
    FASTMOE_UNROLL
    for (int64_t j = 0; j < N; ++j) out.gate.of[j] = Real(both.of[2 * j]), out.up.of[j] = Real(both.of[2 * j + 1]);
    return out;
}

template <class Real, int64_t N, class T>
FASTMOE_HOST_DEVICE void write_halves(const line_halves<Real, N>& from, T* pre, gated_columns at)
{
    if (at.step == 1) {
        write_rounded<T>(from.gate, pre);
        write_rounded<T>(from.up, pre + at.up_offset);
        return;
    }
    line<T, 2 * N> both;
    FASTMOE_UNROLL
    for (int64_t j = 0; j < N; ++j) both.of[2 * j] = T(from.gate.of[j]), both.of[2 * j + 1] = T(from.up.of[j]);
    write_line<(N > 1)>(both, pre);
}

/// a[j] = weight * activation(pre): one row.
template <class Activation, class Real, class Team, class T>
FASTMOE_HOST_DEVICE void activate_row(Team& team, const Activation& f, const T* pre, T* a, int64_t hidden,
                                      gated_columns at, Real weight)
{
    if constexpr (!is_single_lane<Team>) {
        constexpr int64_t across = line_elements<T>;
        const bool whole = in_lines<across>(hidden, pre, a);
        for_each_line<across>(team, hidden, whole, [=](int64_t j, auto size) {
            line<Real, size> out;
            if constexpr (Activation::gated) {
                const auto x = read_halves<Real, size>(pre + j * at.step, at);
                FASTMOE_UNROLL
                for (int64_t i = 0; i < size; ++i) out.of[i] = weight * f.value(x.gate.of[i], x.up.of[i]);
            } else {
                const auto x = widened_line<Real, size>(pre + j);
                FASTMOE_UNROLL
                for (int64_t i = 0; i < size; ++i) out.of[i] = weight * f.value(x.of[i]);
            }
            write_rounded<T>(out, a + j);
        });
    } else if constexpr (!Activation::gated) {
        team.for_each(hidden, [=](int64_t j) { a[j] = T(weight * f.value(Real(pre[j]))); });
    } else if (at.step == 1) {
        const T* up = pre + at.up_offset;
        team.for_each(hidden, [=](int64_t j) { a[j] = T(weight * f.value(Real(pre[j]), Real(up[j]))); });
    } else {
        team.for_each(hidden, [=](int64_t j) {
            a[j] = T(weight * f.value(Real(pre[2 * j]), Real(pre[2 * j + 1])));
        });
    }
}

/// Elements that one lane alone takes at a time: blocks in memory of their own vectorize whatever the types are.
inline constexpr int64_t activation_block = 64;

/// From d = dLoss/d(weight * a) for n elements from `da` on: their dpre, and the weighted activation over `da`.
/// Returns <d, a>.
template <class Activation, class Real, int64_t Block, class T>
FASTMOE_HOST_DEVICE Real activate_backward_block(const Activation& f, const T* pre, T* da, T* dpre, gated_columns at, Real weight,
                                                 int64_t n)
{
    constexpr int64_t lanes = Block < 16 ? Block : 16;
    const int64_t turn = Activation::gated ? at.step : 1; // the layout of gated columns says nothing about others
    Real d[Block], x[Block], up[Block], a[Block], part[lanes];
    const auto read = [](const T* from, int64_t step, Real (&to)[Block], int64_t count) {
        if (count == Block && step == 1)
            for (int64_t j = 0; j < Block; ++j) to[j] = Real(from[j]);
        else
            for (int64_t j = 0; j < Block; ++j) to[j] = j < count ? Real(from[j * step]) : Real(0);
    };
    const auto write = [](const Real (&from)[Block], T* to, int64_t step, int64_t count) {
        if (count == Block && step == 1)
            for (int64_t j = 0; j < Block; ++j) to[j] = T(from[j]);
        else
            for (int64_t j = 0; j < Block && j < count; ++j) to[j * step] = T(from[j]); // g++ 12 cannot see that n <= Block
    };
    read(da, 1, d, n);
    read(pre, turn, x, n);
    if constexpr (Activation::gated) {
        read(pre + at.up_offset, turn, up, n);
        for (int64_t j = 0; j < Block; ++j) {
            const auto back = f.gradient(x[j], up[j], weight * d[j]);
            a[j] = f.value(x[j], up[j]);
            x[j] = back.gate;
            up[j] = back.up;
        }
        write(up, dpre + at.up_offset, turn, n);
    } else {
        for (int64_t j = 0; j < Block; ++j) {
            a[j] = f.value(x[j]);
            x[j] = weight * d[j] * f.derivative(x[j]);
        }
    }
    write(x, dpre, turn, n);
    for (int64_t j = n; j < Block; ++j) a[j] = Real(0); // whatever the activation makes of nothing
    for (int64_t j = 0; j < lanes; ++j) part[j] = d[j] * a[j];
    for (int64_t i = lanes; i < Block; i += lanes)
        for (int64_t j = 0; j < lanes; ++j) part[j] += d[i + j] * a[i + j];
    for (int64_t j = 0; j < Block; ++j) a[j] *= weight;
    write(a, da, 1, n);
    for (int64_t half = lanes / 2; half > 0; half /= 2)
        for (int64_t j = 0; j < half; ++j) part[j] += part[j + half];
    return part[0];
}

/// The same for N hidden units at one time.
template <class Activation, class Real, int64_t N, class T>
FASTMOE_HOST_DEVICE Real activate_backward_line(const Activation& f, const T* pre, T* da, T* dpre, gated_columns at, Real weight)
{
    const auto d = widened_line<Real, N>(da);
    line<Real, N> a;
    Real product = 0;
    if constexpr (Activation::gated) {
        auto x = read_halves<Real, N>(pre, at);
        FASTMOE_UNROLL
        for (int64_t j = 0; j < N; ++j) {
            const auto back = f.gradient(x.gate.of[j], x.up.of[j], weight * d.of[j]);
            a.of[j] = f.value(x.gate.of[j], x.up.of[j]);
            x.gate.of[j] = back.gate;
            x.up.of[j] = back.up;
        }
        write_halves(x, dpre, at);
    } else {
        auto x = widened_line<Real, N>(pre);
        FASTMOE_UNROLL
        for (int64_t j = 0; j < N; ++j) {
            a.of[j] = f.value(x.of[j]);
            x.of[j] = weight * d.of[j] * f.derivative(x.of[j]);
        }
        write_rounded<T>(x, dpre);
    }
    FASTMOE_UNROLL
    for (int64_t j = 0; j < N; ++j) {
        product += d.of[j] * a.of[j];
        a.of[j] *= weight;
    }
    write_rounded<T>(a, da);
    return product;
}

/// The same for a row; <d, a> goes to every lane.
template <class Activation, class Real, class Team, class T>
FASTMOE_HOST_DEVICE Real activate_row_backward(Team& team, const Activation& f, const T* pre, T* da, T* dpre,
                                               int64_t hidden, gated_columns at, Real weight)
{
    if constexpr (!is_single_lane<Team>) {
        constexpr int64_t across = line_elements<T>;
        return sum_over_lines<across, Real>(team, hidden, in_lines<across>(hidden, pre, da, dpre), [=](int64_t j, auto size) {
            const int64_t from = Activation::gated ? j * at.step : j;
            return activate_backward_line<Activation, Real, size>(f, pre + from, da + j, dpre + from, at, weight);
        });
    } else {
        constexpr int64_t block = activation_block;
        return team.reduce((hidden + block - 1) / block, Real(0), [](Real x, Real y) { return x + y; }, [=](int64_t b) {
            const int64_t first = b * block, n = hidden - first < block ? hidden - first : block;
            const int64_t from = Activation::gated ? first * at.step : first;
            return activate_backward_block<Activation, Real, block>(f, pre + from, da + first, dpre + from, at, weight, n);
        });
    }
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
