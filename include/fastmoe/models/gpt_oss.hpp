// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// gpt-oss: a softmax over the chosen, of logits with a bias; experts with biases and a clamped activation.
#pragma once

#include <fastmoe/models/block.hpp>

namespace fastmoe::inline FASTMOE_ABI::models {

/// Softmax over the chosen. The router's bias is moe_weights::gate_bias: weights see it, unlike one that balances.
using gpt_oss_gate = top_k_gate<softmax_score>;

/// gpt-oss-20b and 120b. Their checkpoints interleave gate and up columns; see layout.hpp.
template <class Gemm = gemm::portable>
auto gpt_oss(const config& c)
{
    using expert = mlp<clamped_swiglu, Gemm>;
    return block<gpt_oss_gate, expert>{
        gpt_oss_gate{.experts = c.experts, .k = c.k},
        expert{.width = c.width, .hidden = c.hidden, .biases = true, .activation = c.activation}};
}

} // namespace fastmoe::inline FASTMOE_ABI::models
