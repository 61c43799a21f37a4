// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Logits that are scaled until experts are wanted equally.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include <fastmoe/routing/sinkhorn.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

#include "support/assigned.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
namespace oracle = support::reference;
using fm::int64_t;

namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan_ = std::numeric_limits<double>::quiet_NaN();

static_assert(fm::gate_policy<fm::sinkhorn_gate, fm::host_executor, fm::bfloat16, fm::self>);
static_assert(fm::gate_policy<fm::sinkhorn_softmax_gate, support::lanes, double, fm::self>);

template <class Gate = fm::sinkhorn_gate>
Gate gate_of(int64_t experts, int64_t k, int rounds = 8)
{
    return {.experts = experts, .k = k, .assignment = {.rounds = rounds}};
}

template <class Real, class Executor, class Gate>
auto run(Executor& ex, const Gate& gate, const support::random_batch<Real>& b, const std::vector<Real>& dweights,
         fm::gate_mode mode = fm::gate_mode::training)
{
    return support::gate_run(ex, gate, b.tokens, b.stored, dweights, mode, b.mask);
}

/// Every choice is at least as good as all that come after it and all that were not chosen, as the oracle scores them.
template <class Run>
void chooses_by(const Run& r, const oracle::batch& b, int64_t k, int rounds)
{
    const auto scores = oracle::sinkhorn_scores(b, rounds);
    for (int64_t t = 0; t < b.tokens; ++t) {
        if (!b.open(t)) {
            for (int64_t j = 0; j < k; ++j) REQUIRE_EQ(r.experts[t * k + j], -1);
            continue;
        }
        const auto* score = scores.data() + t * b.experts;
        // log d1 is rounded to 24 bits, of 1 at least; the rest is in double.
        double size = 1, largest = 1;
        for (int64_t e = 0; e < b.experts; ++e) {
            size = std::max(size, std::fabs(double(score[e] - score[0] - b.at(t, e) + b.at(t, 0))));
            largest = std::max(largest, std::fabs(b.at(t, e)));
        }
        const double bound = 2 * support::roundoff<float> * (2 * size + 1) +
                             1e3 * support::roundoff<double> * (largest + size);
        std::vector<char> left(b.experts, 1);
        for (int64_t j = 0; j < k; ++j) {
            const int e = r.experts[t * k + j];
            REQUIRE(e >= 0);
            left[e] = 0;
            for (int64_t other = 0; other < b.experts; ++other)
                if (left[other]) REQUIRE(score[e] >= score[other] - bound);
        }
    }
}

} // namespace

TEST_CASE_TEMPLATE("the choice is the top K of d1 C d0 after the rounds asked for, weighed by the logits as they were",
                   Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 71);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int i = 0; i < (small ? 4 : 24); ++i) {
        const int64_t experts = rng.integer(1, small ? 12 : 70), tokens = rng.integer(0, small ? 20 : 200);
        const int64_t k = i % 2 ? 1 : rng.integer(1, experts);
        const int rounds = static_cast<int>(rng.integer(1, small ? 3 : 9));
        const double spread = rng.one_of(1.0, 4.0);
        CAPTURE(experts);
        CAPTURE(tokens);
        CAPTURE(rounds);
        support::random_batch<Real> b(rng, tokens, experts, spread, i % 3 == 0 ? 0.2 : 0.0);
        const auto dweights = support::normal_vector<Real>(rng, tokens * k);
        const auto single = run(ex, gate_of(experts, k, rounds), b, dweights);
        support::holds_together(single, b, k);
        chooses_by(single, b, k, rounds);
        support::weighs_as(single, b, k, dweights, spread, support::sigmoids);
        const auto several = run(ex, gate_of<fm::sinkhorn_softmax_gate>(experts, k, rounds), b, dweights);
        CHECK_EQ(several.experts, single.experts);
        support::weighs_as(several, b, k, dweights, spread, support::over_all);
    }
}

TEST_CASE_TEMPLATE("logits of any size are scaled as exactly as small ones, where exp of them overflows or is 0", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 72);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int i = 0; i < (small ? 3 : 12); ++i)
        for (double size : {1e2, 1e4, 1e9}) {
            const int64_t experts = rng.integer(2, 9), tokens = rng.integer(2, small ? 10 : 60);
            const int rounds = static_cast<int>(rng.integer(1, 6));
            CAPTURE(size);
            CAPTURE(rounds);
            support::random_batch<Real> b(rng, tokens, experts, size);
            for (int64_t t = 0; t < tokens; ++t) { // one expert that is out of everybody's reach, rows far from each other
                const double row = rng.normal(10 * size);
                for (int64_t e = 0; e < experts; ++e)
                    b.stored[t * experts + e] = Real(double(b.stored[t * experts + e]) + row - (e == 1 ? 20 * size : 0));
            }
            b.widen();
            const auto r = run(ex, gate_of(experts, 1, rounds), b, std::vector<Real>(tokens));
            support::holds_together(r, b, 1);
            chooses_by(r, b, 1, rounds);
        }
}

TEST_CASE("an expert that all tokens prefer is chosen about as often as any other in training, and by all in inference")
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 73);
    const int64_t tokens = 2000, experts = 10;
    support::random_batch<float> b(rng, tokens, experts, 1);
    for (int64_t t = 0; t < tokens; ++t) b.stored[t * experts + 4] += 20;
    b.widen();
    const auto count = [&](fm::gate_mode mode) {
        const auto r = run(ex, gate_of(experts, 1), b, std::vector<float>(tokens), mode);
        std::vector<int> n(experts);
        for (auto e : r.experts) ++n.at(e);
        return n;
    };
    CHECK_EQ(count(fm::gate_mode::inference)[4], tokens);
    // Expected choices follow p, whose columns sum to 200; the choice is the greatest p, whose shares differ a little.
    for (int n : count(fm::gate_mode::training)) CHECK(std::abs(n - 200) < 60);
}

TEST_CASE_TEMPLATE("inference chooses the top K of the logits", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 74);
    const int64_t tokens = 12, experts = 9, k = 3;
    const support::random_batch<Real> b(rng, tokens, experts, 1, 0.3);
    const auto r = run(ex, gate_of(experts, k), b, std::vector<Real>(tokens * k), fm::gate_mode::inference);
    const auto lists = support::lists_of(r, tokens, k);
    for (int64_t t = 0; t < tokens; ++t)
        CHECK_EQ(lists[t], b.open(t) ? oracle::best_experts(b, t, k) : std::vector<int32_t>(k, -1));
}

TEST_CASE_TEMPLATE("a masked token changes nothing for the others", Real, float, double)
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 75);
    const int64_t experts = 8, k = 2;
    support::random_batch<Real> b(rng, 90, experts, 2, 0.4), fewer(rng, 0, experts, 1);
    for (int64_t t = 0; t < b.tokens; ++t) {
        Real* row = b.stored.data() + t * experts;
        if (b.mask[t]) fewer.stored.insert(fewer.stored.end(), row, row + experts), ++fewer.tokens;
        else for (int64_t e = 0; e < experts; ++e) row[e] = Real(rng.one_of(nan_, inf, -inf, 1e30));
    }
    b.widen();
    fewer.widen();
    const auto whole = run(ex, gate_of(experts, k), b, std::vector<Real>(b.tokens * k));
    const auto part = run(ex, gate_of(experts, k), fewer, std::vector<Real>(fewer.tokens * k));
    int64_t at = 0;
    for (int64_t t = 0; t < b.tokens; ++t)
        for (int64_t j = 0; j < k; ++j) {
            CHECK_EQ(whole.experts[t * k + j], b.mask[t] ? part.experts[at * k + j] : -1);
            CHECK_EQ(whole.weights[t * k + j], b.mask[t] ? part.weights[at * k + j] : Real(0));
            if (j + 1 == k) at += b.mask[t];
        }
}

TEST_CASE_TEMPLATE("experts that are wanted alike are equal, so that ties go to the lower id", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 76);
    // Every row with all of its rotations: each expert meets the same numbers, in another order.
    for (int64_t experts : {2, 3, 5, 7, 17}) {
        const int64_t rows = 4, tokens = rows * experts + 1;
        support::random_batch<Real> b(rng, tokens, experts, 3);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t s = 1; s < experts; ++s)
                for (int64_t e = 0; e < experts; ++e)
                    b.stored[(r * experts + s) * experts + (e + s) % experts] = b.stored[r * experts * experts + e];
        for (int64_t e = 0; e < experts; ++e) b.stored[(tokens - 1) * experts + e] = Real(0.25);
        b.widen();
        const auto r = run(ex, gate_of(experts, experts, 5), b, std::vector<Real>(tokens * experts));
        for (int64_t t = 0; t < tokens; ++t) {
            const std::vector<int> ids(r.experts.begin() + t * experts, r.experts.begin() + (t + 1) * experts);
            CHECK_EQ(ids, oracle::best_experts(b, t, experts));
        }
    }
}

TEST_CASE_TEMPLATE("rows that are not finite keep the order of choice, and spoil no other row", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    const auto logits = support::narrowed<Real>({nan_, 1, -inf, 2, inf, // as documented
                                                 nan_, -inf, nan_, -inf, nan_, // dropped
                                                 0, inf, 5, inf, -inf, // two share
                                                 1, 0, 0.5, -inf, 0, //
                                                 0, 1, 0.5, nan_, 0});
    const auto r = support::gate_run(ex, gate_of(5, 5), 5, logits, std::vector<Real>(25, Real(1)));
    const auto ids = [&](int t) { return std::vector<int32_t>(r.experts.begin() + 5 * t, r.experts.begin() + 5 * t + 5); };
    CHECK_EQ(ids(0)[0], 4);
    CHECK_EQ(ids(0)[3], 2);
    CHECK_EQ(ids(0)[4], 0);
    CHECK_EQ(ids(1), std::vector<int32_t>(5, -1));
    CHECK_EQ(ids(2)[0], 1);
    CHECK_EQ(ids(2)[1], 3);
    CHECK_EQ(ids(2)[4], 4);
    CHECK_EQ(ids(3)[4], 3);
    CHECK_EQ(ids(4)[4], 3);
    for (Real w : r.weights) CHECK((w >= 0 && w <= 1));
    for (Real d : r.dlogits) CHECK(std::isfinite(d));
    // Expert 3 is out of reach for all but row 2, where it shares with expert 1: no v may become infinite or NaN.
    const auto chosen = [&](int64_t experts, int64_t k, std::vector<double> rows) {
        const auto tokens = static_cast<int64_t>(rows.size()) / experts;
        const std::vector<Real> dweights(tokens * k);
        return support::gate_run(ex, gate_of(experts, k), tokens, support::narrowed<Real>(rows), dweights).experts;
    };
    CHECK_EQ(chosen(2, 1, {0, -inf, 1, -inf, nan_, 3}), std::vector<int32_t>{0, 0, 1});
    CHECK_EQ(chosen(3, 1, {0, 1, -inf, 1, 0, -inf}), std::vector<int32_t>{1, 0}); // nobody can choose expert 2
    CHECK_EQ(chosen(2, 2, {3e38, -3e38, -3e38, 3e38}), std::vector<int32_t>{0, 1, 1, 0});
}

TEST_CASE("what makes no sense is refused by name")
{
    fm::host_executor ex({.threads = 1});
    const auto says = [&](const fm::sinkhorn_gate& gate, const char* part) {
        const std::string text = support::message_of<fm::invalid_argument>(
            [&] { support::gate_run(ex, gate, 2, std::vector<float>(8), std::vector<float>(2)); });
        INFO(text);
        CHECK(support::has(text, part));
    };
    says(gate_of(4, 1, 0), "assignment.rounds is 0; expected 1 or more");
    says(gate_of(4, 1, -3), "assignment.rounds is -3; expected 1 or more");
    says(gate_of(4, 5), "k is 5; expected at most the number of experts, 4");
    
}
