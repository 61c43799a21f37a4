// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Clusters of blocks as Hopper has them: warpgroups that multiply out of shared memory while another one brings operands
/// there, and blocks that bring for each other. What needs them is written over this concept, so that the tests run it
/// without a GPU, an instruction at a time. For what every device since Ampere has see block.hpp.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>

#include <fastmoe/core/tensor.hpp>
#include <fastmoe/exec/block.hpp>

namespace fastmoe::inline FASTMOE_ABI {

inline constexpr int warpgroup_threads = 128;
inline constexpr int cluster_warpgroups = 3; ///< of every block: the first brings, the others multiply
inline constexpr int cluster_block_threads = cluster_warpgroups * warpgroup_threads;

/// A place in shared memory where threads, and copies, report that they are done. It counts in phases: a phase ends when
/// as many have arrived as init() said and all bytes that are expected have come. The first phase has parity 0.
using barrier_word = std::uint64_t;

/// One thread's view of its block. What is said of a warpgroup is called by its 128 threads together.
///
///     b.thread(), b.warpgroup()     in the block
///     b.cluster(), b.clusters()     which cluster this is, and how many there are: the executor's choice
///     b.rank()                      of the block in its cluster
///     b.shared()                    the block's memory, aligned to 1024 bytes; at the same place in all blocks of a cluster
///     b.init(w, n)                  barrier w is for n arrivals a phase; sync_cluster() shows it to others
///     b.sync_cluster()              all threads of the cluster
///     b.arrive(w, rank)             at that barrier in the block of that rank
///     b.expect(w, bytes)            arrives, and adds to the bytes that the phase waits for
///     b.wait(w, parity)             until the phase of that parity has ended; at once if it is the one before the current
///     b.copy_line(to, from, bytes)  begins to copy 16 bytes from memory, or to clear them if bytes is 0: nothing is read then
///     b.arrive_with_lines(w)        arrives when this thread's lines up to now are there
///     b.copy_box(to, map, w, x, y, z, ranks)  begins to copy a box whose first element is (x, y, z), zeros where it is outside,
///                                   to that place in each block of the mask and counts its bytes at w there; 0: in this block
///     b.show_lines()                what is written and waited for is visible to multiply() of this thread
///     b.begin_products(), b.commit_products(), b.wait_products<n>()   the warpgroup: multiply() calls make groups; all but
///                                   the last n of them are done. Nobody touches sums in between
///     b.multiply<T, N, a, b>(c, from_a, from_b)   the warpgroup: C (64,N) += A (64,16) B (N,16)^T in float, of bfloat16 or
///                                   half, out of shared memory; of float8_e4m3 (64,32) and (N,32), which lie deep. With warp w,
///                                   g = lane / 4, t = lane % 4: c[4 i + v] is row 16 w + g + 8 (v / 2), column 8 i + 2 t + v % 2.
///                                   from_a, from_b: see operand_word(). multiply<T, N, a, b, false>: C is overwritten
///     b.hold(c)                     uses of sums before it are not moved behind it, nor the other way
///     b.give_registers<n>(), b.take_registers<n>()   the warpgroup: how many it keeps
///     b.sync_warp()                 the warp
///     b.exchange(v, mask)           the warp: v of the lane whose number differs in the mask's bits
///     b.broadcast(v, lane)          the warp: v of that lane, which each lane may choose
///
/// Of NVIDIA's parallel thread execution instruction set: mbarrier, cp.async, cp.async.bulk.tensor, wgmma, setmaxnreg, shfl.
template <class B, class Map>
concept cluster_block = requires(B b, const Map& map, void* to, const void* from, barrier_word* w, std::uint32_t v, float (&c)[8]) {
    { b.thread() } -> std::same_as<int>;
    { b.warpgroup() } -> std::same_as<int>;
    { b.cluster() } -> std::same_as<int64_t>;
    { b.clusters() } -> std::same_as<int64_t>;
    { b.rank() } -> std::same_as<int>;
    { b.shared() } -> std::same_as<std::byte*>;
    b.init(w, 1);
    b.sync_cluster();
    b.arrive(w, 0);
    b.expect(w, 0);
    b.wait(w, v);
    b.copy_line(to, from, 16);
    b.arrive_with_lines(w);
    b.copy_box(to, map, w, 0, 0, 0, v);
    b.show_lines();
    b.begin_products();
    b.commit_products();
    b.template wait_products<0>();
    b.hold(c);
    b.template give_registers<40>();
    b.template take_registers<232>();
    { b.address(to) } -> std::same_as<std::uint32_t>;
    b.sync_warp();
    { b.exchange(v, 1) } -> std::same_as<std::uint32_t>;
    { b.broadcast(v, 1) } -> std::same_as<std::uint32_t>;
};

/// The word that tells multiply() where an operand is and how it lies: start, distance of the next 64 rows where it lies wide,
/// distance of the next eight lines, all in 16 bytes, and that chunks of 16 bytes change places within 128: chunk c of a
/// line is at c ^ (line % 8), lines being counted from a multiple of 1024 bytes.
FASTMOE_HOST_DEVICE constexpr std::uint64_t operand_word(std::uint32_t address, std::uint32_t next_rows, std::uint32_t next_lines) noexcept
{
    constexpr std::uint64_t swizzle_128 = 1;
    return ((address & 0x3ffff) >> 4) | (static_cast<std::uint64_t>(next_rows >> 4) << 16) |
           (static_cast<std::uint64_t>(next_lines >> 4) << 32) | (swizzle_128 << 62);
}

/// A matrix of 16-bit elements, or of bytes, for each of several experts, and the box of it that copy_box() copies: columns x
/// rows. data and the strides are of whole 16 bytes.
struct box_source {
    const void* data = nullptr;
    int64_t extent[3] = {};  ///< x, y, z: elements
    int64_t stride[2] = {};  ///< bytes from a y, and from a z, to the next
    int box[2] = {};         ///< x: the 128 bytes of a line, in elements; y: up to 256
    int element_bytes = 2;   ///< or 1
};

/// ex.for_each_cluster(tasks, f, bytes) queues f(block) on clusters of F::cluster blocks, as many as suit the device and no
/// more than tasks, each block with so many bytes of shared memory. Cluster i is to do the tasks i, i + clusters, ....
/// ex.describe(box_source) makes what copy_box() takes: Executor::box_map, part of f, in memory that does not move.
/// ex.template has_clusters<F>(): whether the device is one that can, and f was compiled for it.
template <class Executor>
concept runs_clusters = requires(Executor& ex, const box_source& source) {
    typename Executor::box_map;
    { ex.describe(source) } -> std::same_as<typename Executor::box_map>;
};

} // namespace fastmoe::inline FASTMOE_ABI
