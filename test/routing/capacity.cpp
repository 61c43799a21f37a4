// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <fastmoe/routing/capacity.hpp>

#include "support/choices.hpp"
#include "support/compare.hpp"
#include "support/executors.hpp"
#include "support/poison.hpp"
#include "support/reference.hpp"

namespace fm = fastmoe;
namespace oracle = support::reference;
using fm::int64_t;

namespace {

using support::choices;
using support::kept;
using support::random_choices;

template <class Executor, class Real>
void apply(Executor& ex, const fm::capacity& bound, choices<Real>& c)
{
    fm::arena query;
    fm::apply_capacity(ex, bound, c.view(), query);
    fm::buffer<std::byte, Executor> lent(ex, query.bytes());
    support::poison(lent.view());
    fm::arena scratch(lent.view());
    fm::apply_capacity(ex, bound, c.view(), scratch);
    ex.synchronize();
    CHECK_EQ(scratch.used(), 0);
}

constexpr fm::drop_order orders[] = {fm::drop_order::token_major, fm::drop_order::choice_major, fm::drop_order::by_weight};

} // namespace

TEST_CASE_TEMPLATE("each drop order keeps what a one-by-one count keeps, and changes nothing else", Cell,
                   support::cell<fm::host_executor, double>, support::cell<fm::host_executor, float>,
                   support::cell<support::lanes, double>, support::cell<support::lanes, float>)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 21);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int i = 0; i < (small ? 9 : 150); ++i)
        for (auto order : orders) {
            const int64_t experts = rng.integer(1, 40), tokens = rng.integer(0, small ? 40 : 3000);
            const bool ragged = order != fm::drop_order::choice_major && rng.coin(0.3);
            const int64_t k = ragged ? 0 : rng.integer(1, std::min<int64_t>(experts, 6));
            const auto before = random_choices<Real>(rng, tokens, experts, k);
            auto after = before;
            const fm::capacity bound{.factor = rng.one_of(0.0, 0.1, 0.5, 1.0, 1.3, 3.0), .order = order};
            const int64_t limit = bound.of(static_cast<int64_t>(before.experts.size()), experts);
            CAPTURE(tokens);
            CAPTURE(experts);
            CAPTURE(k);
            CAPTURE(limit);
            apply(ex, bound, after);
            const auto stays = kept(before, order, limit);
            for (std::size_t c = 0; c < before.experts.size(); ++c) {
                REQUIRE_EQ(after.experts[c], stays[c] ? before.experts[c] : -1);
                REQUIRE_EQ(after.weights[c], stays[c] ? before.weights[c] : Real(0));
            }
        }
}

TEST_CASE("the capacity is the ceiling of factor * K * T / E, and never more than there is")
{
    FASTMOE_SEEDED(rng, 22);
    for (int i = 0; i < 2000; ++i) {
        const int64_t experts = rng.integer(1, 300), k = rng.integer(1, 8), tokens = rng.integer(0, 20000);
        const double factor = rng.one_of(0.0, 0.25, 1.0, 1.25, 1.5, 2.0, rng.uniform(0, 4));
        const int64_t expected = std::min(oracle::capacity_of(factor, k, tokens, experts), k * tokens);
        CHECK_EQ(fm::capacity{.factor = factor}.of(k * tokens, experts), expected);
    }
    CHECK_EQ(fm::capacity{.factor = 1}.of(7, 4), 2);
    CHECK_EQ(fm::capacity{.factor = 1}.of(8, 4), 2);
    CHECK_EQ(fm::capacity{.factor = 1.25}.of(8, 4), 3);
    CHECK_EQ(fm::capacity{.factor = 0}.of(8, 4), 0);
    CHECK_EQ(fm::capacity{.factor = 1e300}.of(8, 4), 8);
    CHECK_EQ(fm::capacity{}.of(8, 4), 8);
    CHECK_FALSE(fm::capacity{}.limited());
}

TEST_CASE("a factor of 0 drops everything and no factor drops nothing")
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 23);
    for (auto order : orders) {
        const auto before = random_choices<float>(rng, 50, 4, 2);
        auto none = before, all = before;
        apply(ex, {.factor = 0, .order = order}, none);
        for (int32_t e : none.experts) CHECK_EQ(e, -1);
        for (float w : none.weights) CHECK_EQ(w, 0.f);
        apply(ex, {.order = order}, all);
        CHECK_EQ(all.experts, before.experts);
        CHECK_EQ(all.weights, before.weights);
    }
}

TEST_CASE_TEMPLATE("rescaled weights keep their proportions and their token's sum", Real, float, double)
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 24);
    for (auto order : orders) {
        const auto before = random_choices<Real>(rng, 400, 9, 4);
        auto plain = before, grown = before;
        apply(ex, {.factor = 0.6, .order = order}, plain);
        apply(ex, {.factor = 0.6, .order = order, .weights = fm::after_drop::rescale}, grown);
        CHECK_EQ(grown.experts, plain.experts);
        int shrunk = 0;
        for (int64_t t = 0; t < 400; ++t) {
            double sum = 0, left = 0;
            for (int64_t c = 4 * t; c < 4 * t + 4; ++c) sum += before.weights[c], left += plain.weights[c];
            for (int64_t c = 4 * t; c < 4 * t + 4; ++c) {
                const double expected = left > 0 ? plain.weights[c] * sum / left : 0;
                CHECK(std::fabs(grown.weights[c] - expected) <= 8 * support::roundoff<Real> * expected);
            }
            shrunk += left < sum;
        }
        CHECK(shrunk > 100);
    }
}

TEST_CASE("by_weight keeps the greatest weights, and among equals the first")
{
    fm::host_executor ex({.threads = 1});
    choices<float> c{7, 2, 1, {0, 0, 0, 1, 0, 0, 0}, {}, {0.25f, 0.5f, 0.5f, 0.1f, 0.75f, 0.5f, 0.0f}};
    apply(ex, {.factor = 3.0 * 2 / 7, .order = fm::drop_order::by_weight}, c); // three of expert 0
    CHECK_EQ(c.experts, std::vector<int32_t>{-1, 0, 0, 1, 0, -1, -1});
}

TEST_CASE("choice_major places every first choice before any second one")
{
    fm::host_executor ex({.threads = 1});
    choices<float> c{3, 3, 2, {0, 1, 1, 0, 2, 0}, {}, std::vector<float>(6, 1.f)};
    auto by_token = c;
    apply(ex, {.factor = 0.5, .order = fm::drop_order::choice_major}, c); // one an expert
    CHECK_EQ(c.experts, std::vector<int32_t>{0, -1, 1, -1, 2, -1});
    apply(ex, {.factor = 0.5}, by_token);
    CHECK_EQ(by_token.experts, std::vector<int32_t>{0, 1, -1, -1, 2, -1});
}

TEST_CASE("the same choices are dropped for any number of threads")
{
    FASTMOE_SEEDED(rng, 25);
    const auto before = random_choices<float>(rng, 20000, 32, 4);
    for (auto order : orders) {
        fm::host_executor one({.threads = 1});
        auto expected = before;
        apply(one, {.factor = 0.8, .order = order, .weights = fm::after_drop::rescale}, expected);
        for (int threads : {2, 4}) {
            fm::host_executor ex({.threads = threads});
            auto c = before;
            apply(ex, {.factor = 0.8, .order = order, .weights = fm::after_drop::rescale}, c);
            CHECK_EQ(c.experts, expected.experts);
            CHECK(support::same_bits(c.weights, expected.weights));
        }
    }
}

TEST_CASE("a capacity that cannot be applied is refused, and nothing is written")
{
    fm::host_executor ex({.threads = 1});
    FASTMOE_SEEDED(rng, 26);
    const auto before = random_choices<float>(rng, 30, 4, 2);
    auto c = before;
    fm::arena none;
    const auto refused = [&](const fm::capacity& bound, const char* text) {
        try {
            fm::apply_capacity(ex, bound, c.view(), none);
        } catch (const fm::invalid_argument& e) {
            INFO(e.what());
            CHECK(std::string(e.what()).find(text) != std::string::npos);
            return;
        }
        FAIL("was accepted");
    };
    refused({.factor = -0.5}, "capacity.factor is -0.5; expected zero or more");
    refused({.factor = std::numeric_limits<double>::quiet_NaN()}, "capacity.factor is");
    auto ragged = random_choices<float>(rng, 30, 4, 0);
    CHECK_THROWS_AS(fm::apply_capacity(ex, {.factor = 1, .order = fm::drop_order::choice_major}, ragged.view(), none),
                    fm::invalid_argument);
    for (auto order : orders) {
        fm::arena query;
        fm::apply_capacity(ex, {.factor = 0.5, .order = order}, c.view(), query);
        fm::buffer<std::byte, fm::host_executor> lent(ex, query.bytes());
        fm::arena small(fm::slice(lent.view(), 0, query.bytes() - 1));
        CHECK_THROWS_AS(fm::apply_capacity(ex, {.factor = 0.5, .order = order}, c.view(), small), fm::out_of_memory);
        CHECK_EQ(c.experts, before.experts);
        CHECK_EQ(c.weights, before.weights);
    }
}
