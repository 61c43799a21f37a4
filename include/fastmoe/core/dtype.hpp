// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The element types: double, float, bfloat16 and half, their conversions, and the type each accumulates in.
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include <cuda/std/bit>
#include <cuda/std/type_traits>

#include <fastmoe/core/config.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

// What follows are the conversions of the host, and of constant expressions; a GPU has instructions for them, to which
// numbers are the same.
#if defined(__CUDA_ARCH__)
#define FASTMOE_CONVERT(instruction, result, constraint_to, from, constraint_from)    \
    if (!::cuda::std::is_constant_evaluated()) {                   \
        result converted;                                                                    \
        asm(instruction " %0, %1;" : constraint_to(converted) : constraint_from(from));      \
        return converted;                                                                    \
    }
#else
#define FASTMOE_CONVERT(instruction, result, constraint_to, from, constraint_from)
#endif

/// Rounds to the nearest bfloat16, ties to even; NaN stays NaN. Branch-free, so that loops over it vectorize.
FASTMOE_HOST_DEVICE constexpr std::uint16_t bfloat16_bits(float value) noexcept
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    FASTMOE_CONVERT("cvt.rn.bf16.f32", std::uint16_t, "=h", value, "f")
#endif
    const auto u = ::cuda::std::bit_cast<std::uint32_t>(value);
    const std::uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    return static_cast<std::uint16_t>(nan ? ((u >> 16) | 0x40u) : rounded);
}

/// Rounds to the nearest IEEE binary16, ties to even; overflow gives infinity.
FASTMOE_HOST_DEVICE constexpr std::uint16_t half_bits(float value) noexcept
{
    FASTMOE_CONVERT("cvt.rn.f16.f32", std::uint16_t, "=h", value, "f")
    using ::cuda::std::bit_cast;
    const auto u = bit_cast<std::uint32_t>(value);
    const std::uint32_t magnitude = u & 0x7fffffffu;
    // Subnormal results: adding 0.5 aligns the mantissa so that the hardware rounds it.
    const auto subnormal = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    const std::uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const std::uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
    const std::uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const std::uint32_t out = magnitude >= 0x47800000u ? special : finite;
    return static_cast<std::uint16_t>((u >> 16 & 0x8000u) | out);
}

/// A float that rounds to any shorter format as the double does: truncated, the last bit standing for all that was cut off
/// (rounding to odd; Boldo and Melquiond 2008, "Emulation of a FMA and correctly rounded sums").
FASTMOE_HOST_DEVICE constexpr float rounded_to_odd(double value) noexcept
{
    const auto nearest = static_cast<float>(value);
    const auto back = static_cast<double>(nearest);
    const bool away = (back < 0 ? -back : back) > (value < 0 ? -value : value);
    const auto u = ::cuda::std::bit_cast<std::uint32_t>(nearest) - static_cast<std::uint32_t>(away);
    return ::cuda::std::bit_cast<float>(u | static_cast<std::uint32_t>(back != value));
}

FASTMOE_HOST_DEVICE constexpr float half_value(std::uint16_t bits) noexcept
{
    FASTMOE_CONVERT("cvt.f32.f16", float, "=f", bits, "h")
    using ::cuda::std::bit_cast;
    const std::uint32_t sign = (bits & 0x8000u) << 16;
    const std::uint32_t magnitude = bits & 0x7fffu;
    const std::uint32_t normal = (magnitude << 13) + 0x38000000u;
    const std::uint32_t special = (magnitude << 13) + 0x70000000u;
    // Subnormals: place the mantissa below 0.5 and subtract it again, exactly.
    const auto subnormal = bit_cast<std::uint32_t>(bit_cast<float>(magnitude + 0x3f000000u) - 0.5f);
    const std::uint32_t out = magnitude < 0x400u ? subnormal : (magnitude >= 0x7c00u ? special : normal);
    return bit_cast<float>(sign | out);
}
#undef FASTMOE_CONVERT

} // namespace detail

/// Brain floating point, 8 exponent bits; the layout of CUDA's __nv_bfloat16. Arithmetic happens in float.
struct bfloat16 {
    std::uint16_t bits;

    bfloat16() = default;
    FASTMOE_HOST_DEVICE constexpr explicit bfloat16(float value) noexcept : bits(detail::bfloat16_bits(value)) {}
    /// Rounds once. A template, so that integers still go by way of float.
    template <std::same_as<double> Double>
    FASTMOE_HOST_DEVICE constexpr explicit bfloat16(Double value) noexcept : bfloat16(detail::rounded_to_odd(value))
    {
    }
    FASTMOE_HOST_DEVICE constexpr operator float() const noexcept
    {
        return ::cuda::std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
    }
};

/// IEEE binary16; the layout of CUDA's __half. Arithmetic happens in float.
struct half {
    std::uint16_t bits;

    half() = default;
    FASTMOE_HOST_DEVICE constexpr explicit half(float value) noexcept : bits(detail::half_bits(value)) {}
    /// Rounds once. A template, so that integers still go by way of float.
    template <std::same_as<double> Double>
    FASTMOE_HOST_DEVICE constexpr explicit half(Double value) noexcept : half(detail::rounded_to_odd(value))
    {
    }
    FASTMOE_HOST_DEVICE constexpr operator float() const noexcept { return detail::half_value(bits); }
};

/// The element types that every verb takes.
template <class T>
concept scalar = std::same_as<T, double> || std::same_as<T, float> || std::same_as<T, bfloat16> || std::same_as<T, half>;

namespace detail {
template <class T>
struct accumulator {
    using type = float;
};
template <>
struct accumulator<double> {
    using type = double;
};
} // namespace detail

/// What sums, logits and routing weights are kept in: double for double, float for all others.
template <class T>
using accumulate_t = typename detail::accumulator<T>::type;

/// What a value of A and one of B are added in: double if one of them is double, float otherwise.
template <class A, class B>
using wider_t = std::conditional_t<std::same_as<A, double> || std::same_as<B, double>, double, float>;

template <class T>
inline constexpr const char* dtype_name = nullptr;
template <>
inline constexpr const char* dtype_name<double> = "float64";
template <>
inline constexpr const char* dtype_name<float> = "float32";
template <>
inline constexpr const char* dtype_name<bfloat16> = "bfloat16";
template <>
inline constexpr const char* dtype_name<half> = "float16";
template <>
inline constexpr const char* dtype_name<std::int32_t> = "int32";
template <>
inline constexpr const char* dtype_name<std::int64_t> = "int64";

} // namespace fastmoe::inline FASTMOE_ABI
