// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The umbrella: every component that needs no more than a C++20 compiler and the headers of the CUDA Toolkit.
#pragma once

#include <fastmoe/comm/hierarchical.hpp>
#include <fastmoe/comm/threads.hpp>
#include <fastmoe/core/same_bits.hpp>
#include <fastmoe/core/version.hpp>
#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/expert/expert_tuple.hpp>
#include <fastmoe/expert/layout.hpp>
#include <fastmoe/expert/linear.hpp>
#include <fastmoe/expert/mlp.hpp>
#include <fastmoe/layer/gated_shared_expert.hpp>
#include <fastmoe/layer/moe_layer.hpp>
#include <fastmoe/layer/owned_weights.hpp>
#include <fastmoe/layer/shared_expert.hpp>
#include <fastmoe/models/deepseek.hpp>
#include <fastmoe/models/ernie4_5.hpp>
#include <fastmoe/models/gpt_oss.hpp>
#include <fastmoe/models/llama4.hpp>
#include <fastmoe/models/phimoe.hpp>
#include <fastmoe/models/softmax_models.hpp>
#include <fastmoe/parallel/broadcast_parameters.hpp>
#include <fastmoe/parallel/gradient_norm.hpp>
#include <fastmoe/parallel/gradients.hpp>
#include <fastmoe/routing/balanced_assignment.hpp>
#include <fastmoe/routing/bias_update.hpp>
#include <fastmoe/routing/biased_score.hpp>
#include <fastmoe/routing/cosine_gate.hpp>
#include <fastmoe/routing/expert_choice.hpp>
#include <fastmoe/routing/group_limited.hpp>
#include <fastmoe/routing/gshard_gate.hpp>
#include <fastmoe/routing/importance.hpp>
#include <fastmoe/routing/load.hpp>
#include <fastmoe/routing/lookup.hpp>
#include <fastmoe/routing/noisy_gate.hpp>
#include <fastmoe/routing/sinkhorn.hpp>
#include <fastmoe/routing/sparse_mixer_gate.hpp>
#include <fastmoe/routing/swipe.hpp>
#include <fastmoe/routing/token_rounding.hpp>
#include <fastmoe/routing/top_k_gate.hpp>
#include <fastmoe/routing/topology.hpp>
#include <fastmoe/transfer/dispatch.hpp>
