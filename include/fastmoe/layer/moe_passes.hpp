// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The passes of a layer as plain functions over its verbs. Each takes what it keeps from one arena and its scratch from
/// another (which may be the same); on measuring arenas they only count, so query and use cannot drift.
#pragma once

#include <fastmoe/exec/scratch.hpp>
#include <fastmoe/layer/moe_state.hpp>
#include <fastmoe/routing/project.hpp>
#include <fastmoe/transfer/combine.hpp>
#include <fastmoe/transfer/dispatch.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

template <class T, class Layer>
typename Layer::template parts<T> reserve_parts(const Layer& layer, arena& memory, int64_t tokens, int64_t width)
{
    using gate_type = std::remove_cvref_t<decltype(layer.gate)>;
    using expert_type = std::remove_cvref_t<decltype(layer.expert)>;
    typename Layer::template parts<T> p{};
    if constexpr (gate_reads_logits<gate_type>) p.logits = memory.matrix<accumulate_t<T>>(tokens, layer.gate.experts);
    p.gate = reserve_gate<accumulate_t<T>>(layer.gate, memory, tokens);
    const auto& route = p.gate.routing;
    p.slots = reserve_plan(memory, tokens, route.choices(), layer.gate.experts);
    p.expert = layer.expert.template reserve_saved<T>(memory, p.slots.slots);
    if constexpr (!expert_type::applies_weights) p.rows = memory.matrix<T>(p.slots.slots, width);
    return p;
}

template <class T, class Layer>
auto reserve_pending(const Layer& layer, arena& memory, int64_t tokens, int64_t width)
{
    using gate_type = std::remove_cvref_t<decltype(layer.gate)>;
    using expert_type = std::remove_cvref_t<decltype(layer.expert)>;
    arena measure;
    const int64_t slots = reserve_parts<T>(layer, measure, tokens, width).slots.slots;
    moe_pending<T, expert_type> p{};
    if constexpr (gate_reads_logits<gate_type>) p.dlogits = memory.matrix<accumulate_t<T>>(tokens, layer.gate.experts);
    p.expert = layer.expert.template reserve_pending<T>(memory, slots);
    if constexpr (!expert_type::applies_weights) {
        p.rows = memory.matrix<T>(slots, width);
        p.row_numbers = memory.vector<int32_t>(slots);
        p.dy = {p.rows, p.row_numbers};
    }
    return p;
}

/// Adds what came back through a jittered input: dx += u dx', with the u of the forward pass.
template <class T>
struct add_jittered {
    using vectorized = void;
    using real = accumulate_t<T>;
    const real* from; // (T,D)
    T* dx;            // (T,D)
    random_source random;
    std::uint64_t first;
    real epsilon;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        const real u = random.template uniform<real>(first + static_cast<std::uint64_t>(i));
        dx[i] = T(real(dx[i]) + from[i] * (real(1) - epsilon + real(2) * epsilon * u));
    }
};

/// The factor's reach in training; 0 for a gate that asks for none.
template <class Gate>
double jitter_of(const Gate& gate)
{
    if constexpr (jitters_input<Gate>) return gate.jitter.epsilon;
    else return 0;
}

/// f(the router's input): x, or x jittered into scratch.
template <class Layer, class Executor, class T, class F>
void with_router_input(const Layer& layer, Executor& ex, matrix_view<const T> x, const gate_options& options,
                       gate_mode mode, arena& scratch, F f)
{
    const double epsilon = jitter_of(layer.gate);
    if (epsilon == 0 || mode != gate_mode::training) return f(x);
    const arena::scope lent(scratch);
    const auto jittered = scratch.matrix<T>(x.extent(0), x.extent(1));
    if (!scratch.measuring()) jitter(ex, x, options.random, epsilon, jittered, options.first_token);
    f(matrix_view<const T>(jittered));
}

/// Logits, routing and plan.
template <class T, class Layer, class Executor, class Parts, class Weights>
void run_gate(const Layer& layer, Executor& ex, const Parts& p, const Weights& w, gate_mode mode, arena& scratch)
{
    using gate_type = std::remove_cvref_t<decltype(layer.gate)>;
    if constexpr (gate_reads_logits<gate_type>)
        with_router_input(layer, ex, p.x, p.options, mode, scratch,
                          [&](matrix_view<const T> x) { project(ex, x, w.gate, w.gate_bias, p.logits, scratch); });
    if constexpr (owns_parameters<gate_type>)
        layer.gate.route(ex, p.gate_view(mode), w.own, layer.communicator, p.gate, scratch);
    else layer.gate.route(ex, p.gate_view(mode), layer.communicator, p.gate, scratch);
    make_plan(ex, p.gate.routing, p.slots, scratch);
}

/// From the routing weights' gradients to the logits' and, added, to the input's.
template <class T, class Layer, class Executor, class Parts, class Weights, class Pending>
void run_gate_backward(const Layer& layer, Executor& ex, const Parts& p, const Weights& w, const Pending& pending,
                       vector_view<const accumulate_t<T>> dweights, accumulate_t<T> loss_scale, matrix_view<T> dx,
                       arena& scratch)
{
    using real = accumulate_t<T>;
    using gate_type = std::remove_cvref_t<decltype(layer.gate)>;
    constexpr bool projects = gate_reads_logits<gate_type>;
    if constexpr (owns_parameters<gate_type>)
        layer.gate.backward(ex, p.gate_view(gate_mode::training), w.own, layer.communicator, p.gate, dweights, loss_scale,
                            pending.dlogits, dx, scratch);
    else if constexpr (projects)
        layer.gate.backward(ex, p.gate_view(gate_mode::training), layer.communicator, p.gate, dweights, loss_scale,
                            pending.dlogits, scratch);
    if constexpr (projects) {
        const double epsilon = jitter_of(layer.gate);
        if (epsilon == 0) return project_input_backward(ex, pending.dlogits, w.gate, dx, write_mode::accumulate, scratch);
        const arena::scope lent(scratch);
        const int64_t tokens = dx.extent(0), width = dx.extent(1);
        const auto through = scratch.matrix<real>(tokens, width);
        project_input_backward(ex, pending.dlogits, w.gate, through, write_mode::overwrite, scratch);
        if (!scratch.measuring())
            for_each(ex, tokens * width,
                     add_jittered<T>{through.data_handle(), dx.data_handle(), {p.options.random, random_stream::jitter},
                                     static_cast<std::uint64_t>(p.options.first_token * width), real(epsilon)});
    }
}

/// y from the experts' rows.
template <class Layer, class Executor, class T, class Parts>
void run_combine(const Layer& layer, Executor& ex, const Parts& p, matrix_view<T> rows, matrix_view<T> y)
{
    if (layer.expert.weighs_output()) combine(ex, rows, p.gate.routing, p.slots, y);
    else combine_unweighted(ex, rows, p.gate.routing, p.slots, y);
}

template <class Layer, class Executor, class T, class Weights>
void run_infer(const Layer& layer, Executor& ex, matrix_view<const T> x, const Weights& w, matrix_view<T> y,
               const gate_options& options, arena& scratch)
{
    const arena::scope lent(scratch);
    typename Layer::template parts<T> p{};
    p.x = x;
    p.options = options;
    using gate_type = std::remove_cvref_t<decltype(layer.gate)>;
    if constexpr (gate_reads_logits<gate_type>)
        p.logits = scratch.matrix<accumulate_t<T>>(x.extent(0), layer.gate.experts);
    p.gate = reserve_gate<accumulate_t<T>>(layer.gate, scratch, x.extent(0));
    p.slots = reserve_plan(scratch, x.extent(0), p.gate.routing.choices(), layer.gate.experts);
    const auto rows = scratch.matrix<T>(p.slots.slots, x.extent(1));
    run_gate<T>(layer, ex, p, w, gate_mode::inference, scratch);
    layer.expert.infer(ex, p.expert_view(), w.expert, rows, scratch);
    if (!scratch.measuring()) run_combine(layer, ex, p, rows, y);
}

template <class Layer, class Executor, class T, class Weights>
typename Layer::template parts<T> run_forward(const Layer& layer, Executor& ex, matrix_view<const T> x, const Weights& w,
                                              matrix_view<T> y, const gate_options& options, arena& keep, arena& lend)
{
    auto p = reserve_parts<T>(layer, keep, x.extent(0), x.extent(1));
    p.x = x;
    p.options = options;
    const arena::scope lent(lend);
    run_gate<T>(layer, ex, p, w, gate_mode::training, lend);
    const auto rows = std::remove_cvref_t<decltype(layer.expert)>::applies_weights
                          ? lend.matrix<T>(p.slots.slots, x.extent(1))
                          : p.rows;
    layer.expert.forward(ex, p.expert_view(), w.expert, p.expert, rows, lend);
    if (!lend.measuring()) run_combine(layer, ex, p, rows, y);
    return p;
}

/// The gradient that an expert which does not apply the weights gets: that of its own rows.
template <class Layer, class Executor, class T, class Parts, class Pending>
void run_unweigh(const Layer& layer, Executor& ex, const Parts& p, matrix_view<const T> dy, const Pending& pending,
                 vector_view<accumulate_t<T>> dweights)
{
    if (layer.expert.weighs_output()) {
        combine_weights_backward(ex, dy, p.rows, p.gate.routing, p.slots, dweights);
        dispatch(ex, dy, p.gate.routing.weights, p.slots, pending.rows);
    } else {
        dispatch(ex, dy, p.slots, pending.rows);
    }
    for_each(ex, p.slots.slots, count_up{pending.row_numbers.data_handle()});
}

template <class Layer, class Executor, class T, class Weights>
auto run_backward_input(const Layer& layer, Executor& ex, const typename Layer::template parts<T>& p,
                        matrix_view<const T> dy, const Weights& w, matrix_view<T> dx, const backward_options& options,
                        arena& keep, arena& lend)
{
    using real = accumulate_t<T>;
    using expert_type = std::remove_cvref_t<decltype(layer.expert)>;
    auto pending = reserve_pending<T>(layer, keep, p.x.extent(0), p.x.extent(1));
    const arena::scope lent(lend);
    const auto& route = p.gate.routing;
    const auto dweights = lend.vector<real>(route.choices());
    const auto drows = lend.matrix<T>(p.slots.slots, p.x.extent(1));
    const bool live = !lend.measuring();
    if (live) for_each(ex, route.choices(), fill<real>{dweights.data_handle(), real(0)});
    if constexpr (expert_type::applies_weights) pending.dy = {dy, p.slots.token_of};
    else if (live) run_unweigh(layer, ex, p, dy, pending, dweights);
    layer.expert.backward(ex, p.expert_view(), w.expert, p.expert, pending.dy, pending.expert, drows, dweights, lend);
    if (live) combine_unweighted(ex, drows, route, p.slots, dx);
    run_gate_backward<T>(layer, ex, p, w, pending, dweights, real(options.loss_scale), dx, lend);
    return pending;
}

template <class T, class Layer, class Executor, class Parts, class Pending, class Weights>
void run_backward_weights(const Layer& layer, Executor& ex, const Parts& p, const Pending& pending,
                          const Weights& gradients, const backward_options& options, arena& scratch)
{
    const arena::scope lent(scratch);
    layer.expert.weight_gradients(ex, p.expert_view(), p.expert, pending.dy, pending.expert, gradients.expert,
                                  options.gradients, scratch);
    using gate_type = std::remove_cvref_t<decltype(layer.gate)>;
    if constexpr (owns_parameters<gate_type>)
        layer.gate.parameter_gradients(ex, p.gate_view(gate_mode::training), p.gate, gradients.own, options.gradients,
                                       scratch);
    if constexpr (gate_reads_logits<gate_type>)
        with_router_input(layer, ex, p.x, p.options, gate_mode::training, scratch, [&](matrix_view<const T> x) {
            project_weights_backward(ex, pending.dlogits, x, gradients.gate, gradients.gate_bias, options.gradients, scratch);
        });
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
