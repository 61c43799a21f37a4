// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The umbrella: every component that needs no more than a C++20 compiler and the headers of the CUDA Toolkit.
#pragma once

#include <fastmoe/core/same_bits.hpp>
#include <fastmoe/core/version.hpp>
#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/expert/expert_tuple.hpp>
#include <fastmoe/expert/layout.hpp>
#include <fastmoe/expert/linear.hpp>
#include <fastmoe/expert/mlp.hpp>
#include <fastmoe/layer/moe_layer.hpp>
#include <fastmoe/layer/owned_weights.hpp>
#include <fastmoe/layer/shared_expert.hpp>
#include <fastmoe/routing/biased_score.hpp>
#include <fastmoe/routing/group_limited.hpp>
#include <fastmoe/routing/lookup.hpp>
#include <fastmoe/routing/top_k_gate.hpp>
