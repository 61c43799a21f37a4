// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A team works on one row: one lane on the host, a warp or a block on CUDA. Its members are called by all lanes alike.
#pragma once

#include <cstddef>
#include <type_traits>

#include <fastmoe/core/tensor.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// The scratch bytes that every executor can give a team (what a CUDA block has without opting in to more).
inline constexpr int64_t team_scratch_bytes = 48 * 1024;

/// What for_each_row is told about a row, so that the executor can size teams and decide whether threads pay.
struct row_hint {
    int64_t width = 1;         ///< elements of work in a row
    int64_t scratch_bytes = 0; ///< what the functor takes with scratch(), each block rounded up to 64 bytes; at most
                               ///< team_scratch_bytes
    bool in_turn = false;      ///< elements wait for those before them, so that more lanes than the fewest help little
};

class single_lane_team;
/// Whether a team's lane is a processor, which goes through a row faster alone than by the steps that lanes take together.
template <class Team>
inline constexpr bool is_single_lane = std::is_same_v<Team, single_lane_team>;

/// A team of one lane. Sums run in sixteen fixed partial sums, so that they vectorize and never depend on threads.
class single_lane_team {
public:
    explicit single_lane_team(std::byte* scratch) noexcept : scratch_(scratch) {}

    FASTMOE_HOST_DEVICE static constexpr int64_t lane() noexcept { return 0; }
    FASTMOE_HOST_DEVICE static constexpr int64_t lanes() noexcept { return 1; }

    /// Makes what the lanes wrote to scratch and memory visible to all of them.
    FASTMOE_HOST_DEVICE void sync() const noexcept {}

    /// f(i) for i in [0, n), each once, spread over the lanes. Which lane gets which i follows from n alone, and reduce()
    /// keeps to it: a lane may read without sync() what it wrote for the same i in a loop of the same n.
    template <class F>
    FASTMOE_HOST_DEVICE void for_each(int64_t n, F f) const
    {
        for (int64_t i = 0; i < n; ++i) f(i);
    }

    /// op over f(0), ..., f(n-1) and init, in a fixed order; every lane gets the result. f(i) is called exactly once, by the
    /// lane that for_each(n) gives i to, and so it may write what belongs to i. op must be associative and commutative up to
    /// rounding, and init its identity.
    template <class T, class Op, class F>
    FASTMOE_HOST_DEVICE T reduce(int64_t n, T init, Op op, F f) const
    {
        constexpr int width = 16;
        if (n < width) {
            T total = init;
            for (int64_t i = 0; i < n; ++i) total = op(total, f(i));
            return total;
        }
        T part[width];
        for (int j = 0; j < width; ++j) part[j] = init;
        int64_t i = 0;
        for (; i + width <= n; i += width)
            for (int j = 0; j < width; ++j) part[j] = op(part[j], f(i + j));
        for (int j = 0; i < n; ++i, ++j) part[j] = op(part[j], f(i));
        for (int half = width / 2; half > 0; half /= 2)
            for (int j = 0; j < half; ++j) part[j] = op(part[j], part[j + half]);
        return part[0];
    }

    /// Exclusive scan: out(i, op over f(0..i-1)) for every i; returns the total to every lane. f(i) and out(i, ...) are called
    /// once each, by one lane, which need not be that of for_each(n).
    template <class T, class Op, class F, class Out>
    FASTMOE_HOST_DEVICE T scan(int64_t n, T init, Op op, F f, Out out) const
    {
        T total = init;
        for (int64_t i = 0; i < n; ++i) {
            const T value = f(i);
            out(i, total);
            total = op(total, value);
        }
        return total;
    }

    /// Counts keys in their order: for i in [0, n), with e = key(i), out(i, counts[e]++), or out(i, -1) for a negative e. counts
    /// is memory or scratch of the team's own, synced before; what it holds afterwards is visible to all lanes. key(i) and
    /// out(i, ...) are called once each, by one lane, which need not be that of for_each(n).
    template <class Key, class Out>
    FASTMOE_HOST_DEVICE void tally(int64_t n, int32_t* counts, Key key, Out out) const
    {
        for (int64_t i = 0; i < n; ++i) {
            const int32_t e = key(i);
            out(i, e >= 0 ? counts[e]++ : int32_t{-1});
        }
    }

    /// n elements that the lanes share until the row ends. The sum of all calls is what row_hint announced.
    template <class T>
    FASTMOE_HOST_DEVICE T* scratch(int64_t n) noexcept
    {
        auto* out = reinterpret_cast<T*>(scratch_);
        scratch_ += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return out;
    }

private:
    std::byte* scratch_;
};

} // namespace fastmoe::inline FASTMOE_ABI
