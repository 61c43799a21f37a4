// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Layers behind assignments that look at all tokens: ragged choices, and room for choices that nobody fills, through plan,
/// experts and combine, forward and backward.
#include <doctest/doctest.h>

#include <cmath>

#include <fastmoe/moe.hpp>

#include "support/finite_difference.hpp"
#include "support/random.hpp"

using namespace fastmoe;

namespace {

/// A layer in double whose gradients are those of finite differences, whatever its gate is. Some tokens are masked.
template <class Gate>
void has_gradients(support::random& rng, const Gate& gate, int64_t tokens)
{
    host_executor ex({.threads = 2});
    const int64_t width = 5;
    const moe_layer<Gate, mlp<gelu>> layer{gate, mlp<gelu>{.width = width, .hidden = 6}, self{}};
    auto w = random_weights<double>(ex, layer, 7), g = zero_weights<double>(ex, layer);
    std::vector<double> x = rng.normals(tokens * width, 2), direction = rng.normals(tokens * width);
    std::vector<double> y(x.size()), dx(x.size(), NAN);
    std::vector<std::uint8_t> mask;
    for (int64_t t = 0; t < tokens; ++t) mask.push_back(t % 5 != 1);
    const gate_options options{.mask = as_vector(mask)};
    std::vector<int32_t> ids;
    const auto value = [&] {
        const auto saved = layer.forward(ex, as_matrix(x, tokens, width), w.view(), as_matrix(y, tokens, width), options);
        const auto& route = saved.routing();
        const std::vector<int32_t> now(route.experts.data_handle(), route.experts.data_handle() + route.choices());
        if (ids.empty()) ids = now;
        REQUIRE_EQ(ids, now); // the step must not change a choice
        double sum = 0;
        for (std::size_t i = 0; i < y.size(); ++i) sum += y[i] * direction[i];
        return sum;
    };
    const auto saved = layer.forward(ex, as_matrix(x, tokens, width), w.view(), as_matrix(y, tokens, width), options);
    layer.backward(ex, saved, as_matrix(direction, tokens, width), w.view(), as_matrix(dx, tokens, width), g.view());
    const auto& route = saved.routing();
    for (int64_t t = 0; t < tokens; ++t) {
        bool served = false;
        for (int64_t c = route.begin(t); c < route.end(t); ++c) served |= route.experts(c) >= 0;
        if (mask[t] == 0) REQUIRE(!served);
        for (int64_t d = 0; d < width && !served; ++d) REQUIRE_EQ(y[t * width + d], 0.0);
    }
    const auto expected = support::finite_difference(value, x, 1e-4);
    for (std::size_t i = 0; i < dx.size(); ++i) {
        CAPTURE(i);
        REQUIRE(std::fabs(dx[i] - expected[i]) < 1e-8);
    }
    auto router = w.view().gate, drouter = g.view().gate;
    std::vector<double> rows(router.data_handle(), router.data_handle() + gate.experts * width);
    const auto drows = support::finite_difference(
        [&] {
            std::copy(rows.begin(), rows.end(), router.data_handle());
            return value();
        },
        rows, 1e-4);
    for (std::size_t i = 0; i < rows.size(); ++i) {
        CAPTURE(i);
        REQUIRE(std::fabs(drouter.data_handle()[i] - drows[i]) < 1e-8);
    }
    std::vector<double> inferred(y.size());
    layer.infer(ex, as_matrix(x, tokens, width), w.view(), as_matrix(inferred, tokens, width), options);
    for (double v : inferred) REQUIRE(std::isfinite(v));
}

} // namespace

TEST_CASE("a layer whose experts choose their tokens trains, and gives nothing to a token that none has chosen")
{
    FASTMOE_SEEDED(rng, 111);
    has_gradients(rng, expert_choice_gate{.experts = 4, .k = 1}, 11);
    has_gradients(rng, expert_choice_gate{.experts = 3, .k = 3}, 6); // masked tokens leave room that nobody fills
}

TEST_CASE("a layer with rounded choices trains, with room that nobody fills")
{
    FASTMOE_SEEDED(rng, 112);
    for (auto way : {tile_rounding::nearest, tile_rounding::up, tile_rounding::down})
        has_gradients(rng, token_rounding_gate{.experts = 4, .k = 2, .assignment = {.tile = 3, .rounding = way}}, 11);
}

TEST_CASE("a layer behind Sinkhorn's scaling trains through the weights alone")
{
    FASTMOE_SEEDED(rng, 113);
    has_gradients(rng, sinkhorn_gate{.experts = 4, .k = 1}, 10);
    has_gradients(rng, sinkhorn_softmax_gate{.experts = 4, .k = 2}, 10);
}

TEST_CASE("a layer behind a balanced assignment trains through the weights alone")
{
    FASTMOE_SEEDED(rng, 114);
    has_gradients(rng, base_gate{.experts = 3}, 11);
}

TEST_CASE("capacity bounds ragged choices too, by weight")
{
    FASTMOE_SEEDED(rng, 115);
    const capacity half{.factor = 0.5, .order = drop_order::by_weight};
    has_gradients(rng, expert_choice_gate{.experts = 4, .k = 2, .capacity = half}, 12);
    has_gradients(rng, token_rounding_gate{.experts = 4, .k = 2, .capacity = {.factor = 0.6, .weights = after_drop::rescale},
                                    .assignment = {.tile = 2}}, 12);
}
