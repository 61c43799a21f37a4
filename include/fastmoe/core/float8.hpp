// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The eight-bit float that products are made of where they are asked to be. A code, not an element type: it means something
/// beside a scale.
#pragma once

#include <cstdint>

#include <cuda/std/bit>
#include <cuda/std/type_traits>

#include <fastmoe/core/config.hpp>
#include <fastmoe/core/dtype.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

/// Rounds to the nearest E4M3, ties to even; what is larger than 448 becomes 448, NaN stays NaN.
FASTMOE_HOST_DEVICE constexpr std::uint8_t float8_bits(float value) noexcept
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    if (!::cuda::std::is_constant_evaluated()) {
        std::uint16_t both;
        asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(0.0f), "f"(value));
        return static_cast<std::uint8_t>(both);
    }
#endif
    using ::cuda::std::bit_cast;
    const auto u = bit_cast<std::uint32_t>(value);
    const std::uint32_t magnitude = u & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return 0x7f;
    // Subnormal results: adding 2^14 aligns the mantissa to steps of 2^-9, so that the hardware rounds it.
    const std::uint32_t subnormal = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 16384.0f) - 0x46800000u;
    const std::uint32_t normal = (magnitude - 0x3c000000u + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
    const std::uint32_t finite = magnitude < 0x3c800000u ? subnormal : normal;
    return static_cast<std::uint8_t>((u >> 24 & 0x80u) | (finite < 0x7eu ? finite : 0x7eu));
}

FASTMOE_HOST_DEVICE constexpr float float8_value(std::uint8_t bits) noexcept
{
    const std::uint32_t magnitude = bits & 0x7fu, sign = static_cast<std::uint32_t>(bits & 0x80u) << 24;
    const float subnormal = static_cast<float>(magnitude) * 0.001953125f; // steps of 2^-9
    const std::uint32_t normal = magnitude == 0x7fu ? 0x7fc00000u : (magnitude << 20) + 0x3c000000u;
    return ::cuda::std::bit_cast<float>(sign | (magnitude < 8 ? ::cuda::std::bit_cast<std::uint32_t>(subnormal) : normal));
}

} // namespace detail

/// E4M3 of the Open Compute Project's OFP8: a sign, four bits of exponent, three of mantissa; no infinity, largest 448; the layout of
/// CUDA's __nv_fp8_e4m3. Conversion saturates.
struct float8_e4m3 {
    std::uint8_t bits;
    static constexpr float largest = 448.0f;

    float8_e4m3() = default;
    FASTMOE_HOST_DEVICE constexpr explicit float8_e4m3(float value) noexcept : bits(detail::float8_bits(value)) {}
    FASTMOE_HOST_DEVICE constexpr operator float() const noexcept { return detail::float8_value(bits); }
};

template <>
inline constexpr const char* dtype_name<float8_e4m3> = "float8_e4m3";

} // namespace fastmoe::inline FASTMOE_ABI
