// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What stands around the products of gemm::cublaslt and gemm::cublaslt_grouped: rows in order before, a bias that they are
/// added to, an epilogue after. Part of cublaslt.cuh.
#pragma once

#include <fastmoe/cuda/cuda_executor.cuh>
#include <fastmoe/gemm/portable.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI {

/// Whether cuBLAS multiplies X and W into Y: double, float, bfloat16 and half, of the last two into float as well.
template <class Executor, class X, class W, class Y>
inline constexpr bool lt_multiplies = std::is_same_v<Executor, cuda_executor> && std::is_same_v<X, std::remove_const_t<W>> &&
                                      (std::is_same_v<Y, X> || (std::is_same_v<Y, float> && sizeof(X) == 2));

/// Which part of which row task i is, of rows that are done a few columns a thread; the row's expert is -1 in padding.
struct row_part {
    static constexpr int64_t columns = 8;
    int64_t expert, row, first, last;

    static int64_t tasks(int64_t rows, int64_t width) noexcept { return rows * ((width + columns - 1) / columns); }
    FASTMOE_HOST_DEVICE static row_part of(const row_groups& groups, int64_t width, int64_t i) noexcept
    {
        const int64_t parts = (width + columns - 1) / columns, row = i / parts, first = i % parts * columns;
        return {portable::expert_of_row(groups, row), row, first, first + columns < width ? first + columns : width};
    }
};

/// to[s] = from[s] for the rows of groups: an index in padding may be anything.
template <class T>
struct gather_group_rows {
    row_groups groups;
    indexed_rows<T> from; // (N,D) by (S)
    matrix_view<T> to;    // (S,D)

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        const row_part p = row_part::of(groups, to.extent(1), i);
        if (p.expert < 0) return;
        const T* const source = from.row(p.row);
        for (int64_t j = p.first; j < p.last; ++j) to(p.row, j) = source ? source[j] : T(0.0f);
    }
};

/// Y[s] = bias[e(s)] for the rows of groups. A product that is added to it rounds once, as if the bias were one of its terms.
template <class Y>
struct lay_bias {
    row_groups groups;
    matrix_view<const Y> bias; // (E,N)
    matrix_view<Y> y;          // (S,N)

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        const row_part p = row_part::of(groups, y.extent(1), i);
        for (int64_t j = p.first; p.expert >= 0 && j < p.last; ++j) y(p.row, j) = bias(p.expert, j);
    }
};

/// The rows in order, copied if they are not.                                                    // (S,D)
template <class T>
matrix_view<const T> rows_in_order(cuda_executor&, const row_groups&, const plain_rows<T>& rows, arena&)
{
    return rows.data;
}
template <class T>
matrix_view<const T> rows_in_order(cuda_executor& ex, const row_groups& groups, const indexed_rows<T>& rows, arena& memory)
{
    const auto out = memory.matrix<T>(rows.extent(0), rows.extent(1));
    if (!memory.measuring())
        fastmoe::for_each(ex, row_part::tasks(out.extent(0), out.extent(1)), gather_group_rows<T>{groups, rows, out});
    return out;
}

template <class Y>
void begin_with_bias(cuda_executor& ex, const row_groups& groups, matrix_view<const Y> bias, matrix_view<Y> y)
{
    fastmoe::for_each(ex, row_part::tasks(groups.slots, y.extent(1)), lay_bias<Y>{groups, bias, y});
}

/// Whether every row begins at a multiple of 16 bytes, as cuBLASLt's kernels take for granted of a bias. No preference tells them.
template <class T>
bool are_lines(matrix_view<T> m) noexcept
{
    return reinterpret_cast<std::uintptr_t>(m.data_handle()) % 16 == 0 && m.extent(1) * static_cast<int64_t>(sizeof(T)) % 16 == 0;
}

template <class Epilogue>
void end_rows(cuda_executor& ex, const row_groups& groups, const Epilogue& epilogue, int64_t width)
{
    if constexpr (!std::is_same_v<Epilogue, no_epilogue>)
        fastmoe::for_each_row(ex, groups.slots, portable::end_row<Epilogue>{groups, epilogue}, {.width = width});
}

} // namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI
