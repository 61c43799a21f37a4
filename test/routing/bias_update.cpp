// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include <fastmoe/comm/threads.hpp>
#include <fastmoe/routing/bias_update.hpp>
#include <fastmoe/routing/biased_score.hpp>
#include <fastmoe/routing/load.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

#include "support/compare.hpp"
#include "support/run_gate.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
using fm::int64_t;

namespace {

template <class Executor>
std::vector<float> moved(Executor& ex, const fm::bias_update& how, std::vector<int64_t> counts, std::vector<float> bias)
{
    const auto c = support::upload(ex, counts);
    auto b = support::upload(ex, bias);
    fm::update_bias(ex, how, c.view(), b.view());
    return support::download(ex, b.view());
}

/// Scores of a token by their definition.
std::vector<double> scores(const double* l, int64_t experts, bool softmax)
{
    std::vector<double> s(experts);
    double total = 0, top = -INFINITY;
    for (int64_t e = 0; e < experts; ++e) top = std::max(top, l[e]);
    for (int64_t e = 0; e < experts; ++e) total += s[e] = softmax ? std::exp(l[e] - top) : 1 / (1 + std::exp(-l[e]));
    for (double& v : s) v /= softmax ? total : 1;
    return s;
}

/// r_te = alpha_t - s_te, by expert, with alpha the (K+1)-th greatest s + b.
std::vector<std::vector<double>> thresholds(const std::vector<double>& logits, const std::vector<std::uint8_t>& mask,
                                            const std::vector<float>& bias, int64_t k, bool softmax)
{
    const auto experts = static_cast<int64_t>(bias.size()), tokens = static_cast<int64_t>(logits.size()) / experts;
    std::vector<std::vector<double>> r(experts);
    for (int64_t t = 0; t < tokens; ++t) {
        if (!mask.empty() && !mask[t]) continue;
        const auto s = scores(logits.data() + t * experts, experts, softmax);
        std::vector<double> biased(s);
        for (int64_t e = 0; e < experts; ++e) biased[e] += bias[e];
        std::sort(biased.rbegin(), biased.rend());
        for (int64_t e = 0; e < experts; ++e) r[e].push_back(biased[k] - s[e]);
    }
    return r;
}

std::vector<double> centered(std::vector<double> b)
{
    double mean = 0;
    for (double v : b) mean += v / double(b.size());
    for (double& v : b) v -= mean;
    return b;
}

/// The ceil(T K / E)-th smallest of each expert, minus their mean.
std::vector<double> exact(std::vector<std::vector<double>> r, int64_t k)
{
    std::vector<double> b;
    for (auto& own : r) {
        std::sort(own.begin(), own.end());
        const auto share = (own.size() * static_cast<std::size_t>(k) + r.size() - 1) / r.size();
        b.push_back(own.at(share - 1));
    }
    return centered(b);
}

template <class Real, class Executor, class Score, class Communicator = fm::self>
std::vector<float> by_quantile(Executor& ex, const Score& score, const std::vector<double>& logits,
                               const std::vector<std::uint8_t>& mask, const std::vector<float>& bias, int64_t k,
                               const Communicator& c = {})
{
    const auto experts = static_cast<int64_t>(bias.size()), tokens = static_cast<int64_t>(logits.size()) / experts;
    const auto in_logits = support::upload(ex, support::narrowed<Real>(logits));
    const auto in_mask = support::upload(ex, mask);
    auto b = support::upload(ex, bias);
    const fm::gate_logits<Real> in{fm::matrix_view<const Real>(in_logits.data(), tokens, experts), in_mask.view()};
    support::in_workspace(
        ex, [&](fm::arena& scratch) { fm::balance_by_quantile(ex, score, in, k, c, b.view(), scratch); });
    return support::download(ex, b.view());
}

template <class Real, class Executor, class Score, class Communicator = fm::self>
std::vector<float> by_histogram(Executor& ex, const Score& score, const std::vector<std::vector<double>>& microbatches,
                                const std::vector<float>& bias, int64_t k, int64_t bins, const Communicator& c = {})
{
    const auto experts = static_cast<int64_t>(bias.size());
    auto b = support::upload(ex, bias);
    auto histogram = support::upload(ex, std::vector<int64_t>(experts * bins, 0));
    for (const auto& logits : microbatches) {
        const auto tokens = static_cast<int64_t>(logits.size()) / experts;
        const auto in_logits = support::upload(ex, support::narrowed<Real>(logits));
        const fm::gate_logits<Real> in{fm::matrix_view<const Real>(in_logits.data(), tokens, experts), {}};
        support::in_workspace(ex, [&](fm::arena& scratch) {
            fm::count_quantiles(ex, score, in, k, b.view(), histogram.matrix(experts, bins), scratch);
        });
    }
    support::in_workspace(ex, [&](fm::arena& scratch) {
        fm::balance_by_histogram(ex, k, c, histogram.matrix(experts, bins), b.view(), scratch);
    });
    return support::download(ex, b.view());
}

std::vector<float> random_bias(support::random& rng, int64_t experts)
{
    std::vector<float> b;
    for (int64_t e = 0; e < experts; ++e) b.push_back(static_cast<float>(rng.normal(0.2)));
    return b;
}

/// Logits that favour the first experts.
std::vector<double> skewed(support::random& rng, int64_t tokens, int64_t experts)
{
    std::vector<double> l = rng.normals(tokens * experts);
    for (std::size_t i = 0; i < l.size(); ++i) l[i] += 2.0 * (1 - double(i % experts) / double(experts));
    return l;
}

/// The most choices of an expert over their mean, and the counts.
double imbalance(const std::vector<double>& logits, const std::vector<float>& bias, int64_t k)
{
    fm::host_executor ex({.threads = 1});
    const auto experts = static_cast<int64_t>(bias.size()), tokens = static_cast<int64_t>(logits.size()) / experts;
    fm::top_k_gate<fm::sigmoid_score> gate{.experts = experts, .k = k};
    gate.score.bias = fm::as_vector(bias);
    const support::gate_run r(ex, gate, tokens, logits, std::vector<double>(tokens * k));
    std::vector<double> c(experts);
    for (int32_t e : r.experts) ++c[e];
    return *std::max_element(c.begin(), c.end()) * double(experts) / double(tokens * k);
}

} // namespace

TEST_CASE_TEMPLATE("the bias of an expert moves by the sign of what it lacks, and not at the mean", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    const float u = 1e-3f;
    CHECK_EQ(moved(ex, {}, {9, 3, 6, 6}, {0, 0, 1, -1}), std::vector<float>{-u, u, 1, -1}); // mean 6
    CHECK_EQ(moved(ex, {}, {0, 0, 1}, {0, 0, 0}), std::vector<float>{u, u, -u});             // mean 1/3: no rounding
    CHECK_EQ(moved(ex, {.rate = 0.5}, {4, 4}, {3, 5}), std::vector<float>{3, 5});
    // minus the mean of the updates: signs (-1, 1, 1, 1), mean 1/2
    CHECK_EQ(moved(ex, {.rate = 0.5, .center = fm::bias_center::mean}, {7, 1, 1, 1}, {0, 0, 0, 8}),
             std::vector<float>{-0.75f, 0.25f, 0.25f, 8.25f});
    const int64_t large = int64_t{1} << 53; // beyond what double tells apart
    CHECK_EQ(moved(ex, {.rate = 1}, {large, large + 2}, {0, 0}), std::vector<float>{1, -1});
    CHECK_EQ(moved(ex, {}, {}, {}), std::vector<float>{});
}

TEST_CASE("many updates by the sign even out a skewed load, for counts of all ranks and microbatches")
{
    FASTMOE_SEEDED(rng, 91);
    const int64_t experts = 8, k = 2, tokens = 400;
    const auto logits = skewed(rng, 4 * tokens, experts);
    std::vector<float> bias(experts, 0.f);
    REQUIRE(imbalance(logits, bias, k) > 1.5);
    std::vector<std::vector<float>> of_rank(2);
    fm::run_ranks(2, [&](const fm::threads& c) {
        fm::host_executor ex({.threads = 1});
        std::vector<float> own(experts, 0.f);
        std::vector<int64_t> counts(experts);
        fm::top_k_gate<fm::sigmoid_score> gate{.experts = experts, .k = k};
        gate.score.bias = fm::as_vector(own);
        for (int step = 0; step < 200; ++step) {
            for (int m = 0; m < 2; ++m) { // two microbatches
                const auto begin = logits.begin() + (2 * m + c.rank()) * tokens * experts;
                const support::gate_run r(ex, gate, tokens, std::vector<double>(begin, begin + tokens * experts),
                                          std::vector<double>(tokens * k), fm::gate_mode::inference);
                const auto mode = m ? fm::write_mode::accumulate : fm::write_mode::overwrite;
                const auto ids = fm::vector_view<const int32_t>(r.experts.data(), tokens * k);
                support::in_workspace(
                    ex, [&](fm::arena& scratch) { fm::count_choices(ex, ids, fm::as_vector(counts), mode, scratch); });
            }
            c.all_reduce(ex, fm::as_vector(counts));
            fm::update_bias(ex, {.rate = 2e-3}, fm::as_vector(counts), fm::as_vector(own));
        }
        of_rank[c.rank()] = own;
    });
    CHECK(support::same_bits(of_rank[0], of_rank[1]));
    CHECK(imbalance(logits, of_rank[0], k) < 1.06);
}

TEST_CASE_TEMPLATE("balancing by quantiles takes the exact order statistic of every expert, minus the mean", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 92);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int i = 0; i < (small ? 3 : 20); ++i) {
        const int64_t experts = rng.integer(2, small ? 20 : 90), k = rng.integer(1, experts - 1);
        const int64_t tokens = rng.integer(1, small ? 10 : 120);
        const auto logits = support::widened(support::narrowed<Real>(rng.normals(tokens * experts)));
        std::vector<std::uint8_t> mask(tokens, 1);
        for (auto& m : mask) m = rng.coin(0.8);
        mask[0] = 1;
        const auto bias = random_bias(rng, experts);
        // float scores carry a few roundings; the bias is float in any case
        const support::tolerance tol{.length = sizeof(Real) == 4 ? 2.0 * double(experts) : 1.0, .magnitude = 2};
        CHECK(support::close(by_quantile<Real>(ex, fm::sigmoid_score{}, logits, mask, bias, k),
                             exact(thresholds(logits, mask, bias, k, false), k), tol));
        CHECK(support::close(by_quantile<Real>(ex, fm::softmax_score{}, logits, mask, bias, k),
                             exact(thresholds(logits, mask, bias, k, true), k), tol));
    }
}

TEST_CASE("a few rounds of quantile balancing, exact or by histogram, even out a skewed load")
{
    FASTMOE_SEEDED(rng, 93);
    const auto logits = skewed(rng, 2000, 16);
    fm::host_executor ex({.threads = 2});
    std::vector<float> by_order(16, 0.f), by_bins(16, 0.f);
    REQUIRE(imbalance(logits, by_order, 4) > 1.5);
    for (int round = 0; round < 12; ++round) {
        by_order = by_quantile<double>(ex, fm::sigmoid_score{}, logits, {}, by_order, 4);
        by_bins = by_histogram<double>(ex, fm::sigmoid_score{}, {logits}, by_bins, 4, 1000);
    }
    CHECK(imbalance(logits, by_order, 4) < 1.02);
    CHECK(imbalance(logits, by_bins, 4) < 1.05);
}

TEST_CASE_TEMPLATE("the histogram form is within a bin of the exact quantile, and adds up microbatches", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 94);
    const bool small = support::takes_turns<typename Cell::executor>;
    const int64_t experts = 9, k = 3, bins = 1000;
    std::vector<std::vector<double>> parts;
    std::vector<double> all;
    for (int64_t tokens : {5, 0, small ? 3 : 200, 40}) {
        parts.push_back(rng.normals(tokens * experts));
        all.insert(all.end(), parts.back().begin(), parts.back().end());
    }
    const auto bias = random_bias(rng, experts);
    const auto [least, most] = std::minmax_element(bias.begin(), bias.end());
    const double bin = (double(*most) - *least + 2) / double(bins);
    const auto got = by_histogram<Real>(ex, fm::sigmoid_score{}, parts, bias, k, bins);
    const auto expected = exact(thresholds(all, {}, bias, k, false), k);
    for (int64_t e = 0; e < experts; ++e) CHECK(std::fabs(got[e] - expected[e]) <= bin); // half a bin, and half in the mean
}

TEST_CASE("a histogram by hand: two experts whose halves lie a bin apart")
{
    fm::host_executor ex({.threads = 1});
    std::vector<int64_t> histogram{0, 2, 2, 0, 2, 2, 0, 0}; // bins of width 1/2 over [-1, 1]
    std::vector<float> bias{0, 0};
    support::in_workspace(ex, [&](fm::arena& scratch) {
        fm::balance_by_histogram(ex, 1, fm::self{}, fm::as_matrix(histogram, 2, 4), fm::as_vector(bias), scratch);
    });
    CHECK_EQ(bias, std::vector<float>{0.25f, -0.25f});
}

TEST_CASE("over ranks quantiles are those of the joined batch, to the bit, for 1 to 4 ranks")
{
    FASTMOE_SEEDED(rng, 95);
    const int64_t experts = 7, k = 2;
    fm::host_executor one({.threads = 1});
    for (int ranks = 1; ranks <= 4; ++ranks) {
        const int64_t tokens = 60;
        const auto logits = rng.normals(tokens * experts);
        const auto bias = random_bias(rng, experts);
        const auto exactly = by_quantile<float>(one, fm::sigmoid_score{}, logits, {}, bias, k);
        const auto binned = by_histogram<float>(one, fm::sigmoid_score{}, {logits}, bias, k, 100);
        std::vector<int64_t> from{0};
        for (int r = 1; r < ranks; ++r) from.push_back(r == 2 ? from.back() : rng.integer(from.back(), tokens));
        from.push_back(tokens);
        fm::run_ranks(ranks, [&](const fm::threads& c) {
            fm::host_executor ex({.threads = 1});
            const auto begin = logits.begin() + from[c.rank()] * experts;
            const std::vector<double> own(begin, logits.begin() + from[c.rank() + 1] * experts);
            CHECK(support::same_bits(by_quantile<float>(ex, fm::sigmoid_score{}, own, {}, bias, k, c), exactly));
            CHECK(support::same_bits(by_histogram<float>(ex, fm::sigmoid_score{}, {own}, bias, k, 100, c), binned));
        });
    }
}

TEST_CASE("without tokens that count a bias stays; rows that are not finite do it no harm")
{
    fm::host_executor ex({.threads = 1});
    const std::vector<float> bias{0.5f, -0.25f, 0.125f};
    const double inf = std::numeric_limits<double>::infinity(), nan_ = std::numeric_limits<double>::quiet_NaN();
    CHECK_EQ(by_quantile<float>(ex, fm::sigmoid_score{}, {}, {}, bias, 1), bias);
    CHECK_EQ(by_quantile<float>(ex, fm::sigmoid_score{}, {1, 2, 3}, {0}, bias, 1), bias);
    CHECK_EQ(by_quantile<float>(ex, fm::sigmoid_score{}, {nan_, -inf, nan_}, {}, bias, 1), bias);
    CHECK_EQ(by_histogram<float>(ex, fm::sigmoid_score{}, {{}}, bias, 1, 10), bias);
    const std::vector<double> odd{inf, 0, nan_, 1, -inf, 2, nan_, nan_, -1};
    for (float b : by_quantile<float>(ex, fm::softmax_score{}, odd, {}, bias, 1)) CHECK(std::isfinite(b));
    for (float b : by_histogram<float>(ex, fm::softmax_score{}, {odd}, bias, 2, 10)) CHECK(std::isfinite(b));
}

TEST_CASE("updates that make no sense are refused by name")
{
    fm::host_executor ex({.threads = 1});
    const auto says = [](auto call, const char* text) {
        const std::string got = support::message_of<fm::invalid_argument>(call);
        INFO(got);
        CHECK(support::has(got, text));
    };
    std::vector<float> bias(4);
    says([&] { moved(ex, {.rate = -1}, {1, 2}, {0, 0}); }, "bias_update.rate is -1; expected a finite number from 0 on");
    says([&] { moved(ex, {.rate = NAN}, {1, 2}, {0, 0}); }, "bias_update.rate is");
    says([&] { moved(ex, {}, {1, 2, 3}, {0, 0}); }, "counts (E) is of shape (3); expected (2)");
    const std::vector<float> many(7000);
    const fm::sigmoid_score score;
    const std::vector<double> logits(8);
    says([&] { by_quantile<float>(ex, score, logits, {}, bias, 4); }, "k is 4; expected 1 to E - 1 = 3");
    says([&] { by_quantile<float>(ex, score, logits, {1}, bias, 2); }, "mask (T) is of shape (1)");
    says([&] { by_histogram<float>(ex, score, {}, bias, 2, 0); }, "histogram (E,bins) is 0; expected 1 bin or more");
    says([&] { by_quantile<float>(ex, score, {}, {}, many, 2); }, "bias (E) is 7000; expected less: a team");
}
