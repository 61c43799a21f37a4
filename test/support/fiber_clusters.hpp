// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Clusters without a GPU: every thread is a fiber, and the instructions of exec/cluster.hpp are written from NVIDIA's description
/// of them. Copies arrive, and products are computed, at once or as late as they may, as a seed says; until then their
/// targets hold NaN. Found out are: stages that are overwritten while they are read, or read before they came, barriers
/// that count too much or are never reached, sums that are touched too early, lines that multiply() need not see yet,
/// operands that lie elsewhere than their words say, memory beyond what was asked for, and threads that part.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/exec/cluster.hpp>

#include "fibers.hpp"

namespace support {

/// What a tensor map holds.
struct fiber_box {
    fastmoe::box_source source;
};

class fiber_cluster : fibers {
public:
    fiber_cluster(std::int64_t index, std::int64_t count, int blocks, std::int64_t shared_bytes, unsigned seed)
        : index_(index), count_(count), bytes_(shared_bytes), blocks_(static_cast<std::size_t>(blocks)), random_(seed), late_(seed % 2 == 1)
    {
        for (block& b : blocks_) {
            b.memory.assign(static_cast<std::size_t>(shared_bytes) + 1024 + 256, std::byte{0xff});
            const auto past_guard = reinterpret_cast<std::uintptr_t>(b.memory.data()) + 128;
            b.shared = b.memory.data() + 128 + (1024 - past_guard % 1024);
            b.written.assign(static_cast<std::size_t>(shared_bytes / 16 + 1), 0);
        }
    }

    template <class F>
    void run(const F& f)
    {
        threads_.resize(blocks_.size() * fastmoe::cluster_block_threads);
        take_turns(threads_.size(), 128 << 10, [this, &f] { f(*this); }, [this] { return random_() % threads_.size(); },
                   [this](bool is_stuck) { deliver(is_stuck); });
        if (complaint().empty() && !flying_.empty()) complain("copies that nobody has waited for");
        for (fiber& each : threads_)
            if (complaint().empty() && !each.lines.empty()) complain("lines that nobody has waited for");
        for (const block& b : blocks_) {
            int registers = 0;
            for (const group& g : b.groups) {
                registers += g.registers;
                if (complaint().empty() && (!g.open.empty() || !g.committed.empty())) complain("products that nobody has waited for");
            }
            if (complaint().empty() && registers * fastmoe::warpgroup_threads > 65536) complain("more registers than a multiprocessor has");
            for (std::int64_t i = 0; i < 128; ++i)
                if (complaint().empty() && (b.shared[-1 - i] != std::byte{0xff} || b.shared[bytes_ + i] != std::byte{0xff}))
                    complain("shared memory beyond what was asked for was written");
        }
        if (!complaint().empty()) throw std::logic_error(complaint());
    }
    std::int64_t products() const { return products_; }
    std::int64_t box_bytes() const { return box_bytes_; }
    std::int64_t lines() const { return lines_; }

    int thread() const { return now() % fastmoe::cluster_block_threads; }
    int warpgroup() const { return thread() / fastmoe::warpgroup_threads; }
    std::int64_t cluster() const { return index_; }
    std::int64_t clusters() const { return count_; }
    int rank() const { return now() / fastmoe::cluster_block_threads; }
    std::byte* shared() { return own().shared; }
    std::uint32_t address(const void* p) { return first_address + static_cast<std::uint32_t>(static_cast<const std::byte*>(p) - own().shared); }

    void init(fastmoe::barrier_word* w, int arrivals)
    {
        const auto [at, is_new] = own().barriers.insert({offset(w, 8), {arrivals, arrivals, 0, 0}});
        if (!is_new) complain("a barrier is made twice");
        std::memset(static_cast<void*>(w), 0, 8);
        (void)at;
    }
    void sync_cluster()
    {
        meet(all_, static_cast<int>(threads_.size()), [] {});
    }
    void arrive(fastmoe::barrier_word* w, int rank) { arrive(blocks_.at(static_cast<std::size_t>(rank)), offset(w, 8), 0); }
    void expect(fastmoe::barrier_word* w, int bytes) { arrive(own(), offset(w, 8), bytes); }
    void wait(fastmoe::barrier_word* w, unsigned parity)
    {
        if (parity > 1) complain("a parity is 0 or 1");
        barrier& b = find(own(), offset(w, 8));
        wait_until([&b, parity] { return b.phases % 2 != parity; });
        go_on();
    }
    void copy_line(void* to, const void* from, int bytes)
    {
        if (bytes != 0 && bytes != 16) complain("a line is 16 bytes or none");
        if (reinterpret_cast<std::uintptr_t>(from) % 16) complain("a line is read from memory that is not aligned");
        const std::int64_t at = offset(to, 16);
        lines_ += bytes > 0;
        fiber& mine = threads_[static_cast<std::size_t>(now())];
        std::memset(to, 0xff, 16);
        mine.lines.push_back({rank(), at, bytes ? from : nullptr});
        if (!late_) land(mine);
    }
    void arrive_with_lines(fastmoe::barrier_word* w)
    {
        const std::size_t thread = static_cast<std::size_t>(now());
        const std::int64_t at = offset(w, 8);
        block& mine = own();
        // Lines that begin later do not count: they stay behind.
        auto lines = std::exchange(threads_[thread].lines, {});
        fly([this, lines, at, &mine] {
            for (const line& each : lines) land(each);
            arrive(mine, at, 0);
        });
    }
    void copy_box(void* to, const fiber_box& map, fastmoe::barrier_word* w, int x, int y, int z, std::uint32_t ranks)
    {
        const auto& s = map.source;
        const std::int64_t place = offset(to, 128), at = offset(w, 8);
        const int size = s.element_bytes, bytes = size * s.box[0] * s.box[1];
        if (place % 1024) complain("a box of swizzled lines begins at a multiple of 1024 bytes");
        if (place + bytes > bytes_) return complain("a box goes elsewhere");
        box_bytes_ += bytes;
        if (ranks == 0) ranks = 1u << static_cast<unsigned>(this->rank());
        for (std::size_t rank = 0; rank < 32; ++rank) {
            if (!(ranks >> rank & 1)) continue;
            block& b = blocks_.at(rank);
            std::memset(b.shared + place, 0xff, static_cast<std::size_t>(bytes));
            fly([this, &b, s, place, at, x, y, z, bytes, size, rank] {
                bool has_ended = true;
                for (int t = 0; t < fastmoe::cluster_block_threads; ++t)
                    has_ended &= this->has_ended(rank * fastmoe::cluster_block_threads + static_cast<std::size_t>(t));
                if (has_ended)
                    complain("a box comes to a block that has ended");
                for (int row = 0; row < s.box[1]; ++row)
                    for (int c = 0; c < s.box[0]; ++c) {
                        const std::int64_t px = x + c, py = y + row;
                        std::uint16_t value = 0;
                        if (px >= 0 && px < s.extent[0] && py >= 0 && py < s.extent[1] && z >= 0 && z < s.extent[2])
                            std::memcpy(&value, static_cast<const std::byte*>(s.data) + size * px + py * s.stride[0] + z * s.stride[1],
                                        static_cast<std::size_t>(size));
                        const std::int64_t linear = place + row * 128 + c * size;
                        std::memcpy(b.shared + (linear ^ ((linear >> 7 & 7) << 4)), &value, static_cast<std::size_t>(size));
                    }
                for (std::int64_t l = place / 16; l < (place + bytes) / 16; ++l) b.written[static_cast<std::size_t>(l)] = 0;
                barrier& bar = find(b, at);
                bar.bytes -= bytes;
                turn(bar);
            });
        }
    }
    void show_lines() { threads_[static_cast<std::size_t>(now())].shown = ++time_; }

    void begin_products() { threads_[static_cast<std::size_t>(now())].begun = true; }
    template <class T, int n, fastmoe::detail::lie a, fastmoe::detail::lie b, bool adds = true>
    void multiply(float (&c)[n / 2], std::uint64_t from_a, std::uint64_t from_b)
    {
        static_assert(sizeof(T) == 2 || (a == fastmoe::detail::lie::deep && b == fastmoe::detail::lie::deep), "bytes lie deep");
        fiber& mine = threads_[static_cast<std::size_t>(now())];
        if (!mine.begun) complain("products without begin_products()");
        group& g = own_group();
        const int lane = thread() % fastmoe::warpgroup_threads;
        g.c[lane] = c, g.words[lane] = {from_a, from_b}, g.shown[lane] = mine.shown;
        meet(g.here, fastmoe::warpgroup_threads, [&] {
            for (const auto& each : g.words)
                if (each != g.words[0]) return complain("threads of a warpgroup multiply different operands");
            ++products_;
            product p{std::vector<float*>(g.c, g.c + fastmoe::warpgroup_threads), nullptr};
            if (!g.held.count(g.c[0])) { // what is in registers is out of reach until it is waited for
                auto& sums = g.held[g.c[0]];
                for (float* each : p.c) {
                    sums.insert(sums.end(), each, each + n / 2);
                    std::fill(each, each + n / 2, std::numeric_limits<float>::quiet_NaN());
                }
            }
            const std::uint64_t shown = *std::min_element(g.shown, g.shown + fastmoe::warpgroup_threads);
            p.run = [this, &memory = own(), from_a, from_b, shown, key = g.c[0], &g] {
                constexpr int depth = 32 / static_cast<int>(sizeof(T)); // in here, for clang++
                std::vector<float> left(64 * depth), right(static_cast<std::size_t>(n) * depth);
                read<T, a>(memory, from_a, 64, shown, left);
                read<T, b>(memory, from_b, n, shown, right);
                std::vector<float>& sums = g.held.at(key);
                for (int lane = 0; lane < fastmoe::warpgroup_threads; ++lane)
                    for (int i = 0; i < n / 2; ++i) {
                        const int row = lane / 32 * 16 + lane % 32 / 4 + 8 * (i % 4 / 2), column = i / 4 * 8 + lane % 4 * 2 + i % 2;
                        float sum = 0;
                        for (int k = 0; k < depth; ++k)
                            sum += left[static_cast<std::size_t>(row * depth + k)] * right[static_cast<std::size_t>(column * depth + k)];
                        float& total = sums[static_cast<std::size_t>(lane * (n / 2) + i)];
                        total = adds ? total + sum : sum;
                    }
            };
            if (!late_) p.run(), p.run = nullptr;
            g.open.push_back(std::move(p));
        });
    }
    void commit_products()
    {
        threads_[static_cast<std::size_t>(now())].begun = false;
        group& g = own_group();
        meet(g.here, fastmoe::warpgroup_threads, [&] { g.committed.push_back(std::exchange(g.open, {})); });
    }
    template <int n>
    void wait_products()
    {
        group& g = own_group();
        meet(g.here, fastmoe::warpgroup_threads, [&] {
            while (g.committed.size() > n) {
                for (product& p : g.committed.front())
                    if (p.run) p.run();
                auto done = std::exchange(g.committed.front(), {});
                g.committed.erase(g.committed.begin());
                for (const product& p : done) {
                    const auto uses = [&](const product& other) { return other.c[0] == p.c[0]; };
                    if (!g.held.count(p.c[0]) || std::any_of(g.open.begin(), g.open.end(), uses) ||
                        std::any_of(g.committed.begin(), g.committed.end(), [&](const auto& all) { return std::any_of(all.begin(), all.end(), uses); }))
                        continue;
                    const auto& sums = g.held.at(p.c[0]);
                    const std::size_t each = sums.size() / p.c.size();
                    for (std::size_t lane = 0; lane < p.c.size(); ++lane) std::copy_n(sums.data() + lane * each, each, p.c[lane]);
                    g.held.erase(p.c[0]);
                }
            }
        });
    }
    template <int count>
    void hold(float (&)[count])
    {
    }
    template <int n>
    void give_registers()
    {
        own_group().registers = n;
    }
    template <int n>
    void take_registers()
    {
        own_group().registers = n;
    }
    void sync_warp()
    {
        meet(own().warps[thread() / 32].here, 32, [] {});
    }
    std::uint32_t exchange(std::uint32_t v, int mask) { return broadcast(v, thread() % 32 ^ mask); }
    std::uint32_t broadcast(std::uint32_t v, int from)
    {
        warp& w = own().warps[thread() / 32];
        const int lane = thread() % 32;
        w.given[lane] = v;
        meet(w.here, 32, [&] { std::copy_n(w.given, 32, w.taken); });
        return w.taken[from];
    }

private:
    static constexpr std::uint32_t first_address = 2048; ///< as if the system had taken what is before
    struct line {
        int rank;
        std::int64_t at;
        const void* from;
    };
    struct fiber {
        bool begun = false;
        std::uint64_t shown = 0;
        std::vector<line> lines;
    };
    struct barrier {
        int arrivals, pending;
        std::int64_t bytes;
        std::uint64_t phases;
    };
    struct product {
        std::vector<float*> c;
        std::function<void()> run;
    };
    struct group {
        meeting here;
        float* c[fastmoe::warpgroup_threads];
        std::pair<std::uint64_t, std::uint64_t> words[fastmoe::warpgroup_threads];
        std::uint64_t shown[fastmoe::warpgroup_threads];
        std::vector<product> open;
        std::vector<std::vector<product>> committed;
        std::map<float*, std::vector<float>> held;
        int registers = 168;
    };
    struct warp {
        meeting here;
        std::uint32_t given[32], taken[32];
    };
    struct block {
        std::vector<std::byte> memory;
        std::byte* shared = nullptr;
        std::vector<std::uint64_t> written; ///< when a line came that was no box's
        std::map<std::int64_t, barrier> barriers;
        group groups[fastmoe::cluster_warpgroups];
        warp warps[fastmoe::cluster_block_threads / 32];
    };

    block& own() { return blocks_[static_cast<std::size_t>(rank())]; }
    group& own_group() { return own().groups[warpgroup()]; }
    std::int64_t offset(const void* p, int alignment)
    {
        const std::int64_t at = static_cast<const std::byte*>(p) - own().shared;
        if (at < 0 || at + alignment > bytes_ || at % alignment) complain("a place in shared memory lies elsewhere, or is not aligned");
        return std::clamp<std::int64_t>(at, 0, bytes_ - alignment);
    }
    barrier& find(block& b, std::int64_t at)
    {
        const auto found = b.barriers.find(at);
        if (found != b.barriers.end()) return found->second;
        complain("a barrier was not made");
        return b.barriers.insert({at, {1, 1, 0, 0}}).first->second;
    }
    void turn(barrier& b)
    {
        if (b.pending > 0 || b.bytes != 0) return;
        b.pending = b.arrivals;
        ++b.phases;
        go_on();
    }
    void arrive(block& b, std::int64_t at, int bytes)
    {
        barrier& bar = find(b, at);
        bar.bytes += bytes;
        if (--bar.pending < 0) complain("more arrive at a barrier than it is for");
        turn(bar);
        go_on();
    }
    void land(const line& each)
    {
        block& b = blocks_[static_cast<std::size_t>(each.rank)];
        if (each.from) std::memcpy(b.shared + each.at, each.from, 16);
        else std::memset(b.shared + each.at, 0, 16);
        b.written[static_cast<std::size_t>(each.at / 16)] = ++time_;
    }
    void land(fiber& thread)
    {
        for (const line& each : std::exchange(thread.lines, {})) land(each);
    }
    template <class Event>
    void fly(Event event)
    {
        if (late_) flying_.push_back(std::move(event));
        else event();
    }
    /// Some of what is under way, or all if nothing else goes on.
    void deliver(bool all)
    {
        for (std::size_t i = 0; i < flying_.size();)
            if (all || random_() % 8 == 0) {
                const auto event = std::move(flying_[i]);
                flying_.erase(flying_.begin() + static_cast<std::ptrdiff_t>(i));
                event();
                go_on();
            } else {
                ++i;
            }
    }
    /// Rows x 32 bytes of an operand, as its word says where they lie.
    template <class T, fastmoe::detail::lie how>
    void read(const block& b, std::uint64_t word, int rows, std::uint64_t shown, std::vector<float>& out)
    {
        const std::int64_t start = static_cast<std::int64_t>(word & 0x3fff) << 4, leading = static_cast<std::int64_t>(word >> 16 & 0x3fff) << 4,
                           stride = static_cast<std::int64_t>(word >> 32 & 0x3fff) << 4;
        constexpr int depth = 32 / static_cast<int>(sizeof(T)), bytes = static_cast<int>(sizeof(T));
        if ((word >> 62) != 1 || (word >> 46 & 0xffff) != 0) return complain("an operand's word is of another layout");
        for (int r = 0; r < rows; ++r)
            for (int k = 0; k < depth; ++k) {
                const std::int64_t linear = how == fastmoe::detail::lie::deep
                                                ? start + r / 8 * stride + r % 8 * 128 + bytes * k
                                                : start + r / 64 * leading + k / 8 * stride + k % 8 * 128 + r % 64 * 2;
                const std::int64_t at = (linear ^ ((linear >> 7 & 7) << 4)) - first_address;
                if (at < 0 || at + bytes > bytes_) return complain("an operand lies elsewhere");
                if (b.written[static_cast<std::size_t>(at / 16)] > shown) complain("an operand's lines were not shown to the products");
                T value;
                std::memcpy(static_cast<void*>(&value), b.shared + at, sizeof value);
                out[static_cast<std::size_t>(r * depth + k)] = static_cast<float>(value);
            }
    }

    std::int64_t index_, count_, bytes_;
    std::vector<block> blocks_;
    std::mt19937 random_;
    bool late_;
    std::vector<fiber> threads_;
    std::vector<std::function<void()>> flying_;
    meeting all_;
    std::int64_t products_ = 0, box_bytes_ = 0, lines_ = 0;
    std::uint64_t time_ = 0;
};

static_assert(fastmoe::cluster_block<fiber_cluster, fiber_box>);

/// An executor of the tests with clusters: as many as asked for, or as `most` says.
template <class Base>
class fiber_clusters : public Base {
public:
    using box_map = fiber_box;
    explicit fiber_clusters(std::int64_t most = 3, unsigned seed = 1) : seed_(seed), most_(most) {}

    fiber_box describe(const fastmoe::box_source& source) const
    {
        const auto is = [](bool good, const char* what) {
            if (!good) throw std::logic_error(what);
        };
        is(reinterpret_cast<std::uintptr_t>(source.data) % 16 == 0, "a map's data is aligned to 16 bytes");
        for (const std::int64_t each : source.extent) is(each > 0 && each <= std::int64_t{1} << 32, "a map's extent is 1 to 2^32");
        for (const std::int64_t each : source.stride) is(each > 0 && each % 16 == 0 && each < std::int64_t{1} << 40, "a map's stride is of whole 16 bytes");
        is(source.element_bytes == 1 || source.element_bytes == 2, "a map's elements are of one or two bytes");
        is(source.stride[0] >= source.element_bytes * source.extent[0] && source.stride[1] >= source.stride[0] * source.extent[1], "a map's stride is no less than what it steps over");
        is(source.box[0] * source.element_bytes == 128 && source.box[1] > 0 && source.box[1] <= 256, "a box is 128 bytes by up to 256");
        return {source};
    }
    template <class F>
    bool has_clusters() const
    {
        return true;
    }
    template <class F>
    void for_each_cluster(std::int64_t tasks, const F& f, std::int64_t shared_bytes)
    {
        static_assert(std::is_trivially_copyable_v<F>);
        const auto work = [this, clusters = std::min(tasks, most_), f, shared_bytes] {
            for (std::int64_t i = clusters - 1; i >= 0; --i) {
                fiber_cluster cluster(i, clusters, F::cluster, shared_bytes, seed_++);
                cluster.run(f);
                products += cluster.products();
                box_bytes += cluster.box_bytes();
                lines += cluster.lines();
            }
        };
        if constexpr (requires { this->queue(work); }) this->queue(work);
        else work();
    }

    std::int64_t products = 0;  ///< instructions of a warpgroup
    std::int64_t box_bytes = 0; ///< that left memory in boxes
    std::int64_t lines = 0;     ///< of 16 bytes, that were read

private:
    unsigned seed_;
    std::int64_t most_;
};

} // namespace support
