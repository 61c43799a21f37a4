// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <fastmoe/comm/self.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

#include "support/compare.hpp"
#include "support/executors.hpp"
#include "support/finite_difference.hpp"
#include "support/poison.hpp"
#include "support/reference.hpp"

namespace fm = fastmoe;
namespace oracle = support::reference;
using fm::int64_t;

namespace {

#define LOGIT_CELLS                                                                                                   \
    support::cell<fm::host_executor, double>, support::cell<fm::host_executor, float>,                                \
        support::cell<support::lanes, double>, support::cell<support::lanes, float>

template <class Real>
struct result {
    std::vector<Real> losses, slopes, dlogits;
};

/// Both losses with poisoned outputs and scratch; dlogits starts at `start`.
template <class Executor, class Real, class Communicator = fm::self>
result<Real> losses_of(Executor& ex, const std::vector<Real>& logits, int64_t experts, const std::vector<int32_t>& chosen,
                       int64_t k, fm::balance_loss balance, fm::z_loss z, double loss_scale = 1, double start = 0,
                       const std::vector<std::uint8_t>& mask = {}, const Communicator& c = {})
{
    const int64_t tokens = static_cast<int64_t>(logits.size()) / experts;
    const auto in_logits = support::upload(ex, logits);
    const auto in_chosen = support::upload(ex, chosen);
    const auto in_mask = support::upload(ex, mask);
    const fm::gate_logits<Real> in{fm::matrix_view<const Real>(in_logits.data(), tokens, experts), in_mask.view()};
    fm::arena measure, query;
    fm::reserve_router_losses<Real>(measure, experts);
    fm::router_losses_forward(ex, fm::softmax_score{}, in, in_chosen.view(), k, balance, z, c, fm::router_losses<Real>{}, query);
    fm::buffer<std::byte, Executor> kept(ex, measure.bytes()), lent(ex, query.bytes());
    support::poison(kept.view());
    support::poison(lent.view());
    fm::arena memory(kept.view()), scratch(lent.view());
    const auto out = fm::reserve_router_losses<Real>(memory, experts);
    fm::router_losses_forward(ex, fm::softmax_score{}, in, in_chosen.view(), k, balance, z, c, out, scratch);
    auto dlogits = support::upload(ex, std::vector<Real>(logits.size(), Real(start)));
    fm::router_losses_backward(ex, fm::softmax_score{}, in, balance, z, out.slopes, Real(loss_scale),
                               dlogits.matrix(tokens, experts));
    return {support::download(ex, out.losses), support::download(ex, out.slopes), support::download(ex, dlogits.view())};
}

/// The top k of each token by the oracle.
template <class Real>
std::vector<int32_t> choose(const std::vector<Real>& logits, int64_t experts, int64_t k)
{
    const auto r = oracle::route({.k = k}, support::widened(logits), static_cast<int64_t>(logits.size()) / experts, experts);
    return r.chosen;
}

/// One of two ranks: its own sums are recorded, and those of the other are added.
struct one_of_two {
    std::vector<double>* mine;
    const std::vector<double>* other;

    template <class Executor>
    void all_reduce(Executor& ex, fm::vector_view<double> values) const
    {
        *mine = support::download(ex, values);
        for (std::size_t i = 0; other && i < other->size(); ++i) values(i) += (*other)[i];
    }
};

} // namespace

TEST_CASE_TEMPLATE("the losses have their closed forms", Cell, LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    const auto near = [](Real actual, double expected) {
        CAPTURE(actual);
        CAPTURE(expected);
        CHECK(std::fabs(actual - expected) <= 64 * support::roundoff<Real> * std::fabs(expected));
    };
    const int64_t experts = 8, tokens = 24;
    { // even use: the coefficient itself, for any K; log-sum-exp of a constant row: c + log E
        const std::vector<Real> flat(tokens * experts, Real(3));
        for (int64_t k : {1, 2}) {
            std::vector<int32_t> chosen;
            for (int64_t c = 0; c < tokens * k; ++c) chosen.push_back(static_cast<int32_t>(c % experts));
            const auto r = losses_of(ex, flat, experts, chosen, k, {0.25}, {0.5});
            near(r.losses[0], 0.25);
            near(r.losses[1], 0.5 * std::pow(3 + std::log(8.0), 2));
        }
    }
    { // all to one expert: E times the coefficient in the limit
        std::vector<Real> steep(tokens * experts, Real(0));
        for (int64_t t = 0; t < tokens; ++t) steep[t * experts + 5] = Real(60);
        const auto r = losses_of(ex, steep, experts, std::vector<int32_t>(tokens, 5), 1, {0.25}, {0});
        near(r.losses[0], 0.25 * experts);
        CHECK_EQ(r.losses[1], Real(0));
    }
    { // two tokens, two experts, by hand: f = (1/2, 1/2)... then (1, 0) against P = (3/4 + 1/4) / 2
        const Real third = std::log(Real(3));
        const std::vector<Real> logits{third, 0, 0, third};
        near(losses_of(ex, logits, 2, {0, 1}, 1, {1}, {0}).losses[0], 2 * (0.5 * 0.5 + 0.5 * 0.5));
        const std::vector<Real> skewed{third, 0, third, 0};
        near(losses_of(ex, skewed, 2, {0, 0}, 1, {1}, {0}).losses[0], 2 * (1 * 0.75));
    }
    { // no tokens
        const auto r = losses_of(ex, std::vector<Real>{}, experts, {}, 2, {1}, {1});
        CHECK_EQ(r.losses, std::vector<Real>(2, Real(0)));
        CHECK_EQ(r.slopes, std::vector<Real>(experts + 1, Real(0)));
    }
}

TEST_CASE_TEMPLATE("losses and gradients agree with the oracle; the gradient is added and scaled", Cell, LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 31);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int i = 0; i < (small ? 6 : 40); ++i) {
        const int64_t experts = i == 0 ? 2048 : rng.integer(1, small ? 70 : 300);
        const int64_t k = rng.integer(1, std::min<int64_t>(experts, 8));
        const int64_t tokens = i == 0 ? 3 : rng.integer(1, small ? 70 : 700);
        CAPTURE(experts);
        CAPTURE(k);
        CAPTURE(tokens);
        const auto logits = support::normal_vector<Real>(rng, tokens * experts, 2);
        const oracle::options o{.k = k, .balance = rng.one_of(0.0, 0.7), .z = rng.one_of(0.0, 0.3)};
        const auto expected = oracle::route(o, support::widened(logits), tokens, experts);
        auto gradient = oracle::route_backward(o, expected, std::vector<double>(tokens * k, 0.0), 3);
        double largest = 0;
        for (double& g : gradient) {
            largest = std::max(largest, std::fabs(g));
            g += 0.125;
        }
        const auto r = losses_of(ex, logits, experts, expected.chosen, k, {o.balance}, {o.z}, 3, 0.125);
        const std::vector<double> losses{expected.balance_loss, expected.z_loss};
        CHECK(support::close(r.losses, losses, {.length = 2.0 * experts + 64, .magnitudes = &losses}));
        CHECK(support::close(r.dlogits, gradient, {.length = 4.0 * experts + 64, .magnitude = 0.125 + largest}));
    }
}

TEST_CASE("the gradients are those of finite differences, and flow through P alone")
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 32);
    const int64_t tokens = 11, experts = 5, k = 2;
    std::vector<double> logits = rng.normals(tokens * experts);
    const auto chosen = choose(logits, experts, k); // fixed: f does not follow the logits
    std::vector<std::uint8_t> mask(tokens, 1);
    mask[3] = mask[10] = 0;
    for (auto [balance, z] : {std::pair{0.8, 0.0}, std::pair{0.0, 0.6}, std::pair{0.5, 0.5}}) {
        const auto all = [&, b = balance, zeta = z] {
            return losses_of(ex, logits, experts, chosen, k, {b}, {zeta}, 1, 0, mask);
        };
        const auto r = all();
        const auto expected = support::finite_difference(
            [&] {
                const auto here = all();
                return here.losses[0] + here.losses[1];
            },
            logits);
        for (std::size_t i = 0; i < expected.size(); ++i) CHECK(std::fabs(r.dlogits[i] - expected[i]) < 1e-10);
    }
}

TEST_CASE("the loss counts choices before capacity and divides by all tokens, kept or not")
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 33);
    const int64_t tokens = 64, experts = 6;
    const auto logits = support::normal_vector<double>(rng, tokens * experts);
    const auto of = [&](double factor) {
        const fm::top_k_gate<> gate{.experts = experts, .k = 2, .capacity = {.factor = factor}, .balance = {1}, .z = {1}};
        fm::buffer<std::byte, fm::host_executor> storage(ex, 1 << 20);
        fm::arena memory(storage.view());
        const auto state = fm::reserve_gate<double>(gate, memory, tokens);
        fm::gate_input<double> in;
        in.logits = fm::matrix_view<const double>(logits.data(), tokens, experts);
        gate.route(ex, in, fm::self{}, state, memory);
        return std::vector<double>{state.losses(0), state.losses(1)};
    };
    const auto all = of(std::numeric_limits<double>::infinity());
    CHECK(all[0] > 0.9);
    CHECK_EQ(of(0), all);
    CHECK_EQ(of(0.5), all);
}

TEST_CASE("with two ranks the losses and gradients are those of the joined batch, for unequal token counts")
{
    fm::host_executor ex({.threads = 1});
    FASTMOE_SEEDED(rng, 34);
    const int64_t experts = 7, k = 2;
    for (auto [left, right] : {std::pair{100, 3}, std::pair{1, 40}, std::pair{5, 0}}) {
        const auto logits = support::normal_vector<double>(rng, (left + right) * experts);
        const auto chosen = choose(logits, experts, k);
        const auto joined = losses_of(ex, logits, experts, chosen, k, {0.3}, {0.2});
        const std::vector<double> part[] = {{logits.begin(), logits.begin() + left * experts},
                                            {logits.begin() + left * experts, logits.end()}};
        const std::vector<int32_t> ids[] = {{chosen.begin(), chosen.begin() + left * k}, {chosen.begin() + left * k, chosen.end()}};
        std::vector<double> sums[2], ignored, gradient;
        for (int r : {0, 1}) losses_of(ex, part[r], experts, ids[r], k, {0.3}, {0.2}, 1, 0, {}, one_of_two{&sums[r], nullptr});
        for (int r : {0, 1}) {
            const auto here =
                losses_of(ex, part[r], experts, ids[r], k, {0.3}, {0.2}, 1, 0, {}, one_of_two{&ignored, &sums[1 - r]});
            for (int i : {0, 1}) CHECK(std::fabs(here.losses[i] - joined.losses[i]) < 1e-14);
            gradient.insert(gradient.end(), here.dlogits.begin(), here.dlogits.end());
        }
        CHECK(support::close(gradient, joined.dlogits, {.length = 64}));
    }
}

TEST_CASE("two microbatches at half the scale add up to the mean of their gradients")
{
    fm::host_executor ex({.threads = 1});
    FASTMOE_SEEDED(rng, 35);
    const int64_t experts = 5, k = 2, tokens = 8;
    const auto logits = support::normal_vector<double>(rng, tokens * experts);
    const auto chosen = choose(logits, experts, k);
    const auto once = losses_of(ex, logits, experts, chosen, k, {0.3}, {0.2}, 1);
    const auto half = losses_of(ex, logits, experts, chosen, k, {0.3}, {0.2}, 0.5);
    CHECK_EQ(half.losses, once.losses); // the scale is of the gradient
    for (std::size_t i = 0; i < once.dlogits.size(); ++i) CHECK(std::fabs(2 * half.dlogits[i] - once.dlogits[i]) < 1e-16);
}

TEST_CASE_TEMPLATE("rows that are not finite leave losses and gradients finite", Real, float, double)
{
    fm::host_executor ex({.threads = 1});
    const Real inf = std::numeric_limits<Real>::infinity(), nan_ = std::numeric_limits<Real>::quiet_NaN();
    // +Inf: in P but not in z. No finite logit: in T alone. NaN and -Inf beside finite ones: of probability 0.
    const std::vector<Real> logits{inf, 0, inf, nan_, -inf, -inf, 1, nan_, 1, 0, 0, 0};
    const std::vector<int32_t> chosen{0, -1, 0, 0};
    const auto r = losses_of(ex, logits, 3, chosen, 1, {1}, {1});
    const double p0 = (0.5 + 0 + 0.5 + 1.0 / 3) / 4;
    CHECK(std::fabs(r.losses[0] - 3 * (0.75 * p0)) < 1e-6);
    CHECK(std::fabs(r.losses[1] - (std::pow(1 + std::log(2.0), 2) + std::pow(std::log(3.0), 2)) / 4) < 1e-6);
    for (Real d : r.dlogits) CHECK(std::isfinite(d));
    for (int i : {3, 4, 5, 7}) CHECK_EQ(r.dlogits[i], Real(0));
}

TEST_CASE("losses have the same bits for any number of threads")
{
    FASTMOE_SEEDED(rng, 36);
    const int64_t experts = 33, k = 2, tokens = 40000;
    const auto logits = support::normal_vector<float>(rng, tokens * experts);
    std::vector<int32_t> chosen;
    for (int64_t c = 0; c < tokens * k; ++c) chosen.push_back(static_cast<int32_t>(rng.integer(0, experts - 1)));
    fm::host_executor one({.threads = 1});
    const auto expected = losses_of(one, logits, experts, chosen, k, {0.3}, {0.2});
    for (int threads : {2, 4}) {
        fm::host_executor ex({.threads = threads});
        const auto r = losses_of(ex, logits, experts, chosen, k, {0.3}, {0.2});
        CHECK(support::same_bits(r.losses, expected.losses));
        CHECK(support::same_bits(r.slopes, expected.slopes));
        CHECK(support::same_bits(r.dlogits, expected.dlogits));
    }
}

TEST_CASE("losses refuse wrong shapes and coefficients by name")
{
    fm::host_executor ex({.threads = 1});
    const auto refused = [&](fm::balance_loss balance, fm::z_loss z, std::size_t choices, std::size_t mask, const char* text) {
        try {
            losses_of(ex, std::vector<float>(12), 4, std::vector<int32_t>(choices), 2, balance, z, 1, 0,
                      std::vector<std::uint8_t>(mask));
        } catch (const fm::invalid_argument& e) {
            INFO(e.what());
            CHECK(std::string(e.what()).find(text) != std::string::npos);
            return;
        }
        FAIL("was accepted");
    };
    refused({-1}, {0}, 6, 0, "balance.coefficient is -1");
    refused({0}, {std::nan("")}, 6, 0, "z.coefficient is");
    refused({1}, {0}, 5, 0, "chosen (T*K) is of shape (5); expected (6)");
    refused({1}, {0}, 6, 2, "mask (T) is of shape (2); expected (3)");
}
