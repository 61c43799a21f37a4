// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The expert of examples/compose.cu, as a user writes one: y = max(x W1^T, 0)^2 W2^T (squared ReLU, So et al. 2021), made of
/// the library's grouped products with the activation and its derivative as epilogues. It fits into a moe_layer as well.
#pragma once

#include <fastmoe/exec/scratch.hpp>
#include <fastmoe/expert/expert.hpp>
#include <fastmoe/gemm/portable.hpp>

namespace compose {

namespace fm = fastmoe;
using fm::int64_t;

/// After the product with W1: a = max(pre, 0)^2.
template <class T>
struct square_row {
    fm::matrix_view<const T> pre; // (S,H)
    fm::matrix_view<T> a;         // (S,H)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t /*expert*/, int64_t s) const
    {
        const T* from = pre.data_handle() + s * pre.extent(1);
        T* to = a.data_handle() + s * a.extent(1);
        team.for_each(pre.extent(1), [=](int64_t h) {
            using real = fm::accumulate_t<T>;
            const real v = real(from[h]) > real(0) ? real(from[h]) : real(0);
            to[h] = T(v * v);
        });
    }
};

/// After dy W2: that times 2 max(pre, 0), which is the gradient of pre.
template <class T>
struct square_row_backward {
    fm::matrix_view<const T> pre; // (S,H)
    fm::matrix_view<T> d;         // (S,H)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t /*expert*/, int64_t s) const
    {
        const T* from = pre.data_handle() + s * pre.extent(1);
        T* to = d.data_handle() + s * d.extent(1);
        team.for_each(pre.extent(1), [=](int64_t h) {
            using real = fm::accumulate_t<T>;
            const real v = real(from[h]) > real(0) ? real(from[h]) : real(0);
            to[h] = T(real(2) * v * real(to[h]));
        });
    }
};

template <class T>
struct squared_relu_weights {
    fm::weight_view<T> up;   // (E,H,D)
    fm::weight_view<T> down; // (E,D,H)

    template <std::same_as<const T> U>
    operator squared_relu_weights<U>() const noexcept
    {
        return {up, down};
    }
};
template <class T>
struct squared_relu_saved {
    fm::matrix_view<T> pre, a; // (S,H)
};
template <class T>
struct squared_relu_pending {
    fm::matrix_view<T> dpre; // (S,H)
};

struct squared_relu_expert {
    int64_t width = 0;  ///< D
    int64_t hidden = 0; ///< H
    fm::gemm::portable gemm = {};

    static constexpr bool applies_weights = false; // combine does
    static constexpr bool weighs_output() { return true; }
    template <class T>
    using weights = squared_relu_weights<T>;

    template <class T>
    weights<T> reserve_weights(fm::arena& memory, int64_t experts) const
    {
        T* up = memory.matrix<T>(experts * hidden, width).data_handle();
        T* down = memory.matrix<T>(experts * width, hidden).data_handle();
        return {fm::stacked(fm::tensor_view<T, 3>(up, experts, hidden, width)),
                fm::stacked(fm::tensor_view<T, 3>(down, experts, width, hidden))};
    }
    template <class T>
    squared_relu_saved<T> reserve_saved(fm::arena& memory, int64_t slots) const
    {
        return {memory.matrix<T>(slots, hidden), memory.matrix<T>(slots, hidden)};
    }
    template <class T>
    squared_relu_pending<T> reserve_pending(fm::arena& memory, int64_t slots) const
    {
        return {memory.matrix<T>(slots, hidden)};
    }

    template <class Executor, class T>
    void forward(Executor& ex, const fm::expert_input<T>& in, const weights<const T>& w, const squared_relu_saved<T>& saved,
                 fm::matrix_view<T> y, fm::arena& scratch) const
    {
        const fm::matrix_view<const T> no_bias;
        gemm.forward(ex, in.groups, in.x, w.up, no_bias, saved.pre, square_row<T>{saved.pre, saved.a}, scratch);
        gemm.forward(ex, in.groups, fm::plain_rows<T>{saved.a}, w.down, no_bias, y, fm::no_epilogue{}, scratch);
    }
    template <class Executor, class T>
    void infer(Executor& ex, const fm::expert_input<T>& in, const weights<const T>& w, fm::matrix_view<T> y,
               fm::arena& scratch) const
    {
        const fm::arena::scope lent(scratch);
        forward(ex, in, w, reserve_saved<T>(scratch, in.groups.slots), y, scratch);
    }
    /// @param dy  gradients of the expert's own rows: plain_rows or indexed_rows              // (S,D)
    template <class Executor, class T, class Rows>
    void backward(Executor& ex, const fm::expert_input<T>& in, const weights<const T>& w, const squared_relu_saved<T>& saved,
                  const Rows& dy, const squared_relu_pending<T>& pending, fm::matrix_view<T> dx,
                  fm::vector_view<fm::accumulate_t<T>>, fm::arena& scratch) const
    {
        gemm.dgrad(ex, in.groups, dy, w.down, pending.dpre, square_row_backward<T>{saved.pre, pending.dpre}, scratch);
        gemm.dgrad(ex, in.groups, fm::plain_rows<T>{pending.dpre}, w.up, dx, fm::no_epilogue{}, scratch);
    }
    template <class Executor, class T, class Rows, class G>
    void weight_gradients(Executor& ex, const fm::expert_input<T>& in, const squared_relu_saved<T>& saved, const Rows& dy,
                          const squared_relu_pending<T>& pending, const weights<G>& gradients, fm::write_mode mode,
                          fm::arena& scratch) const
    {
        gemm.wgrad(ex, in.groups, dy, fm::plain_rows<T>{saved.a}, gradients.down, mode, scratch);
        gemm.wgrad(ex, in.groups, fm::plain_rows<T>{pending.dpre}, in.x, gradients.up, mode, scratch);
    }
};

} // namespace compose
