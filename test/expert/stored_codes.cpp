// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// An mlp whose weights are stored as codes, on its own: for inference, and refused before anything is written where scales are missing.
#include <doctest/doctest.h>

#include <fastmoe/expert/mlp.hpp>
#include <fastmoe/gemm/hopper_fp8.hpp>

#include "support/expert_weights.hpp"
#include "support/poison.hpp"
#include "support/routed.hpp"

using namespace fastmoe;

namespace {

using expert_type = mlp<swiglu, gemm::hopper_fp8_stored>;
static_assert(expert_policy<expert_type, host_executor, bfloat16> && !trainable_expert<expert_type, host_executor, bfloat16>);

} // namespace

TEST_CASE("scales that are missing are refused before anything is written")
{
    constexpr int64_t tokens = 9, width = 16, hidden = 32, experts = 3;
    host_executor ex{{.threads = 2}};
    support::random r{123};
    const expert_type expert{.width = width, .hidden = hidden};
    const support::routed<host_executor, bfloat16> in(ex, r, {.tokens = tokens, .experts = experts, .k = 2, .dropped = 0});
    support::guarded<bfloat16> x(tokens, width), y(in.plan.slots, width), pre(in.plan.slots, 2 * hidden);
    support::fill_normal(r, x.view());
    support::workspace<host_executor> memory(ex, 1 << 18);
    const auto w = expert.reserve_weights<bfloat16>(memory, experts);
    mlp<swiglu> numbers{.width = width, .hidden = hidden};
    const auto from = numbers.reserve_weights<bfloat16>(memory, experts);
    numbers.initialize(ex, from, 1);
    quantize_weights(ex, from.up, w.up);
    quantize_weights(ex, from.down, w.down);
    const expert_input<bfloat16> input{{x.view(), in.plan.token_of}, in.plan.groups(), in.route.weights, in.plan.choice_of};
    const auto forward = [&](const auto& weights) { expert.forward(ex, input, weights, {pre.view()}, y.view(), memory); };
    for (const bool up : {false, true}) {
        auto without = w;
        (up ? without.up : without.down).scales = nullptr;
        const int64_t used = memory.arena().used();
        CHECK_THROWS_WITH_AS(forward(expert_type::weights<const bfloat16>(without)), doctest::Contains(up ? "weights.up" : "weights.down"), invalid_argument);
        CHECK(memory.arena().used() == used);
        CHECK(support::poisoned(pre.vector()) == in.plan.slots * 2 * hidden);
        CHECK(support::poisoned(y.vector()) == in.plan.slots * width);
    }
    forward(expert_type::weights<const bfloat16>(w));
    CHECK(support::poisoned(pre.vector()) == 0);
    CHECK(support::poisoned(y.vector()) == 0);
}
