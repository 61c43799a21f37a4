// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// SparseMixer: the deterministic form, and the published estimator.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <set>
#include <string>

#include <fastmoe/routing/sparse_mixer_gate.hpp>

#include "support/compare.hpp"
#include "support/finite_difference.hpp"
#include "support/reference_mixer.hpp"
#include "support/reference_routing.hpp"
#include "support/run_gate.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
namespace oracle = support::reference;
using fm::int64_t;

namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan_ = std::numeric_limits<double>::quiet_NaN();
constexpr auto training = fm::gate_mode::training;
const std::vector<std::uint8_t> open{}; // a mask that takes nobody out

static_assert(fm::gate_policy<fm::sparse_mixer_gate, fm::host_executor, fm::bfloat16, fm::self>);
static_assert(fm::gate_policy<fm::sparse_mixer_gate, support::lanes, double, fm::self>);

template <class Real>
std::vector<Real> row_of(const std::vector<Real>& v, int64_t t, int64_t n)
{
    return std::vector<Real>(v.begin() + t * n, v.begin() + (t + 1) * n);
}
template <class Real>
std::vector<double> token_of(const std::vector<Real>& v, int64_t t, int64_t n)
{
    return support::widened(row_of(v, t, n));
}

/// dl for g * m of each round, by the formula; m is the share of the choice.
std::vector<double> estimate(const std::vector<oracle::mixer_round>& rounds, const std::vector<double>& g)
{
    std::vector<double> out(rounds.front().shares.size(), 0.0);
    for (std::size_t j = 0; j < rounds.size(); ++j)
        for (std::size_t e = 0; e < out.size(); ++e)
            out[e] += g[j] * rounds[j].shares[rounds[j].chosen] * ((int(e) == rounds[j].chosen) - rounds[j].shares[e]);
    return out;
}

template <class Real>
void near(const std::vector<Real>& actual, const std::vector<double>& expected, double bound)
{
    REQUIRE_EQ(actual.size(), expected.size());
    for (std::size_t i = 0; i < actual.size(); ++i) {
        CAPTURE(i);
        REQUIRE(std::fabs(double(actual[i]) - expected[i]) <= bound);
    }
}

} // namespace

TEST_CASE_TEMPLATE("SparseMixer agrees with the oracle for any K, and its gradient with finite differences at constant masks", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 91);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int i = 0; i < (small ? 8 : 40); ++i) {
        const int64_t experts = rng.integer(1, small ? 12 : 40);
        const int64_t k = i % 5 == 0 ? experts : rng.integer(1, std::min<int64_t>(experts, 6));
        const int64_t tokens = rng.integer(0, small ? 3 : 8);
        const fm::sparse_mixer_gate gate{.experts = experts, .k = k, .epsilon = rng.one_of(0.0, 0.01, 0.1, 0.4, 0.7, 5.0)};
        CAPTURE(experts);
        CAPTURE(k);
        CAPTURE(gate.epsilon);
        // Of one sign now and then: the divisor is the greater of |l| and the top.
        auto logits = support::normal_vector<Real>(rng, tokens * experts, rng.one_of(0.1, 1.0, 3.0));
        if (i % 4 == 1) for (Real& l : logits) l = -std::fabs(l);
        if (i % 4 == 2) for (Real& l : logits) l = std::fabs(l);
        const auto dweights = support::normal_vector<Real>(rng, tokens * k);
        const support::gate_run r(ex, gate, tokens, logits, dweights);
        std::vector<int32_t> ids;
        std::vector<double> weights, gradient;
        for (int64_t t = 0; t < tokens; ++t) {
            auto l = token_of(logits, t, experts);
            const auto g = token_of(dweights, t, k);
            const auto rounds = oracle::mix(l, k, double(Real(2 * gate.epsilon)) / 2);
            for (const auto& round : rounds) {
                ids.push_back(round.chosen);
                weights.push_back(round.shares[round.chosen]);
            }
            const auto d = support::finite_difference(
                [&] {
                    double sum = 0;
                    const auto now = oracle::mix(l, k, 0, &rounds);
                    for (int64_t j = 0; j < k; ++j) sum += g[j] * now[j].shares[now[j].chosen];
                    return sum;
                },
                l);
            gradient.insert(gradient.end(), d.begin(), d.end());
        }
        CHECK_EQ(r.experts, ids);
        const double length = 2 * double(experts) + 40;
        CHECK(support::close(r.weights, weights, {.length = length, .magnitude = 1}));
        double largest = 0;
        for (Real d : dweights) largest = std::max(largest, std::fabs(double(d)));
        near(r.dlogits, gradient, (support::roundoff<Real> * 4 * length + 1e-10) * double(k) * (largest + 1));
    }
}

TEST_CASE("two rounds by hand: a mask measures against the top of its own round, removed experts do not compete")
{
    fm::host_executor ex({.threads = 1});
    // 2 eps = 0.5. Round 1: top 4; (4 - 3) / 4 stays, (4 - 1.6) / 4 goes, (4 + 3) / 4 goes. Round 2: top 3; (3 - 1.6) / 3
    // stays, (3 + 3) / 3 goes.
    const fm::sparse_mixer_gate gate{.experts = 4, .k = 2, .epsilon = 0.25};
    const support::gate_run r(ex, gate, 1, std::vector<double>{3, 4, 1.6, -3}, std::vector<double>{1, 0});
    CHECK_EQ(r.experts, std::vector<int32_t>{1, 0});
    const double first = 1 / (1 + std::exp(-1.0)), second = 1 / (1 + std::exp(-1.4));
    CHECK(std::fabs(r.weights[0] - first) < 1e-15);
    CHECK(std::fabs(r.weights[1] - second) < 1e-15);
    CHECK(std::fabs(r.dlogits[1] - first * (1 - first)) < 1e-15);
    CHECK(std::fabs(r.dlogits[0] + first * (1 - first)) < 1e-15);
    CHECK_EQ(r.dlogits[2], 0.0); // masked in the round that has a gradient
    // All negative: the divisor is |l|, so that nothing is ever further than 1. Two zeros: 0 / 0 masks nothing.
    const support::gate_run below(ex, gate, 1, std::vector<double>{-1, -1.5, -100, -3}, std::vector<double>{1, 1});
    CHECK(std::fabs(below.weights[0] - 1 / (1 + std::exp(-0.5))) < 1e-15);
    CHECK(std::fabs(below.weights[1] - 1 / (1 + std::exp(-1.5))) < 1e-15); // (3 - 1.5) / 3 is 2 eps, and stays
    const support::gate_run zeros(ex, gate, 1, std::vector<double>{0, 0, -1, -2}, std::vector<double>{1, 1});
    CHECK_EQ(zeros.weights, std::vector<double>{0.5, 1});
}

TEST_CASE_TEMPLATE("rows that are not finite, and masked tokens, have the documented result in either form", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    const auto rows = support::narrowed<Real>({nan_, -inf, -inf, nan_, // dropped
                                               inf, 1, inf, -inf,      //
                                               nan_, 1, -inf, -inf,    //
                                               1, 2, 3, 4});           // masked
    for (auto pick : {fm::mixer_pick::greatest, fm::mixer_pick::sampled}) {
        const fm::sparse_mixer_gate gate{.experts = 4, .k = 4, .epsilon = 10, .pick = pick, .balance = {1}, .z = {1}};
        const support::gate_run r(ex, gate, 4, rows, std::vector<Real>(16, Real(1)), training, {1, 1, 1, 0}, 1.0,
                                  support::gate_extras{.seed_and_step = {1, 2}});
        for (int c : {0, 1, 2, 3, 12, 13, 14, 15}) {
            CHECK_EQ(r.experts[c], -1);
            CHECK_EQ(r.weights[c], Real(0));
            CHECK_EQ(r.dlogits[c], Real(0));
        }
        const bool sampled = pick == fm::mixer_pick::sampled;
        CHECK_EQ(r.experts[4] + r.experts[5], 2); // 0 and 2, in either order where drawn
        CHECK_EQ(std::vector<int32_t>(r.experts.begin() + 6, r.experts.begin() + 12), std::vector<int32_t>{1, 3, 1, 2, 3, 0});
        if (!sampled) CHECK_EQ(r.weights[4], Real(0.5));
        CHECK_EQ(r.weights[5], Real(1));
        CHECK_EQ(r.weights[6], Real(1)); // the finite one, alone
        CHECK_EQ(r.weights[7], Real(0));
        CHECK_EQ(r.weights[8], Real(1));
        for (int c : {9, 10, 11}) CHECK_EQ(r.weights[c], Real(0));
        for (Real d : r.dlogits) CHECK(std::isfinite(d));
        for (Real l : r.losses) CHECK(std::isfinite(l));
    }
}

TEST_CASE("capacity, rescaled weights and losses have the gradients of finite differences")
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 92);
    for (auto weights : {fm::after_drop::keep, fm::after_drop::rescale})
        for (double factor : {0.4, 0.9, 1e9}) {
            const int64_t tokens = 9, experts = 6, k = 3;
            const fm::sparse_mixer_gate gate{.experts = experts, .k = k, .epsilon = 3,
                                             .capacity = {.factor = factor, .weights = weights}, .balance = {0.3}, .z = {0.2}};
            auto logits = rng.normals(tokens * experts);
            const auto dweights = rng.normals(tokens * k);
            const std::vector<std::uint8_t> mask{1, 1, 0, 1, 1, 1, 2, 1, 0};
            const support::gate_run first(ex, gate, tokens, logits, dweights, training, mask, 0.7);
            const auto expected = support::finite_difference(
                [&] {
                    const support::gate_run r(ex, gate, tokens, logits, dweights, training, mask, 0.7);
                    REQUIRE_EQ(r.experts, first.experts);
                    double sum = 0.7 * (r.losses[0] + r.losses[1]);
                    for (std::size_t c = 0; c < dweights.size(); ++c) sum += dweights[c] * r.weights[c];
                    return sum;
                },
                logits, 1e-5);
            near(first.dlogits, expected, 1e-8);
        }
}

namespace {

support::gate_extras draws(std::uint64_t seed, int64_t first = 0)
{
    return {.seed_and_step = {seed, 3}, .first_token = first};
}

} // namespace

TEST_CASE_TEMPLATE("the published estimator weighs by m or m / 3 and has the gradient of m, rescaled or not", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 93);
    const int64_t tokens = support::takes_turns<typename Cell::executor> ? 12 : 60, experts = 7, k = 3;
    fm::sparse_mixer_gate gate{.experts = experts, .k = k, .epsilon = 0.6, .pick = fm::mixer_pick::sampled};
    const auto logits = support::normal_vector<Real>(rng, tokens * experts);
    const auto dweights = support::normal_vector<Real>(rng, tokens * k);
    const auto extras = draws(5, 40);
    const support::gate_run r(ex, gate, tokens, logits, dweights, training, open, 1.0, extras);
    gate.capacity = {.factor = 0.7, .weights = fm::after_drop::rescale};
    const support::gate_run dropped(ex, gate, tokens, logits, dweights, training, open, 1.0, extras);
    const fm::random_source coin{extras.seed_and_step.data(), fm::random_stream::noise};
    int thirds = 0, tops = 0, rescaled = 0;
    for (int64_t t = 0; t < tokens; ++t) {
        const auto l = token_of(logits, t, experts);
        const std::vector<int> ids(r.experts.begin() + t * k, r.experts.begin() + (t + 1) * k);
        CHECK_EQ(std::set<int>(ids.begin(), ids.end()).size(), std::size_t(k));
        const auto rounds = oracle::mix(l, k, 0.6, nullptr, &ids);
        std::vector<double> w, g = token_of(dweights, t, k);
        double sum = 0, left = 0, dot = 0;
        for (int64_t j = 0; j < k; ++j) {
            REQUIRE(rounds[j].competing[ids[j]]);
            const bool top = ids[j] == rounds[j].top;
            const bool third = !top && coin.uniform<double>(static_cast<std::uint64_t>((40 + t) * k + j)) < 0.75;
            w.push_back(rounds[j].shares[ids[j]] / (third ? 3 : 1));
            thirds += third, tops += top;
            CHECK(std::fabs(r.weights[t * k + j] - w[j]) < 64 * support::roundoff<Real>);
            const bool stays = dropped.experts[t * k + j] >= 0;
            sum += w[j];
            left += stays ? w[j] : 0;
            dot += stays ? g[j] * w[j] : 0;
        }
        near(row_of(r.dlogits, t, experts), estimate(rounds, g), 512 * support::roundoff<Real>);
        if (left == 0) continue; // all dropped: no gradient, the next line would divide by 0
        rescaled += left < sum;
        for (int64_t j = 0; j < k; ++j) { // of w_j sum / left; then m_j takes the place of w_j
            const bool stays = dropped.experts[t * k + j] >= 0;
            const double grown = stays ? w[j] * sum / left : 0;
            CHECK(std::fabs(dropped.weights[t * k + j] - grown) < 256 * support::roundoff<Real> * (1 + sum / left));
            g[j] = (stays ? sum / left * (g[j] - dot / left) : 0) + dot / left;
        }
        near(row_of(dropped.dlogits, t, experts), estimate(rounds, g),
             2048 * support::roundoff<Real> * (1 + sum * sum / left / left));
    }
    CHECK(thirds > 0);
    CHECK(tops > 0);
    CHECK(rescaled > 0);
    gate.capacity = {};
    gate.pick = fm::mixer_pick::greatest;
    const support::gate_run plain(ex, gate, tokens, logits, dweights, fm::gate_mode::inference);
    gate.pick = fm::mixer_pick::sampled;
    const support::gate_run same(ex, gate, tokens, logits, dweights, fm::gate_mode::inference); // no numbers needed
    CHECK_EQ(same.experts, plain.experts);
    CHECK(support::same_bits(same.weights, plain.weights));
}

TEST_CASE("the estimator's draws follow the softmax, and its expectation is the gradient of the expected loss")
{
    fm::host_executor ex({.threads = 2});
    const int64_t tokens = 400000, experts = 4;
    const std::vector<double> row{1.0, 0.4, 0.7, -2.0};
    // Losses of the weight alone: L_e(w) = a w + b w^2 + c w^3, linear for the top, whose term is of first order.
    const double a[] = {0.7, -0.5, 0.4, 1}, b[] = {0, 1.5, -2, 1}, c[] = {0, -3, 4, 1};
    std::vector<double> logits;
    for (int64_t t = 0; t < tokens; ++t) logits.insert(logits.end(), row.begin(), row.end());
    const fm::sparse_mixer_gate gate{.experts = experts, .k = 1, .epsilon = 0.4, .pick = fm::mixer_pick::sampled};
    // The gradient of the loss needs the weights first: two runs with the same numbers.
    const support::gate_run first(ex, gate, tokens, logits, std::vector<double>(tokens), training, open, 1.0, draws(9));
    std::vector<double> dweights;
    for (int64_t t = 0; t < tokens; ++t) {
        const int e = first.experts[t];
        const double w = first.weights[t];
        dweights.push_back(a[e] + 2 * b[e] * w + 3 * c[e] * w * w);
    }
    const support::gate_run r(ex, gate, tokens, logits, dweights, training, open, 1.0, draws(9));
    REQUIRE_EQ(r.experts, first.experts);
    const auto p = oracle::mix(row, 1, 0.4).front().shares; // (0, 1, 2 compete; 3 is masked)
    REQUIRE_EQ(p[3], 0.0);
    for (int e = 0; e < 4; ++e) {
        double count = 0, sum = 0, squares = 0, expected = 0;
        for (int64_t t = 0; t < tokens; ++t) {
            count += r.experts[t] == e;
            sum += r.dlogits[t * experts + e];
            squares += r.dlogits[t * experts + e] * r.dlogits[t * experts + e];
        }
        CHECK(std::fabs(count - double(tokens) * p[e]) <= 5 * std::sqrt(double(tokens) * p[e] * (1 - p[e])));
        for (int i = 0; i < 4; ++i) // sum of L_i(p_i) dp_i / dl_e
            expected += (a[i] * p[i] + b[i] * p[i] * p[i] + c[i] * p[i] * p[i] * p[i]) * p[i] * ((i == e) - p[e]);
        const double mean = sum / double(tokens);
        const double deviation = std::sqrt((squares / double(tokens) - mean * mean) / double(tokens));
        CAPTURE(mean);
        CAPTURE(expected);
        CHECK(std::fabs(mean - expected) <= 5 * deviation);
        if (p[e] > 0) CHECK(deviation < 0.02 * std::fabs(expected)); // so that the comparison says something
    }
}

TEST_CASE("samples are drawn by seed, step and the token's number, so that any split, executor or thread count gives the same ids")
{
    FASTMOE_SEEDED(rng, 94);
    fm::host_executor one({.threads = 1});
    const int64_t tokens = 200, experts = 30, k = 4;
    const fm::sparse_mixer_gate gate{.experts = experts, .k = k, .epsilon = 1, .pick = fm::mixer_pick::sampled};
    const auto logits = support::normal_vector<float>(rng, tokens * experts);
    const auto draw = [&](auto& ex, int64_t from, int64_t n, std::uint64_t seed) {
        const std::vector<float> part(logits.begin() + from * experts, logits.begin() + (from + n) * experts);
        return support::gate_run(ex, gate, n, part, std::vector<float>(n * k, 1.f), training, open, 1.0, draws(seed, from));
    };
    const auto all = draw(one, 0, tokens, 5);
    for (int threads : {2, 4}) {
        fm::host_executor ex({.threads = threads});
        const auto again = draw(ex, 0, tokens, 5);
        CHECK_EQ(again.experts, all.experts);
        CHECK(support::same_bits(again.weights, all.weights));
        CHECK(support::same_bits(again.dlogits, all.dlogits));
    }
    for (auto best : {fm::instruction_set::baseline, fm::instruction_set::avx2}) {
        fm::host_executor ex({.threads = 2, .best = std::min(best, fm::native_instruction_set())});
        CHECK_EQ(draw(ex, 0, tokens, 5).experts, all.experts);
    }
    support::lanes lanes;
    const auto part = draw(lanes, 150, 10, 5);
    CHECK(std::equal(part.experts.begin(), part.experts.end(), all.experts.begin() + 150 * k));
    CHECK(draw(one, 0, tokens, 6).experts != all.experts);
}

TEST_CASE("a mixer that makes no sense is refused by name")
{
    fm::host_executor ex({.threads = 1});
    const auto says = [&](fm::sparse_mixer_gate gate, const support::gate_extras& extras, const char* part) {
        const std::string text = support::message_of<fm::invalid_argument>([&] {
            support::gate_run(ex, gate, 2, std::vector<float>(8), std::vector<float>(4), training, open, 1.0, extras);
        });
        INFO(text);
        CHECK(support::has(text, part));
    };
    says({.experts = 4, .k = 5}, {}, "k is 5; expected at most the number of experts, 4");
    says({.experts = 4, .k = 0}, {}, "k is 0; expected 1 or more");
    says({.experts = 4, .k = 2, .epsilon = -0.1}, {}, "epsilon is -0.1; expected a finite number from 0 on");
    says({.experts = 4, .k = 2, .epsilon = nan_}, {}, "epsilon is");
    says({.experts = 4, .k = 2, .pick = fm::mixer_pick::sampled}, {}, "random is a null pointer; expected seed and step");
    says({.experts = 4, .k = 2, .pick = fm::mixer_pick::sampled}, draws(1, -2), "first_token is -2; expected zero or more");
    says({.experts = 4, .k = 2, .capacity = {.factor = -1}}, {}, "capacity.factor is -1");
}
