// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Blocks without a GPU: every thread of a block is a fiber, and the instructions of exec/block.hpp are written from NVIDIA's
/// description of them, an element at a time. Found out are: threads of a warp that do not call the same thing together,
/// lines that are not aligned, copies that are read before they were waited for, memory beyond what was asked for, small
/// matrices whose lines meet in a bank, and tiles that depend on how many blocks there are.
#pragma once

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/exec/block.hpp>

#include "fibers.hpp"

namespace support {

class fiber_block : fibers {
public:
    fiber_block(std::int64_t index, std::int64_t count, std::int64_t shared_bytes)
        : index_(index), count_(count), bytes_(shared_bytes), memory_(static_cast<std::size_t>(shared_bytes) + 256)
    {
        std::memset(memory_.data(), 0xff, memory_.size());
        shared_ = memory_.data() + (128 - reinterpret_cast<std::uintptr_t>(memory_.data()) % 128);
    }

    /// Calls f on every thread, each in a fiber; throws what any of them has done wrong.
    template <class F>
    void run(const F& f)
    {
        threads_.resize(fastmoe::block_threads);
        take_turns(threads_.size(), 256 << 10, [this, &f] { f(*this); }, [] { return std::size_t{0}; }, [](bool) {});
        for (fiber& each : threads_)
            if (complaint().empty() && !each.copies.empty()) complain("copies that nobody has waited for");
        for (std::size_t i = 0; i < 128; ++i) // before and after what was asked for
            if (complaint().empty() && ((shared_ - 1 - i >= memory_.data() && shared_[-1 - static_cast<std::ptrdiff_t>(i)] != std::byte{0xff}) ||
                                       (shared_ + bytes_ + i < memory_.data() + memory_.size() && shared_[bytes_ + static_cast<std::ptrdiff_t>(i)] != std::byte{0xff})))
                complain("shared memory beyond what was asked for was written");
        if (!complaint().empty()) throw std::logic_error(complaint());
    }
    int bank_conflicts() const { return conflicts_; }
    std::int64_t products() const { return products_; }
    std::int64_t lines() const { return lines_; }

    int thread() const { return now(); }
    std::int64_t index() const { return index_; }
    std::int64_t count() const { return count_; }
    std::byte* shared() const { return shared_; }

    void sync()
    {
        meet(block_, static_cast<int>(threads_.size()), [] {});
    }
    void copy_line(void* to, const void* from)
    {
        if (reinterpret_cast<std::uintptr_t>(to) % 16 || reinterpret_cast<std::uintptr_t>(from) % 16) complain("a copy is not aligned");
        if (to < shared_ || static_cast<std::byte*>(to) + 16 > shared_ + bytes_) return complain("a copy goes elsewhere");
        ++lines_;
        std::memset(to, 0xff, 16); // until it arrives
        threads_[static_cast<std::size_t>(now())].open.push_back({to, from});
    }
    void commit()
    {
        fiber& mine = threads_[static_cast<std::size_t>(now())];
        mine.copies.push_back(std::exchange(mine.open, {}));
    }
    template <int n>
    void wait()
    {
        fiber& mine = threads_[static_cast<std::size_t>(now())];
        while (mine.copies.size() > n) {
            for (const auto& [to, from] : mine.copies.front()) std::memcpy(to, from, 16);
            mine.copies.erase(mine.copies.begin());
        }
    }
    void load(std::uint32_t (&r)[4], const std::byte* line) { load(r, line, [](int lane, int half) { return std::pair(lane / 4, 2 * (lane % 4) + half); }); }
    void load_transposed(std::uint32_t (&r)[4], const std::byte* line)
    {
        load(r, line, [](int lane, int half) { return std::pair(2 * (lane % 4) + half, lane / 4); });
    }
    template <class T>
    void multiply(float (&c)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1)
    {
        warp& w = own();
        const int lane = now() % 32;
        for (int i = 0; i < 4; ++i) w.c[lane][i] = c[i], w.a[lane][i] = a[i];
        w.b[lane][0] = b0, w.b[lane][1] = b1;
        meet(w.here, 32, [&] {
            ++products_;
            const auto element = [](std::uint32_t pair, int half) {
                T value;
                const auto bits = static_cast<std::uint16_t>(pair >> (16 * half));
                std::memcpy(static_cast<void*>(&value), &bits, 2);
                return static_cast<float>(value);
            };
            float rows[16][16], columns[16][8];
            for (int l = 0; l < 32; ++l)
                for (int half = 0; half < 2; ++half) {
                    const int g = l / 4, t = 2 * (l % 4) + half;
                    rows[g][t] = element(w.a[l][0], half), rows[g + 8][t] = element(w.a[l][1], half);
                    rows[g][t + 8] = element(w.a[l][2], half), rows[g + 8][t + 8] = element(w.a[l][3], half);
                    columns[t][g] = element(w.b[l][0], half), columns[t + 8][g] = element(w.b[l][1], half);
                }
            for (int l = 0; l < 32; ++l)
                for (int i = 0; i < 4; ++i) {
                    float sum = 0;
                    for (int k = 0; k < 16; ++k) sum += rows[l / 4 + i / 2 * 8][k] * columns[k][2 * (l % 4) + i % 2];
                    w.c[l][i] += sum;
                }
        });
        for (int i = 0; i < 4; ++i) c[i] = w.c[lane][i];
    }

private:
    struct fiber {
        std::vector<std::pair<void*, const void*>> open;
        std::vector<std::vector<std::pair<void*, const void*>>> copies;
    };
    struct warp {
        meeting here;
        const std::byte* lines[32];
        std::uint32_t loaded[32][4], a[32][4], b[32][2];
        float c[32][4];
    };

    warp& own() { return warps_[now() / 32]; }
    template <class Place>
    void load(std::uint32_t (&r)[4], const std::byte* line, const Place& place)
    {
        for (std::uint32_t& each : r) each = 0;
        if (line < shared_ || line + 16 > shared_ + bytes_ || reinterpret_cast<std::uintptr_t>(line) % 16)
            return complain("a line of a small matrix lies elsewhere, or is not aligned");
        warp& w = own();
        const int lane = now() % 32;
        w.lines[lane] = line;
        meet(w.here, 32, [&] {
            for (int matrix = 0; matrix < 4; ++matrix) {
                unsigned banks = 0;
                for (int i = 0; i < 8; ++i) banks |= 1u << (reinterpret_cast<std::uintptr_t>(w.lines[8 * matrix + i]) / 16 % 8);
                if (banks != 0xff) ++conflicts_;
                for (int l = 0; l < 32; ++l) {
                    std::uint32_t pair = 0;
                    for (int half = 0; half < 2; ++half) {
                        const auto [row, column] = place(l, half);
                        std::uint16_t bits;
                        std::memcpy(&bits, w.lines[8 * matrix + row] + 2 * column, 2);
                        pair |= static_cast<std::uint32_t>(bits) << (16 * half);
                    }
                    w.loaded[l][matrix] = pair;
                }
            }
        });
        for (int i = 0; i < 4; ++i) r[i] = w.loaded[lane][i];
    }

    std::int64_t index_, count_, bytes_;
    std::vector<std::byte> memory_;
    std::byte* shared_;
    std::vector<fiber> threads_;
    warp warps_[fastmoe::block_threads / 32];
    meeting block_;
    int conflicts_ = 0;
    std::int64_t products_ = 0, lines_ = 0;
};

static_assert(fastmoe::thread_block<fiber_block>);

/// An executor of the tests, lanes or queued, with blocks: as many as asked for, or as `most` says.
template <class Base>
class fiber_blocks : public Base {
public:
    explicit fiber_blocks(std::int64_t most = 3) : most_(most) {}

    template <class F>
    void for_each_block(std::int64_t tasks, const F& f, std::int64_t shared_bytes)
    {
        static_assert(std::is_trivially_copyable_v<F>);
        const auto work = [this, blocks = std::min(tasks, most_), f, shared_bytes] {
            for (std::int64_t i = blocks - 1; i >= 0; --i) {
                fiber_block block(i, blocks, shared_bytes);
                block.run(f);
                bank_conflicts += block.bank_conflicts();
                products += block.products();
                lines += block.lines();
            }
        };
        if constexpr (requires { this->queue(work); }) this->queue(work);
        else work();
    }
    bool has_blocks() const { return true; }

    int bank_conflicts = 0;
    std::int64_t products = 0; ///< of small matrices, in tensor cores
    std::int64_t lines = 0;    ///< copied asynchronously

private:
    std::int64_t most_;
};

} // namespace support
