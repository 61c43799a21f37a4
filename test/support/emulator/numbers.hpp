// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Numbers of 16 and of 8 bits, by their definition: nothing of the library.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace emulator {

inline float brain_value(std::uint16_t b) { return std::bit_cast<float>(static_cast<std::uint32_t>(b) << 16); }
inline std::uint16_t brain_bits(float a)
{
    const auto u = std::bit_cast<std::uint32_t>(a);
    if (a != a) return 0x7fff;
    return static_cast<std::uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}
inline float half_value(std::uint16_t b)
{
    const int exponent = b >> 10 & 31, fraction = b & 1023;
    float v;
    if (exponent == 31)
        v = fraction ? NAN : INFINITY;
    else
        v = std::ldexp(static_cast<float>(exponent ? fraction + 1024 : fraction), (exponent ? exponent : 1) - 25);
    return b >> 15 ? -v : v;
}
/// The bits below the sign of what is nearest to `size`, ties to even, with so many bits of fraction and exponents from `least` on.
inline int nearest_bits(double size, int fraction, int least)
{
    const int exponent = size == 0 || std::ilogb(size) < least ? least : std::ilogb(size);
    const auto steps = static_cast<int>(std::nearbyint(std::ldexp(size, fraction - exponent)));
    return steps < 1 << fraction ? steps : ((exponent - least) << fraction) + steps; // a carry goes into the exponent by itself
}
inline std::uint16_t half_bits(float a)
{
    if (a != a) return 0x7fff;
    const std::uint16_t sign = std::signbit(a) ? 0x8000 : 0;
    const double size = std::fabs(static_cast<double>(a));
    if (size >= 65520) return sign | 0x7c00;
    return static_cast<std::uint16_t>(sign | nearest_bits(size, 10, -14));
}
inline float code_value(std::uint8_t b) // e4m3: no infinity
{
    const int exponent = b >> 3 & 15, fraction = b & 7;
    if (exponent == 15 && fraction == 7) return NAN;
    const float v = std::ldexp(static_cast<float>(exponent ? fraction + 8 : fraction), (exponent ? exponent : 1) - 10);
    return b >> 7 ? -v : v;
}
inline std::uint8_t code_bits(float a) // what is too large becomes the largest
{
    if (a != a) return 0x7f;
    const std::uint8_t sign = std::signbit(a) ? 0x80 : 0;
    const double size = std::fabs(static_cast<double>(a));
    if (size >= 448) return sign | 0x7e;
    return static_cast<std::uint8_t>(sign | nearest_bits(size, 3, -6));
}

} // namespace emulator
