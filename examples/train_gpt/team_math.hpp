// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Small pieces that several functors of the model share: sums over a team, and a row vector times a matrix.
#pragma once

#include <cmath>

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/core/math.hpp>
#include <fastmoe/exec/executor.hpp>
#include <fastmoe/exec/memory.hpp>

namespace train_gpt {

namespace fm = fastmoe;
using fm::accumulate_t;
using fm::int32_t;
using fm::int64_t;
using fm::matrix_view;
using fm::type_identity_t;
using fm::vector_view;

/// What a search for the largest starts with.
template <class Real>
inline constexpr Real lowest = Real(-3.0e38);

struct plus {
    template <class Real>
    FASTMOE_HOST_DEVICE Real operator()(Real a, Real b) const
    {
        return a + b;
    }
};
struct larger {
    template <class Real>
    FASTMOE_HOST_DEVICE Real operator()(Real a, Real b) const
    {
        return a > b ? a : b;
    }
};

/// team.for_each for a body whose writes are to memory that no other turn reads. Compilers that check at run time
/// whether pointers overlap give up at ten pairs; a team of one lane is spared the question.
template <class Team, class F>
FASTMOE_HOST_DEVICE void each_apart(Team& team, int64_t n, F f)
{
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
    if (team.lanes() == 1) {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) f(i);
        return;
    }
#endif
    team.for_each(n, f);
}

/// Two rows of a product at once, so that each element of the matrix is loaded once for both:
/// out[r][w] = scale[r] * sum_k row[r][k] * m[k * pitch + w], in a fixed order; eight rows of m a pass over out.
/// Callers that filled the rows with the team must sync before; element w of out belongs to the lane that for_each
/// gives w.
/// @param row  2 x (depth)    @param m  (depth,width) at the given pitch    @param out  overwritten  // 2 x (width)
template <class Team, class Real, class R, class M>
FASTMOE_HOST_DEVICE void two_rows_times_matrix(Team& team, const R* row0, const R* row1, int64_t depth, const M* m,
                                               int64_t pitch, Real scale0, Real scale1, Real* out0, Real* out1,
                                               int64_t width)
{
    team.for_each(width, [=](int64_t w) { out0[w] = out1[w] = Real(0); });
    int64_t k = 0;
    for (; k + 8 <= depth; k += 8) {
        // Spelled out: a loop over the eight would be the one that compilers vectorize.
        const R *r0 = row0 + k, *r1 = row1 + k;
        const Real a0 = scale0 * Real(r0[0]), a1 = scale0 * Real(r0[1]), a2 = scale0 * Real(r0[2]),
                   a3 = scale0 * Real(r0[3]), a4 = scale0 * Real(r0[4]), a5 = scale0 * Real(r0[5]),
                   a6 = scale0 * Real(r0[6]), a7 = scale0 * Real(r0[7]);
        const Real b0 = scale1 * Real(r1[0]), b1 = scale1 * Real(r1[1]), b2 = scale1 * Real(r1[2]),
                   b3 = scale1 * Real(r1[3]), b4 = scale1 * Real(r1[4]), b5 = scale1 * Real(r1[5]),
                   b6 = scale1 * Real(r1[6]), b7 = scale1 * Real(r1[7]);
        const M* from = m + k * pitch;
        each_apart(team, width, [=](int64_t w) {
            const M* p = from + w;
            const Real x0 = Real(p[0]), x1 = Real(p[pitch]), x2 = Real(p[2 * pitch]), x3 = Real(p[3 * pitch]);
            const Real x4 = Real(p[4 * pitch]), x5 = Real(p[5 * pitch]), x6 = Real(p[6 * pitch]),
                       x7 = Real(p[7 * pitch]);
            out0[w] += (a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3) + (a4 * x4 + a5 * x5 + a6 * x6 + a7 * x7);
            out1[w] += (b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3) + (b4 * x4 + b5 * x5 + b6 * x6 + b7 * x7);
        });
    }
    for (; k < depth; ++k) {
        const Real a = scale0 * Real(row0[k]), b = scale1 * Real(row1[k]);
        const M* from = m + k * pitch;
        team.for_each(width, [=](int64_t w) {
            const Real x = Real(from[w]);
            out0[w] += a * x;
            out1[w] += b * x;
        });
    }
}

} // namespace train_gpt
