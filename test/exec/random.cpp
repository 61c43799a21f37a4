// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <set>
#include <vector>

#include <fastmoe/exec/random.hpp>

namespace fm = fastmoe;

namespace {

void check_words(fm::random_words actual, fm::random_words expected)
{
    for (int i = 0; i < 4; ++i) CHECK_EQ(actual.word[i], expected.word[i]);
}

constexpr std::uint64_t seed_and_step[] = {42, 7};

} // namespace

TEST_CASE("philox gives the published known answers")
{
    // Random123's known-answer file, philox4x32 with ten rounds.
    check_words(fm::philox({{0, 0, 0, 0}}, 0), {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}});
    check_words(fm::philox({{~0u, ~0u, ~0u, ~0u}}, ~std::uint64_t{0}), {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}});
    check_words(fm::philox({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0x299f31d0a4093822u),
                {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}});
}

TEST_CASE("philox can be evaluated by the compiler")
{
    static_assert(fm::philox({{0, 0, 0, 0}}, 0).word[0] == 0x6627e8d5);
}

TEST_CASE("draws differ by seed, step, stream and position, and by nothing else")
{
    std::set<std::uint64_t> seen;
    const auto see = [&](std::uint64_t seed, std::uint64_t step, fm::random_stream stream, std::uint64_t position) {
        const std::uint64_t where[] = {seed, step};
        const fm::random_words w = fm::random_source{where, stream}.words(position);
        check_words(fm::random_source{where, stream}.words(position), w);
        return seen.insert(std::uint64_t{w.word[0]} << 32 | w.word[1]).second;
    };
    for (std::uint64_t seed : {0ull, 1ull, 1ull << 32, 1ull << 63})
        for (std::uint64_t step : {0ull, 1ull, 1ull << 32, (1ull << 48) - 1})
            for (auto stream : {fm::random_stream::weights, fm::random_stream::jitter, fm::random_stream::choice})
                for (std::uint64_t position : {0ull, 1ull, 1ull << 32, ~0ull})
                    CHECK(see(seed, step, stream, position));
}

TEST_CASE_TEMPLATE("uniform draws lie in [0, 1) and have the moments of the uniform distribution", Real, float, double)
{
    const fm::random_source source{seed_and_step, fm::random_stream::noise};
    const int n = 200000;
    double sum = 0, squares = 0, product = 0, last = 0.5;
    int below_quarter = 0;
    for (int i = 0; i < n; ++i) {
        const double u = source.uniform<Real>(i);
        REQUIRE(u >= 0);
        REQUIRE(u < 1);
        sum += u - 0.5;
        squares += (u - 0.5) * (u - 0.5);
        product += (u - 0.5) * (last - 0.5);
        below_quarter += u < 0.25;
        last = u;
    }
    // Five standard errors of each statistic.
    CHECK(std::fabs(sum / n) < 5 * std::sqrt(1.0 / 12 / n));
    CHECK(std::fabs(squares / n - 1.0 / 12) < 5 * std::sqrt(1.0 / 180 / n));
    CHECK(std::fabs(product / n) < 5 * (1.0 / 12) / std::sqrt(n));
    CHECK(std::fabs(below_quarter / double(n) - 0.25) < 5 * std::sqrt(0.25 * 0.75 / n));
}

TEST_CASE_TEMPLATE("normal draws have the moments of the normal distribution and are always finite", Real, float, double)
{
    const fm::random_source source{seed_and_step, fm::random_stream::weights};
    const int n = 200000;
    double sum = 0, squares = 0, fourth = 0;
    for (int i = 0; i < n; ++i) {
        const double z = source.normal<Real>(i);
        REQUIRE(std::isfinite(z));
        sum += z;
        squares += z * z;
        fourth += z * z * z * z;
    }
    CHECK(std::fabs(sum / n) < 5 / std::sqrt(n));
    CHECK(std::fabs(squares / n - 1) < 5 * std::sqrt(2.0 / n));
    CHECK(std::fabs(fourth / n - 3) < 5 * std::sqrt(96.0 / n));
}
