// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What this program knows of a block once its config.json is read: the model, its numbers, and the names and layout of
/// its tensors.
#pragma once

#include <string>
#include <vector>

#include <fastmoe/models/block.hpp>

namespace run_block {

namespace fm = fastmoe;
using std::int64_t;
using names = std::vector<std::string>; ///< of one tensor, the usual one first

/// A composition of fastmoe/models; see with_model().
enum class model { softmax, deepseek_v2, deepseek_v3, minimax_m2, gpt_oss, llama4, ernie4_5, phimoe };

/// What the chosen scores are divided by.
enum class division { none, sum, norm };

/// How a file holds the experts' matrices if not one by one.
enum class stacking {
    out_in,         ///< (E,2H,D) gate rows first, (E,D,H)
    in_out,         ///< (E,D,2H) gate columns first, (E,H,D)
    in_out_in_turns, ///< (E,D,2H) gate and up columns in turns, (E,H,D), and biases
    flat,           ///< (E*H,D) each: gate, up, and down transposed
};

/// Shared experts beside the routed ones.
enum class sharing { none, plain, gated };

struct description {
    std::string model_type;
    run_block::model model{};
    fm::models::config numbers;
    run_block::division division = division::none;

    names router = {"gate.weight"}; // (E,D)
    std::string router_bias;        // (E)    empty: none
    names correction_bias;          // (E), or (1,E); empty: none
    bool correction_in_row = false; ///< (1,E)

    run_block::stacking stacking = stacking::out_in;
    names gate_up = {"experts.gate_up_proj"}, down = {"experts.down_proj"};
    bool numbered = false; ///< one by one, gate, up and down are called w1, w3, w2, not gate_proj, up_proj, down_proj

    run_block::sharing sharing = sharing::none;
    std::string shared = "shared_experts"; ///< its tensors' names begin so
    bool shared_biases = false;

    /// For messages.
    std::string text() const
    {
        return "a block of " + model_type + " with " + std::to_string(numbers.experts) + " experts";
    }
};

} // namespace run_block
