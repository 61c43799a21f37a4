// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// DeepSeek-V2 and V3 and what descends from them: choices within groups of experts, a bias that balances without a loss,
/// scaled weights and shared experts. Also Kimi K2, GLM-4.5 and MiniMax-M2.
#pragma once

#include <fastmoe/models/block.hpp>

namespace fastmoe::inline FASTMOE_ABI::models {

/// Softmax, the best groups by their maximum, probabilities as they are, scaled (DeepSeek-AI 2024, V2, sec. 2.2.2). V2-Lite
/// has one group ("greedy").
using deepseek_v2_gate = top_k_gate<softmax_score, group_limited, raw_scores>;

/// DeepSeek-V2 and V2-Lite.
template <class Gemm = gemm::portable>
auto deepseek_v2(const config& c)
{
    return detail::shared_block<Gemm>(
        c, deepseek_v2_gate{.experts = c.experts, .k = c.k, .scale = c.scale,
                            .select = {.groups = c.groups, .keep = c.keep, .top = 1}});
}

/// Sigmoid with a bias for the choice; groups by the sum of their two best; weights over the sum of the chosen + 1e-20,
/// scaled (DeepSeek-AI 2024, V3, eq. 12 to 16).
/// @tparam Weigh  raw_scores where the configuration has norm_topk_prob = false
template <class Weigh = renormalize>
using deepseek_v3_gate = top_k_gate<sigmoid_score, group_limited, Weigh>;

/// DeepSeek-V3, R1 and V3.1.
template <class Weigh = renormalize, class Gemm = gemm::portable>
auto deepseek_v3(const config& c)
{
    deepseek_v3_gate<Weigh> gate{.experts = c.experts, .k = c.k, .scale = c.scale, .score = {{c.bias}},
                                 .select = {.groups = c.groups, .keep = c.keep, .top = 2, .outside = c.outside}};
    if constexpr (Weigh::over_chosen) gate.weigh.epsilon = 1e-20;
    return detail::shared_block<Gemm>(c, gate);
}

/// Kimi K2: the block of DeepSeek-V3, with one group.
template <class Gemm = gemm::portable>
auto kimi_k2(const config& c)
{
    return deepseek_v3<renormalize, Gemm>(c);
}

/// GLM-4.5: the block of DeepSeek-V3, with one group.
template <class Weigh = renormalize, class Gemm = gemm::portable>
auto glm4_moe(const config& c)
{
    return deepseek_v3<Weigh, Gemm>(c);
}

/// Sigmoid with a bias for the choice, weights over their sum; no groups, no scale.
using minimax_m2_gate = top_k_gate<sigmoid_score>;

/// MiniMax-M2, which has no shared expert.
template <class Gemm = gemm::portable>
auto minimax_m2(const config& c)
{
    return detail::plain_block<Gemm>(c, minimax_m2_gate{.experts = c.experts, .k = c.k, .score = {{c.bias}}});
}

} // namespace fastmoe::inline FASTMOE_ABI::models
