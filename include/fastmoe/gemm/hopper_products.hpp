// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What gemm::hopper's tiles are of: rows of tokens against weights, and the gradient of weights over rows of tokens.
#pragma once

#include <fastmoe/gemm/block_products.hpp>
#include <fastmoe/gemm/hopper_store.hpp>
#include <fastmoe/gemm/hopper_tile.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::hopper {

using block::ceil_div;
using block::row_range;

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

    static FASTMOE_HOST_DEVICE constexpr banded of(int64_t t, int64_t down, int64_t across, int64_t band) noexcept
    {
        const int64_t left = t / (down * band) * band, width = across - left < band ? across - left : band;
        const int64_t inside = t - left * down;
        return {inside / width, left + inside % width};
    }
};

/// Y[s] = X[s] W[e(s)]^T + bias[e(s)], or, with W turned, dX[s] = dY[s] W[e(s)].
/// @tparam how_w  how W lies: deep if its columns, the depth, are contiguous
template <hopper_tuning how, lie how_w, class Rows, class Map, class Store>
struct row_product {
    static constexpr hopper_tuning tuning = how;
    static_assert(!how.turned || std::is_same_v<decltype(Store::end), rounded_pairs>, "pairs are of features, which lie down here");
    using element = portable::row_element_t<Rows>;
    static constexpr lie rows_lie = how.turned ? how_w : lie::deep, columns_lie = how.turned ? lie::deep : how_w;
    static constexpr bool lines = true;
    static constexpr int bring_registers = 40;
    static constexpr int box_bytes = how.turned ? how.row_bytes() : how.column_bytes();
    static constexpr int weight_rows = how.turned ? how.rows : how.columns; ///< features of a tile
    static constexpr int tokens = how.tokens();

    Map map;              ///< of W
    row_tiles rows_of;    ///< tiles of cluster * tokens rows
    Rows x;               // (S,K)
    int64_t out;          ///< N
    Store to;

    struct place {
        int64_t expert, first, count; ///< rows of Y from the tile's first on: count may be more than a tile has, or negative
        int64_t feature;              ///< the tile's first
        int steps;
    };
    struct operands {
        deep_lines<tokens, element> of_x;
        boxes<how_w, weight_rows, how.cluster, Map> of_w;

        template <class Block>
        FASTMOE_HOST_DEVICE void bring_lines(Block& block, std::byte* to, int64_t first) const
        {
            of_x.bring(block, how.turned ? to + how.row_bytes() : to, first);
        }
        template <class Block>
        FASTMOE_HOST_DEVICE void bring_boxes(Block& block, std::byte* to, barrier_word* full, int first) const
        {
            of_w.bring(block, how.turned ? to : to + how.row_bytes(), full, first);
        }
    };
    FASTMOE_HOST_DEVICE int64_t tiles() const noexcept { return rows_of.count() * ceil_div(out, weight_rows); }
    FASTMOE_HOST_DEVICE place tile(int64_t t, int rank) const noexcept
    {
        const banded at = banded::of(t, rows_of.count(), ceil_div(out, weight_rows), how.band);
        const auto [e, number] = rows_of.find(at.row);
        const row_range group = row_range::of(rows_of.groups, e);
        const int64_t above = (number * how.cluster + rank) * tokens;
        return {e, group.first + above, group.count - above, at.column * weight_rows, static_cast<int>(ceil_div(x.extent(1), depth))};
    }
    template <class Block, class Brings>
    FASTMOE_HOST_DEVICE void bring(Block& block, const place& p, const Brings& brings) const
    {
        brings(operands{deep_lines<tokens, element>(block.thread(), x.data.data_handle(), x.extent(1),
                                                    [&](int r) { return r < p.count ? x.row(p.first + r) : nullptr; }),
                        {&map, static_cast<int>(p.feature), static_cast<int>(p.expert)}});
    }
    template <class Block>
    FASTMOE_HOST_DEVICE void store(Block& block, const place& p, int first_row, const sums<how>& c) const
    {
        const auto is_zero = [&](int64_t s) { return !x.row(s); };
        if constexpr (how.turned) store_turned(block, to, p, first_row, out, is_zero, c);
        else store_rows(block, to, p, first_row, out, is_zero, c);
    }
};

/// dW[e] (+)= dY_e^T X_e, or its transpose where dW lies so.
template <hopper_tuning how, class DownRows, class AcrossRows, class G>
struct gradient_product {
    static constexpr hopper_tuning tuning = how;
    static_assert(how.cluster == 1 && !how.turned && how.columns != 192,
                  "gradients are brought in lines: a hopper_tuning with cluster = 1 and 64, 128 or 256 columns");
    using element = portable::row_element_t<DownRows>;
    static constexpr lie rows_lie = lie::wide, columns_lie = lie::wide;
    static constexpr bool lines = true;
    static constexpr int bring_registers = 56;
    static constexpr int box_bytes = 0;

    row_groups groups;
    DownRows down;     // (S,M)
    AcrossRows across; // (S,N)
    weight_view<G> dw; // (E,M,N)
    write_mode mode;
    fault_recorder faults;

    struct place {
        int64_t first; ///< row of memory
        std::int32_t expert, count, row, column;
        int steps;
        bool writes;
    };
    FASTMOE_HOST_DEVICE int64_t tiles() const noexcept
    {
        return groups.experts() * ceil_div(dw.out, how.rows) * ceil_div(dw.in, how.columns);
    }
    FASTMOE_HOST_DEVICE place tile(int64_t t, int) const noexcept
    {
        const int64_t high = ceil_div(dw.out, how.rows), wide = ceil_div(dw.in, how.columns);
        const int64_t e = t / (high * wide);
        const banded at = banded::of(t % (high * wide), high, wide, how.band);
        const bool inside = is_group_inside(groups.counts, groups.offsets, e, groups.slots);
        const int64_t count = inside ? groups.counts(e) : 0;
        const auto narrow = [](int64_t n) { return static_cast<std::int32_t>(n); };
        return {inside ? groups.offsets(e) : 0, narrow(e), narrow(count), narrow(at.row * how.rows), narrow(at.column * how.columns),
                narrow(ceil_div(count, depth)), inside && (count > 0 || mode == write_mode::overwrite)};
    }
    struct operands : paired_lines<how.rows, how.columns, DownRows, AcrossRows> {
        template <class Block>
        FASTMOE_HOST_DEVICE void bring_lines(Block& block, std::byte* to, int64_t first)
        {
            this->bring(block, to, first);
        }
    };
    template <class Block, class Brings>
    FASTMOE_HOST_DEVICE void bring(Block& block, const place& p, const Brings& brings) const
    {
        operands both{{down, across, p.first, p.count, p.row, p.column}};
        both.start(block);
        brings(both);
    }
    template <class Block>
    FASTMOE_HOST_DEVICE void store(Block& block, const place& p, int first_row, const sums<how>& c) const
    {
        if (p.writes) return store_gradient(block, dw, mode, p.expert, p.row + first_row, p.column, c);
        if (block.thread() % warpgroup_threads == 0 && first_row == 0 && !is_group_inside(groups.counts, groups.offsets, p.expert, groups.slots))
            faults.record(fault_kind::group_out_of_range, p.expert, groups.counts(p.expert));
    }
};

} // namespace fastmoe::inline FASTMOE_ABI::detail::hopper
