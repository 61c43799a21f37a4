// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Sums over all tokens that have the same bits for any number of threads: what the losses of a gate are made of. Blocks
/// of tokens are summed on their own, then the blocks in order and in double.
#pragma once

#include <fastmoe/exec/executor.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// Blocks of tokens whose sums are taken on their own: cut by the shape alone.
struct token_blocks {
    int64_t size, count;

    static constexpr token_blocks of(int64_t tokens) noexcept
    {
        const int64_t size = tokens / 512 > 64 ? (tokens + 511) / 512 : 64;
        return {size, (tokens + size - 1) / size};
    }
};

/// Adds the blocks' partial sums, in order and in double.
template <class Real>
struct block_totals {
    using vectorized = void;
    const Real* partial; // (blocks,N)
    double* totals;      // (N)
    int64_t blocks, width; ///< width is N; one row of work for every 64 of it

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t part) const
    {
        const int64_t begin = part * 64, n = width - begin < 64 ? width - begin : 64;
        const Real* from = partial + begin;
        double* to = totals + begin;
        const int64_t stride = width;
        team.for_each(n, [=](int64_t i) { to[i] = 0; });
        for (int64_t b = 0; b < blocks; ++b, from += stride)
            team.for_each(n, [=](int64_t i) { to[i] += static_cast<double>(from[i]); });
    }
};

/// totals = the blocks' partial sums.
/// @param partial  (blocks,N)
/// @param totals   overwritten                                                                   // (N)
template <executor Executor, class Real>
void sum_blocks(Executor& ex, matrix_view<Real> partial, vector_view<double> totals)
{
    const int64_t blocks = partial.extent(0), width = partial.extent(1);
    for_each_row(ex, (width + 63) / 64, block_totals<Real>{partial.data_handle(), totals.data_handle(), blocks, width},
                 {.width = 64 * blocks});
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
