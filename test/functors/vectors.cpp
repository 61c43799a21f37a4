// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// What check_vectors.py disassembles: an activation and its backward in a loop of the host's, compiled at -O2. Nothing runs.
#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/ops/activate_rows.hpp>

using namespace fastmoe;

namespace vectors {

struct there_and_back {
    using vectorized = void;
    const float* pre;    // (S,2*hidden)
    float *a, *d, *dpre; // (S,hidden) (S,hidden) (S,2*hidden)
    int64_t hidden;
    detail::gated_columns columns;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t s) const
    {
        detail::activate_row<swiglu, float>(team, swiglu{}, pre + 2 * s * hidden, a + s * hidden, hidden, columns, 1.0f);
        detail::activate_row_backward<swiglu, float>(team, swiglu{}, pre + 2 * s * hidden, d + s * hidden, dpre + 2 * s * hidden,
                                                     hidden, columns, 1.0f);
    }
};

void call(host_executor& ex, int64_t rows, const there_and_back& f) { ex.for_each_row(rows, f, row_hint{}); }

} // namespace vectors
