// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "support/compare_mlp.hpp"
#include "support/warps.hpp"

using namespace fastmoe;

FASTMOE_MLP_TEST("the exact GELU", gelu)

#if FASTMOE_RUNS_WARPS
TEST_CASE_TEMPLATE("an mlp gives the oracle's values and gradients on a GPU's teams, with rows in lines and without", T, FASTMOE_DTYPES)
{
    FASTMOE_SEEDED(r, 37);
    using Cell = ::support::cell<::support::warps, T>;
    for (const int64_t width : {24, 25})
        compare_mlp::for_every_kind<gelu>(width, width + 16, [&](const auto& expert) {
            compare_mlp::compare<Cell>(r, expert, {.tokens = 6, .experts = 3, .k = 2});
        });
}
#endif
