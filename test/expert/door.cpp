// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Experts used on their own: whatever is wrong with one view, or with the workspace, no output is touched.
#include <doctest/doctest.h>

#include "support/bad_views.hpp"
#include "support/expert_weights.hpp"
#include "support/poison.hpp"
#include "support/routed.hpp"

using namespace fastmoe;
namespace oracle = support::reference;
using support::bad_views;
using support::memory_is;

namespace {

constexpr int64_t tokens = 9, width = 6, hidden = 4, experts = 3;

/// The views of all passes of an expert, outputs poisoned.
template <class Expert>
struct passes {
    using weights_type = typename Expert::template weights<float>;

    host_executor ex{{.threads = 2}};
    support::random r{121};
    Expert expert;
    support::routed<host_executor, float> in{ex, r, {.tokens = tokens, .experts = experts, .k = 2, .dropped = 0}};
    int64_t slots = in.plan.slots, choices = in.route.choices();
    support::guarded<float> x{tokens, width}, dy{tokens, width}, y_memory{slots, width}, dx_memory{slots, width}, dw_memory{choices};
    support::workspace<host_executor> memory{ex, 1 << 18};

    expert_input<float> input{{x.view(), in.plan.token_of}, in.plan.groups(), in.route.weights, in.plan.choice_of};
    indexed_rows<float> dy_rows{dy.view(), in.plan.token_of};
    matrix_view<float> y = y_memory.view(), dx = dx_memory.view();
    vector_view<float> dweights = dw_memory.vector();
    weights_type w, g;
    decltype(expert.template reserve_saved<float>(memory.arena(), 0)) saved;
    decltype(expert.template reserve_pending<float>(memory.arena(), 0)) pending;
    vector_view<std::byte> outputs; // of saved, pending and the gradients

    explicit passes(const Expert& e) : expert(e)
    {
        support::fill_normal(r, x.view());
        support::fill_normal(r, dy.view());
        w = expert.template reserve_weights<float>(memory, experts);
        expert.initialize(ex, w, 1);
        const int64_t from = memory.arena().used();
        g = expert.template reserve_weights<float>(memory, experts);
        saved = expert.template reserve_saved<float>(memory, slots);
        pending = expert.template reserve_pending<float>(memory, slots);
        const int64_t to = memory.arena().used();
        memory.arena().rewind(from);
        outputs = memory.arena().vector<std::byte>(to - from);
        memory.arena().rewind(to);
    }

    void forward(arena& a) { expert.forward(ex, input, constant(), saved, y, a); }
    void infer(arena& a) { expert.infer(ex, input, constant(), y, a); }
    void backward(arena& a) { expert.backward(ex, input, constant(), saved, dy_rows, pending, dx, dweights, a); }
    void gradients(arena& a) { expert.weight_gradients(ex, input, saved, dy_rows, pending, g, write_mode::overwrite, a); }

    enum call : unsigned { ahead = 1, back = 2, late = 4 };

    int64_t untouched()
    {
        return support::poisoned(y_memory.view()) + support::poisoned(dx_memory.view()) + support::poisoned(dw_memory.vector()) +
               support::poisoned(outputs);
    }
    template <class Error>
    void refuses(unsigned calls, const char* name, arena& a)
    {
        const int64_t before = untouched(), used = a.used();
        const auto check = [&](unsigned c, auto run) {
            if (!(calls & c)) return;
            CAPTURE(c);
            const auto text = support::message_of<Error>(run);
            CHECK_MESSAGE(support::has(text, name), text);
            CHECK_EQ(untouched(), before);
            CHECK_EQ(a.used(), used);
        };
        check(ahead, [&] { forward(a); });
        check(ahead, [&] { infer(a); });
        check(back, [&] { backward(a); });
        check(late, [&] { gradients(a); });
    }
    template <class View, class Bad>
    void refuses_all(unsigned calls, View& view, const Bad& bad, const char* name)
    {
        const View good = view;
        for (const auto& b : bad) {
            CAPTURE(b.what);
            view = b.view;
            refuses<invalid_argument>(calls, name, memory.arena());
            view = good;
        }
    }
    /// What every expert looks at.
    void refuses_input()
    {
        refuses_all(7, input.x.index, bad_views(input.x.index), "x.index (S)");
        refuses_all(7, input.choice_of, bad_views(input.choice_of), "choice_of (S)");
        refuses_all(7, input.groups.offsets, bad_views(input.groups.offsets), "groups.offsets (E+1)");
        const auto x_views = bad_views(input.x.data);
        for (const auto& b : x_views) // how many tokens there are, it cannot know
            if (b.what != "fewer rows" && b.what != "more rows") refuses_all(7, input.x.data, std::vector{b}, "x (T,D)");
        for (const auto& b : bad_views(dy_rows.data))
            if (b.what != "fewer rows" && b.what != "more rows") refuses_all(6, dy_rows.data, std::vector{b}, "dy (T,D)");
        refuses_all(6, dy_rows.index, bad_views(dy_rows.index), "dy.index (S)");
        refuses_all(ahead, y, bad_views(y), "y (S,D)");
        refuses_all(back, dx, bad_views(dx), "dx (S,D)");
    }
    /// Scratch that is too small by a byte, for each call.
    void refuses_short_scratch()
    {
        const auto check = [&](unsigned calls, auto run) {
            arena measure;
            run(measure);
            if (measure.bytes() == 0) return;
            support::workspace small(ex, measure.bytes() - 1);
            refuses<out_of_memory>(calls, "workspace is", small.arena());
        };
        check(ahead, [&](arena& a) { forward(a); }); // infer takes more
        check(back, [&](arena& a) { backward(a); });
        check(late, [&](arena& a) { gradients(a); });
    }

private:
    typename Expert::template weights<const float> constant() const { return w; }
};

} // namespace

TEST_CASE("an mlp refuses every wrong view by name, and a workspace that is too small, before any output is touched")
{
    for (const weigh_at weigh : {weigh_at::output, weigh_at::input}) {
        passes<mlp<swiglu>> p({.width = width, .hidden = hidden, .biases = true, .weigh = weigh});
        p.refuses_input();
        p.refuses_all(p.back, p.dweights, bad_views(p.dweights), "dweights (C)");
        p.refuses_all(p.ahead | p.back, p.w.up, bad_views(p.w.up), "weights.up (E,H',D)");
        p.refuses_all(p.ahead | p.back, p.w.down, bad_views(p.w.down), "weights.down (E,D,H)");
        p.refuses_all(p.ahead | p.back, p.w.up_bias, bad_views(p.w.up_bias, memory_is::optional), "weights.up_bias (E,H')");
        p.refuses_all(p.ahead | p.back, p.w.down_bias, bad_views(p.w.down_bias, memory_is::optional), "weights.down_bias (E,D)");
        p.refuses_all(p.late, p.g.up, bad_views(p.g.up), "gradients.up (E,H',D)");
        p.refuses_all(p.late, p.g.down, bad_views(p.g.down), "gradients.down (E,D,H)");
        p.refuses_all(p.late, p.g.up_bias, bad_views(p.g.up_bias, memory_is::optional), "gradients.up_bias (E,H')");
        p.refuses_all(p.late, p.g.down_bias, bad_views(p.g.down_bias, memory_is::optional), "gradients.down_bias (E,D)");
        p.refuses_all(p.back | p.late, p.pending.dpre, bad_views(p.pending.dpre), "pending.dpre (S,H')");
        p.refuses_all(p.back | p.late, p.pending.activation, bad_views(p.pending.activation), "pending.activation (S,H)");
        p.refuses_all(p.back, p.saved.pre, bad_views(p.saved.pre), "saved.pre (S,H')");
        p.refuses_short_scratch();
        p.forward(p.memory.arena());
        p.backward(p.memory.arena());
        p.gradients(p.memory.arena());
        CHECK(p.untouched() < 64 * 256); // gaps between blocks of the arena
        CHECK_EQ(support::poisoned(p.y) + support::poisoned(p.dx) + support::poisoned(p.dweights), 0);
    }
}

TEST_CASE("a linear expert refuses every wrong view by name, and a workspace that is too small, before any output is touched")
{
    passes<linear<>> p({.width = width, .biases = true});
    p.refuses_input();
    p.refuses_all(p.ahead | p.back, p.w.weight, bad_views(p.w.weight), "weights.weight (E,D,D)");
    p.refuses_all(p.ahead | p.back, p.w.bias, bad_views(p.w.bias, memory_is::optional), "weights.bias (E,D)");
    p.refuses_all(p.late, p.g.weight, bad_views(p.g.weight), "gradients.weight (E,D,D)");
    p.refuses_all(p.late, p.g.bias, bad_views(p.g.bias, memory_is::optional), "gradients.bias (E,D)");
    p.refuses_short_scratch();
    p.forward(p.memory.arena());
    p.backward(p.memory.arena());
    p.gradients(p.memory.arena());
    CHECK_EQ(support::poisoned(p.y) + support::poisoned(p.dx), 0);
}

TEST_CASE("a pair refuses what is wrong with its second type before the first has begun")
{
    passes<expert_pair<mlp<gelu>, linear<>>> p({{{.width = width, .hidden = hidden}, 2}, {{.width = width, .biases = true}, 1}});
    p.refuses_all(p.ahead | p.back, p.w.second.weight, bad_views(p.w.second.weight), "weights.weight (E,D,D)");
    p.refuses_all(p.ahead | p.back, p.w.first.down, bad_views(p.w.first.down), "weights.down (E,D,H)");
    p.refuses_all(p.late, p.g.second.bias, bad_views(p.g.second.bias, memory_is::optional), "gradients.bias (E,D)");
    p.refuses_short_scratch();
    p.expert.second.count = 2;
    p.refuses<invalid_argument>(7, "experts is 3; expected the pair's 4", p.memory.arena());
    p.expert.second.count = 1;
    p.forward(p.memory.arena());
    p.backward(p.memory.arena());
    p.gradients(p.memory.arena());
    CHECK_EQ(support::poisoned(p.y) + support::poisoned(p.dx) + support::poisoned(p.dweights), 0);
}
