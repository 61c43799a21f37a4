// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Random shapes, cuts, placements, exchanges, slices and chunks, each against the oracle of the joined batch.
#include <doctest/doctest.h>

#include "support/ranked_layer.hpp"

using namespace fastmoe;

namespace {

using Cell = support::cell<host_executor, double>;

/// A map of the caller's: experts anywhere, some groups empty.
struct random_placement {
    std::vector<expert_place> places;

    random_placement(support::random& r, int64_t experts, int groups)
    {
        std::vector<int32_t> taken(static_cast<std::size_t>(groups));
        for (int64_t e = 0; e < experts; ++e) {
            const auto g = static_cast<int32_t>(r.integer(0, groups - 1));
            places.push_back({g, taken[g]++});
        }
    }
    mapped_placement view() const { return {vector_view<const expert_place>(places.data(), int64_t(places.size()))}; }
};

} // namespace

TEST_CASE("sixty random scenes give the joined batch's outputs and gradients")
{
    FASTMOE_SEEDED(rng, 561);
    for (int scene = 0; scene < 60; ++scene) {
        const int ranks = static_cast<int>(rng.integer(1, 6));
        std::vector<int> divisors;
        for (int s = 1; s <= ranks; ++s)
            if (ranks % s == 0) divisors.push_back(s);
        const int slices = divisors[static_cast<std::size_t>(rng.integer(0, int64_t(divisors.size()) - 1))];
        top_k_gate<softmax_score, top_k, raw_scores> gate{.experts = rng.integer(1, 9), .balance = {0.1}, .z = {0.02}};
        gate.k = rng.integer(1, std::min<int64_t>(gate.experts, 4));
        if (rng.coin(0.4)) gate.capacity = {.factor = 0.5 + double(rng.integer(0, 10)) / 10, .over = rng.coin(0.5) ? capacity_scope::all_ranks : capacity_scope::one_rank};
        const mlp<swiglu> expert{.width = rng.integer(1, 20), .hidden = slices * rng.integer(1, 6), .biases = rng.coin(0.5),
                                 .weigh = rng.coin(0.5) ? weigh_at::output : (rng.coin(0.5) ? weigh_at::input : weigh_at::activation)};
        const int64_t tokens = rng.integer(0, 50);
        const auto batch = ranked::join<Cell>(rng, gate, expert, tokens, rng.coin(0.3));
        const ranked::division d{.cuts = ranked::random_cuts(rng, ranks, tokens), .slices = slices, .workspaces = rng.coin(0.5), .two_calls = rng.coin(0.5)};
        const random_placement map(rng, gate.experts, ranks / slices);
        const auto rows = rng.coin(0.5) ? received_rows::keep : received_rows::fetch_again;
        const int chunks = static_cast<int>(rng.coin(0.5) ? 1 : rng.integer(2, 8)), kind = static_cast<int>(rng.integer(0, 2));
        INFO("scene ", scene, ", ranks ", ranks, ", slices ", slices, ", experts ", gate.experts, ", k ", gate.k, ", tokens ", tokens,
             ", width ", expert.width, ", hidden ", expert.hidden, ", chunks ", chunks, ", exchange ", kind);
        const auto with = [&](const auto& exchange) {
            batch.check(d, [&](const threads& c) { return expert_parallel{c, c, map.view(), exchange, slices, rows, chunks}; });
        };
        if (kind == 0) with(exact_exchange<>{});
        else if (kind == 1) with(padded_exchange<>{.rows_per_rank = tokens + 1});
        else with(gathered_exchange<>{});
    }
}
