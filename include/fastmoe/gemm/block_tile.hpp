// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// One tile of a product by one block: how operands come into shared memory, where they lie there, and who sums what.
///
/// C (128,128) = sum over depth of A (128,depth) B (128,depth)^T, in stages of 64 bytes of depth. An operand lies *deep*, if
/// its memory is contiguous along the depth, or *wide*, if across it:
///
///     deep    128 lines of 64 bytes, one a row of the operand      // 32 bfloat16, 16 float
///     wide    as many lines of 128 elements, one a depth step
///
/// Lines are cut into chunks of 16 bytes, and chunks of neighbouring lines change places, so that the eight lines of a
/// small matrix lie in different banks.
#pragma once

#include <cstring>

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/exec/block.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::block {

inline constexpr int tile_rows = 128, tile_columns = 128;
inline constexpr int chunk_bytes = 16, deep_bytes = 64;
inline constexpr int operand_bytes = tile_rows * deep_bytes, stage_bytes = 2 * operand_bytes;
inline constexpr int stages = 3; ///< 48 KiB in all: what every device gives two blocks of
inline constexpr int shared_bytes = stages * stage_bytes;

/// Depth steps of a stage.
template <class Element>
inline constexpr int stage_depth = deep_bytes / static_cast<int>(sizeof(Element));
template <class Element>
inline constexpr int chunk_elements = chunk_bytes / static_cast<int>(sizeof(Element));

/// Where chunk c of line l begins.
template <class Element, lie how>
FASTMOE_HOST_DEVICE constexpr int chunk_at(int line, int c) noexcept
{
    if constexpr (how == lie::deep) return line * deep_bytes + ((c ^ ((line >> 1) & 3)) * chunk_bytes);
    else return line * (tile_rows * static_cast<int>(sizeof(Element))) + ((c ^ (line & 7)) * chunk_bytes);
}

/// Elements [at, at + 16 bytes) of a line in memory, zeros from `end` on and where there is no line. Asynchronous where the
/// elements are of that type and lie on 16 bytes; else at once, each converted.
template <class Element, thread_block Block, class T>
FASTMOE_HOST_DEVICE void bring_chunk(Block& block, std::byte* to, const T* line, int64_t at, int64_t end)
{
    constexpr int n = chunk_elements<Element>;
    if constexpr (std::is_same_v<Element, T>)
        if (line && at + n <= end && reinterpret_cast<std::uintptr_t>(line + at) % chunk_bytes == 0)
            return block.copy_line(to, line + at);
    alignas(chunk_bytes) Element values[n];
    FASTMOE_UNROLL
    for (int i = 0; i < n; ++i)
        values[i] = static_cast<Element>(line && at + i < end ? static_cast<float>(line[at + i]) : 0.0f);
    std::memcpy(__builtin_assume_aligned(to, chunk_bytes), values, chunk_bytes);
}

/// Brings stages of an operand whose lines are rows: a thread has the same part of the same two rows in each stage.
template <class Element, class T>
struct deep_operand {
    static constexpr lie how = lie::deep;
    const T* lines[2]; // null: zeros
    int64_t depth;

    /// @param line  line(r): row r of the tile, null for zeros
    template <class Line>
    FASTMOE_HOST_DEVICE deep_operand(int thread, int64_t end, const Line& line) : lines{line(thread / 4), line(64 + thread / 4)}, depth(end)
    {
    }
    template <thread_block Block>
    FASTMOE_HOST_DEVICE void bring(Block& block, std::byte* to, int64_t first) const
    {
        const int c = block.thread() % 4, r = block.thread() / 4;
        const int64_t at = first + c * chunk_elements<Element>;
        FASTMOE_UNROLL
        for (int half = 0; half < 2; ++half)
            bring_chunk<Element>(block, to + chunk_at<Element, how>(64 * half + r, c), lines[half], at, depth);
    }
};

/// The same where lines are depth steps. line(k): step k, at the first row of the tile; null for zeros.
template <class Element, class T, class Line>
struct wide_operand {
    static constexpr lie how = lie::wide;
    Line line;
    int64_t depth, rows; ///< rows of the operand from the first of the tile on

    template <thread_block Block>
    FASTMOE_HOST_DEVICE void bring(Block& block, std::byte* to, int64_t first) const
    {
        constexpr int chunks = tile_rows / chunk_elements<Element>, step = block_threads / chunks;
        const int c = block.thread() % chunks;
        for (int k = block.thread() / chunks; k < stage_depth<Element>; k += step) {
            const T* from = first + k < depth ? line(first + k) : nullptr;
            bring_chunk<Element>(block, to + chunk_at<Element, how>(k, c), from, c * chunk_elements<Element>, rows);
        }
    }
};

/// A thread's 64 sums: of rows row(i, v) and columns column(j, v) of the tile, of warps in 2 rows of 4.
struct sums {
    float of[4][4][4] = {}; // (i,j,v)
};

FASTMOE_HOST_DEVICE constexpr int warp_row(int thread) noexcept { return thread / (4 * warp_threads) * 64; }
FASTMOE_HOST_DEVICE constexpr int warp_column(int thread) noexcept { return thread / warp_threads % 4 * 32; }
FASTMOE_HOST_DEVICE constexpr int sum_row(int thread, int i, int v) noexcept
{
    return warp_row(thread) + (2 * i + v / 2) * 8 + thread % warp_threads / 4;
}

/// bfloat16 and half: tensor cores.
template <class Element>
struct arithmetic {
    static FASTMOE_HOST_DEVICE constexpr int sum_column(int thread, int j, int v) noexcept
    {
        return warp_column(thread) + j * 8 + 2 * (thread % 4) + v % 2;
    }
    static constexpr bool pairs = true; ///< columns of v = 0, 1 and of v = 2, 3 are neighbours
    static constexpr int resident = 2;  ///< blocks for which a multiprocessor has registers

    template <lie how_a, lie how_b, thread_block Block>
    static FASTMOE_HOST_DEVICE void add_stage(Block& block, const std::byte* a, const std::byte* b, sums& c)
    {
        const int lane = block.thread() % warp_threads, low = lane % 8, middle = lane / 8 % 2, high = lane / 16;
        const int m = warp_row(block.thread()), n = warp_column(block.thread());
        FASTMOE_KEEP_LOOP
        for (int k = 0; k < stage_depth<Element>; k += 16) {
            std::uint32_t columns[2][4]; // of B: two blocks of 8 columns, each over 16 depth steps
            FASTMOE_UNROLL
            for (int j = 0; j < 2; ++j) {
                if constexpr (how_b == lie::deep) block.load(columns[j], b + chunk_at<Element, how_b>(n + 16 * j + low + 8 * high, k / 8 + middle));
                else block.load_transposed(columns[j], b + chunk_at<Element, how_b>(k + low + 8 * middle, (n + 16 * j) / 8 + high));
            }
            FASTMOE_UNROLL
            for (int i = 0; i < 4; ++i) {
                std::uint32_t rows[4];
                if constexpr (how_a == lie::deep) block.load(rows, a + chunk_at<Element, how_a>(m + 16 * i + low + 8 * middle, k / 8 + high));
                else block.load_transposed(rows, a + chunk_at<Element, how_a>(k + low + 8 * high, (m + 16 * i) / 8 + middle));
                FASTMOE_UNROLL
                for (int j = 0; j < 4; ++j)
                    block.template multiply<Element>(c.of[i][j], rows, columns[j / 2][2 * (j % 2)], columns[j / 2][2 * (j % 2) + 1]);
            }
        }
    }
};

/// float: multiply-adds in the order of the depth, never TF32.
template <>
struct arithmetic<float> {
    static FASTMOE_HOST_DEVICE constexpr int sum_column(int thread, int j, int v) noexcept
    {
        return warp_column(thread) + (2 * j + v % 2) * 4 + thread % 4;
    }
    static constexpr bool pairs = false;
    static constexpr int resident = 1;

    template <lie how_a, lie how_b, thread_block Block>
    static FASTMOE_HOST_DEVICE void add_stage(Block& block, const std::byte* a, const std::byte* b, sums& c)
    {
        FASTMOE_KEEP_LOOP
        for (int k = 0; k < stage_depth<float>; k += steps) {
            float columns[8][steps];
            FASTMOE_UNROLL
            for (int j = 0; j < 8; ++j) read<how_b>(columns[j], b, sum_column(block.thread(), j / 2, j % 2), k);
            FASTMOE_UNROLL
            for (int i = 0; i < 8; ++i) {
                float row[steps];
                read<how_a>(row, a, sum_row(block.thread(), i / 2, i % 2 * 2), k);
                FASTMOE_UNROLL
                for (int j = 0; j < 8; ++j)
                    FASTMOE_UNROLL
                    for (int step = 0; step < steps; ++step) c.of[i / 2][j / 2][i % 2 * 2 + j % 2] += row[step] * columns[j][step];
            }
        }
    }

private:
    static constexpr int steps = 2; ///< of the depth, that are in registers at a time

    /// So many of one row of an operand.
    template <lie how>
    static FASTMOE_HOST_DEVICE void read(float (&out)[steps], const std::byte* operand, int row, int k)
    {
        if constexpr (how == lie::deep) {
            std::memcpy(out, __builtin_assume_aligned(operand + chunk_at<float, how>(row, k / 4) + k % 4 * 4, sizeof out), sizeof out);
        } else {
            FASTMOE_UNROLL
            for (int step = 0; step < steps; ++step)
                std::memcpy(&out[step], operand + chunk_at<float, how>(k + step, row / 4) + row % 4 * 4, sizeof(float));
        }
    }
};

/// Adds all stages to c. Copies of two stages are under way while one is summed; shared memory is free at the end.
template <class Element, thread_block Block, class A, class B>
FASTMOE_HOST_DEVICE void sum_tile(Block& block, const A& a, const B& b, int64_t depth, sums& c)
{
    const int steps = static_cast<int>((depth + stage_depth<Element> - 1) / stage_depth<Element>);
    const auto stage = [&block](int s) { return block.shared() + s % stages * stage_bytes; };
    const auto bring = [&](int s) {
        if (s < steps) {
            const int64_t first = int64_t{s} * stage_depth<Element>;
            a.bring(block, stage(s), first);
            b.bring(block, stage(s) + operand_bytes, first);
        }
        block.commit();
    };
    FASTMOE_UNROLL
    for (int s = 0; s < stages - 1; ++s) bring(s);
    for (int s = 0; s < steps; ++s) {
        block.template wait<stages - 2>();
        block.sync(); // stage s is there, and all are done with the one before, which the next copies overwrite
        bring(s + stages - 1);
        arithmetic<Element>::template add_stage<A::how, B::how>(block, stage(s), stage(s) + operand_bytes, c);
    }
    block.template wait<0>();
    block.sync();
}

} // namespace fastmoe::inline FASTMOE_ABI::detail::block
