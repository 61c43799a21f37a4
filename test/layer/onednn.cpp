// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A layer over gemm::onednn in the dtypes that any processor's oneDNN multiplies, or leaves to portable by design.
#include "onednn_cases.hpp"

using namespace fastmoe;
using namespace onednn_cases;

TEST_CASE_TEMPLATE("a layer over oneDNN gives the oracle's values and gradients", T, double, float, fastmoe::half)
{
    const support::onednn_calls<float> calls;
    matches_oracle<T>();
    CHECK((calls.since() > 0) == std::is_same_v<T, float>); // double and half are documented to go to portable
}

TEST_CASE_TEMPLATE("a layer over oneDNN gives the oracle's values and gradients in the corners of the shape", T, double, float,
                   fastmoe::half)
{
    const support::onednn_calls<float> calls;
    matches_oracle_in_corners<T>();
    CHECK((calls.since() > 0) == std::is_same_v<T, float>);
}

TEST_CASE_TEMPLATE("a layer over oneDNN gives the oracle's values and gradients in every layout of its weights", T, double, float,
                   fastmoe::half)
{
    matches_oracle_in_layouts<T>();
    linear_matches_oracle<T>();
}

TEST_CASE("a layer over oneDNN gives the same bits for 1, 2 and 4 threads and on every run")
{
    const support::onednn_calls<float> calls;
    support::check_bits<float>(make_layer(), 700);
    CHECK(calls.since() > 0);
}

TEST_CASE("threads share a layer over oneDNN, and microbatches may be in flight")
{
    const support::onednn_calls<float> calls;
    support::check_shared<float>(make_layer(), 120);
    support::check_in_flight<float>(make_layer());
    CHECK(calls.since() > 0);
}

TEST_CASE("over oneDNN, a layer with the caller's workspace allocates nothing, and oneDNN a bounded block a product")
{
    counts_allocations<float>();
}
