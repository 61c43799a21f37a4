// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// GShard's gate, and the balance loss that counts first choices.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>

#include <fastmoe/routing/gshard_gate.hpp>

#include "support/compare.hpp"
#include "support/finite_difference.hpp"
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

using paper_gate = fm::gshard_gate<>;
using raw_gate = fm::gshard_gate<fm::raw_scores>;

static_assert(fm::gate_policy<paper_gate, fm::host_executor, fm::bfloat16, fm::self>);
static_assert(fm::gate_policy<raw_gate, support::lanes, double, fm::self>);

/// What the oracle is told besides the logits.
struct gshard_rule {
    bool over_all = false;        ///< weights and chances are probabilities over all experts
    double factor = 1e9;
    bool leaves_its_place = false; ///< a second choice that chance drops
    double balance = 0;
};

struct gshard_result {
    std::vector<int> chosen, experts; // (T*2)
    std::vector<double> weights;      // (T*2)
    double balance = 0;
};

/// Algorithm 1 of the paper, token by token.
/// @param uniform  (T)   @param fixed  if given, the result whose choices are to be used again
gshard_result gshard(const gshard_rule& rule, const std::vector<double>& logits, int64_t experts,
                     const std::vector<double>& uniform, const gshard_result* fixed = nullptr)
{
    gshard_result r;
    const int64_t tokens = static_cast<int64_t>(logits.size()) / experts;
    const int64_t capacity = rule.factor < 1e9 ? oracle::capacity_of(rule.factor, 2, tokens, experts) : tokens * 2;
    std::vector<int> all(experts);
    for (int e = 0; e < experts; ++e) all[e] = e;
    std::vector<double> mean(experts, 0.0);
    std::vector<int64_t> count(experts, 0);
    for (int64_t t = 0; t < tokens; ++t) {
        const double* l = logits.data() + t * experts;
        const auto p = oracle::softmax(l, all);
        int first = 0, second = -1;
        for (int e = 1; e < experts; ++e)
            if (oracle::goes_before(l, e, first)) first = e;
        for (int e = 0; e < experts; ++e)
            if (e != first && (second < 0 || oracle::goes_before(l, e, second))) second = e;
        if (fixed) first = fixed->chosen[2 * t], second = fixed->chosen[2 * t + 1];
        const double sum = rule.over_all ? 1 : p[first] + p[second];
        r.chosen.insert(r.chosen.end(), {first, second});
        r.weights.insert(r.weights.end(), {p[first] / sum, p[second] / sum});
        for (int e = 0; e < experts; ++e) mean[e] += p[e] / double(tokens);
    }
    r.experts = r.chosen;
    for (int64_t t = 0; t < tokens; ++t)
        if (count[r.chosen[2 * t]]++ >= capacity) r.experts[2 * t] = -1;
    for (int e = 0; e < experts; ++e)
        r.balance += rule.balance * double(experts) * double(count[e]) / double(tokens) * mean[e];
    for (int64_t t = 0; t < tokens; ++t) {
        const bool luck = 2 * r.weights[2 * t + 1] > uniform[t];
        int64_t& c = count[r.chosen[2 * t + 1]];
        if (!luck || c >= capacity) r.experts[2 * t + 1] = -1;
        if (luck || !rule.leaves_its_place) ++c;
    }
    if (fixed) r.experts = fixed->experts;
    for (std::size_t c = 0; c < r.weights.size(); ++c)
        if (r.experts[c] < 0) r.weights[c] = 0;
    return r;
}

std::vector<double> uniforms(const support::gate_extras& extras, int64_t tokens)
{
    const fm::random_source source{extras.seed_and_step.data(), fm::random_stream::choice};
    std::vector<double> out;
    for (int64_t t = 0; t < tokens; ++t)
        out.push_back(source.uniform<double>(static_cast<std::uint64_t>(extras.first_token + t)));
    return out;
}

template <class Real, class Executor, class Gate>
void matches_oracle(Executor& ex, support::random& rng, const Gate& gate, const gshard_rule& rule, int64_t tokens)
{
    CAPTURE(gate.experts);
    CAPTURE(tokens);
    CAPTURE(rule.factor);
    const int64_t experts = gate.experts;
    const auto logits = support::normal_vector<Real>(rng, tokens * experts, 1.5);
    const auto dweights = support::normal_vector<Real>(rng, tokens * 2);
    const support::gate_extras extras{.seed_and_step = {rng.bits(), 3}, .first_token = rng.integer(0, 99)};
    const support::gate_run r(ex, gate, tokens, logits, dweights, training, open, 0.5, extras);
    auto l = support::widened(logits);
    const auto u = uniforms(extras, tokens);
    const auto expected = gshard(rule, l, experts, u);
    CHECK_EQ(r.experts, expected.experts);
    const double length = 2 * double(experts) + 64;
    CHECK(support::close(r.weights, expected.weights, {.length = length, .magnitude = 1}));
    CHECK(support::close(r.losses, {expected.balance, 0}, {.length = length + double(tokens), .magnitude = rule.balance}));
    const auto gradient = support::finite_difference(
        [&] {
            const auto now = gshard(rule, l, experts, u, &expected);
            double sum = 0.5 * now.balance;
            for (std::size_t c = 0; c < dweights.size(); ++c) sum += double(dweights[c]) * now.weights[c];
            return sum;
        },
        l);
    double largest = 1;
    for (Real d : dweights) largest = std::max(largest, std::fabs(double(d)));
    for (std::size_t i = 0; i < gradient.size(); ++i)
        REQUIRE(std::fabs(double(r.dlogits[i]) - gradient[i]) <= (support::roundoff<Real> * 4 * length + 1e-10) * largest);
}

} // namespace

TEST_CASE_TEMPLATE("GShard's gate agrees with algorithm 1 in all its forms, and its gradient with finite differences of it", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 101);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int i = 0; i < (small ? 4 : 12); ++i) {
        const int64_t experts = rng.integer(2, small ? 9 : 16), tokens = rng.integer(1, small ? 8 : 30);
        for (double factor : {inf, 0.4, 0.8}) {
            gshard_rule rule{.factor = std::fmin(factor, 1e9), .leaves_its_place = i % 2 == 1, .balance = 0.4};
            const auto drop = rule.leaves_its_place ? fm::second_drop::before_capacity : fm::second_drop::after_capacity;
            const fm::capacity limit{.factor = factor};
            const paper_gate over_chosen{.experts = experts, .capacity = limit, .balance = {0.4}, .drop = drop};
            matches_oracle<Real>(ex, rng, over_chosen, rule, tokens);
            rule.over_all = true;
            const raw_gate over_all{.experts = experts, .capacity = limit, .balance = {0.4}, .drop = drop};
            matches_oracle<Real>(ex, rng, over_all, rule, tokens);
        }
    }
}

TEST_CASE("a second choice that chance drops keeps its place in the capacity, or leaves it, by name")
{
    fm::host_executor ex({.threads = 1});
    // Every token: first 0, second 1, with 2 g_2 = 2 / (1 + e^3) = 0.095. One place for each expert and token pair.
    const int64_t tokens = 64;
    std::vector<double> logits;
    for (int64_t t = 0; t < tokens; ++t) logits.insert(logits.end(), {3, 0, -9, -9});
    const support::gate_extras extras{.seed_and_step = {1, 1}};
    const auto u = uniforms(extras, tokens);
    const double share = 1 / (1 + std::exp(3.0));
    std::vector<int64_t> lucky;
    for (int64_t t = 0; t < tokens; ++t)
        if (2 * share > u[t]) lucky.push_back(t);
    REQUIRE(lucky.size() >= 2);
    REQUIRE(lucky[1] >= 8);
    paper_gate gate{.experts = 4, .capacity = {.factor = 0.25}}; // 8 places
    const auto second = [&] {
        const support::gate_run r(ex, gate, tokens, logits, std::vector<double>(tokens * 2), training, open, 1.0, extras);
        std::vector<int64_t> kept;
        for (int64_t t = 0; t < tokens; ++t)
            if (r.experts[2 * t + 1] >= 0) kept.push_back(t);
        return kept;
    };
    std::vector<int64_t> early;
    for (int64_t t : lucky)
        if (t < 8) early.push_back(t);
    CHECK_EQ(second(), early); // places went to the first eight, lucky or not
    gate.drop = fm::second_drop::before_capacity;
    lucky.resize(std::min<std::size_t>(8, lucky.size()));
    CHECK_EQ(second(), lucky);
}

TEST_CASE("the second is kept as often as twice its weight, by the token's number, on any executor and thread count")
{
    FASTMOE_SEEDED(rng, 102);
    fm::host_executor one({.threads = 1});
    const int64_t tokens = 20000, experts = 5;
    std::vector<float> logits;
    for (int64_t t = 0; t < tokens; ++t) logits.insert(logits.end(), {0.f, 1.2f, 0.1f, -1.f, -2.f});
    const auto run = [&](auto& ex, const auto& gate, int64_t from, int64_t n, std::uint64_t step) {
        const std::vector<float> part(logits.begin(), logits.begin() + n * experts);
        return support::gate_run(ex, gate, n, part, std::vector<float>(n * 2), training, open, 1.0,
                                 support::gate_extras{.seed_and_step = {4, step}, .first_token = from});
    };
    const auto kept = [](const auto& r) {
        double n = 0;
        for (std::size_t c = 1; c < r.experts.size(); c += 2) n += r.experts[c] >= 0;
        return n;
    };
    const double g = 1 / (1 + std::exp(1.1)); // of 1.2 and 0.1
    const double p = std::exp(0.1) / (1 + std::exp(1.2) + std::exp(0.1) + std::exp(-1.0) + std::exp(-2.0));
    const auto likely = [&](double count, double chance) {
        CHECK(std::fabs(count - double(tokens) * chance) < 5 * std::sqrt(double(tokens) * chance * (1 - chance)));
    };
    const auto all = run(one, paper_gate{.experts = experts}, 0, tokens, 1);
    likely(kept(all), 2 * g);
    likely(kept(run(one, raw_gate{.experts = experts}, 0, tokens, 1)), 2 * p);
    for (std::size_t c = 0; c < all.experts.size(); c += 2)
        REQUIRE_EQ(all.weights[c], all.weights[0]); // the first does not grow
    CHECK(run(one, paper_gate{.experts = experts}, 0, tokens, 2).experts != all.experts);
    for (int threads : {2, 4}) {
        fm::host_executor ex({.threads = threads});
        CHECK_EQ(run(ex, paper_gate{.experts = experts}, 0, tokens, 1).experts, all.experts);
    }
    support::lanes lanes;
    const auto part = run(lanes, paper_gate{.experts = experts}, 700, 50, 1);
    CHECK(std::equal(part.experts.begin(), part.experts.end(), all.experts.begin() + 1400));
}

TEST_CASE_TEMPLATE("chance acts in training alone, or always, by name; rows that are not finite have the documented result",
                   Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    const auto rows = support::narrowed<Real>({nan_, -inf, nan_, // dropped
                                               inf, 1, inf,      // both weigh 1/2: always kept
                                               nan_, 1, -inf,    // the second weighs 0: never kept
                                               inf, 5, 4,        // the same
                                               1, 2, 3});        // masked
    const std::vector<std::uint8_t> mask{1, 1, 1, 1, 0};
    const auto run = [&](const auto& gate, fm::gate_mode mode, const support::gate_extras& extras) {
        return support::gate_run(ex, gate, 5, rows, std::vector<Real>(10, Real(1)), mode, mask, 1.0, extras);
    };
    const support::gate_extras numbers{.seed_and_step = {1, 2}};
    paper_gate gate{.experts = 3, .balance = {1}, .z = {1}};
    const auto r = run(gate, training, numbers);
    CHECK_EQ(r.experts, std::vector<int32_t>{-1, -1, 0, 2, 1, -1, 0, -1, -1, -1});
    CHECK_EQ(r.weights, std::vector<Real>{0, 0, Real(0.5), Real(0.5), 1, 0, 1, 0, 0, 0});
    for (Real d : r.dlogits) CHECK(std::isfinite(d));
    for (Real l : r.losses) CHECK(std::isfinite(l));
    CHECK_EQ(run(raw_gate{.experts = 3}, training, numbers).experts, r.experts);
    const auto still = run(gate, fm::gate_mode::inference, {}); // no numbers needed
    CHECK_EQ(still.experts, std::vector<int32_t>{-1, -1, 0, 2, 1, 2, 0, 1, -1, -1});
    gate.draw = fm::second_draw::always;
    CHECK_EQ(run(gate, fm::gate_mode::inference, numbers).experts, r.experts);
}

TEST_CASE("a balance loss of first choices has its closed forms, where one of all choices is another number")
{
    fm::host_executor ex({.threads = 2});
    // Probabilities 1/2, 1/4, 1/8, 1/8; the first choice is always 0, the second always 1.
    std::vector<double> logits;
    for (int64_t t = 0; t < 10; ++t) logits.insert(logits.end(), {std::log(4.0), std::log(2.0), 0, 0});
    const auto balance = [&](fm::counted_choices counts) {
        const fm::top_k_gate<> gate{.experts = 4, .k = 2, .balance = {.coefficient = 0.5, .counts = counts}};
        return support::gate_run(ex, gate, 10, logits, std::vector<double>(20)).losses[0];
    };
    CHECK(std::fabs(balance(fm::counted_choices::first) - 0.5 * 4 * (1 * 0.5)) < 1e-14);
    CHECK(std::fabs(balance(fm::counted_choices::all) - 0.5 * 4 * (0.5 * 0.5 + 0.5 * 0.25)) < 1e-14);
}

TEST_CASE("a GShard gate that makes no sense is refused by name")
{
    fm::host_executor ex({.threads = 1});
    const auto says = [&](const paper_gate& gate, const support::gate_extras& extras, const char* part) {
        const std::string text = support::message_of<fm::invalid_argument>([&] {
            support::gate_run(ex, gate, 2, std::vector<float>(2 * gate.experts), std::vector<float>(4), training, open, 1.0,
                              extras);
        });
        INFO(text);
        CHECK(support::has(text, part));
    };
    const support::gate_extras numbers{.seed_and_step = {1, 2}};
    says({.experts = 1}, numbers, "experts is 1; expected 2 or more");
    says({.experts = 4}, {}, "random is a null pointer; expected seed and step");
    says({.experts = 4}, {.seed_and_step = {1, 2}, .first_token = -1}, "first_token is -1; expected zero or more");
    says({.experts = 4, .capacity = {.factor = -1}}, numbers, "capacity.factor is -1; expected zero or more");
    says({.experts = 4, .capacity = {.order = fm::drop_order::by_weight}}, numbers, "capacity.order is by_weight; expected choice_major");
    says({.experts = 4, .capacity = {.weights = fm::after_drop::rescale}}, numbers, "capacity.weights is rescale; expected keep");
    says({.experts = 4, .balance = {-1}}, numbers, "balance.coefficient is -1");
}
