// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// An executor whose teams are those of a GPU: wide_team, over 32 or 256 fibers, as team_shape cuts rows there. What a row
/// functor does for many lanes is so put to the proof without a GPU, by the very source that runs there. Found out are lanes
/// that do not meet, scratch beyond the hint, and, since another lane begins each time, many a missing sync().
#pragma once

#include "executors.hpp"

#if !defined(FASTMOE_TEST_CUDA) // nvcc takes no fibers

#include <cstring>
#include <stdexcept>
#include <string>

#include <fastmoe/exec/host_faults.hpp>
#include <fastmoe/exec/wide_team.hpp>

#include "fibers.hpp"
#include "sanitizers.hpp"

namespace support {

/// The lanes of one team.
class fiber_team : fibers {
public:
    static constexpr int warp = 32, most = 256;

    /// @param turn  which lane begins
    explicit fiber_team(std::uint64_t turn) : turn_(turn) {}

    /// f(lane) on each lane; once.
    template <class F>
    void run(int lanes, const F& f)
    {
        lanes_ = lanes;
        take_turns(static_cast<std::size_t>(lanes), 256 << 10, [this, &f] { f(now()); }, [this] { return static_cast<std::size_t>(turn_ += 7); },
                   [](bool) {});
        if (!complaint().empty()) throw std::logic_error(complaint());
    }
    int lanes() const { return lanes_; }
    void sync()
    {
        meet(all_, lanes_, [] {});
    }
    void hand(int lane, const void* value, std::size_t bytes)
    {
        std::memcpy(handed_[lane], value, bytes);
        meet(warps_[lane / warp], warp, [] {});
    }
    void take(int lane, void* value, std::size_t bytes, int other)
    {
        if (other < 0 || other >= warp) return complain("a value was asked of no lane of the warp");
        std::memcpy(value, handed_[lane / warp * warp + other], bytes);
        meet(warps_[lane / warp], warp, [] {});
    }
    unsigned char* slots(int set) { return slots_[set]; }

private:
    int lanes_ = 0;
    std::uint64_t turn_;
    meeting all_, warps_[most / warp];
    unsigned char handed_[most][32];
    alignas(32) unsigned char slots_[2][32 * most / warp];
};

struct fiber_lanes {
    static constexpr int warp = fiber_team::warp;
    fiber_team* team;
    int own;

    FASTMOE_HOST_DEVICE int lanes() const noexcept { return team->lanes(); }
    FASTMOE_HOST_DEVICE int lane() const noexcept { return own; }
    FASTMOE_HOST_DEVICE void sync() const { team->sync(); }
    template <class T>
    FASTMOE_HOST_DEVICE T from(const T& value, int other) const
    {
        T out = value;
        team->hand(own, &value, sizeof(T));
        team->take(own, static_cast<void*>(&out), sizeof(T), other);
        return out;
    }
    template <class T>
    FASTMOE_HOST_DEVICE T* slot(int set, int w) const noexcept
    {
        return reinterpret_cast<T*>(team->slots(set)) + w;
    }
};

/// The executor. Its calls return when the work is done.
class warps {
public:
    warps() : scratch_(static_cast<std::byte*>(heap_.allocate(scratch_bytes))) {}
    warps(const warps&) = delete;
    warps& operator=(const warps&) = delete;
    ~warps() { heap_.deallocate(scratch_, scratch_bytes); }

    /// Memory is poisoned: NaN, or -1.
    void* allocate(int64_t bytes)
    {
        void* out = heap_.allocate(bytes);
        if (bytes > 0) std::memset(out, 0xff, static_cast<std::size_t>(bytes));
        return out;
    }
    void deallocate(void* memory, int64_t bytes) noexcept { heap_.deallocate(memory, bytes); }
    void copy_to_host(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, static_cast<std::size_t>(bytes)); }

    template <class F>
    void for_each(int64_t n, const F& f)
    {
        for (int64_t i = n - 1; i >= 0; --i) f(i);
    }
    template <class F>
    void for_each_row(int64_t n, const F& f, fastmoe::row_hint hint)
    {
        const auto shape = fastmoe::team_shape::of(hint);
        for (int64_t row = n - 1; row >= 0; --row) {
            std::memset(static_cast<void*>(scratch_), 0xff, scratch_bytes);
            fiber_team lanes(static_cast<std::uint64_t>(row));
            lanes.run(shape.lanes, [&](int lane) {
                fastmoe::wide_team<fiber_lanes> team({&lanes, lane}, scratch_);
                F copy = f; // as every thread of a GPU has its own
                copy(team, row);
            });
            for (int64_t i = 0, end = (hint.scratch_bytes + 63) / 64 * 64; i < 64; ++i)
                if (scratch_[end + i] != std::byte{0xff}) throw std::logic_error("scratch beyond the hint was written");
        }
    }

    fastmoe::fault_recorder faults() { return faults_.recorder(); }
    void deliver_faults() { faults_.deliver(); }
    void synchronize() { deliver_faults(); }

private:
    static constexpr int64_t scratch_bytes = fastmoe::team_scratch_bytes + 256;

    fastmoe::host_memory heap_;
    std::byte* scratch_;
    fastmoe::host_faults faults_;
};

static_assert(fastmoe::executor<warps>);

template <>
inline constexpr bool takes_turns<warps> = true;
template <>
struct column<warps> {
    static constexpr const char* name = "warps";
    static bool available() { return true; }
    static warps make() { return warps(); }
};

} // namespace support
#endif

#if FASTMOE_UNDER_TSAN || defined(FASTMOE_TEST_CUDA) // ThreadSanitizer does not know of fibers
#define FASTMOE_RUNS_WARPS 0
#define FASTMOE_CELLS_AND_WARPS FASTMOE_CELLS
#define FASTMOE_EXECUTORS_AND_WARPS FASTMOE_EXECUTORS
#else
#define FASTMOE_RUNS_WARPS 1
/// FASTMOE_CELLS, and this executor with each dtype.
#define FASTMOE_CELLS_AND_WARPS FASTMOE_CELLS, FASTMOE_COLUMN(::support::warps)
/// FASTMOE_EXECUTORS, and this one.
#define FASTMOE_EXECUTORS_AND_WARPS FASTMOE_EXECUTORS, ::support::cell<::support::warps, float>
#endif

namespace support {
#if FASTMOE_RUNS_WARPS
using warps_or_lanes = warps;
#else
using warps_or_lanes = lanes;
#endif
} // namespace support
