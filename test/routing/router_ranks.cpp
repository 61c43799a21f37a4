// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Routers that draw or own parameters, over ranks: R ranks give what one rank gives of the joined batch. And the states
/// of other gates, which each of them refuses.
#include <doctest/doctest.h>

#include <algorithm>
#include <string>

#include <fastmoe/comm/threads.hpp>
#include <fastmoe/routing/gshard_gate.hpp>
#include <fastmoe/routing/sparse_mixer_gate.hpp>

#include "support/compare.hpp"
#include "support/run_router.hpp"

namespace fm = fastmoe;
using fm::int64_t;

namespace {

constexpr fm::capacity_scope all_ranks = fm::capacity_scope::all_ranks;

enum class choices_lost : bool { no, yes };

/// @param lost  whether capacity or chance drop choices: without any, the test would say less
template <class Gate>
void ranks_join(support::random& rng, const Gate& gate, choices_lost lost)
{
    const int64_t tokens = 40, experts = 6, k = gate.k;
    const support::router_batch<double> b(rng, tokens, experts, k);
    fm::host_executor ex({.threads = 2});
    const auto joined = support::run_router<double>(ex, gate, b);
    CHECK_EQ(std::count(joined.experts.begin(), joined.experts.end(), -1) > 0, lost == choices_lost::yes);
    const std::vector<int64_t> cuts{0, 25, 25, 28, 40}; // 25, 0, 3 and 12 tokens
    std::vector<support::router_outcome<double>> parts(4);
    fm::run_ranks(4, [&](const fm::threads& c) {
        fm::host_executor own({.threads = 1});
        const int r = c.rank();
        parts[r] = support::run_router<double>(own, gate, b.part(cuts[r], cuts[r + 1] - cuts[r]), c);
    });
    support::router_outcome<double> sum;
    sum.by_token.resize(joined.by_token.size());
    sum.gradients.resize(joined.gradients.size());
    for (const auto& part : parts) {
        sum.experts.insert(sum.experts.end(), part.experts.begin(), part.experts.end());
        for (std::size_t v = 0; v < sum.by_token.size(); ++v)
            sum.by_token[v].insert(sum.by_token[v].end(), part.by_token[v].begin(), part.by_token[v].end());
        for (std::size_t i = 0; i < sum.gradients.size(); ++i) sum.gradients[i] += part.gradients[i];
        CHECK(support::close(part.losses, joined.losses, {.length = 256, .magnitude = 1})); // every rank has all of it
    }
    CHECK_EQ(sum.experts, joined.experts);
    for (std::size_t v = 0; v < sum.by_token.size(); ++v)
        CHECK(support::close(sum.by_token[v], joined.by_token[v], {.length = 512, .magnitude = 1}));
    CHECK(support::close(sum.gradients, joined.gradients, {.length = 1024, .magnitude = 1}));
}

/// What both passes of a gate say about a state that another gate has reserved.
template <class Gate>
std::string refusal(const Gate& gate, const Gate& other)
{
    const int64_t tokens = 4, width = 3;
    fm::host_executor ex({.threads = 1});
    support::workspace memory(ex, 1 << 16), lent(ex, 1 << 16), own_memory(ex, 1 << 16);
    const auto state = other.template reserve<float>(memory.arena(), tokens);
    const std::vector<std::uint64_t> random{1, 2};
    std::vector<float> x(tokens * width), logits(tokens * gate.experts), dweights(tokens * gate.k);
    fm::gate_input<float> in;
    in.x = fm::as_matrix(x, tokens, width);
    in.logits = fm::as_matrix(logits, tokens, gate.experts);
    in.random = random.data();
    const auto d = fm::as_matrix(logits, tokens, gate.experts), dx = fm::as_matrix(x, tokens, width);
    std::string forward, backward;
    const fm::vector_view<const float> weights(dweights.data(), tokens * gate.k);
    if constexpr (fm::owns_parameters<Gate>) {
        const typename Gate::template parameters<const float> own =
            gate.template reserve_parameters<float>(own_memory, width);
        forward = support::message_of<fm::invalid_argument>([&] { gate.route(ex, in, own, fm::self{}, state, lent); });
        backward = support::message_of<fm::invalid_argument>(
            [&] { gate.backward(ex, in, own, fm::self{}, state, weights, 1.f, d, dx, lent); });
    } else {
        forward = support::message_of<fm::invalid_argument>([&] { gate.route(ex, in, fm::self{}, state, lent); });
        backward = support::message_of<fm::invalid_argument>(
            [&] { gate.backward(ex, in, fm::self{}, state, weights, 1.f, d, lent); });
    }
    CHECK_EQ(forward.substr(0, forward.find(" [")), backward.substr(0, backward.find(" [")));
    return forward;
}

} // namespace

TEST_CASE("four ranks give the choices, weights, losses and gradients of one rank on the joined batch, capacity included")
{
    FASTMOE_SEEDED(rng, 121);
    for (auto weights : {fm::after_drop::keep, fm::after_drop::rescale}) {
        const fm::capacity limit{.factor = 0.8, .weights = weights, .over = all_ranks};
        const fm::noisy_gate noisy{.experts = 6, .k = 2, .capacity = limit, .balance = {0.2}, .z = {0.1},
                                   .importance = {0.3}, .load = {0.4}};
        ranks_join(rng, noisy, choices_lost::yes);
        const fm::sparse_mixer_gate mixer{.experts = 6, .k = 2, .epsilon = 1, .pick = fm::mixer_pick::sampled,
                                          .capacity = limit, .balance = {0.2}, .z = {0.1}};
        ranks_join(rng, mixer, choices_lost::yes);
    }
    const fm::cosine_gate<> cosine{.experts = 6, .k = 2, .projection_width = 6, .balance = {0.2}, .z = {0.1}};
    ranks_join(rng, cosine, choices_lost::no);
    for (auto drop : {fm::second_drop::after_capacity, fm::second_drop::before_capacity}) {
        const fm::capacity tight{.factor = 0.8, .over = all_ranks};
        const fm::gshard_gate<> gshard{.experts = 6, .capacity = tight, .balance = {0.2}, .z = {0.1}, .drop = drop};
        ranks_join(rng, gshard, choices_lost::yes);
        ranks_join(rng, fm::gshard_gate<fm::raw_scores>{.experts = 6, .balance = {0.2}, .drop = drop}, choices_lost::yes);
    }
}

TEST_CASE("each of them refuses the state of another gate, forward and backward alike")
{
    const auto says = [](const std::string& text, const char* part) { CHECK_MESSAGE(support::has(text, part), text); };
    says(refusal(fm::noisy_gate{.experts = 8, .k = 4}, {.experts = 8, .k = 2}),
         "state.routing.k is 2; expected the gate's K = 4");
    says(refusal(fm::noisy_gate{.experts = 8, .k = 4}, {.experts = 9, .k = 4}), "state.routing.total_experts is 9");
    says(refusal(fm::sparse_mixer_gate{.experts = 8, .k = 4}, {.experts = 8, .k = 2}), "state.routing.k is 2");
    says(refusal(fm::gshard_gate<>{.experts = 8}, {.experts = 9}), "state.routing.total_experts is 9");
    using cosine = fm::cosine_gate<>;
    says(refusal(cosine{.experts = 8, .k = 4, .projection_width = 5}, {.experts = 8, .k = 2, .projection_width = 5}),
         "state.routing.k is 2");
    says(refusal(cosine{.experts = 8, .k = 4, .projection_width = 5}, {.experts = 8, .k = 4, .projection_width = 6}),
         "state.tokens.rows (T,N) is of shape (4,6); expected (4,5)");
}
