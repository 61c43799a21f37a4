// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// SwiGLU and its backward as one functor of rows: what bench_levels times and functors.vectors disassembles.
#pragma once

#include <fastmoe/ops/activate_rows.hpp>

namespace bench::inline FASTMOE_ABI { // another one at each level

struct there_and_back {
    using vectorized = void;
    const float* pre;    // (S,2*hidden)
    float *a, *d, *dpre; // (S,hidden) (S,hidden) (S,2*hidden)
    int64_t hidden;
    fastmoe::detail::gated_columns columns;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t s) const
    {
        using fastmoe::swiglu;
        const float* x = pre + 2 * s * hidden;
        fastmoe::detail::activate_row<swiglu, float>(team, swiglu{}, x, a + s * hidden, hidden, columns, 1.0f);
        fastmoe::detail::activate_row_backward<swiglu, float>(team, swiglu{}, x, d + s * hidden, dpre + 2 * s * hidden, hidden, columns,
                                                              1.0f);
    }
};

} // namespace bench::inline FASTMOE_ABI
