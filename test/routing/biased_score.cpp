// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Sigmoid, sqrt-softplus and biased softmax scores, and choices within groups.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <string>

#include <fastmoe/routing/biased_score.hpp>
#include <fastmoe/routing/group_limited.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

#include "support/compare.hpp"
#include "support/finite_difference.hpp"
#include "support/reference_scores.hpp"
#include "support/run_gate.hpp"
#include "support/scratch.hpp"
#include "support/warps.hpp"

namespace fm = fastmoe;
namespace oracle = support::reference;
using fm::int64_t;

namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan_ = std::numeric_limits<double>::quiet_NaN();

template <class Score, class Select = fm::top_k, class Weigh = fm::renormalize>
using gate_of = fm::top_k_gate<Score, Select, Weigh>;

static_assert(fm::gate_policy<gate_of<fm::sigmoid_score, fm::group_limited>, fm::host_executor, fm::bfloat16, fm::self>);
static_assert(fm::gate_policy<gate_of<fm::sqrt_softplus_score>, support::lanes, double, fm::self>);
static_assert(fm::gate_policy<gate_of<fm::biased_softmax_score, fm::top_k, fm::raw_scores>, fm::host_executor, float, fm::self>);

template <class Score>
constexpr oracle::score_kind kind = std::is_same_v<Score, fm::sigmoid_score>         ? oracle::score_kind::sigmoid
                                    : std::is_same_v<Score, fm::sqrt_softplus_score> ? oracle::score_kind::sqrt_softplus
                                                                                     : oracle::score_kind::softmax;

template <class Score, class Select, class Weigh>
oracle::score_rule rule_of(const gate_of<Score, Select, Weigh>& gate, const std::vector<float>& bias)
{
    oracle::score_rule rule;
    rule.score = kind<Score>;
    rule.bias.assign(bias.begin(), bias.end());
    rule.k = gate.k;
    rule.scale = gate.scale;
    rule.renormalize = Weigh::over_chosen;
    if constexpr (Weigh::over_chosen) rule.epsilon = gate.weigh.epsilon;
    if constexpr (std::is_same_v<Select, fm::group_limited>) {
        rule.groups = gate.select.groups;
        rule.keep = gate.select.keep;
        rule.top = gate.select.top;
        rule.outside_is_zero = gate.select.outside == fm::outside_groups::zero;
    }
    return rule;
}

/// Forward against the oracle; backward against finite differences of the oracle's weights.
template <class Real, class Executor, class Score, class Select, class Weigh>
void matches_oracle(Executor& ex, support::random& rng, const gate_of<Score, Select, Weigh>& gate,
                    const std::vector<float>& bias, int64_t tokens, double spread)
{
    CAPTURE(gate.experts);
    CAPTURE(gate.k);
    CAPTURE(tokens);
    const int64_t experts = gate.experts, k = gate.k;
    const auto logits = support::normal_vector<Real>(rng, tokens * experts, spread);
    const auto dweights = support::normal_vector<Real>(rng, tokens * k);
    const support::gate_run r(ex, gate, tokens, logits, dweights);
    const auto rule = rule_of(gate, bias);
    const double length = 2 * double(experts) + 8 * spread + 64;
    std::vector<double> weights, gradient;
    for (int64_t t = 0; t < tokens; ++t) {
        std::vector<double> l(logits.begin() + t * experts, logits.begin() + (t + 1) * experts);
        const auto expected = oracle::score_token(rule, l);
        const std::vector<int> ids(r.experts.begin() + t * k, r.experts.begin() + (t + 1) * k);
        REQUIRE_EQ(ids, expected.ids);
        weights.insert(weights.end(), expected.weights.begin(), expected.weights.end());
        const auto loss = [&] {
            const auto w = oracle::score_token(rule, l, &ids).weights;
            double sum = 0;
            for (int64_t j = 0; j < k; ++j) sum += double(dweights[t * k + j]) * w[j];
            return sum;
        };
        const auto g = support::finite_difference(loss, l, 1e-3);
        gradient.insert(gradient.end(), g.begin(), g.end());
    }
    CHECK(support::close(r.weights, weights, {.length = length}));
    double largest = 0;
    for (Real d : dweights) largest = std::max(largest, gate.scale * std::fabs(double(d)));
    for (std::size_t i = 0; i < gradient.size(); ++i) {
        const double bound = (support::roundoff<Real> * 8 * length + 1e-10) * (largest + 1);
        REQUIRE(std::fabs(double(r.dlogits[i]) - gradient[i]) <= bound);
    }
}

/// Biases whose sums with scores are far from ties in float.
std::vector<float> biases(support::random& rng, int64_t experts)
{
    std::vector<float> out;
    for (int64_t e = 0; e < experts; ++e) out.push_back(static_cast<float>(rng.normal(0.7)));
    return out;
}

} // namespace

TEST_CASE_TEMPLATE("scores with and without a bias agree with the oracle, and their gradients with finite differences of it", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 31);
    const bool small = support::takes_turns<typename Cell::executor>;
    const auto check = [&]<class Score>(Score score) {
        for (int i = 0; i < (small ? 3 : 12); ++i) {
            const int64_t experts = rng.integer(1, small ? 40 : 150), k = rng.integer(1, std::min<int64_t>(experts, 12));
            const int64_t tokens = rng.integer(0, small ? 4 : 12);
            const auto bias = i % 3 == 0 ? std::vector<float>() : biases(rng, experts);
            const auto memory = support::upload(ex, bias);
            score.bias = memory.view();
            const double scale = rng.uniform(0.5, 3);
            matches_oracle<Real>(ex, rng,
                                 gate_of<Score, fm::top_k, fm::raw_scores>{.experts = experts, .k = k, .scale = scale, .score = score},
                                 bias, tokens, 2);
            if (kind<Score> == oracle::score_kind::softmax && k == 1) continue; // constant: refused, see gate.cpp
            matches_oracle<Real>(ex, rng,
                                 gate_of<Score>{.experts = experts, .k = k, .scale = scale, .score = score,
                                                .weigh = {.epsilon = i % 2 ? 1e-20 : 0.1}},
                                 bias, tokens, 2);
        }
    };
    check(fm::sigmoid_score{});
    check(fm::sqrt_softplus_score{});
    check(fm::biased_softmax_score{});
}

TEST_CASE_TEMPLATE("group-limited choices agree with the oracle for both group scores and both masks", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 32);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int i = 0; i < (small ? 8 : 60); ++i) {
        const int64_t groups = rng.integer(1, 8), size = rng.integer(1, small ? 6 : 40), experts = groups * size;
        const int64_t keep = rng.integer(1, groups), top = rng.integer(1, std::min<int64_t>(size, 4));
        const int64_t k = rng.integer(1, std::min<int64_t>(keep * size, 20));
        const bool zero = rng.coin();
        const fm::group_limited select{.groups = groups, .keep = keep, .top = top,
                                       .outside = zero ? fm::outside_groups::zero : fm::outside_groups::excluded};
        const auto bias = biases(rng, experts);
        const auto memory = support::upload(ex, bias);
        CAPTURE(groups);
        CAPTURE(keep);
        CAPTURE(top);
        matches_oracle<Real>(ex, rng,
                             gate_of<fm::sigmoid_score, fm::group_limited, fm::raw_scores>{
                                 .experts = experts, .k = k, .scale = 2.5, .score = {{memory.view()}}, .select = select},
                             bias, rng.integer(0, 5), 2);
        if (!zero) { // logits below 0 would lose to the zeros, and ties among those are not the subject here
            matches_oracle<Real>(ex, rng,
                                 gate_of<fm::sigmoid_score, fm::group_limited, fm::raw_scores>{
                                     .experts = experts, .k = k, .select = select},
                                 {}, rng.integer(0, 5), 2);
            matches_oracle<Real>(ex, rng,
                                 gate_of<fm::softmax_score, fm::group_limited, fm::raw_scores>{
                                     .experts = experts, .k = k, .select = select},
                                 {}, rng.integer(0, 5), 2);
        }
    }
}

TEST_CASE_TEMPLATE("a group's sum is of scores, not of the logits that stand for them in the choice", Real, float, double)
{
    fm::host_executor ex({.threads = 1});
    // Logits: 9 - 4 > 1 + 1. Sigmoids: 1.00 + 0.02 < 0.73 + 0.73.
    const auto row = support::narrowed<Real>({9, -4, 1, 1});
    const auto check = [&]<class Score>(const Score& score, int32_t expected) {
        const gate_of<Score, fm::group_limited, fm::raw_scores> g{
            .experts = 4, .k = 1, .score = score, .select = {.groups = 2, .keep = 1, .top = 2}};
        CHECK_EQ(support::gate_run(ex, g, 1, row, std::vector<Real>(1)).experts, std::vector<int32_t>{expected});
    };
    check(fm::sigmoid_score{}, 2);
    check(fm::sqrt_softplus_score{}, 0); // 3 + 0.13 > 1.15 + 1.15
    check(fm::softmax_score{}, 0);       // nearly all of the weight is on expert 0
    check(fm::biased_softmax_score{}, 0);
}

TEST_CASE("a mask of zero lets an outer expert in where inner scores are negative, a mask of -Inf does not")
{
    fm::host_executor ex({.threads = 1});
    // Two groups of two; group 0 wins by its maximum, but its second expert has a negative biased score.
    const std::vector<float> bias{1.f, -2.f, 0.1f, 0.2f}, logits{2, 0, 0, 0};
    const auto memory = support::upload(ex, bias);
    using gate = gate_of<fm::sigmoid_score, fm::group_limited, fm::raw_scores>;
    gate g{.experts = 4, .k = 2, .score = {{memory.view()}}, .select = {.groups = 2, .keep = 1, .top = 1}};
    CHECK_EQ(support::gate_run(ex, g, 1, logits, std::vector<float>(2)).experts, std::vector<int32_t>{0, 1});
    g.select.outside = fm::outside_groups::zero;
    CHECK_EQ(support::gate_run(ex, g, 1, logits, std::vector<float>(2)).experts, std::vector<int32_t>{0, 2});
}

TEST_CASE_TEMPLATE("the bias moves the choice and never a weight or a gradient", Real, float, double)
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 33);
    const int64_t tokens = 20, experts = 12, k = 3;
    const auto logits = support::normal_vector<Real>(rng, tokens * experts);
    const auto dweights = support::normal_vector<Real>(rng, tokens * k);
    const std::vector<float> flat(experts, 0.25f); // the same for all: the choice stays
    const auto memory = support::upload(ex, flat);
    const auto check = [&]<class Score>(const Score& score) {
        gate_of<Score, fm::top_k, fm::raw_scores> plain{.experts = experts, .k = k, .score = score}, biased = plain;
        biased.score.bias = memory.view();
        const support::gate_run a(ex, plain, tokens, logits, dweights), b(ex, biased, tokens, logits, dweights);
        CHECK_EQ(a.experts, b.experts);
        CHECK(support::same_bits(a.weights, b.weights));
        CHECK(support::same_bits(a.dlogits, b.dlogits));
    };
    check(fm::sigmoid_score{});
    check(fm::sqrt_softplus_score{});
    check(fm::biased_softmax_score{});
}

TEST_CASE_TEMPLATE("rows that are not finite keep the order of choice whatever the bias is", Real, float, double)
{
    fm::host_executor ex({.threads = 1});
    const std::vector<float> bias{9.f, 0.f, 9.f, 0.f, -9.f};
    const auto memory = support::upload(ex, bias);
    const auto row = support::narrowed<Real>({nan_, 1, -inf, 2, inf});
    const auto check = [&]<class Score>(Score score) {
        score.bias = memory.view();
        const gate_of<Score, fm::top_k, fm::raw_scores> gate{.experts = 5, .k = 5, .score = score};
        const support::gate_run r(ex, gate, 1, row, std::vector<Real>(5, Real(1)));
        // In a softmax the +Inf leaves probability 0 to all others, and ties go to the lower id.
        const bool softmax = kind<Score> == oracle::score_kind::softmax;
        CHECK_EQ(r.experts, softmax ? std::vector<int32_t>{4, 1, 3, 2, 0} : std::vector<int32_t>{4, 3, 1, 2, 0});
        CHECK_EQ(r.weights[0], Real(1)); // the limit: a logit of +Inf takes all
        for (int j = 1; j < 5; ++j) CHECK_EQ(r.weights[j], Real(0));
        for (Real d : r.dlogits) CHECK(std::isfinite(d));
        const auto none = support::narrowed<Real>({nan_, -inf, nan_, -inf, nan_});
        CHECK_EQ(support::gate_run(ex, gate, 1, none, std::vector<Real>(5)).experts, std::vector<int32_t>(5, -1));
    };
    check(fm::sigmoid_score{});
    check(fm::sqrt_softplus_score{});
    check(fm::biased_softmax_score{});
}

TEST_CASE_TEMPLATE("saturated sigmoids without a bias are still told apart by their logits", Real, float, double)
{
    fm::host_executor ex({.threads = 1});
    const auto row = support::narrowed<Real>({200, 300, 100, 400});
    const gate_of<fm::sigmoid_score> gate{.experts = 4, .k = 2};
    CHECK_EQ(support::gate_run(ex, gate, 1, row, std::vector<Real>(2)).experts, std::vector<int32_t>{3, 1});
}

TEST_CASE("a single sigmoid is not divided by itself, and so trains")
{
    fm::host_executor ex({.threads = 1});
    const gate_of<fm::sigmoid_score> gate{.experts = 2, .k = 1, .weigh = {.epsilon = 1e-20}};
    const support::gate_run r(ex, gate, 1, std::vector<double>{0.5, -1}, std::vector<double>{1});
    const double s = 1 / (1 + std::exp(-0.5));
    CHECK(std::fabs(r.weights[0] - s) < 1e-15);
    CHECK(std::fabs(r.dlogits[0] - s * (1 - s)) < 1e-15);
}

TEST_CASE("groups and biases that make no sense are refused by name")
{
    fm::host_executor ex({.threads = 1});
    const auto says = [&](auto gate, const char* part) {
        const std::string text = support::message_of<fm::invalid_argument>(
            [&] { support::gate_run(ex, gate, 1, std::vector<float>(gate.experts), std::vector<float>(gate.k)); });
        INFO(text);
        CHECK(support::has(text, part));
    };
    using gate = gate_of<fm::sigmoid_score, fm::group_limited>;
    says(gate{.experts = 10, .k = 2, .select = {.groups = 4}}, "select.groups is 4; expected a divisor of the 10 experts");
    says(gate{.experts = 10, .k = 2, .select = {.groups = 0}}, "select.groups is 0; expected a divisor");
    says(gate{.experts = 10, .k = 2, .select = {.groups = 5, .keep = 6}}, "select.keep is 6; expected 1 to groups = 5");
    says(gate{.experts = 10, .k = 2, .select = {.groups = 5, .keep = 2, .top = 3}}, "select.top is 3; expected 1 to the 2 experts");
    says(gate{.experts = 10, .k = 5, .select = {.groups = 5, .keep = 2}}, "k is 5; expected at most the 4 experts of the kept groups");
    const std::vector<float> bias(9);
    says(gate_of<fm::sigmoid_score>{.experts = 10, .k = 2, .score = {{fm::as_vector(bias)}}},
         "score.bias (E) is of shape (9); expected (10)");
    says(gate_of<fm::biased_softmax_score>{.experts = 10, .k = 2, .score = {fm::as_vector(bias)}},
         "score.bias (E) is of shape (9); expected (10)");
}
