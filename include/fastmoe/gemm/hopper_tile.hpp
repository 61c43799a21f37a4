// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The main loop of gemm::hopper: one warpgroup brings stages of operands into a ring in shared memory, two multiply them.
///
/// C (rows,columns) = sum over depth of A (rows,depth) B (columns,depth)^T, in stages of 64 of the depth, or of 128 if elements
/// are bytes. An operand's tile lies in lines of 128 bytes:
///
///     deep    a line is 64 or 128 of the depth at one row           // (rows,64)
///     wide    a line is 64 rows at one depth step, in 64 steps      // (rows / 64,64,64), not of bytes
///
/// and chunk c of line l at c ^ (l % 8), which is where the box copies put it and the products look for it.
#pragma once

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/exec/cluster.hpp>
#include <fastmoe/gemm/hopper_tuning.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::hopper {

using gemm::hopper_schedule;
using gemm::hopper_tuning;

inline constexpr int line_bytes = hopper_tuning::line_bytes, chunk_bytes = 16, step_bytes = 32;
template <class T>
inline constexpr int depth_of = line_bytes / static_cast<int>(sizeof(T)); ///< elements of a stage
template <class T>
inline constexpr int chunk_of = chunk_bytes / static_cast<int>(sizeof(T));
inline constexpr int steps_of_stage = line_bytes / step_bytes; ///< instructions

// Of elements of 16 bits, which alone lie wide.
inline constexpr int depth = 64, chunk = 8;
inline constexpr int step = 16; ///< of the depth, in one instruction
inline constexpr int atom_bytes = depth * line_bytes;

/// Where chunk c of a tile begins: of row `line` and the depth's 16 bytes from 16 c on, or of step `line` and rows [8 c, 8 c + 8).
template <lie how>
FASTMOE_HOST_DEVICE constexpr int chunk_at(int line, int c) noexcept
{
    if constexpr (how == lie::deep) return line * line_bytes + ((c ^ (line & 7)) * chunk_bytes);
    else return c / 8 * atom_bytes + line * line_bytes + (((c % 8) ^ (line & 7)) * chunk_bytes);
}

/// Where an instruction finds rows [row, ...) and its k-th part of the depth, in an operand's tile.
template <lie how>
FASTMOE_HOST_DEVICE constexpr std::uint64_t operand_at(std::uint32_t tile, int row, int k) noexcept
{
    if constexpr (how == lie::deep)
        return operand_word(tile + static_cast<std::uint32_t>(row * line_bytes + k * step_bytes), 16, 8 * line_bytes);
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
        const int64_t at = first + c * chunk_of<T>;
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

/// In place of a map: matrices of which there is none.
struct no_map {};

/// Matrices that no map describes, brought in lines by all who bring.
template <lie how, int rows, class T>
struct matrix_lines {
    const T* base;             ///< of the matrix; anything that can be read, if no line is to be
    int64_t stride;            ///< from a line to the next
    int64_t row, high, length; ///< the tile's first row; the matrix's rows and depth, or 0

    template <class Block>
    FASTMOE_HOST_DEVICE void bring(Block& block, std::byte* to, int64_t first) const
    {
        const int c = block.thread() % 8, l = block.thread() / 8;
        constexpr int at_once = warpgroup_threads / 8; // lines
        if constexpr (how == lie::deep) {
            const int64_t at = first + c * chunk_of<T>;
            FASTMOE_UNROLL_4
            for (int i = 0; i < rows; i += at_once) line(block, to + chunk_at<how>(l + i, c), row + l + i, at, row + l + i < high && at < length);
        } else {
            FASTMOE_UNROLL_4
            for (int i = 0; i < rows / 64 * depth; i += at_once) {
                const int atom = i / depth, k = i % depth + l;
                const int64_t at = row + atom * 64 + c * chunk;
                line(block, to + chunk_at<how>(k, 8 * atom + c), first + k, at, first + k < length && at < high);
            }
        }
    }

private:
    template <class Block>
    FASTMOE_HOST_DEVICE void line(Block& block, std::byte* to, int64_t number, int64_t at, bool is) const
    {
        block.copy_line(to, is ? base + number * stride + at : base, is ? chunk_bytes : 0);
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
///     Product::tuning, ::element       hopper_tuning; bfloat16, half or float8_e4m3
///     Product::is_scaled               whether the sums of a stage are scaled, see sum_scaled()
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
                            operands.bring_boxes(block, to, full + at.stage(), s * depth_of<typename Product::element>);
                        }
                    if constexpr (Product::lines) operands.bring_lines(block, to, int64_t{s} * depth_of<typename Product::element>);
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
                const auto last = [&] {
                    if (ping_pong && block.thread() % warp_threads == 0) block.arrive(turns + (1 - group), block.rank());
                };
                if constexpr (Product::is_scaled) sum_scaled(block, full, empty, first_row, tile, at, c, last);
                else sum(block, full, empty, first_row, tile.steps, at, c, last);
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
        clear(c);
        FASTMOE_UNROLL
        for (int b = 0; b < how.blocks(); ++b) block.hold(c.of[b]);
        position before = at;
        FASTMOE_KEEP_LOOP
        for (int s = 0; s < steps; ++s, ++at.count) {
            const std::uint32_t rows = block.address(block.shared() + at.stage() * how.stage_bytes());
            block.wait(full + at.stage(), at.parity());
            if constexpr (Product::lines) block.show_lines();
            block.begin_products();
            FASTMOE_UNROLL
            for (int k = 0; k < steps_of_stage; ++k)
                FASTMOE_UNROLL
                for (int b = 0; b < how.blocks(); ++b)
                    block.template multiply<T, how.columns, Product::rows_lie, Product::columns_lie>(
                        c.of[b], operand_at<Product::rows_lie>(rows, first_row + 64 * b, k),
                        operand_at<Product::columns_lie>(rows + how.row_bytes(), 0, k));
            block.commit_products();
            block.template wait_products<1>();
            if (s > 0) release(block, empty, before);
            before = at;
        }
        if (steps == 0) block.sync_warp(); // all of a warp have had their turn before it passes it on
        last();
        block.template wait_products<0>();
        FASTMOE_UNROLL
        for (int b = 0; b < how.blocks(); ++b) block.hold(c.of[b]);
        if (steps > 0) release(block, empty, before);
    }

    /// Sums of each stage on their own, added with its scales: tensor cores keep some 14 bits of a sum of eight-bit floats, so no sum
    /// is left to them for long. One warpgroup adds while the other multiplies.
    template <class Block, class Tile, class Last>
    FASTMOE_HOST_DEVICE void sum_scaled(Block& block, barrier_word* full, barrier_word* empty, int first_row, const Tile& tile, position at,
                                        sums<how>& c, const Last& last) const
    {
        using T = typename Product::element;
        const auto scales = product.scales(block, tile, first_row);
        using factors = decltype(scales.at(0));
        factors next = tile.steps > 0 ? scales.at(0) : factors{};
        block.sync_warp();
        clear(c);
        float part[how.columns / 2] = {};
        FASTMOE_KEEP_LOOP
        for (int s = 0; s < tile.steps; ++s, ++at.count) {
            const factors now = next;
            const std::uint32_t rows = block.address(block.shared() + at.stage() * how.stage_bytes());
            block.wait(full + at.stage(), at.parity());
            if constexpr (Product::lines) block.show_lines();
            FASTMOE_UNROLL
            for (int b = 0; b < how.blocks(); ++b) {
                block.hold(part);
                block.begin_products();
                FASTMOE_UNROLL
                for (int k = 0; k < steps_of_stage; ++k) {
                    const std::uint64_t from_a = operand_at<lie::deep>(rows, first_row + 64 * b, k),
                                        from_b = operand_at<lie::deep>(rows + how.row_bytes(), 0, k);
                    if (k == 0) block.template multiply<T, how.columns, lie::deep, lie::deep, false>(part, from_a, from_b);
                    else block.template multiply<T, how.columns, lie::deep, lie::deep>(part, from_a, from_b);
                }
                block.commit_products();
                if (b == how.blocks() - 1 && s + 1 < tile.steps) next = scales.at(s + 1); // under way while this stage is multiplied
                block.template wait_products<0>();
                block.hold(part);
                if (b == how.blocks() - 1) release(block, empty, at);
                scales.add(c.of[b], part, now, b);
            }
        }
        block.sync_warp(); // all of a warp have had their turn before it passes it on
        last();
    }

    /// A stage, to all who bring into it.
    template <class Block>
    FASTMOE_HOST_DEVICE static void release(Block& block, barrier_word* empty, const position& p)
    {
        if (block.thread() % warp_threads < how.cluster) block.arrive(empty + p.stage(), block.thread() % warp_threads);
    }
    FASTMOE_HOST_DEVICE static void clear(sums<how>& c)
    {
        FASTMOE_UNROLL
        for (int b = 0; b < how.blocks(); ++b)
            FASTMOE_UNROLL
            for (int i = 0; i < how.columns / 2; ++i) c.of[b][i] = 0.0f;
    }
};

} // namespace fastmoe::inline FASTMOE_ABI::detail::hopper
