// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How rows of experts are cut into tiles on the device: how many there are before each expert, where a tile is, and in which
/// order tiles run.
#pragma once

#include <fastmoe/gemm/grouped_gemm.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::tiles {

FASTMOE_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) noexcept { return (a + b - 1) / b; }

/// The rows of a group that lie inside of all rows: none of a group that a fault has put elsewhere.
struct row_range {
    int64_t first, count;

    static FASTMOE_HOST_DEVICE constexpr row_range of(const row_groups& g, int64_t e) noexcept
    {
        const int64_t first = g.offsets(e), count = g.counts(e);
        if (count <= 0 || first >= g.slots || first <= -count) return {0, 0};
        const int64_t begin = first > 0 ? first : 0, end = first + count < g.slots ? first + count : g.slots;
        return {begin, end - begin};
    }
};

/// One team counts the tiles of rows before each expert.
struct count_row_tiles {
    row_groups groups;
    vector_view<int64_t> before; // (E+1)
    int64_t rows;                ///< of a tile

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const auto& self = *this;
        const int64_t all = team.scan(
            groups.experts(), int64_t{0}, [](int64_t a, int64_t b) { return a + b; },
            [&self](int64_t e) { return ceil_div(row_range::of(self.groups, e).count, self.rows); },
            [&self](int64_t e, int64_t tiles) { self.before(e) = tiles; });
        if (team.lane() == 0) before(groups.experts()) = all;
    }
};

/// The same by one warp of a block, into memory of the block. Few enough tiles that 32 bits count them.
template <class Block>
FASTMOE_HOST_DEVICE void count_in_warp(Block& block, const row_groups& groups, int64_t rows, int64_t* before)
{
    constexpr int lanes = 32;
    const int lane = block.thread() % lanes;
    const int64_t experts = groups.experts(), each = ceil_div(experts, lanes);
    const int64_t first = lane * each < experts ? lane * each : experts, last = first + each < experts ? first + each : experts;
    const auto tiles = [&](int64_t e) { return ceil_div(row_range::of(groups, e).count, rows); };
    std::uint32_t sum = 0; // of this lane and those below it
    for (int64_t e = first; e < last; ++e) sum += static_cast<std::uint32_t>(tiles(e));
    const std::uint32_t own = sum;
    for (int distance = 1; distance < lanes; distance *= 2) {
        const std::uint32_t below = block.broadcast(sum, lane >= distance ? lane - distance : lane);
        if (lane >= distance) sum += below;
    }
    int64_t total = sum - own;
    for (int64_t e = first; e < last; ++e) {
        before[e] = total;
        total += tiles(e);
    }
    if (lane == lanes - 1) before[experts] = sum;
}

/// Tiles of rows before each expert, and where a tile of all of them is.
struct row_tiles {
    row_groups groups;
    vector_view<const int64_t> before; // (E+1)

    struct place {
        int64_t expert, number; ///< of the tile in that expert
    };
    FASTMOE_HOST_DEVICE int64_t count() const noexcept { return before(groups.experts()); }
    FASTMOE_HOST_DEVICE place find(int64_t tile) const noexcept
    {
        int64_t e = 0, high = groups.experts(); // before(e) <= tile < before(high)
        while (high - e > 1) {
            const int64_t middle = (e + high) / 2;
            (before(middle) <= tile ? e : high) = middle;
        }
        return {e, tile - before(e)};
    }
};

/// Tile t of `down` rows of tiles and `across` columns of them, in bands of columns: what runs at one time shares operands.
struct banded {
    int64_t row, column;

    /// @tparam Int  holds down * across; divisions by 64 bits take a GPU long
    template <class Int>
    static FASTMOE_HOST_DEVICE constexpr banded of(Int t, Int down, Int across, Int band) noexcept
    {
        const Int left = t / (down * band) * band, width = across - left < band ? across - left : band;
        const Int inside = t - left * down;
        return {inside / width, left + inside % width};
    }
};

} // namespace fastmoe::inline FASTMOE_ABI::detail::tiles
