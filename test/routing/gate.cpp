// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include <fastmoe/comm/self.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

#include "support/compare.hpp"
#include "support/executors.hpp"
#include "support/finite_difference.hpp"
#include "support/poison.hpp"
#include "support/reference.hpp"
#include "support/run_gate.hpp"
#include "support/warps.hpp"

namespace fm = fastmoe;
namespace oracle = support::reference;
using fm::int64_t;

namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan_ = std::numeric_limits<double>::quiet_NaN();

using raw_gate = fm::top_k_gate<fm::softmax_score, fm::top_k, fm::raw_scores>;

static_assert(fm::gate_policy<fm::top_k_gate<>, fm::host_executor, float, fm::self>);
static_assert(fm::gate_policy<fm::switch_gate, fm::host_executor, fm::bfloat16, fm::self>);
static_assert(fm::gate_policy<fm::top_k_gate<>, support::lanes, double, fm::self>);

/// A user's gate for inference, without a state of its own.
struct inference_only {
    int64_t experts = 1, k = 1;
    template <class Executor, class T, class Communicator, class State>
    void route(Executor&, const fm::gate_input<T>&, const Communicator&, const State& state, fm::arena&) const
    {
        state.routing.experts(0) = 0;
    }
};
static_assert(fm::inference_gate<inference_only, fm::host_executor, float, fm::self>);
static_assert(!fm::trains<inference_only, fm::host_executor, float, fm::self>);
static_assert(!fm::gate_policy<inference_only, fm::host_executor, float, fm::self>);
static_assert(!fm::reserves_state<inference_only, float> && fm::reserves_state<fm::switch_gate, float>);
static_assert(!fm::has_losses<fm::gate_state<float>> && fm::has_losses<fm::top_k_state<float>>);
static_assert(fm::gate_reads_logits<inference_only>);

template <class Gate>
oracle::options options_of(const Gate& gate, bool renormalize, int64_t tokens)
{
    oracle::options o;
    o.k = gate.k;
    o.renormalize = renormalize;
    o.scale = gate.scale;
    o.balance = gate.balance.coefficient;
    o.z = gate.z.coefficient;
    if (gate.capacity.limited()) o.capacity = oracle::capacity_of(gate.capacity.factor, gate.k, tokens, gate.experts);
    o.drop = static_cast<oracle::drop_order>(gate.capacity.order);
    return o;
}

/// The whole gate against the oracle.
template <class Real, class Executor, class Gate>
void matches_oracle(Executor& ex, support::random& rng, const Gate& gate, bool renormalize, int64_t tokens, double spread)
{
    CAPTURE(gate.experts);
    CAPTURE(gate.k);
    CAPTURE(tokens);
    const auto logits = support::normal_vector<Real>(rng, tokens * gate.experts, spread);
    const auto dweights = support::normal_vector<Real>(rng, tokens * gate.k);
    const support::gate_run r(ex, gate, tokens, logits, dweights, fm::gate_mode::training, std::vector<std::uint8_t>{}, 0.5);
    const auto o = options_of(gate, renormalize, tokens);
    const auto expected = oracle::route(o, support::widened(logits), tokens, gate.experts);
    const auto gradient = oracle::route_backward(o, expected, support::widened(dweights), 0.5);
    // The exponent's argument is rounded too: its error is relative to the spread of the logits.
    const double length = 2 * double(gate.experts) + 8 * spread + 32;
    CHECK_EQ(r.experts, expected.expert_ids());
    CHECK(support::close(r.weights, expected.weights(), {.length = length, .magnitude = gate.scale}));
    const std::vector<double> losses{expected.balance_loss, expected.z_loss};
    CHECK(support::close(r.losses, losses, {.length = length + double(tokens), .magnitudes = &losses}));
    double largest = 1;
    for (Real d : dweights) largest = std::max(largest, std::fabs(double(d)));
    CHECK(support::close(r.dlogits, gradient, {.length = 4 * length, .magnitude = gate.scale * largest}));
}

} // namespace

TEST_CASE_TEMPLATE("softmax over the chosen agrees with the oracle, forward and backward", Cell, FASTMOE_LOGIT_CELLS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 1);
    const bool small = !std::is_same_v<typename Cell::executor, fm::host_executor>;
    for (int i = 0; i < (small ? 6 : 40); ++i) {
        const int64_t experts = rng.integer(2, small ? 90 : 300), k = rng.integer(2, std::min<int64_t>(experts, small ? 20 : 80));
        matches_oracle<typename Cell::type>(
            ex, rng, fm::top_k_gate<>{.experts = experts, .k = k, .scale = 2.5, .balance = {0.1}, .z = {0.01}}, true,
            rng.integer(0, small ? 7 : 200), 3);
    }
}

TEST_CASE_TEMPLATE("probabilities over all experts agree with the oracle, forward and backward", Cell, FASTMOE_LOGIT_CELLS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 2);
    const bool small = !std::is_same_v<typename Cell::executor, fm::host_executor>;
    for (int i = 0; i < (small ? 6 : 40); ++i) {
        const int64_t experts = rng.integer(1, small ? 90 : 300), k = rng.integer(1, std::min<int64_t>(experts, small ? 20 : 80));
        matches_oracle<typename Cell::type>(
            ex, rng, raw_gate{.experts = experts, .k = k, .scale = 0.75, .balance = {0.2}, .z = {0.003}}, false,
            rng.integer(0, small ? 7 : 200), 3);
    }
}

TEST_CASE_TEMPLATE("capacity inside of the gate agrees with the oracle, forward and backward", Cell, FASTMOE_LOGIT_CELLS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 3);
    const bool small = !std::is_same_v<typename Cell::executor, fm::host_executor>;
    for (auto order : {fm::drop_order::token_major, fm::drop_order::choice_major, fm::drop_order::by_weight})
        for (double factor : {0.0, 0.5, 1.0, 1.25}) {
            CAPTURE(factor);
            const int64_t experts = rng.integer(3, 40), k = rng.integer(2, 3), tokens = rng.integer(1, small ? 12 : 150);
            const fm::capacity limit{.factor = factor, .order = order};
            const fm::top_k_gate<> after{.experts = experts, .k = k, .capacity = limit, .balance = {0.1}};
            matches_oracle<typename Cell::type>(ex, rng, after, true, tokens, 1);
            const raw_gate before{.experts = experts, .k = k, .capacity = limit, .z = {0.1}};
            matches_oracle<typename Cell::type>(ex, rng, before, false, tokens, 1);
        }
}

TEST_CASE("gradients are those of finite differences, with rescaled weights, masks and both losses")
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 4);
    const auto check = [&](const auto& gate) {
        const int64_t tokens = 9;
        std::vector<double> logits = rng.normals(tokens * gate.experts, 1.5);
        const std::vector<double> dweights = rng.normals(tokens * gate.k);
        const std::vector<std::uint8_t> mask{1, 1, 0, 1, 1, 1, 2, 1, 0};
        const double loss_scale = 0.7;
        const support::gate_run first(ex, gate, tokens, logits, dweights, fm::gate_mode::training, mask, loss_scale);
        const auto loss = [&] {
            const support::gate_run r(ex, gate, tokens, logits, dweights, fm::gate_mode::training, mask, loss_scale);
            REQUIRE_EQ(r.experts, first.experts); // the step must not change a choice
            double sum = loss_scale * (r.losses[0] + r.losses[1]);
            for (std::size_t c = 0; c < dweights.size(); ++c) sum += dweights[c] * r.weights[c];
            return sum;
        };
        const auto expected = support::finite_difference(loss, logits, 1e-5);
        for (std::size_t i = 0; i < expected.size(); ++i) {
            CAPTURE(i);
            CHECK(std::fabs(first.dlogits[i] - expected[i]) < 1e-8);
        }
    };
    for (auto weights : {fm::after_drop::keep, fm::after_drop::rescale})
        for (double factor : {0.4, 0.9, 1e9}) {
            CAPTURE(factor);
            const fm::capacity limit{.factor = factor, .weights = weights};
            check(fm::top_k_gate<>{.experts = 6, .k = 3, .scale = 1.5, .capacity = limit, .balance = {0.3}, .z = {0.2}});
            check(raw_gate{.experts = 6, .k = 3, .scale = 1.5, .capacity = limit, .balance = {0.3}, .z = {0.2}});
            check(raw_gate{.experts = 5, .k = 1, .capacity = limit});
            check(fm::top_k_gate<>{.experts = 4, .k = 4, .capacity = limit});
        }
}

TEST_CASE_TEMPLATE("the choice is the head of a stable sort, for any E, any K, ties, infinities and NaN", Real, float, double)
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 5);
    const int64_t sizes[] = {1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 100, 127, 128, 129, 256, 1000, 2048};
    for (int64_t experts : sizes)
        for (int style = 0; style < 5; ++style)
            for (int64_t k : {int64_t{1}, int64_t{2}, int64_t{8}, int64_t{9}, int64_t{16}, int64_t{17}, int64_t{64},
                              rng.integer(1, experts), experts}) {
                if (k > experts) continue;
                CAPTURE(experts);
                CAPTURE(k);
                CAPTURE(style);
                const int64_t tokens = experts > 256 ? 2 : 9;
                std::vector<Real> logits = support::normal_vector<Real>(rng, tokens * experts);
                for (std::size_t i = 0; i < logits.size(); ++i) {
                    if (style == 1) logits[i] = Real(rng.integer(-2, 2)); // many ties, 0 and -0 among them
                    if (style == 1 && logits[i] == 0 && rng.coin()) logits[i] = -Real(0);
                    if (style == 2) logits[i] = Real(1);
                    if (style == 3) logits[i] = Real(i % 32 < 4 ? 5 : 0) + logits[i] / 100; // crowded columns
                    if (style == 4 && rng.coin(0.6)) logits[i] = Real(rng.one_of(inf, -inf, nan_, 0.0));
                }
                if (style == 4) logits[0] = 0; // not dropped
                const raw_gate gate{.experts = experts, .k = k};
                const support::gate_run r(ex, gate, tokens, logits, support::normal_vector<Real>(rng, tokens * k));
                const auto expected =
                    oracle::route({.k = k, .renormalize = false}, support::widened(logits), tokens, experts);
                REQUIRE_EQ(r.experts, expected.expert_ids());
                const double length = 2 * double(experts) + 64;
                REQUIRE(support::close(r.weights, expected.weights(), {.length = length, .magnitude = 1}));
                for (int64_t t = 0; t < tokens; ++t) { // properties, besides
                    std::set<int32_t> ids(r.experts.begin() + t * k, r.experts.begin() + (t + 1) * k);
                    const bool dropped = ids.count(-1) > 0;
                    CHECK_EQ(ids.size(), std::size_t(dropped ? 1 : k));
                    CHECK(*ids.rbegin() < experts);
                }
                for (Real d : r.dlogits) REQUIRE(std::isfinite(d));
            }
}

TEST_CASE_TEMPLATE("near ties are ordered by value, so that no bit of a logit is spent on its id", Real, float, double)
{
    fm::host_executor ex({.threads = 1});
    // Ascending by one unit in the last place: the best is the last id, which a packed id would hide.
    for (int64_t experts : {8, 40, 200})
        for (Real start : {Real(1), Real(-1), Real(1e-30), Real(0)}) {
            std::vector<Real> logits{start};
            while (int64_t(logits.size()) < experts)
                logits.push_back(std::nextafter(logits.back(), std::numeric_limits<Real>::infinity()));
            const raw_gate gate{.experts = experts, .k = 5};
            const support::gate_run r(ex, gate, 1, logits, std::vector<Real>(5));
            for (int64_t j = 0; j < 5; ++j) CHECK_EQ(r.experts[j], experts - 1 - j);
        }
}

TEST_CASE_TEMPLATE("rows that are not finite have the documented result", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    const auto route = [&](std::vector<double> row, int64_t k, auto gate) {
        gate.experts = int64_t(row.size());
        gate.k = k;
        return support::gate_run(ex, gate, 1, support::narrowed<Real>(row), std::vector<Real>(k, Real(1)));
    };
    using ids = std::vector<int32_t>;
    const auto is = [](const auto& weights, std::vector<double> expected) {
        return support::close(weights, expected, {.length = 4, .magnitude = 1});
    };
    { // the order of choice; -Inf and NaN weigh nothing
        const auto r = route({nan_, 1, -inf, 2, inf}, 5, fm::top_k_gate<>{});
        CHECK_EQ(r.experts, ids{4, 3, 1, 2, 0});
        CHECK(is(r.weights, {1, 0, 0, 0, 0}));
    }
    { // several +Inf share
        const auto r = route({0, inf, 5, inf, inf}, 4, fm::top_k_gate<>{});
        CHECK_EQ(r.experts, ids{1, 3, 4, 2});
        CHECK(is(r.weights, {1.0 / 3, 1.0 / 3, 1.0 / 3, 0}));
        CHECK(is(route({0, inf, 5, inf, inf}, 2, raw_gate{}).weights, {1.0 / 3, 1.0 / 3}));
        CHECK(is(route({0, inf, 5, inf, inf}, 2, fm::top_k_gate<>{}).weights, {0.5, 0.5}));
    }
    { // NaN takes no part
        const auto r = route({nan_, 1, nan_, 1}, 2, raw_gate{});
        CHECK_EQ(r.experts, ids{1, 3});
        CHECK(is(r.weights, {0.5, 0.5}));
        for (Real d : r.dlogits) CHECK(std::isfinite(d));
    }
    for (double nothing : {nan_, -inf}) { // neither finite nor +Inf: dropped
        const auto r = route({nothing, -inf, nan_, nothing}, 3, fm::top_k_gate<>{.balance = {1}, .z = {1}});
        CHECK_EQ(r.experts, ids{-1, -1, -1});
        CHECK_EQ(r.weights, std::vector<Real>(3, Real(0)));
        CHECK_EQ(r.dlogits, std::vector<Real>(4, Real(0)));
        CHECK_EQ(r.losses, std::vector<Real>(2, Real(0)));
    }
    { // underflow of the exponential makes no ties: all but the first have probability 0
        const auto r = route({0, -3000, -2000, -2001, -1000}, 3, raw_gate{});
        CHECK_EQ(r.experts, ids{0, 4, 2});
        CHECK(is(r.weights, {1, 0, 0}));
    }
}

TEST_CASE_TEMPLATE("a masked token chooses nothing and is in no loss", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 6);
    const int64_t tokens = 8, experts = 12, k = 2;
    const fm::top_k_gate<> gate{.experts = experts, .k = k, .balance = {0.5}, .z = {0.5}};
    const std::vector<std::uint8_t> mask{1, 0, 1, 1, 0, 0, 255, 1};
    auto logits = support::normal_vector<Real>(rng, tokens * experts);
    for (int64_t e = 0; e < experts; ++e) logits[1 * experts + e] = Real(nan_), logits[4 * experts + e] = Real(inf);
    const auto dweights = support::normal_vector<Real>(rng, tokens * k);
    const support::gate_run whole(ex, gate, tokens, logits, dweights, fm::gate_mode::training, mask);
    std::vector<Real> fewer, dfewer; // the same without the masked tokens at all
    for (int64_t t = 0; t < tokens; ++t) {
        if (!mask[t]) continue;
        fewer.insert(fewer.end(), logits.begin() + t * experts, logits.begin() + (t + 1) * experts);
        dfewer.insert(dfewer.end(), dweights.begin() + t * k, dweights.begin() + (t + 1) * k);
    }
    const support::gate_run part(ex, gate, 5, fewer, dfewer);
    CHECK(support::same_bits(whole.losses, part.losses));
    for (int64_t t = 0, at = 0; t < tokens; ++t) {
        for (int64_t j = 0; j < k; ++j) {
            CHECK_EQ(whole.experts[t * k + j], mask[t] ? part.experts[at * k + j] : -1);
            CHECK_EQ(whole.weights[t * k + j], mask[t] ? part.weights[at * k + j] : Real(0));
        }
        for (int64_t e = 0; e < experts; ++e)
            CHECK_EQ(whole.dlogits[t * experts + e], mask[t] ? part.dlogits[at * experts + e] : Real(0));
        at += mask[t] != 0;
    }
    const support::gate_run none(ex, gate, tokens, logits, dweights, fm::gate_mode::training, std::vector<std::uint8_t>(tokens, 0));
    CHECK_EQ(none.losses, std::vector<Real>(2, Real(0)));
    CHECK_EQ(none.dlogits, std::vector<Real>(tokens * experts, Real(0)));
}

TEST_CASE("the same bits come out for any number of threads, and the same experts from any instruction set or executor")
{
    FASTMOE_SEEDED(rng, 7);
    const int64_t tokens = 3000, experts = 96, k = 4;
    const fm::top_k_gate<> gate{.experts = experts, .k = k,
                                .capacity = {.factor = 0.9, .order = fm::drop_order::by_weight, .weights = fm::after_drop::rescale},
                                .balance = {0.1}, .z = {0.1}};
    const auto logits = support::normal_vector<float>(rng, tokens * experts);
    const auto dweights = support::normal_vector<float>(rng, tokens * k);
    fm::host_executor one({.threads = 1});
    const support::gate_run expected(one, gate, tokens, logits, dweights);
    for (int threads : {1, 2, 4})
        for (int repeat = 0; repeat < 3; ++repeat) {
            fm::host_executor ex({.threads = threads});
            const support::gate_run r(ex, gate, tokens, logits, dweights);
            CHECK_EQ(r.experts, expected.experts);
            CHECK(support::same_bits(r.weights, expected.weights));
            CHECK(support::same_bits(r.losses, expected.losses));
            CHECK(support::same_bits(r.dlogits, expected.dlogits));
        }
    // Without by_weight the experts depend on logits alone.
    fm::top_k_gate<> plain = gate;
    plain.capacity.order = fm::drop_order::choice_major;
    const support::gate_run reference(one, plain, tokens, logits, dweights);
    for (auto best : {fm::instruction_set::baseline, fm::instruction_set::avx2}) {
        fm::host_executor ex({.threads = 2, .best = std::min(best, fm::native_instruction_set())});
        CHECK_EQ(support::gate_run(ex, plain, tokens, logits, dweights).experts, reference.experts);
    }
    support::lanes lanes;
    const std::vector<float> head(logits.begin(), logits.begin() + 40 * experts), dhead(dweights.begin(), dweights.begin() + 40 * k);
    CHECK_EQ(support::gate_run(lanes, plain, 40, head, dhead).experts, support::gate_run(one, plain, 40, head, dhead).experts);
}

namespace {

/// Chooses like top_k and writes the choices worst first, as a selection without a sort may.
struct worst_first {
    static constexpr bool takes_greatest = false;
    fm::top_k inner{};
    template <class Real>
    static constexpr int64_t scratch_bytes(int64_t experts, int64_t k) noexcept
    {
        return fm::top_k::scratch_bytes<Real>(experts, k);
    }
    template <class Team, class Row>
    FASTMOE_HOST_DEVICE void operator()(Team& team, const Row& row, int64_t experts, int64_t k, int32_t* chosen) const
    {
        inner(team, row, experts, k, chosen);
        if (team.lane() == 0)
            for (int64_t j = 0; 2 * j < k - 1; ++j) {
                const int32_t first = chosen[j];
                chosen[j] = chosen[k - 1 - j];
                chosen[k - 1 - j] = first;
            }
        team.sync();
    }
};

/// s = sigmoid(l), chosen by s + b: a score whose selection is not what it weighs, and whose scores do not sum to one.
struct biased_sigmoid {
    const double* bias; // (E)

    template <class Real>
    struct row_scores {
        static constexpr bool sums_to_one = false;
        const Real* logits;
        const double* bias;
        Real peak;
        FASTMOE_HOST_DEVICE bool empty() const noexcept { return peak == -fm::detail::infinity<Real>; }
        FASTMOE_HOST_DEVICE Real value(Real l) const noexcept { return l == l ? fm::math::sigmoid(l) : Real(0); }
        FASTMOE_HOST_DEVICE Real selection(int64_t e) const noexcept { return fm::math::sigmoid(logits[e]) + Real(bias[e]); }
        FASTMOE_HOST_DEVICE Real slope(Real, Real v) const noexcept { return v * (Real(1) - v); }
    };
    template <class Team, class Real>
    FASTMOE_HOST_DEVICE row_scores<Real> row(Team& team, const Real* logits, int64_t experts) const
    {
        return {logits, bias, fm::detail::greatest(team, logits, experts)};
    }
};

} // namespace

TEST_CASE_TEMPLATE("nothing assumes that the first choice is the top one when a selection is not sorted", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 8);
    const int64_t tokens = 6, experts = 40, k = 3;
    const auto logits = support::normal_vector<Real>(rng, tokens * experts, 30);
    const auto dweights = support::normal_vector<Real>(rng, tokens * k);
    const auto check = [&](const auto& sorted, const auto& unsorted) {
        std::vector<Real> reversed = dweights;
        for (int64_t t = 0; t < tokens; ++t) std::reverse(reversed.begin() + t * k, reversed.begin() + (t + 1) * k);
        const support::gate_run a(ex, sorted, tokens, logits, dweights);
        const support::gate_run b(ex, unsorted, tokens, logits, reversed);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t j = 0; j < k; ++j) {
                CHECK_EQ(a.experts[t * k + j], b.experts[t * k + k - 1 - j]);
                CHECK(std::fabs(a.weights[t * k + j] - b.weights[t * k + k - 1 - j]) < 1e-6);
            }
        CHECK(support::close(b.dlogits, support::widened(a.dlogits), {.length = 64, .magnitude = 3}));
    };
    check(fm::top_k_gate<>{.experts = experts, .k = k},
          fm::top_k_gate<fm::softmax_score, worst_first>{.experts = experts, .k = k});
    check(raw_gate{.experts = experts, .k = k},
          fm::top_k_gate<fm::softmax_score, worst_first, fm::raw_scores>{.experts = experts, .k = k});
}

TEST_CASE("a user's score with a bias is chosen by the bias, weighed without it, and has the gradients of finite differences")
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 9);
    const int64_t tokens = 5, experts = 7;
    const std::vector<double> bias = rng.normals(experts, 2);
    const auto check = [&](const auto& gate, double epsilon) {
        std::vector<double> logits = rng.normals(tokens * experts);
        const auto dweights = rng.normals(tokens * gate.k);
        const support::gate_run first(ex, gate, tokens, logits, dweights);
        for (int64_t t = 0; t < tokens; ++t) {
            std::vector<int> order(experts);
            for (int e = 0; e < experts; ++e) order[e] = e;
            const auto s = [&](int e) { return 1 / (1 + std::exp(-logits[t * experts + e])); };
            std::sort(order.begin(), order.end(), [&](int a, int b) { return s(a) + bias[a] > s(b) + bias[b]; });
            double sum = gate.k > 1 ? epsilon : 1;
            if (gate.k > 1)
                for (int64_t j = 0; j < gate.k; ++j) sum += s(order[j]);
            for (int64_t j = 0; j < gate.k; ++j) {
                CHECK_EQ(first.experts[t * gate.k + j], order[j]);
                CHECK(std::fabs(first.weights[t * gate.k + j] - gate.scale * s(order[j]) / sum) < 1e-14);
            }
        }
        const auto loss = [&] {
            const support::gate_run r(ex, gate, tokens, logits, dweights);
            double total = r.losses[0] + r.losses[1];
            for (std::size_t c = 0; c < dweights.size(); ++c) total += dweights[c] * r.weights[c];
            return total;
        };
        const auto expected = support::finite_difference(loss, logits, 1e-5);
        for (std::size_t i = 0; i < expected.size(); ++i) CHECK(std::fabs(first.dlogits[i] - expected[i]) < 1e-8);
    };
    const biased_sigmoid score{bias.data()};
    for (double epsilon : {1e-20, 0.1})
        check(fm::top_k_gate<biased_sigmoid>{.experts = experts, .k = 3, .scale = 2.5, .balance = {0.4}, .z = {0.1},
                                             .score = score, .weigh = {.epsilon = epsilon}},
              epsilon);
    check(fm::top_k_gate<biased_sigmoid, fm::top_k, fm::raw_scores>{.experts = experts, .k = 1, .balance = {0.4}, .score = score}, 0);
}

TEST_CASE("inference has no losses, acts without a mask, and lets K = 1 be renormalized")
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 10);
    const auto logits = support::normal_vector<float>(rng, 5 * 7);
    const fm::top_k_gate<> gate{.experts = 7, .k = 1, .balance = {1}, .z = {1}};
    const support::gate_run r(ex, gate, 5, logits, std::vector<float>(5), fm::gate_mode::inference);
    CHECK_EQ(r.weights, std::vector<float>(5, 1.f));
    CHECK_EQ(r.losses, std::vector<float>(2, 0.f));
}

namespace {

template <class Gate>
std::string refusal(const Gate& gate, fm::gate_mode mode = fm::gate_mode::training)
{
    fm::host_executor ex({.threads = 1});
    try {
        support::gate_run(ex, gate, 2, std::vector<float>(std::size_t(2 * std::max<int64_t>(gate.experts, 0))),
            std::vector<float>(std::size_t(2 * std::max<int64_t>(gate.k, 0))), mode);
    } catch (const fm::invalid_argument& e) {
        return e.what();
    }
    return "";
}

} // namespace

TEST_CASE("a gate that makes no sense is refused by the name of the member, its value and what was expected")
{
    const auto says = [](const std::string& text, const char* part) {
        INFO(text);
        CHECK(text.find(part) != std::string::npos);
    };
    using gate = fm::top_k_gate<>;
    says(refusal(gate{.experts = 4, .k = 5}), "k is 5; expected at most the number of experts, 4");
    says(refusal(gate{.experts = 0, .k = 1}), "experts is 0; expected 1");
    says(refusal(gate{.experts = -3, .k = 1}), "experts is -3; expected 1");
    says(refusal(gate{.experts = 4, .k = 0}), "k is 0; expected 1 or more");
    says(refusal(gate{.experts = 4, .k = -2}), "k is -2; expected 1 or more");
    says(refusal(gate{.experts = 4, .k = 1}), "k is 1; expected 2 or more to train with renormalize");
    says(refusal(gate{.experts = 4, .k = 2, .scale = nan_}), "scale is");
    says(refusal(gate{.experts = 4, .k = 2, .capacity = {.factor = -1}}), "capacity.factor is -1; expected zero or more");
    says(refusal(gate{.experts = 4, .k = 2, .capacity = {.factor = nan_}}), "capacity.factor is");
    says(refusal(gate{.experts = 4, .k = 2, .balance = {-0.1}}), "balance.coefficient is -0.1");
    says(refusal(gate{.experts = 4, .k = 2, .z = {inf}}), "z.coefficient is inf");
    CHECK_EQ(refusal(gate{.experts = 4, .k = 2}), "");
    CHECK_EQ(refusal(gate{.experts = 4, .k = 1}, fm::gate_mode::inference), "");
    CHECK_EQ(refusal(fm::switch_gate{.experts = 4}), "");
    // More experts than a team's scratch has room for are refused too, not half chosen.
    says(refusal(gate{.experts = 20000, .k = 2}), "experts is 20000; expected less: a team would need");
}

TEST_CASE("wrong shapes and a workspace one byte too small are refused before anything is written")
{
    fm::host_executor ex({.threads = 1});
    const fm::top_k_gate<> gate{.experts = 6, .k = 2, .capacity = {.factor = 1}, .balance = {1}};
    std::vector<float> logits(5 * 6), dweights(10), dlogits(30);
    fm::arena measure;
    const auto shape = fm::reserve_gate<float>(gate, measure, 5);
    fm::buffer<std::byte, fm::host_executor> kept(ex, measure.bytes());
    fm::arena memory(kept.view());
    const auto state = fm::reserve_gate<float>(gate, memory, 5);
    support::poison(kept.view());

    fm::gate_input<float> in;
    in.logits = fm::matrix_view<const float>(logits.data(), 5, 6);
    fm::arena query;
    gate.route(ex, in, fm::self{}, shape, query);
    REQUIRE(query.bytes() > 0);
    fm::buffer<std::byte, fm::host_executor> lent(ex, query.bytes());
    fm::arena small(fm::slice(lent.view(), 0, query.bytes() - 1)), enough(lent.view());
    CHECK_THROWS_AS(gate.route(ex, in, fm::self{}, state, small), fm::out_of_memory);

    auto wrong = in;
    wrong.logits = fm::matrix_view<const float>(logits.data(), 5, 5);
    CHECK_THROWS_AS(gate.route(ex, wrong, fm::self{}, state, enough), fm::invalid_argument);
    wrong = in;
    const std::vector<std::uint8_t> mask(4);
    wrong.mask = fm::as_vector(mask);
    CHECK_THROWS_AS(gate.route(ex, wrong, fm::self{}, state, enough), fm::invalid_argument);
    CHECK_EQ(support::poisoned(kept.view()), kept.size());

    gate.route(ex, in, fm::self{}, state, enough);
    const auto back = [&](int64_t choices, int64_t rows) {
        gate.backward(ex, in, fm::self{}, state, fm::vector_view<const float>(dweights.data(), choices), 1.f,
                      fm::matrix_view<float>(dlogits.data(), rows, 6), enough);
    };
    CHECK_THROWS_AS(back(9, 5), fm::invalid_argument);
    CHECK_THROWS_AS(back(10, 4), fm::invalid_argument);
    CHECK_NOTHROW(back(10, 5));
}
