// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Several types of experts in one layer: those that apply the routing weights, and those that do not, beside each other.
#include <doctest/doctest.h>

#include "support/compare_layer.hpp"
#include "support/layer_step.hpp"

using namespace fastmoe;
using compare_layer::check;
using compare_layer::run;

namespace {

constexpr int64_t width = 9;

mlp<gelu> plain(weigh_at weigh, int64_t hidden)
{
    return {.width = width, .hidden = hidden, .biases = true, .weigh = weigh};
}
mlp<swiglu> gated(weigh_at weigh, int64_t hidden)
{
    return {.width = width, .hidden = hidden, .biases = true, .weigh = weigh, .layout = gated_layout::interleaved};
}
/// Three kinds of mlp, two of them of one type.
auto three_mlps(weigh_at weigh = weigh_at::output)
{
    return expert_tuple(several{gated(weigh, 5), 2}, several{plain(weigh, 11), 3}, several{gated(weigh, 3), 1});
}
/// Linear experts on either side of an mlp.
auto linear_and_mlp(weigh_at weigh = weigh_at::output)
{
    const linear<> one{.width = width, .biases = true};
    return expert_tuple(several{one, 2}, several{plain(weigh, 5), 3}, several{one, 1});
}
static_assert(decltype(linear_and_mlp())::applies_weights);

const top_k_gate<> gate{.experts = 6, .k = 3};

} // namespace

TEST_CASE_TEMPLATE("mlps of different types behind one gate give the oracle's values and gradients", Cell, FASTMOE_COLUMN(host_executor),
                   support::cell<support::lanes, float>)
{
    FASTMOE_SEEDED(r, 53);
    for (const auto weigh : {weigh_at::output, weigh_at::activation, weigh_at::input}) {
        check(run<Cell>(r, gate, three_mlps(weigh), {.tokens = 40}));
        check(run<Cell, accumulate_t<typename Cell::type>>(r, gate, three_mlps(weigh),
                                                           {.tokens = 9, .masked = true, .gradients = write_mode::accumulate}));
    }
    check(run<Cell>(r, gate, three_mlps(), {.tokens = 0}));
    check(run<Cell>(r, gate, three_mlps(), {.tokens = 20, .crowded = true})); // a whole type without a token
}

TEST_CASE_TEMPLATE("linear experts on either side of an mlp give the oracle's values and gradients", Cell, FASTMOE_COLUMN(host_executor),
                   support::cell<support::lanes, float>)
{
    FASTMOE_SEEDED(r, 91);
    check(run<Cell>(r, gate, linear_and_mlp(), {.tokens = 40}));
    check(run<Cell>(r, gate, linear_and_mlp(), {.tokens = 20, .crowded = true}));
    check(run<Cell, accumulate_t<typename Cell::type>>(r, gate, linear_and_mlp(),
                                                       {.tokens = 9, .masked = true, .gradients = write_mode::accumulate}));
}

TEST_CASE("a linear expert beside an mlp that applies the weights elsewhere than on the output is refused")
{
    host_executor ex({.threads = 1});
    support::random r(92);
    const moe_layer layer{gate, linear_and_mlp(weigh_at::activation), self{}};
    const auto w = random_weights<float>(ex, layer, 1);
    support::guarded<float> x(3, width), y(3, width);
    support::fill_normal(r, x.view());
    const auto text = support::message_of<invalid_argument>([&] { layer.infer(ex, x.view(), w.view(), y.view()); });
    CHECK_MESSAGE(support::has(text, "weighs_output() of the first expert is "), text);
    CHECK_EQ(support::poisoned(y.view()), 3 * width);
}

TEST_CASE_TEMPLATE("a layer of several types takes the memory that it says, and with the caller's workspace none", T, float, bfloat16)
{
    support::check_memory<T>(three_mlps(), 6);
    support::check_memory<T>(linear_and_mlp(), 6);
}

TEST_CASE("a pair keeps what its types keep, each for all slots, and the outputs of those that apply no weights")
{
    const auto pair = expert_tuple(several{linear<>{.width = 64}, 2}, several{mlp<gelu>{.width = 64, .hidden = 128}, 2});
    arena all;
    pair.reserve_saved<float>(all, 512);
    CHECK_EQ(all.bytes(), 512 * (64 + 128) * 4);
    const moe_layer layer{top_k_gate<>{.experts = 4, .k = 2}, pair, self{}};
    CHECK_EQ(layer.saved_bytes<float>(256, 64), support::routing_bytes<float>(layer.gate, 256) + all.bytes());
}
