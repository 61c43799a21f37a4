// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Llama 4: the sigmoid of the best logit multiplies the expert's input, and a shared expert stands beside.
#pragma once

#include <fastmoe/models/block.hpp>

namespace fastmoe::inline FASTMOE_ABI::models {

/// The K greatest logits (published: K = 1), each weighed by its sigmoid.
using llama4_gate = top_k_gate<sigmoid_score, top_k, raw_scores>;

/// Llama 4 Scout and Maverick.
template <class Gemm = gemm::portable>
auto llama4(const config& c)
{
    using expert = mlp<swiglu, Gemm>;
    return block<llama4_gate, expert, shared_expert<expert>>{
        llama4_gate{.experts = c.experts, .k = c.k},
        expert{.width = c.width, .hidden = c.hidden, .weigh = weigh_at::input},
        {detail::gated_mlp<Gemm>(c.width, c.shared_hidden)}};
}

} // namespace fastmoe::inline FASTMOE_ABI::models
