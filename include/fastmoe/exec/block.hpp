// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Blocks: threads that share memory and multiply small matrices together, a warp at a time. What needs tensor cores is
/// written over this concept, so that the tests run it without a GPU, an instruction at a time.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>

#include <fastmoe/core/tensor.hpp>

namespace fastmoe::inline FASTMOE_ABI {

inline constexpr int block_threads = 256; ///< of every block: eight warps
inline constexpr int warp_threads = 32;

namespace detail {
/// Along which dimension of a product an operand is contiguous: its depth, or its rows.
enum class lie { deep, wide };
} // namespace detail

/// One thread's view of its block. All threads of a warp, or of the block, call what says so together.
///
///     b.thread()                   in [0, block_threads)
///     b.index(), b.count()         of the block, and how many there are: the executor's choice
///     b.shared()                   the block's memory, aligned to 128 bytes
///     b.sync()                     the block: what its threads wrote there is visible to all
///     b.copy_line(to, from)        begins to copy 16 bytes from memory to shared memory, both aligned to 16
///     b.commit()                   ends this thread's group of copies; empty ones count
///     b.wait<n>()                  all of this thread's groups but the last n have arrived; sync() shows them to others
///     b.load(r, line)              the warp: four 8x8 matrices of 16-bit elements. Lane 8 m + i names line i of matrix m, 16
///                                  bytes in shared memory. r[m]: elements (lane / 4, 2 (lane % 4)) and the next, low half first
///     b.load_transposed(r, line)   the same of the transposed matrices: r[m] has (2 (lane % 4), lane / 4) and the one below
///     b.multiply<T>(c, a, b0, b1)  the warp: C (16,8) += A (16,16) B (16,8), in float, of bfloat16 or half. With g = lane / 4
///                                  and t = lane % 4, c: (g, 2t) (g, 2t+1) (g+8, 2t) (g+8, 2t+1); a: pairs of columns at
///                                  (g, 2t) (g+8, 2t) (g, 2t+8) (g+8, 2t+8); b0, b1: pairs of rows at (2t, g) and (2t+8, g)
///
/// Of NVIDIA's parallel thread execution instruction set: cp.async, ldmatrix, and mma.m16n8k16.
template <class B>
concept thread_block = requires(B b, void* to, const void* from, const std::byte* line, std::uint32_t (&r)[4]) {
    { b.thread() } -> std::same_as<int>;
    { b.index() } -> std::same_as<int64_t>;
    { b.count() } -> std::same_as<int64_t>;
    { b.shared() } -> std::same_as<std::byte*>;
    b.sync();
    b.copy_line(to, from);
    b.commit();
    b.template wait<1>();
    b.load(r, line);
    b.load_transposed(r, line);
};

namespace detail {
struct block_archetype {
    static constexpr int resident = 1;
    template <thread_block Block>
    FASTMOE_HOST_DEVICE void operator()(Block&) const
    {
    }
};
} // namespace detail

/// ex.for_each_block(tasks, f, bytes) queues f(block) on as many blocks as suit the device and no more than tasks, with
/// so many bytes of shared memory each. Block i is to do the tasks i, i + count, i + 2 count, ..., whatever the count is.
/// F::resident of them share a multiprocessor and its registers.
/// ex.has_blocks(): whether the device is one that can. Executor::always_has_blocks, if it is true, says it of every device
/// for which this is compiled, so that nothing else is.
template <class Executor>
concept runs_blocks = requires(Executor& ex, int64_t tasks) {
    ex.for_each_block(tasks, detail::block_archetype{}, tasks);
    { ex.has_blocks() } -> std::same_as<bool>;
};

template <class Executor>
inline constexpr bool always_runs_blocks = requires { requires Executor::always_has_blocks; };

} // namespace fastmoe::inline FASTMOE_ABI
