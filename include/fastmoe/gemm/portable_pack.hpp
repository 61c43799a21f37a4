// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the portable GEMM on the host moves around its tiles: rows are converted, gathered, paired and transposed on the
/// way in, and sums are transposed, rounded and added on the way out. All functors run through host_executor::run_rows,
/// which compiles them for each instruction set.
#pragma once

#include <cstring>

#include <fastmoe/core/indexed_rows.hpp>
#include <fastmoe/gemm/portable_tile.hpp>
#include <fastmoe/ops/reduce.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::portable {

/// Rows [first, first + count) of plain_rows or indexed_rows; null for a row of zeros and past the end.
template <class Rows>
struct row_window {
    Rows rows; // (S,width)
    int64_t first, count;

    auto* row(int64_t i) const noexcept { return i < count ? rows.row(first + i) : nullptr; }
};

/// Rows at a fixed distance; null past the end.
template <class T>
struct strided_rows {
    const T* data; // (count,width)
    int64_t step, count;

    const T* row(int64_t i) const noexcept { return i < count ? data + i * step : nullptr; }
};

template <class Source>
using source_t = std::remove_cvref_t<decltype(*std::declval<const Source&>().row(0))>;

/// A known count, so that the loop vectorizes at every level of optimization.
template <int64_t Count, class Real, class T>
inline void convert(Real* __restrict to, const T* __restrict from)
{
    for (int64_t j = 0; j < Count; ++j) to[j] = static_cast<Real>(from[j]);
}

template <class Real, class T>
inline void convert(Real* to, const T* from, int64_t n)
{
    constexpr int64_t step = 16;
    int64_t i = 0;
    for (; i + step <= n; i += step) convert<step>(to + i, from + i);
    for (; i < n; ++i) to[i] = static_cast<Real>(from[i]);
}

/// Units whose pairs lie along a row: unit row i is source row i. Units past the end of a row, and rows that are null,
/// are zeros.
template <class Unit, class Source>
struct units_along {
    Source source;
    int64_t width; ///< elements of a source row

    /// Units [first, first + Count) of a row.
    template <int64_t Count>
    void load(Unit* to, int64_t row, int64_t first) const
    {
        constexpr int64_t elements = unit_elements<Unit>;
        const auto* from = source.row(row);
        if (!from || width < (first + Count) * elements) return load_some(to, row, first, Count);
        if constexpr (elements == 2) std::memcpy(static_cast<void*>(to), from + 2 * first, sizeof(Unit) * Count);
        else convert<Count>(to, from + first);
    }

    /// Units [first, first + count) of a row.
    [[gnu::noinline]] void load_some(Unit* to, int64_t row, int64_t first, int64_t count) const
    {
        const auto* from = source.row(row);
        for (int64_t i = 0; i < count; ++i) {
            if constexpr (unit_elements<Unit> == 2) {
                const int64_t at = 2 * (first + i);
                to[i] = {from && at < width ? from[at] : bfloat16{}, from && at + 1 < width ? from[at + 1] : bfloat16{}};
            } else {
                to[i] = from && first + i < width ? static_cast<Unit>(from[first + i]) : Unit(0);
            }
        }
    }
};

/// Units whose pairs lie across rows: unit row i is made of source rows 2i and 2i + 1.
template <class Source>
struct pairs_across {
    Source source;
    int64_t width;

    template <int64_t Count>
    void load(bfloat16_pair* to, int64_t row, int64_t first) const
    {
        const bfloat16 *a = source.row(2 * row), *b = source.row(2 * row + 1);
        if (!a || !b || width < first + Count) return load_some(to, row, first, Count);
        std::uint32_t both[Count];
        for (int64_t j = 0; j < Count; ++j) both[j] = a[first + j].bits | static_cast<std::uint32_t>(b[first + j].bits) << 16;
        std::memcpy(static_cast<void*>(to), both, sizeof both);
    }

    [[gnu::noinline]] void load_some(bfloat16_pair* to, int64_t row, int64_t first, int64_t count) const
    {
        const bfloat16 *a = source.row(2 * row), *b = source.row(2 * row + 1);
        for (int64_t i = 0; i < count; ++i)
            to[i] = {a && first + i < width ? a[first + i] : bfloat16{}, b && first + i < width ? b[first + i] : bfloat16{}};
    }
};

/// The same for any unit: single units have nothing to pair.
template <class Unit, class Source>
using units_across =
    std::conditional_t<unit_elements<Unit> == 2, pairs_across<Source>, units_along<Unit, Source>>;

/// to[j * to_step + i] = from[i * from_step + j] for a block of 4 x 4 elements of 4 bytes, or 2 x 2 of 8.
template <class T>
inline void transpose_small(const T* from, int64_t from_step, T* to, int64_t to_step)
{
    if constexpr (sizeof(T) == 4) {
        // Through memcpy: the deduced type of a lambda's result would lose what lets a vector alias the elements.
        typedef std::uint32_t vector __attribute__((vector_size(16)));
        const auto in = [=](int i) {
            vector v;
            std::memcpy(&v, from + i * from_step, sizeof v);
            return v;
        };
        const auto out = [=](int j, vector v) { std::memcpy(static_cast<void*>(to + j * to_step), &v, sizeof v); };
        const vector a = in(0), b = in(1), c = in(2), d = in(3);
        const vector ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5), ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
        const vector cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5), cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
        out(0, __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5));
        out(1, __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7));
        out(2, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
        out(3, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
    } else {
        const T a = from[0], b = from[1], c = from[from_step], d = from[from_step + 1];
        to[0] = a, to[1] = c, to[to_step] = b, to[to_step + 1] = d;
    }
}

/// The same for a square of one vector's lanes.
template <class T>
inline void transpose_square(const T* from, int64_t from_step, T* to, int64_t to_step)
{
    constexpr int64_t piece = 16 / sizeof(T), lanes = vector_lanes<T>;
    for (int64_t i = 0; i < lanes; i += piece)
        for (int64_t j = 0; j < lanes; j += piece)
            transpose_small(from + i * from_step + j, from_step, to + j * to_step + i, to_step);
}

/// Rows become lanes: to[k * step + i] = unit k of row i. Task g does one vector of lanes.
template <class Unit, class Units>
struct pack_transposed {
    using vectorized = void;
    Units units;
    int64_t first, depth; ///< units of a row
    Unit* to;             // (depth,step)
    int64_t step;

    template <class Team>
    void operator()(Team&, int64_t g) const
    {
        // Two squares at a time: rows that lie 4 KiB apart share lines of the cache, so whole lines are read at once.
        constexpr int64_t lanes = vector_lanes<Unit>, wide = 2 * lanes;
        alignas(64) Unit block[lanes * wide], last[wide * lanes];
        Unit* out = to + g * lanes;
        for (int64_t k = 0; k < depth; k += wide, out += wide * step) {
            for (int64_t i = 0; i < lanes; ++i)
                units.template load<wide>(block + i * wide, g * lanes + i, first + k);
            const int64_t left = depth - k;
            Unit* const target = left >= wide ? out : last;
            const int64_t target_step = left >= wide ? step : lanes;
            transpose_square(block, wide, target, target_step);
            transpose_square(block + lanes, wide, target + lanes * target_step, target_step);
            if (left < wide)
                for (int64_t j = 0; j < left; ++j) std::memcpy(static_cast<void*>(out + j * step), last + j * lanes, 64);
        }
    }
};

/// Rows stay rows: to[i * step + k] = unit k of row i. Task i does one row.
template <class Unit, class Units>
struct pack_rows {
    using vectorized = void;
    Units units;
    int64_t first, depth; ///< units of a row
    Unit* to;             // (rows,step)
    int64_t step;

    template <class Team>
    void operator()(Team&, int64_t i) const
    {
        constexpr int64_t lanes = vector_lanes<Unit>;
        int64_t k = 0;
        for (; k + lanes <= depth; k += lanes) units.template load<lanes>(to + i * step + k, i, first + k);
        if (k < depth) units.load_some(to + i * step + k, i, first + k, depth - k);
    }
};

/// A block of rows becomes panels: full ones, then a narrower one that ends at a multiple of a vector's lanes.
/// Task k does unit row k.
template <class Unit, class Units>
struct pack_panels {
    using vectorized = void;
    Units units;
    int64_t first, width; ///< lanes to pack, a multiple of a vector's
    int64_t depth;        ///< unit rows
    Unit* to;             // (panels, depth, lanes of the panel)

    template <class Team>
    void operator()(Team&, int64_t k) const
    {
        constexpr int64_t full = panel_lanes<Unit>, lanes = vector_lanes<Unit>;
        int64_t at = 0;
        for (; at + full <= width; at += full) units.template load<full>(to + at * depth + k * full, k, first + at);
        const int64_t rest = width - at;
        for (int64_t l = 0; l < rest; l += lanes)
            units.template load<lanes>(to + at * depth + k * rest + l, k, first + at + l);
    }
};

/// Sums out, rounded once: to[i * to_step + j] (+)= from[i * from_step + j]. Task i does one row. What is there already is
/// added in the wider type of the two.
template <class Real, class T>
struct store_rows {
    using vectorized = void;
    const Real* from; // (rows,width)
    int64_t from_step;
    T* to;            // (rows,width)
    int64_t to_step, width;
    write_mode mode = write_mode::overwrite;

    template <class Team>
    void operator()(Team&, int64_t i) const
    {
        const Real* __restrict in = from + i * from_step;
        T* __restrict out = to + i * to_step;
        if (mode == write_mode::overwrite) return convert(out, in, width);
        using Sum = wider_t<Real, T>;
        constexpr int64_t step = 16;
        int64_t j = 0;
        for (; j + step <= width; j += step)
            for (int64_t l = 0; l < step; ++l) out[j + l] = static_cast<T>(static_cast<Sum>(out[j + l]) + in[j + l]);
        for (; j < width; ++j) out[j] = static_cast<T>(static_cast<Sum>(out[j]) + in[j]);
    }
};

/// Sums out, transposed and rounded once: to[i * to_step + j] = from[j * from_step + i]. Task g does one vector of rows.
template <class Real, class T>
struct store_transposed {
    using vectorized = void;
    const Real* from; // (width rounded up, rows rounded up)
    int64_t from_step;
    T* to;            // (rows,width)
    int64_t to_step, rows, width;

    template <class Team>
    void operator()(Team&, int64_t g) const
    {
        constexpr int64_t lanes = vector_lanes<Real>;
        alignas(64) Real square[lanes * lanes] = {};
        const int64_t first = g * lanes, count = rows - first < lanes ? rows - first : lanes;
        for (int64_t j = 0; j < width; j += lanes) {
            transpose_square(from + j * from_step + first, from_step, square, lanes);
            const int64_t n = width - j < lanes ? width - j : lanes;
            T* const out = to + first * to_step + j;
            if (n == lanes)
                for (int64_t i = 0; i < count; ++i) convert<lanes>(out + i * to_step, square + i * lanes);
            else
                for (int64_t i = 0; i < count; ++i) convert(out + i * to_step, square + i * lanes, n);
        }
    }
};

/// 16 bytes of Reals from the start of an array of T.
template <class Real, class T>
inline auto load_vector(const T* from)
{
    typedef Real vector __attribute__((vector_size(16)));
    vector out;
    if constexpr (std::is_same_v<Real, T>) {
        std::memcpy(&out, from, sizeof out);
    } else if constexpr (std::is_same_v<T, bfloat16> && std::is_same_v<Real, float>) {
        typedef std::uint16_t words __attribute__((vector_size(16)));
        std::uint64_t four;
        std::memcpy(&four, from, sizeof four);
        typedef std::uint64_t longs __attribute__((vector_size(16)));
        const longs bits = {four, 0};
        out = reinterpret_cast<vector>(
            __builtin_shufflevector(words{}, reinterpret_cast<words>(bits), 0, 8, 0, 9, 0, 10, 0, 11));
    } else {
        Real all[16 / sizeof(Real)];
        convert<16 / sizeof(Real)>(all, from);
        std::memcpy(&out, all, sizeof out);
    }
    return out;
}

} // namespace fastmoe::inline FASTMOE_ABI::detail::portable
