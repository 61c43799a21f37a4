// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How operands of gemm::hopper lie in shared memory, and what brings them there. An operand's tile lies in lines of 128 bytes:
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

/// Rows of memory that are steps of the depth, for the 16 steps of a warp.
/// @param mine    of a lane from lane0 on: which row is its step, -1 for zeros
/// @param column  the tile's first
template <int width, class Block, class T>
FASTMOE_HOST_DEVICE void bring_steps(Block& block, std::byte* to, std::int32_t mine, int lane0, const matrix_view<const T>& from, int64_t column)
{
    constexpr int steps_of_warp = depth / 4, chunks = width / chunk, at_once = warp_threads / chunks; // steps
    static_assert(at_once * chunks == warp_threads);
    const int lane = block.thread() % warp_threads, c = lane % chunks, above = block.thread() / warp_threads * steps_of_warp;
    const bool inside = column + c * chunk < from.extent(1);
    // Rows are shorter than 2^31, so that one multiplication of 32 bits finds one.
    const auto line = reinterpret_cast<const std::byte*>(from.data_handle() + (inside ? column + c * chunk : 0));
    const std::uint32_t row_bytes = static_cast<std::uint32_t>(from.extent(1)) * std::uint32_t{sizeof(T)};
    FASTMOE_UNROLL_4
    for (int i = 0; i < steps_of_warp; i += at_once) {
        const int k = i + lane / chunks;
        const auto r = static_cast<std::int32_t>(block.broadcast(static_cast<std::uint32_t>(mine), lane0 + k));
        const bool is = inside && r >= 0;
        block.copy_line(to + chunk_at<lie::wide>(above + k, c), line + std::uint64_t{is ? static_cast<std::uint32_t>(r) : 0} * row_bytes,
                        is ? chunk_bytes : 0);
    }
}
/// The row of memory that is row s of x.
template <class Rows>
FASTMOE_HOST_DEVICE std::int32_t source_row(const Rows& x, int64_t s)
{
    if constexpr (requires { x.index; }) return x.index(s);
    else return static_cast<std::int32_t>(s);
}

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
        // Compared here, not where they are read: nobody is to wait for the next ones yet.
        const bool is = next[0] >= 0 && next[1] >= 0;
        const std::int32_t now[2] = {is ? next[0] : -1, is ? next[1] : -1};
        look_up(block, first + depth);
        bring_steps<rows>(block, to, now[0], 0, down.data, row);
        bring_steps<columns>(block, to + rows * line_bytes, now[1], 0, across.data, column);
    }

private:
    template <class Block>
    FASTMOE_HOST_DEVICE void look_up(Block& block, int64_t first)
    {
        const int64_t s = first + block.thread() / warp_threads * steps_of_warp + block.thread() % steps_of_warp;
        const bool inside = s < count;
        next[0] = inside ? source_row(down, begin + s) : -1;
        next[1] = inside ? source_row(across, begin + s) : -1;
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
        constexpr std::uint32_t all = cluster == 1 ? 0 : (1u << cluster) - 1;
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

/// The same where one operand's rows lie in order. Of a stage all of whose rows count on both sides, that one comes in boxes, a part of
/// them from each block of a cluster for both, and the other in lines; of any other stage both do, since 0 times what lies in a row that
/// does not count may be no number. Every warp looks at all rows of a stage, so that all of them, in both blocks, decide alike.
template <int listed_width, int ordered_width, int cluster, class Listed, class Ordered, class Map>
struct boxed_lines {
    static_assert(ordered_width >= 64 * cluster);
    const Listed& listed;   // (S,M) or (S,N)
    const Ordered& ordered; // (S,N) or (S,M)
    const Map* map;         ///< of ordered
    int64_t mapped;         ///< rows of it that the map has
    int64_t begin, count;   ///< rows of memory
    int listed_column, ordered_column, listed_at, ordered_at; ///< the tile's first, and where its part of a stage begins
    std::int32_t next[2] = {}; ///< of listed, this lane's steps of the next stage, 32 apart
    bool boxed = false;

    template <class Block>
    FASTMOE_HOST_DEVICE void start(Block& block)
    {
        look_up(block, 0);
    }
    /// How many bytes of the stage come in boxes.
    template <class Block>
    FASTMOE_HOST_DEVICE int box_bytes(Block& block, int64_t first)
    {
        std::uint32_t missing = (next[0] | next[1]) < 0 ? 1 : 0;
        FASTMOE_UNROLL
        for (int mask = 1; mask < warp_threads; mask *= 2) missing |= block.exchange(missing, mask);
        boxed = missing == 0 && begin + first + depth <= mapped;
        return boxed ? ordered_width * line_bytes : 0;
    }
    template <class Block>
    FASTMOE_HOST_DEVICE void bring_boxes(Block& block, std::byte* stage, barrier_word* full, int64_t first) const
    {
        if (boxed)
            boxes<lie::wide, ordered_width, cluster, Map>{map, ordered_column, 0}.bring(block, stage + ordered_at, full,
                                                                                      static_cast<int>(begin + first));
    }
    template <class Block>
    FASTMOE_HOST_DEVICE void bring_lines(Block& block, std::byte* stage, int64_t first)
    {
        const int warp = block.thread() / warp_threads, lane = block.thread() % warp_threads, lane0 = warp % 2 * (depth / 4);
        const std::int32_t now = warp < 2 ? next[0] : next[1];
        look_up(block, first + depth);
        bring_steps<listed_width>(block, stage + listed_at, now, lane0, listed.data, listed_column);
        if (boxed) return;
        const auto same = static_cast<std::int32_t>(begin + first + warp / 2 * warp_threads + lane);
        bring_steps<ordered_width>(block, stage + ordered_at, now < 0 ? -1 : same, lane0, ordered.data, ordered_column);
    }

private:
    template <class Block>
    FASTMOE_HOST_DEVICE void look_up(Block& block, int64_t first)
    {
        FASTMOE_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int64_t s = first + i * warp_threads + block.thread() % warp_threads;
            next[i] = s < count ? source_row(listed, begin + s) : -1;
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

} // namespace fastmoe::inline FASTMOE_ABI::detail::hopper
