// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "portable_cases.hpp"

TEST_CASE_TEMPLATE("wgrad is dY^T X, and zeros or untouched for an expert without rows", Types,
                   types<double, double, void, double>, types<float, float, void, float>,
                   types<bfloat16, bfloat16, void, bfloat16>, types<fm::half, fm::half, void, fm::half>,
                   types<bfloat16, bfloat16, void, float>, types<float, bfloat16, void, float>,
                   types<bfloat16, fm::half, void, bfloat16>, types<double, float, void, double>)
{
    FASTMOE_SEEDED(r, 13);
    for (const shape& c : shapes(r)) {
        check_wgrad<typename Types::X, typename Types::W, typename Types::Y>(r, c, weight_storage::stacked);
        check_wgrad<typename Types::X, typename Types::W, typename Types::Y>(r, c, any_storage(r));
    }
}
