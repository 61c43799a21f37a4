// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A layer whose experts processes share: what each of them writes has the bits of the same rank among threads, and all of it
/// together is what the oracle says of one rank on the joined batch.
#include <doctest/doctest.h>

#include "mpi/world.hpp"
#include "support/ranked_layer.hpp"

using namespace fastmoe;

namespace {

constexpr top_k_gate<> small_gate{.experts = 6, .k = 2, .balance = {0.1}, .z = {0.05}};
constexpr mlp<swiglu> small_expert{.width = 12, .hidden = 8, .biases = true};

/// Runs this process's rank beside all ranks as threads of it.
template <class Batch, class Make>
void same_as_threads(const Batch& batch, const ranked::division& d, const Make& make)
{
    const mpi& world = support::mpi_world();
    REQUIRE_EQ(d.ranks(), world.size());
    const int r = world.rank();
    host_executor ex({.threads = 1});
    const auto own = batch.run_rank(ex, make(world), d, d.cuts[r], d.cuts[r + 1] - d.cuts[r]);
    auto all = batch.run(d, make);
    const auto& expected = all[static_cast<std::size_t>(r)];
    CHECK(support::same_bits(own.y, expected.y));
    CHECK(support::same_bits(own.inferred, expected.inferred));
    CHECK(support::same_bits(own.dx, expected.dx));
    CHECK(support::same_bits(own.losses, expected.losses));
    CHECK_EQ(own.experts, expected.experts);
    CHECK_EQ(own.counts, expected.counts);
    CHECK_EQ(own.gate, expected.gate);
    CHECK_EQ(own.global, expected.global);
    CHECK_EQ(own.damage, "");
    for (std::size_t l = 0; l < own.gradients.size(); ++l)
        for (auto member : ranked::members) CHECK_EQ(own.gradients[l].*member, expected.gradients[l].*member);
    batch.judge(d, all);
}

} // namespace

TEST_CASE_TEMPLATE("processes compute what threads compute, bit for bit: exchanges, placements, slices, chunks, capacities", Cell,
                   FASTMOE_WIDEST_AND_NARROW(host_executor))
{
    FASTMOE_SEEDED(rng, 551); // the same batch in every process
    const int ranks = support::mpi_world().size(), slices = ranks > 1 ? 2 : 1;
    auto gate = small_gate;
    for (const bool limited : {false, true}) {
        if (limited) gate.capacity = {.factor = 0.9, .over = capacity_scope::all_ranks};
        const auto batch = ranked::join<Cell>(rng, gate, small_expert, 40);
        const ranked::division d{.cuts = ranked::random_cuts(rng, ranks, 40)};
        same_as_threads(batch, d, [](const auto& c) { return c; });
        same_as_threads(batch, d, [](const auto& c) {
            return expert_parallel{c, c, round_robin_placement{}, padded_exchange<>{.rows_per_rank = 40}};
        });
        same_as_threads(batch, d, [](const auto& c) { return expert_parallel{c, c, block_placement{}, gathered_exchange<>{}}; });
        same_as_threads(batch, d, [](const auto& c) {
            return expert_parallel{c, c, block_placement{}, exact_exchange<>{}, 1, received_rows::fetch_again, 3};
        });
        if (!std::is_same_v<typename Cell::type, double>) continue; // slices round once more in narrow types
        const ranked::division cut{.cuts = d.cuts, .slices = slices};
        same_as_threads(batch, cut, [=](const auto& c) {
            return expert_parallel{c, c, round_robin_placement{}, exact_exchange<>{}, slices};
        });
    }
}
