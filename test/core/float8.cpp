// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// float8_e4m3, for every code and around every rounding boundary, against the definition of the format in double.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include <doctest/doctest.h>

#include <fastmoe/core/float8.hpp>

#include "support/random.hpp"

namespace fm = fastmoe;

namespace {

using code = fm::float8_e4m3;

/// What a code means, from the definition of the format.
double meaning(int bits)
{
    const int exponent = bits >> 3 & 15, fraction = bits & 7;
    const double sign = bits & 0x80 ? -1 : 1;
    if (exponent == 15 && fraction == 7) return std::numeric_limits<double>::quiet_NaN();
    return sign * (exponent == 0 ? std::ldexp(fraction, -9) : std::ldexp(8 + fraction, exponent - 10));
}

/// The nearest number by search; of two that are as near the one with the even code. Beyond the largest, the largest.
double nearest(double given)
{
    const double x = std::copysign(std::min(std::fabs(given), 1e9), given); // beyond it all codes are as far
    double best = 0;
    int of = 0;
    for (int b = 0; b < 0x7f; ++b) {
        const double here = std::fabs(meaning(b) - std::fabs(x)), there = std::fabs(best - std::fabs(x));
        if (here < there || (here == there && b % 2 == 0 && of % 2 == 1)) best = meaning(b), of = b;
    }
    return std::copysign(best, x);
}

bool rounds_well(float x)
{
    const double actual = static_cast<double>(static_cast<float>(code(x))), expected = nearest(static_cast<double>(x));
    return actual == expected && std::signbit(actual) == std::signbit(expected);
}

} // namespace

TEST_CASE("every code converts to its exact value and back to itself")
{
    int wrong = 0;
    for (int b = 0; b < 256; ++b) {
        code v;
        v.bits = static_cast<std::uint8_t>(b);
        const double expected = meaning(b);
        const float actual = v;
        if (std::isnan(expected)) wrong += !std::isnan(actual) + !std::isnan(static_cast<float>(code(actual)));
        else wrong += static_cast<double>(actual) != expected || std::signbit(actual) != std::signbit(expected) || code(actual).bits != b;
    }
    CHECK(wrong == 0);
    static_assert(sizeof(code) == 1 && static_cast<float>(code(448.0f)) == 448.0f && static_cast<float>(code(0x1p-9f)) == 0x1p-9f);
}

TEST_CASE("floats round to the nearest, ties to even, and what is too large to the largest")
{
    FASTMOE_SEEDED(r, 11);
    int wrong = 0;
    for (int b = 0; b < 0x7e; ++b) {
        const auto middle = static_cast<float>((meaning(b) + meaning(b + 1)) / 2);
        for (const float x : {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 1000.0f)}) wrong += !rounds_well(x) + !rounds_well(-x);
    }
    for (int i = 0; i < 20000; ++i) {
        std::uint32_t bits = static_cast<std::uint32_t>(r.bits());
        float x;
        std::memcpy(&x, &bits, sizeof x);
        if (!std::isnan(x)) wrong += !rounds_well(x);
        wrong += !rounds_well(static_cast<float>(std::ldexp(r.uniform(-1, 1), static_cast<int>(r.integer(-14, 11)))));
    }
    for (const float x : {0.0f, -0.0f, 448.0f, 464.0f, 465.0f, 480.0f, 512.0f, std::numeric_limits<float>::max(),
                          std::numeric_limits<float>::infinity(), std::numeric_limits<float>::denorm_min(), 0x1p-10f, 0x1.000002p-10f})
        wrong += !rounds_well(x) + !rounds_well(-x);
    CHECK(wrong == 0);
    for (const std::uint32_t bits : {0x7f800001u, 0xff800001u, 0x7fffffffu, 0xffffffffu, 0x7fc00000u}) {
        float x;
        std::memcpy(&x, &bits, sizeof x);
        CHECK(std::isnan(static_cast<float>(code(x))));
    }
}
