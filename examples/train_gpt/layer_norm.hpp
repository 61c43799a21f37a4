// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Layer norm fused with the residual sum before it (Ba et al. 2016), and its gradient.
///
///     x_out = x + branch        h = gain * (x_out - mean) / sqrt(variance + 1e-5) + bias
///
/// The residual stream x stays in the accumulating type; branches and h are in the type of the model.
#pragma once

#include "train_gpt/team_math.hpp"

namespace train_gpt {

/// What backward needs beside x_out.
template <class Real>
struct norm_saved {
    vector_view<Real> mean; // (T)
    vector_view<Real> rstd; // (T)  1 / sqrt(variance + 1e-5)
};

template <class Real>
norm_saved<Real> reserve_norm(fm::arena& memory, int64_t tokens)
{
    return {memory.vector<Real>(tokens), memory.vector<Real>(tokens)};
}

namespace detail {

/// Tokens whose gain and bias gradients one team sums; fixed, so that the sums do not depend on threads.
inline constexpr int64_t norm_block = 32;

template <class T, class Real>
struct add_norm {
    using vectorized = void;
    int64_t width;
    const Real* x;                 // (T,D)
    const T* branch;               // (T,D), or null: adds nothing
    const Real *gain, *bias;       // (D)
    Real* x_out;                   // (T,D)
    T* h;                          // (T,D)
    Real *mean_out, *rstd_out;     // (T)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const Real* in = x + t * width;
        Real* sum = x_out + t * width;
        if (branch) {
            const T* other = branch + t * width;
            team.for_each(width, [=](int64_t d) { sum[d] = in[d] + Real(other[d]); });
        } else if (sum != in) {
            team.for_each(width, [=](int64_t d) { sum[d] = in[d]; });
        }
        team.sync();
        const Real mean = team.reduce(width, Real(0), plus{}, [sum](int64_t d) { return sum[d]; }) / Real(width);
        const Real variance = team.reduce(width, Real(0), plus{}, [sum, mean](int64_t d) {
            return (sum[d] - mean) * (sum[d] - mean);
        }) / Real(width);
        const Real rstd = Real(1) / std::sqrt(variance + Real(1e-5));
        T* out = h + t * width;
        const Real *g = gain, *b = bias;
        team.for_each(width, [=](int64_t d) { out[d] = T((sum[d] - mean) * rstd * g[d] + b[d]); });
        if (team.lane() == 0) {
            mean_out[t] = mean;
            rstd_out[t] = rstd;
        }
    }
};

/// dx += d(h)/d(x)^T dh for a block of tokens, and the block's share of the gain's and bias's gradients.
template <class T, class Real>
struct norm_gradient {
    using vectorized = void;
    int64_t tokens, width;
    const Real* x;             // (T,D)
    const Real *mean, *rstd;   // (T)
    const Real* gain;          // (D)
    const T* dh;               // (T,D)
    Real* dx;                  // (T,D)
    T* dx_rounded;             // (T,D)
    Real* partial;             // (blocks,2D)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t block) const
    {
        Real* dgain = partial + block * 2 * width;
        Real* dbias = dgain + width;
        team.for_each(width, [=](int64_t d) { dgain[d] = dbias[d] = Real(0); });
        const int64_t end = (block + 1) * norm_block < tokens ? (block + 1) * norm_block : tokens;
        for (int64_t t = block * norm_block; t < end; ++t) one_token(team, t, dgain, dbias);
    }

    template <class Team>
    FASTMOE_HOST_DEVICE void one_token(Team& team, int64_t t, Real* dgain, Real* dbias) const
    {
        const Real *in = x + t * width, *g = gain;
        const T* from = dh + t * width;
        const Real m = mean[t], r = rstd[t];
        const Real sum = team.reduce(width, Real(0), plus{}, [=](int64_t d) { return Real(from[d]) * g[d]; });
        const Real product = team.reduce(width, Real(0), plus{}, [=](int64_t d) {
            return Real(from[d]) * g[d] * ((in[d] - m) * r);
        });
        const Real a = sum / Real(width), b = product / Real(width);
        Real* to = dx + t * width;
        T* rounded = dx_rounded + t * width;
        team.for_each(width, [=](int64_t d) {
            const Real unit = (in[d] - m) * r;
            const Real out = to[d] + r * (Real(from[d]) * g[d] - a - unit * b);
            to[d] = out;
            if constexpr (!std::is_same_v<T, Real>) rounded[d] = T(out);
            dgain[d] += Real(from[d]) * unit;
            dbias[d] += Real(from[d]);
        });
    }
};

/// Column i summed over the blocks, in their order.
template <class Real>
struct sum_partials {
    const Real* partial; // (blocks,N)
    int64_t blocks, columns;
    Real* out; // (N)

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        Real total = Real(0);
        for (int64_t b = 0; b < blocks; ++b) total += partial[b * columns + i];
        out[i] = total;
    }
};

} // namespace detail

/// @param branch  added to x; without memory nothing is added            // (T,D)
/// @param norm    gain and bias                                          // (2,D)
/// @param x_out   overwritten; may be x itself                           // (T,D)
/// @param h       overwritten                                            // (T,D)
template <class T, class Executor, class Real = accumulate_t<T>>
void add_norm(Executor& ex, matrix_view<const type_identity_t<Real>> x, matrix_view<const type_identity_t<T>> branch,
              matrix_view<const type_identity_t<Real>> norm, matrix_view<type_identity_t<Real>> x_out, matrix_view<T> h,
              const norm_saved<type_identity_t<Real>>& saved)
{
    const int64_t tokens = h.extent(0), width = h.extent(1);
    fm::expects_shape(x, "x (T,D)", tokens, width);
    fm::expects_shape(norm, "norm (2,D)", 2, width);
    fm::for_each_row(ex, tokens,
                     detail::add_norm<T, Real>{width, x.data_handle(), branch.data_handle(), norm.data_handle(),
                                               norm.data_handle() + width, x_out.data_handle(), h.data_handle(),
                                               saved.mean.data_handle(), saved.rstd.data_handle()},
                     {.width = 4 * width});
}

/// @param x           what forward left in x_out                          // (T,D)
/// @param dx          in: gradient that reaches x_out on other ways; the norm's is added  // (T,D)
/// @param dx_rounded  the new dx in the model's type; dx itself where the types agree     // (T,D)
/// @param dnorm       overwritten                                         // (2,D)
/// @param scratch     taken and given back; on a measuring arena only counted
template <class T, class Executor, class Real = accumulate_t<T>>
void norm_backward(Executor& ex, matrix_view<const type_identity_t<Real>> x,
                   const norm_saved<type_identity_t<Real>>& saved, matrix_view<const type_identity_t<Real>> norm,
                   matrix_view<const type_identity_t<T>> dh, matrix_view<type_identity_t<Real>> dx,
                   matrix_view<T> dx_rounded, matrix_view<type_identity_t<Real>> dnorm, fm::arena& scratch)
{
    const int64_t tokens = x.extent(0), width = x.extent(1), mark = scratch.used();
    const int64_t blocks = (tokens + detail::norm_block - 1) / detail::norm_block;
    const auto partial = scratch.matrix<Real>(blocks, 2 * width);
    if (!scratch.measuring()) {
        fm::expects_shape(dh, "dh (T,D)", tokens, width);
        fm::expects_shape(dx, "dx (T,D)", tokens, width);
        fm::expects_shape(dnorm, "dnorm (2,D)", 2, width);
        fm::for_each_row(ex, blocks,
                         detail::norm_gradient<T, Real>{tokens, width, x.data_handle(), saved.mean.data_handle(),
                                                        saved.rstd.data_handle(), norm.data_handle(), dh.data_handle(),
                                                        dx.data_handle(), dx_rounded.data_handle(),
                                                        partial.data_handle()},
                         {.width = 4 * width * detail::norm_block});
        fm::for_each(ex, 2 * width,
                     detail::sum_partials<Real>{partial.data_handle(), blocks, 2 * width, dnorm.data_handle()});
    }
    scratch.rewind(mark);
}

} // namespace train_gpt
