// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The layer: gate -> plan -> experts -> combine, forward and backward. A composition of verbs that a user could have
/// written; it owns no memory and keeps no state, so threads may share one and any number of microbatches be in flight.
#pragma once

#include <utility>

#include <fastmoe/comm/self.hpp>
#include <fastmoe/exec/scratch.hpp>
#include <fastmoe/layer/moe_calls.hpp>
#include <fastmoe/layer/moe_checks.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Every view is checked before anything is written, so that what does not fit leaves all outputs as they were; only a gate
/// or an expert of the caller's own that throws later, or another rank that fails, may leave them half written. Whatever
/// throws, the workspace is as it was.
/// @tparam Gate          decides; see gate.hpp
/// @tparam Expert        computes; see expert.hpp
/// @tparam Communicator  self; or ranks that share the experts: a communicator, or an expert_parallel, which says how. All of
///                       them call in the same order, a rank that fails is a comm_error on the others, and a call takes small
///                       arrays of the host's heap besides its workspace
template <states_experts Gate, states_weighing Expert, counts_ranks Communicator = self>
    requires states_choices<Gate>
struct moe_layer {
    Gate gate;
    Expert expert;
    Communicator communicator = {};

    template <class T>
    using weights = weights_of_layer<T, Expert, Gate>;
    template <class T>
    using parts = moe_parts<T, Gate, Expert, Communicator>;
    template <class T, class Executor>
    using saved_type = moe_saved<T, Gate, Expert, Executor, Communicator>;

    /// L: experts whose weights this rank holds; all of them, unless ranks share them.
    int64_t local_experts() const { return detail::experts_here(*this); }

    /// Views of all parameters from one arena: query their size by measuring.
    template <class T>
    weights<T> reserve_weights(arena& memory, int64_t width) const
    {
        weights<T> w{};
        if constexpr (gate_reads_logits<Gate>) w.gate = memory.matrix<T>(gate.experts, width);
        if constexpr (owns_parameters<Gate>) w.own = gate.template reserve_parameters<T>(memory, width);
        w.expert = expert.template reserve_weights<T>(memory, local_experts());
        return w;
    }

    // -- inference ---------------------------------------------------------------------------------------------------

    /// y = sum over a token's choices of weight * expert(x). Keeps nothing.
    /// @param x        tokens                                                     // (T,D)
    /// @param y        overwritten; zero for a token without choices. May be x     // (T,D)
    /// @param scratch  infer_bytes() of it are taken and given back
    /// @throws invalid_argument if shapes disagree or y overlaps x without being x, out_of_memory if scratch is too small: both
    ///         before y is written
    template <executor Executor, class T>
    void infer(Executor& ex, type_identity_t<matrix_view<const T>> x, const type_identity_t<weights<const T>>& w,
               matrix_view<T> y, arena& scratch, const gate_options& options = {}) const
    {
        check_inference<Executor, T>();
        detail::expects_call(*this, x, w, y);
        detail::expects_apart_or_same(y, x);
        detail::call_infer(*this, ex, x, w, y, options, scratch);
    }
    /// The same with scratch from the executor's memory resource.
    template <executor Executor, class T>
    void infer(Executor& ex, type_identity_t<matrix_view<const T>> x, const type_identity_t<weights<const T>>& w,
               matrix_view<T> y, const gate_options& options = {}) const
    {
        check_inference<Executor, T>();
        detail::expects_call(*this, x, w, y);
        detail::expects_apart_or_same(y, x);
        detail::call_infer(*this, ex, x, w, y, options);
    }

    // -- training ----------------------------------------------------------------------------------------------------

    /// The same values, kept for backward(). `memory` holds what is kept (saved_bytes()) until then, and lends the rest of
    /// forward_bytes() during the call. The result refers to x and to the options' arrays.
    /// @param y  overwritten; not x, which backward() reads        // (T,D)
    /// @throws invalid_argument if shapes disagree, y is x, or the expert would let the gate learn nothing; out_of_memory:
    ///         all before y is written
    template <executor Executor, class T>
    moe_saved<T, Gate, Expert, Executor, Communicator> forward(Executor& ex, type_identity_t<matrix_view<const T>> x,
                                                 const type_identity_t<weights<const T>>& w, matrix_view<T> y,
                                                 arena& memory, const gate_options& options = {}) const
    {
        expects_forward<Executor>(x, w, y);
        return {detail::call_forward(*this, ex, x, w, y, options, memory), {}};
    }
    /// The same with memory from the executor's resource; the result owns what it keeps.
    template <executor Executor, class T>
    moe_saved<T, Gate, Expert, Executor, Communicator> forward(Executor& ex, type_identity_t<matrix_view<const T>> x,
                                                 const type_identity_t<weights<const T>>& w, matrix_view<T> y,
                                                 const gate_options& options = {}) const
    {
        expects_forward<Executor>(x, w, y);
        return detail::call_forward(*this, ex, x, w, y, options, []<class... Memory>(parts<T> kept, Memory&&... memory) {
            return saved_type<T, Executor>{std::move(kept), std::forward<Memory>(memory)...};
        });
    }

    /// All gradients: backward_input() and backward_weights() in one call.
    /// @param dy         gradient of y                                                                  // (T,D)
    /// @param dx         overwritten; neither dy nor x. A row of an expert is rounded to T; their sum, with what
    ///                   comes back through the router, once more                                      // (T,D)
    /// @param gradients  overwritten or added to, as the options say; T or a wider type. The router's is left alone by a
    ///                   gate that reads no logits
    /// @throws invalid_argument if a shape disagrees or dx shares memory with dy or x, out_of_memory: both before anything
    ///         is written
    template <executor Executor, class T, class G, class Own>
    void backward(Executor& ex, const moe_saved<T, Gate, Expert, Executor, Communicator>& saved,
                  type_identity_t<matrix_view<const T>> dy, const type_identity_t<weights<const T>>& w,
                  type_identity_t<matrix_view<T>> dx, const moe_weights<G, Expert, Own>& gradients, arena& scratch,
                  const backward_options& options = {}) const
    {
        expects_both(saved, dy, w, dx, gradients);
        scratch.require(detail::backward_size(*this, ex, saved.parts(), dy, w, dx, gradients, options));
        run_backward(ex, saved, dy, w, dx, gradients, scratch, options);
    }
    /// The same with scratch from the executor's memory resource.
    template <executor Executor, class T, class G, class Own>
    void backward(Executor& ex, const moe_saved<T, Gate, Expert, Executor, Communicator>& saved,
                  type_identity_t<matrix_view<const T>> dy, const type_identity_t<weights<const T>>& w,
                  type_identity_t<matrix_view<T>> dx, const moe_weights<G, Expert, Own>& gradients,
                  const backward_options& options = {}) const
    {
        expects_both(saved, dy, w, dx, gradients);
        const int64_t bytes = detail::backward_size(*this, ex, saved.parts(), dy, w, dx, gradients, options);
        buffer<std::byte, Executor> memory(ex, bytes);
        arena scratch(memory.view());
        call_on([&] { run_backward(ex, saved, dy, w, dx, gradients, scratch, options); }, memory);
    }

    /// The gradient of the input alone. What the weight gradients still need stays in `memory` until backward_weights(), and
    /// so must dy: dx may be dy only if that is not called.
    /// @throws as backward
    template <executor Executor, class T>
    moe_pending<T, Expert, Communicator> backward_input(Executor& ex, const moe_saved<T, Gate, Expert, Executor, Communicator>& saved,
                                          type_identity_t<matrix_view<const T>> dy,
                                          const type_identity_t<weights<const T>>& w, type_identity_t<matrix_view<T>> dx,
                                          arena& memory, const backward_options& options = {}) const
    {
        check_training<Executor, T>();
        detail::expects_backward(*this, saved.parts(), dy, w, dx);
        memory.require(detail::backward_input_size(*this, ex, saved.parts(), dy, w, dx, options));
        detail::kept_scope kept(memory);
        const auto pending = detail::run_backward_input(*this, ex, saved.parts(), dy, w, dx, options, memory, memory);
        kept.keep();
        return pending;
    }
    /// The gradients of the weights, at any later time; dy must still be there.
    /// @throws as backward
    template <executor Executor, class T, class G, class Own>
    void backward_weights(Executor& ex, const moe_saved<T, Gate, Expert, Executor, Communicator>& saved,
                          const moe_pending<T, Expert, Communicator>& pending, const moe_weights<G, Expert, Own>& gradients,
                          arena& scratch, const backward_options& options = {}) const
    {
        check_training<Executor, T>();
        expects_gradients<T>(saved, gradients);
        scratch.require(detail::backward_weights_size<T>(*this, ex, saved.parts(), pending, gradients, options));
        detail::run_backward_weights<T>(*this, ex, saved.parts(), pending, gradients, options, scratch);
    }

    // -- sizes: the same functions, run on arenas without storage ------------------------------------------------------
    //
    // How much a product takes depends on the strides of its matrices. With a width alone, these serve weights and gradients
    // in the layout of reserve_weights(); with views, those in their layout. Of views only extents and strides are read.

    template <class T, executor Executor>
    int64_t infer_bytes(Executor& ex, int64_t tokens, int64_t width) const
    {
        return infer_bytes<T>(ex, tokens, width, measured_weights<const T>(width));
    }
    template <class T, executor Executor>
    int64_t infer_bytes(Executor& ex, int64_t tokens, int64_t width, const type_identity_t<weights<const T>>& w,
                        const gate_options& options = {}) const
    {
        return detail::infer_size(*this, ex, shaped<const T>(tokens, width), w, shaped<T>(tokens, width), options);
    }
    template <class T, executor Executor>
    int64_t forward_bytes(Executor& ex, int64_t tokens, int64_t width) const
    {
        return forward_bytes<T>(ex, tokens, width, measured_weights<const T>(width));
    }
    template <class T, executor Executor>
    int64_t forward_bytes(Executor& ex, int64_t tokens, int64_t width, const type_identity_t<weights<const T>>& w,
                          const gate_options& options = {}) const
    {
        return detail::forward_size(*this, ex, shaped<const T>(tokens, width), w, shaped<T>(tokens, width), options);
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
        return backward_bytes<T>(ex, tokens, width, measured_weights<const T>(width), measured_weights<G>(width));
    }
    template <class T, executor Executor, class G, class Own>
    int64_t backward_bytes(Executor& ex, int64_t tokens, int64_t width, const type_identity_t<weights<const T>>& w,
                           const moe_weights<G, Expert, Own>& gradients) const
    {
        return detail::backward_size(*this, ex, measured_parts<T>(tokens, width), shaped<const T>(tokens, width), w,
                                     shaped<T>(tokens, width), gradients, {});
    }
    template <class T, executor Executor>
    int64_t backward_input_bytes(Executor& ex, int64_t tokens, int64_t width) const
    {
        return backward_input_bytes<T>(ex, tokens, width, measured_weights<const T>(width));
    }
    template <class T, executor Executor>
    int64_t backward_input_bytes(Executor& ex, int64_t tokens, int64_t width,
                                 const type_identity_t<weights<const T>>& w) const
    {
        return detail::backward_input_size(*this, ex, measured_parts<T>(tokens, width), shaped<const T>(tokens, width), w,
                                           shaped<T>(tokens, width), {});
    }
    template <class T, class G = T, executor Executor>
    int64_t backward_weights_bytes(Executor& ex, int64_t tokens, int64_t width) const
    {
        return backward_weights_bytes<T>(ex, tokens, width, measured_weights<G>(width));
    }
    template <class T, executor Executor, class G, class Own>
    int64_t backward_weights_bytes(Executor& ex, int64_t tokens, int64_t width,
                                   const moe_weights<G, Expert, Own>& gradients) const
    {
        arena kept;
        const auto parts_of_shape = measured_parts<T>(tokens, width);
        auto pending = detail::reserve_pending<T>(*this, kept, parts_of_shape);
        if constexpr (!detail::exchanging<moe_layer>) pending.dy = {shaped<const T>(tokens, width), parts_of_shape.slots.token_of};
        return detail::backward_weights_size<T>(*this, ex, parts_of_shape, pending, gradients, {});
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
    static void check_inference()
    {
        static_assert(scalar<T>, "the element type is none of double, float, bfloat16 and half");
        using ranks = detail::gate_ranks_t<Communicator>;
        static_assert(sums_over_ranks<ranks, Executor, double>, "the communicator lacks what gates ask; see communicator.hpp");
        static_assert(inference_gate<Gate, Executor, T, ranks>, "the gate lacks what inference asks; see gate.hpp");
        static_assert(expert_policy<Expert, Executor, T>, "the expert lacks what inference asks; see expert.hpp");
        if constexpr (detail::exchanging<moe_layer>) {
            using p = detail::parallel_t<Communicator>;
            static_assert(exchange_policy<decltype(p::exchange), Executor, decltype(p::group), T, decltype(p::placement)>,
                          "the exchange lacks a verb, or the communicator what it asks; see exchange.hpp");
        }
    }
    template <class Executor, class T>
    static void check_training()
    {
        check_inference<Executor, T>();
        static_assert(gate_policy<Gate, Executor, T, detail::gate_ranks_t<Communicator>>, "the gate lacks what training asks; see gate.hpp");
        static_assert(trainable_expert<Expert, Executor, T>, "the expert lacks what training asks; see expert.hpp");
    }

    template <class Executor, class T>
    void expects_forward(matrix_view<const T> x, const weights<const T>& w, matrix_view<T> y) const
    {
        check_training<Executor, T>();
        detail::expects_call(*this, x, w, y);
        detail::expects_apart(y, "y (T,D)", x, "x (T,D), which backward() reads");
        detail::expects_learning(gate, expert);
    }
    template <class T, class Executor, class G, class Own>
    void expects_gradients(const moe_saved<T, Gate, Expert, Executor, Communicator>& saved,
                           const moe_weights<G, Expert, Own>& gradients) const
    {
        static_assert(scalar<G>, "the gradients' element type is none of double, float, bfloat16 and half");
        detail::expects_parameters(*this, gradients, saved.x().extent(1), weight_role::gradients);
        detail::check_pointers<Executor>(expert, gradients.expert);
    }
    template <class T, class Executor, class G, class Own>
    void expects_both(const moe_saved<T, Gate, Expert, Executor, Communicator>& saved, matrix_view<const T> dy, const weights<const T>& w,
                      matrix_view<T> dx, const moe_weights<G, Expert, Own>& gradients) const
    {
        check_training<Executor, T>();
        detail::expects_backward(*this, saved.parts(), dy, w, dx);
        detail::expects_apart(dx, "dx (T,D)", dy, "dy (T,D), which the weight gradients read");
        expects_gradients(saved, gradients);
    }
    template <class T, class Executor, class G, class Own>
    void run_backward(Executor& ex, const moe_saved<T, Gate, Expert, Executor, Communicator>& saved, matrix_view<const T> dy,
                      const weights<const T>& w, matrix_view<T> dx, const moe_weights<G, Expert, Own>& gradients,
                      arena& scratch, const backward_options& options) const
    {
        const arena::scope lent(scratch);
        const auto pending = detail::run_backward_input(*this, ex, saved.parts(), dy, w, dx, options, scratch, scratch);
        detail::run_backward_weights<T>(*this, ex, saved.parts(), pending, gradients, options, scratch);
    }
};

template <class Gate, class Expert, class Communicator>
moe_layer(Gate, Expert, Communicator) -> moe_layer<Gate, Expert, Communicator>;
template <class Gate, class Expert>
moe_layer(Gate, Expert) -> moe_layer<Gate, Expert, self>;

} // namespace fastmoe::inline FASTMOE_ABI
