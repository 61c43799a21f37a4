// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The naive way, as a framework user writes it: for each expert a boolean mask over all choices, a gather, one product
/// a matrix, and a scatter-add. Every step is parallel and vectorized and the products are the same library's, so that
/// what it loses, it loses by its scheme.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include <fastmoe/core/math.hpp>
#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/gemm/grouped_gemm.hpp>

namespace baselines {

namespace fm = fastmoe;
using fm::int32_t;
using fm::int64_t;

/// mask[c] = experts[c] == expert
struct equal_to {
    using vectorized = void;
    const int32_t* experts; // (C)
    std::uint8_t* mask;     // (C)
    int32_t expert;

    void operator()(int64_t c) const { mask[c] = experts[c] == expert; }
};

/// rows[s] = scale[s] * x[choices[s] / k]; without scale a copy.
template <class T>
struct gather {
    using vectorized = void;
    const T* x;             // (T,D)
    const int32_t* choices; // (S)
    const float* weights;   // (C) or null
    T* rows;                // (S,D)
    int64_t width, k;

    template <class Team>
    void operator()(Team& team, int64_t s) const
    {
        const T* from = x + choices[s] / k * width;
        T* to = rows + s * width;
        if (weights) {
            const float w = weights[choices[s]];
            team.for_each(width, [=](int64_t d) { to[d] = T(w * float(from[d])); });
        } else {
            team.for_each(width, [=](int64_t d) { to[d] = from[d]; });
        }
    }
};

/// y[choices[s] / k] += scale * rows[s]; an expert has a token at most once, so rows do not meet.
template <class T>
struct scatter_add {
    using vectorized = void;
    const T* rows;          // (S,D)
    const int32_t* choices; // (S)
    const float* weights;   // (C) or null: 1
    T* y;                   // (T,D)
    int64_t width, k;

    template <class Team>
    void operator()(Team& team, int64_t s) const
    {
        const float w = weights ? weights[choices[s]] : 1.0f;
        const T* from = rows + s * width;
        T* to = y + choices[s] / k * width;
        team.for_each(width, [=](int64_t d) { to[d] = T(float(to[d]) + w * float(from[d])); });
    }
};

/// a = gelu(u), the exact form.
template <class T>
struct gelu_rows {
    using vectorized = void;
    const T* u;
    T* a;
    int64_t width;

    template <class Team>
    void operator()(Team& team, int64_t s) const
    {
        const T* from = u + s * width;
        T* to = a + s * width;
        team.for_each(width, [=](int64_t h) {
            const float v = float(from[h]);
            to[h] = T(v * fm::math::normal_cdf(v));
        });
    }
};

/// da *= gelu'(u)
template <class T>
struct gelu_backward_rows {
    using vectorized = void;
    const T* u;
    T* da;
    int64_t width;

    template <class Team>
    void operator()(Team& team, int64_t s) const
    {
        const T* from = u + s * width;
        T* d = da + s * width;
        team.for_each(width, [=](int64_t h) {
            const float v = float(from[h]);
            d[h] = T(float(d[h]) * (fm::math::normal_cdf(v) + v * fm::math::normal_density(v)));
        });
    }
};

/// dweights[choices[s]] = <dy[token], out[s]>
template <class T>
struct weight_gradient {
    using vectorized = void;
    const T* dy;            // (T,D)
    const T* out;           // (S,D)
    const int32_t* choices; // (S)
    float* dweights;        // (C)
    int64_t width, k;

    template <class Team>
    void operator()(Team& team, int64_t s) const
    {
        const T* d = dy + choices[s] / k * width;
        const T* o = out + s * width;
        dweights[choices[s]] = team.reduce(
            width, 0.0f, [](float a, float b) { return a + b; }, [=](int64_t i) { return float(d[i]) * float(o[i]); });
    }
};

struct zero_bytes {
    using vectorized = void;
    std::uint64_t* words;

    void operator()(int64_t i) const { words[i] = 0; }
};

/// The experts of one layer, a GELU MLP each, without biases; routing is given.
template <class T, class Gemm>
class naive_moe {
public:
    naive_moe(fm::host_executor& ex, int64_t tokens, int64_t k, int64_t experts, int64_t width, int64_t hidden)
        : k_(k), c_(tokens * k), e_(experts), d_(width), h_(hidden), mask_(ex, c_), choices_(ex, c_),
          x_(ex, c_ * d_), out_(ex, c_ * d_), u_(ex, c_ * h_), a_(ex, c_ * h_), da_(ex, c_ * h_), dy_(ex, c_ * d_),
          dx_(ex, c_ * d_), begin_(static_cast<std::size_t>(experts + 1), 0)
    {
        fm::arena measure;
        reserve(ex, measure);
        workspace_ = fm::buffer<std::byte, fm::host_executor>(ex, measure.bytes());
    }

    /// y = sum over experts; overwritten. Keeps what backward reads.
    void forward(fm::host_executor& ex, fm::matrix_view<const T> x, const int32_t* experts, const float* weights,
                 fm::weight_view<const T> up, fm::weight_view<const T> down, fm::matrix_view<T> y)
    {
        zero(ex, y);
        for (int64_t e = 0; e < e_; ++e) {
            select(ex, experts, e);
            const int64_t at = begin_[e], n = begin_[e + 1] - at;
            if (n == 0) continue;
            const int32_t* choice = choices_.data() + at;
            each(ex, n, d_, gather<T>{x.data_handle(), choice, nullptr, x_.data() + at * d_, d_, k_});
            forward_product(ex, n, x_.data() + at * d_, of(up, e), u_.data() + at * h_);
            each(ex, n, h_, gelu_rows<T>{u_.data() + at * h_, a_.data() + at * h_, h_});
            forward_product(ex, n, a_.data() + at * h_, of(down, e), out_.data() + at * d_);
            each(ex, n, d_, scatter_add<T>{out_.data() + at * d_, choice, weights, y.data_handle(), d_, k_});
        }
    }

    /// dx, dweights, dup and ddown are overwritten.
    void backward(fm::host_executor& ex, fm::matrix_view<const T> dy, const float* weights, fm::weight_view<const T> up,
                  fm::weight_view<const T> down, fm::matrix_view<T> dx, float* dweights, fm::weight_view<T> dup,
                  fm::weight_view<T> ddown)
    {
        zero(ex, dx);
        for (int64_t e = 0; e < e_; ++e) {
            const int64_t at = begin_[e], n = begin_[e + 1] - at;
            const int32_t* choice = choices_.data() + at;
            T* a = a_.data() + at * h_;
            if (n > 0) {
                each(ex, n, d_, weight_gradient<T>{dy.data_handle(), out_.data() + at * d_, choice, dweights, d_, k_});
                each(ex, n, d_, gather<T>{dy.data_handle(), choice, weights, dy_.data(), d_, k_});
                gradient_product(ex, n, dy_.data(), of(down, e), da_.data());
            }
            weight_product(ex, n, dy_.data(), a, of(ddown, e));
            if (n > 0) {
                each(ex, n, h_, gelu_backward_rows<T>{u_.data() + at * h_, da_.data(), h_});
                gradient_product(ex, n, da_.data(), of(up, e), dx_.data());
            }
            weight_product(ex, n, da_.data(), x_.data() + at * d_, of(dup, e));
            if (n > 0) each(ex, n, d_, scatter_add<T>{dx_.data(), choice, nullptr, dx.data_handle(), d_, k_});
        }
    }

private:
    template <class U>
    static fm::weight_view<U> of(fm::weight_view<U> w, int64_t e)
    {
        return {w.base(e), nullptr, 1, w.out, w.in, w.expert_stride, w.row_stride, w.col_stride};
    }
    static fm::plain_rows<T> rows(const T* data, int64_t n, int64_t width)
    {
        return {fm::matrix_view<const T>(data, n, width)};
    }
    template <class F>
    static void each(fm::host_executor& ex, int64_t n, int64_t width, const F& f)
    {
        fm::for_each_row(ex, n, f, {.width = width});
    }
    static void zero(fm::host_executor& ex, fm::matrix_view<T> y)
    {
        const int64_t words = y.extent(0) * y.extent(1) * static_cast<int64_t>(sizeof(T)) / 8;
        fm::for_each(ex, words, zero_bytes{reinterpret_cast<std::uint64_t*>(y.data_handle())});
    }

    /// The choices of expert e, in order, behind those of the experts before it.
    void select(fm::host_executor& ex, const int32_t* experts, int64_t e)
    {
        fm::for_each(ex, c_, equal_to{experts, mask_.data(), static_cast<int32_t>(e)});
        int64_t n = begin_[e];
        const std::uint8_t* mask = mask_.data();
        int32_t* choices = choices_.data();
        for (int64_t c = 0; c < c_; ++c)
            if (mask[c]) choices[n++] = static_cast<int32_t>(c);
        begin_[e + 1] = n;
    }

    /// One group of n rows.
    struct one_group {
        int32_t count;
        int64_t offsets[2];
        explicit one_group(int64_t n) : count(static_cast<int32_t>(n)), offsets{0, n} {}
        fm::row_groups view() const
        {
            return {fm::vector_view<const int32_t>(&count, 1), fm::vector_view<const int64_t>(offsets, 2), offsets[1]};
        }
    };

    void forward_product(fm::host_executor& ex, int64_t n, const T* in, fm::weight_view<const T> w, T* out)
    {
        const one_group g(n);
        fm::arena memory(workspace_.view());
        gemm_.forward(ex, g.view(), rows(in, n, w.in), w, fm::matrix_view<const T>{}, fm::matrix_view<T>(out, n, w.out),
                      fm::no_epilogue{}, memory);
    }
    void gradient_product(fm::host_executor& ex, int64_t n, const T* dout, fm::weight_view<const T> w, T* din)
    {
        const one_group g(n);
        fm::arena memory(workspace_.view());
        gemm_.dgrad(ex, g.view(), rows(dout, n, w.out), w, fm::matrix_view<T>(din, n, w.in), fm::no_epilogue{}, memory);
    }
    void weight_product(fm::host_executor& ex, int64_t n, const T* dout, const T* in, fm::weight_view<T> dw)
    {
        const one_group g(n);
        fm::arena memory(workspace_.view());
        gemm_.wgrad(ex, g.view(), rows(dout, n, dw.out), rows(in, n, dw.in), dw, fm::write_mode::overwrite, memory);
    }
    /// The most that any product may take, whatever number of choices an expert gets.
    void reserve(fm::host_executor& ex, fm::arena& measure)
    {
        for (int64_t n = 1; n < 2 * c_; n *= 2) {
            reserve_products(ex, std::min(n, c_), h_, d_, measure);
            reserve_products(ex, std::min(n, c_), d_, h_, measure);
        }
    }
    void reserve_products(fm::host_executor& ex, int64_t n, int64_t out, int64_t in, fm::arena& measure)
    {
        const one_group g(n);
        const fm::weight_view<const T> w{nullptr, nullptr, 1, out, in, 0, in, 1};
        gemm_.forward(ex, g.view(), rows(nullptr, n, in), w, fm::matrix_view<const T>{}, fm::matrix_view<T>(nullptr, n, out),
                      fm::no_epilogue{}, measure);
        gemm_.dgrad(ex, g.view(), rows(nullptr, n, out), w, fm::matrix_view<T>(nullptr, n, in), fm::no_epilogue{}, measure);
        gemm_.wgrad(ex, g.view(), rows(nullptr, n, out), rows(nullptr, n, in),
                    fm::weight_view<T>{nullptr, nullptr, 1, out, in, 0, in, 1}, fm::write_mode::overwrite, measure);
    }

    template <class U>
    using memory = fm::buffer<U, fm::host_executor>;

    int64_t k_, c_, e_, d_, h_;
    memory<std::uint8_t> mask_;
    memory<int32_t> choices_;
    memory<T> x_, out_, u_, a_, da_, dy_, dx_;
    memory<std::byte> workspace_;
    std::vector<int64_t> begin_;
    Gemm gemm_;
};

} // namespace baselines
