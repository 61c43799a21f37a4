// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <fastmoe/gemm/onednn.hpp>

#include "release_cases.hpp"

TEST_CASE_TEMPLATE("a layer over gemm::onednn gives the oracle's values and gradients with all optimizations", T, float,
                   fastmoe::bfloat16)
{
    release_cases::match_oracle<T, fastmoe::mlp<fastmoe::swiglu, fastmoe::gemm::onednn>, fastmoe::renormalize>(93);
}
