// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The passes of a layer whose ranks share its experts: the single-rank path on the tokens that this rank receives, between
/// an exchange and its way back, in one piece or in chunks that overlap. How much comes is known after the first half.
#pragma once

#include <fastmoe/layer/moe_passes.hpp>
#include <fastmoe/layer/overlap.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// An expert whose hidden width can be cut: leaves what is not cut, such as the output's bias, to the first slice.
template <class Expert, class Views>
concept slices_hidden = requires(const Expert& e, const Views& w) {
    { e.later_slice(w) } -> std::same_as<Views>;
};

/// The views that this rank's slice of the experts uses.
template <class Layer, class Views>
Views views_of_slice(const Layer& layer, const Views& w)
{
    if constexpr (exchanging<Layer>) {
        const auto place = placed(layer.communicator, layer.gate.experts);
        using expert_type = std::remove_cvref_t<decltype(layer.expert)>;
        if constexpr (slices_hidden<expert_type, Views>) {
            if (place.slice() > 0) return layer.expert.later_slice(w);
        } else {
            expects(place.slices == 1, "slices", place.slices, "1: the expert has no later_slice()");
        }
    }
    return w;
}

/// What a later slice leaves to the first has a gradient of zero there.
template <class Layer, class Executor, class Views>
void clear_left_to_first_slice(const Layer& layer, Executor& ex, const Views& gradients, write_mode mode)
{
    if constexpr (exchanging<Layer>)
        if constexpr (slices_hidden<std::remove_cvref_t<decltype(layer.expert)>, Views>)
            if (mode == write_mode::overwrite && placed(layer.communicator, layer.gate.experts).slice() > 0)
                layer.expert.clear_left_to_first_slice(ex, gradients);
}

template <class T, class Layer>
using partial_of = typename std::remove_cvref_t<
    decltype(parallel_of(std::declval<const Layer&>().communicator).exchange)>::partials::template type<T>;

/// The choices of tokens [first, first + tokens).
template <class Real>
routing<Real> part_of(const routing<Real>& r, int64_t first, int64_t tokens)
{
    if (tokens == r.tokens) return r;
    const int64_t begin = first * r.k, count = tokens * r.k;
    return {tokens, r.total_experts, r.k, slice(r.experts, begin, count), slice(r.weights, begin, count), {}, r.origin + begin};
}

/// The gate's state, and the lists of every chunk.
template <class T, class Layer>
void reserve_own(const Layer& layer, arena& keep, typename Layer::template parts<T>& p, int64_t tokens)
{
    using gate_type = std::remove_cvref_t<decltype(layer.gate)>;
    if constexpr (gate_reads_logits<gate_type>) p.logits = keep.matrix<accumulate_t<T>>(tokens, layer.gate.experts);
    p.gate = reserve_gate<accumulate_t<T>>(layer.gate, keep, tokens);
    const auto& parallel = parallel_of(layer.communicator);
    const auto exchange = exchange_of_chunk(parallel);
    const auto place = placed(layer.communicator, layer.gate.experts);
    const int64_t chunks = parallel.chunks;
    expects(chunks >= 1 && chunks <= 1024, "chunks", chunks, "1 to 1024");
    expects(chunks == 1 || !p.gate.routing.ragged(), "chunks", chunks, "1 for a gate with ragged choices");
    p.pieces.resize(static_cast<std::size_t>(chunks));
    for (int64_t i = 0; i < chunks; ++i) {
        auto& piece = p.pieces[static_cast<std::size_t>(i)];
        const int64_t each = tokens / chunks, more = tokens % chunks; // no chunk grows where the tokens get fewer
        piece.first = i * each + (i < more ? i : more);
        piece.tokens = each + (i < more ? 1 : 0);
        piece.state = exchange.template reserve<accumulate_t<T>>(
            keep, part_of(p.gate.routing, piece.first, piece.tokens), place);
    }
}

/// Received choices, their plans, rows if they are kept, and what the experts save.
template <gate_mode Mode, class T, class Layer>
void reserve_received(const Layer& layer, arena& keep, typename Layer::template parts<T>& p, int64_t width)
{
    const auto& parallel = parallel_of(layer.communicator);
    const auto exchange = exchange_of_chunk(parallel);
    const auto place = placed(layer.communicator, layer.gate.experts);
    for (auto& piece : p.pieces) {
        piece.received = exchange.template reserve_received<accumulate_t<T>>(keep, piece.state, place);
        const auto& r = piece.received;
        piece.slots = reserve_plan(keep, r.tokens, r.choices(), r.total_experts);
        if (Mode == gate_mode::training && parallel.rows == received_rows::keep) piece.rows = keep.matrix<T>(r.tokens, width);
        if constexpr (Mode == gate_mode::training)
            piece.expert = applying(layer.expert, width).template reserve_saved<T>(keep, piece.slots.slots);
    }
}

template <class T, exchanging Layer>
typename Layer::template parts<T> reserve_parts(const Layer& layer, arena& memory, int64_t tokens, int64_t width)
{
    typename Layer::template parts<T> p{};
    reserve_own<T>(layer, memory, p, tokens);
    reserve_received<gate_mode::training, T>(layer, memory, p, width);
    return p;
}

template <class T, exchanging Layer>
auto reserve_pending(const Layer& layer, arena& memory, const typename Layer::template parts<T>& p)
{
    using gate_type = std::remove_cvref_t<decltype(layer.gate)>;
    using expert_type = std::remove_cvref_t<decltype(layer.expert)>;
    using communicator_type = std::remove_cvref_t<decltype(layer.communicator)>;
    const int64_t width = p.x.extent(1);
    moe_pending<T, expert_type, communicator_type> out{};
    if constexpr (gate_reads_logits<gate_type>)
        out.dlogits = memory.matrix<accumulate_t<T>>(p.x.extent(0), layer.gate.experts);
    for (const auto& piece : p.pieces) {
        const auto rows = [&] { return memory.matrix<T>(piece.received.tokens, width); };
        auto expert = applying(layer.expert, width).template reserve_pending<T>(memory, piece.slots.slots);
        const bool fetch = parallel_of(layer.communicator).rows == received_rows::fetch_again;
        out.pieces.push_back({fetch ? rows() : piece.rows, {rows(), piece.slots.token_of}, expert});
    }
    return out;
}

/// Runs in(ex, i, scratch), work, out for every piece, overlapped where there are several. What one stage leaves for the next
/// must lie elsewhere.
template <class Executor, class In, class Work, class Out>
void run_stages(Executor& ex, int pieces, arena& lend, const In& in, const Work& work, const Out& out)
{
    if (pieces == 1 || !has_executor_beside<Executor>) {
        if (!lend.measuring())
            return overlap_pieces(
                ex, pieces, [&](auto& e, int i) { in(e, i, lend); }, [&](auto& e, int i) { work(e, i, lend); },
                [&](auto& e, int i) { out(e, i, lend); });
        for (int i = 0; i < pieces; ++i) {
            in(ex, i, lend);
            work(ex, i, lend);
            out(ex, i, lend);
        }
        return;
    }
    arena transfers, works;
    for (int i = 0; i < pieces; ++i) {
        in(ex, i, transfers);
        out(ex, i, transfers);
        work(ex, i, works);
    }
    const arena::scope lent(lend);
    const auto beside = lend.vector<std::byte>(transfers.bytes()), here = lend.vector<std::byte>(works.bytes());
    if (lend.measuring()) return;
    arena transfer(beside), own(here);
    overlap_pieces(
        ex, pieces, [&](auto& e, int i) { in(e, i, transfer); }, [&](auto& e, int i) { work(e, i, own); },
        [&](auto& e, int i) { out(e, i, transfer); });
}

/// First half of forward and infer: decides, and tells the other ranks what comes.
template <class T, exchanging Layer, class Executor, class Weights>
void run_announce(const Layer& layer, Executor& ex, typename Layer::template parts<T>& p, const Weights& w, gate_mode mode,
                  arena& keep, arena& lend)
{
    reserve_own<T>(layer, keep, p, p.x.extent(0));
    const arena::scope lent(lend);
    run_gate<T>(layer, ex, p, w, mode, lend);
    if (!lend.measuring()) expects_routing(p.gate.routing);
    const auto& parallel = parallel_of(layer.communicator);
    const auto exchange = exchange_of_chunk(parallel);
    for (auto& piece : p.pieces)
        exchange.announce(ex, parallel.group, part_of(p.gate.routing, piece.first, piece.tokens),
                                   placed(layer.communicator, layer.gate.experts), piece.state, lend);
}

/// Second half: tokens come in, the experts' rows become partial rows of the received tokens, which go home and are added up
/// in y there.
template <gate_mode Mode, class T, exchanging Layer, class Executor, class Weights>
void run_received(const Layer& layer, Executor& ex, typename Layer::template parts<T>& p, const Weights& w, matrix_view<T> y,
                  arena& keep, arena& lend)
{
    using real = accumulate_t<T>;
    using partial_type = partial_of<T, Layer>;
    const int64_t width = y.extent(1);
    const auto& parallel = parallel_of(layer.communicator);
    const auto exchange = exchange_of_chunk(parallel);
    const auto place = placed(layer.communicator, layer.gate.experts);
    const auto experts = views_of_slice(layer, w.expert);
    reserve_received<Mode, T>(layer, keep, p, width);
    const arena::scope lent(lend);
    struct between {
        matrix_view<T> rows;               // (M,D)
        matrix_view<partial_type> partial; // (M,D)
    };
    std::vector<between> stages;
    for (const auto& piece : p.pieces) {
        const int64_t m = piece.received.tokens;
        stages.push_back({piece.rows.extent(1) == width ? piece.rows : lend.matrix<T>(m, width), lend.matrix<partial_type>(m, width)});
    }
    const auto at = [](auto& all, int i) -> auto& { return all[static_cast<std::size_t>(i)]; };
    const auto in = [&](auto& e, int i, arena& scratch) {
        const auto& piece = at(p.pieces, i);
        exchange.send_choices(e, parallel.group, part_of(p.gate.routing, piece.first, piece.tokens), place, piece.state,
                                       piece.received, scratch);
        exchange.send_rows(e, parallel.group, piece.state, slice_rows(p.x, piece.first, piece.tokens),
                                    at(stages, i).rows, scratch);
        make_plan(e, piece.received, piece.slots, scratch);
    };
    const auto work = [&](auto& e, int i, arena& scratch) {
        const arena::scope taken(scratch);
        const auto& piece = at(p.pieces, i);
        const auto input = piece.expert_view(at(stages, i).rows);
        matrix_view<T> rows;
        if constexpr (Mode == gate_mode::inference) {
            rows = scratch.matrix<T>(piece.slots.slots, width);
            layer.expert.infer(e, input, experts, rows, scratch);
        } else {
            rows = room_for_rows<T>(piece.expert, scratch, piece.slots.slots, width);
            applying(layer.expert, width).forward(e, input, experts, piece.expert, rows, scratch);
        }
        if (scratch.measuring()) return;
        if (layer.expert.weighs_output()) combine(e, rows, piece.received, piece.slots, at(stages, i).partial);
        else combine_unweighted(e, rows, piece.received, piece.slots, at(stages, i).partial);
    };
    const auto out = [&](auto& e, int i, arena& scratch) {
        const arena::scope taken(scratch);
        const auto& piece = at(p.pieces, i);
        const auto back = exchange.template bring_rows_back<real>(
            e, parallel.group, part_of(p.gate.routing, piece.first, piece.tokens), piece.state, at(stages, i).partial, scratch);
        if (!scratch.measuring()) sum_returned(e, back, slice_rows(y, piece.first, piece.tokens));
    };
    run_stages(ex, static_cast<int>(p.pieces.size()), lend, in, work, out);
}

template <exchanging Layer, class Executor, class T, class Weights>
auto run_backward_input(const Layer& layer, Executor& ex, const typename Layer::template parts<T>& p,
                        matrix_view<const T> dy, const Weights& w, matrix_view<T> dx, const backward_options& options,
                        arena& keep, arena& lend)
{
    using real = accumulate_t<T>;
    using partial_type = partial_of<T, Layer>;
    const int64_t tokens = p.x.extent(0), width = p.x.extent(1);
    const auto& parallel = parallel_of(layer.communicator);
    const auto exchange = exchange_of_chunk(parallel);
    const auto experts = views_of_slice(layer, w.expert);
    const auto& route = p.gate.routing;
    const bool one = p.pieces.size() == 1;
    const auto pending = reserve_pending<T>(layer, keep, p);
    const arena::scope lent(lend);
    struct between {
        vector_view<real> dchoices;        // (Cr)
        matrix_view<partial_type> partial; // (M,D)
    };
    std::vector<between> stages;
    for (const auto& piece : p.pieces)
        stages.push_back({lend.vector<real>(piece.received.choices()), lend.matrix<partial_type>(piece.received.tokens, width)});
    const auto dweights = lend.vector<real>(route.choices());
    const auto sums = lend.matrix<real>(one ? 0 : tokens, width); // of several pieces
    const auto at = [](auto& all, int i) -> auto& { return all[static_cast<std::size_t>(i)]; };
    const auto writable = [](matrix_view<const T> m) { // reserved above
        return matrix_view<T>(const_cast<T*>(m.data_handle()), m.extent(0), m.extent(1));
    };
    const auto in = [&](auto& e, int i, arena& scratch) {
        const auto& piece = at(p.pieces, i);
        const auto& left = at(pending.pieces, i);
        exchange.send_rows(e, parallel.group, piece.state, slice_rows(dy, piece.first, piece.tokens),
                                    writable(left.dy.data), scratch);
        if (parallel.rows == received_rows::fetch_again)
            exchange.send_rows(e, parallel.group, piece.state, slice_rows(p.x, piece.first, piece.tokens),
                                        writable(left.x), scratch);
    };
    const auto work = [&](auto& e, int i, arena& scratch) {
        const arena::scope taken(scratch);
        const auto& piece = at(p.pieces, i);
        const auto& left = at(pending.pieces, i);
        const auto& dchoices = at(stages, i).dchoices;
        const auto drows = scratch.matrix<T>(piece.slots.slots, width);
        if (!scratch.measuring()) fastmoe::for_each(e, dchoices.extent(0), fill<real>{dchoices.data_handle(), real(0)});
        applying(layer.expert, width)
            .backward(e, piece.expert_view(left.x), experts, piece.expert, left.dy, left.expert, drows, dchoices, scratch);
        if (!scratch.measuring()) combine_unweighted(e, drows, piece.received, piece.slots, at(stages, i).partial);
    };
    const auto return_rows = [&](auto& e, int i, arena& scratch) {
        const auto& piece = at(p.pieces, i);
        return exchange.template bring_rows_back<real>(e, parallel.group, part_of(route, piece.first, piece.tokens),
                                                                piece.state, at(stages, i).partial, scratch);
    };
    const auto out = [&](auto& e, int i, arena& scratch) {
        const arena::scope taken(scratch);
        const auto& piece = at(p.pieces, i);
        const auto own = part_of(routing<real>{route.tokens, 0, route.k, route.experts, dweights, route.first}, piece.first,
                                 piece.tokens).weights;
        exchange.bring_back(e, parallel.group, piece.state, at(stages, i).dchoices, own, scratch);
        if (one) return;
        const auto back = return_rows(e, i, scratch);
        if (!scratch.measuring()) sum_returned(e, back, slice_rows(sums, piece.first, piece.tokens));
    };
    run_stages(ex, static_cast<int>(p.pieces.size()), lend, in, work, out);
    const auto finish = [&](auto rows, vector_view<const int32_t> row_of, const token_lists<real>& lists) {
        using row = std::remove_const_t<typename decltype(rows)::element_type>;
        run_gate_backward<T>(layer, ex, p, w, pending, vector_view<const real>(dweights), real(options.loss_scale),
                             matrix_view<const row>(rows), row_of, lists, dx, lend);
    };
    if (one) {
        const auto back = return_rows(ex, 0, lend);
        finish(back.rows, back.row_of, back.lists);
    } else {
        const auto numbers = lend.vector<int32_t>(tokens);
        if (!lend.measuring()) fastmoe::for_each(ex, tokens, count_up{numbers.data_handle()});
        finish(sums, numbers, {route, 0});
    }
    return pending;
}

/// Chunks add up: T rounds once a chunk, which matters where the gradients are narrower than fp32.
template <class T, exchanging Layer, class Executor, class Parts, class Pending, class Weights>
void run_backward_weights(const Layer& layer, Executor& ex, const Parts& p, const Pending& pending,
                          const Weights& gradients, const backward_options& options, arena& scratch)
{
    const arena::scope lent(scratch);
    const auto experts = views_of_slice(layer, gradients.expert);
    if (!scratch.measuring()) clear_left_to_first_slice(layer, ex, gradients.expert, options.gradients);
    for (std::size_t i = 0; i < p.pieces.size(); ++i) {
        const auto& left = pending.pieces[i];
        applying(layer.expert, p.x.extent(1))
            .weight_gradients(ex, p.pieces[i].expert_view(left.x), p.pieces[i].expert, left.dy, left.expert, experts,
                              i == 0 ? options.gradients : write_mode::accumulate, scratch);
    }
    run_gate_weights<T>(layer, ex, p, pending, gradients, options, scratch);
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
