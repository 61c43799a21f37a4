// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// bfloat16 and half, for every bit pattern and around every rounding boundary, against exact arithmetic in double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>

#include <doctest/doctest.h>

#include <fastmoe/core/dtype.hpp>

#include "support/random.hpp"

namespace fm = fastmoe;

namespace {

/// A 16-bit format by its numbers alone: digits of the significand and the exponent of the smallest normal number.
template <class T>
struct format;
template <>
struct format<fm::half> {
    static constexpr int digits = 11, least = -14, bias = 15;
};
template <>
struct format<fm::bfloat16> {
    static constexpr int digits = 8, least = -126, bias = 127;
};

/// What a bit pattern means, from the definition of the format.
template <class T>
double meaning(std::uint16_t bits)
{
    using f = format<T>;
    const int fraction_bits = f::digits - 1, fraction = bits & ((1 << fraction_bits) - 1);
    const int exponent = (bits & 0x7fff) >> fraction_bits, top = 0x7fff >> fraction_bits;
    const double sign = bits & 0x8000 ? -1 : 1;
    if (exponent == top) return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * INFINITY;
    if (exponent == 0) return sign * std::ldexp(fraction, f::least - fraction_bits);
    return sign * std::ldexp(fraction + (1 << fraction_bits), exponent - f::bias - fraction_bits);
}

/// The nearest number of the format, ties to even: scaled to an integer, rounded by the C library, scaled back.
template <class T>
double nearest(double x)
{
    using f = format<T>;
    if (std::isnan(x) || std::isinf(x) || x == 0) return x;
    int exponent;
    std::frexp(x, &exponent); // |x| in [2^(exponent-1), 2^exponent)
    const int quantum = std::max(exponent - f::digits, f::least - f::digits + 1);
    const double rounded = std::ldexp(std::nearbyint(std::ldexp(x, -quantum)), quantum);
    const double largest = std::ldexp(2 - std::ldexp(1, 1 - f::digits), f::bias);
    return std::fabs(rounded) > largest ? std::copysign(INFINITY, x) : rounded;
}

/// @param x  a float or a double
template <class T, class Real>
bool rounds_well(Real x)
{
    const T out(x);
    const double expected = nearest<T>(x), actual = meaning<T>(out.bits);
    if (std::isnan(expected)) return std::isnan(actual);
    return expected == actual && std::signbit(expected) == std::signbit(actual);
}

float from_bits(std::uint32_t bits)
{
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

} // namespace

TEST_CASE_TEMPLATE("every 16-bit pattern converts to its exact value and back to itself", T, fm::half, fm::bfloat16)
{
    int wrong_value = 0, wrong_return = 0;
    for (int b = 0; b < 65536; ++b) {
        T v;
        v.bits = static_cast<std::uint16_t>(b);
        const float actual = v;
        const double expected = meaning<T>(v.bits);
        if (std::isnan(expected)) {
            wrong_value += !std::isnan(actual);
            wrong_return += !std::isnan(static_cast<float>(T(actual)));
            continue;
        }
        wrong_value += actual != expected || std::signbit(actual) != std::signbit(expected);
        wrong_return += T(actual).bits != v.bits;
    }
    CHECK(wrong_value == 0);
    CHECK(wrong_return == 0);
}

TEST_CASE_TEMPLATE("halfway between any two neighbours the even one is taken, beside it the nearer one", T, fm::half,
                   fm::bfloat16)
{
    int wrong = 0;
    for (int b = 0; b < 0x7fff; ++b) {
        const double low = meaning<T>(static_cast<std::uint16_t>(b)),
                     high = meaning<T>(static_cast<std::uint16_t>(b + 1));
        if (!std::isfinite(low)) break;
        // Beyond the largest number the next step would be where overflow begins to be decided.
        const double step = std::isfinite(high) ? high - low : low - meaning<T>(static_cast<std::uint16_t>(b - 1));
        const float middle = static_cast<float>(low + step / 2);
        for (const float x : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, INFINITY),
                              static_cast<float>(low + step / 4), static_cast<float>(low + 3 * step / 4)})
            wrong += !rounds_well<T>(x) + !rounds_well<T>(-x);
    }
    CHECK(wrong == 0);
}

TEST_CASE_TEMPLATE("floats of every size round to the nearest, ties to even", T, fm::half, fm::bfloat16)
{
    FASTMOE_SEEDED(r, 1);
    int wrong = 0;
    for (int i = 0; i < 2000000; ++i) wrong += !rounds_well<T>(from_bits(static_cast<std::uint32_t>(r.bits())));
    for (int i = 0; i < 2000000; ++i)
        wrong +=
            !rounds_well<T>(static_cast<float>(std::ldexp(r.uniform(-1, 1), static_cast<int>(r.integer(-30, 18)))));
    for (const float x : {0.0f, -0.0f, INFINITY, -INFINITY, NAN, -NAN, std::numeric_limits<float>::max(),
                          std::numeric_limits<float>::lowest(), std::numeric_limits<float>::min(),
                          std::numeric_limits<float>::denorm_min(), 65504.0f, 65519.99f, 65520.0f, 65536.0f})
        wrong += !rounds_well<T>(x);
    // NaNs whose payload lies only in bits that are cut off, and those that would carry into the exponent.
    for (const std::uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu, 0x7fbfffffu, 0x7f80ffffu})
        wrong += !std::isnan(static_cast<float>(T(from_bits(bits))));
    CHECK(wrong == 0);
}

TEST_CASE_TEMPLATE("doubles round once: beside the middle of two neighbours to the nearer one, however small the step", T,
                   fm::half, fm::bfloat16)
{
    CHECK(static_cast<float>(fm::bfloat16(1 + 0x1p-8 + 0x1p-40)) == 1.0078125f);
    CHECK(static_cast<float>(fm::bfloat16(1 + 0x1p-8 - 0x1p-40)) == 1.0f);
    int wrong = 0;
    for (int b = 0; b < 0x7fff; ++b) {
        const double low = meaning<T>(static_cast<std::uint16_t>(b)),
                     high = meaning<T>(static_cast<std::uint16_t>(b + 1));
        if (!std::isfinite(low)) break;
        const double step = std::isfinite(high) ? high - low : low - meaning<T>(static_cast<std::uint16_t>(b - 1));
        const double middle = low + step / 2;
        for (const double x : {middle, std::nextafter(middle, 0.0), std::nextafter(middle, HUGE_VAL), middle - step * 0x1p-30,
                               middle + step * 0x1p-30, std::nextafter(low, 0.0), std::nextafter(low, HUGE_VAL)})
            wrong += !rounds_well<T>(x) + !rounds_well<T>(-x);
    }
    FASTMOE_SEEDED(r, 2);
    for (int i = 0; i < 1000000; ++i)
        wrong += !rounds_well<T>(std::ldexp(r.uniform(-1, 1), static_cast<int>(r.integer(-160, 140))));
    for (const double x : {0.0, -0.0, HUGE_VAL, -HUGE_VAL, std::nan(""), 1e300, -1e300, 5e-324, -5e-324, 1e-300, 3.4028235e38,
                           3.4028236e38, 65519.99999999999, 65520.0, 65536.0, std::numeric_limits<double>::max()})
        wrong += !rounds_well<T>(x);
    CHECK(wrong == 0);
    static_assert(static_cast<float>(T(0.1)) == static_cast<float>(T(0.1f)) && static_cast<float>(T(3)) == 3.0f);
}

TEST_CASE("conversions can be done by the compiler, and the types have the layout of a 16-bit word")
{
    static_assert(static_cast<float>(fm::half(1.5f)) == 1.5f);
    static_assert(static_cast<float>(fm::bfloat16(-2.0f)) == -2.0f);
    static_assert(fm::half(65536.0f).bits == 0x7c00);
    static_assert(fm::bfloat16(1.0f).bits == 0x3f80);
    static_assert(sizeof(fm::half) == 2 && alignof(fm::half) == 2 && sizeof(fm::bfloat16) == 2 &&
                  alignof(fm::bfloat16) == 2);
    static_assert(std::is_trivial_v<fm::half> && std::is_trivial_v<fm::bfloat16>);
    static_assert(std::is_standard_layout_v<fm::half> && std::is_standard_layout_v<fm::bfloat16>);
    static_assert(!std::is_convertible_v<float, fm::half> && !std::is_convertible_v<float, fm::bfloat16>);
    const fm::half a(0.5f), b(0.25f);
    CHECK(a + b == 0.75f);
    CHECK(a > b);
}

TEST_CASE("sums are kept in double for double and in float for all else, and every dtype has a name")
{
    static_assert(std::is_same_v<fm::accumulate_t<double>, double>);
    static_assert(std::is_same_v<fm::accumulate_t<float>, float>);
    static_assert(std::is_same_v<fm::accumulate_t<fm::half>, float>);
    static_assert(std::is_same_v<fm::accumulate_t<fm::bfloat16>, float>);
    static_assert(fm::scalar<fm::half> && fm::scalar<double> && !fm::scalar<int> && !fm::scalar<long double>);
    CHECK(std::string(fm::dtype_name<fm::half>) == "float16");
    CHECK(std::string(fm::dtype_name<fm::bfloat16>) == "bfloat16");
    CHECK(std::string(fm::dtype_name<double>) == "float64");
    CHECK(std::string(fm::dtype_name<float>) == "float32");
    CHECK(fm::dtype_name<char> == nullptr);
}
