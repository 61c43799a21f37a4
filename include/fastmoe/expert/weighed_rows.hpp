// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Makes an expert that knows nothing of routing weights one that yields their gradient: what a layer asks of every expert,
/// and what lets experts of both kinds stand behind one gate.
///
///     rows = expert(x),  y = sum of w rows        dw = <dy, rows>,  the expert's own dy is w dy
#pragma once

#include <fastmoe/expert/expert.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// What the expert keeps, and its outputs.
template <class T, class Saved>
struct weighed_saved {
    Saved expert;
    matrix_view<T> rows; // (S,D)  empty where combine() does not apply the weights
};

/// What the expert leaves for its weight gradients, and the gradient that it was given.
template <class T, class Pending>
struct weighed_pending {
    Pending expert;
    matrix_view<T> rows;          // (S,D)  w dy
    vector_view<int32_t> numbers; // (S)    0, 1, 2, ...
};

/// rows = w dy, and dw = <dy, outputs>, for the slots of some experts; zeros for padding.
template <class T>
struct weigh_gradient {
    using vectorized = void;
    using real = accumulate_t<T>;
    expert_input<T> in;            // of these experts
    indexed_rows<T> dy;            // (S,D)  by token
    matrix_view<const T> outputs;  // (S,D)  empty: weights are not applied
    matrix_view<T> rows;           // (S,D)
    vector_view<int32_t> numbers;  // (S)
    vector_view<real> dweights;    // (C)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t s) const
    {
        const int64_t c = in.choice_of(s), n = rows.extent(1);
        const T* from = dy.row(s);
        T* to = rows.data_handle() + s * n;
        if (team.lane() == 0) numbers(s) = static_cast<int32_t>(s);
        if (c < 0 || !from) {
            team.for_each(n, [=](int64_t j) { to[j] = T(real(0)); });
            return;
        }
        if (s < in.groups.offsets(0) || s >= in.groups.offsets(in.groups.experts())) return; // another type's
        if (outputs.extent(0) == 0) {
            team.for_each(n, [=](int64_t j) { to[j] = from[j]; });
            return;
        }
        const T* out = outputs.data_handle() + s * n;
        const real w = in.weights(c);
        const real product = team.reduce(
            n, real(0), [](real a, real b) { return a + b; },
            [=](int64_t j) {
                const real d = real(from[j]);
                to[j] = T(w * d);
                return d * real(out[j]);
            });
        if (team.lane() == 0) dweights(c) = product;
    }
};

/// Copies the rows of some experts.
template <class T>
struct copy_group_rows {
    using vectorized = void;
    row_groups groups;
    matrix_view<const T> from; // (S,D)
    matrix_view<T> to;         // (S,D)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t s) const
    {
        if (s < groups.offsets(0) || s >= groups.offsets(groups.experts())) return;
        const int64_t n = to.extent(1);
        const T* source = from.data_handle() + s * n;
        T* target = to.data_handle() + s * n;
        team.for_each(n, [=](int64_t j) { target[j] = source[j]; });
    }
};

/// Stands for an expert that does not apply the routing weights, and does. Refers to it.
template <class Expert>
struct weighed_rows {
    const Expert& expert;
    int64_t width; ///< D

    static constexpr bool applies_weights = true;
    template <class T>
    using weights = typename Expert::template weights<T>;

    bool weighs_output() const { return expert.weighs_output(); }

    template <class T>
    auto reserve_saved(arena& memory, int64_t slots) const
    {
        auto own = expert.template reserve_saved<T>(memory, slots);
        return weighed_saved<T, decltype(own)>{own, weighs_output() ? memory.matrix<T>(slots, width) : matrix_view<T>{}};
    }
    template <class T>
    auto reserve_pending(arena& memory, int64_t slots) const
    {
        auto own = expert.template reserve_pending<T>(memory, slots);
        const auto rows = memory.matrix<T>(slots, width);
        return weighed_pending<T, decltype(own)>{own, rows, memory.vector<int32_t>(slots)};
    }

    /// @param y  may be saved.rows, which spares a copy
    template <class Executor, class T, class Saved>
    void forward(Executor& ex, const expert_input<T>& in, const weights<const T>& w, const Saved& saved, matrix_view<T> y,
                 arena& scratch) const
    {
        expert.forward(ex, in, w, saved.expert, y, scratch);
        if (scratch.measuring() || saved.rows.extent(0) == 0 || saved.rows.data_handle() == y.data_handle()) return;
        fastmoe::for_each_row(ex, y.extent(0), copy_group_rows<T>{in.groups, y, saved.rows}, {.width = width});
    }
    template <class Executor, class T>
    void infer(Executor& ex, const expert_input<T>& in, const weights<const T>& w, matrix_view<T> y, arena& scratch) const
    {
        expert.infer(ex, in, w, y, scratch);
    }
    template <class Executor, class T, class Saved, class Pending>
    void backward(Executor& ex, const expert_input<T>& in, const weights<const T>& w, const Saved& saved,
                  const indexed_rows<T>& dy, const Pending& pending, matrix_view<T> dx,
                  vector_view<accumulate_t<T>> dweights, arena& scratch) const
    {
        if (!scratch.measuring())
            fastmoe::for_each_row(ex, pending.rows.extent(0),
                                  weigh_gradient<T>{in, dy, saved.rows, pending.rows, pending.numbers, dweights},
                                  {.width = width});
        expert.backward(ex, in, w, saved.expert, own_dy<T>(pending), pending.expert, dx, dweights, scratch);
    }
    template <class Executor, class T, class Saved, class Pending, class Gradients>
    void weight_gradients(Executor& ex, const expert_input<T>& in, const Saved& saved, const indexed_rows<T>&,
                          const Pending& pending, const Gradients& gradients, write_mode mode, arena& scratch) const
    {
        expert.weight_gradients(ex, in, saved.expert, own_dy<T>(pending), pending.expert, gradients, mode, scratch);
    }

private:
    template <class T, class Pending>
    static indexed_rows<T> own_dy(const Pending& pending)
    {
        return {pending.rows, pending.numbers};
    }
};

/// The expert, or what stands for it where it does not apply the weights.
template <class Expert>
using applying_t = std::conditional_t<Expert::applies_weights, const Expert&, weighed_rows<Expert>>;

template <class Expert>
applying_t<Expert> applying(const Expert& expert, int64_t width)
{
    if constexpr (Expert::applies_weights) return expert;
    else return {expert, width};
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
