// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The layer: gate -> plan -> experts -> combine, forward and backward. A composition of verbs that a user could have
/// written; it owns no memory and keeps no state, so threads may share one and any number of microbatches be in flight.
#pragma once

#include <utility>

#include <fastmoe/comm/self.hpp>
#include <fastmoe/layer/moe_passes.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// @tparam Gate          decides; see gate.hpp
/// @tparam Expert        computes; see expert.hpp
/// @tparam Communicator  ranks that share the experts; see communicator.hpp
template <states_experts Gate, states_weighing Expert, class Communicator = self>
struct moe_layer {
    Gate gate;
    Expert expert;
    Communicator communicator = {};

    template <class T>
    using weights = weights_of_layer<T, Expert, Gate>;
    template <class T>
    using parts = moe_parts<T, Gate, Expert>;

    /// Views of all parameters from one arena: query their size by measuring.
    template <class T>
    weights<T> reserve_weights(arena& memory, int64_t width) const
    {
        weights<T> w{};
        if constexpr (gate_reads_logits<Gate>) w.gate = memory.matrix<T>(gate.experts, width);
        if constexpr (owns_parameters<Gate>) w.own = gate.template reserve_parameters<T>(memory, width);
        w.expert = expert.template reserve_weights<T>(memory, gate.experts);
        return w;
    }

    // -- inference ---------------------------------------------------------------------------------------------------

    /// y = sum over a token's choices of weight * expert(x). Keeps nothing.
    /// @param x        tokens                                         // (T,D)
    /// @param y        overwritten; zero for a token without choices   // (T,D)
    /// @param scratch  infer_bytes() of it are taken and given back
    /// @throws invalid_argument if shapes disagree, out_of_memory if scratch is too small: both before y is written
    template <executor Executor, class T>
    void infer(Executor& ex, type_identity_t<matrix_view<const T>> x, const type_identity_t<weights<const T>>& w,
               matrix_view<T> y, arena& scratch, const gate_options& options = {}) const
    {
        static_assert(inference_gate<Gate, Executor, T, Communicator>, "the gate lacks what inference asks; see gate.hpp");
        static_assert(expert_policy<Expert, Executor, T>, "the expert lacks what inference asks; see expert.hpp");
        expects_call(x, w, y);
        scratch.require(infer_bytes<T>(ex, x.extent(0), x.extent(1)));
        detail::run_infer(*this, ex, x, w, y, options, scratch);
    }
    /// The same with scratch from the executor's memory resource.
    template <executor Executor, class T>
    void infer(Executor& ex, type_identity_t<matrix_view<const T>> x, const type_identity_t<weights<const T>>& w,
               matrix_view<T> y, const gate_options& options = {}) const
    {
        buffer<std::byte, Executor> memory(ex, infer_bytes<T>(ex, x.extent(0), x.extent(1)));
        arena scratch(memory.view());
        infer(ex, x, w, y, scratch, options);
    }

    // -- training ----------------------------------------------------------------------------------------------------

    /// The same values, kept for backward(). `memory` holds what is kept (saved_bytes()) until then, and lends the rest of
    /// forward_bytes() during the call. The result refers to x and to the options' arrays.
    template <executor Executor, class T>
    moe_saved<T, Gate, Expert, Executor> forward(Executor& ex, type_identity_t<matrix_view<const T>> x,
                                                 const type_identity_t<weights<const T>>& w, matrix_view<T> y,
                                                 arena& memory, const gate_options& options = {}) const
    {
        check_training<Executor, T>();
        expects_call(x, w, y);
        memory.require(forward_bytes<T>(ex, x.extent(0), x.extent(1)));
        return {detail::run_forward(*this, ex, x, w, y, options, memory, memory), {}};
    }
    /// The same with memory from the executor's resource; the result owns what it keeps.
    template <executor Executor, class T>
    moe_saved<T, Gate, Expert, Executor> forward(Executor& ex, type_identity_t<matrix_view<const T>> x,
                                                 const type_identity_t<weights<const T>>& w, matrix_view<T> y,
                                                 const gate_options& options = {}) const
    {
        check_training<Executor, T>();
        expects_call(x, w, y);
        arena kept, lent;
        detail::run_forward(*this, ex, x, w, y, options, kept, lent);
        buffer<std::byte, Executor> storage(ex, kept.bytes()), scratch(ex, lent.bytes());
        arena keep(storage.view()), lend(scratch.view());
        auto parts = detail::run_forward(*this, ex, x, w, y, options, keep, lend);
        return {parts, std::move(storage)};
    }

    /// All gradients: backward_input() and backward_weights() in one call.
    /// @param dy         gradient of y                                       // (T,D)
    /// @param dx         overwritten                                          // (T,D)
    /// @param gradients  overwritten or added to, as the options say; T or a wider type
    template <executor Executor, class T, class G, class Own>
    void backward(Executor& ex, const moe_saved<T, Gate, Expert, Executor>& saved,
                  type_identity_t<matrix_view<const T>> dy, const type_identity_t<weights<const T>>& w,
                  type_identity_t<matrix_view<T>> dx, const moe_weights<G, Expert, Own>& gradients, arena& scratch,
                  const backward_options& options = {}) const
    {
        expects_gradients(saved, dy, w, dx, gradients);
        const int64_t mark = scratch.used();
        scratch.require(backward_bytes<T, G>(ex, saved.x().extent(0), saved.x().extent(1)));
        const auto pending = detail::run_backward_input(*this, ex, saved.parts(), dy, w, dx, options, scratch, scratch);
        detail::run_backward_weights<T>(*this, ex, saved.parts(), pending, gradients, options, scratch);
        scratch.rewind(mark);
    }
    template <executor Executor, class T, class G, class Own>
    void backward(Executor& ex, const moe_saved<T, Gate, Expert, Executor>& saved,
                  type_identity_t<matrix_view<const T>> dy, const type_identity_t<weights<const T>>& w,
                  type_identity_t<matrix_view<T>> dx, const moe_weights<G, Expert, Own>& gradients,
                  const backward_options& options = {}) const
    {
        buffer<std::byte, Executor> memory(ex, backward_bytes<T, G>(ex, saved.x().extent(0), saved.x().extent(1)));
        arena scratch(memory.view());
        backward(ex, saved, dy, w, dx, gradients, scratch, options);
    }

    /// The gradient of the input alone. What the weight gradients still need stays in `memory` until backward_weights().
    template <executor Executor, class T>
    moe_pending<T, Expert> backward_input(Executor& ex, const moe_saved<T, Gate, Expert, Executor>& saved,
                                          type_identity_t<matrix_view<const T>> dy,
                                          const type_identity_t<weights<const T>>& w, type_identity_t<matrix_view<T>> dx,
                                          arena& memory, const backward_options& options = {}) const
    {
        expects_shape(dy, "dy (T,D)", saved.x().extent(0), saved.x().extent(1));
        expects_shape(dx, "dx (T,D)", saved.x().extent(0), saved.x().extent(1));
        memory.require(backward_input_bytes<T>(ex, saved.x().extent(0), saved.x().extent(1)));
        return detail::run_backward_input(*this, ex, saved.parts(), dy, w, dx, options, memory, memory);
    }
    /// The gradients of the weights, at any later time; dy must still be there.
    template <executor Executor, class T, class G, class Own>
    void backward_weights(Executor& ex, const moe_saved<T, Gate, Expert, Executor>& saved,
                          const moe_pending<T, Expert>& pending, const moe_weights<G, Expert, Own>& gradients, arena& scratch,
                          const backward_options& options = {}) const
    {
        expects_weights(saved.x().extent(1), gradients, "gradients.gate (E,D)");
        scratch.require(backward_weights_bytes<T, G>(ex, saved.x().extent(0), saved.x().extent(1)));
        detail::run_backward_weights<T>(*this, ex, saved.parts(), pending, gradients, options, scratch);
    }

    // -- sizes: the same functions, run on arenas without storage -------------------------------------------------------

    template <class T, executor Executor>
    int64_t infer_bytes(Executor& ex, int64_t tokens, int64_t width) const
    {
        arena measure;
        detail::run_infer(*this, ex, shaped<const T>(tokens, width), measured_weights<const T>(width), shaped<T>(tokens, width), {},
                  measure);
        return measure.bytes();
    }
    template <class T, executor Executor>
    int64_t forward_bytes(Executor& ex, int64_t tokens, int64_t width) const
    {
        arena measure;
        detail::run_forward(*this, ex, shaped<const T>(tokens, width), measured_weights<const T>(width), shaped<T>(tokens, width), {},
                    measure, measure);
        return measure.bytes();
    }
    /// What forward() keeps: routing, plan, and what the expert declares.
    template <class T>
    int64_t saved_bytes(int64_t tokens, int64_t width) const
    {
        arena measure;
        detail::reserve_parts<T>(*this, measure, tokens, width);
        return measure.bytes();
    }
    template <class T, class G = T, executor Executor>
    int64_t backward_bytes(Executor& ex, int64_t tokens, int64_t width) const
    {
        arena measure;
        const auto kept = measured_parts<T>(tokens, width);
        const auto pending = detail::run_backward_input(*this, ex, kept, shaped<const T>(tokens, width), measured_weights<const T>(width),
                                                shaped<T>(tokens, width), {}, measure, measure);
        detail::run_backward_weights<T>(*this, ex, kept, pending, measured_weights<G>(width), {}, measure);
        return measure.bytes();
    }
    template <class T, executor Executor>
    int64_t backward_input_bytes(Executor& ex, int64_t tokens, int64_t width) const
    {
        arena measure;
        detail::run_backward_input(*this, ex, measured_parts<T>(tokens, width), shaped<const T>(tokens, width),
                           measured_weights<const T>(width), shaped<T>(tokens, width), {}, measure, measure);
        return measure.bytes();
    }
    template <class T, class G = T, executor Executor>
    int64_t backward_weights_bytes(Executor& ex, int64_t tokens, int64_t width) const
    {
        arena kept, measure;
        detail::run_backward_weights<T>(*this, ex, measured_parts<T>(tokens, width), detail::reserve_pending<T>(*this, kept, tokens, width),
                             measured_weights<G>(width), {}, measure);
        return measure.bytes();
    }

private:
    template <class T>
    static matrix_view<T> shaped(int64_t rows, int64_t cols)
    {
        return matrix_view<T>(nullptr, rows, cols);
    }
    template <class T>
    weights<T> measured_weights(int64_t width) const
    {
        arena measure;
        return reserve_weights<std::remove_const_t<T>>(measure, width);
    }
    template <class T>
    parts<T> measured_parts(int64_t tokens, int64_t width) const
    {
        arena measure;
        auto kept = detail::reserve_parts<T>(*this, measure, tokens, width);
        kept.x = shaped<const T>(tokens, width);
        return kept;
    }

    template <class Executor, class T>
    static void check_training()
    {
        static_assert(gate_policy<Gate, Executor, T, Communicator>, "the gate lacks what training asks; see gate.hpp");
        static_assert(trainable_expert<Expert, Executor, T>, "the expert lacks what training asks; see expert.hpp");
    }

    template <class T, class Own>
    void expects_weights(int64_t width, const moe_weights<T, Expert, Own>& w, const char* name) const
    {
        expects(communicator.size() == 1, "communicator.size()", communicator.size(), "1");
        if constexpr (gate_reads_logits<Gate>) expects_shape(w.gate, name, gate.experts, width);
        if (pointer_or_null(w.gate_bias)) expects_shape(w.gate_bias, "gate_bias (E)", gate.experts);
    }
    template <class T>
    void expects_call(matrix_view<const T> x, const weights<const T>& w, matrix_view<T> y) const
    {
        expects_shape(x, "x (T,D)", y.extent(0), y.extent(1));
        expects_shape(y, "y (T,D)", x.extent(0), x.extent(1));
        expects_weights(x.extent(1), w, "weights.gate (E,D)");
    }
    template <class T, class Executor, class G, class Own>
    void expects_gradients(const moe_saved<T, Gate, Expert, Executor>& saved, matrix_view<const T> dy,
                           const weights<const T>& w, matrix_view<T> dx, const moe_weights<G, Expert, Own>& gradients) const
    {
        check_training<Executor, T>();
        expects_shape(dy, "dy (T,D)", saved.x().extent(0), saved.x().extent(1));
        expects_shape(dx, "dx (T,D)", saved.x().extent(0), saved.x().extent(1));
        expects_weights(saved.x().extent(1), w, "weights.gate (E,D)");
        expects_weights(saved.x().extent(1), gradients, "gradients.gate (E,D)");
    }
};

template <class Gate, class Expert, class Communicator>
moe_layer(Gate, Expert, Communicator) -> moe_layer<Gate, Expert, Communicator>;
template <class Gate, class Expert>
moe_layer(Gate, Expert) -> moe_layer<Gate, Expert, self>;

} // namespace fastmoe::inline FASTMOE_ABI
