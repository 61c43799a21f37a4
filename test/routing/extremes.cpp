// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What gates, capacity and losses are handed at the edge: weights that underflow, empty masks that point somewhere,
/// thousands of experts, and routings that a faulty gate wrote.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>

#include <fastmoe/routing/biased_score.hpp>
#include <fastmoe/routing/lookup.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

#include "support/compare.hpp"
#include "support/finite_difference.hpp"
#include "support/reference.hpp"
#include "support/run_gate.hpp"
#include "support/scratch.hpp"
#include "support/warps.hpp"

namespace fm = fastmoe;
namespace oracle = support::reference;
using fm::int64_t;

namespace {

using raw_gate = fm::top_k_gate<fm::softmax_score, fm::top_k, fm::raw_scores>;
using sigmoid_gate = fm::top_k_gate<fm::sigmoid_score>;

constexpr fm::after_drop rescale = fm::after_drop::rescale;

/// Seven tokens want expert 0, the last of them, `row`, in vain.
template <class Real>
std::vector<Real> crowd(const std::vector<double>& row)
{
    std::vector<Real> logits;
    for (int t = 0; t < 6; ++t)
        for (std::size_t e = 0; e < row.size(); ++e) logits.push_back(e == 0 ? Real(10) : Real(e) - Real(20));
    for (double l : row) logits.push_back(Real(l));
    return logits;
}

/// The gradient of <dweights, weights> by central differences of the gate itself.
template <class Gate>
std::vector<double> differences(const Gate& gate, int64_t tokens, std::vector<double> logits,
                                const std::vector<double>& dweights)
{
    fm::host_executor ex({.threads = 1});
    return support::finite_difference(
        [&] {
            const support::gate_run r(ex, gate, tokens, logits, dweights);
            double sum = 0;
            for (std::size_t c = 0; c < dweights.size(); ++c) sum += dweights[c] * r.weights[c];
            return sum;
        },
        logits, 1e-5);
}

} // namespace

TEST_CASE_TEMPLATE("a kept weight that is next to nothing grows to its token's sum, with a finite gradient", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    // exp(-95) is subnormal in float, and one over it is infinite; exp(-720) is so in double.
    const double far = std::is_same_v<Real, float> ? -95 : -720;
    const auto logits = crowd<Real>({0, -2000, far, -3000});
    for (double scale : {1.0, 2.5, -1.5}) {
        CAPTURE(scale);
        const auto check = [&](auto gate) {
            gate.experts = 4;
            gate.k = 2;
            gate.scale = scale;
            gate.capacity = fastmoe::capacity{.factor = 1, .weights = rescale}; // ceil(2 * 7 / 4) = 4 of expert 0
            const support::gate_run r(ex, gate, 7, logits, std::vector<Real>(14, Real(3)));
            CHECK_EQ(r.experts[12], -1);
            CHECK_EQ(r.experts[13], 2);
            CHECK_EQ(r.weights[12], Real(0));
            CHECK(std::fabs(r.weights[13] - scale) <= 4 * support::roundoff<Real> * std::fabs(scale));
            // The one that is left weighs what both did, a constant.
            for (std::size_t i = 24; i < 28; ++i) CHECK(std::fabs(r.dlogits[i]) <= 32 * support::roundoff<Real>);
            for (Real d : r.dlogits) CHECK(std::isfinite(d));
        };
        check(fm::top_k_gate<>{});
        check(raw_gate{});
    }
}

TEST_CASE_TEMPLATE("two kept weights that are next to nothing share their token's sum, with the gradient of a softmax", Real,
                   float, double)
{
    fm::host_executor ex({.threads = 1});
    const double far = std::is_same_v<Real, float> ? -80 : -700;
    const std::vector<double> row{0, far, far - 1, -3000, -3000, -3000, -3000, -3000};
    const auto logits = crowd<Real>(row);
    const fm::top_k_gate<> gate{.experts = 8, .k = 3, .capacity = {.factor = 1, .weights = rescale}};
    std::vector<Real> dweights(21, Real(0));
    dweights[19] = Real(2);
    dweights[20] = Real(-1);
    const support::gate_run r(ex, gate, 7, logits, dweights);
    REQUIRE_EQ(r.experts[18], -1);
    REQUIRE_EQ(r.experts[19], 1);
    REQUIRE_EQ(r.experts[20], 2);
    const double one = 1 / (1 + std::exp(-1.0)), slope = one * (1 - one) * 3; // d(2 w1 - w2) / d(l1 - l2)
    CHECK(std::fabs(r.weights[19] - one) < 16 * support::roundoff<Real>);
    CHECK(std::fabs(r.weights[20] - (1 - one)) < 16 * support::roundoff<Real>);
    CHECK(std::fabs(r.dlogits[49] - slope) < 64 * support::roundoff<Real>);
    CHECK(std::fabs(r.dlogits[50] + slope) < 64 * support::roundoff<Real>);
}

TEST_CASE_TEMPLATE("weights that a scale has made 0 do not grow, and their gradient agrees", Real, float, double)
{
    fm::host_executor ex({.threads = 1});
    const double tiny = std::is_same_v<Real, float> ? 1e-30 : 1e-250, far = std::is_same_v<Real, float> ? -60 : -400;
    const auto logits = crowd<Real>({0, far, far - 1, -3000, -3000, -3000, -3000, -3000});
    const fm::top_k_gate<> gate{.experts = 8, .k = 3, .scale = tiny, .capacity = {.factor = 1, .weights = rescale}};
    std::vector<Real> dweights(21, Real(0));
    dweights[19] = Real(1 / tiny);
    const support::gate_run r(ex, gate, 7, logits, dweights);
    REQUIRE_EQ(r.experts[18], -1);
    for (int i : {18, 19, 20}) CHECK_EQ(r.weights[i], Real(0));
    for (int i = 48; i < 56; ++i) CHECK(std::fabs(r.dlogits[i]) < 1e-20);
}

TEST_CASE("with a negative scale rescaled weights have the gradient of finite differences too")
{
    fm::host_executor ex({.threads = 1});
    FASTMOE_SEEDED(rng, 51);
    const auto check = [&](auto gate) {
        gate.experts = 5;
        gate.k = 3;
        gate.capacity = fastmoe::capacity{.factor = 0.7, .weights = rescale};
        for (double scale : {-1.0, -0.25, 2.0, 0.0}) {
            gate.scale = scale;
            const int64_t tokens = 8;
            const auto logits = rng.normals(tokens * 5), dweights = rng.normals(tokens * 3);
            const support::gate_run r(ex, gate, tokens, logits, dweights);
            REQUIRE(std::count(r.experts.begin(), r.experts.end(), -1) > 2);
            const auto expected = differences(gate, tokens, logits, dweights);
            for (std::size_t i = 0; i < expected.size(); ++i) CHECK(std::fabs(r.dlogits[i] - expected[i]) < 1e-9);
        }
    };
    check(fm::top_k_gate<>{});
    check(raw_gate{});
    check(sigmoid_gate{.weigh = {.epsilon = 0.1}});
    check(fm::top_k_gate<fm::sigmoid_score, fm::top_k, fm::raw_scores>{});
    check(fm::top_k_gate<fm::sqrt_softplus_score>{});
}

TEST_CASE_TEMPLATE("scores that underflow, all or nearly, leave weights, losses and gradients finite", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    const double edge = std::is_same_v<Real, float> ? -88.7 : -709.7;
    for (double l : {-5000.0, edge, edge - 0.02, -20.0})
        for (bool mixed : {false, true}) {
            std::vector<Real> logits(6 * 4, Real(l));
            if (mixed)
                for (std::size_t i = 0; i < logits.size(); i += 2) logits[i] = Real(-4000);
            const sigmoid_gate gate{.experts = 4, .k = 2, .scale = 2.5, .balance = {0.5}, .z = {1e-6}};
            const support::gate_run r(ex, gate, 6, logits, std::vector<Real>(12, Real(1)));
            for (Real w : r.weights) CHECK(std::isfinite(w));
            for (Real d : r.dlogits) CHECK(std::isfinite(d));
            for (Real loss : r.losses) CHECK(std::isfinite(loss));
            if (l == -5000.0) CHECK_EQ(r.losses[0], Real(0)); // no value, no probability
            else if (!mixed) CHECK(std::fabs(r.losses[0] - 0.5) < 1e-5);
        }
}

TEST_CASE("an epsilon that is negative or not finite is refused by name")
{
    fm::host_executor ex({.threads = 1});
    for (double epsilon : {-1e-20, double(NAN), double(INFINITY)}) {
        const std::string text = support::message_of<fm::invalid_argument>([&] {
            const sigmoid_gate gate{.experts = 4, .k = 2, .weigh = {.epsilon = epsilon}};
            support::gate_run(ex, gate, 1, std::vector<float>(4), std::vector<float>(2));
        });
        INFO(text);
        CHECK(support::has(text, "weigh.epsilon is "));
    }
    const std::string text = support::message_of<fm::invalid_argument>([&] {
        using assigned = fm::assigned_gate<fm::random_experts, fm::softmax_score, fm::renormalize>;
        const assigned gate{.experts = 4, .k = 2, .weigh = {-1}};
        support::gate_run(ex, gate, 1, std::vector<float>(4), std::vector<float>(2));
    });
    CHECK(support::has(text, "weigh.epsilon is -1"));
}

TEST_CASE("an empty mask and an empty bias are none, wherever their pointers point")
{
    fm::host_executor ex({.threads = 1});
    const std::vector<float> logits{3, 1, 2, 0, 5, 1, 0, 7}, dweights(4, 1);
    const std::uint8_t closed[2] = {0, 0};
    const float bias[4] = {0, 1000, 0, 0};
    const auto run = [&](const auto& gate, fm::vector_view<const std::uint8_t> mask) {
        fm::gate_input<float> in;
        in.logits = fm::matrix_view<const float>(logits.data(), 2, 4);
        in.mask = mask;
        const std::vector<int32_t> ids{1, 0};
        in.token_ids = fm::as_vector(ids);
        const std::uint64_t random[2] = {1, 2};
        in.random = random;
        support::workspace memory(ex, 1 << 16);
        const auto state = fm::reserve_gate<float>(gate, memory, 2);
        gate.route(ex, in, fm::self{}, state, memory);
        std::vector<float> out(8);
        if constexpr (fm::gate_reads_logits<std::remove_cvref_t<decltype(gate)>>)
            gate.backward(ex, in, fm::self{}, state, fm::as_vector(dweights), 1.f, fm::as_matrix(out, 2, 4), memory);
        for (int32_t e : support::download(ex, state.routing.experts)) out.push_back(float(e));
        for (float w : support::download(ex, state.routing.weights)) out.push_back(w);
        for (float loss : support::download(ex, state.losses)) out.push_back(loss);
        return out;
    };
    const fm::vector_view<const std::uint8_t> none(closed, 0);
    const auto same = [&](const auto& gate) { CHECK_EQ(run(gate, none), run(gate, {})); };
    same(fm::top_k_gate<>{.experts = 4, .k = 2, .balance = {1}, .z = {1}});
    same(fm::random_gate{.experts = 4, .k = 2});
    const std::vector<int32_t> table{0, 1, 2, 3};
    same(fm::hash_gate{.experts = 4, .k = 2, .assignment = {fm::as_matrix(table, 2, 2)}});
    const fm::vector_view<const float> no_bias(bias, 0);
    const auto unbiased = [&](auto gate) {
        gate.experts = 4;
        gate.k = 2;
        const auto expected = run(gate, {});
        gate.score.bias = no_bias;
        CHECK_EQ(run(gate, {}), expected);
    };
    unbiased(sigmoid_gate{});
    unbiased(fm::top_k_gate<fm::biased_softmax_score>{});
}

TEST_CASE_TEMPLATE("losses work for as many experts as the selection has room for, and more are refused by name", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 52);
    int64_t experts = 2000;
    while (fm::top_k::scratch_bytes<Real>(experts + 1, 2) <= fm::team_scratch_bytes) ++experts;
    REQUIRE(experts > (std::is_same_v<Real, float> ? 11000 : 5500));
    const int64_t tokens = 3;
    const auto logits = support::normal_vector<Real>(rng, tokens * experts);
    const auto dweights = support::normal_vector<Real>(rng, tokens * 2);
    const fm::top_k_gate<> gate{.experts = experts, .k = 2, .balance = {0.5}, .z = {0.25}};
    const support::gate_run r(ex, gate, tokens, logits, dweights);
    const oracle::options o{.k = 2, .balance = 0.5, .z = 0.25};
    const auto expected = oracle::route(o, support::widened(logits), tokens, experts);
    const auto gradient = oracle::route_backward(o, expected, support::widened(dweights));
    const std::vector<double> losses{expected.balance_loss, expected.z_loss};
    CHECK_EQ(r.experts, expected.expert_ids());
    CHECK(support::close(r.losses, losses, {.length = 2.0 * double(experts), .magnitudes = &losses}));
    CHECK(support::close(r.dlogits, gradient, {.length = 4.0 * double(experts)}));

    // One more: when the state is reserved, when the route is measured, and when it runs.
    const fm::top_k_gate<> more{.experts = experts + 1, .k = 2, .balance = {0.5}};
    fm::arena query;
    const auto refused = [&](auto call) {
        const std::string text = support::message_of<fm::invalid_argument>(call);
        INFO(text);
        CHECK(support::has(text, ("experts is " + std::to_string(experts + 1) + "; expected").c_str()));
    };
    refused([&] { fm::reserve_gate<Real>(more, query, 4); });
    fm::top_k_state<Real> state;
    refused([&] { more.route(ex, fm::gate_input<Real>{}, fm::self{}, state, query); });
}

TEST_CASE_TEMPLATE("losses by themselves work for more experts than a team has room for", Real, float, double)
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 54);
    const int64_t experts = 20000, tokens = 2;
    const auto logits = support::normal_vector<Real>(rng, tokens * experts);
    const oracle::options o{.k = 2, .balance = 0.5, .z = 0.25};
    const auto expected = oracle::route(o, support::widened(logits), tokens, experts);
    const auto gradient = oracle::route_backward(o, expected, {0, 0, 0, 0});
    const fm::gate_logits<Real> in{fm::as_matrix(logits, tokens, experts), {}};
    fm::arena measure;
    fm::router_losses<Real> out = fm::reserve_router_losses<Real>(measure, experts);
    const auto forward = [&](fm::arena& scratch) {
        const auto chosen = fm::as_vector(expected.chosen);
        fm::router_losses_forward(ex, fm::softmax_score{}, in, chosen, 2, {0.5}, {0.25}, fm::self{}, out, scratch);
    };
    forward(measure);
    support::workspace memory(ex, 2 * measure.bytes());
    out = fm::reserve_router_losses<Real>(memory, experts);
    forward(memory);
    std::vector<Real> dlogits(tokens * experts, Real(0));
    const auto to = fm::as_matrix(dlogits, tokens, experts);
    fm::router_losses_backward(ex, fm::softmax_score{}, in, {0.5}, {0.25}, out.slopes, Real(1), to);
    const std::vector<double> losses{expected.balance_loss, expected.z_loss};
    const double length = 4.0 * double(experts);
    CHECK(support::close(support::download(ex, out.losses), losses, {.length = length, .magnitudes = &losses}));
    CHECK(support::close(dlogits, gradient, {.length = length}));
}

namespace {

/// A routing as a user's gate may have left it.
template <class Real>
struct written {
    int64_t tokens, total, k; // k = 0: ragged
    std::vector<int32_t> experts, first;
    std::vector<Real> weights;

    fm::routing<Real> view()
    {
        fm::routing<Real> r{tokens, total, k, fm::as_vector(experts), fm::as_vector(weights), {}};
        if (k == 0) r.first = fm::vector_view<const int32_t>(first.data(), tokens + 1);
        return r;
    }
};

constexpr fm::drop_order orders[] = {fm::drop_order::token_major, fm::drop_order::choice_major, fm::drop_order::by_weight};

template <class Executor, class Real>
std::string bounded(Executor& ex, const fm::capacity& bound, written<Real>& w)
{
    return support::message_of<fm::invalid_argument>([&] {
        fm::arena query;
        fm::apply_capacity(ex, bound, w.view(), query);
        support::workspace memory(ex, query.bytes());
        fm::apply_capacity(ex, bound, w.view(), memory);
        ex.synchronize();
    });
}

} // namespace

TEST_CASE_TEMPLATE("capacity takes ids out of range for dropped, names the first, and touches nothing outside", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    for (auto order : orders) {
        written<Real> w{5, 3, 2, {0, 1, 0, 2, 0, 1000000, 0, -7, 2, 1}, {}, std::vector<Real>(10, Real(1))};
        const std::string text = bounded(ex, {.factor = 0.6, .order = order, .weights = rescale}, w); // two of each
        INFO(text);
        CHECK(support::has(text, "routing.experts(5) is 1000000; expected -1 or an id below E"));
        CHECK_EQ(w.experts, std::vector<int32_t>{0, 1, 0, 2, -1, -1, -1, -1, 2, 1});
        CHECK_EQ(w.weights, std::vector<Real>{1, 1, 1, 1, 0, 0, 0, 0, 1, 1});
    }
}

TEST_CASE_TEMPLATE("ragged choices that overlap belong to one token each, and the fault is named", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    for (auto order : {fm::drop_order::token_major, fm::drop_order::by_weight}) {
        // Every token but the first claims all choices.
        const int64_t tokens = 400, choices = 300;
        written<Real> w{tokens, 4, 0, {}, {}, {}};
        for (int64_t t = 0; t <= tokens; ++t) w.first.push_back(t % 2 ? int32_t(choices) : 0);
        for (int64_t c = 0; c < choices; ++c) w.experts.push_back(int32_t(c % 4)), w.weights.push_back(Real(1));
        const std::string text = bounded(ex, {.factor = 0.5, .order = order, .weights = rescale}, w);
        INFO(text);
        CHECK(support::has(text, "routing.first(2) is 0; expected 0 first, then no decrease, up to C"));
        for (int64_t c = 0; c < choices; ++c) {
            CHECK_EQ(w.experts[c], c < 152 ? c % 4 : -1);
            CHECK_EQ(w.weights[c], c < 152 ? Real(300) / 152 : Real(0));
        }
    }
}

TEST_CASE("a ragged choice that no token has takes no place from those that have one")
{
    fm::host_executor ex({.threads = 1});
    written<float> w{2, 1, 0, {0, 0, 0, 0}, {0, 1, 2}, {1, 2, 9, 9}};
    CHECK_EQ(bounded(ex, {.factor = 0.5, .order = fm::drop_order::by_weight}, w), "nothing was thrown"); // keeps two
    CHECK_EQ(w.experts, std::vector<int32_t>{0, 0, 0, 0});
    CHECK_EQ(w.weights, std::vector<float>{1, 2, 9, 9});
}

TEST_CASE_TEMPLATE("losses take ids out of range for none, and name the first", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 53);
    const auto logits = support::normal_vector<Real>(rng, 12);
    const auto losses = [&](std::vector<int32_t> chosen, std::vector<Real>& out) {
        const auto in_logits = support::upload(ex, logits);
        const auto ids = support::upload(ex, chosen);
        const fm::gate_logits<Real> in{fm::matrix_view<const Real>(in_logits.data(), 4, 3), {}};
        support::workspace memory(ex, 1 << 16);
        const auto to = fm::reserve_router_losses<Real>(memory, 3);
        const std::string text = support::message_of<fm::invalid_argument>([&] {
            fm::arena& scratch = memory;
            fm::router_losses_forward(ex, fm::softmax_score{}, in, ids.view(), 2, {1}, {1}, fm::self{}, to, scratch);
            ex.synchronize();
        });
        out = support::download(ex, to.losses);
        return text;
    };
    std::vector<Real> wrong, right;
    const std::string text = losses({0, 1, -1, 2, 3, 0, -9, 2000000000}, wrong);
    CHECK(support::has(text, "routing.experts(4) is 3; expected -1 or an id below E"));
    CHECK_EQ(losses({0, 1, -1, 2, -1, 0, -1, -1}, right), "nothing was thrown");
    CHECK(support::same_bits(wrong, right));
}

namespace {

/// Writes a `first` that goes back and forth.
struct overlapping {
    static constexpr bool reads_logits = true, ragged = true;

    int64_t choices(int64_t tokens, int64_t, int64_t k) const { return tokens * k; }

    template <class Executor, class T, class Communicator, class Real>
    void assign(Executor&, const fm::gate_input<T>&, const Communicator&, const fm::assignment<Real>& to,
                fm::arena& scratch) const
    {
        if (scratch.measuring()) return;
        for (int64_t c = 0; c < to.experts.extent(0); ++c) to.experts(c) = static_cast<int32_t>(c % to.total_experts);
        for (int64_t t = 0; t <= to.tokens; ++t) to.first(t) = t % 2 ? static_cast<int32_t>(to.experts.extent(0)) : 0;
    }
};

} // namespace

TEST_CASE("an assignment whose choices overlap is a fault that names the place, with no race and with capacity beside it")
{
    fm::host_executor ex({.threads = 4});
    const int64_t tokens = 3000;
    const auto check = [&](auto gate) {
        const std::string text = support::message_of<fm::invalid_argument>([&] {
            support::gate_run(ex, gate, tokens, std::vector<float>(tokens * 4, 1.f), std::vector<float>(tokens));
            ex.synchronize();
        });
        INFO(text);
        CHECK(support::has(text, "routing.first(2) is 0"));
    };
    check(fm::assigned_gate<overlapping>{.experts = 4, .k = 1});
    check(fm::assigned_gate<overlapping>{.experts = 4, .k = 1, .capacity = {.factor = 0.5, .weights = rescale}});
    check(fm::assigned_gate<overlapping, fm::constant_score, fm::renormalize>{.experts = 4, .k = 1});
}
