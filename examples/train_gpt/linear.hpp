// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Dense products: the library's grouped GEMM with one group.
#pragma once

#include <fastmoe/gemm/grouped_gemm.hpp>

#include "train_gpt/team_math.hpp"

namespace train_gpt {

namespace detail {

struct fill_one_group {
    int32_t* counts;  // (1)
    int64_t* offsets; // (2)
    int64_t rows;

    FASTMOE_HOST_DEVICE void operator()(int64_t) const
    {
        counts[0] = static_cast<int32_t>(rows);
        offsets[0] = 0;
        offsets[1] = rows;
    }
};

} // namespace detail

/// One group that holds all rows; counts and offsets are in the executor's memory.
template <class Executor>
fm::row_groups one_group(Executor& ex, int64_t rows, fm::arena& memory)
{
    const auto counts = memory.vector<int32_t>(1);
    const auto offsets = memory.vector<int64_t>(2);
    if (!memory.measuring())
        fm::for_each(ex, 1, detail::fill_one_group{counts.data_handle(), offsets.data_handle(), rows});
    return {counts, offsets, rows};
}

/// y = x w^T.     @param x (T,in)    @param w (out,in)    @param y  overwritten  // (T,out)
template <class T, class Y, class Executor, class Gemm>
void linear(Executor& ex, const Gemm& gemm, const fm::row_groups& all, matrix_view<const T> x, matrix_view<const T> w,
            matrix_view<Y> y, fm::arena& scratch)
{
    gemm.forward(ex, all, fm::plain_rows<T>{x}, fm::single(w), matrix_view<const T>{}, y, fm::no_epilogue{}, scratch);
}

/// dx = dy w and dw = dy^T x.     @param dx  overwritten  // (T,in)    @param dw  overwritten  // (out,in)
template <class T, class G, class Executor, class Gemm>
void linear_backward(Executor& ex, const Gemm& gemm, const fm::row_groups& all, matrix_view<const T> x,
                     matrix_view<const T> w, matrix_view<const T> dy, matrix_view<T> dx, matrix_view<G> dw,
                     fm::arena& scratch)
{
    gemm.dgrad(ex, all, fm::plain_rows<T>{dy}, fm::single(w), dx, fm::no_epilogue{}, scratch);
    gemm.wgrad(ex, all, fm::plain_rows<T>{dy}, fm::plain_rows<T>{x}, fm::single(dw), fm::write_mode::overwrite,
               scratch);
}

} // namespace train_gpt
