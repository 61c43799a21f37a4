// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Weights and gradients in every layout, each call in a workspace of exactly the size that the layer asks for them.
#include <doctest/doctest.h>

#include "support/compare_layer.hpp"

using namespace fastmoe;

TEST_CASE_TEMPLATE("weights and gradients in any layout give the oracle's values and gradients, in workspaces that fit to the byte", Cell,
                   FASTMOE_CELLS)
{
    FASTMOE_NEEDS(Cell);
    FASTMOE_SEEDED(r, 45);
    for (const auto order : {gated_layout::concatenated, gated_layout::interleaved})
        compare_layer::layouts<Cell>(r, top_k_gate<>{.experts = 4, .k = 2}, [&](int64_t width, int64_t hidden) {
            return mlp<swiglu>{.width = width, .hidden = hidden, .biases = true, .layout = order};
        });
}

TEST_CASE_TEMPLATE("a layer of the size of a model takes for transposed weights what these need, not what stacked ones would", T, float, bfloat16)
{
    host_executor ex({.threads = 2});
    FASTMOE_SEEDED(r, 103);
    const int64_t tokens = 256, width = 512, hidden = 1024, experts = 4;
    const moe_layer layer{top_k_gate<>{.experts = experts, .k = 2}, mlp<gelu>{.width = width, .hidden = hidden}, self{}};
    const auto stacked_weights = random_weights<T>(ex, layer, 1);
    auto w = stacked_weights.view();
    w.expert.up = stacked_transposed(tensor_view<T, 3>(w.expert.up.data, experts, width, hidden));
    w.expert.down = stacked_transposed(tensor_view<T, 3>(w.expert.down.data, experts, hidden, width));
    CHECK_NE(layer.template infer_bytes<T>(ex, tokens, width, w), layer.template infer_bytes<T>(ex, tokens, width));
    const auto gradients = zero_weights<T>(ex, layer);
    auto g = gradients.view();
    g.expert.up = stacked_transposed(tensor_view<T, 3>(g.expert.up.data, experts, width, hidden));
    support::guarded<T> x(tokens, width), y(tokens, width), dx(tokens, width);
    support::fill_normal(r, x.view());
    layer.infer(ex, x.view(), w, y.view());
    const auto saved = layer.forward(ex, x.view(), w, y.view());
    layer.backward(ex, saved, x.view(), w, dx.view(), g);
    CHECK_EQ(support::poisoned(y.view()) + support::poisoned(dx.view()), 0);
}
