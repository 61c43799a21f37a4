// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What a transformer with an MoE layer in each block takes on each of R ranks that share the experts: the dense part is on
/// every rank, an expert on one rank, or cut along its hidden width over several if there are more ranks than experts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace scaling {

/// Sizes. The attention has projections for queries and output of D x D, and for keys and values of D x kv_width.
struct model {
    std::int64_t layers, width, hidden, experts, k, vocabulary, kv_width;
    std::int64_t matrices = 3; ///< of an expert: 3 with a gated activation, 2 without

    /// All that stands on every rank: attention, two norms and router of each block, last norm, embedding and head.
    double dense_parameters() const
    {
        const double d = number(width);
        return number(layers) * (2 * d * d + 2 * d * number(kv_width) + 2 * d + number(experts) * d) +
               2 * number(vocabulary) * d + d;
    }
    /// Of all experts of all blocks.
    double expert_parameters() const
    {
        return number(layers) * number(experts) * number(matrices) * number(width) * number(hidden);
    }
    double parameters() const { return dense_parameters() + expert_parameters(); }

private:
    static double number(std::int64_t n) { return static_cast<double>(n); }
};

/// Bytes a parameter. Adam in mixed precision: an fp32 copy and two moments are 12.
struct precision {
    double weight = 2, gradient = 2, optimizer = 12;
};

/// What a block keeps for backward, and what all need at one time, in bytes of one rank.
struct activations {
    double attention = 0; ///< a block's, without the MoE layer
    double moe = 0;       ///< the layer's own saved_bytes() and the rows that it has received
    double input = 0;     ///< a block's input
    double working = 0;   ///< once: the larger of forward's and backward's scratch, and logits
};

/// The optimizer's state of what every rank has: on every rank, or a share on each.
enum class dense_optimizer : std::uint8_t { replicated, sharded };
/// What backward reads: kept from forward, or computed again from each block's input.
enum class block_activations : std::uint8_t { kept, recomputed };

/// Bytes of the fullest rank.
struct rank_memory {
    std::int64_t experts = 0; ///< of each block
    std::int64_t slices = 1;  ///< ranks that an expert is cut over
    double dense_weights = 0, dense_gradients = 0, dense_state = 0;
    double expert_weights = 0, expert_gradients = 0, expert_state = 0;
    double activations = 0;

    double total() const
    {
        return dense_weights + dense_gradients + dense_state + expert_weights + expert_gradients + expert_state + activations;
    }
};

/// Over how many ranks an expert is cut; 0 if so many ranks cannot share them.
inline std::int64_t slices_of(const model& m, std::int64_t ranks)
{
    if (ranks <= m.experts) return 1;
    const std::int64_t slices = ranks / m.experts;
    return ranks % m.experts == 0 && m.hidden % slices == 0 ? slices : 0;
}

/// @param ranks  slices_of(m, ranks) must not be 0
inline rank_memory memory_of(const model& m, const precision& p, const activations& a, std::int64_t ranks,
                             dense_optimizer optimizer, block_activations blocks)
{
    rank_memory out;
    const auto layers = static_cast<double>(m.layers), count = static_cast<double>(ranks);
    out.slices = slices_of(m, ranks);
    out.experts = ranks <= m.experts ? (m.experts + ranks - 1) / ranks : 1; // the ranks with one more
    const double dense = m.dense_parameters();
    const double expert = m.expert_parameters() / static_cast<double>(m.experts) * static_cast<double>(out.experts) /
                          static_cast<double>(out.slices);
    out.dense_weights = dense * p.weight;
    out.dense_gradients = dense * p.gradient;
    out.dense_state = dense * p.optimizer / (optimizer == dense_optimizer::sharded ? count : 1);
    out.expert_weights = expert * p.weight;
    out.expert_gradients = expert * p.gradient;
    out.expert_state = expert * p.optimizer;
    out.activations = a.working + (blocks == block_activations::kept ? layers * (a.attention + a.moe)
                                                                     : layers * a.input + a.attention + a.moe);
    return out;
}

} // namespace scaling
