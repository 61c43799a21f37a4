// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// R ranks compute what the oracle says of one rank on the joined batch: for every exchange and every placement.
#include <doctest/doctest.h>

#include "support/ranked_layer.hpp"

using namespace fastmoe;

namespace {

using gate_type = top_k_gate<>;
using expert_type = mlp<swiglu>;

constexpr gate_type small_gate{.experts = 5, .k = 2, .balance = {0.1}, .z = {0.05}};
constexpr expert_type small_expert{.width = 12, .hidden = 8, .biases = true};

} // namespace

TEST_CASE_TEMPLATE("the exact exchange gives the joined batch's outputs and gradients for 1 to 8 ranks", Cell,
                   support::cell<host_executor, double>, support::cell<host_executor, float>,
                   support::cell<host_executor, bfloat16>, support::cell<host_executor, fastmoe::half>)
{
    FASTMOE_SEEDED(rng, 501);
    const auto batch = ranked::join<Cell>(rng, small_gate, small_expert, 40);
    for (const int ranks : {1, 2, 3, 4, 8}) {
        INFO("ranks ", ranks);
        for (const bool workspaces : {false, true})
            batch.check({.cuts = ranked::random_cuts(rng, ranks, 40), .workspaces = workspaces, .two_calls = workspaces},
                        [](const threads& c) { return c; });
    }
}
