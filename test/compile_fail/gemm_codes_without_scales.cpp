// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Codes in the place of numbers, whose scales would be lost.
// expect: codes that have scales already go beside them, in block_scaled_weights
// expect: codes that have scales already go beside them, in block_scaled_rows
#include <fastmoe/gemm/hopper_fp8.hpp>

using namespace fastmoe;

#if defined(CORRECT)
using rows = block_scaled_rows<plain_rows<float8_e4m3>>;
using weights = block_scaled_weights<const float8_e4m3>;
#else
using rows = plain_rows<float8_e4m3>;
using weights = weight_view<const float8_e4m3>;
#endif

void f(host_executor& ex, const row_groups& groups, const rows& x, const weights& w, matrix_view<bfloat16> y, arena& memory)
{
    gemm::hopper_fp8{}.forward(ex, groups, x, w, matrix_view<const float>{}, y, no_epilogue{}, memory);
}
