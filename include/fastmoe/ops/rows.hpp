// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Moves of whole rows: gather by index with a scale, and sums of a list of rows. Dispatch and combine are made of them.
#pragma once

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/core/indexed_rows.hpp>
#include <fastmoe/exec/executor.hpp>
#include <fastmoe/ops/reduce.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

/// Columns that a lane sums in registers.
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
        if (!source) {
            team.for_each(n, [=](int64_t j) { target[j] = T(Real(0)); });
        } else if constexpr (std::is_same_v<Scale, unit_scale<Real>>) {
            team.for_each(n, [=](int64_t j) { target[j] = source[j]; });
        } else {
            const Real w = scale(s);
            team.for_each(n, [=](int64_t j) { target[j] = T(w * Real(source[j])); });
        }
    }
};

/// y(t) (+)= sum over c in [first(t), first(t+1)) of scale(c) * rows(slot_of(c)), in the order of c and in the widest type.
template <class Real, class T, class Y, class Range, class Scale>
struct sum_row_lists {
    using vectorized = void;
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
        using Sum = wider_t<Real, T>;
        const int64_t n = a.extent(1);
        const T* left = a.data_handle() + t * n;
        for (int64_t c = range.begin(t); c < range.end(t); ++c) {
            const int64_t s = slot_of(c);
            Sum total = 0;
            if (s >= 0) {
                const T* right = rows.data_handle() + s * n;
                total = team.reduce(
                    n, Sum(0), [](Sum x, Sum y) { return x + y; },
                    [=](int64_t j) { return Sum(left[j]) * Sum(right[j]); });
            }
            if (team.lane() == 0) products(c) = Real(total);
        }
    }
};

} // namespace detail

} // namespace fastmoe::inline FASTMOE_ABI
