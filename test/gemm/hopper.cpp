// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The products of gemm::hopper, run an instruction at a time without a GPU, against sums in double.
#include <fastmoe/gemm/hopper.hpp>

#include "block_cases.hpp"
#include "support/fiber_clusters.hpp"

namespace {

using clusters = support::fiber_clusters<support::lanes>;
static_assert(fm::executor<clusters> && fm::runs_clusters<clusters>);

} // namespace

TEST_CASE("one")
{
    FASTMOE_SEEDED(r, 51);
    clusters ex;
    check_products<bfloat16, bfloat16, bfloat16>(r, {{20, 0, 8}, 128, 96}, ex, fm::gemm::hopper{});
    MESSAGE(ex.products, " ", ex.box_bytes, " ", ex.lines);
}
