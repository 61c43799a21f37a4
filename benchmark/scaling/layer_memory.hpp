// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What a block keeps, asked from the library's layer itself: its size queries are the passes, run without storage.
#pragma once

#include <algorithm>
#include <cstdint>

#include <fastmoe/expert/mlp.hpp>
#include <fastmoe/layer/moe_layer.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

#include "loads.hpp"
#include "memory_plan.hpp"

namespace scaling {

/// Of one rank with `tokens` tokens in bfloat16, when every rank gets as many choices as it sends. Then the layer keeps what
/// one rank would keep of its own tokens, and beside it the tokens that came from other ranks.
///
/// The attention is counted as eight matrices (T,D) or (T,kv): its input, the norm of it, queries, keys and values, what the
/// attention gives, what stands before the second norm, and after it; no matrix of scores. Logits are in fp32 for 1024
/// tokens at a time.
inline activations activations_of(const model& m, std::int64_t tokens, std::int64_t ranks)
{
    namespace fm = fastmoe;
    using T = fm::bfloat16;
    const std::int64_t slices = std::max<std::int64_t>(1, slices_of(m, ranks)), groups = ranks / slices;
    const fm::moe_layer layer{fm::top_k_gate<fm::softmax_score>{.experts = m.experts, .k = m.k},
                              fm::mlp<fm::swiglu>{.width = m.width, .hidden = m.hidden / slices}, fm::self{}};
    // With slices, each of a group's ranks computes its part of the hidden width for all of the group's choices.
    const std::int64_t rows = tokens * slices;
    const auto saved = static_cast<double>(layer.template saved_bytes<T>(rows, m.width));
    fm::host_executor ex({.threads = 1});
    const auto forward = static_cast<double>(layer.template forward_bytes<T>(ex, rows, m.width));
    const auto backward = static_cast<double>(layer.template backward_bytes<T>(ex, rows, m.width));
    const double row = static_cast<double>(m.width) * sizeof(T), t = static_cast<double>(tokens);
    const double arrive = t * static_cast<double>(slices) * expected_crossings(static_cast<int>(groups), m.experts, m.k);
    activations out;
    out.attention = t * (6 * row + 2 * static_cast<double>(m.kv_width) * sizeof(T));
    out.moe = saved + arrive * row;
    out.input = t * row;
    const double logits = std::min(t, 1024.0) * static_cast<double>(m.vocabulary) * 4;
    out.working = std::max(std::max(forward - saved, backward), logits);
    return out;
}

} // namespace scaling
