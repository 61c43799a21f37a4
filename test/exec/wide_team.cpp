// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The team of CUDA's warps and blocks, its lanes here being threads: order, arithmetic and meetings, without a GPU.
#include <atomic>
#include <barrier>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/exec/wide_team.hpp>

#include "support/random.hpp"

namespace fm = fastmoe;

namespace {

using fm::int64_t;

/// What the lanes of one team share.
template <int Lanes>
struct shared_by_lanes {
    std::barrier<> all{Lanes};
    unsigned char handed[Lanes][32];
    unsigned char slots[2][Lanes][32];
};

/// Threads in the place of lanes. A value is handed over between two barriers of all: more order than a warp gives, and
/// so ThreadSanitizer looks at the slots alone.
template <int Lanes, int Warp>
struct thread_lanes {
    static constexpr int warp = Warp;
    shared_by_lanes<Lanes>* shared;
    int own;

    static constexpr int lanes() noexcept { return Lanes; }
    int lane() const noexcept { return own; }
    void sync() const { shared->all.arrive_and_wait(); }
    template <class T>
    T from(const T& value, int other) const
    {
        CHECK_MESSAGE((other >= 0 && other < Warp), "no lane ", other);
        std::memcpy(shared->handed[own], &value, sizeof(T));
        sync();
        T out;
        std::memcpy(&out, shared->handed[own / Warp * Warp + other], sizeof(T));
        sync();
        return out;
    }
    template <class T>
    T* slot(int set, int w) const noexcept
    {
        return reinterpret_cast<T*>(shared->slots[set]) + w;
    }
};

/// f(team) on all lanes; returns what each lane returned.
template <int Lanes, int Warp, class F>
auto on_lanes(F f)
{
    using meeting = thread_lanes<Lanes, Warp>;
    const auto shared = std::make_unique<shared_by_lanes<Lanes>>();
    alignas(128) std::byte scratch[1024];
    using result = decltype(f(std::declval<fm::wide_team<meeting>&>()));
    std::vector<result> out(Lanes);
    std::vector<std::thread> threads;
    for (int l = 0; l < Lanes; ++l)
        threads.emplace_back([&, l] {
            fm::wide_team<meeting> team(meeting{shared.get(), l}, scratch);
            out[l] = f(team);
        });
    for (auto& t : threads) t.join();
    return out;
}

constexpr auto add = [](auto a, auto b) { return a + b; };

/// Words strung together: associative, not commutative, so that any other order shows.
struct word {
    unsigned char letters[24];
    int length;
};
constexpr auto join = [](word a, const word& b) {
    for (int i = 0; i < b.length; ++i) a.letters[a.length++] = b.letters[i];
    return a;
};

template <int L, int W>
struct sizes {
    static constexpr int lanes = L, warp = W;
};
#define FASTMOE_SIZES sizes<1, 1>, sizes<4, 4>, sizes<4, 2>, sizes<8, 4>, sizes<12, 4>, sizes<32, 32>

} // namespace

TEST_CASE_TEMPLATE("every lane gets the same sum, and integers sum to what they are", Size, FASTMOE_SIZES)
{
    for (const int64_t n : {0, 1, 3, 7, 64, 101}) {
        CAPTURE(n);
        const auto sums = on_lanes<Size::lanes, Size::warp>(
            [&](auto& team) { return team.reduce(n, int64_t{0}, add, [](int64_t i) { return i * i; }); });
        for (const int64_t s : sums) CHECK(s == (n - 1) * n * (2 * n - 1) / 6);
    }
}

TEST_CASE_TEMPLATE("sums of floats are those of the documented order, bit for bit, twice in a row", Size, FASTMOE_SIZES)
{
    constexpr int lanes = Size::lanes, warp = Size::warp;
    std::vector<float> values(203);
    support::random random(7);
    for (float& v : values) v = static_cast<float>(random.normal());
    float part[lanes] = {}, expected = 0;
    for (int i = 0; i < static_cast<int>(values.size()); ++i) part[i % lanes] += values[i];
    for (int w = 0; w < lanes; w += warp) {
        for (int distance = warp / 2; distance > 0; distance /= 2)
            for (int l = 0; l < distance; ++l) part[w + l] += part[w + l + distance];
        expected = w == 0 ? part[0] : expected + part[w];
    }
    for (int run = 0; run < 2; ++run) {
        const auto sums = on_lanes<lanes, warp>([&](auto& team) {
            return team.reduce(int64_t(values.size()), 0.0f, add, [&](int64_t i) { return values[i]; });
        });
        for (const float s : sums) CHECK(std::memcmp(&s, &expected, sizeof s) == 0);
    }
}

TEST_CASE_TEMPLATE("lanes agree on an operation that is not commutative", Size, FASTMOE_SIZES)
{
    const auto words = on_lanes<Size::lanes, Size::warp>([](auto& team) {
        return team.reduce(20, word{}, join, [](int64_t i) { return word{{static_cast<unsigned char>('a' + i)}, 1}; });
    });
    for (const word& w : words) {
        REQUIRE(w.length == 20);
        CHECK(std::memcmp(w.letters, words[0].letters, 20) == 0);
    }
}

TEST_CASE_TEMPLATE("a scan passes every element what stands before it, in order", Size, FASTMOE_SIZES)
{
    for (const int64_t n : {0, 1, 2, 5, 23}) {
        CAPTURE(n);
        std::vector<word> before(n);
        std::vector<std::atomic<int>> calls(n);
        const auto totals = on_lanes<Size::lanes, Size::warp>([&](auto& team) {
            return team.scan(
                n, word{}, join, [](int64_t i) { return word{{static_cast<unsigned char>('a' + i)}, 1}; },
                [&](int64_t i, const word& w) {
                    before[i] = w;
                    ++calls[i];
                });
        });
        for (int64_t i = 0; i < n; ++i) {
            REQUIRE(calls[i] == 1);
            REQUIRE(before[i].length == i);
            for (int64_t j = 0; j < i; ++j) CHECK(before[i].letters[j] == 'a' + j);
        }
        for (const word& w : totals) {
            REQUIRE(w.length == n);
            for (int64_t j = 0; j < n; ++j) CHECK(w.letters[j] == 'a' + j);
        }
    }
}

TEST_CASE_TEMPLATE("a lane reads without sync what it wrote for the same element, and collectives may follow each other",
                   Size, FASTMOE_SIZES)
{
    constexpr int64_t n = 37;
    std::vector<int64_t> memory(n, -1);
    const auto sums = on_lanes<Size::lanes, Size::warp>([&](auto& team) {
        team.for_each(n, [&](int64_t i) { memory[i] = i; });
        int64_t sum = 0;
        for (int round = 0; round < 5; ++round)
            sum += team.reduce(n, int64_t{0}, add, [&](int64_t i) { return memory[i] += round; });
        return sum;
    });
    for (const int64_t s : sums) CHECK(s == 5 * (n * (n - 1) / 2) + n * (0 + 1 + 3 + 6 + 10));
}

TEST_CASE_TEMPLATE("scratch is shared by the lanes, in blocks of 64 bytes", Size, FASTMOE_SIZES)
{
    const auto seen = on_lanes<Size::lanes, Size::warp>([](auto& team) {
        auto* a = team.template scratch<std::int32_t>(3);
        auto* b = team.template scratch<double>(Size::lanes);
        b[team.lane()] = static_cast<double>(team.lane());
        if (team.lane() == 0) a[2] = 5;
        team.sync();
        return static_cast<int64_t>(reinterpret_cast<std::byte*>(b) - reinterpret_cast<std::byte*>(a)) + a[2] * 1000 +
               static_cast<int64_t>(b[Size::lanes - 1]) * 100000;
    });
    for (const int64_t s : seen) CHECK(s == 64 + 5000 + (Size::lanes - 1) * 100000);
}

TEST_CASE("teams fit into a block's shared memory whatever the hint says, and follow from the hint alone")
{
    for (const int64_t width : {0, 1, 32, 1024, 1025, 1 << 20})
        for (int64_t scratch = 0; scratch <= fm::team_scratch_bytes; scratch += 64) {
            const auto s = fm::team_shape::of({.width = width, .scratch_bytes = scratch});
            REQUIRE(s.scratch_bytes >= scratch);
            REQUIRE(s.scratch_bytes % 128 == 0);
            REQUIRE(s.teams * s.scratch_bytes <= fm::team_scratch_bytes + (s.lanes == 256 ? 128 : 0));
            REQUIRE((s.lanes == 256 ? s.teams == 1 : s.lanes == 32 && s.teams >= 2 && s.teams <= 8));
        }
    CHECK(fm::team_shape::of({.width = 64}).teams == 8);
    CHECK(fm::team_shape::of({.width = 4096}).lanes == 256);
}
