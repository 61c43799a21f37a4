// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Activations of an expert and their derivatives, and the row functors that apply them after a GEMM.
#pragma once

#include <concepts>
#include <type_traits>

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/core/math.hpp>
#include <fastmoe/core/tensor.hpp>
#include <fastmoe/exec/team.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// max(x, 0); the derivative at 0 is 0.
struct relu {
    static constexpr bool gated = false;
    template <class Real>
    FASTMOE_HOST_DEVICE static Real value(Real x) noexcept
    {
        return x > Real(0) ? x : (x <= Real(0) ? Real(0) : x);
    }
    template <class Real>
    FASTMOE_HOST_DEVICE static Real derivative(Real x) noexcept
    {
        return x > Real(0) ? Real(1) : Real(0);
    }
};

/// x Phi(x), the exact GELU (Hendrycks and Gimpel 2016).
struct gelu {
    static constexpr bool gated = false;
    template <class Real>
    FASTMOE_HOST_DEVICE static Real value(Real x) noexcept
    {
        return x * math::normal_cdf(x);
    }
    template <class Real>
    FASTMOE_HOST_DEVICE static Real derivative(Real x) noexcept
    {
        return math::normal_cdf(x) + x * math::normal_density(x);
    }
};

/// The tanh approximation of GELU, 0.5 x (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3), as x sigmoid(2u).
struct gelu_tanh {
    static constexpr bool gated = false;
    template <class Real>
    FASTMOE_HOST_DEVICE static Real value(Real x) noexcept
    {
        return x * math::sigmoid(twice_inner(x));
    }
    template <class Real>
    FASTMOE_HOST_DEVICE static Real derivative(Real x) noexcept
    {
        const Real s = math::sigmoid(twice_inner(x));
        // s (1 - s) is 0 long before x^2 reaches the bound; times an x^2 that is infinite it would be NaN.
        const Real square = x * x < Real(1000) ? x * x : Real(1000);
        const Real inner = Real(1.5957691216057308) * (Real(1) + Real(0.134145) * square);
        return s + x * s * (Real(1) - s) * inner;
    }

private:
    template <class Real>
    FASTMOE_HOST_DEVICE static Real twice_inner(Real x) noexcept
    {
        return Real(1.5957691216057308) * (x + Real(0.044715) * x * x * x);
    }
};

/// x sigmoid(x), also known as swish.
struct silu {
    static constexpr bool gated = false;
    template <class Real>
    FASTMOE_HOST_DEVICE static Real value(Real x) noexcept
    {
        return x * math::sigmoid(x);
    }
    template <class Real>
    FASTMOE_HOST_DEVICE static Real derivative(Real x) noexcept
    {
        const Real s = math::sigmoid(x);
        return s * (Real(1) + x * (Real(1) - s));
    }
};

/// The gradients of a gated activation.
template <class Real>
struct gate_and_up {
    Real gate, up;
};

/// Activation(gate) * up (Shazeer 2020). A user's own gated activation has the same three members; they may be const
/// members of a value that carries constants, as clamped_swiglu's are.
template <class Activation>
struct gated_by {
    static constexpr bool gated = true;
    template <class Real>
    FASTMOE_HOST_DEVICE static Real value(Real gate, Real up) noexcept
    {
        return Activation::value(gate) * up;
    }
    template <class Real>
    FASTMOE_HOST_DEVICE static gate_and_up<Real> gradient(Real gate, Real up, Real d) noexcept
    {
        return {d * (up * Activation::derivative(gate)), d * Activation::value(gate)}; // d * up may overflow beside a 0
    }
};

using swiglu = gated_by<silu>;
using geglu = gated_by<gelu>;

/// (u + shift) g sigmoid(alpha g), with g = min(gate, limit) and u = up within +-limit: the activation of gpt-oss, whose
/// constants are the defaults. Beyond the limit a clamped half has no gradient; at it, it has.
struct clamped_swiglu {
    static constexpr bool gated = true;
    double alpha = 1.702;
    double limit = 7; ///< infinity: no clamp
    double shift = 1;

    template <class Real>
    FASTMOE_HOST_DEVICE Real value(Real gate, Real up) const noexcept
    {
        const Real g = low(gate);
        return (within(up) + Real(shift)) * (g * math::sigmoid(Real(alpha) * g));
    }
    template <class Real>
    FASTMOE_HOST_DEVICE gate_and_up<Real> gradient(Real gate, Real up, Real d) const noexcept
    {
        const Real g = low(gate), a = Real(alpha), s = math::sigmoid(a * g), most = Real(limit);
        const Real of_gate = (within(up) + Real(shift)) * (s * (Real(1) + a * g * (Real(1) - s)));
        return {gate > most ? Real(0) : d * of_gate, up > most || up < -most ? Real(0) : d * (g * s)};
    }

private:
    // Comparisons that a NaN fails, so that it passes through.
    template <class Real>
    FASTMOE_HOST_DEVICE Real low(Real x) const noexcept
    {
        return x > Real(limit) ? Real(limit) : x;
    }
    template <class Real>
    FASTMOE_HOST_DEVICE Real within(Real x) const noexcept
    {
        const Real y = low(x);
        return y < -Real(limit) ? -Real(limit) : y;
    }
};

template <class A>
concept states_gated = requires {
    { A::gated } -> std::convertible_to<bool>;
};

template <class A>
concept plain_activation = requires(const A& a, float x) {
    { a.value(x) } -> std::same_as<float>;
    { a.derivative(x) } -> std::same_as<float>;
};

template <class A>
concept gated_activation = requires(const A& a, float x) {
    { a.value(x, x) } -> std::same_as<float>;
    { a.gradient(x, x, x) } -> std::same_as<gate_and_up<float>>;
};

/// One input (value, derivative) or a gate and an up half (value, gradient), elementwise. Written without an "or", whose
/// failure would not be explained: the form that is not meant is asked of one that has it.
template <class A>
concept activation = states_gated<A> && plain_activation<std::conditional_t<A::gated, relu, A>> &&
                     gated_activation<std::conditional_t<A::gated, A, swiglu>>;

/// Where gate and up stand in a row of 2H: all gates first, or in turns.
enum class gated_layout : std::uint8_t { concatenated, interleaved };

namespace detail {

/// Columns of gate and up for hidden unit j: gate at j * step, up at j * step + up_offset.
struct gated_columns {
    int64_t step, up_offset;

    static constexpr gated_columns of(gated_layout layout, int64_t hidden) noexcept
    {
        return layout == gated_layout::concatenated ? gated_columns{1, hidden} : gated_columns{2, 1};
    }
};

/// a[j] = weight * activation(pre): one row.
template <class Activation, class Real, class Team, class T>
FASTMOE_HOST_DEVICE void activate_row(Team& team, const Activation& f, const T* pre, T* a, int64_t hidden,
                                      gated_columns at, Real weight)
{
    if constexpr (!Activation::gated) {
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

/// Elements that a lane takes at a time. Where a lane is a processor, blocks in memory of their own vectorize whatever
/// the types are; where lanes stand side by side, single elements keep their accesses side by side.
template <class Team>
inline constexpr int64_t lane_block = 1;
template <>
inline constexpr int64_t lane_block<single_lane_team> = 64;

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

/// The same for a row; <d, a> goes to every lane.
template <class Activation, class Real, class Team, class T>
FASTMOE_HOST_DEVICE Real activate_row_backward(Team& team, const Activation& f, const T* pre, T* da, T* dpre,
                                               int64_t hidden, gated_columns at, Real weight)
{
    constexpr int64_t block = lane_block<Team>;
    return team.reduce((hidden + block - 1) / block, Real(0), [](Real x, Real y) { return x + y; }, [=](int64_t b) {
        const int64_t first = b * block, n = hidden - first < block ? hidden - first : block;
        const int64_t from = Activation::gated ? first * at.step : first;
        return activate_backward_block<Activation, Real, block>(f, pre + from, da + first, dpre + from, at, weight, n);
    });
}

} // namespace detail

} // namespace fastmoe::inline FASTMOE_ABI
