// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// BASE: equal numbers of tokens, with the greatest sum of logits there is.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include <fastmoe/routing/balanced_assignment.hpp>

#include "support/assigned.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
namespace oracle = support::reference;
using fm::int64_t;

namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan_ = std::numeric_limits<double>::quiet_NaN();

static_assert(fm::gate_policy<fm::base_gate, fm::host_executor, fm::bfloat16, fm::self>);
static_assert(fm::gate_policy<fm::base_gate, support::lanes, double, fm::self>);

template <class Real, class Executor>
auto run(Executor& ex, const support::random_batch<Real>& b, const std::vector<Real>& dweights,
         fm::gate_mode mode = fm::gate_mode::training)
{
    return support::gate_run(ex, fm::base_gate{.experts = b.experts}, b.tokens, b.stored, dweights, mode, b.mask);
}

/// How far a sum may be from the greatest: N D / 2^39.
double slack(const oracle::batch& b)
{
    double furthest = 0;
    for (int64_t t = 0; t < b.tokens; ++t) {
        const auto row = b.logits.begin() + t * b.experts;
        const double top = *std::max_element(row, row + b.experts);
        for (int64_t e = 0; e < b.experts; ++e)
            if (b.open(t) && top - row[e] <= 65536) furthest = std::max(furthest, top - row[e]);
    }
    return double(b.tokens) * furthest * 0x1p-39;
}

/// One expert for every token that takes part, and no expert over ceil(N / E).
template <class Run>
void is_balanced(const Run& r, const oracle::batch& b)
{
    support::holds_together(r, b, 1);
    std::vector<int64_t> count(b.experts);
    for (int64_t t = 0; t < b.tokens; ++t) {
        REQUIRE_EQ(r.experts[t] >= 0, b.open(t));
        if (b.open(t)) ++count[r.experts[t]];
    }
    const int64_t most = (b.open_tokens() + b.experts - 1) / b.experts;
    for (int64_t n : count) REQUIRE(n <= most);
}

template <class Run>
long double sum_of(const Run& r, const oracle::batch& b)
{
    long double sum = 0;
    for (int64_t t = 0; t < b.tokens; ++t)
        if (r.experts[t] >= 0) sum += b.at(t, r.experts[t]);
    return sum;
}

/// Random logits, in one of several styles: plain, ties, one favourite, all alike, a few kinds of tokens, lopsided.
template <class Real>
support::random_batch<Real> styled(support::random& rng, int64_t tokens, int64_t experts, int style, double closed)
{
    support::random_batch<Real> b(rng, tokens, experts, 2, closed);
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t e = 0; e < experts; ++e) {
            Real& l = b.stored[t * experts + e];
            if (style == 1) l = Real(rng.integer(-1, 1));
            if (style == 2) l += Real(e == experts / 2 ? 50 : 0);
            if (style == 3) l = Real(0.5);
            if (style == 4) l = Real((t % 3) * (e % 2));
            if (style == 5) l += Real(30 * e) / Real(experts);
            if (style == 6) l = e == 0 ? Real(1 + t % 50) : Real(0); // one token is the next to leave for everywhere
        }
    b.widen();
    return b;
}

} // namespace

TEST_CASE_TEMPLATE("the sum of logits is the greatest that a balanced assignment has, by the Hungarian algorithm", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 81);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int i = 0; i < (small ? 14 : 140); ++i) {
        const int64_t experts = rng.integer(1, small ? 6 : 20), tokens = rng.integer(0, small ? 20 : 60);
        const int style = i % 7;
        CAPTURE(experts);
        CAPTURE(tokens);
        CAPTURE(style);
        const auto b = styled<Real>(rng, tokens, experts, style, i % 3 == 0 ? 0.3 : 0.0);
        const auto dweights = support::normal_vector<Real>(rng, tokens);
        const auto r = run(ex, b, dweights);
        is_balanced(r, b);
        const long double best = oracle::greatest_balanced_sum(b), sum = sum_of(r, b);
        REQUIRE(sum <= best + 1e-9L);
        REQUIRE(sum >= best - slack(b) - 1e-12L * (1 + std::fabs(best)));
        if (i < 14) support::weighs_as(r, b, 1, dweights, 2, support::sigmoids);
    }
}

TEST_CASE("no exchange around any circle of experts gains, for thousands of tokens and with every instruction set")
{
    FASTMOE_SEEDED(rng, 82);
    for (int style : {0, 1, 2, 3, 5, 6}) {
        const int64_t experts = rng.integer(20, 40), tokens = rng.integer(1000, 2000);
        CAPTURE(style);
        const auto b = styled<float>(rng, tokens, experts, style, 0);
        std::vector<int32_t> ids;
        for (auto best : {fm::instruction_set::baseline, fm::instruction_set::avx2, fm::native_instruction_set()}) {
            if (best > fm::native_instruction_set()) continue;
            fm::host_executor ex({.threads = 2, .best = best});
            const auto r = run(ex, b, std::vector<float>(tokens));
            is_balanced(r, b);
            if (!ids.empty()) CHECK_EQ(r.experts, ids);
            ids = r.experts;
        }
        // gain(i, j): the most that moving one token from i to j gains. A way into an expert with room is a circle too.
        const int64_t node = experts;
        std::vector<std::vector<double>> gain(experts + 1, std::vector<double>(experts + 1, -inf));
        std::vector<int64_t> count(experts);
        for (int64_t t = 0; t < tokens; ++t) {
            ++count[ids[t]];
            for (int64_t e = 0; e < experts; ++e)
                gain[ids[t]][e] = std::max(gain[ids[t]][e], b.at(t, e) - b.at(t, ids[t]));
        }
        for (int64_t e = 0; e < experts; ++e) {
            gain[node][e] = 0;
            if (count[e] < (tokens + experts - 1) / experts) gain[e][node] = 0;
        }
        for (int64_t m = 0; m <= experts; ++m)
            for (int64_t i = 0; i <= experts; ++i)
                for (int64_t j = 0; j <= experts; ++j) gain[i][j] = std::max(gain[i][j], gain[i][m] + gain[m][j]);
        for (int64_t i = 0; i <= experts; ++i) REQUIRE(gain[i][i] <= slack(b));
    }
}

TEST_CASE_TEMPLATE("fewer tokens than experts, one expert, one token and none are assigned too", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    const auto route = [&](std::vector<double> logits, int64_t experts, std::vector<std::uint8_t> mask = {}) {
        const auto tokens = static_cast<int64_t>(logits.size()) / experts;
        return support::gate_run(ex, fm::base_gate{.experts = experts}, tokens, support::narrowed<Real>(logits),
                                 std::vector<Real>(tokens), fm::gate_mode::training, mask)
            .experts;
    };
    using ids = std::vector<int32_t>;
    CHECK_EQ(route({}, 5), ids{});
    CHECK_EQ(route({1, 2, 3}, 1), ids{0, 0, 0});
    CHECK_EQ(route({0, 1, 3, 2}, 4), ids{2});
    CHECK_EQ(route({0, 1, 3, 0, 0, 9}, 3), ids{1, 2});      // the second gains more from expert 2
    CHECK_EQ(route({5, 4, 5, 4.5, 5, 0}, 2), ids{0, 1, 0}); // three tokens: two for one expert
    CHECK_EQ(route({5, 4, 5, 4.5, 5, 0}, 2, {1, 0, 1}), ids{1, -1, 0}); // two take part: one for each
    CHECK_EQ(route({5, 4, 5, 4.5}, 2, {0, 0}), ids{-1, -1});
}

TEST_CASE_TEMPLATE("inference takes the greatest logit, however many take the same", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 83);
    const auto b = styled<Real>(rng, 20, 6, 2, 0.2);
    const auto r = run(ex, b, std::vector<Real>(20), fm::gate_mode::inference);
    for (int64_t t = 0; t < 20; ++t) CHECK_EQ(r.experts[t], b.open(t) ? oracle::best_experts(b, t, 1)[0] : -1);
}

TEST_CASE_TEMPLATE("as few tokens as can be get an expert that is nothing to them", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 84);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int i = 0; i < (small ? 8 : 60); ++i) {
        const int64_t experts = rng.integer(1, small ? 5 : 9), tokens = rng.integer(1, small ? 12 : 40);
        support::random_batch<Real> b(rng, tokens, experts, 100, 0.1);
        const double share = rng.uniform(0.1, 0.9);
        for (Real& l : b.stored)
            if (rng.coin(share)) l = Real(rng.one_of(-inf, nan_, -inf, inf, -1e30));
        b.widen();
        const auto r = run(ex, b, std::vector<Real>(tokens, Real(1)));
        is_balanced(r, b);
        // Nothing: what the row's greatest leaves no chance. Where that is +Inf, all else.
        const auto nothing = [&](int64_t t, int64_t e) {
            double top = -inf;
            for (int64_t j = 0; j < experts; ++j) top = b.at(t, j) > top ? b.at(t, j) : top;
            return !(b.at(t, e) == top || top - b.at(t, e) <= 65536);
        };
        std::vector<int64_t> open;
        for (int64_t t = 0; t < tokens; ++t)
            if (b.open(t)) open.push_back(t);
        const auto n = static_cast<int64_t>(open.size()), each = (n + experts - 1) / experts;
        const auto least = oracle::least_assignment_cost(
            n, each * experts, [&](int64_t row, int64_t slot) { return nothing(open[row], slot / each) ? 1.0L : 0.0L; });
        int64_t count = 0;
        for (int64_t t : open) {
            count += nothing(t, r.experts[t]);
            const double l = b.at(t, r.experts[t]);
            if (std::isnan(l) || l == -inf) CHECK_EQ(r.weights[t], Real(0));
        }
        REQUIRE_EQ(count, int64_t(least));
    }
}

TEST_CASE("a token that must take nothing takes -Inf before NaN, and a far logit before both")
{
    fm::host_executor ex({.threads = 1});
    // Both want expert 0, and to token 1 there is no other.
    const auto second = [&](double a, double b) {
        const std::vector<double> logits{0, a, b, 9, nan_, nan_};
        return support::gate_run(ex, fm::base_gate{.experts = 3}, 2, logits, std::vector<double>(2)).experts;
    };
    CHECK_EQ(second(nan_, -inf), std::vector<int32_t>{2, 0});
    CHECK_EQ(second(-inf, nan_), std::vector<int32_t>{1, 0});
    CHECK_EQ(second(-1e9, -inf), std::vector<int32_t>{1, 0});
    CHECK_EQ(second(nan_, -1e9), std::vector<int32_t>{2, 0});
    CHECK_EQ(second(-4, -3), std::vector<int32_t>{2, 0});
}

TEST_CASE("one far logit does not coarsen the others")
{
    fm::host_executor ex({.threads = 1});
    // Without the far one: token 0 gains 1e-6 more than token 1 from expert 0.
    const std::vector<double> logits{1.000001, 0, 1, 0, -1e30, 0, -1e30, 0};
    const auto r = support::gate_run(ex, fm::base_gate{.experts = 2}, 4, logits, std::vector<double>(4));
    CHECK_EQ(r.experts, std::vector<int32_t>{0, 0, 1, 1});
    const auto s = support::gate_run(ex, fm::base_gate{.experts = 2}, 3, std::vector<double>{1, 0, 1.000001, 0, 3e38, -3e38},
                                     std::vector<double>(3));
    CHECK_EQ(s.experts, std::vector<int32_t>{1, 0, 0});
}

TEST_CASE("what makes no sense is refused by name")
{
    fm::host_executor ex({.threads = 1});
    const auto says = [&](const fm::base_gate& gate, const char* part) {
        fm::arena measure;
        const std::string text = support::message_of<fm::invalid_argument>([&] { gate.reserve<float>(measure, 2); });
        INFO(text);
        CHECK(support::has(text, part));
    };
    says({.experts = 4, .k = 2}, "k is 2; expected 1 for a balanced assignment");
    says({.experts = 4, .k = 0}, "k is 0; expected 1 or more");
    CHECK_THROWS_WITH_AS(fm::balanced_assignment{}.validate(300000, 1), doctest::Contains("experts is 300000; expected at most 2^18"),
                         fm::invalid_argument);
}
