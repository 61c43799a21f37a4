// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Runs a whole layer forward, backward and infer, with everything poisoned and workspaces of exactly the size asked
/// for, and compares all of it with the oracle, element by element, within what fp32 sums leave open.
///
///     compare_layer::check(compare_layer::run<Cell>(r, gate, mlp<gelu>{...}, {.tokens = 20, .masked = true}));
#pragma once

#include <doctest/doctest.h>

#include "expected_layer.hpp"
#include "layer_memory.hpp"

namespace compare_layer {

using namespace fastmoe;
namespace oracle = support::reference;

/// What a run is besides gate and expert.
struct setting {
    int64_t tokens = 0;
    bool gate_bias = false;
    bool crowded = false; ///< the router's bias sends all tokens to the first experts
    bool masked = false;  ///< about a third of the tokens are padding
    support::weight_layout layout{};
    bool other_layout = false; ///< gradients that come in a later call lie otherwise
    write_mode gradients = write_mode::overwrite; ///< accumulate: onto random numbers
    double loss_scale = 0.5;
    bool aligned = false; ///< tokens start at whole 16 bytes, not an element after

    int skew() const { return aligned ? 0 : 1; }
};

/// What came out, and what should have.
template <class T, class G>
struct outcome {
    using real = accumulate_t<T>;
    using numbers = std::vector<support::bounded<real>>;
    using member = typename support::expected_gradients<T>::sums support::expected_gradients<T>::*;

    /// One result. The gradients of experts are checked against their own bounds like all others.
    template <class E>
    struct result {
        const char* name;
        std::vector<E> found;
        numbers expected;

        support::verdict judged() const { return support::within(found, expected); }
    };
    std::vector<result<T>> tensors;     // y, dx
    std::vector<result<G>> gradients;   // of the router and the experts
    std::vector<result<real>> scalars;  // weights, losses
    std::vector<std::string> complaints;
    // For those who want to know what a mistake would look like:
    oracle::model model;
    oracle::numbers x, dy;
    oracle::options options;
    std::vector<support::weighted_choice<T>> choices;
    std::vector<support::expected_gradients<T>> shared; // of experts beside the layer

    bool accepted() const
    {
        bool all = true;
        for (const auto& c : complaints) all = all && c.empty();
        for (const auto& r : tensors) all = all && r.judged();
        for (const auto& r : gradients) all = all && r.judged();
        for (const auto& r : scalars) all = all && r.judged();
        return all;
    }
};

template <class T, class G>
void check(const outcome<T, G>& o)
{
    for (const auto& complaint : o.complaints) CHECK_EQ(complaint, "");
    for (const auto& r : o.tensors) CHECK_MESSAGE(r.judged(), r.name, ": ", r.judged());
    for (const auto& r : o.gradients) CHECK_MESSAGE(r.judged(), r.name, ": ", r.judged());
    for (const auto& r : o.scalars) CHECK_MESSAGE(r.judged(), r.name, ": ", r.judged());
}

template <class Weigh>
oracle::options options_of(const top_k_gate<softmax_score, top_k, Weigh>& gate, int64_t tokens)
{
    oracle::options o{.k = gate.k, .renormalize = Weigh::over_chosen, .scale = gate.scale};
    if (gate.capacity.limited()) o.capacity = oracle::capacity_of(gate.capacity.factor, gate.k, tokens, gate.experts);
    o.drop = gate.capacity.order == drop_order::token_major    ? oracle::drop_order::token_major
             : gate.capacity.order == drop_order::choice_major ? oracle::drop_order::choice_major
                                                               : oracle::drop_order::by_weight;
    o.rescale = gate.capacity.weights == after_drop::rescale;
    o.balance = gate.balance.coefficient;
    o.z = gate.z.coefficient;
    return o;
}

/// The rows of some tokens.
template <class V>
std::vector<V> rows_of(const std::vector<V>& all, const std::vector<int64_t>& tokens, int64_t width)
{
    std::vector<V> out;
    for (const int64_t t : tokens) out.insert(out.end(), all.begin() + t * width, all.begin() + (t + 1) * width);
    return out;
}
/// And back: rows of the other tokens are zero, exactly.
template <class V>
std::vector<V> spread(const std::vector<V>& some, const std::vector<int64_t>& tokens, int64_t all, int64_t width)
{
    std::vector<V> out(all * width);
    for (std::size_t i = 0; i < tokens.size(); ++i)
        for (int64_t d = 0; d < width; ++d) out[tokens[i] * width + d] = some[static_cast<int64_t>(i) * width + d];
    return out;
}

/// Nothing beside the layer. What stands there adds to y and dx, and knows its own weights.
struct nothing_beside {
    static std::vector<oracle::expert> experts() { return {}; }
    template <class... Arguments>
    void forward(Arguments&&...) const
    {
    }
    template <class... Arguments>
    void backward(Arguments&&...) const
    {
    }
    template <class... Arguments>
    void infer(Arguments&&...) const
    {
    }
};

/// The layer's memory and what it wrote there.
template <class Cell, class Gate, class Expert, class G>
struct run_of_layer {
    using T = typename Cell::type;
    using Executor = typename Cell::executor;

    Executor ex = Cell::make();
    moe_layer<Gate, Expert, self> layer;
    setting s;
    oracle::model model, before; // parameters; what their gradients held
    support::layer_memory<T, Expert, Executor> w;
    support::layer_memory<G, Expert, Executor> g, later; // gradients in one call, and in two
    support::guarded<T> x, y, inferred, dy, dx;
    std::vector<std::uint8_t> mask;
    oracle::numbers x_values, dy_values;

    run_of_layer(support::random& r, const Gate& gate, const Expert& expert, int64_t width, const setting& set)
        : layer{gate, expert, self{}}, s(set),
          model(support::random_model<T, Executor>(r, expert, width, gate.experts, bias_of(r, gate.experts, set))),
          before(set.gradients == write_mode::accumulate ? support::redrawn<G>(r, model) : support::poisoned(model)),
          w(ex, expert, model, set.layout), g(ex, expert, before, set.layout), later(ex, expert, before, other_layout(set)),
          x(s.tokens, width, s.skew()), y(s.tokens, width, s.skew()),
          inferred(s.tokens, width), dy(s.tokens, width, s.skew()), dx(s.tokens, width, s.skew())
    {
        x_values = support::fill_normal(r, x.view());
        dy_values = support::fill_normal(r, dy.view());
        for (int64_t t = 0; s.masked && t < s.tokens; ++t) mask.push_back(r.coin(0.35) ? 0 : static_cast<std::uint8_t>(r.integer(1, 255)));
    }

    /// judge(saved) looks at what forward kept, before backward.
    template <class Judge, class Beside = nothing_beside>
    void operator()(const Judge& judge, Beside&& beside = {})
    {
        model.shared = beside.experts();
        const int64_t width = model.width;
        const auto in_mask = support::upload(ex, mask);
        const gate_options options{.mask = in_mask.view()};
        support::workspace kept(ex, layer.template forward_bytes<T>(ex, s.tokens, width, w.views));
        const auto saved = layer.forward(ex, x.view(), w.views, y.view(), kept.arena(), options);
        CHECK_EQ(kept.arena().used(), layer.template saved_bytes<T>(s.tokens, width));
        beside.forward(ex, x.view(), y.view());
        const backward_options how{.gradients = s.gradients, .loss_scale = s.loss_scale};
        support::workspace lent(ex, layer.template backward_bytes<T>(ex, s.tokens, width, w.views, g.views));
        layer.backward(ex, saved, dy.view(), w.views, dx.view(), g.views, lent.arena(), how);
        CHECK_EQ(lent.arena().used(), 0);
        in_two_calls(saved, how);
        beside.backward(ex, dy.view(), dx.view());
        support::workspace inference(ex, layer.template infer_bytes<T>(ex, s.tokens, width, w.views));
        layer.infer(ex, x.view(), w.views, inferred.view(), inference.arena(), options);
        CHECK_EQ(inference.arena().used(), 0);
        beside.infer(ex, x.view(), inferred.view());
        ex.synchronize();
        CHECK(support::same_bits(support::download(ex, inferred.view()), support::download(ex, y.view())));
        CHECK_EQ(y.damage(), "");
        CHECK_EQ(dx.damage(), "");
        CHECK(w.experts.gaps_kept());
        CHECK(g.experts.gaps_kept());
        judge(saved);
    }

    /// @param live  tokens that are no padding; `expected` is of them alone
    outcome<T, G> results(const support::expected_layer<T>& expected, const std::vector<int64_t>& live)
    {
        outcome<T, G> o;
        o.tensors = {{"y", support::download(ex, y.view()), spread(expected.y, live, s.tokens, model.width)},
                     {"dx", support::download(ex, dx.view()), spread(expected.dx, live, s.tokens, model.width)}};
        const bool add = s.gradients == write_mode::accumulate;
        const auto sum = [&](typename support::expected_gradients<T>::sums sums, const oracle::numbers& old) {
            for (std::size_t i = 0; add && i < sums.size(); ++i) sums[i].add(old[i]);
            return totals(sums);
        };
        o.gradients = {{"the router's gradient", support::download(ex, g.views.gate), sum(expected.gate, before.gate)},
                       {"the router's bias gradient", support::download(ex, g.gate_bias.view()), sum(expected.gate_bias, before.gate_bias)}};
        using sums = support::expected_gradients<T>;
        const auto expert_gradients = [&](const char* name, oracle::numbers oracle::expert::*member, typename outcome<T, G>::member of) {
            typename sums::sums all;
            for (const auto& e : expected.experts) all.insert(all.end(), (e.*of).begin(), (e.*of).end());
            const auto should = sum(all, oracle::stacked(before.experts, member));
            o.gradients.push_back({name, support::narrowed<G>(g.experts.read(member)), should});
            o.gradients.push_back({name, support::narrowed<G>(later.experts.read(member)), should});
        };
        expert_gradients("up's gradient", &oracle::expert::up, &sums::up);
        expert_gradients("down's gradient", &oracle::expert::down, &sums::down);
        expert_gradients("up's bias gradient", &oracle::expert::up_bias, &sums::up_bias);
        expert_gradients("down's bias gradient", &oracle::expert::down_bias, &sums::down_bias);
        o.model = model;
        o.x = x_values;
        o.dy = dy_values;
        o.shared = expected.shared;
        return o;
    }

private:
    /// The weight gradients in a later call, in memory of their own, and perhaps in another layout.
    template <class Saved>
    void in_two_calls(const Saved& saved, const backward_options& how)
    {
        support::workspace first(ex, layer.template backward_input_bytes<T>(ex, s.tokens, model.width, w.views));
        support::workspace second(ex, layer.template backward_weights_bytes<T>(ex, s.tokens, model.width, later.views));
        support::guarded<T> dx_first(s.tokens, model.width);
        const auto pending = layer.backward_input(ex, saved, dy.view(), w.views, dx_first.view(), first.arena(), how);
        layer.backward_weights(ex, saved, pending, later.views, second.arena(), how);
        CHECK_EQ(second.arena().used(), 0);
        CHECK(support::same_bits(support::download(ex, dx_first.view()), support::download(ex, dx.view())));
        CHECK(support::same_bits(support::download(ex, later.gate.view()), support::download(ex, g.gate.view())));
        CHECK(later.experts.gaps_kept());
    }
    static support::weight_layout other_layout(const setting& set)
    {
        if (!set.other_layout) return set.layout;
        return {!set.layout.transposed, !set.layout.pointers, 3 - set.layout.padding};
    }
    static oracle::numbers bias_of(support::random& r, int64_t experts, const setting& s)
    {
        if (!s.gate_bias && !s.crowded) return {};
        auto bias = r.normals(experts, 0.3);
        for (int64_t e = 0; s.crowded && e < experts; ++e) bias[e] = 40 - 2.0 * double(e);
        return bias;
    }
};

/// A layer behind a softmax router of the library, and its expectation.
template <class Cell, class G = typename Cell::type, class Weigh, class Expert, class Beside = nothing_beside>
outcome<typename Cell::type, G> run(support::random& r, const top_k_gate<softmax_score, top_k, Weigh>& gate, const Expert& expert,
                                    const setting& s, Beside&& beside = {})
{
    using T = typename Cell::type;
    using real = accumulate_t<T>;
    const int64_t width = expert.model_width();
    run_of_layer<Cell, top_k_gate<softmax_score, top_k, Weigh>, Expert, G> layer(r, gate, expert, width, s);
    std::vector<int64_t> live;
    for (int64_t t = 0; t < s.tokens; ++t)
        if (layer.mask.empty() || layer.mask[t] != 0) live.push_back(t);
    const auto x = rows_of(layer.x_values, live, width), dy = rows_of(layer.dy_values, live, width);
    outcome<T, G> out;
    layer([&](const auto& saved) {
        const auto before = support::download(layer.ex, saved.parts().gate.chosen);
        const auto after = support::download(layer.ex, saved.routing().experts);
        const std::vector<int> chosen = rows_of(std::vector<int>(before.begin(), before.end()), live, gate.k);
        std::vector<bool> kept;
        for (const int e : rows_of(std::vector<int>(after.begin(), after.end()), live, gate.k)) kept.push_back(e >= 0);
        const support::expected_routing<T> route(options_of(gate, s.tokens), support::expected_logits<T>(layer.model, x, int64_t(live.size())),
                                                 int64_t(live.size()), gate.experts, chosen, kept);
        const auto expected = support::expect_layer<T>(layer.model, x, route, dy, s.loss_scale);
        out = layer.results(expected, live);
        out.options = route.options;
        out.choices = route.choices;
        out.complaints = {route.complaint(), capacity_complaint(route)};
        for (int64_t t = 0; s.masked && t < s.tokens; ++t)
            for (int64_t c = t * gate.k; layer.mask[t] == 0 && c < (t + 1) * gate.k; ++c)
                if (before[c] != -1 || after[c] != -1) out.complaints.push_back("token " + std::to_string(t) + " is masked and chose");
        for (std::size_t c = 0; c < after.size(); ++c)
            if (after[c] != before[c] && after[c] != -1) out.complaints.push_back("capacity changed a choice");
        std::vector<support::bounded<real>> weights;
        for (const auto& c : route.choices) weights.push_back(c.weight);
        out.scalars = {{"weights", support::download(layer.ex, saved.routing().weights), spread(weights, live, s.tokens, gate.k)},
                       {"losses", support::download(layer.ex, saved.losses()), {route.balance_loss, route.z_loss}}};
    }, beside);
    return out;
}

/// Every way in which weights and their gradients can lie in memory; gradients in T and, added, in fp32.
/// @param make  the expert for a width and a hidden width
template <class Cell, class Gate, class Make>
void layouts(support::random& r, const Gate& gate, const Make& make)
{
    const bool small = !std::is_same_v<typename Cell::executor, host_executor>;
    for (const bool transposed : {false, true})
        for (const bool pointers : {false, true})
            for (const int64_t padding : {0, 3}) {
                INFO("transposed ", transposed, ", pointers ", pointers, ", padding ", padding);
                setting s{.tokens = small ? 9 : 40, .layout = {transposed, pointers, padding}, .other_layout = true};
                check(run<Cell>(r, gate, make(19, 37), s));
                s.gradients = write_mode::accumulate;
                check(run<Cell, accumulate_t<typename Cell::type>>(r, gate, make(37, 19), s));
            }
}

/// The corners of the shape, each with its defined result.
/// @param make  the expert for a width and a hidden width
template <class Cell, class Make>
void corners(support::random& r, const Make& make)
{
    using raw = top_k_gate<softmax_score, top_k, raw_scores>;
    const auto corner = [&](const char* name, const raw& gate, const auto& expert, const setting& s) {
        INFO(std::string(name));
        check(run<Cell>(r, gate, expert, s));
    };
    corner("T = 0", {.experts = 4, .k = 2, .balance = {0.1}, .z = {0.1}}, make(8, 8), {.tokens = 0, .gate_bias = true});
    corner("T = 0, added", {.experts = 4, .k = 2}, make(8, 8), {.tokens = 0, .gradients = write_mode::accumulate});
    corner("T = 1", {.experts = 4, .k = 2, .balance = {0.1}}, make(8, 8), {.tokens = 1});
    corner("K = E", {.experts = 5, .k = 5, .balance = {0.1}}, make(8, 12), {.tokens = 20});
    corner("E = 1", {.experts = 1, .k = 1, .z = {0.1}}, make(8, 12), {.tokens = 20});
    corner("E = 1000", {.experts = 1000, .k = 2}, make(6, 4), {.tokens = 30});
    corner("E over 64 and K over 16, where the choice is exact", {.experts = 100, .k = 20}, make(6, 4), {.tokens = 5});
    corner("all tokens to one expert", {.experts = 5, .k = 1}, make(6, 8), {.tokens = 150, .crowded = true});
    corner("experts with no token", {.experts = 7, .k = 2, .balance = {0.1}}, make(6, 8), {.tokens = 30, .crowded = true});
    corner("experts with no token, added", {.experts = 7, .k = 2}, make(6, 8),
           {.tokens = 30, .crowded = true, .gradients = write_mode::accumulate});
    corner("capacity 0", {.experts = 4, .k = 2, .capacity = {0.0}, .balance = {0.1}}, make(6, 4), {.tokens = 30});
    corner("padding alone", {.experts = 4, .k = 2}, make(6, 4), {.tokens = 3, .masked = true});
    corner("D = H = 1", {.experts = 3, .k = 2}, make(1, 1), {.tokens = 200});
}

} // namespace compare_layer
