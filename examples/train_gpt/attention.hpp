// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Causal multi-head attention and its gradient, without the (L,L) matrix: a team computes two rows of it at a time.
///
///     B sequences   L positions   N heads   h width of a head   D = N * h   T = B * L
///
/// Each product is two rows times a matrix whose fast axis is the one that the lanes share, so keys (and for the
/// gradient queries, values and dy too) are kept transposed, (h,L) a head.
#pragma once

#include "train_gpt/team_math.hpp"

namespace train_gpt {

struct attention_shape {
    int64_t batch;  ///< B
    int64_t length; ///< L
    int64_t heads;  ///< N
    int64_t head;   ///< h

    FASTMOE_HOST_DEVICE constexpr int64_t width() const noexcept { return heads * head; }
    FASTMOE_HOST_DEVICE constexpr int64_t tokens() const noexcept { return batch * length; }
    FASTMOE_HOST_DEVICE constexpr int64_t rows() const noexcept { return batch * heads * length; }
    /// Teams that take two neighbouring rows each.
    constexpr int64_t pairs() const noexcept { return batch * heads * ((length + 1) / 2); }
    /// For a team with so many vectors of L and two of h in scratch.
    constexpr fm::row_hint hint(int64_t vectors, int64_t element) const noexcept
    {
        return {2 * length * head, vectors * (length * element + 64) + 2 * (head * element + 64)};
    }
};

/// What backward needs beside the inputs.
template <class Real>
struct attention_saved {
    matrix_view<Real> keys; // (B*D,L)  transposed
    vector_view<Real> lse;  // (B*N*L)  log of the sum of e^score
};

namespace detail {

/// Sequence b, column c of x (T, any) becomes row b * columns + c of out (B*columns,L).
template <class T, class Real>
struct transpose_sequences {
    const T* x;
    int64_t pitch, columns, length;
    Real* out;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t r) const
    {
        const T* from = x + r / columns * length * pitch + r % columns;
        Real* to = out + r * length;
        const int64_t step = pitch;
        team.for_each(length, [=](int64_t t) { to[t] = Real(from[t * step]); });
    }
};

/// One head of one sequence, and the two neighbouring positions that a team computes: i, and i + 1 where there is one.
/// Where not, both are i: the same numbers, twice.
template <class T>
struct attention_rows {
    const T *q, *k, *v; // (L,h) at pitch 3D
    int64_t place;      // offset of the head in a transposed (B*D,L)
    int64_t out;        // offset of the head in (T,D)
    int64_t first;      // offset of the head's position 0 in (B*N*L)
    int64_t i, other;

    FASTMOE_HOST_DEVICE attention_rows(attention_shape s, const T* qkv, int64_t r)
    {
        const int64_t pairs = (s.length + 1) / 2, n = r / pairs % s.heads, b = r / pairs / s.heads;
        i = r % pairs * 2;
        other = i + 1 < s.length ? i + 1 : i;
        q = qkv + b * s.length * 3 * s.width() + n * s.head;
        k = q + s.width();
        v = k + s.width();
        place = (b * s.width() + n * s.head) * s.length;
        out = b * s.length * s.width() + n * s.head;
        first = (b * s.heads + n) * s.length;
    }
};

template <class Team, class T, class Real>
FASTMOE_HOST_DEVICE void store_row(Team& team, const Real* from, T* to, int64_t n)
{
    team.for_each(n, [=](int64_t d) { to[d] = T(from[d]); });
}

template <class T, class Real>
struct attend {
    using vectorized = void;
    attention_shape shape;
    const T* qkv;     // (T,3D)
    const Real* keys; // (B*D,L)
    T* y;             // (T,D)
    Real* lse;        // (B*N*L)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t r) const
    {
        const attention_rows<T> at(shape, qkv, r);
        const int64_t pitch = 3 * shape.width(), h = shape.head, n = at.other + 1;
        Real* p0 = team.template scratch<Real>(shape.length);
        Real* p1 = team.template scratch<Real>(shape.length);
        Real* sum0 = team.template scratch<Real>(h);
        Real* sum1 = team.template scratch<Real>(h);
        const Real scale = Real(1) / std::sqrt(Real(h));
        two_rows_times_matrix(team, at.q + at.i * pitch, at.q + at.other * pitch, h, keys + at.place, shape.length,
                              scale, scale, p0, p1, n);
        const Real total0 = exponentiate(team, p0, at.i + 1, n, lse + at.first + at.i);
        const Real total1 = exponentiate(team, p1, n, n, lse + at.first + at.other);
        two_rows_times_matrix(team, p0, p1, n, at.v, pitch, Real(1) / total0, Real(1) / total1, sum0, sum1, h);
        store_row(team, sum0, y + at.out + at.i * shape.width(), h);
        store_row(team, sum1, y + at.out + at.other * shape.width(), h);
    }

    /// p = e^(p - max) for the first n, and 0 up to `all`; returns the sum.
    template <class Team>
    FASTMOE_HOST_DEVICE static Real exponentiate(Team& team, Real* p, int64_t n, int64_t all, Real* log_sum)
    {
        const Real top = team.reduce(n, lowest<Real>, larger{}, [p](int64_t j) { return p[j]; });
        const Real total = team.reduce(n, Real(0), plus{}, [=](int64_t j) { return p[j] = fm::math::exp(p[j] - top); });
        team.for_each(all, [=](int64_t j) { p[j] = j < n ? p[j] : Real(0); });
        if (team.lane() == 0) *log_sum = top + fm::math::log(total);
        team.sync();
        return total;
    }
};

/// delta[r] = <dy, y> of a head at a position: what softmax subtracts from every dp of the row.
template <class T, class Real>
struct attention_delta {
    using vectorized = void;
    attention_shape shape;
    const T *y, *dy; // (T,D)
    Real* delta;     // (B*N*L)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t r) const
    {
        const int64_t i = r % shape.length, n = r / shape.length % shape.heads, b = r / shape.length / shape.heads;
        const int64_t offset = (b * shape.length + i) * shape.width() + n * shape.head;
        const T *left = y + offset, *right = dy + offset;
        const Real sum =
            team.reduce(shape.head, Real(0), plus{}, [=](int64_t d) { return Real(left[d]) * Real(right[d]); });
        if (team.lane() == 0) delta[r] = sum;
    }
};

/// dq of two queries: over their keys, ds = p (dp - delta), dq = scale * ds K.
template <class T, class Real>
struct attention_dq {
    using vectorized = void;
    attention_shape shape;
    const T* qkv;              // (T,3D)
    const T* dy;               // (T,D)
    const Real *keys, *values; // (B*D,L)
    const Real *lse, *delta;   // (B*N*L)
    T* dqkv;                   // (T,3D)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t r) const
    {
        const attention_rows<T> at(shape, qkv, r);
        const int64_t width = shape.width(), pitch = 3 * width, h = shape.head, n = at.other + 1;
        Real* p0 = team.template scratch<Real>(shape.length);
        Real* p1 = team.template scratch<Real>(shape.length);
        Real* dp0 = team.template scratch<Real>(shape.length);
        Real* dp1 = team.template scratch<Real>(shape.length);
        Real* sum0 = team.template scratch<Real>(h);
        Real* sum1 = team.template scratch<Real>(h);
        const Real scale = Real(1) / std::sqrt(Real(h));
        const T* dout = dy + at.out;
        two_rows_times_matrix(team, at.q + at.i * pitch, at.q + at.other * pitch, h, keys + at.place, shape.length,
                              scale, scale, p0, p1, n);
        two_rows_times_matrix(team, dout + at.i * width, dout + at.other * width, h, values + at.place, shape.length,
                              Real(1), Real(1), dp0, dp1, n);
        score_gradient(team, p0, dp0, at.i + 1, n, at.first + at.i);
        score_gradient(team, p1, dp1, n, n, at.first + at.other);
        team.sync();
        two_rows_times_matrix(team, p0, p1, n, at.k, pitch, scale, scale, sum0, sum1, h);
        T* out = dqkv + (at.q - qkv);
        store_row(team, sum0, out + at.i * pitch, h);
        store_row(team, sum1, out + at.other * pitch, h);
    }

    /// ds over p for the first n keys, and 0 up to `all`.
    template <class Team>
    FASTMOE_HOST_DEVICE void score_gradient(Team& team, Real* p, const Real* dp, int64_t n, int64_t all,
                                            int64_t r) const
    {
        const Real log_sum = lse[r], mean = delta[r];
        team.for_each(all, [=](int64_t j) {
            const Real ds = fm::math::exp(p[j] - log_sum) * (dp[j] - mean);
            p[j] = j < n ? ds : Real(0);
        });
    }
};

/// dk and dv of two keys: over the queries from their position on, dk = scale * ds Q, dv = p dY.
template <class T, class Real>
struct attention_dkv {
    using vectorized = void;
    attention_shape shape;
    const T* qkv;              // (T,3D)
    const T* dy;               // (T,D)
    const Real *queries, *dys; // (B*D,L)
    const Real *lse, *delta;   // (B*N*L)
    T* dqkv;                   // (T,3D)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t r) const
    {
        const attention_rows<T> at(shape, qkv, r);
        const int64_t width = shape.width(), pitch = 3 * width, h = shape.head, n = shape.length - at.i;
        Real* p0 = team.template scratch<Real>(shape.length);
        Real* p1 = team.template scratch<Real>(shape.length);
        Real* ds0 = team.template scratch<Real>(shape.length);
        Real* ds1 = team.template scratch<Real>(shape.length);
        Real* sum0 = team.template scratch<Real>(h);
        Real* sum1 = team.template scratch<Real>(h);
        const Real scale = Real(1) / std::sqrt(Real(h));
        const int64_t here = at.place + at.i; // query i is the first that sees key i
        two_rows_times_matrix(team, at.k + at.i * pitch, at.k + at.other * pitch, h, queries + here, shape.length,
                              scale, scale, p0, p1, n);
        two_rows_times_matrix(team, at.v + at.i * pitch, at.v + at.other * pitch, h, dys + here, shape.length, Real(1),
                              Real(1), ds0, ds1, n);
        score_gradient(team, p0, ds0, 0, n, at.first + at.i);
        score_gradient(team, p1, ds1, at.other - at.i, n, at.first + at.i);
        team.sync();
        T* out = dqkv + (at.k - qkv);
        two_rows_times_matrix(team, ds0, ds1, n, at.q + at.i * pitch, pitch, scale, scale, sum0, sum1, h);
        store_row(team, sum0, out + at.i * pitch, h);
        store_row(team, sum1, out + at.other * pitch, h);
        out += width; // dv
        two_rows_times_matrix(team, p0, p1, n, dy + at.out + at.i * width, width, Real(1), Real(1), sum0, sum1, h);
        store_row(team, sum0, out + at.i * pitch, h);
        store_row(team, sum1, out + at.other * pitch, h);
    }

    /// p and ds of the queries from `begin` on, and 0 before; r is the first query's place in lse and delta.
    template <class Team>
    FASTMOE_HOST_DEVICE void score_gradient(Team& team, Real* p, Real* ds, int64_t begin, int64_t n, int64_t r) const
    {
        const Real *log_sum = lse + r, *mean = delta + r;
        team.for_each(n, [=](int64_t j) {
            const Real probability = j < begin ? Real(0) : fm::math::exp(p[j] - log_sum[j]);
            p[j] = probability;
            ds[j] = probability * (ds[j] - mean[j]);
        });
    }
};

template <class T, class Executor>
void transpose(Executor& ex, attention_shape s, const T* x, int64_t pitch, accumulate_t<T>* out)
{
    fm::for_each_row(ex, s.batch * s.width(),
                     transpose_sequences<T, accumulate_t<T>>{x, pitch, s.width(), s.length, out}, {.width = s.length});
}

} // namespace detail

template <class Real>
attention_saved<Real> reserve_attention(fm::arena& memory, attention_shape s)
{
    return {memory.matrix<Real>(s.batch * s.width(), s.length), memory.vector<Real>(s.rows())};
}

/// y = softmax(q k^T / sqrt(h)) v a head, a position sees itself and those before it.
/// @param qkv    queries, keys and values side by side  // (T,3D)
/// @param y      overwritten                            // (T,D)
/// @param saved  from reserve_attention; overwritten
template <class T, class Executor>
void attention(Executor& ex, attention_shape s, matrix_view<const type_identity_t<T>> qkv, matrix_view<T> y,
               const attention_saved<accumulate_t<T>>& saved)
{
    using Real = accumulate_t<T>;
    fm::expects_shape(qkv, "qkv (T,3D)", s.tokens(), 3 * s.width());
    fm::expects_shape(y, "y (T,D)", s.tokens(), s.width());
    detail::transpose(ex, s, qkv.data_handle() + s.width(), 3 * s.width(), saved.keys.data_handle());
    fm::for_each_row(ex, s.pairs(),
                     detail::attend<T, Real>{s, qkv.data_handle(), saved.keys.data_handle(), y.data_handle(),
                                             saved.lse.data_handle()},
                     s.hint(2, sizeof(Real)));
}

/// @param dqkv     overwritten                                             // (T,3D)
/// @param scratch  taken and given back; on a measuring arena only counted
template <class T, class Executor>
void attention_backward(Executor& ex, attention_shape s, matrix_view<const type_identity_t<T>> qkv,
                        matrix_view<const type_identity_t<T>> y, matrix_view<const type_identity_t<T>> dy,
                        const attention_saved<accumulate_t<T>>& saved, matrix_view<T> dqkv, fm::arena& scratch)
{
    using Real = accumulate_t<T>;
    const int64_t mark = scratch.used(), width = s.width();
    const auto delta = scratch.vector<Real>(s.rows());
    const auto queries = scratch.matrix<Real>(s.batch * width, s.length);
    const auto values = scratch.matrix<Real>(s.batch * width, s.length);
    const auto dys = scratch.matrix<Real>(s.batch * width, s.length);
    if (!scratch.measuring()) {
        fm::expects_shape(dqkv, "dqkv (T,3D)", s.tokens(), 3 * width);
        const T* in = qkv.data_handle();
        detail::transpose(ex, s, in, 3 * width, queries.data_handle());
        detail::transpose(ex, s, in + 2 * width, 3 * width, values.data_handle());
        detail::transpose(ex, s, dy.data_handle(), width, dys.data_handle());
        fm::for_each_row(ex, s.rows(),
                         detail::attention_delta<T, Real>{s, y.data_handle(), dy.data_handle(), delta.data_handle()},
                         {.width = s.head});
        fm::for_each_row(ex, s.pairs(),
                         detail::attention_dq<T, Real>{s, in, dy.data_handle(), saved.keys.data_handle(),
                                                       values.data_handle(), saved.lse.data_handle(),
                                                       delta.data_handle(), dqkv.data_handle()},
                         s.hint(4, sizeof(Real)));
        fm::for_each_row(ex, s.pairs(),
                         detail::attention_dkv<T, Real>{s, in, dy.data_handle(), queries.data_handle(),
                                                        dys.data_handle(), saved.lse.data_handle(), delta.data_handle(),
                                                        dqkv.data_handle()},
                         s.hint(4, sizeof(Real)));
    }
    scratch.rewind(mark);
}

} // namespace train_gpt
