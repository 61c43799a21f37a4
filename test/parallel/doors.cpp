// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What a layer refuses of a placement before it reads it, what its sizes promise where chunks are uneven, and what a chunk costs.
#include <doctest/doctest.h>

#include "support/ranked_layer.hpp"

using namespace fastmoe;

namespace {

constexpr top_k_gate<> small_gate{.experts = 4, .k = 2};
constexpr mlp<swiglu> small_expert{.width = 16, .hidden = 8};

} // namespace

TEST_CASE("a map that was made for other experts or other groups is refused before it is read")
{
    host_executor ex({.threads = 1});
    const auto text = [&](const std::vector<int32_t>& group_of, int64_t groups) {
        const placement_map map(ex, as_vector(group_of), groups);
        return support::message_of<invalid_argument>([&] {
            const moe_layer layer{small_gate, small_expert, expert_parallel{self{}, self{}, map.placement()}};
            (void)layer.local_experts(); // the first to ask
        });
    };
    CHECK_EQ(text({0, 0, 0, 0}, 1), "nothing was thrown");
    CHECK_NE(text({0, 0}, 1), "nothing was thrown");       // two experts, the gate has four
    CHECK_NE(text({0, 1, 0, 1}, 2), "nothing was thrown"); // two groups, the layer has one
}

TEST_CASE("the sizes that a rank with the most tokens asks are enough for all, where chunks are uneven too")
{
    FASTMOE_SEEDED(rng, 571);
    const auto batch = ranked::join<support::cell<host_executor, double>>(
        rng, top_k_gate<>{.experts = 4, .k = 2, .balance = {0.1}, .z = {0.05}}, small_expert, 5);
    batch.check({.cuts = {0, 3, 5}, .workspaces = true}, [](const threads& c) {
        return expert_parallel{c, c, block_placement{}, gathered_exchange<>{}, 1, received_rows::keep, 5};
    });
}

TEST_CASE("chunks move no more rows than one piece where the most tokens of a rank are said")
{
    run_ranks(2, [](const threads& c) {
        host_executor ex({.threads = 1});
        std::vector<float> x(16 * 16, 1.f), y(16 * 16);
        const moe_layer layer{small_gate, small_expert,
                              expert_parallel{c, c, block_placement{}, gathered_exchange<>{.most_tokens = 16}, 1, received_rows::keep, 4}};
        const auto w = random_weights<float>(ex, layer, 1);
        const auto saved = layer.forward(ex, as_matrix(x, 16, 16), w.view(), as_matrix(y, 16, 16));
        int64_t rows = 0;
        for (const auto& piece : saved.parts().pieces) rows += piece.received.tokens;
        CHECK_EQ(rows, 32);
    });
}

TEST_CASE_TEMPLATE("every exchange of the library is one, as the concepts say", X, exact_exchange<>, padded_exchange<>, gathered_exchange<>)
{
    CHECK((reserves_exchange<X, float>));
    CHECK((announces<X, host_executor, self, float>));
}
