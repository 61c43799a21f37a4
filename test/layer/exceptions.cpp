// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What an exception leaves behind: a gate, an expert or a fault may end a call anywhere, and the workspace is as it was.
#include <doctest/doctest.h>

#include <stdexcept>

#include <fastmoe/layer/shared_expert.hpp>
#include <fastmoe/routing/assigned_gate.hpp>

#include "support/layer_memory.hpp"

using namespace fastmoe;

namespace {

enum class moment { never, route, gate_backward, infer, forward, backward, weight_gradients };

/// Throws at its moment, with scratch in hand.
struct trap {
    const moment* now;

    void at(moment m, arena& scratch) const
    {
        scratch.vector<float>(1000);
        if (!scratch.measuring() && *now == m) throw std::runtime_error("sprung");
    }
};

struct trapped_gate {
    int64_t experts = 0, k = 2;
    trap sprung;
    top_k_gate<> gate() const { return {.experts = experts, .k = k}; }

    template <class Real>
    auto reserve(arena& memory, int64_t tokens) const
    {
        return gate().template reserve<Real>(memory, tokens);
    }
    template <class Executor, class T, class C, class State>
    void route(Executor& ex, const gate_input<T>& in, const C& c, const State& state, arena& scratch) const
    {
        sprung.at(moment::route, scratch);
        gate().route(ex, in, c, state, scratch);
    }
    template <class Executor, class T, class C, class State, class Real>
    void backward(Executor& ex, const gate_input<T>& in, const C& c, const State& state, vector_view<const Real> dweights,
                  Real loss_scale, matrix_view<Real> dlogits, arena& scratch) const
    {
        sprung.at(moment::gate_backward, scratch);
        gate().backward(ex, in, c, state, dweights, loss_scale, dlogits, scratch);
    }
};

struct trapped_expert {
    mlp<gelu> inner;
    trap sprung;
    static constexpr bool applies_weights = true;
    template <class T>
    using weights = mlp_weights<T>;

    bool weighs_output() const { return inner.weighs_output(); }
    template <class T>
    auto reserve_weights(arena& memory, int64_t experts) const
    {
        return inner.template reserve_weights<T>(memory, experts);
    }
    template <class T>
    auto reserve_saved(arena& memory, int64_t slots) const
    {
        return inner.template reserve_saved<T>(memory, slots);
    }
    template <class T>
    auto reserve_pending(arena& memory, int64_t slots) const
    {
        return inner.template reserve_pending<T>(memory, slots);
    }
    template <class Executor, class T>
    void infer(Executor& ex, const expert_input<T>& in, const weights<const T>& w, matrix_view<T> y, arena& scratch) const
    {
        sprung.at(moment::infer, scratch);
        inner.infer(ex, in, w, y, scratch);
    }
    template <class Executor, class T, class Saved>
    void forward(Executor& ex, const expert_input<T>& in, const weights<const T>& w, const Saved& saved, matrix_view<T> y,
                 arena& scratch) const
    {
        sprung.at(moment::forward, scratch);
        inner.forward(ex, in, w, saved, y, scratch);
    }
    template <class Executor, class T, class Saved, class Pending>
    void backward(Executor& ex, const expert_input<T>& in, const weights<const T>& w, const Saved& saved,
                  const indexed_rows<T>& dy, const Pending& pending, matrix_view<T> dx, vector_view<accumulate_t<T>> dweights,
                  arena& scratch) const
    {
        sprung.at(moment::backward, scratch);
        inner.backward(ex, in, w, saved, dy, pending, dx, dweights, scratch);
    }
    template <class Executor, class T, class Saved, class Pending, class G>
    void weight_gradients(Executor& ex, const expert_input<T>& in, const Saved& saved, const indexed_rows<T>& dy,
                          const Pending& pending, const weights<G>& g, write_mode mode, arena& scratch) const
    {
        sprung.at(moment::weight_gradients, scratch);
        inner.weight_gradients(ex, in, saved, dy, pending, g, mode, scratch);
    }
};

/// Throws with scratch in hand.
struct trapped_assignment {
    static constexpr bool reads_logits = false, ragged = false;
    const bool* sprung = nullptr;

    template <class Executor, class T, class C, class Real>
    void assign(Executor& ex, const gate_input<T>&, const C&, const assignment<Real>& to, arena& scratch) const
    {
        scratch.vector<float>(1000);
        if (scratch.measuring()) return;
        if (*sprung) throw std::runtime_error("sprung");
        for_each(ex, to.experts.extent(0), detail::fill<int32_t>{to.experts.data_handle(), 0});
    }
};

} // namespace

TEST_CASE_TEMPLATE("whichever policy throws, and wherever, the workspace serves the next call", Cell, FASTMOE_EXECUTORS)
{
    using Executor = typename Cell::executor;
    FASTMOE_SEEDED(r, 71);
    FASTMOE_EXECUTOR(ex, Cell);
    const int64_t tokens = 9, width = 6, experts = 3;
    moment now = moment::never;
    const mlp<gelu> plain{.width = width, .hidden = 5};
    const moe_layer layer{trapped_gate{.experts = experts, .sprung = {&now}}, trapped_expert{plain, {&now}}, self{}};
    const shared_expert shared{trapped_expert{plain, {&now}}};
    const auto model = support::random_model<float, Executor>(r, plain, width, experts);
    support::layer_memory<float, mlp<gelu>, Executor> memory(ex, plain, model), gradients(ex, plain, support::poisoned(model));
    const moe_weights<float, trapped_expert> w{memory.views.gate, {}, memory.views.expert},
        g{gradients.views.gate, {}, gradients.views.expert};
    const support::expert_memory<float, mlp<gelu>, Executor> one(ex, plain, {model.experts[0]}),
        done(ex, plain, support::poisoned({model.experts[0]}));
    support::guarded<float> x(tokens, width), y(tokens, width), dy(tokens, width), dx(tokens, width);
    support::fill_normal(r, x.view());
    support::fill_normal(r, dy.view());

    support::workspace kept(ex, layer.template forward_bytes<float>(ex, tokens, width));
    support::workspace lent(ex, layer.template backward_bytes<float>(ex, tokens, width));
    support::workspace inference(ex, layer.template infer_bytes<float>(ex, tokens, width));
    support::workspace more(ex, 1 << 20);
    const auto forward = [&] { return layer.forward(ex, x.view(), w, y.view(), kept.arena()); };
    const auto shared_forward = [&] { return shared.forward(ex, x.view(), one.views(), y.view(), more.arena()); };
    // A call that works, at the same place in the arena, after one that does not.
    const auto springs = [&](moment m, arena& a, auto call) {
        const int64_t used = a.used();
        now = m;
        CHECK_THROWS_WITH_AS(call(), "sprung", std::runtime_error);
        CHECK_EQ(a.used(), used);
        now = moment::never;
    };
    springs(moment::route, inference.arena(), [&] { layer.infer(ex, x.view(), w, y.view(), inference.arena()); });
    springs(moment::infer, inference.arena(), [&] { layer.infer(ex, x.view(), w, y.view(), inference.arena()); });
    layer.infer(ex, x.view(), w, y.view(), inference.arena());
    springs(moment::route, kept.arena(), [&] { (void)forward(); });
    springs(moment::forward, kept.arena(), [&] { (void)forward(); });
    const auto saved = forward();
    CHECK_EQ(kept.arena().used(), layer.template saved_bytes<float>(tokens, width));
    for (moment m : {moment::backward, moment::gate_backward, moment::weight_gradients})
        springs(m, lent.arena(), [&] { layer.backward(ex, saved, dy.view(), w, dx.view(), g, lent.arena()); });
    for (moment m : {moment::backward, moment::gate_backward})
        springs(m, lent.arena(), [&] { (void)layer.backward_input(ex, saved, dy.view(), w, dx.view(), lent.arena()); });
    const auto pending = layer.backward_input(ex, saved, dy.view(), w, dx.view(), more.arena());
    springs(moment::weight_gradients, lent.arena(), [&] { layer.backward_weights(ex, saved, pending, g, lent.arena()); });
    layer.backward(ex, saved, dy.view(), w, dx.view(), g, lent.arena());

    springs(moment::infer, more.arena(), [&] { shared.infer(ex, x.view(), one.views(), y.view(), more.arena()); });
    springs(moment::forward, more.arena(), [&] { (void)shared_forward(); });
    const auto passed = shared_forward();
    for (moment m : {moment::backward, moment::weight_gradients})
        springs(m, more.arena(), [&] {
            shared.backward(ex, passed, dy.view(), one.views(), dx.view(), done.views(), write_mode::overwrite, more.arena());
        });
    ex.synchronize();
}

TEST_CASE("a fault of the routing, and an assignment that throws, leave the workspace as it was")
{
    host_executor ex({.threads = 2});
    const std::vector<int32_t> wrong{0, 1, 7};
    std::vector<float> weights(3), logits;
    std::vector<int32_t> ids = wrong;
    const routing<float> route{3, 2, 1, as_vector(ids), as_vector(weights), {}};
    arena plans, scratch;
    make_plan(ex, route, reserve_plan(plans, 3, 3, 2), scratch);
    support::workspace memory(ex, plans.bytes()), lent(ex, scratch.bytes());
    CHECK_THROWS_AS(make_plan(ex, route, reserve_plan(memory, 3, 3, 2), lent), invalid_argument);
    CHECK_EQ(lent.arena().used(), 0);

    bool sprung = true;
    assigned_gate<trapped_assignment, constant_score> gate{.experts = 2, .k = 1};
    gate.assignment.sprung = &sprung;
    support::workspace kept(ex, 1 << 14), more(ex, 1 << 14);
    const auto state = gate.reserve<float>(kept, 3);
    gate_input<float> in;
    CHECK_THROWS_AS(gate.route(ex, in, self{}, state, more.arena()), std::runtime_error);
    CHECK_EQ(more.arena().used(), 0);
    sprung = false;
    gate.route(ex, in, self{}, state, more.arena());
    CHECK_EQ(more.arena().used(), 0);
}
