// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Scalar functions behind scores and activations. The float versions are branch-free polynomials, so that loops over
/// them vectorize on the host; the double versions are the standard library's.
#pragma once

#include <cmath>
#include <cstdint>

#include <cuda/std/bit>
#include <cuda/std/type_traits>

#include <fastmoe/core/config.hpp>

namespace fastmoe::inline FASTMOE_ABI::math {

namespace detail {

/// e^x = p * 2^k for x in [-104, 89]; NaN stays in p.
struct exp_parts {
    float p;
    std::int32_t k;
};

FASTMOE_HOST_DEVICE constexpr exp_parts split_exp(float x) noexcept
{
#if defined(__clang__)
#pragma clang fp reassociate(off)
#endif
    using ::cuda::std::bit_cast;
    // Adding 1.5 * 2^23 rounds to an integer, whose bits then stand in the low mantissa.
    constexpr float magic = 12582912.0f;
    const float shifted = x * 1.44269504f + magic;
    const float n = shifted - magic;
    const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f; // ln 2 in two parts: the first product is exact
    float p = 0.0013813146f;
    p = p * r + 0.0083694190f;
    p = p * r + 0.041668457f;
    p = p * r + 0.16666515f;
    p = p * r + 0.49999993f;
    p = p * r * r + r + 1.0f;
    return {p, bit_cast<std::int32_t>(bit_cast<std::uint32_t>(shifted) - bit_cast<std::uint32_t>(magic))};
}

/// a / b for b of 1 or more. A GPU multiplies by the reciprocal that its hardware finds, within 2 ulp: to round the last bit it
/// would call a function.
FASTMOE_HOST_DEVICE constexpr float quotient(float a, float b) noexcept
{
#if defined(__CUDA_ARCH__)
    if (!::cuda::std::is_constant_evaluated()) return __fdividef(a, b);
#endif
    return a / b;
}
FASTMOE_HOST_DEVICE constexpr double quotient(double a, double b) noexcept { return a / b; }

} // namespace detail

/// e^x within 2 ulp; 0 below -104, infinity above 88.73, NaN for NaN.
FASTMOE_HOST_DEVICE constexpr float exp(float x) noexcept
{
    using ::cuda::std::bit_cast;
    float y = x < -104.0f ? -104.0f : x;
    y = y > 89.0f ? 89.0f : y;
    const auto [p, k] = detail::split_exp(y);
    // 2^k in two factors, so that results below the smallest normal number come out right.
    const std::int32_t half = k >> 1;
    const auto low = bit_cast<float>((static_cast<std::uint32_t>(half) + 127u) << 23);
    const auto high = bit_cast<float>((static_cast<std::uint32_t>(k - half) + 127u) << 23);
    return p * low * high;
}
FASTMOE_HOST_DEVICE inline double exp(double x) noexcept { return std::exp(x); }

/// e^x for x <= 0, the same values as exp with less work; NaN for NaN, and nothing useful for x > 0.
FASTMOE_HOST_DEVICE constexpr float exp_of_nonpositive(float x) noexcept
{
    const auto [p, k] = detail::split_exp(x < -104.0f ? -104.0f : x);
    const auto scale = ::cuda::std::bit_cast<float>((static_cast<std::uint32_t>(k) + (64u + 127u)) << 23);
    return p * scale * 0x1p-64f;
}
FASTMOE_HOST_DEVICE inline double exp_of_nonpositive(double x) noexcept { return std::exp(x); }

/// Natural logarithm; used a few times a token, so the standard library's.
FASTMOE_HOST_DEVICE inline float log(float x) noexcept { return std::log(x); }
FASTMOE_HOST_DEVICE inline double log(double x) noexcept { return std::log(x); }

/// 1 / (1 + e^-x), with small relative error in both tails.
template <class Real>
FASTMOE_HOST_DEVICE constexpr Real sigmoid(Real x) noexcept
{
    const Real e = math::exp_of_nonpositive(x < Real(0) ? x : -x);
    return detail::quotient(x < Real(0) ? e : Real(1), Real(1) + e);
}

/// log(1 + e^x) without overflow.
template <class Real>
FASTMOE_HOST_DEVICE inline Real softplus(Real x) noexcept
{
    const Real m = x > Real(0) ? x : Real(0);
    return m + std::log1p(math::exp(-(x < Real(0) ? -x : x)));
}

/// The standard normal density.
template <class Real>
FASTMOE_HOST_DEVICE constexpr Real normal_density(Real x) noexcept
{
    return Real(0.3989422804014327) * math::exp_of_nonpositive(Real(-0.5) * (x * x));
}

/// The standard normal distribution function, 0.5 (1 + erf(x / sqrt 2)): small relative error in the lower tail, which
/// 1 + erf would cancel. A polynomial in 1 / (1 + 0.3 t) times the density, t = |x| / sqrt 2, fitted to 2e-8.
/// In float the absolute error is below 3e-7, the relative error below 1e-6 for |x| <= 5 and 5e-6 beyond.
FASTMOE_HOST_DEVICE constexpr float normal_cdf(float x) noexcept
{
    const float a = x < 0.0f ? -x : x;
    const float u = detail::quotient(1.0f, 1.0f + 0.21213203f * a);
    float p = -0.0647614317f;
    p = p * u + 0.242781515f;
    p = p * u - 0.256138881f;
    p = p * u + 0.273859859f;
    p = p * u - 0.047325279f;
    p = p * u + 0.107463005f;
    p = p * u + 0.074169588f;
    p = p * u + 0.0853576136f;
    p = p * u + 0.0845940026f;
    const float tail = p * u * math::exp_of_nonpositive(-0.5f * (x * x));
    return x < 0.0f ? tail : 1.0f - tail;
}
FASTMOE_HOST_DEVICE inline double normal_cdf(double x) noexcept { return 0.5 * std::erfc(-0.7071067811865476 * x); }

/// The error function.
FASTMOE_HOST_DEVICE inline float erf(float x) noexcept { return std::erf(x); }
FASTMOE_HOST_DEVICE inline double erf(double x) noexcept { return std::erf(x); }

/// Whether x is neither infinite nor NaN.
template <class Real>
FASTMOE_HOST_DEVICE constexpr bool is_finite(Real x) noexcept
{
    return x - x == Real(0);
}

template <class Real>
FASTMOE_HOST_DEVICE constexpr bool is_nan(Real x) noexcept
{
    return x != x;
}

} // namespace fastmoe::inline FASTMOE_ABI::math
