// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The scheme of one dot product an output, which CPU inference engines use for formats without a packed kernel: each
/// output is a dot product of one row with one row of a weight matrix, in blocks of 16 by 16 that stay in cache. The dot
/// products use AVX-512 where the machine has it, with its bfloat16 dot product for bfloat16; plain loops elsewhere.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <fastmoe/core/math.hpp>
#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/gemm/grouped_gemm.hpp>

#if FASTMOE_X86_DISPATCH
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized" // the compiler's own header, in the reduction
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#endif

namespace baselines {

namespace fm = fastmoe;
using fm::int32_t;
using fm::int64_t;

template <class T>
float dot_plain(const T* a, const T* b, int64_t n)
{
    float part[16] = {};
    for (int64_t i = 0; i < n; i += 16)
        for (int64_t j = 0; j < 16 && i + j < n; ++j) part[j] += float(a[i + j]) * float(b[i + j]);
    float sum = 0;
    for (float p : part) sum += p;
    return sum;
}

#if FASTMOE_X86_DISPATCH
[[gnu::target("avx512f")]] inline float sum_of(__m512 a, __m512 b, __m512 c, __m512 d)
{
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)));
}
/// n is a multiple of 64.
[[gnu::target("avx512f")]] inline float dot_avx512(const float* a, const float* b, int64_t n)
{
    __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
    for (int64_t i = 0; i < n; i += 64) {
        s0 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), _mm512_loadu_ps(b + i), s0);
        s1 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 16), _mm512_loadu_ps(b + i + 16), s1);
        s2 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 32), _mm512_loadu_ps(b + i + 32), s2);
        s3 = _mm512_fmadd_ps(_mm512_loadu_ps(a + i + 48), _mm512_loadu_ps(b + i + 48), s3);
    }
    return sum_of(s0, s1, s2, s3);
}
[[gnu::target("avx512f,avx512bf16")]] inline __m512bh load(const fm::bfloat16* p)
{
    return (__m512bh)_mm512_loadu_si512(p);
}
/// n is a multiple of 128.
[[gnu::target("avx512f,avx512bf16")]] inline float dot_avx512(const fm::bfloat16* a, const fm::bfloat16* b, int64_t n)
{
    __m512 s0 = _mm512_setzero_ps(), s1 = s0, s2 = s0, s3 = s0;
    for (int64_t i = 0; i < n; i += 128) {
        s0 = _mm512_dpbf16_ps(s0, load(a + i), load(b + i));
        s1 = _mm512_dpbf16_ps(s1, load(a + i + 32), load(b + i + 32));
        s2 = _mm512_dpbf16_ps(s2, load(a + i + 64), load(b + i + 64));
        s3 = _mm512_dpbf16_ps(s3, load(a + i + 96), load(b + i + 96));
    }
    return sum_of(s0, s1, s2, s3);
}
#endif

template <class T>
float dot(fm::instruction_set best, const T* a, const T* b, int64_t n)
{
#if FASTMOE_X86_DISPATCH
    constexpr bool wide = std::is_same_v<T, fm::bfloat16>;
    const auto least = wide ? fm::instruction_set::avx512_bf16 : fm::instruction_set::avx512;
    if (best >= least && n % (wide ? 128 : 64) == 0) return dot_avx512(a, b, n);
#endif
    return dot_plain(a, b, n);
}

/// The experts of one layer, a GELU MLP each, without biases, forward only; routing is given.
template <class T>
class dot_product_moe {
public:
    dot_product_moe(fm::host_executor& ex, int64_t tokens, int64_t k, int64_t experts, int64_t width, int64_t hidden)
        : t_(tokens), k_(k), c_(tokens * k), e_(experts), d_(width), h_(hidden), choices_(ex, c_), a_(ex, c_ * h_),
          u_(ex, c_ * h_), out_(ex, c_ * d_), begin_(static_cast<std::size_t>(experts + 1))
    {
    }

    /// y = sum over choices; overwritten.
    void forward(fm::host_executor& ex, fm::matrix_view<const T> x, const int32_t* experts, const float* weights,
                 fm::weight_view<const T> up, fm::weight_view<const T> down, fm::matrix_view<T> y)
    {
        group(experts);
        multiply(ex, up, u_.data(), [&](int64_t s) { return x.data_handle() + choices_.data()[s] / k_ * d_; });
        fm::for_each_row(ex, c_, activate{u_.data(), a_.data(), h_}, {.width = h_});
        multiply(ex, down, out_.data(), [&](int64_t s) { return a_.data() + s * h_; });
        slots_.resize(static_cast<std::size_t>(c_));
        for (int64_t s = 0; s < c_; ++s) slots_[choices_.data()[s]] = s;
        fm::for_each_row(ex, t_, weighted_sum{out_.data(), slots_.data(), weights, y.data_handle(), d_, k_}, {.width = d_});
    }

private:
    struct activate {
        using vectorized = void;
        const float* u;
        T* a;
        int64_t width;

        template <class Team>
        void operator()(Team& team, int64_t s) const
        {
            const float* from = u + s * width;
            T* to = a + s * width;
            team.for_each(width, [=](int64_t h) { to[h] = T(from[h] * fm::math::normal_cdf(from[h])); });
        }
    };
    struct weighted_sum {
        using vectorized = void;
        const float* out;
        const int64_t* slots;
        const float* weights;
        T* y;
        int64_t width, k;

        template <class Team>
        void operator()(Team& team, int64_t t) const
        {
            team.for_each(width, [&](int64_t d) {
                float sum = 0;
                for (int64_t j = 0; j < k; ++j) sum += weights[t * k + j] * out[slots[t * k + j] * width + d];
                y[t * width + d] = T(sum);
            });
        }
    };

    /// Choices in expert order.
    void group(const int32_t* experts)
    {
        std::vector<int64_t> next(static_cast<std::size_t>(e_ + 1), 0);
        for (int64_t c = 0; c < c_; ++c) ++next[experts[c] + 1];
        for (int64_t e = 0; e < e_; ++e) next[e + 1] += next[e];
        begin_ = next;
        for (int64_t c = 0; c < c_; ++c) choices_.data()[next[experts[c]]++] = static_cast<int32_t>(c);
    }

    /// out[s] = W[e(s)] in[s], one dot product an output.
    template <class Row>
    void multiply(fm::host_executor& ex, fm::weight_view<const T> w, float* out, Row in)
    {
        constexpr int64_t chunk = 64, tile = 16;
        const int64_t chunks = (w.out + chunk - 1) / chunk;
        ex.for_each_task(e_ * chunks, [&](int, int64_t task) {
            const int64_t e = task / chunks, first = task % chunks * chunk;
            const int64_t last = std::min(first + chunk, w.out);
            const T* matrix = w.base(e);
            for (int64_t s0 = begin_[e]; s0 < begin_[e + 1]; s0 += tile)
                for (int64_t o0 = first; o0 < last; o0 += tile)
                    for (int64_t s = s0; s < std::min(s0 + tile, begin_[e + 1]); ++s)
                        for (int64_t o = o0; o < std::min(o0 + tile, last); ++o)
                            out[s * w.out + o] = dot(ex.best(), in(s), matrix + o * w.row_stride, w.in);
        });
    }

    template <class U>
    using memory = fm::buffer<U, fm::host_executor>;

    int64_t t_, k_, c_, e_, d_, h_;
    memory<int32_t> choices_;
    memory<T> a_;
    memory<float> u_, out_;
    std::vector<int64_t> begin_, slots_;
};

} // namespace baselines
