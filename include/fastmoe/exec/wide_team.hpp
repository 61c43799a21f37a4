// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The team of many lanes, over whatever lets lanes meet: a warp or a block on CUDA, threads in the tests. All that is
/// arithmetic or order stands here, so that the tests prove it without a GPU.
#pragma once

#include <concepts>
#include <cstddef>
#include <type_traits>

#include <fastmoe/exec/team.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// How lanes meet: warps of `warp` lanes, which hand values to each other, and slots for the totals of warps.
///
///     m.lanes()           of the team: warp, or a multiple of it
///     m.lane()            in [0, lanes)
///     m.sync()            all lanes; what they wrote is visible to all
///     m.from(value, l)    the value of lane l of the own warp; all lanes of the warp call it
///     m.slot<T>(set, w)   where warp w leaves a total; two sets, so that one sync() a collective is enough
template <class M>
concept lane_meeting = requires(M m, double value) {
    { m.lanes() } -> std::convertible_to<int>;
    { M::warp } -> std::convertible_to<int>;
    { m.lane() } -> std::convertible_to<int>;
    m.sync();
    { m.from(value, 0) } -> std::same_as<double>;
};

/// A team as single_lane_team documents it. Lane l has the elements i with i % lanes == l, in rising order. Sums add each
/// lane's elements, then the lanes of a warp as a tree, then warps in turn: one order for one number of lanes, which is the
/// same on every run, and another one than that of the host. A value that reduce and scan hand over has at most 32 bytes.
template <lane_meeting Meeting>
class wide_team {
    static constexpr int warp = Meeting::warp;
    static_assert((warp & (warp - 1)) == 0);

public:
    FASTMOE_HOST_DEVICE wide_team(const Meeting& meeting, std::byte* scratch) noexcept : meeting_(meeting), scratch_(scratch) {}

    FASTMOE_HOST_DEVICE int64_t lanes() const noexcept { return meeting_.lanes(); }
    FASTMOE_HOST_DEVICE int64_t lane() const noexcept { return meeting_.lane(); }
    FASTMOE_HOST_DEVICE void sync() const { meeting_.sync(); }

    template <class F>
    FASTMOE_HOST_DEVICE void for_each(int64_t n, F f) const
    {
        for (int64_t i = lane(), step = lanes(); i < n; i += step) f(i);
    }

    template <class T, class Op, class F>
    FASTMOE_HOST_DEVICE T reduce(int64_t n, T init, Op op, F f) const
    {
        T part = init;
        for (int64_t i = lane(), step = lanes(); i < n; i += step) part = op(part, f(i));
        // The lower lane's value always stands first, so that every lane computes the very same tree.
        for (int distance = warp / 2; distance > 0; distance /= 2) {
            const T other = meeting_.from(part, in_warp() ^ distance);
            part = (in_warp() & distance) ? op(other, part) : op(part, other);
        }
        if (warps() > 1) {
            const T* all = publish(part, 0);
            part = all[0];
            for (int w = 1; w < warps(); ++w) part = op(part, all[w]);
        }
        return part;
    }

    template <class T, class Op, class F, class Out>
    FASTMOE_HOST_DEVICE T scan(int64_t n, T init, Op op, F f, Out out) const
    {
        constexpr int ahead = sizeof(T) > 16 ? 1 : 4; // what f reads is on its way while the lanes before are added
        T total = init, values[ahead];
        for (int64_t first = 0; first < n; first += ahead * lanes()) {
            for (int a = 0; a < ahead; ++a) {
                const int64_t mine = first + a * lanes() + lane();
                values[a] = mine < n ? static_cast<T>(f(mine)) : init;
            }
            for (int a = 0; a < ahead && first + a * lanes() < n; ++a) {
                const int64_t mine = first + a * lanes() + lane();
                T value = values[a];
                for (int distance = 1; distance < warp; distance *= 2) {
                    const T before = meeting_.from(value, in_warp() >= distance ? in_warp() - distance : in_warp());
                    if (in_warp() >= distance) value = op(before, value);
                }
                const T left = meeting_.from(value, in_warp() > 0 ? in_warp() - 1 : 0); // op over the lanes before this one
                T start = total;
                if (warps() > 1) {
                    const T* all = publish(value, warp - 1);
                    for (int w = 0; w < warps(); ++w) {
                        if (w == own_warp()) start = total;
                        total = op(total, all[w]);
                    }
                } else {
                    total = op(total, meeting_.from(value, warp - 1));
                }
                if (mine < n) out(mine, in_warp() > 0 ? op(start, left) : start);
            }
        }
        return total;
    }

    /// A warp at a time: each lane learns which lanes before it have its key, and the last one of a key moves its count.
    template <class Key, class Out>
    FASTMOE_HOST_DEVICE void tally(int64_t n, int32_t* counts, Key key, Out out) const
    {
        for (int64_t base = 0; base < n; base += lanes()) {
            const int64_t mine = base + lane();
            const int32_t e = mine < n ? static_cast<int32_t>(key(mine)) : -1;
            int32_t before = 0, all = 0;
            for (int other = 0; other < warp; ++other) {
                const auto same = static_cast<int32_t>(meeting_.from(e, other) == e);
                before += same & static_cast<int32_t>(other < in_warp());
                all += same;
            }
            if (mine < n && e < 0) out(mine, int32_t{-1});
            for (int w = 0; w < warps() && base + w * warp < n; ++w) { // counts are the team's: warps take turns
                const bool turn = w == own_warp() && e >= 0;
                const int32_t rank = turn ? counts[e] + before : 0;
                if (turn) out(mine, rank);
                sync();
                if (turn && before == all - 1) counts[e] = rank + 1;
                sync();
            }
        }
    }

    template <class T>
    FASTMOE_HOST_DEVICE T* scratch(int64_t n) noexcept
    {
        auto* out = reinterpret_cast<T*>(scratch_);
        scratch_ += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return out;
    }

private:
    FASTMOE_HOST_DEVICE int warps() const noexcept { return meeting_.lanes() / warp; }
    FASTMOE_HOST_DEVICE int in_warp() const noexcept { return meeting_.lane() % warp; }
    FASTMOE_HOST_DEVICE int own_warp() const noexcept { return meeting_.lane() / warp; }

    /// The values that one lane of each warp has, for all lanes to read until the collective after the next.  // (warps)
    template <class T>
    FASTMOE_HOST_DEVICE const T* publish(const T& value, int from) const
    {
        static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 32);
        if (in_warp() == from) *meeting_.template slot<T>(set_, own_warp()) = value;
        meeting_.sync();
        const T* all = meeting_.template slot<T>(set_, 0);
        set_ ^= 1;
        return all;
    }

    Meeting meeting_;
    std::byte* scratch_;
    mutable int set_ = 0;
};

/// How for_each_row of an executor with warps and blocks cuts rows, by the hint alone, so that the order of sums is too.
struct team_shape {
    int lanes;             ///< of a team
    int teams;             ///< of a block
    int64_t scratch_bytes; ///< of a team

    /// Rows of few elements, and those that are taken in turn, get a warp; wide ones, and those whose scratch would leave a
    /// block with few warps, a block.
    static constexpr team_shape of(row_hint hint) noexcept
    {
        constexpr int warp = 32, block = 256;
        const int64_t scratch = (hint.scratch_bytes + 127) / 128 * 128;
        if ((hint.width > 1024 && !hint.in_turn) || scratch > team_scratch_bytes / 4) return {block, 1, scratch};
        int teams = block / warp;
        while (teams > 1 && teams * scratch > team_scratch_bytes) teams /= 2;
        return {warp, teams, scratch};
    }
};

} // namespace fastmoe::inline FASTMOE_ABI
