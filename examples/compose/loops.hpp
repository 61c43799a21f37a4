// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the engine's kernels of compose.cu compute, as loops for any executor: RMSNorm without a scale, the residual, and the
/// way back through both. So the block runs where there is no GPU.
#pragma once

#include <cmath>

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/exec/executor.hpp>

namespace compose {

namespace fm = fastmoe;
using fm::int64_t;

inline constexpr double norm_epsilon = 1e-6;

template <class T>
FASTMOE_HOST_DEVICE fm::accumulate_t<T> inverse_norm(const T* h, int64_t width)
{
    using real = fm::accumulate_t<T>;
    real squares = 0;
    for (int64_t d = 0; d < width; ++d) squares += real(h[d]) * real(h[d]);
    return real(1) / std::sqrt(squares / real(width) + real(norm_epsilon));
}

/// x = h / norm(h).
template <class T>
struct normalize_row {
    const T* h; // (T,D)
    T* x;       // (T,D)
    int64_t width;

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        using real = fm::accumulate_t<T>;
        const real scale = inverse_norm(h + t * width, width);
        for (int64_t i = t * width; i < (t + 1) * width; ++i) x[i] = T(real(h[i]) * scale);
    }
};

/// out = h + y.
template <class T>
struct add_element {
    const T* h;
    const T* y;
    T* out;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        using real = fm::accumulate_t<T>;
        out[i] = T(real(h[i]) + real(y[i]));
    }
};

/// dh = dout + s (dx - h s^2 <h, dx> / D), with s the inverse norm.
template <class T>
struct normalize_row_backward {
    const T* h;    // (T,D)
    const T* dx;   // (T,D)
    const T* dout; // (T,D)
    T* dh;         // (T,D)
    int64_t width;

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        using real = fm::accumulate_t<T>;
        const real scale = inverse_norm(h + t * width, width);
        const int64_t begin = t * width, end = begin + width;
        real along = 0;
        for (int64_t i = begin; i < end; ++i) along += real(h[i]) * real(dx[i]);
        const real back = along * scale * scale / real(width);
        for (int64_t i = begin; i < end; ++i) dh[i] = T(real(dout[i]) + scale * (real(dx[i]) - real(h[i]) * back));
    }
};

template <class Executor>
struct loops {
    Executor& ex;
    int64_t tokens, width;

    template <class T>
    void normalize(const T* h, T* x) const
    {
        fm::for_each(ex, tokens, normalize_row<T>{h, x, width});
    }
    template <class T>
    void add(const T* h, const T* y, T* out) const
    {
        fm::for_each(ex, tokens * width, add_element<T>{h, y, out});
    }
    template <class T>
    void normalize_backward(const T* h, const T* dx, const T* dout, T* dh) const
    {
        fm::for_each(ex, tokens, normalize_row_backward<T>{h, dx, dout, dh, width});
    }
};

} // namespace compose
