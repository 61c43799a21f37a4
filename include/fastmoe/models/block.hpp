// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the published models in this folder are made of: the numbers of a configuration file go in, a gate, an expert and
/// a shared expert come out, and stand around the way of a token as any others do.
///
///     const auto m = fm::models::deepseek_v3({.width = 7168, .hidden = 2048, .experts = 256, .k = 8, .groups = 8,
///                                             .keep = 4, .scale = 2.5, .shared_hidden = 2048, .bias = bias});
///     fm::moe_layer layer{m.gate, m.expert, fm::self{}};
///     layer.infer(ex, x, weights, y, scratch);
///     m.shared.infer(ex, x, shared_weights, y, scratch);          // y += shared(x)
///
/// docs/models.md has the table of all models, and where checkpoints keep the weights.
#pragma once

#include <fastmoe/expert/mlp.hpp>
#include <fastmoe/layer/gated_shared_expert.hpp>
#include <fastmoe/layer/shared_expert.hpp>
#include <fastmoe/routing/biased_score.hpp>
#include <fastmoe/routing/group_limited.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

namespace fastmoe::inline FASTMOE_ABI::models {

/// One block of a model by the numbers that its configuration file has. A model reads those that it knows.
struct config {
    int64_t width = 0;                     ///< D
    int64_t hidden = 0;                    ///< H of a routed expert
    int64_t experts = 0;                   ///< E
    int64_t k = 1;                         ///< K
    int64_t groups = 1;                    ///< of experts, for group-limited choices
    int64_t keep = 1;                      ///< groups that a token may choose from
    outside_groups outside = outside_groups::excluded; ///< DeepSeek-V3's line: what experts of other groups compete with
    double scale = 1;                      ///< multiplies the weights
    int64_t shared_hidden = 0;             ///< H of the shared experts, all of them together; 0: there are none
    vector_view<const float> bias = {};    // (E)  seen by the choice alone; memory of the executor
    double least_sum = 1e-12;              ///< ERNIE 4.5: what the chosen scores are divided by is at least this
    double norm_power = 1;                 ///< DBRX: of the norm that the chosen scores are divided by
    double mask_epsilon = 0.01;            ///< Phi-3.5-MoE: how far below the best an expert still competes
    clamped_swiglu activation = {};        ///< gpt-oss
};

/// In the place of a shared expert where a model has none.
struct no_shared_expert {};

/// A model's parts.
template <class Gate, class Expert, class Shared = no_shared_expert>
struct block {
    Gate gate;
    Expert expert;
    Shared shared = {};
};

namespace detail {

/// The expert of nearly all models: SwiGLU without biases, the weight on its output.
template <class Gemm>
mlp<swiglu, Gemm> gated_mlp(int64_t width, int64_t hidden)
{
    return {.width = width, .hidden = hidden};
}

template <class Gemm, class Gate>
block<Gate, mlp<swiglu, Gemm>> plain_block(const config& c, Gate gate)
{
    return {gate, gated_mlp<Gemm>(c.width, c.hidden)};
}

template <class Gemm, class Gate>
block<Gate, mlp<swiglu, Gemm>, shared_expert<mlp<swiglu, Gemm>>> shared_block(const config& c, Gate gate)
{
    return {gate, gated_mlp<Gemm>(c.width, c.hidden), {gated_mlp<Gemm>(c.width, c.shared_hidden)}};
}

} // namespace detail

} // namespace fastmoe::inline FASTMOE_ABI::models
