// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What a layer's passes take, by running them on arenas that only count, and the calls that bring the memory: for one rank
/// at once, for ranks that share experts in two halves, since how much comes is known after the first.
#pragma once

#include <fastmoe/layer/exchanged_passes.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

template <one_rank Layer, class Executor, class T, class Weights>
int64_t infer_size(const Layer& layer, Executor& ex, matrix_view<const T> x, const Weights& w, matrix_view<T> y,
                   const gate_options& options)
{
    arena measure;
    run_infer(layer, ex, x, w, y, options, measure);
    return measure.bytes();
}
template <one_rank Layer, class Executor, class T, class Weights>
int64_t forward_size(const Layer& layer, Executor& ex, matrix_view<const T> x, const Weights& w, matrix_view<T> y,
                     const gate_options& options)
{
    arena measure;
    run_forward(layer, ex, x, w, y, options, measure, measure);
    return measure.bytes();
}
template <class Layer, class Executor, class Parts, class T, class Weights>
int64_t backward_input_size(const Layer& layer, Executor& ex, const Parts& p, matrix_view<const T> dy, const Weights& w,
                            matrix_view<T> dx, const backward_options& options)
{
    arena measure;
    run_backward_input(layer, ex, p, dy, w, dx, options, measure, measure);
    return measure.bytes();
}
template <class T, class Layer, class Executor, class Parts, class Pending, class Weights>
int64_t backward_weights_size(const Layer& layer, Executor& ex, const Parts& p, const Pending& pending,
                              const Weights& gradients, const backward_options& options)
{
    arena measure;
    run_backward_weights<T>(layer, ex, p, pending, gradients, options, measure);
    return measure.bytes();
}
template <class Layer, class Executor, class Parts, class T, class Weights, class Gradients>
int64_t backward_size(const Layer& layer, Executor& ex, const Parts& p, matrix_view<const T> dy, const Weights& w,
                      matrix_view<T> dx, const Gradients& gradients, const backward_options& options)
{
    arena measure;
    const auto pending = run_backward_input(layer, ex, p, dy, w, dx, options, measure, measure);
    run_backward_weights<T>(layer, ex, p, pending, gradients, options, measure);
    return measure.bytes();
}

// While no rank has more tokens than this one:

template <exchanging Layer, class Executor, class T, class Weights>
int64_t infer_size(const Layer& layer, Executor& ex, matrix_view<const T> x, const Weights& w, matrix_view<T> y,
                   const gate_options& options)
{
    arena measure;
    typename Layer::template parts<T> p{};
    p.x = x;
    p.options = options;
    run_announce<T>(layer, ex, p, w, gate_mode::inference, measure, measure);
    run_received<gate_mode::inference, T>(layer, ex, p, w, y, measure, measure);
    return measure.bytes();
}
template <exchanging Layer, class Executor, class T, class Weights>
int64_t forward_size(const Layer& layer, Executor& ex, matrix_view<const T> x, const Weights& w, matrix_view<T> y,
                     const gate_options& options)
{
    arena measure;
    typename Layer::template parts<T> p{};
    p.x = x;
    p.options = options;
    run_announce<T>(layer, ex, p, w, gate_mode::training, measure, measure);
    run_received<gate_mode::training, T>(layer, ex, p, w, y, measure, measure);
    return measure.bytes();
}

// -- calls ---------------------------------------------------------------------------------------------------------------

template <one_rank Layer, class Executor, class T, class Weights>
void call_infer(const Layer& layer, Executor& ex, matrix_view<const T> x, const Weights& w, matrix_view<T> y,
                const gate_options& options, arena& scratch)
{
    scratch.require(infer_size(layer, ex, x, w, y, options));
    run_infer(layer, ex, x, w, y, options, scratch);
}
template <one_rank Layer, class Executor, class T, class Weights>
void call_infer(const Layer& layer, Executor& ex, matrix_view<const T> x, const Weights& w, matrix_view<T> y,
                const gate_options& options)
{
    buffer<std::byte, Executor> memory(ex, infer_size(layer, ex, x, w, y, options));
    arena scratch(memory.view());
    call_on([&] { run_infer(layer, ex, x, w, y, options, scratch); }, memory);
}
/// Returns what forward keeps, in `memory`.
template <one_rank Layer, class Executor, class T, class Weights>
typename Layer::template parts<T> call_forward(const Layer& layer, Executor& ex, matrix_view<const T> x, const Weights& w,
                                               matrix_view<T> y, const gate_options& options, arena& memory)
{
    memory.require(forward_size(layer, ex, x, w, y, options));
    kept_scope kept(memory);
    auto parts = run_forward(layer, ex, x, w, y, options, memory, memory);
    kept.keep();
    return parts;
}
/// The same in memory of its own: make(parts, storage).
template <one_rank Layer, class Executor, class T, class Weights, class Make>
auto call_forward(const Layer& layer, Executor& ex, matrix_view<const T> x, const Weights& w, matrix_view<T> y,
                  const gate_options& options, const Make& make)
{
    arena kept, lent;
    run_forward(layer, ex, x, w, y, options, kept, lent);
    buffer<std::byte, Executor> storage(ex, kept.bytes()), scratch(ex, lent.bytes());
    arena keep(storage.view()), lend(scratch.view());
    auto parts = call_on([&] { return run_forward(layer, ex, x, w, y, options, keep, lend); }, storage, scratch);
    return make(std::move(parts), std::move(storage));
}

// Where ranks share experts, each half asks for its memory before it begins.

/// With a workspace: the second half's share is asked for once the counts are known, before y is written.
template <exchanging Layer, class Executor, class T, class Weights>
void call_infer(const Layer& layer, Executor& ex, matrix_view<const T> x, const Weights& w, matrix_view<T> y,
                const gate_options& options, arena& scratch)
{
    const arena::scope lent(scratch);
    typename Layer::template parts<T> p{};
    p.x = x;
    p.options = options;
    arena first;
    run_announce<T>(layer, ex, p, w, gate_mode::inference, first, first);
    scratch.require(first.bytes());
    run_announce<T>(layer, ex, p, w, gate_mode::inference, scratch, scratch);
    auto measured = p;
    arena second;
    run_received<gate_mode::inference, T>(layer, ex, measured, w, y, second, second);
    scratch.require(second.bytes());
    run_received<gate_mode::inference, T>(layer, ex, p, w, y, scratch, scratch);
}
template <exchanging Layer, class Executor, class T, class Weights>
void call_infer(const Layer& layer, Executor& ex, matrix_view<const T> x, const Weights& w, matrix_view<T> y,
                const gate_options& options)
{
    typename Layer::template parts<T> p{};
    p.x = x;
    p.options = options;
    arena first, second;
    run_announce<T>(layer, ex, p, w, gate_mode::inference, first, first);
    buffer<std::byte, Executor> own(ex, first.bytes());
    arena scratch(own.view());
    call_on([&] { run_announce<T>(layer, ex, p, w, gate_mode::inference, scratch, scratch); }, own);
    auto measured = p;
    run_received<gate_mode::inference, T>(layer, ex, measured, w, y, second, second);
    buffer<std::byte, Executor> rows(ex, second.bytes());
    arena more(rows.view());
    call_on([&] { run_received<gate_mode::inference, T>(layer, ex, p, w, y, more, more); }, own, rows);
}

/// Returns what forward keeps, in `memory`.
template <exchanging Layer, class Executor, class T, class Weights>
typename Layer::template parts<T> call_forward(const Layer& layer, Executor& ex, matrix_view<const T> x, const Weights& w,
                                               matrix_view<T> y, const gate_options& options, arena& memory)
{
    kept_scope kept(memory);
    typename Layer::template parts<T> p{};
    p.x = x;
    p.options = options;
    arena first;
    run_announce<T>(layer, ex, p, w, gate_mode::training, first, first);
    memory.require(first.bytes());
    run_announce<T>(layer, ex, p, w, gate_mode::training, memory, memory);
    auto measured = p;
    arena second;
    run_received<gate_mode::training, T>(layer, ex, measured, w, y, second, second);
    memory.require(second.bytes());
    run_received<gate_mode::training, T>(layer, ex, p, w, y, memory, memory);
    kept.keep();
    return p;
}

/// The same in buffers of its own: one for what this rank decided, one for what it received.
template <exchanging Layer, class Executor, class T, class Weights, class Make>
auto call_forward(const Layer& layer, Executor& ex, matrix_view<const T> x, const Weights& w, matrix_view<T> y,
                  const gate_options& options, const Make& make)
{
    using bytes = buffer<std::byte, Executor>;
    typename Layer::template parts<T> p{};
    p.x = x;
    p.options = options;
    arena kept, lent;
    run_announce<T>(layer, ex, p, w, gate_mode::training, kept, lent);
    bytes storage(ex, kept.bytes());
    {
        bytes scratch(ex, lent.bytes());
        arena keep(storage.view()), lend(scratch.view());
        call_on([&] { run_announce<T>(layer, ex, p, w, gate_mode::training, keep, lend); }, storage, scratch);
    }
    auto measured = p;
    arena kept_rows, lent_rows;
    run_received<gate_mode::training, T>(layer, ex, measured, w, y, kept_rows, lent_rows);
    bytes received(ex, kept_rows.bytes()), scratch(ex, lent_rows.bytes());
    arena keep(received.view()), lend(scratch.view());
    call_on([&] { run_received<gate_mode::training, T>(layer, ex, p, w, y, keep, lend); }, storage, received, scratch);
    return make(std::move(p), std::move(storage), std::move(received));
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
