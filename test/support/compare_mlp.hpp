// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Runs an mlp on its own, as a layer would, with everything that can be said of it enumerated, and compares all results
/// with the oracle, element by element, within what fp32 sums leave open.
#pragma once

#include <doctest/doctest.h>

#include "support/compare_layer.hpp"
#include "support/routed.hpp"

#include <fastmoe/transfer/combine.hpp>
#include <fastmoe/transfer/dispatch.hpp>

namespace compare_mlp {

using namespace fastmoe;
namespace oracle = support::reference;

/// What is not said by the expert itself.
struct setting {
    int64_t tokens = 30, experts = 4, k = 2;
    bool ragged = false;
    int64_t alignment = 1;
    bool skewed = false;
    support::weight_layout layout{};
    write_mode gradients = write_mode::overwrite; ///< accumulate: onto random numbers
};

template <class Cell, class G = typename Cell::type, class Expert>
void compare(support::random& r, const Expert& expert, const setting& s)
{
    using T = typename Cell::type;
    using Executor = typename Cell::executor;
    using real = accumulate_t<T>;
    using memory = support::expert_memory<T, Expert, Executor>;
    auto ex = Cell::make();
    INFO("width ", expert.width, ", hidden ", expert.hidden, ", experts ", s.experts, ", tokens ", s.tokens, ", k ", s.k, ", biases ",
         expert.biases, ", weigh ", int(expert.weigh), ", transposed ", s.layout.transposed, ", pointers ", s.layout.pointers,
         ", padding ", s.layout.padding, ", layout ", int(expert.layout), ", alignment ", s.alignment, ", ragged ", s.ragged);
    support::routed<Executor, T> in(ex, r, {s.tokens, s.experts, s.k, s.ragged, s.alignment, 0.1, s.skewed});
    const auto model = memory::draw(r, expert, s.experts);
    const bool add = s.gradients == write_mode::accumulate;
    const auto before = add ? support::redrawn<G>(r, model) : support::poisoned(model);
    const memory w(ex, expert, model, s.layout);
    const support::expert_memory<G, Expert, Executor> gradients(ex, expert, before, s.layout);
    const int64_t slots = in.plan.slots, width = expert.width;
    support::guarded<T> x(s.tokens, width), dy(s.tokens, width), y(s.tokens, width), dx(s.tokens, width);
    support::guarded<T> rows(slots, width), again(slots, width), drows(slots, width);
    support::guarded<real> dweights(in.route.choices());
    const auto x_values = support::fill_normal(r, x.view()), dy_values = support::fill_normal(r, dy.view());
    std::fill_n(dweights.data(), in.route.choices(), real(0));
    const expert_input<T> input{{x.view(), in.plan.token_of}, in.plan.groups(), in.route.weights, in.plan.choice_of};
    support::in_workspace(ex, [&](arena& scratch) {
        const auto saved = expert.template reserve_saved<T>(scratch, slots);
        const auto pending = expert.template reserve_pending<T>(scratch, slots);
        const indexed_rows<T> dy_rows{dy.view(), in.plan.token_of};
        const mlp_weights<const T> weights = w.views();
        expert.forward(ex, input, weights, saved, rows.view(), scratch);
        expert.infer(ex, input, weights, again.view(), scratch);
        expert.backward(ex, input, weights, saved, dy_rows, pending, drows.view(), dweights.vector(), scratch);
        expert.weight_gradients(ex, input, saved, dy_rows, pending, gradients.views(), s.gradients, scratch);
        ex.synchronize();
    });
    if (expert.weighs_output()) combine(ex, rows.view(), in.route, in.plan, y.view());
    else combine_unweighted(ex, rows.view(), in.route, in.plan, y.view());
    combine_unweighted(ex, drows.view(), in.route, in.plan, dx.view());
    ex.synchronize();

    std::vector<support::weighted_choice<T>> choices;
    for (int64_t t = 0; t < s.tokens; ++t)
        for (int64_t c = in.first()[t]; c < in.first()[t + 1]; ++c) choices.push_back({t, in.ids()[c], double(in.weights()[c])});
    const support::expected_experts<T> expected(model, memory::where(expert), x_values, choices, dy_values);
    CHECK(support::within(y.view(), totals(expected.y)));
    CHECK(support::within(dx.view(), totals(expected.dx)));
    CHECK(support::within(dweights.vector(), expected.dweights));
    using g = support::expected_gradients<T>;
    const auto check = [&](const char* name, oracle::numbers oracle::expert::*member, typename g::sums g::*of) {
        typename g::sums sums;
        for (const auto& e : expected.gradients) sums.insert(sums.end(), (e.*of).begin(), (e.*of).end());
        const auto old = oracle::stacked(before, member);
        for (std::size_t i = 0; add && i < sums.size(); ++i) sums[i].add(old[i]);
        const auto verdict = support::within(support::narrowed<G>(gradients.read(member)), totals(sums));
        CHECK_MESSAGE(verdict, name, ": ", verdict);
    };
    check("up", &oracle::expert::up, &g::up);
    check("down", &oracle::expert::down, &g::down);
    check("up's bias", &oracle::expert::up_bias, &g::up_bias);
    check("down's bias", &oracle::expert::down_bias, &g::down_bias);
    bool same = true;
    for (int64_t slot = 0; slot < slots; ++slot)
        for (int64_t d = 0; in.plan.choice_of(slot) >= 0 && d < width; ++d)
            same = same && double(again.view()(slot, d)) == double(rows.view()(slot, d));
    CHECK_MESSAGE(same, "infer and forward give the same rows");
    for (int64_t slot = 0; slot < slots; ++slot)
        if (in.plan.choice_of(slot) < 0) {
            REQUIRE(support::poisoned(row(rows.view(), slot)) == width);
            REQUIRE(support::poisoned(row(drows.view(), slot)) == width);
        }
    CHECK_EQ(rows.damage(), "");
    CHECK_EQ(drows.damage(), "");
    CHECK_EQ(dweights.damage(), "");
    CHECK(w.gaps_kept());
    CHECK(gradients.gaps_kept());
}

/// f(expert) for biases or none, the weight on input, activation and output, and both orders of gate and up rows.
template <class Activation, class Gemm = gemm::portable, class F>
void for_every_kind(int64_t width, int64_t hidden, const F& f)
{
    for (const bool biases : {false, true})
        for (const auto weigh : {weigh_at::output, weigh_at::activation, weigh_at::input})
            for (const auto layout : {gated_layout::concatenated, gated_layout::interleaved})
                if (Activation::gated || layout == gated_layout::concatenated)
                    f(mlp<Activation, Gemm>{.width = width, .hidden = hidden, .biases = biases, .weigh = weigh, .layout = layout});
}

/// Every kind of expert with tokens, and gradients of both types, written and added.
template <class Cell, class Activation>
void enumerate(support::random& r, int64_t tokens)
{
    using T = typename Cell::type;
    for_every_kind<Activation>(r.integer(9, 40), r.integer(9, 50), [&](const auto& expert) {
        compare<Cell>(r, expert, {.tokens = tokens, .experts = 4, .k = 2});
        compare<Cell, accumulate_t<T>>(r, expert, {.tokens = tokens, .experts = 3, .k = 3, .gradients = write_mode::accumulate});
    });
}

/// Shapes at random, the small ones too.
template <class Cell, class Activation>
void draw(support::random& r, int rounds)
{
    for (int round = 0; round < rounds; ++round) {
        const mlp<Activation> expert{.width = r.integer(1, 40), .hidden = r.integer(1, 50), .biases = r.coin(),
                                     .weigh = r.one_of(weigh_at::output, weigh_at::activation, weigh_at::input),
                                     .layout = r.one_of(gated_layout::concatenated, gated_layout::interleaved)};
        setting s{.tokens = r.one_of<int64_t>(0, 1, 7, 60), .experts = r.integer(1, 6)};
        s.k = r.integer(1, s.experts);
        s.ragged = r.coin(0.3);
        s.alignment = r.one_of<int64_t>(1, 8);
        s.skewed = r.coin(0.2);
        s.layout = {r.coin(0.3), r.coin(0.3), r.one_of<int64_t>(0, 3)};
        if (r.coin()) s.gradients = write_mode::accumulate;
        compare<Cell>(r, expert, s);
    }
}

} // namespace compare_mlp

#if defined(FASTMOE_TEST_CUDA)
#define FASTMOE_MLP_TEST_ON_CUDA(label, policy)                                                                       \
    TEST_CASE_TEMPLATE("an mlp with " label ", alone and in a layer, gives the oracle's values and gradients on the GPU", T, FASTMOE_DTYPES) \
    {                                                                                                                 \
        using Cell = ::support::cell<::fastmoe::cuda_executor, T>;                                                    \
        FASTMOE_NEEDS(Cell);                                                                                          \
        FASTMOE_SEEDED(r, 34);                                                                                        \
        ::compare_mlp::enumerate<Cell, policy>(r, 30);                                                                \
        ::compare_mlp::draw<Cell, policy>(r, 10);                                                                     \
        const ::fastmoe::top_k_gate<::fastmoe::softmax_score, ::fastmoe::top_k, ::fastmoe::raw_scores> gate{.experts = 4, .k = 2}; \
        ::compare_mlp::for_every_kind<policy>(17, 24, [&](const auto& expert) {                                       \
            ::compare_layer::check(::compare_layer::run<Cell>(r, gate, expert, {.tokens = 25}));                      \
        });                                                                                                           \
    }
#else
#define FASTMOE_MLP_TEST_ON_CUDA(label, policy)
#endif

/// The tests of one activation: alone on the host in every dtype and on lanes in one, and inside of a layer.
#define FASTMOE_MLP_TEST(name, policy)                                                                                \
    FASTMOE_MLP_TEST_ON_CUDA(name, policy)                                                                           \
    TEST_CASE_TEMPLATE("an mlp with " name " gives the oracle's values and gradients, whatever its options", T, FASTMOE_DTYPES) \
    {                                                                                                                 \
        FASTMOE_SEEDED(r, 31);                                                                                        \
        ::compare_mlp::enumerate<::support::cell<::fastmoe::host_executor, T>, policy>(r, 30);                        \
        ::compare_mlp::draw<::support::cell<::fastmoe::host_executor, T>, policy>(r, 20);                             \
    }                                                                                                                 \
    TEST_CASE("an mlp with " name " gives the oracle's values and gradients on lanes")                                \
    {                                                                                                                 \
        FASTMOE_SEEDED(r, 32);                                                                                        \
        ::compare_mlp::enumerate<::support::cell<::support::lanes, float>, policy>(r, 5);                             \
        ::compare_mlp::draw<::support::cell<::support::lanes, float>, policy>(r, 4);                                  \
    }                                                                                                                 \
    TEST_CASE_TEMPLATE("a layer of mlps with " name " gives the oracle's values and gradients, whatever its options", T, FASTMOE_DTYPES) \
    {                                                                                                                 \
        FASTMOE_SEEDED(r, 33);                                                                                        \
        const ::fastmoe::top_k_gate<::fastmoe::softmax_score, ::fastmoe::top_k, ::fastmoe::raw_scores> gate{.experts = 4, .k = 2}; \
        ::compare_mlp::for_every_kind<policy>(17, 24, [&](const auto& expert) {                                       \
            ::compare_layer::check(::compare_layer::run<::support::cell<::fastmoe::host_executor, T>>(r, gate, expert, {.tokens = 25})); \
        });                                                                                                           \
    }
