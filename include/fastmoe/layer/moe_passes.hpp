// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The passes of a layer as plain functions over its verbs. Each takes what it keeps from one arena and its scratch from
/// another (which may be the same); on measuring arenas they only count, so query and use cannot drift.
#pragma once

#include <fastmoe/exec/scratch.hpp>
#include <fastmoe/layer/moe_state.hpp>
#include <fastmoe/routing/project.hpp>
#include <fastmoe/transfer/combine.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

template <class Layer>
concept exchanging = shares_experts<std::remove_cvref_t<decltype(std::declval<const Layer&>().communicator)>>;
template <class Layer>
concept one_rank = !exchanging<Layer>;

template <class Layer>
int64_t experts_here(const Layer& layer)
{
    if constexpr (exchanging<Layer>) return placed(layer.communicator, layer.gate.experts).local_experts();
    else return layer.gate.experts;
}

template <class T, one_rank Layer>
typename Layer::template parts<T> reserve_parts(const Layer& layer, arena& memory, int64_t tokens, int64_t width)
{
    using gate_type = std::remove_cvref_t<decltype(layer.gate)>;
    typename Layer::template parts<T> p{};
    if constexpr (gate_reads_logits<gate_type>) p.logits = memory.matrix<accumulate_t<T>>(tokens, layer.gate.experts);
    p.gate = reserve_gate<accumulate_t<T>>(layer.gate, memory, tokens);
    const auto& route = p.gate.routing;
    p.slots = reserve_plan(memory, tokens, route.choices(), layer.gate.experts);
    p.expert = applying(layer.expert, width).template reserve_saved<T>(memory, p.slots.slots);
    return p;
}

template <class T, one_rank Layer>
auto reserve_pending(const Layer& layer, arena& memory, const typename Layer::template parts<T>& p)
{
    using gate_type = std::remove_cvref_t<decltype(layer.gate)>;
    using expert_type = std::remove_cvref_t<decltype(layer.expert)>;
    moe_pending<T, expert_type> out{};
    if constexpr (gate_reads_logits<gate_type>)
        out.dlogits = memory.matrix<accumulate_t<T>>(p.x.extent(0), layer.gate.experts);
    out.expert = applying(layer.expert, p.x.extent(1)).template reserve_pending<T>(memory, p.slots.slots);
    return out;
}

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

/// Logits and routing.
template <class T, class Layer, class Executor, class Parts, class Weights>
void run_gate(const Layer& layer, Executor& ex, const Parts& p, const Weights& w, gate_mode mode, arena& scratch)
{
    using gate_type = std::remove_cvref_t<decltype(layer.gate)>;
    if constexpr (gate_reads_logits<gate_type>)
        with_router_input(layer, ex, p.x, p.options, mode, scratch,
                          [&](matrix_view<const T> x) { project(ex, x, w.gate, w.gate_bias, p.logits, scratch); });
    if constexpr (owns_parameters<gate_type>)
        layer.gate.route(ex, p.gate_view(mode), w.own, gate_ranks(layer.communicator), p.gate, scratch);
    else layer.gate.route(ex, p.gate_view(mode), gate_ranks(layer.communicator), p.gate, scratch);
}

/// dx (+)= the sum of a token's rows, in the order of its list, and what comes back through the router, whose input may have
/// been jittered: by the same u. Rounded once.
template <class T, class Row, class Lists>
struct finish_input_gradient {
    using real = accumulate_t<T>;
    matrix_view<const Row> rows;        // (S,D)
    vector_view<const int32_t> slot_of; // (C)
    Lists route;
    matrix_view<T> dx;                  // (T,D)
    write_mode mode;
    random_source random;
    std::uint64_t first;
    real epsilon; // 0: no jitter

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t, const real* sums) const
    {
        if constexpr (!is_single_lane<Team>) in_lines_of(team, t, sums);
        else in_pieces(team, t, sums);
    }

private:
    template <class Team>
    FASTMOE_HOST_DEVICE void in_lines_of(Team& team, int64_t t, const real* sums) const
    {
        const int64_t n = dx.extent(1), begin = route.begin(t), end = route.end(t);
        const auto& self = *this;
        T* to = dx.data_handle() + t * n;
        constexpr int64_t across = line_elements<T, Row>;
        for_each_line<across>(team, n, in_lines<across>(n, rows.data_handle(), to, sums), [=, &self](int64_t at, auto size) {
            line<real, size> total{};
            const auto row = [&self, n, at](int64_t c) -> const Row* {
                const int64_t s = self.slot_of(c);
                return s < 0 ? nullptr : self.rows.data_handle() + s * n + at;
            };
            add_lines(total, begin, end, 1, row, unit_scale<real>{});
            if (sums) {
                const auto router = read_line<size>(sums + at);
                self.add_router(total.of, router.of, static_cast<std::uint64_t>(t * n + at), size);
            }
            if (self.mode == write_mode::accumulate) {
                const auto before = widened_line<real, size>(to + at);
                FASTMOE_UNROLL
                for (int64_t j = 0; j < size; ++j) total.of[j] += before.of[j];
            }
            write_rounded<T>(total, to + at);
        });
    }

    template <class Team>
    FASTMOE_HOST_DEVICE void in_pieces(Team& team, int64_t t, const real* sums) const
    {
        const int64_t n = dx.extent(1), begin = route.begin(t), end = route.end(t);
        const auto& self = *this;
        team.for_each((n + row_piece - 1) / row_piece, [=, &self](int64_t piece) {
            const int64_t at = piece * row_piece, width = n - at < row_piece ? n - at : row_piece;
            T* to = self.dx.data_handle() + t * n + at;
            real total[row_piece] = {};
            for (int64_t c = begin; c < end; ++c) {
                const int64_t s = self.slot_of(c);
                if (s < 0) continue;
                const Row* from = self.rows.data_handle() + s * n + at;
                if (width == row_piece)
                    for (int64_t j = 0; j < row_piece; ++j) total[j] += real(from[j]);
                else
                    for (int64_t j = 0; j < width; ++j) total[j] += real(from[j]);
            }
            if (sums) self.add_router(total, sums + at, static_cast<std::uint64_t>(t * n + at), width);
            if (self.mode == write_mode::accumulate)
                for (int64_t j = 0; j < width; ++j) total[j] += real(to[j]);
            for (int64_t j = 0; j < width; ++j) to[j] = T(total[j]);
        });
    }

    FASTMOE_HOST_DEVICE void add_router(real* total, const real* sums, std::uint64_t at, int64_t width) const
    {
        if (epsilon == real(0)) {
            for (int64_t j = 0; j < width; ++j) total[j] += sums[j];
            return;
        }
        for (int64_t j = 0; j < width; ++j) {
            const real u = random.template uniform<real>(first + at + static_cast<std::uint64_t>(j));
            total[j] += sums[j] * (real(1) - epsilon + real(2) * epsilon * u);
        }
    }
};

/// From the routing weights' gradients and those of the rows to the logits' and the input's. A gate with parameters adds
/// its own part to dx first, since it adds to a finished dx.
/// @param drows  gradients of rows; a token's are those of its entries of `lists` in row_of                  // (N,D)
template <class T, class Layer, class Executor, class Parts, class Weights, class Pending, class Row, class Lists>
void run_gate_backward(const Layer& layer, Executor& ex, const Parts& p, const Weights& w, const Pending& pending,
                       vector_view<const accumulate_t<T>> dweights, accumulate_t<T> loss_scale,
                       matrix_view<const Row> drows, vector_view<const int32_t> row_of, const Lists& lists,
                       matrix_view<T> dx, arena& scratch)
{
    using real = accumulate_t<T>;
    using gate_type = std::remove_cvref_t<decltype(layer.gate)>;
    constexpr bool owns = owns_parameters<gate_type>, projects = gate_reads_logits<gate_type>;
    const bool live = !scratch.measuring();
    const auto& ranks = gate_ranks(layer.communicator);
    if constexpr (owns) {
        if constexpr (requires { layer.gate.expects_state(p.gate); })
            if (live) layer.gate.expects_state(p.gate); // while dx is still as it was
        if (live) fastmoe::for_each(ex, dx.extent(0) * dx.extent(1), fill<T>{dx.data_handle(), T(real(0))});
        layer.gate.backward(ex, p.gate_view(gate_mode::training), w.own, ranks, p.gate, dweights, loss_scale,
                            pending.dlogits, dx, scratch);
    } else if constexpr (projects) {
        layer.gate.backward(ex, p.gate_view(gate_mode::training), ranks, p.gate, dweights, loss_scale, pending.dlogits,
                            scratch);
    }
    constexpr write_mode mode = owns ? write_mode::accumulate : write_mode::overwrite;
    if constexpr (projects) {
        const finish_input_gradient<T, Row, Lists> finish{drows, row_of, lists, dx, mode,
                                                          {p.options.random, random_stream::jitter},
                                                          static_cast<std::uint64_t>(p.options.first_token * dx.extent(1)),
                                                          real(jitter_of(layer.gate))};
        with_scratch(scratch, [&](arena& memory) {
            project_rows_backward(ex, matrix_view<const real>(pending.dlogits), w.gate, finish, memory);
        });
    } else if (live) {
        using sum = sum_row_lists<real, Row, T, Lists, unit_scale<real>>;
        fastmoe::for_each_row(ex, dx.extent(0), sum{drows, row_of, dx, mode, lists, {}}, {.width = dx.extent(1)});
    }
}

/// y from the experts' rows.
template <class Layer, class Executor, class T, class Parts>
void run_combine(const Layer& layer, Executor& ex, const Parts& p, matrix_view<T> rows, matrix_view<T> y)
{
    if (layer.expert.weighs_output()) combine(ex, rows, p.gate.routing, p.slots, y);
    else combine_unweighted(ex, rows, p.gate.routing, p.slots, y);
}

template <one_rank Layer, class Executor, class T, class Weights>
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
    make_plan(ex, p.gate.routing, p.slots, scratch);
    layer.expert.infer(ex, p.expert_view(), w.expert, rows, scratch);
    if (!scratch.measuring()) run_combine(layer, ex, p, rows, y);
}

/// Room for the experts' outputs: where they are kept, if they are.
template <class T, class Saved>
matrix_view<T> room_for_rows(const Saved& saved, arena& lend, int64_t slots, int64_t width)
{
    if constexpr (requires { saved.rows; })
        if (saved.rows.extent(0) == slots) return saved.rows;
    return lend.matrix<T>(slots, width);
}

template <one_rank Layer, class Executor, class T, class Weights>
typename Layer::template parts<T> run_forward(const Layer& layer, Executor& ex, matrix_view<const T> x, const Weights& w,
                                              matrix_view<T> y, const gate_options& options, arena& keep, arena& lend)
{
    auto p = reserve_parts<T>(layer, keep, x.extent(0), x.extent(1));
    p.x = x;
    p.options = options;
    const arena::scope lent(lend);
    run_gate<T>(layer, ex, p, w, gate_mode::training, lend);
    make_plan(ex, p.gate.routing, p.slots, lend);
    const auto rows = room_for_rows<T>(p.expert, lend, p.slots.slots, x.extent(1));
    applying(layer.expert, x.extent(1)).forward(ex, p.expert_view(), w.expert, p.expert, rows, lend);
    if (!lend.measuring()) run_combine(layer, ex, p, rows, y);
    return p;
}

template <one_rank Layer, class Executor, class T, class Weights>
auto run_backward_input(const Layer& layer, Executor& ex, const typename Layer::template parts<T>& p,
                        matrix_view<const T> dy, const Weights& w, matrix_view<T> dx, const backward_options& options,
                        arena& keep, arena& lend)
{
    using real = accumulate_t<T>;
    const int64_t width = p.x.extent(1);
    auto pending = reserve_pending<T>(layer, keep, p);
    pending.dy = {dy, p.slots.token_of};
    const arena::scope lent(lend);
    const auto dweights = lend.vector<real>(p.gate.routing.choices());
    const auto drows = lend.matrix<T>(p.slots.slots, width);
    if (!lend.measuring()) fastmoe::for_each(ex, dweights.extent(0), fill<real>{dweights.data_handle(), real(0)});
    applying(layer.expert, width)
        .backward(ex, p.expert_view(), w.expert, p.expert, pending.dy, pending.expert, drows, dweights, lend);
    run_gate_backward<T>(layer, ex, p, w, pending, vector_view<const real>(dweights), real(options.loss_scale),
                         matrix_view<const T>(drows), p.slots.slot_of, p.gate.routing, dx, lend);
    return pending;
}

/// The gradients of what decides: the gate's own parameters and the router.
template <class T, class Layer, class Executor, class Parts, class Pending, class Weights>
void run_gate_weights(const Layer& layer, Executor& ex, const Parts& p, const Pending& pending, const Weights& gradients,
                      const backward_options& options, arena& scratch)
{
    using gate_type = std::remove_cvref_t<decltype(layer.gate)>;
    if constexpr (owns_parameters<gate_type>)
        layer.gate.parameter_gradients(ex, p.gate_view(gate_mode::training), p.gate, gradients.own, options.gradients,
                                       scratch);
    if constexpr (gate_reads_logits<gate_type>)
        with_router_input(layer, ex, p.x, p.options, gate_mode::training, scratch, [&](matrix_view<const T> x) {
            project_weights_backward(ex, pending.dlogits, x, gradients.gate, gradients.gate_bias, options.gradients, scratch);
        });
}

template <class T, one_rank Layer, class Executor, class Parts, class Pending, class Weights>
void run_backward_weights(const Layer& layer, Executor& ex, const Parts& p, const Pending& pending,
                          const Weights& gradients, const backward_options& options, arena& scratch)
{
    const arena::scope lent(scratch);
    applying(layer.expert, p.x.extent(1))
        .weight_gradients(ex, p.expert_view(), p.expert, pending.dy, pending.expert, gradients.expert, options.gradients,
                          scratch);
    run_gate_weights<T>(layer, ex, p, pending, gradients, options, scratch);
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
