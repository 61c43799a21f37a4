// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Rows in lines of 16 bytes, the most that a lane of a GPU reads at one time. Where lanes stand side by side each takes a line
/// and its neighbour the next, if memory allows, or single elements; where one lane is a processor, it goes through
/// elements in turn, which compilers vectorize. All moves of rows are written over these.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda/std/type_traits>

#include <fastmoe/core/tensor.hpp>
#include <fastmoe/exec/team.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// A scale of one for every row.
template <class Real>
struct unit_scale {
    FASTMOE_HOST_DEVICE constexpr Real operator()(int64_t) const noexcept { return Real(1); }
};

namespace detail {

inline constexpr int64_t line_bytes = 16;

/// Elements of a line. Where types differ they are those of the narrowest, and several accesses of a wider one.
template <class First, class... More>
inline constexpr int64_t line_elements = [] {
    int64_t narrowest = sizeof(First);
    ((narrowest = static_cast<int64_t>(sizeof(More)) < narrowest ? static_cast<int64_t>(sizeof(More)) : narrowest), ...);
    return line_bytes / narrowest;
}();

/// How many elements a lane takes now: those of a line, or one of which nothing is known.
template <int64_t N>
using line_size = ::cuda::std::integral_constant<int64_t, N>; // the one of std is for the host alone

/// N elements as they lie in memory; aligned if they fill lines.
template <class T, int64_t N>
struct alignas(N * sizeof(T) % line_bytes == 0 ? line_bytes : alignof(T)) line {
    T of[N];
};

/// Reads N elements: at one time if Aligned, or singly.
template <int64_t N, bool Aligned = (N > 1), class T>
FASTMOE_HOST_DEVICE line<T, N> read_line(const T* from) noexcept
{
    if constexpr (Aligned) {
        return *reinterpret_cast<const line<T, N>*>(from);
    } else {
        line<T, N> out;
        FASTMOE_UNROLL
        for (int64_t j = 0; j < N; ++j) out.of[j] = from[j];
        return out;
    }
}

template <bool Aligned, class T, int64_t N>
FASTMOE_HOST_DEVICE void write_line(const line<T, N>& from, T* to) noexcept
{
    if constexpr (Aligned) {
        *reinterpret_cast<line<T, N>*>(to) = from;
    } else {
        FASTMOE_UNROLL
        for (int64_t j = 0; j < N; ++j) to[j] = from.of[j];
    }
}
template <class T, int64_t N>
FASTMOE_HOST_DEVICE void write_line(const line<T, N>& from, T* to) noexcept
{
    write_line<(N > 1)>(from, to);
}

/// N elements in the type that is reckoned in.
template <class Real, int64_t N, class T>
FASTMOE_HOST_DEVICE line<Real, N> widened_line(const T* from) noexcept
{
    const auto x = read_line<N>(from);
    line<Real, N> out;
    FASTMOE_UNROLL
    for (int64_t j = 0; j < N; ++j) out.of[j] = Real(x.of[j]);
    return out;
}

/// Rounds each once.
template <class T, class Real, int64_t N>
FASTMOE_HOST_DEVICE void write_rounded(const line<Real, N>& from, T* to) noexcept
{
    line<T, N> out;
    FASTMOE_UNROLL
    for (int64_t j = 0; j < N; ++j) out.of[j] = T(from.of[j]);
    write_line(out, to);
}

/// Whether n elements from each of these addresses on are whole lines of N. Of matrices without gaps the first rows speak
/// for all; a null is in nobody's way.
template <int64_t N, class... T>
FASTMOE_HOST_DEVICE bool in_lines(int64_t n, const T*... rows) noexcept
{
    return n % N == 0 && ((reinterpret_cast<std::uintptr_t>(rows) % line_bytes == 0) && ...);
}

/// f(first element, line_size<N>) for each line of n elements if they are whole, or else f(i, line_size<1>) for each element.
template <int64_t N, class Team, class F>
FASTMOE_HOST_DEVICE void for_each_line(Team& team, int64_t n, [[maybe_unused]] bool whole, F f)
{
    if constexpr (!is_single_lane<Team>)
        if (whole) return team.for_each(n / N, [=](int64_t i) { f(i * N, line_size<N>{}); });
    team.for_each(n, [=](int64_t i) { f(i, line_size<1>{}); });
}

/// The sum of what f returns, for the same lines or elements as by for_each_line; every lane gets it.
template <int64_t N, class Sum, class Team, class F>
FASTMOE_HOST_DEVICE Sum sum_over_lines(Team& team, int64_t n, [[maybe_unused]] bool whole, F f)
{
    const auto add = [](const Sum& a, const Sum& b) { return a + b; };
    if constexpr (!is_single_lane<Team>)
        if (whole) return team.reduce(n / N, Sum{}, add, [=](int64_t i) { return f(i * N, line_size<N>{}); });
    return team.reduce(n, Sum{}, add, [=](int64_t i) { return f(i, line_size<1>{}); });
}

/// Rows whose loads are under way at one time.
inline constexpr int rows_together = 4;

/// total += scale(i) * the line at row(i), for i = first, first + step, ... below end, one after the other. Where row(i) is
/// null nothing is read and nothing added. The loads of Together rows are under way at one time.
template <int Together = rows_together, class Sum, int64_t N, class Number, class Row, class Scale>
FASTMOE_HOST_DEVICE void add_lines(line<Sum, N>& total, Number first, Number end, type_identity_t<Number> step, const Row& row,
                                   const Scale& scale)
{
    using pointer = decltype(row(first));
    using element = std::remove_cvref_t<decltype(*row(first))>;
    constexpr bool plain = std::is_same_v<Scale, unit_scale<decltype(scale(first))>>;
    FASTMOE_KEEP_LOOP
    for (Number i = first; i < end; i += Together * step) {
        pointer from[Together];
        [[maybe_unused]] Sum weight[Together];
        line<element, N> x[Together];
        FASTMOE_UNROLL
        for (int k = 0; k < Together; ++k) from[k] = i + k * step < end ? row(i + k * step) : nullptr;
        if constexpr (!plain) {
            FASTMOE_UNROLL
            for (int k = 0; k < Together; ++k) weight[k] = from[k] ? Sum(scale(i + k * step)) : Sum(0);
        }
        FASTMOE_UNROLL
        for (int k = 0; k < Together; ++k) x[k] = from[k] ? read_line<N>(from[k]) : line<element, N>{};
        FASTMOE_UNROLL
        for (int k = 0; k < Together; ++k) {
            if (!from[k]) continue;
            FASTMOE_UNROLL
            for (int64_t j = 0; j < N; ++j) {
                if constexpr (plain) total.of[j] += Sum(x[k].of[j]);
                else total.of[j] += weight[k] * Sum(x[k].of[j]);
            }
        }
    }
}

} // namespace detail

} // namespace fastmoe::inline FASTMOE_ABI
