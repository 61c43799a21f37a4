// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A layer of mlp experts with random weights in the memory of an executor, and the same as a model of the oracle.
#pragma once

#include <fastmoe/moe.hpp>

#include "expert_weights.hpp"
#include "poison.hpp"
#include "scratch.hpp"

namespace support {

template <class T, class Expert, class Executor>
struct layer_memory {
    reference::model model;
    fastmoe::buffer<T, Executor> gate, gate_bias;
    mlp_memory<T, Executor> experts;
    fastmoe::moe_weights<T, Expert> views;

    layer_memory(Executor& ex, random& r, const Expert& expert, std::int64_t count, reference::activation act, bool biases)
        : model{expert.width, {}, {}, random_experts<T>(r, count, reference::expert_kind::mlp, act, expert.width, expert.hidden, biases), {}, where(expert.weigh)},
          gate(upload(ex, narrowed<T>(r.normals(count * expert.width, 1 / std::sqrt(double(expert.width) + 1))))),
          gate_bias(upload(ex, narrowed<T>(r.normals(biases ? count : 0, 0.3)))),
          experts(ex, model.experts, {.gated = expert.layout}, false), views{gate.matrix(count, expert.width), {}, experts.views()}
    {
        if (biases) views.gate_bias = gate_bias.view();
        model.gate = widened(gate.view());
        model.gate_bias = widened(gate_bias.view());
    }

    static reference::weight_at where(fastmoe::weigh_at w)
    {
        return w == fastmoe::weigh_at::output  ? reference::weight_at::output
               : w == fastmoe::weigh_at::input ? reference::weight_at::input
                                               : reference::weight_at::activation;
    }
};

/// Room for the gradients of such a layer, poisoned.
template <class G, class Expert, class Executor>
struct gradient_memory {
    fastmoe::buffer<G, Executor> gate, gate_bias;
    mlp_memory<G, Executor> experts;
    fastmoe::moe_weights<G, Expert> views;

    gradient_memory(Executor& ex, const reference::model& model, fastmoe::gated_layout layout = {})
        : gate(ex, static_cast<std::int64_t>(model.gate.size())),
          gate_bias(ex, static_cast<std::int64_t>(model.gate_bias.size())), experts(ex, model.experts, {.gated = layout}, true),
          views{gate.matrix(model.count(), model.width), {}, experts.views()}
    {
        poison(gate.view());
        poison(gate_bias.view());
        if (!model.gate_bias.empty()) views.gate_bias = gate_bias.view();
    }
};

} // namespace support
