// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Activations of an expert and their derivatives.
#pragma once

#include <concepts>
#include <type_traits>

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/core/math.hpp>
#include <fastmoe/core/tensor.hpp>

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

template <class A, class Real = float>
concept plain_activation = requires(const A& a, Real x) {
    { a.value(x) } -> std::same_as<Real>;
    { a.derivative(x) } -> std::same_as<Real>;
};

template <class A, class Real = float>
concept gated_activation = requires(const A& a, Real x) {
    { a.value(x, x) } -> std::same_as<Real>;
    { a.gradient(x, x, x) } -> std::same_as<gate_and_up<Real>>;
};

/// One input (value, derivative) or a gate and an up half (value, gradient), elementwise. Written without an "or", whose
/// failure would not be explained: the form that is not meant is asked of one that has it.
template <class A, class Real = float>
concept activation = states_gated<A> && plain_activation<std::conditional_t<A::gated, relu, A>, Real> &&
                     gated_activation<std::conditional_t<A::gated, A, swiglu>, Real>;

/// Where gate and up stand in a row of 2H: all gates first, or in turns.
enum class gated_layout : std::uint8_t { concatenated, interleaved };

} // namespace fastmoe::inline FASTMOE_ABI
