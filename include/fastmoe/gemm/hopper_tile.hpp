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

/// Two operands whose rows in memory are the steps of the depth. Each warp brings 16 steps of a stage; its lanes look up
/// the rows of the next stage while the copies of one are under way. A row of zeros on either side is one on both, so that it adds
/// nothing, whatever the other holds.
template <int rows, int columns, class Down, class Across>
struct paired_lines {
    static constexpr int steps_of_warp = depth / 4;
    const Down& down;          // (S,M)
    const Across& across;      // (S,N)
    int64_t begin, count;      ///< rows of memory
    int64_t row, column;       ///< the tile's first
    std::int32_t next[2] = {}; ///< this lane's step of the next stage: rows of memory, -1 for zeros

    template <class Block>
    FASTMOE_HOST_DEVICE void start(Block& block)
    {
        look_up(block, 0);
    }
    template <class Block>
    FASTMOE_HOST_DEVICE void bring(Block& block, std::byte* to, int64_t first)
    {
        const std::int32_t now[2] = {next[0], next[1]};
        look_up(block, first + depth);
        bring<rows>(block, to, now[0], down.data, row);
        bring<columns>(block, to + rows * line_bytes, now[1], across.data, column);
    }

private:
    template <class Rows>
    static FASTMOE_HOST_DEVICE std::int32_t source(const Rows& from, int64_t s)
    {
        if constexpr (requires { from.index; }) return from.index(s);
        else return static_cast<std::int32_t>(s);
    }
    template <class Block>
    FASTMOE_HOST_DEVICE void look_up(Block& block, int64_t first)
    {
        const int64_t s = first + block.thread() / warp_threads * steps_of_warp + block.thread() % steps_of_warp;
        const bool inside = s < count;
        next[0] = inside ? source(down, begin + s) : -1;
        next[1] = inside ? source(across, begin + s) : -1;
        if (next[0] < 0 || next[1] < 0) next[0] = next[1] = -1;
    }
    template <int width, class Block, class T>
    static FASTMOE_HOST_DEVICE void bring(Block& block, std::byte* to, std::int32_t mine, const matrix_view<const T>& from, int64_t column)
    {
        constexpr int chunks = width / chunk;
        constexpr int at_once = warp_threads / chunks; // steps
        static_assert(at_once * chunks == warp_threads);
        const int lane = block.thread() % warp_threads, c = lane % chunks, above = block.thread() / warp_threads * steps_of_warp;
        const bool inside = column + c * chunk < from.extent(1);
        const T* const line = from.data_handle() + (inside ? column + c * chunk : 0);
        FASTMOE_UNROLL_4
        for (int i = 0; i < steps_of_warp; i += at_once) {
            const int k = i + lane / chunks;
            const std::int32_t r = static_cast<std::int32_t>(block.broadcast(static_cast<std::uint32_t>(mine), k));
            const bool is = inside && r >= 0;
            block.copy_line(to + chunk_at<lie::wide>(above + k, c), is ? line + r * from.extent(1) : from.data_handle(), is ? chunk_bytes : 0);
        }
    }
};

/// Matrices that copies of boxes bring, one thread for all, and each block of a cluster a part for all of its blocks.
template <lie lies, int rows, int cluster, class Map>
struct boxes {
    static constexpr lie how = lies;
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
///     Product::bring_registers         of the 504 that three warpgroups' threads have together
///     p.tiles()                        of a cluster
///     p.tile(t, rank)                  what follows is about; t.steps: the stages of its depth
///     p.bring(block, tile, f)          f(o): o.bring_lines(block, stage, first) by all who bring, o.bring_boxes(block, stage, full,
///                                      first) by the first of them
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
        barrier_word* const turns = empty + how.stages; // of the two who multiply
        if (block.thread() == 0) {
            for (int g = 0; g < 2; ++g) block.init(turns + g, warps);
            for (int s = 0; s < how.stages; ++s) {
                block.init(full + s, (Product::lines ? warpgroup_threads : 0) + (Product::box_bytes > 0 ? 1 : 0));
                block.init(empty + s, (ping_pong ? 1 : 2) * warps * how.cluster);
            }
        }
        block.sync_cluster();
        if (block.warpgroup() == 0) {
            block.template give_registers<Product::bring_registers>();
            bring(block, full, empty);
        } else {
            block.template take_registers<(504 - Product::bring_registers) / 2>();
            multiply(block, full, empty, turns);
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
            product.bring(block, tile, [&](auto&& operands) {
                FASTMOE_KEEP_LOOP
                for (int s = 0; s < tile.steps; ++s, ++at.count) {
                    std::byte* const to = block.shared() + at.stage() * how.stage_bytes();
                    block.wait(empty + at.stage(), at.parity() ^ 1);
                    if constexpr (Product::box_bytes > 0)
                        if (block.thread() == 0) {
                            block.expect(full + at.stage(), Product::box_bytes);
                            operands.bring_boxes(block, to, full + at.stage(), s * depth);
                        }
                    if constexpr (Product::lines) operands.bring_lines(block, to, int64_t{s} * depth);
                    if constexpr (Product::lines) block.arrive_with_lines(full + at.stage());
                }
            });
        }
    }

    template <class Block>
    FASTMOE_HOST_DEVICE void multiply(Block& block, barrier_word* full, barrier_word* empty, barrier_word* turns) const
    {
        const int group = block.warpgroup() - 1;
        const int first_row = ping_pong ? 0 : group * how.blocks() * 64;
        position at;
        bool mine = !ping_pong || group == 0;
        unsigned done = 0; // tiles of this warpgroup
        for (int64_t t = block.cluster(), end = product.tiles(); t < end; t += block.clusters()) {
            const auto tile = product.tile(t, block.rank());
            if (mine) {
                // Products take turns: epilogues lie under the other's, and nobody is so far ahead of a barrier that the parity of
                // its phase comes round.
                if constexpr (ping_pong) block.wait(turns + group, (done++ & 1) ^ (group == 0 ? 1 : 0));
                sums<how> c;
                sum(block, full, empty, first_row, tile.steps, at, c, [&] {
                    if (ping_pong && block.thread() % warp_threads == 0) block.arrive(turns + (1 - group), block.rank());
                });
                product.store(block, tile, first_row, c);
            }
            at.count += static_cast<unsigned>(tile.steps);
            if (ping_pong) mine = !mine;
        }
    }

    /// @param last  called when the last products are under way
    template <class Block, class Last>
    FASTMOE_HOST_DEVICE void sum(Block& block, barrier_word* full, barrier_word* empty, int first_row, int steps, position at,
                                 sums<how>& c, const Last& last) const
    {
        using T = typename Product::element;
        block.sync_warp(); // whose lanes may have parted where the last tile was stored
        FASTMOE_UNROLL
        for (int b = 0; b < how.blocks(); ++b)
            FASTMOE_UNROLL
            for (int i = 0; i < how.columns / 2; ++i) c.of[b][i] = 0.0f;
        FASTMOE_UNROLL
        for (int b = 0; b < how.blocks(); ++b) block.hold(c.of[b]);
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
        if (steps == 0) block.sync_warp(); // all of a warp have had their turn before it passes it on
        last();
        block.template wait_products<0>();
        FASTMOE_UNROLL
        for (int b = 0; b < how.blocks(); ++b) block.hold(c.of[b]);
        if (steps > 0) release(before);
    }
};

} // namespace fastmoe::inline FASTMOE_ABI::detail::hopper
