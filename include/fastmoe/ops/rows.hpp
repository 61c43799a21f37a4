// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Moves of whole rows: gather by index with a scale, and sums of a list of rows. Dispatch and combine are made of them.
#pragma once

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/core/indexed_rows.hpp>
#include <fastmoe/exec/executor.hpp>
#include <fastmoe/ops/lines.hpp>
#include <fastmoe/ops/reduce.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

/// Columns that one lane alone sums in registers.
inline constexpr int64_t row_piece = 64;

/// index[i] = i: plain rows in the clothes of indexed ones.
struct count_up {
    using vectorized = void;
    int32_t* index;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { index[i] = static_cast<int32_t>(i); }
};

template <class T>
struct fill {
    using vectorized = void;
    T* to;
    T value;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { to[i] = value; }
};

/// to += from, rounded once.
template <class T>
struct add_to {
    using vectorized = void;
    const T* from;
    T* to;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        using real = accumulate_t<T>;
        to[i] = T(real(to[i]) + real(from[i]));
    }
};

/// to(s) = scale(s) * from.row(s); zeros where the row is absent.
template <class Real, class T, class Scale>
struct gather_rows {
    using vectorized = void;
    indexed_rows<T> from;  // (N,D) by (S)
    matrix_view<T> to;     // (S,D)
    Scale scale;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t s) const
    {
        const T* source = from.row(s);
        T* target = to.data_handle() + s * to.extent(1);
        const int64_t n = to.extent(1);
        constexpr int64_t across = line_elements<T>;
        const bool whole = in_lines<across>(n, source, target);
        if (!source) {
            for_each_line<across>(team, n, whole, [=](int64_t at, auto size) { write_rounded<T>(line<Real, size>{}, target + at); });
        } else if constexpr (std::is_same_v<Scale, unit_scale<Real>>) {
            for_each_line<across>(team, n, whole, [=](int64_t at, auto size) { write_line(read_line<size>(source + at), target + at); });
        } else {
            const Real w = scale(s);
            for_each_line<across>(team, n, whole, [=](int64_t at, auto size) {
                auto x = widened_line<Real, size>(source + at);
                FASTMOE_UNROLL
                for (int64_t j = 0; j < size; ++j) x.of[j] = w * x.of[j];
                write_rounded<T>(x, target + at);
            });
        }
    }
};

/// y(t) (+)= sum over c in [first(t), first(t+1)) of scale(c) * rows(slot_of(c)), in the order of c and in the widest type.
template <class Real, class T, class Y, class Range, class Scale>
struct sum_row_lists {
    using vectorized = void;
    static constexpr int resident = 4; ///< blocks of a multiprocessor
    using Sum = wider_t<wider_t<Real, T>, Y>;
    matrix_view<const T> rows;           // (S,D)
    vector_view<const int32_t> slot_of;  // (C)
    matrix_view<Y> y;                    // (T,D)
    write_mode mode;
    Range range;
    Scale scale;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        if constexpr (!is_single_lane<Team>) in_lines_of(team, t);
        else in_pieces(team, t);
    }

private:
    template <class Team>
    FASTMOE_HOST_DEVICE void in_lines_of(Team& team, int64_t t) const
    {
        const int64_t n = y.extent(1), begin = range.begin(t), end = range.end(t);
        const auto& self = *this;
        Y* to = y.data_handle() + t * n;
        constexpr int64_t across = line_elements<T, Y>;
        for_each_line<across>(team, n, in_lines<across>(n, rows.data_handle(), to), [=, &self](int64_t at, auto size) {
            line<Sum, size> total{};
            if (self.mode == write_mode::accumulate) total = widened_line<Sum, size>(to + at);
            const auto row = [&self, n, at](int64_t c) -> const T* {
                const int64_t s = self.slot_of(c);
                return s < 0 ? nullptr : self.rows.data_handle() + s * n + at;
            };
            add_lines(total, begin, end, 1, row, self.scale);
            write_rounded<Y>(total, to + at);
        });
    }

    template <class Team>
    FASTMOE_HOST_DEVICE void in_pieces(Team& team, int64_t t) const
    {
        const int64_t n = y.extent(1), begin = range.begin(t), end = range.end(t);
        const auto& self = *this;
        Y* to = y.data_handle() + t * n;
        team.for_each((n + row_piece - 1) / row_piece, [=, &self](int64_t piece) {
            const int64_t at = piece * row_piece, width = n - at < row_piece ? n - at : row_piece;
            Sum total[row_piece] = {};
            if (self.mode == write_mode::accumulate)
                for (int64_t j = 0; j < width; ++j) total[j] = Sum(to[at + j]);
            for (int64_t c = begin; c < end; ++c) {
                const int64_t s = self.slot_of(c);
                if (s < 0) continue;
                const Sum w = self.scale(c);
                const T* from = self.rows.data_handle() + s * n + at;
                if (width == row_piece)
                    for (int64_t j = 0; j < row_piece; ++j) total[j] += w * Sum(from[j]);
                else
                    for (int64_t j = 0; j < width; ++j) total[j] += w * Sum(from[j]);
            }
            for (int64_t j = 0; j < width; ++j) to[at + j] = Y(total[j]);
        });
    }
};

/// products(c) = <a(token), rows(slot_of(c))>, 0 where a choice is dropped.
template <class Real, class T, class Range>
struct dot_row_lists {
    using vectorized = void;
    matrix_view<const T> a;             // (T,D)
    matrix_view<const T> rows;          // (S,D)
    vector_view<const int32_t> slot_of; // (C)
    vector_view<Real> products;         // (C)
    Range range;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        if constexpr (!is_single_lane<Team>) {
            for (int64_t c = range.begin(t), end = range.end(t); c < end; c += rows_together) together(team, t, c, end);
        } else {
            for (int64_t c = range.begin(t); c < range.end(t); ++c) one(team, t, c);
        }
    }

private:
    using Sum = wider_t<Real, T>;

    /// Products of several rows with one.
    struct products_of {
        Sum of[rows_together];

        FASTMOE_HOST_DEVICE friend products_of operator+(products_of sum, const products_of& more) noexcept
        {
            FASTMOE_UNROLL
            for (int k = 0; k < rows_together; ++k) sum.of[k] += more.of[k];
            return sum;
        }
    };

    /// The choices from c on, at most rows_together: they share the token's row and the meeting of the lanes.
    template <class Team>
    FASTMOE_HOST_DEVICE void together(Team& team, int64_t t, int64_t c, int64_t end) const
    {
        const int64_t n = a.extent(1);
        const T* left = a.data_handle() + t * n;
        struct {
            const T* of[rows_together];
        } right;
        FASTMOE_UNROLL
        for (int k = 0; k < rows_together; ++k) {
            const int64_t s = c + k < end ? slot_of(c + k) : -1;
            right.of[k] = s < 0 ? nullptr : rows.data_handle() + s * n;
        }
        constexpr int64_t across = line_elements<T>;
        const auto total = sum_over_lines<across, products_of>(
            team, n, in_lines<across>(n, left, rows.data_handle()), [=](int64_t at, auto size) {
                const auto x = read_line<size>(left + at);
                line<T, size> y[rows_together];
                FASTMOE_UNROLL
                for (int k = 0; k < rows_together; ++k) y[k] = right.of[k] ? read_line<size>(right.of[k] + at) : line<T, size>{};
                products_of out{};
                FASTMOE_UNROLL
                for (int k = 0; k < rows_together; ++k) {
                    if (!right.of[k]) continue;
                    FASTMOE_UNROLL
                    for (int64_t j = 0; j < size; ++j) out.of[k] += Sum(x.of[j]) * Sum(y[k].of[j]);
                }
                return out;
            });
        if (team.lane() != 0) return;
        FASTMOE_UNROLL
        for (int k = 0; k < rows_together; ++k)
            if (c + k < end) products(c + k) = Real(total.of[k]);
    }

    template <class Team>
    FASTMOE_HOST_DEVICE void one(Team& team, int64_t t, int64_t c) const
    {
        const int64_t n = a.extent(1), s = slot_of(c);
        const T* left = a.data_handle() + t * n;
        Sum total = 0;
        if (s >= 0) {
            const T* right = rows.data_handle() + s * n;
            total = team.reduce(
                n, Sum(0), [](Sum x, Sum y) { return x + y; },
                [=](int64_t j) { return Sum(left[j]) * Sum(right[j]); });
        }
        if (team.lane() == 0) products(c) = Real(total);
    }
};

} // namespace detail

} // namespace fastmoe::inline FASTMOE_ABI
