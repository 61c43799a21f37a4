// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// ERNIE 4.5: a softmax with a bias for the choice, and weights over a sum that has a least value.
#pragma once

#include <fastmoe/models/block.hpp>

namespace fastmoe::inline FASTMOE_ABI::models {

/// Chosen by p + b, weighed by p over the sum of the chosen p, or over moe_norm_min where that is greater.
using ernie4_5_moe_gate = top_k_gate<biased_softmax_score, top_k, renormalize_at_least>;

/// The text experts of ERNIE 4.5 21B-A3B and 300B-A47B.
template <class Gemm = gemm::portable>
auto ernie4_5_moe(const config& c)
{
    return detail::shared_block<Gemm>(
        c, ernie4_5_moe_gate{.experts = c.experts, .k = c.k, .score = {c.bias}, .weigh = {{}, c.least_sum}});
}

} // namespace fastmoe::inline FASTMOE_ABI::models
