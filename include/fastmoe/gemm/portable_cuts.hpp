// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the products of the portable GEMM share on the host: block sizes, cuts of rows into blocks, prefetching.
#pragma once

#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/gemm/grouped_gemm.hpp>
#include <fastmoe/gemm/portable_dot.hpp>
#include <fastmoe/gemm/portable_plain.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::portable {

/// Block sizes, chosen for caches of 32 KiB and 1 MiB a core.
struct host_blocks {
    int64_t rows = 128;          ///< rows of X in a task
    int64_t few_rows = 8;        ///< up to here a product is bound by reading W
    int64_t columns = 48;        ///< columns of Y between two transposed stores: 8 tiles, 3 vectors
    int64_t wide_columns = 256;  ///< columns of Y whose part of W is packed at a time
    int64_t depth = 1024;        ///< reduction steps a tile runs over where W is read in place
    int64_t packed_depth = 256;  ///< reduction steps for which both sides are packed at a time
    int64_t shallow_depth = 96;  ///< the same for few rows, whose packed weights then stay close
    int64_t shallow_rows = 32;   ///< how many those are at most
    int64_t gradient_rows = 384; ///< rows of dW in a task
    int64_t gradient_columns = 512; ///< columns of dW in a task
    int64_t gradient_tasks = 24; ///< fewer than this are cut finer
    int64_t streamed_bytes = 16 << 20; ///< weight gradients from this size on leave the caches to others
    int64_t tasks = 64;          ///< fewer blocks of rows than this are cut along the columns as well
    int64_t least_columns = 192; ///< but no narrower than this
};
inline constexpr host_blocks blocks_of_host{};

/// Whether operands may meet in pairs, in the bfloat16 dot product: nothing else is ever compiled for pairs.
template <class A, class B>
inline constexpr bool meet_in_pairs = FASTMOE_X86_DISPATCH && std::is_same_v<A, bfloat16> && std::is_same_v<B, bfloat16>;

/// An epilogue of the rows of one expert, as a row functor that keeps the epilogue's mark for vectorization.
template <class Epilogue>
struct expert_rows {
    int64_t expert;
    const Epilogue& epilogue;

    template <class Team>
    void operator()(Team& team, int64_t row) const
    {
        epilogue(team, expert, row);
    }
};
template <vectorized_functor Epilogue>
struct expert_rows<Epilogue> {
    using vectorized = void;
    int64_t expert;
    const Epilogue& epilogue;

    template <class Team>
    void operator()(Team& team, int64_t row) const
    {
        epilogue(team, expert, row);
    }
};

/// Rows [first, first + count) of one expert.
struct row_block {
    int64_t expert, first, count;
};

/// Cuts each expert's rows into even blocks.
struct row_cut {
    row_groups groups;
    vector_view<int64_t> before; // (E+1) blocks of the experts before e

    /// @throws invalid_argument if a group does not lie inside of the rows
    void count() const
    {
        expects_groups_inside(groups.counts, groups.offsets, groups.slots);
        before(0) = 0;
        for (int64_t e = 0; e < groups.experts(); ++e)
            before(e + 1) = before(e) + ceil_div(groups.counts(e), blocks_of_host.rows);
    }
    int64_t blocks() const noexcept { return before(groups.experts()); }

    row_block operator()(int64_t block) const noexcept
    {
        int64_t low = 0, high = groups.experts(); // before(low) <= block < before(high)
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (before(middle) <= block ? low : high) = middle;
        }
        const int64_t count = groups.counts(low), parts = before(low + 1) - before(low);
        const int64_t size = round_up(ceil_div(count, parts), 16), at = (block - before(low)) * size;
        return {low, groups.offsets(low) + at, least(size, count - at)};
    }
};

/// Runs a tile over `rows` rows (up to tile_rows) of scalars that lie `step` elements apart; the totals of further rows
/// become sums that nobody reads. Elements are units, or halves of pairs: rows of an odd length are half a unit apart.
template <class Unit, class Element>
void run_tile(instruction_set level, tile<Unit> t, const Element* scalars, int64_t step, int64_t rows)
{
    for (int64_t j = 0; j < tile_rows; ++j) t.row[j] = reinterpret_cast<const Unit*>(scalars + least(j, rows - 1) * step);
    best_tile<Unit>(level, t.vectors)(t);
}

/// A block of memory that tiles ask for in parts while they compute: each part is a column of lines, two a row of the
/// block, as long as the tile is deep.
struct prefetch_plan {
    const char* first = nullptr;
    int64_t row_step, second; ///< bytes from a row to the next, from the first line of a row to the second
    int64_t rows, columns;    ///< columns of two lines
    int64_t column_step;      ///< bytes
    int64_t tiles;            ///< over which the parts are spread

    prefetch_lines part(int64_t tile, int64_t depth) const
    {
        if (!first || depth < 1) return {};
        const int64_t parts = ceil_div(rows, depth), all = parts * columns, mine = tile * all / tiles;
        if (mine == (tile + 1) * all / tiles) return {};
        return {first + mine / parts * column_step + mine % parts * depth * row_step, row_step, second};
    }
};

} // namespace fastmoe::inline FASTMOE_ABI::detail::portable
