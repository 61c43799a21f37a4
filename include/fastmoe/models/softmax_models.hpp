// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Models whose router is a softmax and nothing else: Mixtral, MiniMax-Text-01, Granite, Qwen2-MoE, Qwen3-MoE, OLMoE,
/// Jamba, DBRX. They differ in what the chosen probabilities are divided by.
///
/// Weigh is a model's own by default; the others are for configurations that say otherwise, such as norm_topk_prob.
#pragma once

#include <fastmoe/models/block.hpp>

namespace fastmoe::inline FASTMOE_ABI::models {

/// Softmax over the chosen (Jiang et al. 2024, sec. 2.1); that is also the softmax of all, chosen and renormalized.
using mixtral_gate = top_k_gate<softmax_score>;

/// Mixtral 8x7B and 8x22B.
template <class Gemm = gemm::portable>
auto mixtral(const config& c)
{
    return detail::plain_block<Gemm>(c, mixtral_gate{.experts = c.experts, .k = c.k});
}

/// MiniMax-Text-01: the block of Mixtral.
template <class Gemm = gemm::portable>
auto minimax(const config& c)
{
    return mixtral<Gemm>(c);
}

/// Granite 3.0 MoE: the block of Mixtral, with more and smaller experts.
template <class Gemm = gemm::portable>
auto granite_moe(const config& c)
{
    return mixtral<Gemm>(c);
}

/// Qwen3-MoE: renormalized (norm_topk_prob).
template <class Weigh = renormalize, class Gemm = gemm::portable>
auto qwen3_moe(const config& c)
{
    return detail::plain_block<Gemm>(c, top_k_gate<softmax_score, top_k, Weigh>{.experts = c.experts, .k = c.k});
}

/// OLMoE: probabilities as they are.
template <class Weigh = raw_scores, class Gemm = gemm::portable>
auto olmoe(const config& c)
{
    return qwen3_moe<Weigh, Gemm>(c);
}

/// Jamba: probabilities as they are.
template <class Gemm = gemm::portable>
auto jamba(const config& c)
{
    return qwen3_moe<raw_scores, Gemm>(c);
}

/// Qwen2-MoE: probabilities as they are, and a shared expert behind a sigmoid gate of its own.
template <class Weigh = raw_scores, class Gemm = gemm::portable>
auto qwen2_moe(const config& c)
{
    using gate = top_k_gate<softmax_score, top_k, Weigh>;
    using expert = mlp<swiglu, Gemm>;
    return block<gate, expert, gated_shared_expert<expert>>{gate{.experts = c.experts, .k = c.k},
                                                            detail::gated_mlp<Gemm>(c.width, c.hidden),
                                                            {detail::gated_mlp<Gemm>(c.width, c.shared_hidden)}};
}

/// DBRX: probabilities divided by their norm, by default the sum (moe_normalize_expert_weights); raw_scores where the
/// configuration has null.
template <class Weigh = divide_by_norm, class Gemm = gemm::portable>
auto dbrx(const config& c)
{
    top_k_gate<softmax_score, top_k, Weigh> gate{.experts = c.experts, .k = c.k};
    if constexpr (requires { gate.weigh.power; }) gate.weigh.power = c.norm_power;
    return detail::plain_block<Gemm>(c, gate);
}

} // namespace fastmoe::inline FASTMOE_ABI::models
