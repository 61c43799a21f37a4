// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What must hold for every router that draws or has parameters, over shapes of any size: bounds, uniqueness, the same
/// bits for any number of threads, the same ids on another executor and for another split of the tokens.
#include <doctest/doctest.h>

#include <cmath>
#include <set>

#include <fastmoe/routing/cosine_gate.hpp>
#include <fastmoe/routing/gshard_gate.hpp>
#include <fastmoe/routing/noisy_gate.hpp>
#include <fastmoe/routing/sparse_mixer_gate.hpp>

#include "support/compare.hpp"
#include "support/layer_memory.hpp"
#include "support/run_router.hpp"

namespace fm = fastmoe;
using fm::int64_t;

namespace {

enum class weights_of_token { sum_to_one, at_most_one_each };

template <class Real, class Gate>
void has_properties(const Gate& gate, const support::router_batch<Real>& b, weights_of_token sums, bool drops)
{
    CAPTURE(b.experts);
    CAPTURE(b.k);
    fm::host_executor one({.threads = 1});
    const auto expected = support::run_router<Real>(one, gate, b);
    const int64_t k = b.k;
    for (int64_t t = 0; t < b.tokens; ++t) {
        std::set<int32_t> ids;
        double sum = 0;
        for (int64_t c = t * k; c < (t + 1) * k; ++c) {
            const int32_t e = expected.experts[c];
            REQUIRE(e >= (drops ? -1 : 0));
            REQUIRE(e < b.experts);
            if (e >= 0) REQUIRE(ids.insert(e).second);
            if (e < 0) REQUIRE_EQ(expected.weights()[c], Real(0));
            REQUIRE(expected.weights()[c] >= 0);
            REQUIRE(expected.weights()[c] <= 1 + 4 * support::roundoff<Real>);
            sum += double(expected.weights()[c]);
        }
        if (sums == weights_of_token::sum_to_one)
            REQUIRE(std::fabs(sum - 1) <= double(2 * b.experts + 8) * support::roundoff<Real>);
    }
    for (Real v : expected.numbers()) REQUIRE(std::isfinite(v));
    for (int threads : {2, 4}) {
        fm::host_executor ex({.threads = threads});
        const auto again = support::run_router<Real>(ex, gate, b);
        REQUIRE_EQ(again.experts, expected.experts);
        REQUIRE(support::same_bits(again.numbers(), expected.numbers()));
    }
    const int64_t half = b.tokens / 2;
    const auto tail = support::run_router<Real>(one, gate, b.part(half, b.tokens - half));
    REQUIRE(std::equal(tail.experts.begin(), tail.experts.end(), expected.experts.begin() + half * k));
    if (k > 16 || b.experts > 512) return; // four threads a token take their time
    support::lanes lanes;
    const auto first = support::run_router<Real>(lanes, gate, b.part(0, std::min<int64_t>(b.tokens, 2)));
    REQUIRE(std::equal(first.experts.begin(), first.experts.end(), expected.experts.begin()));
}

} // namespace

TEST_CASE_TEMPLATE("routers that draw or own parameters keep their bounds and their bits over all shapes", Real, float, double)
{
    FASTMOE_SEEDED(rng, 111);
    const bool is_double = std::is_same_v<Real, double>;
    const int64_t sizes[] = {1, 2, 3, 16, 17, 33, 64, 65, 128, 200, 512, 1000, 2047, 2048};
    for (int64_t experts : sizes)
        for (int64_t k : {int64_t{1}, int64_t{2}, rng.integer(1, experts), experts}) {
            if (k > experts || (is_double && experts > 200 && k != 2)) continue;
            const support::router_batch<Real> b(rng, k > 200 ? 2 : rng.integer(3, 6), experts, k);
            const double epsilon = rng.one_of(0.01, 0.3, 2.0);
            constexpr auto one = weights_of_token::sum_to_one, each = weights_of_token::at_most_one_each;
            fm::sparse_mixer_gate mixer{.experts = experts, .k = k, .epsilon = epsilon, .balance = {0.1}};
            has_properties(mixer, b, each, false);
            mixer.pick = fm::mixer_pick::sampled;
            if (k <= 64) has_properties(mixer, b, each, false);
            const fm::cosine_gate<fm::top_k, fm::raw_scores> cosine{
                .experts = experts, .k = k, .projection_width = b.inner, .balance = {0.1}};
            has_properties(cosine, b, k == experts ? one : each, false);
            if (k == 1) continue; // softmax over one: refused in training
            has_properties(fm::noisy_gate{.experts = experts, .k = k, .importance = {0.1}, .load = {0.1}}, b, one, false);
            if (k == 2) has_properties(fm::gshard_gate<>{.experts = experts, .balance = {0.1}}, b, each, true);
        }
}

TEST_CASE("routers take a batch without tokens")
{
    FASTMOE_SEEDED(rng, 112);
    fm::host_executor ex({.threads = 2});
    const support::router_batch<float> b(rng, 0, 4, 2);
    const fm::sparse_mixer_gate mixer{.experts = 4, .k = 2, .pick = fm::mixer_pick::sampled, .balance = {1}};
    CHECK(support::run_router<float>(ex, mixer, b).experts.empty());
    CHECK(support::run_router<float>(ex, fm::gshard_gate<>{.experts = 4, .capacity = {.factor = 1}, .balance = {1}}, b).experts.empty());
    for (const auto& r : {support::run_router<float>(ex, fm::noisy_gate{.experts = 4, .k = 2, .importance = {1}, .load = {1}}, b),
                          support::run_router<float>(ex, fm::cosine_gate<>{.experts = 4, .k = 2, .projection_width = b.inner}, b)}) {
        CHECK(r.experts.empty());
        for (float v : r.numbers()) CHECK_EQ(v, 0.f); // losses and the gradients of parameters
    }
}

TEST_CASE("a layer of bfloat16 routes with each of them as a layer of float does on the same numbers")
{
    FASTMOE_SEEDED(rng, 113);
    fm::host_executor ex({.threads = 2});
    const int64_t tokens = 12, d = 8;
    const std::vector<std::uint64_t> random{3, 4};
    const auto check = [&](const auto& gate) {
        const fm::moe_layer layer{gate, fm::mlp<fm::silu>{.width = d, .hidden = 16}};
        auto narrow = fm::random_weights<fm::bfloat16>(ex, layer, 3), gradient = fm::zero_weights<fm::bfloat16>(ex, layer);
        auto wide = fm::random_weights<float>(ex, layer, 3);
        const auto x = support::normal_vector<fm::bfloat16>(rng, tokens * d);
        const auto dy = support::normal_vector<fm::bfloat16>(rng, tokens * d);
        const std::vector<float> x_wide(x.begin(), x.end());
        const auto widen = [&](auto to, auto from) {
            for (int64_t i = 0; i < support::size_of(to); ++i) to.data_handle()[i] = float(from.data_handle()[i]);
        };
        if constexpr (fm::gate_reads_logits<std::remove_cvref_t<decltype(gate)>>) widen(wide.view().gate, narrow.view().gate);
        if constexpr (requires { wide.view().own.noise; }) {
            support::fill_normal(rng, narrow.view().own.noise);
            widen(wide.view().own.noise, narrow.view().own.noise);
        }
        if constexpr (requires { wide.view().own.embeddings; }) {
            widen(wide.view().own.projection, narrow.view().own.projection);
            widen(wide.view().own.embeddings, narrow.view().own.embeddings);
            widen(wide.view().own.temperature, narrow.view().own.temperature);
        }
        std::vector<fm::bfloat16> y(x.size()), dx(x.size());
        std::vector<float> y_wide(x.size());
        const fm::gate_options options{.random = random.data()};
        const auto a = layer.forward(ex, fm::as_matrix(x, tokens, d), narrow.view(), fm::as_matrix(y, tokens, d), options);
        const auto b =
            layer.forward(ex, fm::as_matrix(x_wide, tokens, d), wide.view(), fm::as_matrix(y_wide, tokens, d), options);
        CHECK_EQ(support::download(ex, a.routing().experts), support::download(ex, b.routing().experts));
        CHECK(support::same_bits(support::download(ex, a.routing().weights), support::download(ex, b.routing().weights)));
        layer.backward(ex, a, fm::as_matrix(dy, tokens, d), narrow.view(), fm::as_matrix(dx, tokens, d), gradient.view());
        for (fm::bfloat16 v : dx) CHECK(std::isfinite(float(v)));
    };
    check(fm::noisy_gate{.experts = 6, .k = 2, .importance = {0.1}, .load = {0.1}});
    check(fm::cosine_gate<>{.experts = 6, .k = 2, .projection_width = 4});
    check(fm::sparse_mixer_gate{.experts = 6, .k = 2, .epsilon = 0.5});
    check(fm::gshard_gate<>{.experts = 6});
}
