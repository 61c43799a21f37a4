// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the parts of the program know of each other.
#pragma once

#include <string>

#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/routing/routing.hpp>

#include "run_block/description.hpp"

namespace run_block {

struct program_options {
    std::string config, weights, input, output, dtype = "float32";
    int threads = 0;
};

/// Runs the block with weights and activations of one type, and writes the output file.
/// @throws format_error, invalid_argument, error: then there is no new output file
void run_float32(fm::host_executor& ex, const program_options& o, description d);
void run_bfloat16(fm::host_executor& ex, const program_options& o, description d);

/// Chooses and weighs by the model's own gate.
/// @param logits  (T,E)
/// @param to      experts and weights are overwritten                       // (T*K)
void route(fm::host_executor& ex, const description& d, fm::matrix_view<const float> logits, const fm::routing<float>& to);

} // namespace run_block
