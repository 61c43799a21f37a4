// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// An expert that every token passes, beside the routed ones: its output is added to y, its input gradient to dx.
#pragma once

#include <fastmoe/layer/moe_passes.hpp>

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
    if (!memory.measuring()) for_each(ex, tokens, count_up{kept.numbers.data_handle()});
    return kept;
}

} // namespace detail

/// Any expert as a shared one. It has no gate (gated_shared_expert has one): call it after (or before) the routed layer on
/// the same y.
///
///     layer.forward(ex, x, w.routed, y, memory);
///     auto kept = shared.forward(ex, x, w.shared, y, memory);      // y += shared(x)
template <states_weighing Expert>
struct shared_expert {
    Expert expert;

    template <class T>
    using weights = typename Expert::template weights<T>;

    /// y += expert(x).
    /// @param x        tokens            // (T,D)
    /// @param y        added to          // (T,D)
    /// @param scratch  taken and given back; on a measuring arena only counted
    template <executor Executor, class T>
    void infer(Executor& ex, type_identity_t<matrix_view<const T>> x, const type_identity_t<weights<const T>>& w,
               matrix_view<T> y, arena& scratch) const
    {
        const int64_t mark = scratch.used();
        const auto kept = reserve<T>(ex, x, scratch);
        const auto rows = scratch.matrix<T>(x.extent(0), x.extent(1));
        expert.infer(ex, kept.in, w, rows, scratch);
        add<T>(ex, rows, y, scratch);
        scratch.rewind(mark);
    }

    /// The same; the result holds views into `memory`, what lies behind it is given back.
    template <executor Executor, class T>
    shared_parts<T, Expert> forward(Executor& ex, type_identity_t<matrix_view<const T>> x,
                                    const type_identity_t<weights<const T>>& w, matrix_view<T> y, arena& memory) const
    {
        auto kept = reserve<T>(ex, x, memory);
        kept.expert = expert.template reserve_saved<T>(memory, x.extent(0));
        const int64_t mark = memory.used();
        const auto rows = memory.matrix<T>(x.extent(0), x.extent(1));
        expert.forward(ex, kept.in, w, kept.expert, rows, memory);
        add<T>(ex, rows, y, memory);
        memory.rewind(mark);
        return kept;
    }

    /// @param dy         gradient of y               // (T,D)
    /// @param dx         added to                    // (T,D)
    /// @param gradients  overwritten or added to
    template <executor Executor, class T, class Gradients>
    void backward(Executor& ex, const shared_parts<T, Expert>& kept, type_identity_t<matrix_view<const T>> dy,
                  const type_identity_t<weights<const T>>& w, type_identity_t<matrix_view<T>> dx,
                  const Gradients& gradients, write_mode mode, arena& scratch) const
    {
        const int64_t mark = scratch.used();
        const int64_t tokens = dy.extent(0);
        const indexed_rows<T> dy_rows{dy, kept.numbers};
        const auto pending = expert.template reserve_pending<T>(scratch, tokens);
        const auto dweights = scratch.vector<accumulate_t<T>>(tokens);
        const auto drows = scratch.matrix<T>(tokens, dy.extent(1));
        expert.backward(ex, kept.in, w, kept.expert, dy_rows, pending, drows, dweights, scratch);
        add<T>(ex, drows, dx, scratch);
        expert.weight_gradients(ex, kept.in, kept.expert, dy_rows, pending, gradients, mode, scratch);
        scratch.rewind(mark);
    }

private:
    template <class T, class Executor>
    static shared_parts<T, Expert> reserve(Executor& ex, matrix_view<const T> x, arena& memory)
    {
        using real = accumulate_t<T>;
        const auto kept = detail::reserve_shared<T, Expert>(ex, x, memory);
        if (!memory.measuring())
            for_each(ex, x.extent(0), detail::fill<real>{kept.weights.data_handle(), real(1)});
        return kept;
    }
    template <class T, class Executor>
    static void add(Executor& ex, matrix_view<T> rows, matrix_view<T> y, const arena& scratch)
    {
        if (scratch.measuring()) return;
        expects_shape(y, "y (T,D)", rows.extent(0), rows.extent(1));
        for_each(ex, y.extent(0) * y.extent(1), detail::add_to<T>{rows.data_handle(), y.data_handle()});
    }
};

template <class Expert>
shared_expert(Expert) -> shared_expert<Expert>;

} // namespace fastmoe::inline FASTMOE_ABI
