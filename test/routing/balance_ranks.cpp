// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The balance loss of sequences, of a global batch, and over ranks: where others have scaled it wrongly.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include <fastmoe/comm/threads.hpp>
#include <fastmoe/routing/biased_score.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

#include "support/compare.hpp"
#include "support/finite_difference.hpp"
#include "support/run_gate.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
using fm::int64_t;

namespace {

/// One rank's part of a batch, or all of it.
struct batch {
    std::vector<double> logits;   // (T,E)
    std::vector<int32_t> chosen;  // (T,K)
    std::vector<std::uint8_t> mask; // (T), or empty
};

struct shape {
    int64_t experts, k;
};

batch slice_of(const batch& all, shape s, int64_t begin, int64_t end)
{
    batch out;
    out.logits.assign(all.logits.begin() + begin * s.experts, all.logits.begin() + end * s.experts);
    out.chosen.assign(all.chosen.begin() + begin * s.k, all.chosen.begin() + end * s.k);
    if (!all.mask.empty()) out.mask.assign(all.mask.begin() + begin, all.mask.begin() + end);
    return out;
}

batch random_batch(support::random& rng, shape s, int64_t tokens, bool masked = false)
{
    batch out;
    out.logits = rng.normals(tokens * s.experts);
    for (int64_t t = 0; t < tokens; ++t) {
        const auto order = rng.permutation(s.experts);
        for (int64_t j = 0; j < s.k; ++j) out.chosen.push_back(order[j]);
        if (masked) out.mask.push_back(rng.coin(0.7));
        if (masked && !out.mask.back())
            for (int64_t j = 0; j < s.k; ++j) out.chosen[t * s.k + j] = -1;
    }
    return out;
}

/// f_e and P_e by their definitions, for softmax or normalized sigmoid scores.
struct shares {
    std::vector<double> choices, sums; // (E)
    double tokens = 0;

    shares(const batch& b, shape s, bool sigmoid = false) : choices(s.experts), sums(s.experts)
    {
        const auto all = static_cast<int64_t>(b.logits.size()) / s.experts;
        for (int64_t t = 0; t < all; ++t) {
            if (!b.mask.empty() && !b.mask[t]) continue;
            ++tokens;
            std::vector<double> p(s.experts);
            double total = 0;
            for (int64_t e = 0; e < s.experts; ++e) {
                const double l = b.logits[t * s.experts + e];
                total += p[e] = sigmoid ? 1 / (1 + std::exp(-l)) : std::exp(l);
            }
            for (int64_t e = 0; e < s.experts; ++e) sums[e] += p[e] / total;
            for (int64_t j = 0; j < s.k; ++j)
                if (b.chosen[t * s.k + j] >= 0) ++choices[b.chosen[t * s.k + j]];
        }
    }
};

/// coefficient * E sum_e f_e P_e, f from counts and their tokens, P from sums and theirs.
double switch_loss(double coefficient, shape s, const std::vector<double>& choices, double counted,
                   const std::vector<double>& sums, double tokens)
{
    double out = 0;
    for (int64_t e = 0; e < s.experts && tokens > 0 && counted > 0; ++e)
        out += choices[e] / (double(s.k) * counted) * sums[e] / tokens;
    return coefficient * double(s.experts) * out;
}

double switch_loss(double coefficient, shape s, const batch& b, bool sigmoid = false)
{
    const shares all(b, s, sigmoid);
    return switch_loss(coefficient, s, all.choices, all.tokens, all.sums, all.tokens);
}

/// The mean over sequences that have a token which counts.
double sequence_loss(double coefficient, shape s, const batch& b, int64_t length)
{
    double sum = 0, counted = 0;
    const auto tokens = static_cast<int64_t>(b.logits.size()) / s.experts;
    for (int64_t t = 0; t < tokens; t += length) {
        const batch one = slice_of(b, s, t, t + length);
        sum += switch_loss(coefficient, s, one);
        counted += shares(one, s).tokens > 0;
    }
    return counted > 0 ? sum / counted : 0;
}

template <class Real>
struct outcome {
    std::vector<Real> losses, dlogits;
};

/// Forward and backward with poisoned memory of exactly the size asked for.
template <class Real, class Executor, class Score = fm::softmax_score, class Communicator = fm::self>
outcome<Real> losses_of(Executor& ex, const batch& b, shape s, const fm::balance_loss& balance, fm::z_loss z = {},
                        double loss_scale = 1, const Communicator& c = {}, const Score& score = {})
{
    const auto logits = support::upload(ex, support::narrowed<Real>(b.logits));
    const auto chosen = support::upload(ex, b.chosen);
    const auto mask = support::upload(ex, b.mask);
    const int64_t tokens = static_cast<int64_t>(b.logits.size()) / s.experts;
    const fm::gate_logits<Real> in{fm::matrix_view<const Real>(logits.data(), tokens, s.experts), mask.view()};
    fm::arena measure, query;
    const int64_t sequences = balance.sequences(tokens);
    auto out = fm::reserve_router_losses<Real>(measure, s.experts, sequences);
    fm::router_losses_forward(ex, score, in, chosen.view(), s.k, balance, z, c, out, query);
    support::workspace kept(ex, measure.bytes()), scratch(ex, query.bytes());
    out = fm::reserve_router_losses<Real>(kept, s.experts, sequences);
    fm::router_losses_forward(ex, score, in, chosen.view(), s.k, balance, z, c, out, scratch.arena());
    auto dlogits = support::upload(ex, std::vector<Real>(b.logits.size(), Real(0)));
    fm::router_losses_backward(ex, score, in, balance, z, out.slopes, Real(loss_scale), dlogits.matrix(tokens, s.experts));
    return {support::download(ex, out.losses), support::download(ex, dlogits.view())};
}

void near(double actual, double expected, double error = 1e-12)
{
    CAPTURE(actual);
    CAPTURE(expected);
    CHECK(std::fabs(actual - expected) <= error);
}

} // namespace

TEST_CASE("for sigmoid scores p is s over the sum of s")
{
    fm::host_executor ex({.threads = 1});
    const double third = std::log(3.0);
    const batch one{{0, third}, {1}, {}}; // s = (1/2, 3/4), so p = (2/5, 3/5)
    near(losses_of<double>(ex, one, {2, 1}, {1}, {}, 1, fm::self{}, fm::sigmoid_score{}).losses[0], 2 * 0.6);
    FASTMOE_SEEDED(rng, 81);
    const shape s{7, 2};
    batch b = random_batch(rng, s, 30, true);
    const auto r = losses_of<double>(ex, b, s, {0.4}, {}, 1, fm::self{}, fm::sigmoid_score{});
    near(r.losses[0], switch_loss(0.4, s, b, true));
    const auto expected = support::finite_difference([&] { return switch_loss(0.4, s, b, true); }, b.logits);
    for (std::size_t i = 0; i < expected.size(); ++i) near(r.dlogits[i], expected[i], 1e-11);
}

TEST_CASE_TEMPLATE("the sequence loss is the mean of the sequences' own losses", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    // Each of two sequences uses one expert alone: 2 for each, where the batch as a whole is balanced: 1.
    const batch apart{{50, 0, 50, 0, 0, 50, 0, 50}, {0, 0, 1, 1}, {}};
    near(losses_of<Real>(ex, apart, {2, 1}, {.coefficient = 0.5, .sequence = 2}).losses[0], 1, 1e-6);
    near(losses_of<Real>(ex, apart, {2, 1}, {.coefficient = 0.5}).losses[0], 0.5, 1e-6);

    FASTMOE_SEEDED(rng, 82);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int i = 0; i < (small ? 3 : 20); ++i) {
        const shape s{rng.integer(1, 40), 1};
        const int64_t length = rng.one_of<int64_t>(1, 2, 70, rng.integer(1, 200)), count = rng.integer(0, small ? 2 : 9);
        const batch b = random_batch(rng, s, length * count, rng.coin());
        CAPTURE(length);
        CAPTURE(count);
        const auto r = losses_of<Real>(ex, b, s, {.coefficient = 0.5, .sequence = length}, {0.1});
        near(r.losses[0], sequence_loss(0.5, s, b, length), 1e-4 * (sizeof(Real) == 4) + 1e-12);
        const auto whole = losses_of<Real>(ex, b, s, {.coefficient = 0}, {0.1});
        CHECK(support::close(std::vector<Real>{r.losses[1]}, {double(whole.losses[1])}, {.length = 200}));
    }
}

TEST_CASE("the sequence loss has the gradient of finite differences, with a mask that empties a sequence")
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 83);
    const shape s{5, 2};
    batch b = random_batch(rng, s, 12, true);
    b.mask[4] = b.mask[5] = b.mask[6] = b.mask[7] = 0;
    b.mask[0] = b.mask[11] = 1;
    for (int64_t c = 8; c < 16; ++c) b.chosen[c] = -1;
    const fm::balance_loss balance{.coefficient = 0.8, .sequence = 4};
    const auto r = losses_of<double>(ex, b, s, balance, {}, 0.5);
    near(r.losses[0], sequence_loss(0.8, s, b, 4));
    const auto expected = support::finite_difference([&] { return 0.5 * sequence_loss(0.8, s, b, 4); }, b.logits);
    for (std::size_t i = 0; i < expected.size(); ++i) near(r.dlogits[i], expected[i], 1e-11);
}

TEST_CASE("over ranks every loss and gradient is that of the joined batch, wherever it is cut, for 1 to 4 ranks")
{
    FASTMOE_SEEDED(rng, 84);
    const shape s{6, 2};
    fm::host_executor one({.threads = 1});
    for (int64_t length : {int64_t{0}, int64_t{1}, int64_t{5}})
        for (int ranks = 1; ranks <= 4; ++ranks) {
            CAPTURE(length);
            CAPTURE(ranks);
            const int64_t step = length ? length : 1, units = 40 / step;
            const batch all = random_batch(rng, s, units * step, true);
            const fm::balance_loss balance{.coefficient = 0.3, .sequence = length};
            const auto joined = losses_of<double>(one, all, s, balance, {0.2}, 0.5);
            std::vector<int64_t> from{0}; // unequal, and sometimes none at all
            for (int r = 1; r < ranks; ++r)
                from.push_back(r == 2 ? from.back() : step * rng.integer(from.back() / step, units));
            from.push_back(units * step);
            std::vector<outcome<double>> got(ranks);
            fm::run_ranks(ranks, [&](const fm::threads& c) {
                fm::host_executor ex({.threads = 1});
                const int r = c.rank();
                got[r] = losses_of<double>(ex, slice_of(all, s, from[r], from[r + 1]), s, balance, {0.2}, 0.5, c);
            });
            std::vector<double> gradient;
            for (const auto& r : got) {
                near(r.losses[0], joined.losses[0]);
                near(r.losses[1], joined.losses[1]);
                gradient.insert(gradient.end(), r.dlogits.begin(), r.dlogits.end());
            }
            CHECK(support::close(gradient, joined.dlogits, {.length = 64}));
        }
}

TEST_CASE("the loss over ranks is scaled by all experts, not by those of a rank")
{
    // Even use of 8 experts is the coefficient itself, for 1, 2 and 4 ranks that hold 8, 4 and 2 experts each.
    const shape s{8, 2};
    for (int ranks : {1, 2, 4})
        fm::run_ranks(ranks, [&](const fm::threads& c) {
            fm::host_executor ex({.threads = 1});
            batch even;
            even.logits.assign(16 * 8, 0.0);
            for (int32_t i = 0; i < 32; ++i) even.chosen.push_back(i % 8);
            near(losses_of<double>(ex, even, s, {0.25}, {}, 1, c).losses[0], 0.25);
            near(losses_of<double>(ex, even, s, {.coefficient = 0.25, .sequence = 4}, {}, 1, c).losses[0], 0.25);
        });
}

TEST_CASE("a gate's loss over ranks does not change with what capacity drops")
{
    FASTMOE_SEEDED(rng, 85);
    const auto logits = rng.normals(40 * 4);
    const auto loss = [&](double factor, fm::capacity_scope over) {
        std::vector<double> out(2);
        fm::run_ranks(2, [&](const fm::threads& c) {
            fm::host_executor ex({.threads = 1});
            const fm::top_k_gate<> gate{.experts = 4, .k = 2, .capacity = {.factor = factor, .over = over}, .balance = {1}};
            const auto begin = logits.begin() + c.rank() * 25 * 4, end = c.rank() ? logits.end() : begin + 25 * 4;
            const int64_t tokens = c.rank() ? 15 : 25;
            const support::gate_run r(ex, gate, tokens, std::vector<double>(begin, end), std::vector<double>(tokens * 2),
                                      fm::gate_mode::training, {}, 1.0, support::gate_extras{}, c);
            out[c.rank()] = r.losses[0];
        });
        CHECK_EQ(out[0], out[1]);
        return out[0];
    };
    const double all = loss(INFINITY, fm::capacity_scope::one_rank);
    CHECK(all > 0.9);
    for (auto over : {fm::capacity_scope::one_rank, fm::capacity_scope::all_ranks})
        for (double factor : {0.0, 0.5, 0.9}) CHECK_EQ(loss(factor, over), all);
}

TEST_CASE("microbatches at 1/n of the scale add up to the joined batch's gradient of z, and to their mean of the balance")
{
    fm::host_executor ex({.threads = 1});
    FASTMOE_SEEDED(rng, 86);
    const shape s{5, 2};
    const batch all = random_batch(rng, s, 24);
    const auto joined = losses_of<double>(ex, all, s, {0}, {0.2});
    std::vector<double> z, balance, expected;
    for (int64_t m = 0; m < 3; ++m) {
        batch one = slice_of(all, s, 8 * m, 8 * m + 8);
        const auto part = losses_of<double>(ex, one, s, {0}, {0.2}, 1.0 / 3);
        z.insert(z.end(), part.dlogits.begin(), part.dlogits.end());
        const auto own = losses_of<double>(ex, one, s, {0.7}, {}, 1.0 / 3);
        balance.insert(balance.end(), own.dlogits.begin(), own.dlogits.end());
        const auto slope = support::finite_difference([&] { return switch_loss(0.7, s, one) / 3; }, one.logits);
        expected.insert(expected.end(), slope.begin(), slope.end());
    }
    CHECK(support::close(z, joined.dlogits, {.length = 16}));
    for (std::size_t i = 0; i < expected.size(); ++i) near(balance[i], expected[i], 1e-11);
}

TEST_CASE("with counts kept over a global batch, f is that of all ranks and all microbatches so far")
{
    FASTMOE_SEEDED(rng, 87);
    const shape s{5, 2};
    for (int ranks : {1, 3}) {
        const batch all = random_batch(rng, s, 12 * ranks * 3, true);
        std::vector<std::vector<int64_t>> kept(ranks);
        fm::run_ranks(ranks, [&](const fm::threads& c) {
            fm::host_executor ex({.threads = 1});
            auto counts = support::upload(ex, std::vector<int64_t>(s.experts + 1, 0));
            std::vector<double> choices(s.experts);
            double counted = 0;
            for (int64_t m = 0; m < 3; ++m) {
                const int64_t begin = 12 * ranks * m;
                const batch joined = slice_of(all, s, begin, begin + 12 * ranks);
                batch own = slice_of(all, s, begin + 12 * c.rank(), begin + 12 * c.rank() + 12);
                const auto r = losses_of<double>(ex, own, s, {.coefficient = 0.6, .accumulated = counts.view()}, {}, 1, c);
                const shares now(joined, s);
                for (int64_t e = 0; e < s.experts; ++e) choices[e] += now.choices[e];
                counted += now.tokens;
                near(r.losses[0], switch_loss(0.6, s, choices, counted, now.sums, now.tokens));
                const auto expected = support::finite_difference(
                    [&] {
                        const shares here(own, s); // the others' part of P is constant
                        return switch_loss(0.6, s, choices, counted, here.sums, now.tokens);
                    },
                    own.logits);
                for (std::size_t i = 0; i < expected.size(); ++i) near(r.dlogits[i], expected[i], 1e-11);
            }
            kept[c.rank()] = support::download(ex, counts.view());
            for (int64_t e = 0; e < s.experts; ++e) CHECK_EQ(double(kept[c.rank()][e]), choices[e]);
            CHECK_EQ(double(kept[c.rank()][s.experts]), counted);
        });
        for (const auto& other : kept) CHECK_EQ(other, kept[0]);
    }
}

TEST_CASE("gates keep what sequences and accumulated counts need")
{
    fm::host_executor ex({.threads = 1});
    FASTMOE_SEEDED(rng, 88);
    const auto logits = rng.normals(12 * 5);
    std::vector<int64_t> counts(6, 0);
    const std::vector<double> dweights(24, 0.0);
    fm::top_k_gate<> gate{.experts = 5, .k = 2, .balance = {.coefficient = 0.5, .sequence = 4}};
    const support::gate_run r(ex, gate, 12, logits, dweights);
    batch b{logits, {}, {}};
    b.chosen.assign(r.experts.begin(), r.experts.end());
    near(r.losses[0], sequence_loss(0.5, {5, 2}, b, 4));
    const auto expected = support::finite_difference([&] { return sequence_loss(0.5, {5, 2}, b, 4); }, b.logits);
    for (std::size_t i = 0; i < expected.size(); ++i) near(r.dlogits[i], expected[i], 1e-11);
    gate.balance = {.coefficient = 0.5, .accumulated = fm::as_vector(counts)};
    support::gate_run(ex, gate, 12, logits, dweights);
    CHECK_EQ(counts[5], 12);
    CHECK_EQ(counts[0] + counts[1] + counts[2] + counts[3] + counts[4], 24);
    support::gate_run(ex, gate, 12, logits, dweights, fm::gate_mode::inference); // counts in training alone
    CHECK_EQ(counts[5], 12);
    // A pass that is run again counts in a copy of what there was before it, and gives what it gave.
    const auto later = rng.normals(12 * 5);
    std::vector<int64_t> copy = counts;
    const support::gate_run once(ex, gate, 12, later, dweights);
    gate.balance.accumulated = fm::as_vector(copy);
    const support::gate_run again(ex, gate, 12, later, dweights);
    CHECK_EQ(copy, counts);
    CHECK_EQ(counts[5], 24);
    CHECK_EQ(again.losses[0], once.losses[0]);
    CHECK_EQ(again.dlogits, once.dlogits);
}

TEST_CASE("sequences and counts that make no sense are refused by name")
{
    fm::host_executor ex({.threads = 1});
    std::vector<int64_t> counts(4);
    const auto says = [&](const fm::balance_loss& balance, const char* text) {
        const fm::top_k_gate<> gate{.experts = 4, .k = 2, .balance = balance};
        const std::string got = support::message_of<fm::invalid_argument>(
            [&] { support::gate_run(ex, gate, 6, std::vector<float>(24), std::vector<float>(12)); });
        INFO(got);
        CHECK(support::has(got, text));
    };
    says({.coefficient = 1, .sequence = 4}, "balance.sequence is 4; expected a divisor of the 6 tokens");
    says({.coefficient = 1, .sequence = -1}, "balance.sequence is -1; expected zero or more");
    says({.coefficient = 1, .accumulated = fm::as_vector(counts)},
         "balance.accumulated (E+1) is of shape (4); expected (5)");
    says({.coefficient = 1, .sequence = 2, .accumulated = fm::as_vector(counts)},
         "balance.sequence is 2; expected 0 where counts");
}
