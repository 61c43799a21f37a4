// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// An expert that every token passes, beside the routed ones: its output is added to y, its input gradient to dx.
#pragma once

#include <fastmoe/exec/scratch.hpp>
#include <fastmoe/layer/moe_checks.hpp>
#include <fastmoe/ops/rows.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// What a shared expert's forward keeps, as views.
template <class T, class Expert>
struct shared_parts {
    expert_input<T> in;                    // all tokens as one group
    vector_view<int32_t> numbers;          // (T)
    vector_view<accumulate_t<T>> weights;  // (T)  all 1, unless a gate weighs the tokens
    saved_of<Expert, T> expert;
};

namespace detail {

/// All tokens as one group; their weights are room only.
template <class T, class Expert, class Executor>
shared_parts<T, Expert> reserve_shared(Executor& ex, matrix_view<const T> x, arena& memory)
{
    const int64_t tokens = x.extent(0);
    shared_parts<T, Expert> kept{};
    kept.numbers = memory.vector<int32_t>(tokens);
    kept.weights = memory.vector<accumulate_t<T>>(tokens);
    kept.in = {{x, kept.numbers}, one_group(ex, tokens, memory), kept.weights, kept.numbers};
    if (!memory.measuring()) fastmoe::for_each(ex, tokens, count_up{kept.numbers.data_handle()});
    return kept;
}

} // namespace detail

/// Any expert as a shared one. It has no gate (gated_shared_expert has one): call it after (or before) the routed layer on
/// the same y. It sees every token, padding too: what the layer leaves out by its mask must hold finite numbers here.
///
///     layer.forward(ex, x, w.routed, y, memory);
///     auto kept = shared.forward(ex, x, w.shared, y, memory);      // y += shared(x)
///
/// Its rows are rounded to T, and so is the sum with what y or dx holds.
template <states_weighing Expert>
struct shared_expert {
    Expert expert;

    template <class T>
    using weights = typename Expert::template weights<T>;

    /// y += expert(x).
    /// @param x        tokens                     // (T,D)
    /// @param y        added to; may be x         // (T,D)
    /// @param scratch  taken and given back; on a measuring arena only counted
    /// @throws invalid_argument if shapes disagree, out_of_memory; y is not written then
    template <executor Executor, class T>
    void infer(Executor& ex, type_identity_t<matrix_view<const T>> x, const type_identity_t<weights<const T>>& w,
               matrix_view<T> y, arena& scratch) const
    {
        static_assert(expert_policy<Expert, Executor, T>, "the expert lacks what inference asks; see expert.hpp");
        if (!scratch.measuring()) expects_call(x, w, y);
        detail::with_scratch(scratch, [&](arena& memory) {
            const auto kept = reserve<T>(ex, x, memory);
            const auto rows = memory.matrix<T>(x.extent(0), x.extent(1));
            expert.infer(ex, kept.in, w, rows, memory);
            add(ex, rows, y, memory);
        });
    }

    /// The same; the result holds views into `memory`, what lies behind it is given back.
    /// @param y  added to; not x, which backward() reads        // (T,D)
    /// @throws as infer
    template <executor Executor, class T>
    shared_parts<T, Expert> forward(Executor& ex, type_identity_t<matrix_view<const T>> x,
                                    const type_identity_t<weights<const T>>& w, matrix_view<T> y, arena& memory) const
    {
        static_assert(trainable_expert<Expert, Executor, T>, "the expert lacks what training asks; see expert.hpp");
        if (memory.measuring()) return pass<T>(ex, x, w, y, memory);
        expects_call(x, w, y);
        detail::expects_apart(y, "y (T,D)", x, "x (T,D), which backward() reads");
        arena needed;
        pass<T>(ex, x, w, y, needed);
        memory.require(needed.bytes());
        return pass<T>(ex, x, w, y, memory);
    }

    /// @param dy         gradient of y                          // (T,D)
    /// @param dx         added to; neither dy nor x             // (T,D)
    /// @param gradients  overwritten or added to; T or a wider type
    /// @throws invalid_argument if shapes disagree or dx shares memory with dy or x, out_of_memory; nothing is written then
    template <executor Executor, class T, class Gradients>
    void backward(Executor& ex, const shared_parts<T, Expert>& kept, type_identity_t<matrix_view<const T>> dy,
                  const type_identity_t<weights<const T>>& w, type_identity_t<matrix_view<T>> dx,
                  const Gradients& gradients, write_mode mode, arena& scratch) const
    {
        static_assert(trainable_expert<Expert, Executor, T>, "the expert lacks what training asks; see expert.hpp");
        const auto& x = kept.in.x.data;
        if (!scratch.measuring()) {
            expects_shape(dy, "dy (T,D)", x.extent(0), x.extent(1));
            expects_shape(dx, "dx (T,D)", x.extent(0), x.extent(1));
            detail::expects_apart(dx, "dx (T,D)", dy, "dy (T,D), which the weight gradients read");
            detail::expects_apart(dx, "dx (T,D)", x, "x (T,D), which the weight gradients read");
            detail::check_weights(expert, w, 1, x.extent(1), weight_role::weights);
            detail::check_weights(expert, gradients, 1, x.extent(1), weight_role::gradients);
            detail::check_pointers<Executor>(expert, gradients);
        }
        detail::with_scratch(scratch, [&](arena& memory) {
            const indexed_rows<T> dy_rows{dy, kept.numbers};
            const auto pending = expert.template reserve_pending<T>(memory, dy.extent(0));
            const auto dweights = memory.vector<accumulate_t<T>>(dy.extent(0));
            const auto drows = memory.matrix<T>(dy.extent(0), dy.extent(1));
            expert.backward(ex, kept.in, w, kept.expert, dy_rows, pending, drows, dweights, memory);
            expert.weight_gradients(ex, kept.in, kept.expert, dy_rows, pending, gradients, mode, memory);
            add(ex, drows, dx, memory);
        });
    }

private:
    template <class T>
    void expects_call(matrix_view<const T> x, const weights<const T>& w, matrix_view<T> y) const
    {
        expects_shape(x, "x (T,D)", y.extent(0), y.extent(1));
        expects_shape(y, "y (T,D)", x.extent(0), x.extent(1));
        detail::check_weights(expert, w, 1, x.extent(1), weight_role::weights);
    }

    template <class T, class Executor>
    shared_parts<T, Expert> pass(Executor& ex, matrix_view<const T> x, const weights<const T>& w, matrix_view<T> y,
                                 arena& memory) const
    {
        detail::kept_scope all(memory);
        auto kept = reserve<T>(ex, x, memory);
        kept.expert = expert.template reserve_saved<T>(memory, x.extent(0));
        const arena::scope lent(memory);
        const auto rows = memory.matrix<T>(x.extent(0), x.extent(1));
        expert.forward(ex, kept.in, w, kept.expert, rows, memory);
        add(ex, rows, y, memory);
        all.keep();
        return kept;
    }

    template <class T, class Executor>
    static shared_parts<T, Expert> reserve(Executor& ex, matrix_view<const T> x, arena& memory)
    {
        using real = accumulate_t<T>;
        const auto kept = detail::reserve_shared<T, Expert>(ex, x, memory);
        if (!memory.measuring())
            fastmoe::for_each(ex, x.extent(0), detail::fill<real>{kept.weights.data_handle(), real(1)});
        return kept;
    }
    template <class T, class Executor>
    static void add(Executor& ex, matrix_view<T> rows, matrix_view<T> y, const arena& memory)
    {
        if (!memory.measuring())
            fastmoe::for_each(ex, y.extent(0) * y.extent(1), detail::add_to<T>{rows.data_handle(), y.data_handle()});
    }
};

template <class Expert>
shared_expert(Expert) -> shared_expert<Expert>;

} // namespace fastmoe::inline FASTMOE_ABI
