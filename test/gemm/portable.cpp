// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "portable_cases.hpp"

#define ROW_TYPES                                                                                                     \
    types<double, double, double, double>, types<float, float, float, float>, types<bfloat16, bfloat16, bfloat16, bfloat16>, \
        types<fm::half, fm::half, fm::half, fm::half>, types<bfloat16, bfloat16, float, float>, types<float, bfloat16, bfloat16, float>,  \
        types<fm::half, float, fm::half, bfloat16>, types<float, double, float, double>

TEST_CASE_TEMPLATE("forward is X W^T plus bias for ragged groups on every level and any number of threads", Types, ROW_TYPES)
{
    FASTMOE_SEEDED(r, 11);
    for (const shape& c : shapes(r)) {
        check_forward<Types>(r, c, weight_storage::stacked);
        check_forward<Types>(r, c, any_storage(r));
    }
}

TEST_CASE_TEMPLATE("dgrad is dY W for ragged groups on every level and any number of threads", Types, ROW_TYPES)
{
    FASTMOE_SEEDED(r, 12);
    for (const shape& c : shapes(r)) {
        check_dgrad<Types>(r, c, weight_storage::stacked);
        check_dgrad<Types>(r, c, any_storage(r));
    }
}
