// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Whether two threads touch a byte, one of them writing it, with nothing that orders the two: found by what orders them, and not by
// what happened to come first. See "FastTrack", Flanagan and Freund 2009.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "support/emulator/device.hpp"

namespace emulator {

enum class access_kind : std::uint8_t { read, write, atomic };

/// Of one launch. Each thread knows up to which time it has seen the work of each other; barriers pass that on. So do
/// mbarriers, from who arrives to who waits; what copies and products do counts as the work of agents of their own, of which
/// only those know who wait for them. Shuffles and votes order nothing. Blocks of two clusters know nothing of each other.
/// Clusters of more than 1024 threads are looked at by warps: what lanes of one warp do to each other is not seen there.
class race_check {
public:
    using agent = std::uint16_t;
    using moment = std::uint32_t;

    explicit race_check(cluster& c);
    void begin(); ///< the threads of the next cluster, with shared memory of their own

    void access(warp& w, const instruction& i, int lane, const std::byte* at, std::uint32_t bytes, access_kind kind);
    /// A copy into [at, at + bytes) that the lane has asked for: until it is there, nobody may look at it.
    void open(warp& w, const instruction& i, int lane, const std::byte* at, std::uint32_t bytes);
    void look(warp& w, const instruction& i, int lane, const std::byte* at, std::uint32_t bytes); ///< as a read, which leaves no trace
    void close(agent by, const std::byte* at, std::uint32_t bytes, std::uint32_t line);
    void note_read(agent by, const std::byte* at, std::uint32_t bytes);

    void meet(warp& w, std::uint32_t lanes);                                ///< bar.warp.sync
    void meet(const std::vector<std::pair<const warp*, std::uint32_t>>& w); ///< lanes of several warps, at bar.sync
    void arrive_cluster(const warp& w, std::uint32_t lanes);
    void end_cluster_phase();
    void leave_cluster_barrier(const warp& w, std::uint32_t lanes);

    void init(warp& w, const instruction& i, int lane, const std::byte* barrier);
    /// @param all  whether the barrier is told all that the thread knows, or of copies and products alone
    void arrive(warp& w, const instruction& i, int lane, const std::byte* barrier, bool all);
    void end_phase(const std::byte* barrier);
    void wait(warp& w, const instruction& i, int lane, const std::byte* barrier);
    agent of_barrier(const std::byte* barrier); ///< who does the copies that tell it
    void tell(const std::byte* barrier);        ///< such a copy is done

    moment ask_for_product() { return now_++; }
    agent of_products(const warp& w) const { return static_cast<agent>(first_products_ + number(w)); }
    agent of_lane(const warp& w, int lane) const
    {
        return static_cast<agent>(lanes_ ? number(w) * 32 + static_cast<unsigned>(lane) : number(w));
    }
    /// An operand of products that were asked for at `since`: it was there by then, and nobody has touched it.
    void read_by_products(warp& w, const instruction& i, const std::byte* at, std::uint32_t bytes, moment since);
    void end_products(const warp& w);

private:
    struct cell {
        moment written = 0, read = 0, changed = 0; ///< the last by an atomic
        std::uint32_t line = 0;                    ///< that wrote or changed
        agent writer = 0, reader = 0, changer = 0;
    };
    struct readers { ///< lanes of one warp, or one other agent
        agent group;
        moment when;
        std::uint32_t lanes;
    };
    struct barrier {
        std::vector<moment> gathered, over;
        agent copies = 0;
    };
    static constexpr agent open_bit = 0x4000, agent_bits = 0x3fff, several = 0xffff, other_group = 0x8000;
    static constexpr unsigned most_barriers = 128;
    static constexpr std::size_t page = 4096;

    unsigned number(const warp& w) const { return w.home->rank * warps_ + static_cast<unsigned>(w.number); }
    moment* row(agent a) { return known_.data() + std::size_t{a} * agents_; }
    bool knows(const moment* row, agent self, agent other, moment when) const
    {
        return when >= begin_ && (other == self || row[other] >= when);
    }
    bool knows(const moment* row, agent self, const readers& r) const;
    cell* find(const std::byte* at);
    void check_written(warp& w, const instruction& i, int lane, const cell& c, const std::byte* at, access_kind kind, const moment* row,
                       agent self);
    void check_readers(warp& w, const instruction& i, int lane, cell& c, const std::byte* at, const moment* row, agent self);
    void add_reader(cell& c, agent by, const moment* row);
    readers group_of(agent a, moment when) const;
    barrier& at(const std::byte* word);
    [[noreturn]] void report(warp& w, const instruction& i, int lane, const std::byte* at, const std::string& what);
    std::string name(agent a, moment when) const;
    std::string line_of(const cell& c) const;
    static void join(moment* into, const moment* from, std::size_t n);
    template <class F>
    void each_agent(const warp& w, std::uint32_t lanes, F&& f) const; ///< f(agent) of these lanes, or of the warp

    cluster& c_;
    unsigned warps_, first_products_, first_barrier_, barriers_used_ = 0;
    bool lanes_; ///< whether agents are lanes, or else warps
    std::size_t agents_;
    moment now_ = 1, begin_ = 1;
    std::vector<moment> known_, gathered_, over_; ///< (agents that run, agents); the cluster's barrier
    std::vector<std::vector<cell>> shared_;       ///< of each block
    std::unordered_map<std::uintptr_t, std::unique_ptr<cell[]>> pages_;
    std::uintptr_t last_number_ = 0;
    cell* last_page_ = nullptr;
    std::unordered_map<const cell*, std::vector<readers>> lists_;
    std::unordered_map<const std::byte*, barrier> words_;
};

} // namespace emulator
