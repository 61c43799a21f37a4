// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What gemm::hopper's tiles are of: rows of tokens against weights, and the gradient of weights over rows of tokens.
#pragma once

#include <fastmoe/gemm/hopper_store.hpp>
#include <fastmoe/gemm/hopper_tile.hpp>
#include <fastmoe/gemm/portable_plain.hpp>
#include <fastmoe/gemm/row_tiles.hpp>
#include <fastmoe/gemm/scaled.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::hopper {

using tiles::banded, tiles::ceil_div, tiles::row_range, tiles::row_tiles;

/// Rows that have codes are data with scales; all others are numbers.
template <class Rows>
inline constexpr bool has_scales = requires(const Rows& x) { x.codes; };
template <class Rows>
inline constexpr bool is_gathered = requires(const Rows& x) { x.index; } || requires(const Rows& x) { x.codes.index; };
template <class Rows>
FASTMOE_HOST_DEVICE constexpr const auto& data_of(const Rows& x) noexcept
{
    if constexpr (has_scales<Rows>) return x.codes.data;
    else return x.data;
}

struct nothing {};

/// What a thread's sums of a stage are multiplied by: scales of rows, each times the one of the tile's weights.
template <hopper_tuning how>
struct stage_scales {
    static constexpr int rows = how.turned ? how.columns / 4 : 2 * how.blocks();
    const float* of_row[rows]; // (ceil(K/128)); null: zeros
    const float* of_weights;   // (ceil(K/128))

    struct factors {
        float row[rows], weights;
    };
    /// Loads, and nothing that would wait for them.
    FASTMOE_HOST_DEVICE factors at(int stage) const
    {
        factors out;
        out.weights = of_weights[stage];
        FASTMOE_UNROLL
        for (int i = 0; i < rows; ++i) out.row[i] = of_row[i] ? of_row[i][stage] : 0.0f;
        return out;
    }
    /// @param b  which 64 rows of the warpgroup's
    FASTMOE_HOST_DEVICE void add(float (&c)[how.columns / 2], const float (&part)[how.columns / 2], const factors& by, int b) const
    {
        float factor[rows];
        FASTMOE_UNROLL
        for (int i = 0; i < rows; ++i) factor[i] = by.row[i] * by.weights;
        FASTMOE_UNROLL
        for (int i = 0; i < how.columns / 2; ++i) c[i] += part[i] * factor[how.turned ? i / 4 * 2 + i % 2 : 2 * b + i % 4 / 2];
    }
};

/// Y[s] = X[s] W[e(s)]^T + bias[e(s)], or, with W turned, dX[s] = dY[s] W[e(s)].
/// @tparam how_w    how W lies: deep if its columns, the depth, are contiguous
/// @tparam Weights  weight_view, or block_scaled_weights beside block_scaled_rows
template <hopper_tuning how, lie how_w, class Rows, class Weights, class Map, class Store>
struct row_product {
    static constexpr hopper_tuning tuning = how;
    static constexpr bool is_scaled = has_scales<Rows>;
    static_assert(!is_scaled || (how_w == lie::deep && how.fits_scaled()), "a hopper_tuning that products of scaled codes do not hold");
    using element = portable::row_element_t<Rows>;
    static constexpr lie rows_lie = how.turned ? how_w : lie::deep, columns_lie = how.turned ? lie::deep : how_w;
    static constexpr bool lines = true;
    static constexpr bool has_map = !std::is_same_v<Map, no_map>;
    static constexpr int bring_registers = has_map ? 40 : 104;
    static constexpr int weight_bytes = how.turned ? how.row_bytes() : how.column_bytes();
    /// Rows that lie in order come in boxes, too, where a tile has all of its rows.
    static constexpr bool boxes_rows = has_map && !how.turned && !is_gathered<Rows>;
    static constexpr int weight_rows = how.turned ? how.rows : how.columns; ///< features of a tile
    static constexpr int tokens = how.tokens();

    Map map;              ///< of W
    std::conditional_t<boxes_rows, Map, no_map> row_map; ///< of x: its first rows, as many as
    int64_t mapped;
    Weights w;            // (E,N,K)
    row_groups groups;
    vector_view<const int64_t> counted; // (E+1)  as row_tiles has them, of cluster * tokens rows; without memory: in each block's own
    Rows x;               // (S,K)
    int64_t out;          ///< N
    Store to;
    fault_recorder faults;

    struct place {
        int64_t first; ///< row of Y
        std::int32_t expert, count, feature; ///< count of rows, at most a tile's, 0 or less: none; feature: the tile's first
        std::int32_t steps, box_bytes;
        bool has_lines;
    };
    template <class OfWeights>
    struct operands {
        deep_lines<tokens, element> of_x;
        OfWeights of_w;
        const std::conditional_t<boxes_rows, Map, no_map>* rows;
        int first_row, boxed_bytes;
        bool has_lines;

        template <class Block>
        FASTMOE_HOST_DEVICE int box_bytes(Block&, int) const noexcept
        {
            return boxed_bytes;
        }
        template <class Block>
        FASTMOE_HOST_DEVICE void bring_lines(Block& block, std::byte* stage, int64_t first) const
        {
            if (has_lines || !boxes_rows) of_x.bring(block, how.turned ? stage + how.row_bytes() : stage, first);
            if constexpr (!has_map) of_w.bring(block, how.turned ? stage : stage + how.row_bytes(), first);
        }
        template <class Block>
        FASTMOE_HOST_DEVICE void bring_boxes(Block& block, std::byte* stage, barrier_word* full, int first) const
        {
            of_w.bring(block, how.turned ? stage : stage + how.row_bytes(), full, first);
            if constexpr (boxes_rows)
                if (!has_lines) block.copy_box(stage, *rows, full, first, first_row, 0, 0);
        }
    };
    template <class Block>
    FASTMOE_HOST_DEVICE void start(Block& block, std::byte* list) const
    {
        if (!counted.data_handle() && block.thread() / warp_threads == 1)
            tiles::count_in_warp(block, groups, tokens * how.cluster, reinterpret_cast<int64_t*>(list));
    }
    FASTMOE_HOST_DEVICE row_tiles rows_of(const std::byte* list) const noexcept
    {
        const int64_t* const own = reinterpret_cast<const int64_t*>(list);
        return {groups, vector_view<const int64_t>(counted.data_handle() ? counted.data_handle() : own, groups.experts() + 1)};
    }
    FASTMOE_HOST_DEVICE int64_t tiles(const std::byte* list) const noexcept { return rows_of(list).count() * ceil_div(out, weight_rows); }
    FASTMOE_HOST_DEVICE place tile(const std::byte* list, int64_t t, int rank) const noexcept
    {
        const row_tiles all = rows_of(list);
        const auto narrow = [](int64_t n) { return static_cast<std::uint32_t>(n); };
        const banded at = banded::of(narrow(t), narrow(all.count()), (narrow(out) + weight_rows - 1) / weight_rows, static_cast<std::uint32_t>(how.band));
        const auto [e, number] = all.find(at.row);
        const row_range group = row_range::of(groups, e);
        const int64_t above = (number * how.cluster + rank) * tokens;
        const int64_t first = group.first + above, count = group.count - above;
        const bool is_box = boxes_rows && count >= tokens && first + tokens <= mapped;
        const auto whole = [](int64_t n) { return static_cast<std::int32_t>(n); };
        return {first, whole(e), whole(count < tokens ? count : tokens), whole(at.column * weight_rows),
                (whole(x.extent(1)) + depth_of<element> - 1) / depth_of<element>,
                (has_map ? weight_bytes : 0) + (is_box ? how.row_bytes() : 0), !is_box};
    }
    template <class Block, class Brings>
    FASTMOE_HOST_DEVICE void bring(Block& block, const place& p, const Brings& brings) const
    {
        const deep_lines<tokens, element> of_x(block.thread(), data_of(x).data_handle(), x.extent(1),
                                               [&](int r) { return p.has_lines && r < p.count ? x.row(p.first + r) : nullptr; });
        if constexpr (has_map) {
            using of_w = boxes<how_w, weight_rows, how.cluster, Map>;
            brings(operands<of_w>{of_x, {&map, static_cast<int>(p.feature), static_cast<int>(p.expert)}, &row_map, static_cast<int>(p.first), p.box_bytes, p.has_lines});
        } else {
            using of_w = matrix_lines<how_w, weight_rows, element>;
            const auto& m = matrices_of(w);
            const element* base = m.base(p.expert);
            const auto beyond = static_cast<int32_t>(reinterpret_cast<std::uintptr_t>(base) % chunk_bytes);
            const bool is_whole = beyond == 0; // the host has not seen it
            if (!is_whole && block.thread() == 0) faults.record(fault_kind::matrix_misaligned, p.expert, beyond);
            if (!is_whole) base = data_of(x).data_handle();
            brings(operands<of_w>{of_x, {base, how_w == lie::deep ? m.row_stride : m.col_stride, p.feature, is_whole ? out : 0, x.extent(1)}, &row_map, 0, 0, true});
        }
    }
    template <class Block>
    FASTMOE_HOST_DEVICE stage_scales<how> scales(Block& block, const place& p, int first_row) const
    {
        const int thread = block.thread() % warpgroup_threads, t = thread % 4, down = thread / warp_threads * 16 + thread % warp_threads / 4;
        const int64_t blocks_across = scale_blocks(x.extent(1));
        stage_scales<how> stage;
        FASTMOE_UNROLL
        for (int i = 0; i < stage_scales<how>::rows; ++i) {
            const int r = how.turned ? 8 * (i / 2) + 2 * t + i % 2 : first_row + 64 * (i / 2) + down + 8 * (i % 2);
            stage.of_row[i] = r < p.count ? x.scales_of(p.first + r) : nullptr;
        }
        stage.of_weights = w.scales_of(p.expert) + p.feature / scale_block * blocks_across;
        return stage;
    }
    template <class Block>
    FASTMOE_HOST_DEVICE auto before_store([[maybe_unused]] Block& block, [[maybe_unused]] const place& p, [[maybe_unused]] int first_row) const
    {
        if constexpr (how.turned) return nothing{};
        else return start_rows<how>(block, to.end, p, first_row, [this](int64_t s) { return !x.row(s); });
    }
    template <class Block, class Known>
    FASTMOE_HOST_DEVICE void store(Block& block, const place& p, int first_row, const Known& known, const sums<how>& c) const
    {
        [[maybe_unused]] const auto is_zero = [this](int64_t s) { return !x.row(s); };
        if constexpr (how.turned && !std::is_same_v<decltype(Store::end), rounded_pairs>)
            store_turned_pairs(block, to, p, first_row, out, is_zero, c);
        else if constexpr (how.turned) store_turned(block, to, p, first_row, out, is_zero, c);
        else {
            if constexpr (!std::is_same_v<decltype(to.bias), matrix_view<const no_bias>>)
                if (to.has_bias()) return store_rows<true>(block, to, p, first_row, out, known, c);
            store_rows<false>(block, to, p, first_row, out, known, c);
        }
    }
};

/// Whether one of two operands lies in order, so that boxes can bring it.
template <class DownRows, class AcrossRows>
inline constexpr bool has_order = !is_gathered<DownRows> || !is_gathered<AcrossRows>;

/// dW[e] (+)= dY_e^T X_e, or its transpose where dW lies so.
/// @tparam Map  of the operand that lies in order, across if both do; no_map: both are brought in lines
template <hopper_tuning how, class DownRows, class AcrossRows, class G, class Map = no_map>
struct gradient_product {
    static constexpr hopper_tuning tuning = how;
    static constexpr bool lines = true, has_map = !std::is_same_v<Map, no_map>;
    static_assert(!how.turned && how.columns != 192, "gradients: a hopper_tuning with 64, 128 or 256 columns that is not turned");
    static_assert(how.cluster == 1 || (has_map && has_order<DownRows, AcrossRows>), "blocks share an operand that lies in order");
    static constexpr bool is_scaled = false;
    using element = portable::row_element_t<DownRows>;
    static constexpr lie rows_lie = lie::wide, columns_lie = lie::wide;
    static constexpr int bring_registers = 56;
    /// Which operand a cluster's blocks share; of the other one they have tiles beside each other.
    static constexpr bool shares_across = has_map && !is_gathered<AcrossRows>, shares_down = has_map && !shares_across;
    static constexpr int down_of_cluster = how.rows * (shares_across ? how.cluster : 1),
                         across_of_cluster = how.columns * (shares_down ? how.cluster : 1);
    static constexpr int ordered_width = shares_across ? how.columns : how.rows;

    Map map;
    int64_t mapped; ///< rows that it has
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
        static constexpr bool has_lines = true;
    };
    template <class Block>
    FASTMOE_HOST_DEVICE void start(Block&, std::byte*) const noexcept
    {
    }
    FASTMOE_HOST_DEVICE int64_t tiles(const std::byte* = nullptr) const noexcept
    {
        return groups.experts() * ceil_div(dw.out, down_of_cluster) * ceil_div(dw.in, across_of_cluster);
    }
    FASTMOE_HOST_DEVICE place tile(const std::byte*, int64_t t, int rank) const noexcept
    {
        const auto high = static_cast<std::uint32_t>(ceil_div(dw.out, down_of_cluster)),
                   wide = static_cast<std::uint32_t>(ceil_div(dw.in, across_of_cluster));
        const int64_t e = t / (int64_t{high} * wide);
        const banded at = banded::of(static_cast<std::uint32_t>(t - e * high * wide), high, wide, static_cast<std::uint32_t>(how.band));
        const bool inside = is_group_inside(groups.counts, groups.offsets, e, groups.slots);
        const int64_t count = inside ? groups.counts(e) : 0;
        const auto narrow = [](int64_t n) { return static_cast<std::int32_t>(n); };
        return {inside ? groups.offsets(e) : 0, narrow(e), narrow(count), narrow(at.row * down_of_cluster) + (shares_across ? rank * how.rows : 0),
                narrow(at.column * across_of_cluster) + (shares_down ? rank * how.columns : 0),
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
        if constexpr (shares_across) {
            using boxed = boxed_lines<how.rows, how.columns, how.cluster, DownRows, AcrossRows, Map>;
            boxed both{down, across, &map, mapped, p.first, p.count, p.row, p.column, 0, how.row_bytes()};
            both.start(block);
            brings(both);
        } else if constexpr (shares_down) {
            using boxed = boxed_lines<how.columns, how.rows, how.cluster, AcrossRows, DownRows, Map>;
            boxed both{across, down, &map, mapped, p.first, p.count, p.column, p.row, how.row_bytes(), 0};
            both.start(block);
            brings(both);
        } else {
            operands both{{down, across, p.first, p.count, p.row, p.column}};
            both.start(block);
            brings(both);
        }
    }
    template <class Block>
    FASTMOE_HOST_DEVICE nothing before_store(Block&, const place&, int) const noexcept
    {
        return {};
    }
    template <class Block>
    FASTMOE_HOST_DEVICE void store(Block& block, const place& p, int first_row, nothing, const sums<how>& c) const
    {
        if (p.writes) return store_gradient(block, dw, mode, p.expert, p.row + first_row, p.column, c);
        if (block.thread() % warpgroup_threads == 0 && first_row == 0 && !is_group_inside(groups.counts, groups.offsets, p.expert, groups.slots))
            faults.record(fault_kind::group_out_of_range, p.expert, groups.counts(p.expert));
    }
};

} // namespace fastmoe::inline FASTMOE_ABI::detail::hopper
