// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The passes of a layer whose ranks share its experts: the single-rank path on the tokens that this rank receives, between
/// an exchange and its way back. In two halves, since how much comes is known after the first.
#pragma once

#include <fastmoe/layer/moe_passes.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// What the first half reserves: the gate's state and the lists.
template <class T, class Layer>
void reserve_own(const Layer& layer, arena& keep, typename Layer::template parts<T>& p, int64_t tokens)
{
    using gate_type = std::remove_cvref_t<decltype(layer.gate)>;
    if constexpr (gate_reads_logits<gate_type>) p.logits = keep.matrix<accumulate_t<T>>(tokens, layer.gate.experts);
    p.gate = reserve_gate<accumulate_t<T>>(layer.gate, keep, tokens);
    const auto& parallel = parallel_of(layer.communicator);
    p.link.state = parallel.exchange.template reserve<accumulate_t<T>>(keep, p.gate.routing,
                                                                       placed(layer.communicator, layer.gate.experts));
}

/// What the second half keeps: received choices, their plan, rows if they are kept.
template <class T, class Layer>
void reserve_received(const Layer& layer, arena& keep, typename Layer::template parts<T>& p, int64_t width,
                      received_rows rows)
{
    const auto& parallel = parallel_of(layer.communicator);
    const auto place = placed(layer.communicator, layer.gate.experts);
    p.link.received = parallel.exchange.template reserve_received<accumulate_t<T>>(keep, p.link.state, place);
    const auto& received = p.link.received;
    p.slots = reserve_plan(keep, received.tokens, received.choices(), received.total_experts);
    p.link.rows = keep.matrix<T>(rows == received_rows::keep ? received.tokens : 0, width);
}

template <class T, exchanging Layer>
typename Layer::template parts<T> reserve_parts(const Layer& layer, arena& memory, int64_t tokens, int64_t width)
{
    typename Layer::template parts<T> p{};
    reserve_own<T>(layer, memory, p, tokens);
    reserve_received<T>(layer, memory, p, width, parallel_of(layer.communicator).rows);
    p.expert = applying(layer.expert, width).template reserve_saved<T>(memory, p.slots.slots);
    return p;
}

template <class T, exchanging Layer>
auto reserve_pending(const Layer& layer, arena& memory, const typename Layer::template parts<T>& p)
{
    using gate_type = std::remove_cvref_t<decltype(layer.gate)>;
    using expert_type = std::remove_cvref_t<decltype(layer.expert)>;
    const int64_t tokens = p.x.extent(0), width = p.x.extent(1), rows = p.link.received.tokens;
    moe_pending<T, expert_type> out{};
    if constexpr (gate_reads_logits<gate_type>) out.dlogits = memory.matrix<accumulate_t<T>>(tokens, layer.gate.experts);
    out.expert = applying(layer.expert, width).template reserve_pending<T>(memory, p.slots.slots);
    out.dy = {memory.matrix<T>(rows, width), p.slots.token_of};
    out.x = p.link.rows;
    if (parallel_of(layer.communicator).rows == received_rows::fetch_again) out.x = memory.matrix<T>(rows, width);
    return out;
}

/// First half of forward and infer: decides, and tells the other ranks what comes.
template <class T, exchanging Layer, class Executor, class Weights>
void run_announce(const Layer& layer, Executor& ex, typename Layer::template parts<T>& p, const Weights& w, gate_mode mode,
                  arena& keep, arena& lend)
{
    reserve_own<T>(layer, keep, p, p.x.extent(0));
    const arena::scope lent(lend);
    run_gate<T>(layer, ex, p, w, mode, lend);
    const auto& parallel = parallel_of(layer.communicator);
    parallel.exchange.announce(ex, parallel.group, p.gate.routing, placed(layer.communicator, layer.gate.experts),
                               p.link.state, lend);
}

template <class T, class Layer>
using partial_of = typename std::remove_cvref_t<
    decltype(parallel_of(std::declval<const Layer&>().communicator).exchange)>::partials::template type<T>;

/// Choices and tokens come in, and are planned. Returns the rows.
template <class T, exchanging Layer, class Executor>
matrix_view<T> run_receive(const Layer& layer, Executor& ex, typename Layer::template parts<T>& p, arena& lend)
{
    const auto& parallel = parallel_of(layer.communicator);
    const auto place = placed(layer.communicator, layer.gate.experts);
    const int64_t received = p.link.received.tokens, width = p.x.extent(1);
    const bool here = p.link.rows.extent(0) == received;
    const auto rows = here ? p.link.rows : lend.matrix<T>(received, width);
    parallel.exchange.send_choices(ex, parallel.group, p.gate.routing, place, p.link.state, p.link.received, lend);
    parallel.exchange.send_rows(ex, parallel.group, p.link.state, p.x, rows, lend);
    make_plan(ex, p.link.received, p.slots, lend);
    return rows;
}

/// The experts' rows become partial rows of the received tokens, which go home and are added to y there.
template <class T, exchanging Layer, class Executor>
void run_return(const Layer& layer, Executor& ex, const typename Layer::template parts<T>& p, matrix_view<T> rows,
                matrix_view<T> y, arena& lend)
{
    const auto& parallel = parallel_of(layer.communicator);
    const auto partial = lend.matrix<partial_of<T, Layer>>(p.link.received.tokens, y.extent(1));
    if (!lend.measuring()) {
        if (layer.expert.weighs_output()) combine(ex, rows, p.link.received, p.slots, partial);
        else combine_unweighted(ex, rows, p.link.received, p.slots, partial);
    }
    const auto back = parallel.exchange.template bring_rows_back<accumulate_t<T>>(ex, parallel.group, p.gate.routing,
                                                                                  p.link.state, partial, lend);
    if (!lend.measuring()) sum_returned(ex, back, y);
}

/// Second half of infer.
template <class T, exchanging Layer, class Executor, class Weights>
void run_infer_received(const Layer& layer, Executor& ex, typename Layer::template parts<T>& p, const Weights& w,
                        matrix_view<T> y, arena& scratch)
{
    const arena::scope lent(scratch);
    reserve_received<T>(layer, scratch, p, y.extent(1), received_rows::keep);
    const auto rows = run_receive<T>(layer, ex, p, scratch);
    const auto out = scratch.matrix<T>(p.slots.slots, y.extent(1));
    layer.expert.infer(ex, p.expert_view(rows), views_of_slice(layer, w.expert), out, scratch);
    run_return<T>(layer, ex, p, out, y, scratch);
}

/// Second half of forward.
template <class T, exchanging Layer, class Executor, class Weights>
void run_forward_received(const Layer& layer, Executor& ex, typename Layer::template parts<T>& p, const Weights& w,
                          matrix_view<T> y, arena& keep, arena& lend)
{
    const int64_t width = y.extent(1);
    reserve_received<T>(layer, keep, p, width, parallel_of(layer.communicator).rows);
    p.expert = applying(layer.expert, width).template reserve_saved<T>(keep, p.slots.slots);
    const arena::scope lent(lend);
    const auto rows = run_receive<T>(layer, ex, p, lend);
    const auto out = room_for_rows<T>(p.expert, lend, p.slots.slots, width);
    applying(layer.expert, width)
        .forward(ex, p.expert_view(rows), views_of_slice(layer, w.expert), p.expert, out, lend);
    run_return<T>(layer, ex, p, out, y, lend);
}

template <exchanging Layer, class Executor, class T, class Weights>
auto run_backward_input(const Layer& layer, Executor& ex, const typename Layer::template parts<T>& p,
                        matrix_view<const T> dy, const Weights& w, matrix_view<T> dx, const backward_options& options,
                        arena& keep, arena& lend)
{
    using real = accumulate_t<T>;
    const int64_t width = p.x.extent(1);
    const auto& parallel = parallel_of(layer.communicator);
    const auto& received = p.link.received;
    const auto pending = reserve_pending<T>(layer, keep, p);
    const arena::scope lent(lend);
    const auto mutable_rows = [](matrix_view<const T> m) {
        return matrix_view<T>(const_cast<T*>(m.data_handle()), m.extent(0), m.extent(1)); // reserved a few lines above
    };
    parallel.exchange.send_rows(ex, parallel.group, p.link.state, dy, mutable_rows(pending.dy.data), lend);
    if (parallel.rows == received_rows::fetch_again)
        parallel.exchange.send_rows(ex, parallel.group, p.link.state, p.x, mutable_rows(pending.x), lend);
    const auto dchoices = lend.vector<real>(received.choices());
    const auto drows = lend.matrix<T>(p.slots.slots, width);
    const auto partial = lend.matrix<partial_of<T, Layer>>(received.tokens, width);
    const auto dweights = lend.vector<real>(p.gate.routing.choices());
    if (!lend.measuring()) for_each(ex, dchoices.extent(0), fill<real>{dchoices.data_handle(), real(0)});
    applying(layer.expert, width)
        .backward(ex, p.expert_view(pending.x), views_of_slice(layer, w.expert), p.expert, pending.dy, pending.expert,
                  drows, dchoices, lend);
    if (!lend.measuring()) combine_unweighted(ex, drows, received, p.slots, partial);
    parallel.exchange.bring_back(ex, parallel.group, p.link.state, dchoices, dweights, lend);
    const auto back =
        parallel.exchange.template bring_rows_back<real>(ex, parallel.group, p.gate.routing, p.link.state, partial, lend);
    using row = partial_of<T, Layer>;
    run_gate_backward<T>(layer, ex, p, w, pending, vector_view<const real>(dweights), real(options.loss_scale),
                         matrix_view<const row>(back.rows), back.row_of, back.lists, dx, lend);
    return pending;
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
