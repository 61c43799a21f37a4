// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "support/emulator/device.hpp"

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <sstream>

#include "support/emulator/races.hpp"

namespace emulator {

memory_map& memory_map::instance()
{
    alignas(memory_map) static unsigned char room[sizeof(memory_map)]; // outlives all statics that give memory back
    static memory_map& one = *new (room) memory_map;
    return one;
}
void memory_map::add(const void* at, std::size_t bytes, memory_kind kind)
{
    const std::lock_guard lock(mutex_);
    const auto from = reinterpret_cast<std::uintptr_t>(at);
    ranges_[from] = {from, from + bytes, kind};
}
bool memory_map::remove(const void* at)
{
    const std::lock_guard lock(mutex_);
    return ranges_.erase(reinterpret_cast<std::uintptr_t>(at)) == 1;
}
memory_map::range memory_map::find(std::uintptr_t at) const
{
    const std::lock_guard lock(mutex_);
    auto after = ranges_.upper_bound(at);
    if (after == ranges_.begin()) return {};
    --after;
    return at < after->second.to ? after->second : range{};
}
memory_map::range memory_map::before(std::uintptr_t at) const
{
    const std::lock_guard lock(mutex_);
    auto after = ranges_.upper_bound(at);
    return after == ranges_.begin() ? range{} : (--after)->second;
}

void cluster::fail(const warp& w, const instruction& i, const std::string& what) const
{
    std::ostringstream out;
    out << what << "\n  in " << code->name << "\n  block " << w.home->index << ", warp " << w.number << ", line " << i.line << ": "
        << text->line(i.line);
    throw kernel_error(out.str());
}
void fail(const warp& w, const instruction& i, const std::string& what) { w.home->home->fail(w, i, what); }

void check_align(warp& w, const instruction& i, std::uint64_t at, std::uint32_t bytes)
{
    if (at % bytes != 0) fail(w, i, "misaligned address " + std::to_string(at) + " for " + std::to_string(bytes) + " bytes");
}
void check_waited(const warp& w, const instruction& i)
{
    if (!w.waited)
        fail(w, i, "memory that the kernel before may still use: this one began early, and the warp has not met griddepcontrol.wait");
}
void check_global(warp& w, const instruction& i, std::uintptr_t at, std::uint32_t bytes)
{
    if (!w.waited && memory_map::instance().find(at).to > 0) check_waited(w, i);
    auto& seen = w.home->home->seen[static_cast<std::size_t>(i.number)];
    if (at >= seen.from && at + bytes <= seen.to) return;
    const auto found = memory_map::instance().find(at);
    if (at >= found.from && at + bytes <= found.to) {
        seen = found;
        return;
    }
    const auto in = [&](const std::byte* from, std::size_t size) {
        const auto begin = reinterpret_cast<std::uintptr_t>(from);
        if (at < begin || at + bytes > begin + size) return false;
        seen = {begin, begin + size, memory_kind::device};
        return true;
    };
    cluster& c = *w.home->home;
    if (in(c.parameters, c.code->parameter_bytes) || in(w.home->local.data(), w.home->local.size())) return;
    for (block& b : c.blocks)
        if (in(b.shared, b.shared_bytes)) return;
    std::ostringstream out;
    out << "address 0x" << std::hex << at << std::dec << ", " << bytes << " bytes, is no memory of the device";
    if (const auto near = memory_map::instance().before(at); near.to > near.from && at < near.to)
        out << ": " << at - near.from << " bytes into a piece of " << near.to - near.from;
    else if (near.to > near.from && at - near.to < 65536)
        out << ": " << at - near.to << " bytes behind a piece of " << near.to - near.from;
    fail(w, i, out.str());
}
std::byte* shared_place(warp& w, const instruction& i, std::uint32_t address, std::uint32_t bytes)
{
    block* b = w.home;
    if (address >> rank_shift) { // of another block, or one's own by its rank
        const std::uint32_t rank = (address >> rank_shift) - 1;
        if (rank >= b->home->blocks.size()) fail(w, i, "shared memory of block " + std::to_string(rank) + " of the cluster");
        b = &b->home->blocks[rank];
        address &= (1u << rank_shift) - 1;
    }
    if (address < shared_window || address - shared_window + bytes > b->shared_bytes)
        fail(w, i,
             "shared address " + std::to_string(address) + ", " + std::to_string(bytes) + " bytes; the block has " +
                 std::to_string(shared_window) + " to " + std::to_string(shared_window + b->shared_bytes));
    return b->shared + (address - shared_window);
}

void block::note_write(std::uint32_t address, std::uint32_t bytes, int by)
{
    ++writes;
    const std::uint32_t at = (address & ((1u << rank_shift) - 1)) - shared_window;
    for (std::uint32_t line = at / 16; line <= (at + bytes - 1) / 16; ++line) {
        written[line] = writes;
        writer[line] = static_cast<std::int16_t>(by);
    }
}

namespace {

/// Barrier `id` is over once all that take part are there.
void release_barrier(block& b, unsigned id)
{
    const unsigned expected = b.expected[id] ? b.expected[id] : b.live;
    if (b.arrived[id] == 0 || b.arrived[id] < expected) return;
    b.arrived[id] = 0;
    b.expected[id] = 0;
    std::vector<std::pair<const warp*, std::uint32_t>> met;
    for (warp& w : b.warps) {
        const std::uint32_t before = w.blocked;
        for (std::uint32_t left = w.blocked & ~w.cluster_waiting; left; left &= left - 1) {
            const int lane = std::countr_zero(left);
            const instruction& i = w.code->code[static_cast<std::size_t>(w.lane_pc[lane])];
            if (w.at<std::uint32_t>(i.a)[lane] == id) {
                w.blocked &= ~(1u << lane);
                ++w.lane_pc[lane];
            }
        }
        if (before != w.blocked) met.emplace_back(&w, before & ~w.blocked);
    }
    if (b.home->races) b.home->races->meet(met);
}
void release_cluster(cluster& c)
{
    if (c.cluster_arrived == 0 || c.cluster_arrived < c.cluster_live) return;
    c.cluster_arrived = 0;
    ++c.cluster_phase;
    if (c.races) c.races->end_cluster_phase();
    for (block& b : c.blocks)
        for (warp& w : b.warps) {
            for (std::uint32_t left = w.cluster_waiting; left; left &= left - 1) ++w.lane_pc[std::countr_zero(left)];
            if (c.races) c.races->leave_cluster_barrier(w, w.cluster_waiting);
            w.blocked &= ~w.cluster_waiting;
            w.cluster_waiting = 0;
        }
}

void leave(warp& w, std::uint32_t lanes)
{
    const auto count = static_cast<unsigned>(std::popcount(lanes));
    w.live &= ~lanes;
    w.parked = 0; // those that wait for lanes that have ended look again
    w.home->live -= count;
    w.home->home->cluster_live -= count;
    for (unsigned id = 0; id < 16; ++id) release_barrier(*w.home, id);
    release_cluster(*w.home->home);
}

/// Lanes that go on together: those with the smallest pc, which is where code of one branch meets the other's again.
bool choose(warp& w)
{
    std::uint32_t ready = w.live & ~w.blocked & ~w.parked;
    if (ready & ~w.avoided)
        ready &= ~w.avoided;
    else
        w.avoided = 0;
    if (!ready) return false;
    int least = INT32_MAX;
    for (std::uint32_t left = ready; left; left &= left - 1) least = std::min(least, w.lane_pc[std::countr_zero(left)]);
    w.active = 0;
    for (std::uint32_t left = ready; left; left &= left - 1) {
        const int lane = std::countr_zero(left);
        if (w.lane_pc[lane] == least) w.active |= 1u << lane;
    }
    w.pc = least;
    return true;
}
void keep_places(warp& w)
{
    for (std::uint32_t left = w.active; left; left &= left - 1) w.lane_pc[std::countr_zero(left)] = w.pc;
}

/// Some instructions of one warp. False: it did no more than to look whether it may go on.
bool advance(warp& w, int budget)
{
    if (!choose(w)) return false;
    bool moved = false;
    const instruction* code = w.code->code.data();
    const auto next_stop = [&] {
        int stop = INT32_MAX;
        const std::uint32_t others = w.live & ~w.blocked & ~w.parked & ~w.active;
        for (std::uint32_t left = others; left; left &= left - 1) stop = std::min(stop, w.lane_pc[std::countr_zero(left)]);
        return stop;
    };
    int stop = next_stop();
    const auto again = [&] {
        if (!choose(w)) return false;
        stop = next_stop();
        return true;
    };
    for (int steps = 0; steps < budget; ++steps) {
        const instruction& i = code[w.pc];
        std::uint32_t lanes = w.active;
        if (i.guard != no_slot) lanes &= i.negated ? ~w.predicate(i.guard) : w.predicate(i.guard);
        ++w.steps;
        switch (i.next) {
        case flow::on:
            if (lanes) i.run(w, i, lanes);
            ++w.pc;
            moved = true;
            break;
        case flow::branch:
            if (lanes == w.active) {
                w.pc = i.target;
            } else if (lanes == 0) {
                ++w.pc;
            } else {
                for (std::uint32_t left = w.active; left; left &= left - 1) {
                    const int lane = std::countr_zero(left);
                    w.lane_pc[lane] = lanes >> lane & 1 ? i.target : w.pc + 1;
                }
                if (!again()) return true;
            }
            break;
        case flow::exit:
            if (lanes != w.active) {
                for (std::uint32_t left = w.active & ~lanes; left; left &= left - 1) w.lane_pc[std::countr_zero(left)] = w.pc + 1;
            }
            leave(w, lanes);
            if (!again()) return true;
            moved = true;
            continue;
        case flow::barrier: {
            if (lanes != w.active) fail(w, i, "a barrier under a guard that not all lanes have");
            const std::uint32_t id = w.at<std::uint32_t>(i.a)[std::countr_zero(lanes)];
            if (id >= 16) fail(w, i, "barrier " + std::to_string(id));
            keep_places(w);
            w.blocked |= lanes;
            w.home->arrived[id] += static_cast<unsigned>(std::popcount(lanes));
            if (i.b != no_slot) w.home->expected[id] = w.at<std::uint32_t>(i.b)[std::countr_zero(lanes)];
            release_barrier(*w.home, id);
            if (!again()) return true;
            moved = true;
            continue;
        }
        case flow::cluster_wait:
            if (lanes != w.active || lanes != w.live) fail(w, i, "barrier.cluster without all lanes of the warp");
            if (i.variant == 0) { // arrive
                if (w.home->home->races && i.count) w.home->home->races->arrive_cluster(w, lanes);
                w.cluster_arrival = w.home->home->cluster_phase;
                w.home->home->cluster_arrived += static_cast<unsigned>(std::popcount(lanes));
                release_cluster(*w.home->home);
                ++w.pc;
                moved = true;
                break;
            }
            if (w.cluster_arrival != w.home->home->cluster_phase) { // over
                if (w.home->home->races) w.home->home->races->leave_cluster_barrier(w, lanes);
                ++w.pc;
                moved = true;
                break;
            }
            keep_places(w);
            w.blocked |= lanes;
            w.cluster_waiting |= lanes;
            if (!again()) return true;
            moved = true;
            continue;
        case flow::meeting: {
            const std::uint32_t mask = i.m == no_slot ? w.all : w.at<std::uint32_t>(i.m)[std::countr_zero(lanes ? lanes : w.active)];
            for (std::uint32_t left = w.parked; left; left &= left - 1) {
                const int lane = std::countr_zero(left);
                if (w.lane_pc[lane] != w.pc) continue;
                w.parked &= ~(1u << lane);
                w.active |= 1u << lane;
            }
            lanes = w.active;
            if (i.guard != no_slot) lanes &= i.negated ? ~w.predicate(i.guard) : w.predicate(i.guard);
            if (lanes == 0) {
                ++w.pc;
                break;
            }
            if (const std::uint32_t needed = mask & w.live; (needed & ~lanes) == 0) {
                if (lanes & ~mask) fail(w, i, "a lane that its own mask does not have");
                i.run(w, i, lanes);
                ++w.pc;
                moved = true;
            } else {
                if (lanes != w.active) fail(w, i, "lanes meet under a guard that not all have");
                keep_places(w);
                w.parked |= lanes;
                if (!again()) {
                    if (w.parked && !(w.blocked & w.live))
                        fail(w, i, "lanes wait for others of their warp, which have ended or wait elsewhere");
                    return true;
                }
                continue;
            }
            break;
        }
        case flow::attempt: {
            const std::uint32_t over = lanes ? attempt(w, i, lanes) : 0;
            auto& p = w.predicate(i.d);
            p = (p & ~lanes) | over;
            ++w.pc;
            if (over != lanes) { // let others go first
                keep_places(w);
                w.avoided |= lanes;
                return moved;
            }
            moved = true;
            break;
        }
        case flow::fault:
            if (lanes) fail(w, i, i.run ? "trap" : "an instruction that the emulator does not know");
            ++w.pc;
            break;
        }
        if (w.pc >= stop) {
            keep_places(w);
            if (!again()) return true;
        }
    }
    keep_places(w);
    return true;
}

[[noreturn]] void deadlock(cluster& c)
{
    std::ostringstream out;
    out << "the kernel does not go on: " << c.code->name;
    int shown = 0;
    for (block& b : c.blocks)
        for (warp& w : b.warps)
            if (w.live && shown++ < 40) {
                const int pc = w.lane_pc[std::countr_zero(w.live)];
                const instruction& i = c.code->code[static_cast<std::size_t>(pc)];
                out << "\n  block " << b.index << ", warp " << w.number << ", lanes " << std::hex << w.live << " blocked " << w.blocked
                    << " parked " << w.parked << std::dec << ", line " << i.line << ": " << c.text->line(i.line);
            }
    throw kernel_error(out.str());
}

void fill(warp& w, const std::vector<constant>& constants)
{
    for (const constant& c : constants)
        for (int lane = 0; lane < 32; ++lane)
            if (c.wide)
                w.at<std::uint64_t>(c.at)[lane] = c.value;
            else
                w.at<std::uint32_t>(c.at)[lane] = static_cast<std::uint32_t>(c.value);
}

void fill_specials(warp& w, const cluster& c)
{
    const auto& threads = c.shape.threads;
    for (const special& s : c.code->specials) {
        const auto set = [&](auto value) {
            for (int lane = 0; lane < 32; ++lane)
                w.at<std::uint32_t>(s.at)[lane] = static_cast<std::uint32_t>(value(static_cast<unsigned>(w.number * 32 + lane)));
        };
        const auto axis = static_cast<std::size_t>(s.name.back() - 'x');
        if (s.name.starts_with("%tid."))
            set([&](unsigned t) {
                return axis == 0 ? t % threads[0] : axis == 1 ? t / threads[0] % threads[1] : t / threads[0] / threads[1];
            });
        else if (s.name.starts_with("%ntid."))
            set([&](unsigned) { return threads[axis]; });
        else if (s.name.starts_with("%ctaid."))
            set([&](unsigned) { return w.home->coordinates[axis]; });
        else if (s.name.starts_with("%nctaid."))
            set([&](unsigned) { return c.shape.grid[axis]; });
        else if (s.name == "%laneid")
            set([](unsigned t) { return t % 32; });
        else if (s.name == "%warpid")
            set([](unsigned t) { return t / 32; });
        else if (s.name == "%cluster_ctarank")
            set([&](unsigned) { return w.home->rank; });
        else if (s.name == "%cluster_nctarank")
            set([&](unsigned) { return c.blocks.size(); });
        else if (s.name == "%dynamic_smem_size")
            set([&](unsigned) { return c.shape.dynamic_shared; });
        else if (s.name.starts_with("%lanemask_")) {
            const std::string which = s.name.substr(10);
            set([&](unsigned t) {
                const std::uint32_t own = 1u << t % 32;
                return which == "eq"   ? own
                       : which == "lt" ? own - 1
                       : which == "le" ? own | (own - 1)
                       : which == "gt" ? ~(own | (own - 1))
                                       : ~(own - 1);
            });
        } else
            throw kernel_error("special register " + s.name);
    }
}

} // namespace

void run(const module& text, const kernel& code, const launch_shape& shape, const std::byte* parameters, unsigned seed)
{
    static const char* const watch = std::getenv("FASTMOE_EMULATOR_WATCH");
    const bool watched = watch && *watch;
    const unsigned threads = shape.threads[0] * shape.threads[1] * shape.threads[2], warps = (threads + 31) / 32;
    cluster c;
    c.text = &text;
    c.code = &code;
    c.shape = shape;
    c.random.seed(seed);
    c.late_products = c.random() % 4 != 0 || shape.races;
    // As tensor maps are passed in parameters, these begin where a map may lie.
    std::vector<std::byte> storage(code.parameter_bytes + 256);
    c.parameters = storage.data() + (256 - reinterpret_cast<std::uintptr_t>(storage.data()) % 256) % 256;
    std::memcpy(c.parameters, parameters, code.parameter_bytes);
    c.seen.resize(code.code.size());
    c.blocks.resize(shape.cluster);
    std::optional<race_check> races;
    if (shape.races) c.races = &races.emplace(c);

    // Dynamic shared memory begins behind the static one, aligned as it was declared and no more.
    const std::uint32_t align = code.dynamic_shared_align;
    std::uint32_t dynamic_at = (code.shared_bytes + align - 1) / align * align;
    if (align < 128) dynamic_at += align;
    const std::uint32_t shared_bytes = code.has_dynamic_shared ? dynamic_at + shape.dynamic_shared : code.shared_bytes;
    std::vector<std::vector<std::byte>> registers;
    for (unsigned b = 0; b < shape.cluster; ++b)
        for (unsigned n = 0; n < warps; ++n) {
            registers.emplace_back(code.register_bytes + 64);
            std::memset(registers.back().data(), 0xa5, registers.back().size());
        }
    const unsigned grid = shape.grid[0] * shape.grid[1] * shape.grid[2];
    std::uint64_t steps = 0;
    for (unsigned first = 0; first < grid; first += shape.cluster) {
        c.cluster_live = 0;
        c.cluster_arrived = 0;
        c.pending.clear();
        std::vector<warp*> order;
        for (unsigned rank = 0; rank < shape.cluster; ++rank) {
            block& b = c.blocks[rank];
            b = block{};
            b.home = &c;
            b.rank = rank;
            b.index = first + rank;
            b.coordinates = {b.index % shape.grid[0], b.index / shape.grid[0] % shape.grid[1], b.index / shape.grid[0] / shape.grid[1]};
            b.shared_storage.assign(shared_bytes + 1024, std::byte{0xff}); // NaN, and far from any index
            b.shared = b.shared_storage.data() + (1024 - reinterpret_cast<std::uintptr_t>(b.shared_storage.data()) % 1024) % 1024;
            b.shared_bytes = shared_bytes;
            b.local.assign(std::size_t{code.local_bytes} * warps * 32 + 16, std::byte{0xff});
            b.live = threads;
            c.cluster_live += threads;
            b.warps.resize(warps);
            b.shown.assign(warps, 0);
            b.written.assign(shared_bytes / 16 + 1, 0);
            b.writer.assign(shared_bytes / 16 + 1, -1);
            for (unsigned n = 0; n < warps; ++n) {
                warp& w = b.warps[n];
                w.home = &b;
                w.code = &code;
                w.number = static_cast<int>(n);
                w.waited = !shape.early;
                auto& memory = registers[rank * warps + n];
                w.registers = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64;
                w.all = w.live = threads - n * 32 >= 32 ? ~0u : (1u << (threads - n * 32)) - 1;
                if (first == 0) fill(w, code.constants);
                for (const slot s : code.dynamic_shared)
                    for (int lane = 0; lane < 32; ++lane) w.at<std::uint64_t>(s)[lane] = shared_window + dynamic_at;
                for (const slot s : code.dynamic_shared_short)
                    for (int lane = 0; lane < 32; ++lane) w.at<std::uint32_t>(s)[lane] = shared_window + dynamic_at;
                fill_specials(w, c);
                order.push_back(&w);
            }
        }
        for (auto& s : c.seen) s = {};
        if (races) races->begin();
        while (c.cluster_live > 0) {
            std::shuffle(order.begin(), order.end(), c.random);
            bool moved = false;
            for (warp* w : order)
                if (w->live) moved |= advance(*w, static_cast<int>(20 + c.random() % 400));
            while (!c.pending.empty() && (!moved || c.random() % 3 == 0)) {
                do_pending(c, c.random() % c.pending.size());
                moved = true;
            }
            if (!moved && c.cluster_live > 0) {
                // Lanes that wait to look again, all at one time, are no deadlock if any of them may.
                for (warp* w : order)
                    if (w->live) moved |= advance(*w, 1000);
                if (!moved) deadlock(c);
            }
        }
        while (!c.pending.empty()) do_pending(c, 0);
        for (const warp* w : order) {
            steps += w->steps;
            if (!w->products.empty() || !w->committed.empty()) throw kernel_error("products that nobody waited for: " + code.name);
        }
    }
    if (watched)
        std::fprintf(stderr, "emulator: %s, grid %u, %u threads, %u shared, %llu instructions of warps\n", code.name.c_str(), grid, threads,
                     shape.dynamic_shared, static_cast<unsigned long long>(steps));
}

} // namespace emulator
