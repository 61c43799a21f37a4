// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The main loop of gemm::hopper: one warpgroup brings stages of operands into a ring in shared memory, two multiply them.
///
/// C (rows,columns) = sum over depth of A (rows,depth) B (columns,depth)^T, in stages of 64 of the depth. An operand's tile
/// lies in lines of 128 bytes:
///
///     deep    a line is 64 of the depth at one row                  // (rows,64)
///     wide    a line is 64 rows at one depth step, in 64 steps      // (rows / 64,64,64)
///
/// and chunk c of line l at c ^ (l % 8), which is where the box copies put it and the products look for it.
#pragma once

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/exec/cluster.hpp>
#include <fastmoe/gemm/hopper_tuning.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::hopper {

using gemm::hopper_schedule;
using gemm::hopper_tuning;

inline constexpr int depth = hopper_tuning::depth, line_bytes = hopper_tuning::line_bytes;
inline constexpr int chunk_bytes = 16, chunk = 8; ///< elements of 16 bits
inline constexpr int step = 16;                   ///< of the depth, in one instruction
inline constexpr int atom_bytes = depth * line_bytes;

/// Where chunk c of a tile begins: of row `row` and the depth's elements [8 c, 8 c + 8), or of step `row` and rows [8 c, 8 c + 8).
template <lie how>
FASTMOE_HOST_DEVICE constexpr int chunk_at(int line, int c) noexcept
{
    if constexpr (how == lie::deep) return line * line_bytes + ((c ^ (line & 7)) * chunk_bytes);
    else return c / 8 * atom_bytes + line * line_bytes + (((c % 8) ^ (line & 7)) * chunk_bytes);
}

/// Where an instruction finds rows [row, ...) and the steps [16 k, 16 k + 16) of an operand's tile.
template <lie how>
FASTMOE_HOST_DEVICE constexpr std::uint64_t operand_at(std::uint32_t tile, int row, int k) noexcept
{
    if constexpr (how == lie::deep)
        return operand_word(tile + static_cast<std::uint32_t>(row * line_bytes + k * step * 2), 16, 8 * line_bytes);
    else
        return operand_word(tile + static_cast<std::uint32_t>(row / 64 * atom_bytes + k * step * line_bytes), atom_bytes, 8 * line_bytes);
}

/// Rows of memory that lie deep: each thread brings the same chunk of the same rows in each stage.
template <int rows, class T>
struct deep_lines {
    static constexpr lie how = lie::deep;
    static constexpr bool is_box = false;
    static constexpr int each = rows * 8 / warpgroup_threads;
    const T* lines[each]; // null: zeros
    const T* anywhere;    ///< an address for what is not read
    int64_t length;       ///< of the depth

    /// @param line  line(r): row r of the tile, null for zeros
    template <class Line>
    FASTMOE_HOST_DEVICE deep_lines(int thread, const T* readable, int64_t end, const Line& line) : anywhere(readable), length(end)
    {
        FASTMOE_UNROLL
        for (int i = 0; i < each; ++i) lines[i] = line(thread / 8 + i * (warpgroup_threads / 8));
    }
    template <class Block>
    FASTMOE_HOST_DEVICE void bring(Block& block, std::byte* to, int64_t first) const
    {
        const int c = block.thread() % 8, r = block.thread() / 8;
        const int64_t at = first + c * chunk;
        FASTMOE_UNROLL
        for (int i = 0; i < each; ++i) {
            const bool is = lines[i] && at < length;
            block.copy_line(to + chunk_at<how>(r + i * (warpgroup_threads / 8), c), is ? lines[i] + at : anywhere, is ? chunk_bytes : 0);
        }
    }
};

/// Rows of memory that are steps of the depth. line(k): step k at the first row of the tile; null for zeros.
template <int rows, class T, class Line>
struct wide_lines {
    static constexpr lie how = lie::wide;
    static constexpr bool is_box = false;
    Line line;
    const T* anywhere;
    int64_t length, width; ///< width: rows of the operand from the first of the tile on

    template <class Block>
    FASTMOE_HOST_DEVICE void bring(Block& block, std::byte* to, int64_t first) const
    {
        constexpr int chunks = rows / chunk, at_once = warpgroup_threads / chunks;
        const int c = block.thread() % chunks;
        const bool inside = c * chunk < width;
        FASTMOE_UNROLL_4 // more addresses than that are more registers than a warpgroup that brings has
        for (int i = 0; i < depth; i += at_once) {
            const int k = i + block.thread() / chunks;
            const T* from = inside && first + k < length ? line(first + k) : nullptr;
            block.copy_line(to + chunk_at<how>(k, c), from ? from + c * chunk : anywhere, from ? chunk_bytes : 0);
        }
    }
};

/// Matrices that copies of boxes bring, one thread for all, and each block of a cluster a part for all of its blocks.
template <lie lies, int rows, int cluster, class Map>
struct boxes {
    static constexpr lie how = lies;
    static constexpr bool is_box = true;
    const Map* map;
    int row, expert;

    static constexpr int box_rows = how == lie::deep ? rows / cluster : depth; ///< the box's y
    template <class Block>
    FASTMOE_HOST_DEVICE void bring(Block& block, std::byte* to, barrier_word* full, int first) const
    {
        constexpr std::uint32_t all = (1u << cluster) - 1;
        if constexpr (how == lie::deep) {
            const int part = block.rank() * box_rows;
            block.copy_box(to + part * line_bytes, *map, full, first, row + part, expert, all);
        } else {
            FASTMOE_UNROLL
            for (int atom = 0; atom < rows / 64; atom += cluster) {
                const int mine = atom + block.rank();
                block.copy_box(to + mine * atom_bytes, *map, full, row + mine * 64, first, expert, all);
            }
        }
    }
};

/// The stages that are in use, counted from the first on.
template <int stages>
struct ring {
    unsigned count = 0;

    FASTMOE_HOST_DEVICE int stage() const noexcept { return static_cast<int>(count % stages); }
    FASTMOE_HOST_DEVICE unsigned parity() const noexcept { return count / stages & 1; }
};

/// Sums of a thread: blocks of 64 rows, as multiply() has them.
template <hopper_tuning how>
struct sums {
    float of[how.blocks()][how.columns / 2];
};

/// All tiles of a product, by one cluster's blocks at a time.
///
///     Product::tuning, ::element       hopper_tuning; bfloat16 or half
///     Product::rows_lie, ::columns_lie of both operands; Product::lines, Product::box_bytes: what the full barrier waits for
///     p.tiles()                        of a cluster
///     p.tile(t, rank)                  what follows is about; t.steps: the stages of its depth
///     p.bring(block, tile, f)          f(rows' operand, columns' operand)
///     p.store(block, tile, first_row, sums)
template <class Product>
struct multiply_tiles {
    static constexpr hopper_tuning how = Product::tuning;
    static_assert(how.fits(), "a hopper_tuning that registers or shared memory of sm_90 do not hold");
    static constexpr int cluster = how.cluster;
    static constexpr int shared_bytes = how.shared_bytes();
    using position = ring<static_cast<int>(how.stages)>;
    static constexpr bool ping_pong = how.schedule == hopper_schedule::ping_pong;
    static constexpr int warps = warpgroup_threads / warp_threads;

    Product product;

    template <class Block>
    FASTMOE_HOST_DEVICE void operator()(Block& block) const
    {
        barrier_word* const full = reinterpret_cast<barrier_word*>(block.shared() + how.stages * how.stage_bytes());
        barrier_word* const empty = full + how.stages;
        if (block.thread() == 0)
            for (int s = 0; s < how.stages; ++s) {
                block.init(full + s, (Product::lines ? warpgroup_threads : 0) + (Product::box_bytes > 0 ? 1 : 0));
                block.init(empty + s, (ping_pong ? 1 : 2) * warps * how.cluster);
            }
        block.sync_cluster();
        if (block.warpgroup() == 0) {
            block.template give_registers<40>();
            bring(block, full, empty);
        } else {
            block.template take_registers<232>();
            multiply(block, full, empty);
        }
        block.sync_cluster(); // no block ends while another brings for it, or arrives at its barriers
    }

private:
    template <class Block>
    FASTMOE_HOST_DEVICE void bring(Block& block, barrier_word* full, barrier_word* empty) const
    {
        position at;
        for (int64_t t = block.cluster(), end = product.tiles(); t < end; t += block.clusters()) {
            const auto tile = product.tile(t, block.rank());
            if (!Product::lines && block.thread() != 0) {
                at.count += static_cast<unsigned>(tile.steps);
                continue;
            }
            product.bring(block, tile, [&](const auto& rows, const auto& columns) {
                FASTMOE_KEEP_LOOP
                for (int s = 0; s < tile.steps; ++s, ++at.count) {
                    std::byte* const to = block.shared() + at.stage() * how.stage_bytes();
                    block.wait(empty + at.stage(), at.parity() ^ 1);
                    if (Product::box_bytes > 0 && block.thread() == 0) {
                        block.expect(full + at.stage(), Product::box_bytes);
                        if constexpr (std::remove_cvref_t<decltype(rows)>::is_box) rows.bring(block, to, full + at.stage(), s * depth);
                        if constexpr (std::remove_cvref_t<decltype(columns)>::is_box)
                            columns.bring(block, to + how.row_bytes(), full + at.stage(), s * depth);
                    }
                    if constexpr (!std::remove_cvref_t<decltype(rows)>::is_box) rows.bring(block, to, int64_t{s} * depth);
                    if constexpr (!std::remove_cvref_t<decltype(columns)>::is_box)
                        columns.bring(block, to + how.row_bytes(), int64_t{s} * depth);
                    if constexpr (Product::lines) block.arrive_with_lines(full + at.stage());
                }
            });
        }
    }

    template <class Block>
    FASTMOE_HOST_DEVICE void multiply(Block& block, barrier_word* full, barrier_word* empty) const
    {
        const int group = block.warpgroup() - 1;
        const int first_row = ping_pong ? 0 : group * how.blocks() * 64;
        position at;
        bool mine = !ping_pong || group == 0;
        for (int64_t t = block.cluster(), end = product.tiles(); t < end; t += block.clusters()) {
            const auto tile = product.tile(t, block.rank());
            if (mine) {
                sums<how> c;
                sum(block, full, empty, first_row, tile.steps, at, c);
                product.store(block, tile, first_row, c);
            }
            at.count += static_cast<unsigned>(tile.steps);
            if (ping_pong) mine = !mine;
        }
    }

    template <class Block>
    FASTMOE_HOST_DEVICE void sum(Block& block, barrier_word* full, barrier_word* empty, int first_row, int steps, position at,
                                 sums<how>& c) const
    {
        using T = typename Product::element;
        FASTMOE_UNROLL
        for (int b = 0; b < how.blocks(); ++b)
            FASTMOE_UNROLL
            for (int i = 0; i < how.columns / 2; ++i) c.of[b][i] = 0.0f;
        const auto release = [&](const position& p) { // to all who bring into it
            if (block.thread() % warp_threads < how.cluster) block.arrive(empty + p.stage(), block.thread() % warp_threads);
        };
        position before = at;
        FASTMOE_KEEP_LOOP
        for (int s = 0; s < steps; ++s, ++at.count) {
            const std::uint32_t rows = block.address(block.shared() + at.stage() * how.stage_bytes());
            block.wait(full + at.stage(), at.parity());
            if constexpr (Product::lines) block.show_lines();
            block.begin_products();
            FASTMOE_UNROLL
            for (int k = 0; k < depth / step; ++k)
                FASTMOE_UNROLL
                for (int b = 0; b < how.blocks(); ++b)
                    block.template multiply<T, how.columns, Product::rows_lie, Product::columns_lie>(
                        c.of[b], operand_at<Product::rows_lie>(rows, first_row + 64 * b, k),
                        operand_at<Product::columns_lie>(rows + how.row_bytes(), 0, k));
            block.commit_products();
            block.template wait_products<1>();
            if (s > 0) release(before);
            before = at;
        }
        block.template wait_products<0>();
        if (steps > 0) release(before);
    }
};

} // namespace fastmoe::inline FASTMOE_ABI::detail::hopper
