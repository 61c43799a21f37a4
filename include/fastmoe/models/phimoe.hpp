// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Phi-3.5-MoE: SparseMixer in two rounds, before the experts of most models.
#pragma once

#include <fastmoe/models/block.hpp>
#include <fastmoe/routing/sparse_mixer_gate.hpp>

namespace fastmoe::inline FASTMOE_ABI::models {

/// Phi-3.5-MoE. For training as published, set gate.pick to mixer_pick::sampled.
template <class Gemm = gemm::portable>
auto phimoe(const config& c)
{
    return detail::plain_block<Gemm>(c, sparse_mixer_gate{.experts = c.experts, .k = c.k, .epsilon = c.mask_epsilon});
}

} // namespace fastmoe::inline FASTMOE_ABI::models
