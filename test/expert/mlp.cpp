// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include "support/expert_weights.hpp"
#include "support/poison.hpp"
#include "support/routed.hpp"

using namespace fastmoe;

TEST_CASE("an mlp keeps its pre-activation and nothing else")
{
    arena plain, gated;
    mlp<gelu>{.width = 512, .hidden = 2048}.reserve_saved<float>(plain, 640);
    CHECK(plain.bytes() == 640 * 2048 * 4);
    mlp<swiglu>{.width = 512, .hidden = 2048}.reserve_saved<bfloat16>(gated, 640);
    CHECK(gated.bytes() == 640 * 4096 * 2);
}

TEST_CASE("weights of the wrong shape are refused by name")
{
    host_executor ex({.threads = 1});
    support::random r(5);
    support::routed<host_executor, float> in(ex, r, {.tokens = 6, .experts = 3, .k = 1});
    const mlp<swiglu> right{.width = 8, .hidden = 4, .biases = true};
    using memory = support::expert_memory<float, mlp<swiglu>, host_executor>;
    const memory w(ex, right, memory::draw(r, right, 3));
    support::guarded<float> x(6, 8), y(in.plan.slots, 8);
    const expert_input<float> input{{x.view(), in.plan.token_of}, in.plan.groups(), in.route.weights, in.plan.choice_of};
    const auto text = [&](const auto& expert, mlp_weights<const float> weights) {
        support::workspace memory(ex, 1 << 20);
        return support::message_of<invalid_argument>([&] { expert.infer(ex, input, weights, y.view(), memory); });
    };
    CHECK(support::has(text(mlp<swiglu>{.width = 8, .hidden = 5}, w.views()), "weights.up (E,H',D) is 8; expected 10 output"));
    CHECK(support::has(text(mlp<swiglu>{.width = 7, .hidden = 4}, w.views()), "x (T,D) is of shape (6,8); expected (6,7)"));
    CHECK(support::has(text(mlp<relu>{.width = 8, .hidden = 4}, w.views()), "expected 4 output features"));
    mlp_weights<const float> few = w.views();
    few.down.experts = 2;
    CHECK(support::has(text(right, few), "weights.down (E,D,H) is 2; expected 3 experts"));
    mlp_weights<const float> absent = w.views();
    absent.up.data = nullptr;
    CHECK(support::has(text(right, absent), "weights.up (E,H',D) is a null pointer"));
    mlp_weights<const float> bias = w.views();
    bias.up_bias = matrix_view<const float>(bias.up_bias.data_handle(), 3, 7);
    CHECK(support::has(text(right, bias), "weights.up_bias (E,H') is of shape (3,7); expected (3,8)"));
}
