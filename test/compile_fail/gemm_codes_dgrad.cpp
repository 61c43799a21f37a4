// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A gradient through weights that are stored as codes.
// expect: weights that are stored as codes are for inference: dgrad would need them transposed
#include <fastmoe/gemm/hopper_fp8.hpp>

using namespace fastmoe;

void f(host_executor& ex, const row_groups& groups, plain_rows<bfloat16> rows, matrix_view<bfloat16> y, arena& memory)
{
#if defined(CORRECT)
    const weight_view<const bfloat16> w{};
#else
    const block_scaled_weights<const float8_e4m3> w{};
#endif
    gemm::hopper_fp8_stored{}.dgrad(ex, groups, rows, w, y, no_epilogue{}, memory);
}
