// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// R ranks compute what the oracle says of one rank on the joined batch: the exact exchange, in every dtype and setting.
#include <doctest/doctest.h>

#include "support/ranked_layer.hpp"

using namespace fastmoe;

namespace {

using gate_type = top_k_gate<>;
constexpr gate_type small_gate{.experts = 5, .k = 2, .balance = {0.1}, .z = {0.05}};
constexpr mlp<swiglu> small_expert{.width = 12, .hidden = 8, .biases = true};
const auto plain = [](const threads& c) { return c; };

} // namespace

TEST_CASE_TEMPLATE("the exact exchange gives the joined batch's outputs and gradients for 1 to 8 ranks", Cell,
                   FASTMOE_COLUMN(host_executor))
{
    FASTMOE_SEEDED(rng, 501);
    const auto batch = ranked::join<Cell>(rng, small_gate, small_expert, 40);
    for (const int ranks : {1, 2, 3, 4, 8}) {
        INFO("ranks ", ranks);
        for (const bool workspaces : {false, true})
            batch.check({.cuts = ranked::random_cuts(rng, ranks, 40), .workspaces = workspaces, .two_calls = workspaces}, plain);
    }
}

TEST_CASE_TEMPLATE("so it does for capacities of a rank and of all, masks, and weights on the input or the activation", Cell,
                   FASTMOE_WIDEST_AND_NARROW(host_executor))
{
    FASTMOE_SEEDED(rng, 502);
    for (const auto over : {capacity_scope::one_rank, capacity_scope::all_ranks})
        for (const auto after : {after_drop::keep, after_drop::rescale}) {
            gate_type gate = small_gate;
            gate.capacity = {.factor = 0.8, .weights = after, .over = over};
            const auto batch = ranked::join<Cell>(rng, gate, small_expert, 37);
            for (const int ranks : {2, 3}) batch.check({.cuts = ranked::random_cuts(rng, ranks, 37)}, plain);
        }
    for (const auto where : {weigh_at::input, weigh_at::activation}) {
        mlp<swiglu> expert = small_expert;
        expert.weigh = where;
        const auto batch = ranked::join<Cell>(rng, small_gate, expert, 23, /*masked=*/true);
        for (const int ranks : {2, 4}) batch.check({.cuts = ranked::random_cuts(rng, ranks, 23)}, plain);
    }
}

TEST_CASE_TEMPLATE("received rows may be fetched again instead of kept", Cell, support::cell<host_executor, float>)
{
    FASTMOE_SEEDED(rng, 503);
    const auto batch = ranked::join<Cell>(rng, small_gate, small_expert, 31);
    for (const bool two_calls : {false, true})
        batch.check({.cuts = {0, 11, 11, 31}, .workspaces = two_calls, .two_calls = two_calls}, [](const threads& c) {
            return expert_parallel{c, c, block_placement{}, exact_exchange<>{}, 1, received_rows::fetch_again};
        });
}

TEST_CASE_TEMPLATE("no token at all, one token, and all tokens on one expert", Cell, support::cell<host_executor, float>)
{
    FASTMOE_SEEDED(rng, 504);
    ranked::join<Cell>(rng, small_gate, small_expert, 0).check({.cuts = {0, 0, 0, 0}}, plain);
    ranked::join<Cell>(rng, small_gate, small_expert, 1).check({.cuts = {0, 0, 1}}, plain);
    auto crowded = ranked::join<Cell>(rng, small_gate, small_expert, 50);
    for (int64_t e = 0; e < 5; ++e) crowded.model.gate_bias[e] = 40 - 2.0 * double(e);
    crowded.check({.cuts = {0, 25, 50}}, plain);
    crowded.check({.cuts = {0, 10, 20, 30, 40, 50}}, plain);
}

TEST_CASE_TEMPLATE("teams of many lanes, whose memory the host does not read, give the same", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_NEEDS(Cell);
    FASTMOE_SEEDED(rng, 505);
    const auto batch = ranked::join<Cell>(rng, small_gate, small_expert, 12);
    batch.check({.cuts = {0, 7, 12}}, plain);
    batch.check({.cuts = {0, 7, 7, 12}, .workspaces = true, .two_calls = true}, plain);
}
