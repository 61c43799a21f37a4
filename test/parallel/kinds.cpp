// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Every exchange with every placement against the oracle of the joined batch.
#include <doctest/doctest.h>

#include "support/ranked_layer.hpp"

using namespace fastmoe;

namespace {

using gate_type = top_k_gate<>;
constexpr gate_type small_gate{.experts = 5, .k = 2, .balance = {0.1}, .z = {0.05}};
constexpr mlp<swiglu> small_expert{.width = 12, .hidden = 8, .biases = true};

/// Every placement of the five experts.
template <class Exchange, class Batch>
void every_placement(const Batch& batch, const ranked::division& d, const Exchange& exchange)
{
    batch.check(d, [&](const threads& c) { return expert_parallel{c, c, block_placement{}, exchange}; });
    batch.check(d, [&](const threads& c) { return expert_parallel{c, c, round_robin_placement{}, exchange}; });
    host_executor ex({.threads = 1});
    const std::vector<int32_t> group_of{1, 0, 1, 1, 0}; // of two or more ranks; others have none
    const placement_map map(ex, as_vector(group_of), d.ranks());
    batch.check(d, [&](const threads& c) { return expert_parallel{c, c, map.placement(), exchange}; });
}

} // namespace

TEST_CASE_TEMPLATE("every exchange with every placement gives the joined batch's outputs and gradients", Cell,
                   FASTMOE_WIDEST_AND_NARROW(host_executor))
{
    FASTMOE_SEEDED(rng, 511);
    const auto batch = ranked::join<Cell>(rng, small_gate, small_expert, 40);
    for (const int ranks : {2, 3, 8}) {
        INFO("ranks ", ranks);
        const auto cuts = ranked::random_cuts(rng, ranks, 40);
        every_placement(batch, {.cuts = cuts}, exact_exchange<>{});
        every_placement(batch, {.cuts = cuts}, padded_exchange<>{.rows_per_rank = 40});
        every_placement(batch, {.cuts = cuts}, gathered_exchange<>{});
        every_placement(batch, {.cuts = cuts}, gathered_exchange<>{.most_tokens = 40});
    }
}

TEST_CASE_TEMPLATE("so do workspaces, rows that are fetched again, capacities and masks", Cell,
                   support::cell<host_executor, double>)
{
    FASTMOE_SEEDED(rng, 512);
    gate_type gate = small_gate;
    gate.capacity = {.factor = 0.9, .over = capacity_scope::all_ranks};
    const auto batch = ranked::join<Cell>(rng, gate, small_expert, 33, /*masked=*/true);
    const ranked::division d{.cuts = {0, 20, 20, 33}, .workspaces = true, .two_calls = true};
    batch.check(d, [](const threads& c) {
        return expert_parallel{c, c, block_placement{}, padded_exchange<>{.rows_per_rank = 20}, 1, received_rows::fetch_again};
    });
    batch.check(d, [](const threads& c) {
        return expert_parallel{c, c, block_placement{}, gathered_exchange<>{}, 1, received_rows::fetch_again};
    });
    const auto none = ranked::join<Cell>(rng, gate, small_expert, 0);
    none.check({.cuts = {0, 0, 0}}, [](const threads& c) { return expert_parallel{c, c, block_placement{}, padded_exchange<>{}}; });
    none.check({.cuts = {0, 0, 0}}, [](const threads& c) { return expert_parallel{c, c, block_placement{}, gathered_exchange<>{}}; });
}

TEST_CASE_TEMPLATE("on teams of many lanes too", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_NEEDS(Cell);
    FASTMOE_SEEDED(rng, 513);
    const auto batch = ranked::join<Cell>(rng, small_gate, small_expert, 10);
    const ranked::division d{.cuts = {0, 6, 10}};
    batch.check(d, [](const threads& c) {
        return expert_parallel{c, c, round_robin_placement{}, padded_exchange<>{.rows_per_rank = 7}};
    });
    batch.check(d, [](const threads& c) { return expert_parallel{c, c, round_robin_placement{}, gathered_exchange<>{}}; });
    batch.check(d, [](const threads& c) {
        return expert_parallel{c, c, round_robin_placement{}, gathered_exchange<>{.most_tokens = 6}, 1, received_rows::fetch_again};
    });
}
