// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What a layer refuses of a placement before it reads it, what its sizes promise where chunks are uneven, and what a chunk costs.
#include <doctest/doctest.h>

#include "support/ranked_layer.hpp"

using namespace fastmoe;

namespace {

constexpr top_k_gate<> small_gate{.experts = 4, .k = 2};
constexpr mlp<swiglu> small_expert{.width = 16, .hidden = 8};

/// An assignment that gives one choice to an expert of its own making.
struct one_choice_to {
    static constexpr bool reads_logits = false, ragged = false;
    int32_t expert = 0;
    int64_t at = 0;

    struct put {
        int32_t* to;
        int32_t expert;
        int64_t at;
        FASTMOE_HOST_DEVICE void operator()(int64_t c) const { to[c] = c == at ? expert : static_cast<int32_t>(c % 2); }
    };
    template <class Executor, class T, class C, class Real>
    void assign(Executor& ex, const gate_input<T>&, const C&, const assignment<Real>& to, arena& memory) const
    {
        if (!memory.measuring()) for_each(ex, to.experts.extent(0), put{to.experts.data_handle(), expert, at});
    }
};

/// A gate of ragged choices, some of which are no token's: those behind the last.
struct ragged_choices {
    int64_t experts = 2, k = 2, choices = 0;
    const int32_t* first = nullptr; // (T+1)
    static constexpr bool reads_logits = false;

    struct put {
        int32_t* ids;
        float* weights;
        FASTMOE_HOST_DEVICE void operator()(int64_t c) const { ids[c] = static_cast<int32_t>(c % 2), weights[c] = 1.0f + static_cast<float>(c); }
    };
    template <class Real>
    gate_state<Real> reserve(arena& memory, int64_t tokens) const
    {
        return {{tokens, experts, 0, memory.vector<int32_t>(choices), memory.vector<Real>(choices), vector_view<const int32_t>(first, tokens + 1)}};
    }
    template <class Executor, class T, class C, class State>
    void route(Executor& ex, const gate_input<T>&, const C&, const State& s, arena& memory) const
    {
        if (!memory.measuring())
            for_each(ex, choices, put{const_cast<int32_t*>(s.routing.experts.data_handle()), const_cast<float*>(s.routing.weights.data_handle())});
    }
    template <class Executor, class T, class C, class State, class Real>
    void backward(Executor&, const gate_input<T>&, const C&, const State&, vector_view<const Real>, Real, matrix_view<Real>, arena&) const
    {
    }
};

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
    CHECK(support::has(text({0, 0}, 1), "placement.place_of (E) is of shape (2); expected (4)"));
    CHECK(support::has(text({0, 1, 0, 1}, 2), "placement.place_of (E) is 1; expected a group: 0 to 0"));
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

TEST_CASE("a layer has room for as many choices of a token as its rank has experts, if they are fewer than K")
{
    // Top 6 of 8 over 4 ranks: 2 experts a rank, so a third of what K choices would ask. A wide expert hides all the rest.
    static constexpr int64_t tokens = 64, width = 4, hidden = 512, ranks = 4, k = 6, here = 2;
    static constexpr int64_t received = ranks * tokens, saved_row = hidden * 4;
    run_ranks(ranks, [](const threads& c) {
        const auto verify = [&](const auto& exchange) {
            host_executor ex({.threads = 1});
            const moe_layer layer{top_k_gate<>{.experts = 8, .k = k}, mlp<relu>{.width = width, .hidden = hidden},
                                  expert_parallel{c, c, block_placement{}, exchange}};
            support::random r(static_cast<std::uint64_t>(c.rank()));
            const auto x = support::normal_vector<float>(r, tokens * width);
            std::vector<float> y(tokens * width);
            const auto w = random_weights<float>(ex, layer, 1);
            const int64_t bytes = layer.template forward_bytes<float>(ex, tokens, width);
            CHECK_GT(bytes, 2 * received * here * saved_row);   // the pre-activation that is saved, and the activation
            CHECK_LT(bytes, 5 * received * here * saved_row / 2); // K slots would be three times as many
            support::workspace memory(ex, bytes); // and not a byte too few
            const auto saved = layer.forward(ex, as_matrix(x, tokens, width), w.view(), as_matrix(y, tokens, width), memory.arena());
            CHECK_EQ(saved.plan(0).slots, received * here);
            const auto counts = saved.plan(0).counts;
            CHECK_GT(counts(0) + counts(1), received); // more than one a token
        };
        verify(padded_exchange<>{.rows_per_rank = tokens});
        verify(gathered_exchange<>{.most_tokens = tokens});
        verify(gathered_exchange<>{});
    });
}

namespace {
/// States two choices a token and reserves one.
struct short_gate : top_k_gate<> {
    template <class Real>
    auto reserve(arena& memory, int64_t tokens) const
    {
        auto state = top_k_gate<>::reserve<Real>(memory, tokens);
        state.routing.experts = memory.vector<int32_t>(tokens);
        return state;
    }
    template <class Executor, class T, class C, class State>
    void route(Executor&, const gate_input<T>&, const C&, const State&, arena&) const
    {
    }
};
} // namespace

TEST_CASE("a gate whose routing is too short is refused before it is read, a budget of nothing before tokens are lost")
{
    host_executor ex({.threads = 1});
    std::vector<float> x(10 * 16), y(10 * 16);
    const auto text = [&](const auto& gate, const auto& exchange) {
        const moe_layer layer{gate, small_expert, expert_parallel{self{}, self{}, block_placement{}, exchange}};
        const auto w = random_weights<float>(ex, layer, 1);
        return support::message_of<invalid_argument>([&] { layer.infer(ex, as_matrix(x, 10, 16), w.view(), as_matrix(y, 10, 16)); });
    };
    CHECK(support::has(text(short_gate{small_gate}, exact_exchange<>{}), "routing.experts (C) is 10; expected T * K = 20"));
    CHECK(support::has(text(small_gate, padded_exchange<>{}), "exchange.rows_per_rank is 0; expected 1 or more"));
}

TEST_CASE("slices of a hidden width begin with weights as large as those of the whole")
{
    const auto largest = [](int ranks) {
        std::vector<double> most(static_cast<std::size_t>(ranks));
        run_ranks(ranks, [&](const threads& c) {
            host_executor ex({.threads = 1});
            const moe_layer layer{small_gate, mlp<swiglu>{.width = 16, .hidden = 64 / ranks},
                                  expert_parallel{c, c, block_placement{}, exact_exchange<>{}, ranks}};
            const auto w = random_weights<double>(ex, layer, 1);
            const auto& down = w.view().expert.down;
            for (int64_t i = 0; i < down.experts * down.out * down.in; ++i)
                most[c.rank()] = std::max(most[c.rank()], std::fabs(down.data[i]));
        });
        return *std::max_element(most.begin(), most.end());
    };
    for (const int ranks : {1, 4}) {
        CHECK_LE(largest(ranks), 0.125); // 1 / sqrt(64)
        CHECK_GT(largest(ranks), 0.12);
    }
}

TEST_CASE_TEMPLATE("every exchange of the library is one, as the concepts say", X, exact_exchange<>, padded_exchange<>, gathered_exchange<>)
{
    CHECK((reserves_exchange<X, float>));
    CHECK((announces<X, host_executor, self, float>));
    CHECK((exchange_policy<X, host_executor, threads, bfloat16, mapped_placement>));
}

TEST_CASE_TEMPLATE("a fault of the gate is thrown where the layer was called, before anything is written, by any exchange and in chunks", X,
                   exact_exchange<>, padded_exchange<>, gathered_exchange<>)
{
    const auto verify = [](const X& exchange, int chunks, int64_t at) {
        CAPTURE(chunks);
        CAPTURE(at);
        std::string said, later;
        int written = 0;
        run_ranks(1, [&](const threads& c) {
            host_executor ex({.threads = 1});
            const auto layer_with = [&](int32_t expert) {
                return moe_layer{assigned_gate<one_choice_to, constant_score, raw_scores>{.experts = 2, .k = 1, .assignment = {expert, at}}, small_expert,
                                 expert_parallel{c, c, block_placement{}, exchange, 1, received_rows::keep, chunks}};
            };
            const auto bad = layer_with(99), good = layer_with(1);
            const auto w = random_weights<float>(ex, good, 1);
            std::vector<float> x(9 * 16, 1.f), y(9 * 16, -7.f);
            said = support::message_of<invalid_argument>([&] { bad.infer(ex, as_matrix(x, 9, 16), w.view(), as_matrix(y, 9, 16)); });
            for (const float v : y) written += v != -7.f;
            later = support::message_of<error>([&] {
                good.infer(ex, as_matrix(x, 9, 16), w.view(), as_matrix(y, 9, 16));
                std::vector<float> sum(4);
                c.all_reduce(ex, vector_view<float>(sum.data(), 4));
            });
        });
        CHECK(support::has(said, ("experts(" + std::to_string(at) + ") is 99").c_str()));
        CHECK_EQ(written, 0);
        CHECK_EQ(later, "nothing was thrown");
    };
    for (const int chunks : {1, 3})
        for (const int64_t at : {3, 8}) {
            if constexpr (std::is_same_v<X, padded_exchange<>>) verify({.rows_per_rank = 9}, chunks, at);
            else verify(X{}, chunks, at);
            if constexpr (std::is_same_v<X, gathered_exchange<>>) verify({.most_tokens = 9}, chunks, at);
        }
}

TEST_CASE("a rank without tokens may have choices that are nobody's, by either exchange of ragged choices")
{
    const auto outputs = [](const auto& exchange) {
        std::vector<float> y(3 * 16, -7.f);
        run_ranks(2, [&](const threads& c) {
            host_executor ex({.threads = 1});
            const std::vector<int32_t> first = c.rank() == 0 ? std::vector<int32_t>{0} : std::vector<int32_t>{0, 1, 2, 3};
            const int64_t tokens = c.rank() == 0 ? 0 : 3;
            const moe_layer layer{ragged_choices{.choices = c.rank() == 0 ? 2 : 3, .first = first.data()}, small_expert,
                                  expert_parallel{c, c, block_placement{}, exchange}};
            const auto w = random_weights<float>(ex, layer, 1);
            const std::vector<float> x(static_cast<std::size_t>(tokens * 16), 1.f);
            layer.infer(ex, as_matrix(x, tokens, 16), w.view(), matrix_view<float>(y.data(), tokens, 16));
        });
        return y;
    };
    const std::vector<float> y = outputs(exact_exchange<>{});
    CHECK(support::same_bits(y, outputs(gathered_exchange<>{})));
    for (const float v : y) CHECK(v != -7.f);
}
