// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// One training step of an engine's block, out = h + moe(normalized h), forward and backward: the library's primitives between
/// the engine's own kernels, written once for every executor. compose.cu runs it on a stream.
#pragma once

#include <fastmoe/comm/self.hpp>
#include <fastmoe/routing/plan.hpp>
#include <fastmoe/routing/project.hpp>
#include <fastmoe/transfer/combine.hpp>
#include <fastmoe/transfer/dispatch.hpp>

#include "pair_gate.hpp"
#include "squared_relu_expert.hpp"

namespace compose {

// [pointers]
/// What the engine owns: shapes, and plain pointers to memory that the executor reaches.
template <class T>
struct block_pointers {
    int64_t tokens, width, hidden, experts;
    const T* h;    // (T,D)
    const T* gate; // (E,D)
    const T* up;   // (E,H,D)
    const T* down; // (E,D,H)
    T* out;        // (T,D)    overwritten, as all below
    const T* dout; // (T,D)
    T* dh;         // (T,D)
    T* dgate;      // (E,D)
    T* dup;        // (E,H,D)
    T* ddown;      // (E,D,H)
};
// [pointers]

/// Sizes of a block, and where its tensors lie if inputs and outputs are one piece of memory each.
struct block_shape {
    int64_t tokens, width, hidden, experts;

    /// Elements of all inputs, and of all outputs: h, gate, up, down, dout; dh, dgate, dup, ddown, out.
    int64_t elements() const { return 2 * tokens * width + experts * width + 2 * experts * hidden * width; }
    template <class T>
    block_pointers<T> lay_out(const T* in, T* out) const
    {
        const int64_t rows = tokens * width, router = rows + experts * width, stack = experts * hidden * width;
        const int64_t up = router, down = up + stack, last = down + stack;
        return {tokens, width, hidden, experts, in, in + rows, in + up, in + down,
                out + last, in + last, out, out + rows, out + up, out + down};
    }
};

// [step]
/// @param kernels  the engine's: normalize(h, x), add(h, y, out), normalize_backward(h, dx, dout, dh)
/// @param memory   the step's workspace. On an arena that measures, nothing runs: memory.bytes() is what the step takes
template <class T, class Executor, class Kernels>
void train_step(Executor& ex, const Kernels& kernels, const block_pointers<T>& p, fm::arena& memory)
{
    using real = fm::accumulate_t<T>;
    const bool live = !memory.measuring();
    const pair_gate gate{.experts = p.experts};
    const squared_relu_expert expert{.width = p.width, .hidden = p.hidden};
    const fm::matrix_view<const T> router(p.gate, p.experts, p.width);
    const auto stack = []<class U>(U* w, int64_t e, int64_t out, int64_t in) { return fm::stacked(fm::tensor_view<U, 3>(w, e, out, in)); };
    const squared_relu_weights<const T> w{stack(p.up, p.experts, p.hidden, p.width), stack(p.down, p.experts, p.width, p.hidden)};
    const squared_relu_weights<T> dw{stack(p.dup, p.experts, p.hidden, p.width), stack(p.ddown, p.experts, p.width, p.hidden)};

    // Forward.
    const auto x = memory.matrix<T>(p.tokens, p.width);
    if (live) kernels.normalize(p.h, x.data_handle());
    const auto logits = memory.matrix<real>(p.tokens, p.experts);
    fm::project(ex, x, router, fm::vector_view<const T>{}, logits, memory);
    const auto state = fm::reserve_gate<real>(gate, memory, p.tokens);
    const fm::gate_input<T> seen{x, logits, {}, {}};
    gate.route(ex, seen, fm::self{}, state, memory);
    const auto plan = fm::reserve_plan(memory, p.tokens, state.routing.choices(), p.experts);
    fm::make_plan(ex, state.routing, plan, memory);
    const fm::expert_input<T> in{fm::gathered<T>(x, plan), plan.groups(), state.routing.weights, plan.choice_of};
    const auto saved = expert.reserve_saved<T>(memory, plan.slots);
    const auto rows = memory.matrix<T>(plan.slots, p.width); // one for each choice
    expert.forward(ex, in, w, saved, rows, memory);
    const auto y = memory.matrix<T>(p.tokens, p.width);
    if (live) fm::combine(ex, rows, state.routing, plan, y);
    if (live) kernels.add(p.h, y.data_handle(), p.out);

    // Backward. What out = h + y adds to dh comes in with the engine's last kernel.
    const fm::matrix_view<const T> dy(p.dout, p.tokens, p.width);
    const auto dweights = memory.vector<real>(state.routing.choices());
    const auto drows = memory.matrix<T>(plan.slots, p.width);
    if (live) fm::combine_weights_backward(ex, dy, rows, state.routing, plan, dweights);
    if (live) fm::dispatch(ex, dy, state.routing.weights, plan, drows);
    const auto pending = expert.reserve_pending<T>(memory, plan.slots);
    const auto dx_rows = memory.matrix<T>(plan.slots, p.width);
    expert.backward(ex, in, w, saved, fm::plain_rows<T>{drows}, pending, dx_rows, dweights, memory);
    expert.weight_gradients(ex, in, saved, fm::plain_rows<T>{drows}, pending, dw, fm::write_mode::overwrite, memory);
    const auto dlogits = memory.matrix<real>(p.tokens, p.experts);
    gate.backward(ex, seen, fm::self{}, state, fm::vector_view<const real>(dweights), real(0), dlogits, memory);
    const auto dx = memory.matrix<T>(p.tokens, p.width);
    if (live) fm::combine_unweighted(ex, dx_rows, state.routing, plan, dx);
    fm::project_input_backward(ex, dlogits, router, dx, fm::write_mode::accumulate, memory);
    fm::project_weights_backward(ex, dlogits, x, fm::matrix_view<T>(p.dgate, p.experts, p.width), {}, fm::write_mode::overwrite,
                                 memory);
    if (live) kernels.normalize_backward(p.h, dx.data_handle(), p.dout, p.dh);
}
// [step]

/// Bytes of workspace that a step takes.
template <class T, class Executor, class Kernels>
int64_t step_bytes(Executor& ex, const Kernels& kernels, const block_pointers<T>& p)
{
    fm::arena measure;
    train_step(ex, kernels, p, measure);
    return measure.bytes();
}

} // namespace compose
