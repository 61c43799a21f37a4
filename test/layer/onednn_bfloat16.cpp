// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A layer over gemm::onednn in bfloat16, which oneDNN multiplies where the processor can; elsewhere portable takes the
/// place of oneDNN and these tests, which are of oneDNN, are skipped.
#include "onednn_cases.hpp"

using namespace fastmoe;
using namespace onednn_cases;

#define FASTMOE_NEEDS_BFLOAT16                                                                                        \
    if (!detail::onednn::multiplies<bfloat16>()) FASTMOE_SKIP("this processor has no AVX-512 bfloat16")

TEST_CASE("a bfloat16 layer over oneDNN gives the oracle's values and gradients")
{
    FASTMOE_NEEDS_BFLOAT16;
    const support::onednn_calls<bfloat16> calls;
    matches_oracle<bfloat16>();
    CHECK(calls.since() > 0);
}

TEST_CASE("a bfloat16 layer over oneDNN gives the oracle's values and gradients in the corners of the shape")
{
    FASTMOE_NEEDS_BFLOAT16;
    const support::onednn_calls<bfloat16> calls;
    matches_oracle_in_corners<bfloat16>();
    CHECK(calls.since() > 0);
}

TEST_CASE("a bfloat16 layer over oneDNN gives the oracle's values and gradients in every layout of its weights")
{
    FASTMOE_NEEDS_BFLOAT16;
    matches_oracle_in_layouts<bfloat16>();
    linear_matches_oracle<bfloat16>();
}

TEST_CASE("a bfloat16 layer over oneDNN gives the same bits for 1, 2 and 4 threads and on every run")
{
    FASTMOE_NEEDS_BFLOAT16;
    const support::onednn_calls<bfloat16> calls;
    support::check_bits<bfloat16>(make_layer(), 700);
    CHECK(calls.since() > 0);
}

TEST_CASE("threads share a bfloat16 layer over oneDNN, and microbatches may be in flight")
{
    FASTMOE_NEEDS_BFLOAT16;
    const support::onednn_calls<bfloat16> calls;
    support::check_shared<bfloat16>(make_layer(), 120);
    support::check_in_flight<bfloat16>(make_layer());
    CHECK(calls.since() > 0);
}

TEST_CASE("over oneDNN, a bfloat16 layer with the caller's workspace allocates nothing, and oneDNN a bounded block a product")
{
    FASTMOE_NEEDS_BFLOAT16;
    counts_allocations<bfloat16>();
}
