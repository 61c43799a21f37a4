// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Experts that choose their tokens.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include <fastmoe/routing/expert_choice.hpp>

#include "support/assigned.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
namespace oracle = support::reference;
using fm::int64_t;

namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan_ = std::numeric_limits<double>::quiet_NaN();

static_assert(fm::gate_policy<fm::expert_choice_gate, fm::host_executor, fm::bfloat16, fm::self>);
static_assert(fm::gate_policy<fm::expert_choice_gate, support::lanes, double, fm::self>);

fm::expert_choice_gate gate_of(int64_t experts, int64_t k, double factor = 1)
{
    return {.experts = experts, .k = k, .assignment = {.factor = factor}};
}

/// ceil(factor K T / E), counted up, at most T.
int64_t taken_by_each(double factor, int64_t k, int64_t tokens, int64_t experts)
{
    return std::min(tokens, oracle::capacity_of(factor, k, tokens, experts));
}

template <class Real, class Executor>
auto run(Executor& ex, const fm::expert_choice_gate& gate, const support::random_batch<Real>& b,
         const std::vector<Real>& dweights)
{
    return support::gate_run(ex, gate, b.tokens, b.stored, dweights, fm::gate_mode::training, b.mask);
}

} // namespace

TEST_CASE_TEMPLATE("every expert takes as many as it should, none that another beats, with p as weights and its gradient",
                   Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 61);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int i = 0; i < (small ? 6 : 30); ++i) {
        const int64_t experts = rng.integer(1, small ? 12 : 70), tokens = rng.integer(0, small ? 70 : 200);
        const int64_t k = rng.integer(1, experts);
        const double factor = rng.one_of(1.0, 1.0, 0.3, 1.7), spread = rng.one_of(1.0, 5.0);
        CAPTURE(experts);
        CAPTURE(tokens);
        CAPTURE(k);
        const support::random_batch<Real> b(rng, tokens, experts, spread, i % 2 ? 0.2 : 0.0);
        const int64_t each = taken_by_each(factor, k, tokens, experts), there = std::min(each, b.open_tokens());
        const auto dweights = support::normal_vector<Real>(rng, each * experts);
        const auto r = run(ex, gate_of(experts, k, factor), b, dweights);
        REQUIRE_EQ(r.experts.size(), std::size_t(each * experts));
        support::holds_together(r, b, k);
        const auto lists = support::lists_of(r, tokens, k);
        const auto scores = oracle::probability_scores(b);
        for (int64_t e = 0; e < experts; ++e) {
            long double least = inf, best = -inf;
            int64_t n = 0;
            for (int64_t t = 0; t < tokens; ++t) {
                const bool has = std::find(lists[t].begin(), lists[t].end(), e) != lists[t].end();
                n += has;
                if (has) least = std::min(least, scores[e][t]);
                else if (b.open(t)) best = std::max(best, scores[e][t]);
            }
            REQUIRE_EQ(n, there);
            // Keys are log p, rounded once.
            if (n > 0 && n < b.open_tokens())
                REQUIRE(best - least <= 2 * support::roundoff<Real> * std::fabs(double(least)));
        }
        support::weighs_as(r, b, k, dweights, spread, support::over_all);
    }
}

TEST_CASE_TEMPLATE("tokens of equal probability are taken in their order, also where rows are permuted or shifted", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 62);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int i = 0; i < (small ? 5 : 25); ++i) {
        const int64_t experts = rng.integer(1, small ? 9 : 40), tokens = rng.integer(1, small ? 70 : 150);
        const int64_t k = rng.integer(1, experts);
        CAPTURE(experts);
        CAPTURE(tokens);
        support::random_batch<Real> b(rng, tokens, experts, 1, 0.1);
        std::vector<int> values;
        for (int64_t e = 0; e < experts; ++e) values.push_back(static_cast<int>(rng.integer(0, 2)));
        for (int64_t t = 0; t < tokens; ++t) { // the same numbers in another order, and a constant
            const auto order = rng.permutation(experts);
            const auto shift = rng.integer(-3, 3);
            for (int64_t e = 0; e < experts; ++e) b.stored[t * experts + e] = Real(values[order[e]] + shift);
        }
        b.widen();
        const int64_t each = taken_by_each(1, k, tokens, experts);
        const auto r = run(ex, gate_of(experts, k), b, std::vector<Real>(each * experts));
        REQUIRE_EQ(support::lists_of(r, tokens, k), oracle::expert_choice(b, each));
    }
}

TEST_CASE("a number of tokens that is no whole one is rounded up, and never above T")
{
    const auto each = [](int64_t tokens, int64_t experts, int64_t k, double factor) {
        return fm::expert_choice{.factor = factor}.choices(tokens, experts, k) / experts;
    };
    CHECK_EQ(each(8, 4, 1, 1), 2);
    CHECK_EQ(each(10, 4, 1, 1), 3);
    CHECK_EQ(each(10, 4, 2, 1), 5);
    CHECK_EQ(each(10, 4, 1, 0.5), 2);
    CHECK_EQ(each(10, 4, 4, 1), 10);
    CHECK_EQ(each(10, 4, 9, 1), 10);
    CHECK_EQ(each(10, 4, 1, 1e300), 10);
    CHECK_EQ(each(1, 100, 1, 1), 1);
    CHECK_EQ(each(0, 4, 1, 1), 0);
}

TEST_CASE_TEMPLATE("with as many choices as experts everybody takes everybody, as a softmax over all experts", Real, float,
                   double)
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 63);
    const support::random_batch<Real> b(rng, 30, 7, 2);
    const auto dweights = support::normal_vector<Real>(rng, 210);
    const auto r = run(ex, gate_of(7, 7), b, dweights);
    for (int64_t c = 0; c < 210; ++c) REQUIRE_EQ(r.experts[c], c % 7);
    support::weighs_as(r, b, 7, dweights, 2, support::over_all);
}

TEST_CASE_TEMPLATE("rows that are not finite are taken in the order of choice, or not at all", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    const auto route = [&](std::vector<double> logits, int64_t experts, double factor, std::vector<std::uint8_t> mask = {}) {
        const auto tokens = static_cast<int64_t>(logits.size()) / experts;
        const auto gate = gate_of(experts, 1, factor);
        const auto n = gate.assignment.choices(tokens, experts, 1);
        return support::gate_run(ex, gate, tokens, support::narrowed<Real>(logits), std::vector<Real>(n, Real(1)),
                                 fm::gate_mode::training, mask);
    };
    using lists = std::vector<std::vector<int32_t>>;
    { // expert 0 takes the certain, then the finite, then -Inf, then NaN; the row without anything never
        const std::vector<double> logits{nan_, 1, -inf, 1, 0, 1, inf, 1, nan_, -inf, -1e30, 1};
        for (int n = 0; n <= 6; ++n) {
            const auto r = route(logits, 2, n == 0 ? 0.1 : n / 3.0);
            const auto of = support::lists_of(r, 6, 1);
            const int64_t order[] = {3, 2, 5, 1, 0};
            for (int i = 0; i < 5; ++i)
                CHECK_EQ(std::count(of[order[i]].begin(), of[order[i]].end(), 0), i < std::max(n, 1) ? 1 : 0);
            CHECK(of[4].empty());
            for (Real d : r.dlogits) CHECK(std::isfinite(d));
        }
        const auto r = route(logits, 2, 2);
        CHECK_EQ(support::lists_of(r, 6, 1), lists{{0, 1}, {0, 1}, {0, 1}, {0, 1}, {}, {0, 1}});
        const std::vector<double> expected{0, 1, 0, 1, 1 / (1 + std::exp(1.0)), 1 / (1 + std::exp(-1.0)), 1, 0, 0, 1, 0, 0};
        CHECK(support::close(r.weights, expected, {.length = 4, .magnitude = 1}));
    }
    { // several +Inf share, and so are beaten by a certain one
        const auto r = route({inf, inf, inf, 0}, 2, 0.5);
        CHECK_EQ(support::lists_of(r, 2, 1), lists{{1}, {0}});
        CHECK(support::close(r.weights, {0.5, 1}, {.length = 4, .magnitude = 1}));
    }
    { // nobody takes part
        const auto r = route({nan_, -inf, 1, 2}, 2, 1, {1, 0});
        CHECK_EQ(r.experts, std::vector<int32_t>{-1, -1});
        CHECK_EQ(r.first, std::vector<int32_t>{0, 0, 0});
        CHECK_EQ(r.weights, std::vector<Real>{0, 0});
        CHECK_EQ(r.dlogits, std::vector<Real>(4, Real(0)));
    }
    { // probabilities too small to be represented are still told apart
        const auto r = route({0, -3000, 0, -2000, 0, -4000, 0, -3e38}, 2, 0.5);
        CHECK_EQ(support::lists_of(r, 4, 1)[1], std::vector<int32_t>{1});
    }
}

TEST_CASE("what makes no sense is refused by name")
{
    fm::host_executor ex({.threads = 1});
    const auto says = [&](const fm::expert_choice_gate& gate, const char* part) {
        const std::string text = support::message_of<fm::invalid_argument>(
            [&] { support::gate_run(ex, gate, 2, std::vector<float>(2 * gate.experts), std::vector<float>(4)); });
        INFO(text);
        CHECK(support::has(text, part));
    };
    says(gate_of(4, 0), "k is 0; expected 1 or more");
    says(gate_of(0, 1), "experts is 0; expected 1");
    says(gate_of(4, 1, 0), "assignment.factor is 0; expected a finite number above 0");
    says(gate_of(4, 1, -1), "assignment.factor is -1; expected a finite number above 0");
    says(gate_of(4, 1, inf), "assignment.factor is inf; expected a finite number above 0");
    says(gate_of(4, 1, nan_), "assignment.factor is nan; expected a finite number above 0");
    fm::expert_choice_gate gate = gate_of(4, 1);
    gate.balance.coefficient = 1;
    says(gate, "balance.coefficient is 1; expected 0 for this assignment");
    fm::arena measure;
    CHECK_THROWS_WITH_AS(gate_of(2000, 2000).reserve<float>(measure, 1 << 21), doctest::Contains("tokens * k is 2097152"),
                         fm::invalid_argument);
}
