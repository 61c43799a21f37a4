// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "release_cases.hpp"

TEST_CASE_TEMPLATE("a layer over gemm::portable gives the oracle's values and gradients with all optimizations", T, float,
                   fastmoe::bfloat16)
{
    release_cases::match_oracle<T, fastmoe::mlp<fastmoe::swiglu>, fastmoe::renormalize>(91);
}

TEST_CASE("a layer of GELU experts gives the oracle's values and gradients with all optimizations")
{
    release_cases::match_oracle<float, fastmoe::mlp<fastmoe::gelu>, fastmoe::raw_scores>(92);
}
