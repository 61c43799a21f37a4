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

/// out[w] = scale * sum_k row[k] * m[k * pitch + w], k in order; eight rows of m a pass over out.
/// Callers that filled `row` with the team must sync before; element w of out belongs to the lane that for_each gives w.
/// @param row  (depth)    @param m  (depth,width) at the given pitch    @param out  overwritten  // (width)
template <class Team, class Real, class R, class M>
FASTMOE_HOST_DEVICE void row_times_matrix(Team& team, const R* row, int64_t depth, const M* m, int64_t pitch, Real scale,
                                          Real* out, int64_t width)
{
    team.for_each(width, [=](int64_t w) { out[w] = Real(0); });
    int64_t k = 0;
    for (; k + 8 <= depth; k += 8) {
        const Real r0 = scale * Real(row[k]), r1 = scale * Real(row[k + 1]), r2 = scale * Real(row[k + 2]),
                   r3 = scale * Real(row[k + 3]), r4 = scale * Real(row[k + 4]), r5 = scale * Real(row[k + 5]),
                   r6 = scale * Real(row[k + 6]), r7 = scale * Real(row[k + 7]);
        const M* a = m + k * pitch;
        team.for_each(width, [=](int64_t w) {
            const M* p = a + w;
            Real sum = out[w];
            sum += r0 * Real(p[0]);
            sum += r1 * Real(p[pitch]);
            sum += r2 * Real(p[2 * pitch]);
            sum += r3 * Real(p[3 * pitch]);
            sum += r4 * Real(p[4 * pitch]);
            sum += r5 * Real(p[5 * pitch]);
            sum += r6 * Real(p[6 * pitch]);
            sum += r7 * Real(p[7 * pitch]);
            out[w] = sum;
        });
    }
    for (; k < depth; ++k) {
        const Real r = scale * Real(row[k]);
        const M* a = m + k * pitch;
        team.for_each(width, [=](int64_t w) { out[w] += r * Real(a[w]); });
    }
}

} // namespace train_gpt
