// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Runs a whole layer forward, backward and infer on every executor and dtype, and compares it with the oracle.
#pragma once

#include <doctest/doctest.h>

#include "compare.hpp"
#include "layer_memory.hpp"

namespace compare_layer {

using namespace fastmoe;
namespace oracle = support::reference;

struct setting {
    int64_t tokens, width, hidden, experts, k;
    bool biases = false;
    weigh_at weigh = weigh_at::output;
    double scale = 1, balance = 0, z = 0;
    fastmoe::capacity capacity{};
};

inline double largest(const oracle::numbers& v)
{
    double m = 0;
    for (double x : v) m = std::fmax(m, std::fabs(x));
    return m;
}

template <class T>
support::verdict near(const oracle::numbers& found, const oracle::numbers& expected, double magnitude, double length)
{
    return support::close(support::narrowed<T>(found), expected,
                          {.length = length, .roundings = 8, .magnitude = magnitude + largest(expected)});
}

template <class Cell, class Weigh, class Activation>
void compare(support::random& r, const setting& s, oracle::activation act)
{
    using T = typename Cell::type;
    using Executor = typename Cell::executor;
    auto ex = Cell::make();
    INFO("T ", s.tokens, ", D ", s.width, ", H ", s.hidden, ", E ", s.experts, ", K ", s.k, ", biases ", s.biases, ", weigh ",
         int(s.weigh), ", balance ", s.balance, ", z ", s.z, ", capacity ", s.capacity.factor, " order ",
         int(s.capacity.order));
    const mlp<Activation> expert{.width = s.width, .hidden = s.hidden, .biases = s.biases, .weigh = s.weigh};
    using gate_type = top_k_gate<softmax_score, top_k, Weigh>;
    const moe_layer layer{gate_type{.experts = s.experts, .k = s.k, .scale = s.scale, .capacity = s.capacity,
                                    .balance = {s.balance}, .z = {s.z}},
                          expert, self{}};
    support::layer_memory<T, mlp<Activation>, Executor> w(ex, r, expert, s.experts, act, s.biases);
    support::gradient_memory<T, mlp<Activation>, Executor> g(ex, w.model);
    support::guarded<T> x(s.tokens, s.width, 1), y(s.tokens, s.width, 1), inferred(s.tokens, s.width), dy(s.tokens, s.width, 1),
        dx(s.tokens, s.width, 1);
    const auto x_values = support::fill_normal(r, x.view()), dy_values = support::fill_normal(r, dy.view());

    support::workspace kept(ex, layer.template forward_bytes<T>(ex, s.tokens, s.width));
    const auto saved = layer.forward(ex, x.view(), w.views, y.view(), kept.arena());
    CHECK(kept.arena().used() == layer.template saved_bytes<T>(s.tokens, s.width));
    support::workspace lent(ex, layer.template backward_bytes<T>(ex, s.tokens, s.width));
    layer.backward(ex, saved, dy.view(), w.views, dx.view(), g.views, lent.arena(), {.loss_scale = 0.5});
    CHECK(lent.arena().used() == 0);
    support::workspace inference(ex, layer.template infer_bytes<T>(ex, s.tokens, s.width));
    layer.infer(ex, x.view(), w.views, inferred.view(), inference.arena());
    ex.synchronize();

    // Choices before and after capacity, checked by the oracle where the logits are exact enough to have no near ties.
    oracle::options o{.k = s.k, .renormalize = Weigh::over_chosen, .scale = s.scale, .balance = s.balance, .z = s.z};
    const auto chosen32 = support::download(ex, saved.parts().gate.chosen);
    const auto after = support::download(ex, saved.routing().experts);
    const std::vector<int> chosen(chosen32.begin(), chosen32.end());
    std::vector<bool> keeps;
    for (const int e : after) keeps.push_back(e >= 0);
    if constexpr (std::is_same_v<T, double>) {
        auto free = o;
        if (s.capacity.limited()) free.capacity = oracle::capacity_of(s.capacity.factor, s.k, s.tokens, s.experts);
        free.drop = s.capacity.order == drop_order::token_major    ? oracle::drop_order::token_major
                    : s.capacity.order == drop_order::choice_major ? oracle::drop_order::choice_major
                                                                   : oracle::drop_order::by_weight;
        const auto own = oracle::forward(w.model, free, x_values, s.tokens);
        CHECK(own.routing.chosen == chosen);
        CHECK(own.routing.expert_ids() == std::vector<int>(after.begin(), after.end()));
    }
    const auto out = oracle::forward(w.model, o, x_values, s.tokens, &chosen, &keeps);
    const auto back = oracle::backward(w.model, o, x_values, s.tokens, out, dy_values, 0.5);

    // Bounds: the experts on absolute values, and what an error of the logits can do to weights and losses.
    auto absolute = w.model;
    absolute.experts = support::absolute(w.model.experts);
    oracle::numbers y_bound(x_values.size()), dx_bound(x_values.size());
    std::vector<oracle::expert> g_bound;
    for (const auto& e : absolute.experts) g_bound.push_back(zeros_like(e));
    auto choices = out.routing.choices;
    apply(absolute.experts, w.model.where, support::absolute(x_values), choices, y_bound);
    const auto dw = apply_backward(absolute.experts, w.model.where, support::absolute(x_values), choices,
                                   support::absolute(dy_values), dx_bound, g_bound);
    const double logit = double(s.width) * largest(x_values) * largest(w.model.gate) + 1;
    const double dlogit = 8 * logit * (largest(dw) * s.scale * double(s.k) + 0.5 * (s.balance * double(s.experts) + s.z * logit) / double(s.tokens + 1) + largest(back.logits));
    const double length = double(4 * s.width + 4 * s.hidden + 4 * s.experts + s.tokens * s.k + 40);
    CHECK(near<T>(support::widened(y.view()), out.y, 8 * logit * largest(y_bound), length));
    CHECK(near<T>(support::widened(dx.view()), back.x, 8 * logit * largest(dx_bound) + double(s.experts) * dlogit * largest(w.model.gate), length));
    CHECK(near<T>(support::widened(g.gate.view()), back.gate, double(s.tokens) * dlogit * largest(x_values), length));
    CHECK(near<T>(support::widened(g.gate_bias.view()), back.gate_bias, double(s.tokens) * dlogit, length));
    for (auto member : {&oracle::expert::up, &oracle::expert::down, &oracle::expert::up_bias, &oracle::expert::down_bias}) {
        const auto found = member == &oracle::expert::up        ? g.experts.up()
                           : member == &oracle::expert::down    ? g.experts.down()
                           : member == &oracle::expert::up_bias ? g.experts.up_bias()
                                                                : g.experts.down_bias();
        CHECK(near<T>(found, oracle::stacked(back.experts, member), 8 * logit * largest(oracle::stacked(g_bound, member)), length));
    }
    using real = accumulate_t<T>;
    const auto losses = support::download(ex, saved.losses());
    CHECK(near<real>({double(losses[0])}, {out.routing.balance_loss}, logit * s.balance * double(s.experts), length));
    CHECK(near<real>({double(losses[1])}, {out.routing.z_loss}, 2 * logit * logit * s.z, length));
    CHECK(support::same_bits(support::download(ex, inferred.view()), support::download(ex, y.view())));
    CHECK(y.damage() == "");
    CHECK(dx.damage() == "");
}

} // namespace compare_layer
