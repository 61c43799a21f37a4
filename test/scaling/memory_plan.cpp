// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <fastmoe/layer/owned_weights.hpp>

#include "scaling/layer_memory.hpp"

using namespace scaling;
namespace fm = fastmoe;
using doctest::Approx;

namespace {

const model small{.layers = 3, .width = 10, .hidden = 8, .experts = 6, .k = 2, .vocabulary = 100, .kv_width = 4, .matrices = 3};

} // namespace

TEST_CASE("parameters are the sums of the matrices that a model has")
{
    // A block: q 10x10, o 10x10, k and v 10x4, two norms of 10, a router of 6x10; the model: embedding and head 100x10, a norm.
    CHECK_EQ(small.dense_parameters(), 3 * (100 + 100 + 40 + 40 + 20 + 60) + 2 * 1000 + 10);
    CHECK_EQ(small.expert_parameters(), 3 * 6 * (3 * 10 * 8));
    CHECK_EQ(small.parameters(), small.dense_parameters() + small.expert_parameters());
    model plain = small;
    plain.matrices = 2;
    CHECK_EQ(plain.expert_parameters(), 3 * 6 * (2 * 10 * 8));
}

TEST_CASE("the experts of a block count as many parameters as the library's layer has")
{
    const fm::moe_layer layer{fm::top_k_gate<fm::softmax_score>{.experts = 6, .k = 2}, fm::mlp<fm::swiglu>{.width = 10, .hidden = 8},
                              fm::self{}};
    fm::host_executor ex({.threads = 1});
    const auto weights = fm::zero_weights<float>(ex, layer);
    const auto& e = weights.view().expert;
    const auto size = [](const auto& w) { return static_cast<double>(w.experts * w.out * w.in); };
    CHECK_EQ(3 * (size(e.up) + size(e.down)), small.expert_parameters());
    CHECK_EQ(weights.view().gate.extent(0) * weights.view().gate.extent(1), 6 * 10);
}

TEST_CASE("each rank holds all dense parameters and its share of the experts, the fullest one a whole more if they do not divide")
{
    const precision p{.weight = 2, .gradient = 4, .optimizer = 12};
    const activations a{.attention = 1000, .moe = 2000, .input = 100, .working = 7};
    const double dense = small.dense_parameters(), expert = 3 * 3 * 10 * 8; // one expert of every block
    const struct {
        int ranks, experts, slices;
    } cases[] = {{1, 6, 1}, {2, 3, 1}, {4, 2, 1}, {5, 2, 1}, {6, 1, 1}, {12, 1, 2}, {48, 1, 8}};
    for (const auto& c : cases) {
        INFO(c.ranks, " ranks");
        CHECK_EQ(slices_of(small, c.ranks), c.slices);
        const auto m = memory_of(small, p, a, c.ranks, dense_optimizer::replicated, block_activations::kept);
        CHECK_EQ(m.experts, c.experts);
        CHECK_EQ(m.dense_weights, 2 * dense);
        CHECK_EQ(m.dense_gradients, 4 * dense);
        CHECK_EQ(m.dense_state, 12 * dense);
        CHECK_EQ(m.expert_weights, Approx(2 * expert * c.experts / c.slices));
        CHECK_EQ(m.expert_gradients, Approx(4 * expert * c.experts / c.slices));
        CHECK_EQ(m.expert_state, Approx(12 * expert * c.experts / c.slices));
        CHECK_EQ(m.activations, 3 * (1000 + 2000) + 7);
        CHECK_EQ(m.total(), Approx(18 * (dense + expert * c.experts / c.slices) + 9007));
        const auto less = memory_of(small, p, a, c.ranks, dense_optimizer::sharded, block_activations::recomputed);
        CHECK_EQ(less.dense_state, Approx(12 * dense / c.ranks));
        CHECK_EQ(less.activations, 3 * 100 + 1000 + 2000 + 7);
        CHECK_EQ(less.expert_state, m.expert_state);
    }
    CHECK_EQ(slices_of(small, 8), 0);  // 6 experts do not share 8 ranks
    CHECK_EQ(slices_of(small, 96), 0); // H 8 cannot be cut in 16
}

TEST_CASE("a block keeps what the layer's own query says, and the rows that come from other ranks")
{
    const model m{.layers = 2, .width = 64, .hidden = 96, .experts = 8, .k = 2, .vocabulary = 1000, .kv_width = 16, .matrices = 3};
    using T = fm::bfloat16;
    const fm::moe_layer layer{fm::top_k_gate<fm::softmax_score>{.experts = 8, .k = 2}, fm::mlp<fm::swiglu>{.width = 64, .hidden = 96},
                              fm::self{}};
    const std::int64_t tokens = 128;
    const auto alone = activations_of(m, tokens, 1), four = activations_of(m, tokens, 4), all = activations_of(m, tokens, 8);
    CHECK_EQ(alone.moe, static_cast<double>(layer.saved_bytes<T>(tokens, 64)));
    // mlp keeps the pre-activation, 2 H of 2 bytes for each of T K rows; routing and plan are small beside it.
    CHECK(alone.moe >= 128 * 2 * 2 * 96 * 2);
    CHECK(alone.moe < 1.35 * 128 * 2 * 2 * 96 * 2);
    CHECK_EQ(four.moe - alone.moe, Approx(128 * expected_crossings(4, 8, 2) * 64 * 2));
    CHECK_EQ(all.moe - alone.moe, Approx(128 * 2 * 7.0 / 8 * 64 * 2)); // an expert a rank: each choice is elsewhere 7 times of 8
    CHECK_EQ(alone.attention, 128 * (6 * 64 + 2 * 16) * 2);
    CHECK_EQ(alone.input, 128 * 64 * 2);
    CHECK(alone.working >= 128 * 1000 * 4);
    // Twice the ranks that there are experts: half of the hidden width, for twice the rows.
    const auto sliced = activations_of(m, tokens, 16);
    const fm::moe_layer half{fm::top_k_gate<fm::softmax_score>{.experts = 8, .k = 2}, fm::mlp<fm::swiglu>{.width = 64, .hidden = 48},
                             fm::self{}};
    CHECK_EQ(sliced.moe, Approx(static_cast<double>(half.saved_bytes<T>(256, 64)) + 256 * 2 * 7.0 / 8 * 64 * 2));
}

TEST_CASE("a trillion parameters take 16 bytes each over all ranks, however many share the experts")
{
    const model m{.layers = 60, .width = 7168, .hidden = 3072, .experts = 256, .k = 8, .vocabulary = 131072, .kv_width = 1024,
                  .matrices = 3};
    CHECK(m.parameters() > 1e12);
    for (const int ranks : {8, 64, 256, 1024}) {
        const auto r = memory_of(m, {}, {}, ranks, dense_optimizer::sharded, block_activations::kept);
        CHECK_EQ(ranks * (r.expert_weights + r.expert_gradients + r.expert_state), Approx(16 * m.expert_parameters()));
        CHECK_EQ(ranks * r.dense_state, Approx(12 * m.dense_parameters()));
    }
}
