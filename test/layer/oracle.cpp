// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "support/compare_layer.hpp"

using namespace fastmoe;
using compare_layer::setting;
using act = support::reference::activation;

namespace {

setting random_setting(support::random& r, bool losses, bool capacity)
{
    setting s{r.one_of<int64_t>(1, 9, r.integer(2, 60)), r.integer(1, 33), r.integer(1, 40), r.integer(2, 9), 0};
    s.k = r.integer(2, s.experts);
    s.biases = r.coin();
    s.weigh = r.one_of(weigh_at::output, weigh_at::activation, weigh_at::input);
    s.scale = r.one_of(1.0, 2.5);
    if (losses) s.balance = 0.1, s.z = 0.02;
    if (capacity) s.capacity = {r.one_of(0.0, 0.4, 0.9, 1.5), r.one_of(drop_order::token_major, drop_order::choice_major, drop_order::by_weight)};
    return s;
}

} // namespace

TEST_CASE_TEMPLATE("a layer with softmax over the chosen gives the oracle's values and gradients", Cell, FASTMOE_CELLS)
{
    FASTMOE_SEEDED(r, 41);
    for (int round = 0; round < 8; ++round)
        compare_layer::compare<Cell, renormalize, swiglu>(r, random_setting(r, round % 2, false), act::swiglu);
}

TEST_CASE_TEMPLATE("a layer with softmax before the choice gives the oracle's values and gradients", Cell, FASTMOE_CELLS)
{
    FASTMOE_SEEDED(r, 42);
    for (int round = 0; round < 8; ++round) {
        auto s = random_setting(r, round % 2, round % 3 == 0);
        if (round < 2) s.k = 1; // Switch
        compare_layer::compare<Cell, raw_scores, gelu>(r, s, act::gelu);
    }
}

TEST_CASE_TEMPLATE("a layer with capacity gives the oracle's values and gradients", Cell, FASTMOE_CELLS)
{
    FASTMOE_SEEDED(r, 43);
    for (int round = 0; round < 8; ++round)
        compare_layer::compare<Cell, renormalize, swiglu>(r, random_setting(r, true, true), act::swiglu);
}

TEST_CASE_TEMPLATE("the corners of the shape give the oracle's values and gradients", Cell, FASTMOE_CELLS)
{
    FASTMOE_SEEDED(r, 44);
    const auto run = [&](setting s) { compare_layer::compare<Cell, raw_scores, gelu>(r, s, act::gelu); };
    run({.tokens = 0, .width = 8, .hidden = 8, .experts = 4, .k = 2});                    // T = 0
    run({.tokens = 1, .width = 8, .hidden = 8, .experts = 4, .k = 2, .balance = 0.1});    // T = 1
    run({.tokens = 20, .width = 8, .hidden = 12, .experts = 5, .k = 5, .balance = 0.1});  // K = E
    run({.tokens = 20, .width = 8, .hidden = 12, .experts = 1, .k = 1, .z = 0.1});        // E = 1
    run({.tokens = 30, .width = 6, .hidden = 4, .experts = 1000, .k = 2});                // E = 1000: most experts have no token
    run({.tokens = 30, .width = 6, .hidden = 4, .experts = 4, .k = 2, .capacity = {0.0}}); // everything is dropped: y is zero
    run({.tokens = 200, .width = 1, .hidden = 1, .experts = 3, .k = 2});
}
