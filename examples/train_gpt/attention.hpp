// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Causal multi-head attention and its gradient, without the (L,L) matrix: a team computes one row of it at a time.
///
///     B sequences   L positions   N heads   h width of a head   D = N * h   T = B * L
///
/// Each product is a row times a matrix whose fast axis is the one that the lanes share, so keys (and for the gradient
/// queries, values and dy too) are kept transposed, (h,L) a head.
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
    constexpr fm::row_hint hint(int64_t vectors) const noexcept
    {
        return {length * head, vectors * (length * int64_t{sizeof(double)} + 64)};
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

/// One head of one sequence, and the position that the row is about.
template <class T, class Real>
struct attention_row {
    const T *q, *k, *v; // (L,h) at pitch 3D
    int64_t place;      // offset of the head in a transposed (B*D,L)
    int64_t out;        // offset of the head in (T,D)
    int64_t first;      // offset of the head's position 0 in (B*N*L)
    int64_t i;

    FASTMOE_HOST_DEVICE attention_row(attention_shape s, const T* qkv, int64_t r)
    {
        i = r % s.length;
        const int64_t n = r / s.length % s.heads, b = r / s.length / s.heads;
        q = qkv + b * s.length * 3 * s.width() + n * s.head;
        k = q + s.width();
        v = k + s.width();
        place = (b * s.width() + n * s.head) * s.length;
        out = b * s.length * s.width() + n * s.head;
        first = r - i;
    }
};

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
        const attention_row<T, Real> at(shape, qkv, r);
        const int64_t pitch = 3 * shape.width(), n = at.i + 1;
        Real* p = team.template scratch<Real>(shape.length);
        Real* sum = team.template scratch<Real>(shape.head);
        const Real scale = Real(1) / std::sqrt(Real(shape.head));
        row_times_matrix(team, at.q + at.i * pitch, shape.head, keys + at.place, shape.length, scale, p, n);
        team.sync();
        const Real top = team.reduce(n, lowest<Real>, larger{}, [p](int64_t j) { return p[j]; });
        const Real total = team.reduce(n, Real(0), plus{}, [p, top](int64_t j) { return p[j] = fm::math::exp(p[j] - top); });
        team.sync();
        row_times_matrix(team, p, n, at.v, pitch, Real(1) / total, sum, shape.head);
        T* out = y + at.out + at.i * shape.width();
        team.for_each(shape.head, [=](int64_t d) { out[d] = T(sum[d]); });
        if (team.lane() == 0) lse[r] = top + fm::math::log(total);
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
        const attention_row<T, Real> at(shape, static_cast<const T*>(nullptr), r);
        const T* a = y + at.out + at.i * shape.width();
        const T* b = dy + at.out + at.i * shape.width();
        const Real sum =
            team.reduce(shape.head, Real(0), plus{}, [=](int64_t d) { return Real(a[d]) * Real(b[d]); });
        if (team.lane() == 0) delta[r] = sum;
    }
};

/// dq of a query: over its keys, ds = p (dp - delta), dq = scale * ds K.
template <class T, class Real>
struct attention_dq {
    using vectorized = void;
    attention_shape shape;
    const T* qkv;                // (T,3D)
    const T* dy;                 // (T,D)
    const Real *keys, *values;   // (B*D,L)
    const Real *lse, *delta;     // (B*N*L)
    T* dqkv;                     // (T,3D)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t r) const
    {
        const attention_row<T, Real> at(shape, qkv, r);
        const int64_t pitch = 3 * shape.width(), n = at.i + 1;
        Real* p = team.template scratch<Real>(shape.length);
        Real* dp = team.template scratch<Real>(shape.length);
        Real* sum = team.template scratch<Real>(shape.head);
        const Real scale = Real(1) / std::sqrt(Real(shape.head));
        row_times_matrix(team, at.q + at.i * pitch, shape.head, keys + at.place, shape.length, scale, p, n);
        row_times_matrix(team, dy + at.out + at.i * shape.width(), shape.head, values + at.place, shape.length, Real(1),
                         dp, n);
        const Real log_sum = lse[r], mean = delta[r];
        team.for_each(n, [=](int64_t j) { p[j] = fm::math::exp(p[j] - log_sum) * (dp[j] - mean); });
        team.sync();
        row_times_matrix(team, p, n, at.k, pitch, scale, sum, shape.head);
        T* out = dqkv + (at.q - qkv) + at.i * pitch;
        team.for_each(shape.head, [=](int64_t d) { out[d] = T(sum[d]); });
    }
};

/// dk and dv of a key: over the queries from its position on, dk = scale * ds Q, dv = p dY.
template <class T, class Real>
struct attention_dkv {
    using vectorized = void;
    attention_shape shape;
    const T* qkv;                 // (T,3D)
    const T* dy;                  // (T,D)
    const Real *queries, *dys;    // (B*D,L)
    const Real *lse, *delta;      // (B*N*L)
    T* dqkv;                      // (T,3D)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t r) const
    {
        const attention_row<T, Real> at(shape, qkv, r);
        const int64_t pitch = 3 * shape.width(), n = shape.length - at.i;
        Real* p = team.template scratch<Real>(shape.length);
        Real* ds = team.template scratch<Real>(shape.length);
        Real* sum = team.template scratch<Real>(shape.head);
        const Real scale = Real(1) / std::sqrt(Real(shape.head));
        row_times_matrix(team, at.k + at.i * pitch, shape.head, queries + at.place + at.i, shape.length, scale, p, n);
        row_times_matrix(team, at.v + at.i * pitch, shape.head, dys + at.place + at.i, shape.length, Real(1), ds, n);
        const Real *log_sum = lse + r, *mean = delta + r;
        team.for_each(n, [=](int64_t j) {
            const Real probability = fm::math::exp(p[j] - log_sum[j]);
            p[j] = probability;
            ds[j] = probability * (ds[j] - mean[j]);
        });
        team.sync();
        T* dk = dqkv + (at.k - qkv) + at.i * pitch;
        T* dv = dqkv + (at.v - qkv) + at.i * pitch;
        row_times_matrix(team, ds, n, at.q + at.i * pitch, pitch, scale, sum, shape.head);
        team.for_each(shape.head, [=](int64_t d) { dk[d] = T(sum[d]); });
        row_times_matrix(team, p, n, dy + at.out + at.i * shape.width(), shape.width(), Real(1), sum, shape.head);
        team.for_each(shape.head, [=](int64_t d) { dv[d] = T(sum[d]); });
    }
};

template <class T, class Executor>
void transpose(Executor& ex, attention_shape s, const T* x, int64_t pitch, accumulate_t<T>* out)
{
    fm::for_each_row(ex, s.batch * s.width(), transpose_sequences<T, accumulate_t<T>>{x, pitch, s.width(), s.length, out},
                     {.width = s.length});
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
    fm::for_each_row(ex, s.rows(),
                     detail::attend<T, Real>{s, qkv.data_handle(), saved.keys.data_handle(), y.data_handle(),
                                             saved.lse.data_handle()},
                     s.hint(2));
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
        fm::for_each_row(ex, s.rows(),
                         detail::attention_dq<T, Real>{s, in, dy.data_handle(), saved.keys.data_handle(),
                                                       values.data_handle(), saved.lse.data_handle(), delta.data_handle(),
                                                       dqkv.data_handle()},
                         s.hint(3));
        fm::for_each_row(ex, s.rows(),
                         detail::attention_dkv<T, Real>{s, in, dy.data_handle(), queries.data_handle(), dys.data_handle(),
                                                        saved.lse.data_handle(), delta.data_handle(), dqkv.data_handle()},
                         s.hint(3));
    }
    scratch.rewind(mark);
}

} // namespace train_gpt
