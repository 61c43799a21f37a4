// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Experts over a plan that is padded to a capacity: rows without a choice may hold NaN, and nothing of it gets out.
#include <doctest/doctest.h>

#include <fastmoe/transfer/combine.hpp>
#include <fastmoe/transfer/dispatch.hpp>

#include "support/compare.hpp"
#include "support/expert_weights.hpp"
#include "support/poison.hpp"
#include "support/routed.hpp"

using namespace fastmoe;
namespace oracle = support::reference;

namespace {

/// Everything that a step writes, over memory that is NaN before.
template <class T>
struct step {
    std::vector<double> y, dx, dweights, up, down;

    step(host_executor& ex, const support::routed<host_executor, T>& in, const plan& p, const mlp<gelu>& expert,
         const std::vector<oracle::expert>& model, support::random r)
    {
        const support::expert_memory<T, mlp<gelu>, host_executor> w(ex, expert, model);
        const support::expert_memory<accumulate_t<T>, mlp<gelu>, host_executor> gradients(ex, expert, support::poisoned(model));
        support::guarded<T> x(p.tokens, expert.width), dy(p.tokens, expert.width), to_y(p.tokens, expert.width),
            to_dx(p.tokens, expert.width), rows(p.slots, expert.width), drows(p.slots, expert.width);
        support::fill_normal(r, x.view());
        support::fill_normal(r, dy.view());
        std::vector<accumulate_t<T>> weight_gradients(in.ids().size());
        const expert_input<T> input{{x.view(), p.token_of}, p.groups(), in.route.weights, p.choice_of};
        support::in_workspace(ex, [&](arena& memory) {
            const auto saved = expert.template reserve_saved<T>(memory, p.slots);
            const auto pending = expert.template reserve_pending<T>(memory, p.slots);
            const indexed_rows<T> from{dy.view(), p.token_of};
            const mlp_weights<const T> weights = w.views();
            expert.forward(ex, input, weights, saved, rows.view(), memory);
            expert.backward(ex, input, weights, saved, from, pending, drows.view(), as_vector(weight_gradients), memory);
            expert.weight_gradients(ex, input, saved, from, pending, gradients.views(), write_mode::overwrite, memory);
        });
        combine(ex, rows.view(), in.route, p, to_y.view());
        combine_unweighted(ex, drows.view(), in.route, p, to_dx.view());
        CHECK_EQ(rows.damage(), "");
        CHECK_EQ(drows.damage(), "");
        y = support::widened(to_y.view());
        dx = support::widened(to_dx.view());
        dweights = support::widened(weight_gradients);
        up = gradients.read(&oracle::expert::up);
        down = gradients.read(&oracle::expert::down);
    }
};

} // namespace

TEST_CASE_TEMPLATE("rows past an expert's choices hold NaN, and values and gradients are those of a plan without them", T,
                   FASTMOE_DTYPES)
{
    FASTMOE_SEEDED(r, 121);
    host_executor ex({.threads = 2});
    for (int64_t spare : {0, 1, 37}) {
        support::routed<host_executor, T> in(ex, r, {.tokens = 40, .experts = 5, .k = 2});
        const mlp<gelu> expert{.width = 12, .hidden = 20, .biases = true};
        const auto model = support::expert_memory<T, mlp<gelu>, host_executor>::draw(r, expert, 5);
        int64_t most = 0;
        for (int64_t e = 0; e < 5; ++e) most = std::max<int64_t>(most, in.plan.counts(e));
        const support::random data(r.bits());
        const step<T> plain(ex, in, in.plan, expert, model, data);
        support::in_workspace(ex, [&](arena& memory) {
            const plan padded = reserve_padded_plan(memory, 40, in.route.choices(), 5, most + spare);
            make_plan(ex, in.route, padded, memory);
            if (memory.measuring()) return;
            const step<T> got(ex, in, padded, expert, model, data);
            CHECK(support::same_bits(got.y, plain.y));
            CHECK(support::same_bits(got.dx, plain.dx));
            CHECK(support::same_bits(got.dweights, plain.dweights));
            CHECK(support::same_bits(got.up, plain.up));
            CHECK(support::same_bits(got.down, plain.down));
            for (double v : got.up) REQUIRE(std::isfinite(v));
        });
    }
}
