// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// What runs kernels: the memory that they may touch, warps, blocks and clusters.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/emulator/module.hpp"

namespace emulator {

enum class memory_kind : std::uint8_t { device, managed, pinned };

/// What kernels may touch. Addresses are the host's.
class memory_map {
public:
    struct range {
        std::uintptr_t from = 1, to = 0;
        memory_kind kind = memory_kind::device;
    };
    static memory_map& instance();
    void add(const void* at, std::size_t bytes, memory_kind kind);
    bool remove(const void* at);           ///< false if it is not the begin of any
    range find(std::uintptr_t at) const;   ///< empty if it is in none
    range before(std::uintptr_t at) const; ///< the last that begins there or before

private:
    mutable std::mutex mutex_;
    std::map<std::uintptr_t, range> ranges_;
};

/// The kernel did what is not allowed, or never ends.
struct kernel_error : std::runtime_error {
    using runtime_error::runtime_error;
};

/// Shared memory begins here in the window of a block; what lies before it is the system's.
inline constexpr std::uint32_t shared_window = 1024;
inline constexpr int rank_shift = 24; ///< of an address in the window of a cluster

struct launch_shape {
    std::array<unsigned, 3> grid{1, 1, 1}, threads{1, 1, 1};
    unsigned cluster = 1;
    std::uint32_t dynamic_shared = 0;
    bool races = false; ///< whether they are looked for, which takes its time
    bool early = false; ///< whether it may begin before the kernel before has ended
};

struct block;
struct cluster;
class race_check;

/// A copy by cp.async that has not been done.
struct line_copy {
    std::uint32_t to;
    std::uintptr_t from;
    int bytes; ///< the rest of 16 is zero
    int lane, group, line;
};
/// A wgmma that has not been done: descriptors as they were.
struct product {
    const instruction* what;
    std::uint64_t a, b;
    bool adds;
    std::uint32_t since = 0; ///< when it was asked for, as races count
};

struct warp {
    std::byte* registers = nullptr;
    block* home = nullptr;
    const kernel* code = nullptr;
    int number = 0;
    std::uint32_t all = 0; ///< lanes that it began with
    std::uint32_t live = 0, blocked = 0, parked = 0, avoided = 0, active = 0;
    bool waited = false; ///< for the kernels before, where it began early; or had not to
    int pc = 0;
    int lane_pc[32] = {};
    std::uint32_t cluster_waiting = 0;
    unsigned cluster_arrival = 0; ///< the phase in which it arrived
    std::uint64_t steps = 0;

    std::vector<line_copy> lines;
    int groups[32] = {};
    std::vector<product> products; ///< not committed
    std::vector<std::vector<product>> committed;

    template <class T>
    T* at(slot s) const
    {
        return reinterpret_cast<T*>(registers + s);
    }
    std::uint32_t& predicate(slot s) const { return *at<std::uint32_t>(s); }
};

struct block {
    cluster* home = nullptr;
    unsigned rank = 0, index = 0;
    std::array<unsigned, 3> coordinates{};
    std::vector<std::byte> shared_storage;
    std::byte* shared = nullptr; ///< address shared_window of its window
    std::uint32_t shared_bytes = 0;
    std::vector<warp> warps;
    /// Of each 16 bytes of shared memory, who wrote them last and when: a thread by the count of such writes, a box at 0. What threads
    /// write is for products only behind a fence.proxy.async, theirs or the products' own, of which `shown` has the count.
    std::vector<std::uint32_t> written;
    std::vector<std::int16_t> writer; ///< its warp; -1: a copy that nobody waited for before it told a barrier
    std::uint32_t writes = 0;
    std::vector<std::uint32_t> shown; ///< of each warp
    void note_write(std::uint32_t address, std::uint32_t bytes, int by);
    std::vector<std::byte> local;
    unsigned live = 0; ///< threads
    std::array<unsigned, 16> arrived{}, expected{};
};

/// What a machine of its own does some time later: copies that tell a barrier.
struct pending_copy {
    block* origin;
    int line;
    std::vector<line_copy> lines; ///< cp.async, then an arrival
    bool is_box = false;
    const void* map = nullptr;
    int x = 0, y = 0, z = 0;
    std::uint32_t to = 0, barrier = 0, ranks = 0;
};

struct cluster {
    const module* text = nullptr;
    const kernel* code = nullptr;
    launch_shape shape;
    std::byte* parameters = nullptr;
    std::vector<block> blocks;
    std::vector<pending_copy> pending;
    std::mt19937 random;
    bool late_products = true;
    race_check* races = nullptr; ///< where they are looked for
    unsigned cluster_live = 0, cluster_arrived = 0, cluster_phase = 0;
    std::vector<memory_map::range> seen; ///< by the number of the instruction: where it was last

    [[noreturn]] void fail(const warp& w, const instruction& i, const std::string& what) const;
};

/// Refuses what must not happen while the kernels before may run.
void check_waited(const warp& w, const instruction& i);
/// Checks an address of the host's, for one instruction.
void check_global(warp& w, const instruction& i, std::uintptr_t at, std::uint32_t bytes);
void check_align(warp& w, const instruction& i, std::uint64_t at, std::uint32_t bytes);
std::byte* shared_place(warp& w, const instruction& i, std::uint32_t address, std::uint32_t bytes);
[[noreturn]] void fail(const warp& w, const instruction& i, const std::string& what);

/// @param parameters  as the kernel's text lays them out; copied
/// @throws kernel_error
void run(const module& text, const kernel& code, const launch_shape& shape, const std::byte* parameters, unsigned seed);

// asynchronous.cpp
void do_pending(cluster& c, std::size_t which);
void do_products(warp& w, std::size_t keep);
std::uint32_t attempt(warp& w, const instruction& i, std::uint32_t lanes); ///< those for which the phase is over

} // namespace emulator
