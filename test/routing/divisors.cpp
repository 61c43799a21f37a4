// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What chosen scores are divided by besides their sum: a norm, and a sum with a least value.
#include <doctest/doctest.h>

#include <cmath>
#include <string>

#include <fastmoe/routing/biased_score.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

#include "support/compare.hpp"
#include "support/finite_difference.hpp"
#include "support/reference_scores.hpp"
#include "support/run_gate.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
namespace oracle = support::reference;
using fm::int64_t;

namespace {

template <class Score, class Weigh>
using gate_of = fm::top_k_gate<Score, fm::top_k, Weigh>;

void describe(const fm::divide_by_norm& w, oracle::score_rule& rule) { rule.power = w.power; }
void describe(const fm::renormalize_at_least& w, oracle::score_rule& rule)
{
    rule.epsilon = w.epsilon;
    rule.least = w.least;
}

/// Forward against the oracle, backward against finite differences of the oracle's weights.
template <class Real, class Executor, class Score, class Weigh>
void matches_oracle(Executor& ex, support::random& rng, const gate_of<Score, Weigh>& gate, const std::vector<float>& bias,
                    int64_t tokens, double spread = 2, double shift = 0)
{
    const int64_t experts = gate.experts, k = gate.k;
    CAPTURE(experts);
    CAPTURE(k);
    oracle::score_rule rule;
    rule.score = std::is_same_v<Score, fm::sigmoid_score> ? oracle::score_kind::sigmoid : oracle::score_kind::softmax;
    rule.bias.assign(bias.begin(), bias.end());
    rule.k = k;
    rule.scale = gate.scale;
    rule.renormalize = true;
    describe(gate.weigh, rule);
    auto logits = support::normal_vector<Real>(rng, tokens * experts, spread);
    for (Real& l : logits) l += static_cast<Real>(shift);
    const auto dweights = support::normal_vector<Real>(rng, tokens * k);
    const support::gate_run r(ex, gate, tokens, logits, dweights);
    const double length = 8 * double(experts) + 100; // pow's error grows with its result's logarithm
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
        const auto g = support::finite_difference(loss, l, 1e-4);
        gradient.insert(gradient.end(), g.begin(), g.end());
    }
    CHECK(support::close(r.weights, weights, {.length = length}));
    double largest = 0, weight = 0;
    for (Real d : dweights) largest = std::max(largest, std::fabs(double(d)));
    for (double w : weights) weight = std::max(weight, w);
    for (std::size_t i = 0; i < gradient.size(); ++i) {
        const double bound = (support::roundoff<Real> * 8 * length + 1e-9) * (largest + 1) * (weight + 1);
        REQUIRE(std::fabs(double(r.dlogits[i]) - gradient[i]) <= bound);
    }
}

} // namespace

TEST_CASE_TEMPLATE("scores divided by a norm, or by a sum with a least value, agree with the oracle, gradients included", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 41);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int i = 0; i < (small ? 3 : 12); ++i) {
        const int64_t experts = rng.integer(3, small ? 30 : 100), k = rng.integer(2, std::min<int64_t>(experts, 12));
        const int64_t tokens = rng.integer(0, small ? 4 : 10);
        const double scale = rng.uniform(0.5, 3), power = rng.uniform(0.3, 4);
        std::vector<float> bias;
        for (int64_t e = 0; e < experts; ++e) bias.push_back(static_cast<float>(rng.normal(0.7)));
        const auto memory = support::upload(ex, bias);
        matches_oracle<Real>(ex, rng,
                             gate_of<fm::softmax_score, fm::divide_by_norm>{
                                 .experts = experts, .k = k, .scale = scale, .weigh = {{}, power}},
                             {}, tokens);
        matches_oracle<Real>(ex, rng,
                             gate_of<fm::sigmoid_score, fm::divide_by_norm>{
                                 .experts = experts, .k = k, .scale = scale, .score = {{memory.view()}}, .weigh = {{}, power}},
                             bias, tokens);
        // Of the softmax's sums, which lie in (0, 1), some are below the least, some above.
        matches_oracle<Real>(ex, rng,
                             gate_of<fm::biased_softmax_score, fm::renormalize_at_least>{
                                 .experts = experts, .k = k, .scale = scale, .score = {memory.view()},
                                 .weigh = {{}, rng.uniform(0.05, 0.9)}},
                             bias, tokens);
        matches_oracle<Real>(ex, rng,
                             gate_of<fm::sigmoid_score, fm::renormalize_at_least>{
                                 .experts = experts, .k = k, .scale = scale, .weigh = {{.epsilon = 0.1}, double(k) / 2}},
                             {}, tokens);
    }
}

TEST_CASE_TEMPLATE("a norm of scores that lie far apart, or are small all of them, is that of the oracle, whatever its power", Real, float, double)
{
    fm::host_executor ex({.threads = 1});
    FASTMOE_SEEDED(rng, 43);
    for (const double power : {0.3, 0.5, 0.9, 2.0, 9.0, 60.0}) {
        CAPTURE(power);
        const gate_of<fm::softmax_score, fm::divide_by_norm> apart{.experts = 6, .k = 5, .weigh = {{}, power}};
        matches_oracle<Real>(ex, rng, apart, {}, 20, 20);
        const gate_of<fm::sigmoid_score, fm::divide_by_norm> small{.experts = 6, .k = 5, .weigh = {{}, power}};
        matches_oracle<Real>(ex, rng, small, {}, 20, 1, -8); // the oracle has no scale of its own
        // As far apart as logits can be: nothing is other than a number.
        const support::gate_run r(ex, apart, 1, std::vector<Real>{0, -1, -90, -100, -103, -1000}, std::vector<Real>{1, -1, 1, -1, 1});
        for (const Real d : r.dlogits) CHECK(std::isfinite(d));
        for (const Real w : r.weights) CHECK(std::isfinite(w));
    }
}

TEST_CASE("a norm with power 1 gives the bits of the sum, and a least of 0 those of none")
{
    fm::host_executor ex({.threads = 1});
    FASTMOE_SEEDED(rng, 42);
    const auto logits = support::normal_vector<float>(rng, 20 * 9), dweights = support::normal_vector<float>(rng, 20 * 3);
    const gate_of<fm::softmax_score, fm::renormalize> plain{.experts = 9, .k = 3};
    const support::gate_run a(ex, plain, 20, logits, dweights);
    const support::gate_run b(ex, gate_of<fm::softmax_score, fm::divide_by_norm>{.experts = 9, .k = 3, .weigh = {{}, 1}}, 20,
                              logits, dweights);
    const support::gate_run c(ex, gate_of<fm::softmax_score, fm::renormalize_at_least>{.experts = 9, .k = 3, .weigh = {{}, 0}},
                              20, logits, dweights);
    for (const auto* other : {&b.weights, &c.weights}) CHECK(support::same_bits(a.weights, *other));
    for (const auto* other : {&b.dlogits, &c.dlogits}) CHECK(support::same_bits(a.dlogits, *other));
}

TEST_CASE("a norm with a power of zero, a negative one or an infinite one is refused by name")
{
    fm::host_executor ex({.threads = 1});
    for (const double power : {0.0, 0.29, -1.0, std::numeric_limits<double>::infinity(), std::nan("")}) {
        const gate_of<fm::softmax_score, fm::divide_by_norm> gate{.experts = 4, .k = 2, .weigh = {{}, power}};
        const std::string text = support::message_of<fm::invalid_argument>(
            [&] { support::gate_run(ex, gate, 1, std::vector<float>(4), std::vector<float>(2)); });
        INFO(text);
        CHECK(support::has(text, "weigh.power is "));
        CHECK(support::has(text, "; expected 0.3 or more"));
    }
}
