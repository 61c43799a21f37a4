// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Experts cut along their hidden width over ranks, more ranks than experts, and groups that the caller splits.
#include <doctest/doctest.h>

#include "support/ranked_layer.hpp"

using namespace fastmoe;

namespace {

using gate_type = top_k_gate<>;
constexpr gate_type small_gate{.experts = 3, .k = 2, .balance = {0.1}, .z = {0.05}};
constexpr mlp<swiglu> small_expert{.width = 12, .hidden = 8, .biases = true};

} // namespace

TEST_CASE_TEMPLATE("slices of a hidden width add up to the expert, for every exchange, with more ranks than experts too", Cell,
                   support::cell<host_executor, double>, support::cell<host_executor, float>)
{
    FASTMOE_SEEDED(rng, 521);
    for (const auto where : {weigh_at::output, weigh_at::input, weigh_at::activation}) {
        mlp<swiglu> expert = small_expert;
        expert.weigh = where;
        const auto batch = ranked::join<Cell>(rng, small_gate, expert, 30);
        const std::pair<int, int> shapes[] = {{2, 2}, {4, 2}, {4, 4}, {6, 2}, {8, 4}, {8, 8}};
        for (const auto& shape : shapes) {
            const int ranks = shape.first, s = shape.second;
            INFO("ranks ", ranks, ", slices ", s);
            const ranked::division d{.cuts = ranked::random_cuts(rng, ranks, 30), .slices = s, .two_calls = ranks == 4};
            batch.check(d, [s](const threads& c) { return expert_parallel{c, c, block_placement{}, exact_exchange<>{}, s}; });
            if (where != weigh_at::output) continue;
            batch.check(d, [s](const threads& c) {
                return expert_parallel{c, c, round_robin_placement{}, padded_exchange<>{.rows_per_rank = 30}, s};
            });
            batch.check(d, [s](const threads& c) { return expert_parallel{c, c, block_placement{}, gathered_exchange<>{}, s}; });
        }
    }
}

TEST_CASE_TEMPLATE("slices do so on teams of many lanes", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_NEEDS(Cell);
    FASTMOE_SEEDED(rng, 522);
    const auto batch = ranked::join<Cell>(rng, small_gate, small_expert, 11);
    const ranked::division d{.cuts = {0, 4, 4, 9, 11}, .slices = 2};
    batch.check(d, [](const threads& c) { return expert_parallel{c, c, block_placement{}, exact_exchange<>{}, 2}; });
    batch.check(d, [](const threads& c) {
        return expert_parallel{c, c, round_robin_placement{}, padded_exchange<>{.rows_per_rank = 5}, 2};
    });
}

TEST_CASE("an expert that cannot be cut, and slices that do not divide the ranks, are refused before anything is sent")
{
    run_ranks(3, [](const threads& c) {
        host_executor ex({.threads = 1});
        std::vector<float> x(4 * 6), y(4 * 6);
        const auto text_of = [&](const auto& expert, int slices) {
            const moe_layer layer{gate_type{.experts = 3, .k = 1}, expert,
                                  expert_parallel{c, c, block_placement{}, exact_exchange<>{}, slices}};
            return support::message_of<invalid_argument>([&] {
                const auto w = random_weights<float>(ex, layer, 1);
                layer.infer(ex, as_matrix(x, 4, 6), w.view(), as_matrix(y, 4, 6));
            });
        };
        CHECK(support::has(text_of(mlp<swiglu>{.width = 6, .hidden = 4}, 2), "slices is 2; expected a divisor of the group's 3 ranks"));
        CHECK(support::has(text_of(linear<>{.width = 6}, 3), "slices is 3; expected 1: the expert has no later_slice()"));
    });
}

TEST_CASE("replicas of the experts: groups of two in a world of four, with losses and capacity over the world")
{
    FASTMOE_SEEDED(rng, 522);
    using Cell = support::cell<host_executor, double>;
    gate_type gate = small_gate;
    gate.capacity = {.factor = 0.9, .over = capacity_scope::all_ranks};
    const auto batch = ranked::join<Cell>(rng, gate, small_expert, 36);
    const ranked::division d{.cuts = {0, 10, 16, 30, 36}};
    std::vector<ranked::part<double>> parts(4);
    run_ranks(4, [&](const threads& world) {
        host_executor ex({.threads = 1});
        const threads group = world.split(world.rank() / 2, world.rank());
        const expert_parallel both{group, world};
        parts[world.rank()] = batch.run_rank(ex, both, d, d.cuts[world.rank()], d.cuts[world.rank() + 1] - d.cuts[world.rank()]);
    });
    // The replicas' gradients and counts are sums over them: fold the second group into the first.
    for (std::size_t r = 0; r < 2; ++r) {
        REQUIRE_EQ(parts[r].global, parts[r + 2].global);
        for (std::size_t l = 0; l < parts[r].global.size(); ++l) {
            for (auto member : ranked::members)
                for (std::size_t i = 0; i < (parts[r].gradients[l].*member).size(); ++i)
                    (parts[r].gradients[l].*member)[i] += (parts[r + 2].gradients[l].*member)[i];
            parts[r].counts[l] += parts[r + 2].counts[l];
        }
        parts[r + 2].global.clear();
    }
    batch.judge(d, parts);
}
