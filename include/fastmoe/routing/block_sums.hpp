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

/// Columns that a team adds: many where a lane is alone, which reads them side by side; one where lanes share the blocks.
template <class Executor>
inline constexpr int64_t columns_of_team = has_readable_memory<Executor> ? 64 : 1;

/// to[i] = the sum of the blocks' from[b * stride + i], for i in [0, n), in double: in order by a lane, as reduce() does by many.
template <class Team, class Real>
FASTMOE_HOST_DEVICE void total_columns(Team& team, const Real* from, int64_t blocks, int64_t stride, int64_t n, double* to)
{
    if constexpr (is_single_lane<Team>) {
        team.for_each(n, [=](int64_t i) { to[i] = 0; });
        for (int64_t b = 0; b < blocks; ++b, from += stride)
            team.for_each(n, [=](int64_t i) { to[i] += static_cast<double>(from[i]); });
    } else {
        for (int64_t i = 0; i < n; ++i) {
            const double sum = team.reduce(
                blocks, 0.0, [](double x, double y) { return x + y; }, [=](int64_t b) { return static_cast<double>(from[b * stride + i]); });
            if (team.lane() == 0) to[i] = sum;
        }
    }
}

/// Adds the blocks' partial sums.
template <class Real>
struct block_totals {
    using vectorized = void;
    const Real* partial; // (blocks,N)
    double* totals;      // (N)
    int64_t blocks, width, columns; ///< width is N; one row of work for every so many columns

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t part) const
    {
        const int64_t begin = part * columns, n = width - begin < columns ? width - begin : columns;
        total_columns(team, partial + begin, blocks, width, n, totals + begin);
    }
};

/// totals = the blocks' partial sums.
/// @param partial  (blocks,N)
/// @param totals   overwritten                                                                   // (N)
template <executor Executor, class Real>
void sum_blocks(Executor& ex, matrix_view<Real> partial, vector_view<double> totals)
{
    constexpr int64_t columns = columns_of_team<Executor>;
    const int64_t blocks = partial.extent(0), width = partial.extent(1);
    fastmoe::for_each_row(ex, (width + columns - 1) / columns,
                          block_totals<Real>{partial.data_handle(), totals.data_handle(), blocks, width, columns},
                          {.width = columns * blocks});
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
