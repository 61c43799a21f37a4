// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Runs an mlp of random shape, layout and options on every executor and dtype, and compares all of it with the oracle.
#pragma once

#include <doctest/doctest.h>

#include "support/compare.hpp"
#include "support/expert_weights.hpp"
#include "support/poison.hpp"
#include "support/routed.hpp"

#include <fastmoe/transfer/combine.hpp>
#include <fastmoe/transfer/dispatch.hpp>

namespace compare_mlp {

using namespace fastmoe;
namespace oracle = support::reference;

template <class Cell>
struct setting {
    support::random& r;
    int64_t width, hidden, experts;
    bool biases;
    weigh_at weigh;
    support::weight_layout layout;
    typename support::routed<typename Cell::executor, typename Cell::type>::shape shape;

    explicit setting(support::random& random)
        : r(random), width(r.integer(1, 40)), hidden(r.integer(1, 50)), experts(r.integer(1, 6)), biases(r.coin()),
          weigh(r.one_of(weigh_at::output, weigh_at::activation, weigh_at::input)),
          layout{r.coin(0.3), r.coin(0.3), r.one_of(gated_layout::concatenated, gated_layout::interleaved)},
          shape{r.one_of<int64_t>(0, 1, 7, 60), experts, r.integer(1, experts), r.coin(0.3), r.one_of<int64_t>(1, 8), 0.1,
                r.coin(0.2)}
    {
    }
};

/// Runs an mlp forward and backward as a layer would, and compares everything with the oracle.
template <class Activation, class Cell, class G>
void compare(const setting<Cell>& s, oracle::activation act)
{
    using T = typename Cell::type;
    using Executor = typename Cell::executor;
    using real = accumulate_t<T>;
    auto ex = Cell::make();
    auto& r = s.r;
    INFO("width ", s.width, ", hidden ", s.hidden, ", experts ", s.experts, ", tokens ", s.shape.tokens, ", k ", s.shape.k,
         ", biases ", s.biases, ", weigh ", int(s.weigh), ", transposed ", s.layout.transposed, ", pointers ",
         s.layout.pointers, ", layout ", int(s.layout.gated), ", alignment ", s.shape.alignment);
    support::routed<Executor, T> in(ex, r, s.shape);
    const auto model = support::random_experts<T>(r, s.experts, oracle::expert_kind::mlp, act, s.width, s.hidden, s.biases);
    support::mlp_memory<T, Executor> w(ex, model, s.layout, false);
    support::guarded<T> x(s.shape.tokens, s.width), dy(s.shape.tokens, s.width);
    const auto x_values = support::fill_normal(r, x.view()), dy_values = support::fill_normal(r, dy.view());

    const mlp<Activation> expert{.width = s.width, .hidden = s.hidden, .biases = s.biases, .weigh = s.weigh,
                                 .layout = s.layout.gated};
    const int64_t slots = in.plan.slots;
    const expert_input<T> input{{x.view(), in.plan.token_of}, in.plan.groups(), in.route.weights, in.plan.choice_of};
    support::guarded<T> rows(slots, s.width), y(s.shape.tokens, s.width), again(slots, s.width);
    support::guarded<T> drows(slots, s.width), dx(s.shape.tokens, s.width);
    support::guarded<real> dweights(in.route.choices());
    std::fill_n(dweights.data(), in.route.choices(), real(0));
    support::mlp_memory<G, Executor> gradients(ex, model, s.layout, true);
    support::in_workspace(ex, [&](arena& memory) {
        const auto saved = expert.template reserve_saved<T>(memory, slots);
        const auto pending = expert.template reserve_pending<T>(memory, slots);
        const indexed_rows<T> dy_rows{dy.view(), in.plan.token_of};
        const mlp_weights<const T> weights = w.views();
        expert.forward(ex, input, weights, saved, rows.view(), memory);
        expert.infer(ex, input, weights, again.view(), memory);
        expert.backward(ex, input, weights, saved, dy_rows, pending, drows.view(), dweights.vector(), memory);
        expert.weight_gradients(ex, input, saved, dy_rows, pending, gradients.views(), write_mode::overwrite, memory);
        expert.weight_gradients(ex, input, saved, dy_rows, pending, gradients.views(), write_mode::accumulate, memory);
        ex.synchronize();
    });
    if (expert.weighs_output()) combine(ex, rows.view(), in.route, in.plan, y.view());
    else combine_unweighted(ex, rows.view(), in.route, in.plan, y.view());
    combine_unweighted(ex, drows.view(), in.route, in.plan, dx.view());
    ex.synchronize();

    // The oracle, and the oracle on absolute values for the bounds.
    std::vector<oracle::choice> choices;
    for (int64_t t = 0; t < s.shape.tokens; ++t)
        for (int64_t c = in.first()[t]; c < in.first()[t + 1]; ++c) choices.push_back({t, in.ids()[c], double(in.weights()[c])});
    const auto where = s.weigh == weigh_at::output ? oracle::weight_at::output
                       : s.weigh == weigh_at::input ? oracle::weight_at::input
                                                    : oracle::weight_at::activation;
    struct result {
        oracle::numbers y, dx, dweights;
        std::vector<oracle::expert> grads;
    };
    const auto run = [&](const std::vector<oracle::expert>& experts, const oracle::numbers& at, const oracle::numbers& back,
                         double times) {
        result out{oracle::numbers(at.size()), oracle::numbers(at.size()), {}, {}};
        for (const auto& e : experts) out.grads.push_back(zeros_like(e));
        apply(experts, where, at, choices, out.y);
        out.dweights = apply_backward(experts, where, at, choices, back, out.dx, out.grads);
        for (auto* v : {&out.y, &out.dx, &out.dweights})
            for (double& d : *v) d *= times;
        return out;
    };
    const result exact = run(model, x_values, dy_values, 1);
    const result bounds = run(support::absolute(model), support::absolute(x_values), support::absolute(dy_values), 4);
    const auto tolerance = [&](const oracle::numbers& magnitudes) {
        return support::tolerance{.length = double(4 * s.width + 4 * s.hidden + 3 * s.shape.k + 20), .roundings = 6,
                                  .magnitudes = &magnitudes};
    };
    CHECK(support::close(y.view(), exact.y, tolerance(bounds.y)));
    CHECK(support::close(dx.view(), exact.dx, tolerance(bounds.dx)));
    // Weights' gradients are kept in `real` but come from values that were rounded to T.
    const auto in_t = [](const oracle::numbers& v) { return support::narrowed<T>(v); };
    CHECK(support::close(in_t(support::widened(dweights.vector())), exact.dweights, tolerance(bounds.dweights)));
    for (auto member : {&oracle::expert::up, &oracle::expert::down, &oracle::expert::up_bias, &oracle::expert::down_bias}) {
        auto expected = oracle::stacked(exact.grads, member), magnitude = oracle::stacked(bounds.grads, member);
        for (double& d : expected) d *= 2; // written once, added once
        for (double& d : magnitude) d *= 8;
        const auto found = member == &oracle::expert::up        ? gradients.up()
                           : member == &oracle::expert::down    ? gradients.down()
                           : member == &oracle::expert::up_bias ? gradients.up_bias()
                                                                : gradients.down_bias();
        auto bound = tolerance(magnitude);
        bound.length += double(s.shape.tokens * s.shape.k);
        CHECK(support::close(in_t(found), expected, bound));
    }
    bool same = true;
    for (int64_t slot = 0; slot < slots; ++slot)
        for (int64_t d = 0; in.plan.choice_of(slot) >= 0 && d < s.width; ++d)
            same = same && double(again.view()(slot, d)) == double(rows.view()(slot, d));
    CHECK_MESSAGE(same, "infer and forward give the same rows");
    for (int64_t slot = 0; slot < slots; ++slot)
        if (in.plan.choice_of(slot) < 0) {
            REQUIRE(support::poisoned(row(rows.view(), slot)) == s.width);
            REQUIRE(support::poisoned(row(drows.view(), slot)) == s.width);
        }
    CHECK(rows.damage() == "");
    CHECK(drows.damage() == "");
    CHECK(dweights.damage() == "");
}

} // namespace compare_mlp

#define FASTMOE_MLP_TEST(name, policy, kind)                                                                            \
    TEST_CASE_TEMPLATE("an mlp with " name " gives the oracle's values and gradients", Cell, FASTMOE_CELLS)           \
    {                                                                                                                 \
        FASTMOE_SEEDED(r, 31 + std::uint64_t(::support::reference::activation::kind));                                              \
        for (int round = 0; round < 12; ++round) {                                                                    \
            const ::compare_mlp::setting<Cell> s(r);                                                                                 \
            ::compare_mlp::compare<policy, Cell, typename Cell::type>(s, ::support::reference::activation::kind);                                    \
            ::compare_mlp::compare<policy, Cell, ::fastmoe::accumulate_t<typename Cell::type>>(s, ::support::reference::activation::kind);                      \
        }                                                                                                             \
    }
