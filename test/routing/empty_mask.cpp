// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// A mask without elements is none, whatever its pointer: that of an empty vector may be one to old content.
#include <doctest/doctest.h>

#include <cstdint>
#include <vector>

#include <fastmoe/moe.hpp>

#include "support/compare.hpp"
#include "support/random.hpp"

using namespace fastmoe;

namespace {

template <class Gate>
void ignores_it(const Gate& gate)
{
    FASTMOE_SEEDED(r, 1701);
    constexpr int64_t tokens = 12, width = 8;
    host_executor ex({.threads = 1});
    const moe_layer layer{gate, mlp<swiglu>{.width = width, .hidden = 4}};
    const auto w = random_weights<float>(ex, layer, 1);
    const auto x = support::normal_vector<float>(r, tokens * width);
    std::vector<float> without(tokens * width, -7.f), with = without;
    std::vector<std::uint8_t> mask(tokens, 0); // all masked, if somebody reads it
    layer.infer(ex, as_matrix(x, tokens, width), w.view(), as_matrix(without, tokens, width));
    layer.infer(ex, as_matrix(x, tokens, width), w.view(), as_matrix(with, tokens, width),
                {.mask = vector_view<const std::uint8_t>(mask.data(), 0)});
    CHECK(support::same_bits(with, without));
    double size = 0;
    for (const float v : without) size += v * v;
    CHECK(size > 0);
}

} // namespace

TEST_CASE("a mask without elements is none, for every router that takes one")
{
    ignores_it(top_k_gate<>{.experts = 4, .k = 2});
    ignores_it(noisy_gate{.experts = 4, .k = 2});
    ignores_it(cosine_gate<>{.experts = 4, .k = 2, .projection_width = 4});
    ignores_it(expert_choice_gate{.experts = 4, .k = 2});
    ignores_it(token_rounding_gate{.experts = 4, .k = 2});
    ignores_it(sinkhorn_gate{.experts = 4, .k = 1});
    ignores_it(sinkhorn_softmax_gate{.experts = 4, .k = 1});
    ignores_it(base_gate{.experts = 4, .k = 1});
    ignores_it(swipe_gate{.experts = 4, .k = 2});
    ignores_it(topology_gate{.experts = 4, .k = 2});
}
