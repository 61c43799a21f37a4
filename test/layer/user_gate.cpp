// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A user's own gate in a layer: choices given by a list, fixed in number or ragged, some of them dropped or wrong.
#include <doctest/doctest.h>

#include "support/compare_layer.hpp"

using namespace fastmoe;
using compare_layer::setting;
namespace oracle = support::reference;

namespace {

/// weights = sigmoid of the chosen logit; 0 for a choice of -1.
template <class Real>
struct weigh_listed {
    routing<Real> route;
    matrix_view<const Real> logits;
    const int32_t* ids;

    /// By choice, so that offsets which are out of order let no two tokens write the same one.
    FASTMOE_HOST_DEVICE void operator()(int64_t c) const
    {
        int64_t t = 0;
        while (t + 1 < route.tokens && route.end(t) <= c) ++t;
        const bool inside = ids[c] >= 0 && ids[c] < route.total_experts;
        route.experts(c) = ids[c];
        route.weights(c) = inside ? math::sigmoid(logits(t, ids[c])) : Real(0);
    }
};

template <class Real>
struct listed_backward {
    routing<Real> route;
    vector_view<const Real> dweights;
    matrix_view<Real> dlogits;
    const int32_t* ids;

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        for (int64_t e = 0; e < route.total_experts; ++e) dlogits(t, e) = 0;
        for (int64_t c = route.begin(t); c < route.end(t); ++c) {
            const Real w = route.weights(c);
            if (ids[c] >= 0) dlogits(t, ids[c]) = dweights(c) * w * (Real(1) - w);
        }
    }
};

/// Token t chooses what stands in a list: k ids, or those from first[t] to first[t+1].
struct listed_gate {
    int64_t experts = 0, k = 0;
    vector_view<const int32_t> ids{};   // (C)
    vector_view<const int32_t> first{}; // (T+1), or empty

    template <class Real>
    gate_state<Real> reserve(arena& memory, int64_t tokens) const
    {
        if (first.extent(0) == 0) return {reserve_routing<Real>(memory, tokens, experts, k)};
        return {{tokens, experts, 0, memory.vector<int32_t>(ids.extent(0)), memory.vector<Real>(ids.extent(0)), first}};
    }
    template <class Executor, class T, class Communicator, class State>
    void route(Executor& ex, const gate_input<T>& in, const Communicator&, const State& state, arena& scratch) const
    {
        if (!scratch.measuring()) for_each(ex, state.routing.choices(), weigh_listed<accumulate_t<T>>{state.routing, in.logits, ids.data_handle()});
    }
    template <class Executor, class T, class Communicator, class State, class Real>
    void backward(Executor& ex, const gate_input<T>&, const Communicator&, const State& state, vector_view<const Real> dweights, Real,
                  matrix_view<Real> dlogits, arena& scratch) const
    {
        if (!scratch.measuring())
            for_each(ex, dlogits.extent(0), listed_backward<Real>{state.routing, dweights, dlogits, ids.data_handle()});
    }
};

static_assert(gate_policy<listed_gate, host_executor, float, self>);

/// The choices of T tokens: experts that differ within a token, and -1.
struct listing {
    std::vector<int32_t> ids, first;

    /// @param k  choices of each token, or for ragged ones the most
    listing(support::random& r, int64_t tokens, int64_t experts, int64_t k, bool ragged, double dropped)
    {
        if (ragged) first.push_back(0);
        for (int64_t t = 0; t < tokens; ++t) {
            const auto order = r.permutation(experts);
            const int64_t n = ragged ? r.integer(0, k) : k;
            for (int64_t j = 0; j < n; ++j) ids.push_back(r.coin(dropped) ? -1 : order[j]);
            if (ragged) first.push_back(static_cast<int32_t>(ids.size()));
        }
    }
    int64_t begin(int64_t t, int64_t k) const { return first.empty() ? t * k : first[t]; }
};

/// The layer behind such a gate against the oracle.
template <class Cell, class G, class Expert>
void matches_oracle(support::random& r, const listing& list, int64_t experts, int64_t k, const Expert& expert, const setting& s)
{
    using T = typename Cell::type;
    using number = support::bounded<accumulate_t<T>>;
    const int64_t width = expert.model_width();
    auto own = Cell::make();
    const auto ids = support::upload(own, list.ids), first = support::upload(own, list.first);
    compare_layer::run_of_layer<Cell, listed_gate, Expert, G> layer(
        r, {experts, list.first.empty() ? k : 0, ids.view(), first.view()}, expert, width, s);
    std::vector<int64_t> all;
    for (int64_t t = 0; t < s.tokens; ++t) all.push_back(t);
    layer([&](const auto& saved) {
        const auto logits = support::expected_logits<T>(layer.model, layer.x_values, s.tokens);
        std::vector<support::weighted_choice<T>> choices;
        std::vector<number> weights;
        for (int64_t t = 0; t < s.tokens; ++t)
            for (int64_t c = list.begin(t, k); c < list.begin(t + 1, k); ++c) {
                const int id = list.ids[c];
                weights.push_back(id < 0 ? number(0) : number(1) / (number(1) + exponential(number(0) - logits[t * experts + id])));
                choices.push_back({t, id, weights.back()});
            }
        const auto dlogits = [&](const std::vector<number>& dweights) {
            std::vector<number> out(s.tokens * experts);
            for (std::size_t c = 0; c < choices.size(); ++c)
                if (choices[c].expert >= 0)
                    out[choices[c].token * experts + choices[c].expert] = dweights[c] * weights[c] * (number(1) - weights[c]);
            return out;
        };
        const support::expected_layer<T> expected(layer.model, layer.x_values, s.tokens, choices, layer.dy_values, dlogits);
        auto out = layer.results(expected, all);
        out.scalars = {{"weights", support::download(layer.ex, saved.routing().weights), weights}};
        check(out);
        CHECK(saved.routing().ragged() == !list.first.empty());
        CHECK(support::download(layer.ex, saved.routing().experts) == list.ids);
    });
}

} // namespace

TEST_CASE_TEMPLATE("choices of -1 and ragged choices from a user's gate give the oracle's values and gradients", Cell,
                   FASTMOE_COLUMN(host_executor), support::cell<support::lanes, float>)
{
    using T = typename Cell::type;
    FASTMOE_SEEDED(r, 71);
    const mlp<gelu> expert{.width = 11, .hidden = 9, .biases = true};
    for (const bool ragged : {false, true})
        for (const double dropped : {0.0, 0.4, 1.0}) {
            CAPTURE(ragged);
            CAPTURE(dropped);
            setting s{.tokens = 21, .gate_bias = true};
            matches_oracle<Cell, T>(r, listing(r, 21, 5, 3, ragged, dropped), 5, 3, expert, s);
            s.gradients = write_mode::accumulate;
            matches_oracle<Cell, accumulate_t<T>>(r, listing(r, 21, 5, 3, ragged, dropped), 5, 3, expert, s);
        }
    for (const bool ragged : {false, true}) { // no tokens, and one
        matches_oracle<Cell, T>(r, listing(r, 0, 5, 3, ragged, 0), 5, 3, expert, {.tokens = 0});
        matches_oracle<Cell, T>(r, listing(r, 1, 5, 3, ragged, 0.3), 5, 3, expert, {.tokens = 1});
    }
    for (const auto weigh : {weigh_at::activation, weigh_at::input}) {
        const mlp<gelu> other{.width = 11, .hidden = 9, .biases = true, .weigh = weigh};
        matches_oracle<Cell, T>(r, listing(r, 21, 5, 3, true, 0.2), 5, 3, other, {.tokens = 21});
    }
    // Ragged to the extreme: one token chooses all experts, the others none.
    listing one(r, 0, 8, 8, true, 0);
    for (int32_t e = 0; e < 8; ++e) one.ids.push_back(7 - e);
    for (int t = 0; t < 6; ++t) one.first.push_back(t < 3 ? 0 : 8);
    matches_oracle<Cell, T>(r, one, 8, 8, expert, {.tokens = 6});
}

TEST_CASE_TEMPLATE("ragged choices reach experts that do not apply the weights", Cell, FASTMOE_COLUMN(host_executor),
                   support::cell<support::lanes, float>)
{
    FASTMOE_SEEDED(r, 72);
    const linear<> expert{.width = 12, .biases = true};
    matches_oracle<Cell, typename Cell::type>(r, listing(r, 25, 5, 4, true, 0.2), 5, 4, expert, {.tokens = 25});
}

TEST_CASE_TEMPLATE("a gate that names an expert out of range, or one twice, is an error that names the choice, and y stays as it was",
                   Cell, FASTMOE_COLUMN(host_executor), support::cell<support::lanes, float>)
{
    using T = typename Cell::type;
    using Executor = typename Cell::executor;
    FASTMOE_SEEDED(r, 73);
    FASTMOE_EXECUTOR(ex, Cell);
    const mlp<gelu> expert{.width = 6, .hidden = 5};
    const auto model = support::random_model<T, Executor>(r, expert, 6, 3);
    support::layer_memory<T, mlp<gelu>, Executor> w(ex, expert, model);
    support::guarded<T> x(4, 6), y(4, 6);
    support::fill_normal(r, x.view());
    struct wrong {
        std::vector<int32_t> ids, first;
        const char* text;
    };
    for (const auto& [ids, first, text] :
         {wrong{{0, 1, 1, 2, 0, 3, 0, 1}, {}, "routing.experts(5) is 3"}, wrong{{0, 1, 1, 2, 0, -7, 0, 1}, {}, "routing.experts(5) is -7"},
          wrong{{0, 1, 1, 1, 0, 2, 0, 1}, {}, "routing.experts(3) is 1; expected each expert once"},
          wrong{{0, 1, 2, 1, 0, 3}, {0, 3, 4, 4, 6}, "routing.experts(5) is 3"},
          wrong{{0, 1, 2, 1, 0, 0}, {0, 3, 4, 4, 6}, "routing.experts(5) is 0; expected each expert once"},
          wrong{{0, 1, 2, 1, 0, 2}, {0, 3, 2, 4, 6}, "routing.first(2) is 2"}}) {
        const auto memory = support::upload(ex, ids), starts = support::upload(ex, first);
        const moe_layer layer{listed_gate{3, first.empty() ? 2 : 0, memory.view(), starts.view()}, expert, self{}};
        const auto inferred = support::message_of<invalid_argument>([&] {
            layer.infer(ex, x.view(), w.views, y.view());
            ex.synchronize();
        });
        CHECK_MESSAGE(support::has(inferred, text), inferred);
        const auto trained = support::message_of<invalid_argument>([&] {
            (void)layer.forward(ex, x.view(), w.views, y.view());
            ex.synchronize();
        });
        CHECK_MESSAGE(support::has(trained, text), trained);
        CHECK(support::poisoned(y.view()) == 4 * 6);
        CHECK(y.damage() == "");
    }
    // The executor works on.
    const auto memory = support::upload(ex, std::vector<int32_t>{-1, -1, 0, -1, 1, 2, -1, 2});
    const moe_layer layer{listed_gate{3, 2, memory.view(), {}}, expert, self{}};
    layer.infer(ex, x.view(), w.views, y.view());
    ex.synchronize();
    for (int64_t d = 0; d < 6; ++d) CHECK(double(y.view()(0, d)) == 0.0);
    CHECK(support::poisoned(y.view()) == 0);
}
