// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A gate writes into a state, and a plan into its arrays: neither accepts what was reserved for another shape.
#include <doctest/doctest.h>

#include <fastmoe/comm/self.hpp>
#include <fastmoe/routing/assigned_gate.hpp>
#include <fastmoe/routing/plan.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

#include "support/bad_views.hpp"
#include "support/executors.hpp"
#include "support/poison.hpp"
#include "support/scratch.hpp"

using namespace fastmoe;

namespace {

/// Every token goes nowhere. Ragged: two choices a token, all dropped.
template <bool Ragged>
struct nowhere {
    static constexpr bool reads_logits = true, ragged = Ragged;
    int64_t choices(int64_t tokens, int64_t, int64_t k) const { return tokens * k; }

    template <class Executor, class T, class Communicator, class Real>
    void assign(Executor& ex, const gate_input<T>&, const Communicator&, const assignment<Real>& to, arena& scratch) const
    {
        if (scratch.measuring()) return;
        for_each(ex, to.experts.extent(0), detail::fill<int32_t>{to.experts.data_handle(), -1});
        for_each(ex, to.first.extent(0), detail::fill<int32_t>{to.first.data_handle(), 0});
    }
};

/// A gate, and calls of it with states that others have reserved.
template <class Gate>
struct bench {
    static constexpr int64_t tokens = 5;
    host_executor ex{{.threads = 2}};
    Gate gate;
    std::vector<float> logits = std::vector<float>(tokens * gate.experts, 0.5f), dweights = std::vector<float>(64),
                       dlogits = std::vector<float>(tokens * gate.experts, -7);
    support::workspace<host_executor> memory{ex, 1 << 16}, lent{ex, 1 << 16};

    auto of(const Gate& other) { return other.template reserve<float>(memory.arena(), tokens); }

    /// What both passes say about a state; they must leave all memory as it is.
    template <class State>
    std::string refuses(const State& state)
    {
        gate_input<float> in;
        in.logits = as_matrix(logits, tokens, gate.experts);
        const auto before = memory_bytes();
        const auto forward = support::message_of<invalid_argument>([&] { gate.route(ex, in, self{}, state, lent.arena()); });
        const auto given = fastmoe::slice(vector_view<const float>(dweights.data(), 64), 0, state.routing.choices());
        const auto backward = support::message_of<invalid_argument>(
            [&] { gate.backward(ex, in, self{}, state, given, 1.0f, as_matrix(dlogits, tokens, gate.experts), lent.arena()); });
        CHECK(memory_bytes() == before);
        for (const float v : dlogits) CHECK_EQ(v, -7.0f);
        const auto told = [](const std::string& text) { return text.substr(0, text.find(" [")); };
        CHECK_EQ(told(forward), told(backward));
        return forward;
    }

private:
    std::vector<unsigned char> memory_bytes()
    {
        arena all = memory.arena();
        all.rewind(0);
        const auto bytes = all.vector<unsigned char>(1 << 16);
        return {bytes.data_handle(), bytes.data_handle() + (1 << 16)};
    }
};

#define CHECK_TEXT(text, part) CHECK_MESSAGE(support::has(text, part), text)

template <class Gate>
void check_fixed()
{
    bench<Gate> b{.gate = {.experts = 8, .k = 4}};
    CHECK_TEXT(b.refuses(b.of({.experts = 8, .k = 2})), "state.routing.k is 2; expected the gate's K = 4");
    CHECK_TEXT(b.refuses(b.of({.experts = 8, .k = 8})), "state.routing.k is 8; expected the gate's K = 4");
    CHECK_TEXT(b.refuses(b.of({.experts = 9, .k = 4})), "state.routing.total_experts is 9; expected the gate's E = 8");
    auto state = b.of(b.gate);
    state.routing.tokens = 6;
    CHECK_TEXT(b.refuses(state), "routing.experts (C) is 20; expected T * K = 24");
    state = b.of(b.gate);
    state.routing.weights = slice(state.routing.weights, 0, 19);
    CHECK_TEXT(b.refuses(state), "routing.weights (C) is of shape (19); expected (20)");
    state = b.of(b.gate);
    state.losses = {};
    CHECK_TEXT(b.refuses(state), "state.losses (2) is of shape (0); expected (2)");
    state = b.of(b.gate);
    state.chosen = slice(state.chosen, 0, 3);
    CHECK_TEXT(b.refuses(state), "state.chosen");

    bench<Gate> lossy{.gate = {.experts = 8, .k = 4, .z = {0.1}}};
    CHECK_TEXT(lossy.refuses(lossy.of({.experts = 8, .k = 4})), "state.slopes is of shape (0); expected (9)");
    bench<Gate> bounded{.gate = {.experts = 8, .k = 4, .capacity = {.factor = 0.5}}};
    CHECK_TEXT(bounded.refuses(bounded.of({.experts = 8, .k = 4})), "expected memory of its own for a gate with capacity");
}

} // namespace

TEST_CASE("a top-k gate refuses the state of another gate, forward and backward, before it writes")
{
    check_fixed<top_k_gate<>>();
}

TEST_CASE("an assigned gate refuses the state of another gate, forward and backward, before it writes")
{
    check_fixed<assigned_gate<nowhere<false>>>();
}

TEST_CASE("a gate of ragged choices refuses a state of another length, and one that is not ragged")
{
    using gate_type = assigned_gate<nowhere<true>>;
    bench<gate_type> b{.gate = {.experts = 8, .k = 4}};
    CHECK_TEXT(b.refuses(b.of({.experts = 8, .k = 2})), "state.routing.experts (C) is of shape (10); expected (20)");
    auto state = b.of(b.gate);
    state.first = slice(state.first, 0, 5);
    CHECK_TEXT(b.refuses(state), "state.first (T+1) is of shape (5); expected (6)");
    state = b.of(b.gate);
    state.routing.first = {};
    CHECK_TEXT(b.refuses(state), "state.routing.first is empty; expected ragged choices");
    bench<assigned_gate<nowhere<false>>> fixed{.gate = {.experts = 8, .k = 4}};
    const auto ragged = gate_type{.experts = 8, .k = 4}.reserve<float>(fixed.memory.arena(), 5);
    CHECK_TEXT(fixed.refuses(ragged), "state.routing.first is ragged; expected K choices of every token");
    bench<top_k_gate<>> top{.gate = {.experts = 8, .k = 4}};
    const auto r = gate_type{.experts = 8, .k = 4}.reserve<float>(top.memory.arena(), 5);
    CHECK_TEXT(top.refuses(top_k_state<float>{r.routing, r.losses, r.slopes, r.chosen}), "state.routing.first is ragged");
}

TEST_CASE("a plan is not made into arrays of another shape: each is refused by name, and none is touched")
{
    host_executor ex({.threads = 2});
    std::vector<int32_t> ids;
    for (int t = 0; t < 10; ++t) ids.insert(ids.end(), {1, 2});
    std::vector<float> weights(20);
    const routing<float> route{10, 3, 2, as_vector(ids), as_vector(weights), {}};
    support::workspace kept(ex, 1 << 14), lent(ex, 1 << 14);
    const plan good = reserve_plan(kept, 10, 20, 3, 4);
    const auto refused = [&](auto change) {
        plan p = good;
        change(p);
        const auto text = support::message_of<invalid_argument>([&] { make_plan(ex, route, p, lent); });
        for (const int64_t n : {support::poisoned(good.counts) - 3, support::poisoned(good.offsets) - 4,
                                support::poisoned(good.slot_of) - 20, support::poisoned(good.choice_of) - 29,
                                support::poisoned(good.token_of) - 29})
            CHECK_EQ(n, 0);
        return text;
    };
    CHECK_EQ(good.slots, 29);
    CHECK_TEXT(refused([](plan& p) { p.counts = slice(p.counts, 0, 2); }), "plan.counts (E) is of shape (2); expected (3)");
    CHECK_TEXT(refused([](plan& p) { p.offsets = slice(p.offsets, 0, 3); }), "plan.offsets (E+1) is of shape (3); expected (4)");
    CHECK_TEXT(refused([](plan& p) { p.slot_of = slice(p.slot_of, 0, 19); }), "plan.slot_of (C) is of shape (19); expected (20)");
    CHECK_TEXT(refused([](plan& p) { p.choice_of = slice(p.choice_of, 0, 28); }), "plan.choice_of (S) is of shape (28); expected (29)");
    CHECK_TEXT(refused([](plan& p) { p.token_of = slice(p.token_of, 0, 28); }), "plan.token_of (S) is of shape (28); expected (29)");
    CHECK_TEXT(refused([](plan& p) { p.token_of = vector_view<int32_t>(nullptr, 29); }), "plan.token_of (S) is a null pointer");
    CHECK_TEXT(refused([](plan& p) { p.slots = 28; }), "plan.slots is 28; expected min(C, T * E) + E * (alignment - 1) = 29 or more");
    CHECK_TEXT(refused([](plan& p) { p.alignment = 5; }), "plan.slots is 29; expected min(C, T * E) + E * (alignment - 1) = 32 or more");
    CHECK_TEXT(refused([](plan& p) { p.alignment = 0; }), "plan.alignment is 0; expected 1 or more");
    CHECK_TEXT(refused([](plan& p) { p.tokens = 11; }), "plan.tokens is 11; expected the routing's T = 10");
    make_plan(ex, route, good, lent);
    CHECK_EQ(good.counts(1), 10);
}

namespace {

/// Logits, a mask and gradients of every wrong shape.
template <class Gate>
void check_input(const Gate& gate)
{
    host_executor ex({.threads = 2});
    const int64_t tokens = 6, experts = gate.experts;
    std::vector<float> logits_memory(tokens * experts + 8, 0.5f), dweights_memory(64, 1), dlogits_memory(tokens * experts, -7);
    std::vector<std::uint8_t> mask_memory(tokens + 1, 1);
    support::workspace memory(ex, 1 << 14), lent(ex, 1 << 14);
    const auto state = gate.template reserve<float>(memory.arena(), tokens);
    matrix_view<const float> logits(logits_memory.data(), tokens, experts);
    vector_view<const std::uint8_t> mask(mask_memory.data(), tokens);
    vector_view<const float> dweights(dweights_memory.data(), state.routing.choices());
    matrix_view<float> dlogits(dlogits_memory.data(), tokens, experts);
    const auto refuses = [&](bool forward, const char* name) {
        gate_input<float> in;
        in.logits = logits;
        in.mask = mask;
        const auto check = [&](auto run) {
            const auto text = support::message_of<invalid_argument>(run);
            CHECK_TEXT(text, name);
            CHECK_EQ(support::poisoned(state.routing.experts), state.routing.choices());
            CHECK_EQ(support::poisoned(state.routing.weights), state.routing.choices());
            CHECK_EQ(support::poisoned(state.losses), 2);
            for (const float v : dlogits_memory) REQUIRE_EQ(v, -7.0f);
            CHECK_EQ(lent.arena().used(), 0);
        };
        if (forward) check([&] { gate.route(ex, in, self{}, state, lent.arena()); });
        check([&] { gate.backward(ex, in, self{}, state, dweights, 1.0f, dlogits, lent.arena()); });
    };
    const auto all = [&](auto& view, const auto& bad, bool forward, const char* name) {
        const auto good = view;
        for (const auto& b : bad) {
            CAPTURE(b.what);
            view = b.view;
            refuses(forward, name);
            view = good;
        }
    };
    all(logits, support::bad_views(logits), true, "logits (T,E) is ");
    all(dweights, support::bad_views(dweights), false, "dweights (");
    all(dlogits, support::bad_views(dlogits), false, "logits (T,E) is ");
    mask = vector_view<const std::uint8_t>(mask_memory.data(), tokens - 1);
    refuses(true, "mask (T) is of shape (5); expected (6)");
    mask = vector_view<const std::uint8_t>(mask_memory.data(), tokens + 1);
    refuses(true, "mask (T) is of shape (7); expected (6)");
    mask = vector_view<const std::uint8_t>(nullptr, tokens);
    refuses(true, "mask (T) is a null pointer");
}

} // namespace

TEST_CASE("logits, masks and gradients of a wrong shape are refused by name, and the state stays as it was")
{
    check_input(top_k_gate<>{.experts = 5, .k = 2, .capacity = {.factor = 1.0}, .balance = {0.1}});
    check_input(assigned_gate<nowhere<false>>{.experts = 5, .k = 2, .capacity = {.factor = 1.0}, .balance = {0.1}});
}
