// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The portable GEMM's products of a few rows on the host, as in decoding: dot products, the lanes along the reduction,
/// which read W once where it lies. Memory sets their speed, not arithmetic.
#pragma once

#include <cstdint>
#include <cstring>

#include <fastmoe/gemm/portable_pack.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::portable {

/// Columns of Y that are done together.
inline constexpr int64_t dot_columns = 4;

/// sum[r][c] += sum over k of x[r * x_step + k] * w[c][k].
template <class Unit, class W>
struct dot_block {
    const Unit* x;                 // (rows,x_step)
    int64_t x_step;
    const W* w[dot_columns];       ///< contiguous, anywhere                     // (depth) each
    int64_t depth;                 ///< units; a multiple of dot_depth
    total_t<Unit> sum[4][dot_columns]; // (rows,columns)
};

/// Units of the longest step of a dot function; x is padded with zeros to a multiple of it.
template <class Unit>
inline constexpr int64_t dot_depth = 4 * vector_lanes<Unit>;

/// How a function of 1, 2 or 4 rows keeps its sums: sum I is that of column I % columns and row I / columns % Rows, and
/// what is left of I counts vectors along the depth. One row streams each column on its own, in four vectors.
template <int Rows>
struct dot_shape {
    static constexpr int columns = Rows == 1 ? 1 : static_cast<int>(dot_columns), vectors = 4 / Rows;
    using sums = indices<Rows * columns * vectors>;

    static constexpr int column(int i) { return i % columns; }
    static constexpr int row(int i) { return i / columns % Rows; }
    static constexpr int vector(int i) { return i / (columns * Rows); }
};

/// Adds up the vectors of each sum, then lanes in halves, and then into the block's sums.
template <int Rows, class Unit, class W, class Real, int Count, int Lanes>
inline void fold(Real (&lane)[Count][Lanes], dot_block<Unit, W>& b, int64_t first)
{
    using shape = dot_shape<Rows>;
    constexpr int count = Count / shape::vectors;
    for (int half = Count / 2; half >= count; half /= 2)
        for (int i = 0; i < half; ++i)
            for (int l = 0; l < Lanes; ++l) lane[i][l] += lane[i + half][l];
    for (int i = 0; i < count; ++i) {
        for (int half = Lanes / 2; half > 0; half /= 2)
            for (int l = 0; l < half; ++l) lane[i][l] += lane[i][l + half];
        b.sum[shape::row(i)][first + shape::column(i)] += lane[i][0];
    }
}

/// Where vector `i` of a step reads W.
template <int Rows, class Unit, class W>
inline const W* weights_at(const dot_block<Unit, W>& b, int64_t first, int64_t k, int i, int lanes)
{
    using shape = dot_shape<Rows>;
    return b.w[first + shape::column(i)] + k + shape::vector(i) * lanes;
}
template <int Rows, class Unit, class W>
inline const Unit* rows_at(const dot_block<Unit, W>& b, int64_t k, int i, int lanes)
{
    using shape = dot_shape<Rows>;
    return b.x + shape::row(i) * b.x_step + k + shape::vector(i) * lanes;
}
/// Vectors of 16 bytes, which every instruction set has; any type of W.
template <int Rows, class Real, class W, int... Index>
inline void dot_any(dot_block<Real, W>& b, int64_t first, std::integer_sequence<int, Index...>)
{
    using shape = dot_shape<Rows>;
    typedef Real vector __attribute__((vector_size(16)));
    constexpr int lanes = 16 / sizeof(Real);
    vector sum[] = {vector{} + Real(0 * Index)...};
    for (int64_t k = 0; k < b.depth; k += shape::vectors * lanes)
        ((sum[Index] += load_vector<Real>(weights_at<Rows>(b, first, k, Index, lanes)) *
                    load_vector<Real>(rows_at<Rows>(b, k, Index, lanes))),
         ...);
    alignas(64) Real lane[sizeof...(Index)][lanes];
    (std::memcpy(lane[Index], &sum[Index], sizeof sum[Index]), ...);
    fold<Rows>(lane, b, first);
}

#if FASTMOE_X86_DISPATCH
/// Asks for what a stream of weights reads some steps later, also past the end of a row, where mostly the next begins.
inline void look_ahead(const void* w)
{
    constexpr std::uintptr_t ahead = 4096;
    __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(w) + ahead));
}

template <int Rows, class Real, int... Index>
[[gnu::target("avx512f")]] inline void dot_avx512(dot_block<Real, Real>& b, int64_t first, std::integer_sequence<int, Index...>)
{
    using shape = dot_shape<Rows>;
    typedef Real vector __attribute__((vector_size(64), may_alias, aligned(sizeof(Real))));
    constexpr int lanes = 64 / sizeof(Real);
    vector sum[] = {vector{} + Real(0 * Index)...};
    for (int64_t k = 0; k < b.depth; k += shape::vectors * lanes) {
        if constexpr (Rows == 1) (look_ahead(weights_at<Rows>(b, first, k, Index, lanes)), ...);
        ((sum[Index] += *reinterpret_cast<const vector*>(weights_at<Rows>(b, first, k, Index, lanes)) *
                    *reinterpret_cast<const vector*>(rows_at<Rows>(b, k, Index, lanes))),
         ...);
    }
    alignas(64) Real lane[sizeof...(Index)][lanes];
    (std::memcpy(lane[Index], &sum[Index], sizeof sum[Index]), ...);
    fold<Rows>(lane, b, first);
}

template <int Rows, int... Index>
[[gnu::target("avx512f,avx512bf16")]] inline void dot_avx512(dot_block<bfloat16_pair, bfloat16_pair>& b, int64_t first,
                                                             std::integer_sequence<int, Index...>)
{
    using shape = dot_shape<Rows>;
    typedef float unaligned __attribute__((vector_size(64), may_alias, aligned(2)));
    constexpr int lanes = 16;
    float_x16 sum[] = {float_x16{} + float(0 * Index)...};
    for (int64_t k = 0; k < b.depth; k += shape::vectors * lanes) {
        if constexpr (Rows == 1) (look_ahead(weights_at<Rows>(b, first, k, Index, lanes)), ...);
        const float_x16 w[] = {*reinterpret_cast<const unaligned*>(weights_at<Rows>(b, first, k, Index, lanes))...};
        const float_x16 x[] = {*reinterpret_cast<const unaligned*>(rows_at<Rows>(b, k, Index, lanes))...};
        (add_dots(sum[Index], w[Index], x[Index]), ...);
    }
    alignas(64) float lane[sizeof...(Index)][lanes];
    (std::memcpy(lane[Index], &sum[Index], sizeof sum[Index]), ...);
    fold<Rows>(lane, b, first);
}
#endif

/// Columns of a few rows of Y. Task t does dot_columns of them.
/// Unit is a pair only where the machine has the dot product and W is bfloat16.
template <class Unit, class W, class B, class Y>
struct multiply_few_rows {
    using vectorized = void;
    using Real = total_t<Unit>;
    using Entry = std::conditional_t<unit_elements<Unit> == 2, bfloat16_pair, W>; ///< what a step reads of W
    instruction_set level;
    const Unit* x; // (rows,x_step), zeros past the depth
    int64_t x_step, rows;
    const W* w;    // (columns,width)
    int64_t w_step, width;
    const B* bias; // (columns) or null
    Y* y;          // (rows,columns)
    int64_t y_step, columns;

    template <class Team>
    void operator()(Team&, int64_t t) const
    {
        int64_t i = 0;
        for (; i + 4 <= rows; i += 4) some<4>(i, t * dot_columns);
        for (; i + 2 <= rows; i += 2) some<2>(i, t * dot_columns);
        if (i < rows) some<1>(i, t * dot_columns);
    }

private:
    static constexpr int64_t elements = unit_elements<Unit>;

    template <int Rows>
    void some(int64_t i, int64_t n) const
    {
        const int64_t here = columns - n < dot_columns ? columns - n : dot_columns;
        const int64_t whole = width / elements / dot_depth<Unit> * dot_depth<Unit>, rest = width - whole * elements;
        dot_block<Unit, Entry> b{x + i * x_step, x_step, {}, whole, {}};
        for (int64_t c = 0; c < dot_columns; ++c)
            b.w[c] = reinterpret_cast<const Entry*>(w + (n + (c < here ? c : 0)) * w_step);
        add<Rows>(b, n, here);
        if (rest > 0) {
            W last[dot_columns][dot_depth<Unit> * elements] = {};
            for (int64_t c = 0; c < here; ++c)
                for (int64_t k = 0; k < rest; ++k) last[c][k] = w[(n + c) * w_step + whole * elements + k];
            for (int64_t c = 0; c < dot_columns; ++c) b.w[c] = reinterpret_cast<const Entry*>(last[c]);
            b.x += whole;
            b.depth = dot_depth<Unit>;
            add<Rows>(b, n, here);
        }
        for (int64_t c = 0; c < here; ++c)
            for (int64_t r = 0; r < Rows; ++r)
                y[(i + r) * y_step + n + c] = static_cast<Y>((bias ? static_cast<Real>(bias[n + c]) : Real(0)) + b.sum[r][c]);
    }

    /// Asks for the first lines of the next columns: the processor's own prefetching begins late in each page.
    void start_stream(int64_t first, int64_t count) const
    {
        for (int64_t c = 0; c < count; ++c) {
            // A number, since lines behind a short column, or of an empty one, are no places that a pointer may have.
            const auto column = reinterpret_cast<std::uintptr_t>(w + least(first + c, columns - 1) * w_step);
            for (std::uintptr_t line = 0; line < 4; ++line) __builtin_prefetch(reinterpret_cast<const void*>(column + 64 * line));
        }
    }

    template <int Rows>
    void add(dot_block<Unit, Entry>& b, int64_t n, int64_t here) const
    {
        using shape = dot_shape<Rows>;
        for (int64_t c = 0; c < here; c += shape::columns) {
            start_stream(n + c + shape::columns, shape::columns);
#if FASTMOE_X86_DISPATCH
            if constexpr (std::is_same_v<Unit, Entry>)
                if (level >= instruction_set::avx512) {
                    dot_avx512<Rows>(b, c, typename shape::sums{});
                    continue;
                }
#endif
            if constexpr (elements == 1) dot_any<Rows>(b, c, typename shape::sums{});
        }
    }
};

} // namespace fastmoe::inline FASTMOE_ABI::detail::portable
