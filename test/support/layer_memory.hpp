// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The weights of a layer, random or given, in the memory of an executor, and the same as a model of the oracle.
#pragma once

#include <fastmoe/moe.hpp>

#include "expert_weights.hpp"
#include "poison.hpp"
#include "scratch.hpp"

namespace support {

/// Random weights of a layer that T can hold exactly.
/// @param gate_bias  (E), or empty: none
template <class T, class Executor, class Expert>
reference::model random_model(random& r, const Expert& expert, std::int64_t width, std::int64_t count,
                              const reference::numbers& gate_bias = {})
{
    using memory = expert_memory<T, Expert, Executor>;
    reference::model m;
    m.width = width;
    m.gate = widened(narrowed<T>(r.normals(count * width, 1 / std::sqrt(double(width) + 1))));
    m.gate_bias = widened(narrowed<T>(gate_bias));
    m.experts = memory::draw(r, expert, count);
    m.where = memory::where(expert);
    return m;
}

/// The parameters of a model, or room for their gradients, as a layer takes them.
template <class T, class Expert, class Executor>
struct layer_memory {
    fastmoe::buffer<T, Executor> gate, gate_bias;
    expert_memory<T, Expert, Executor> experts;
    fastmoe::moe_weights<T, Expert> views;

    layer_memory(Executor& ex, const Expert& expert, const reference::model& m, const weight_layout& layout = {})
        : gate(upload(ex, narrowed_or_poison<T>(m.gate))), gate_bias(upload(ex, narrowed_or_poison<T>(m.gate_bias))),
          experts(ex, expert, m.experts, layout), views{gate.matrix(m.count(), m.width), {}, experts.views()}
    {
        if (!m.gate_bias.empty()) views.gate_bias = gate_bias.view();
    }
};

/// A model of NaN, which stands for poison in memory: gradients that must be overwritten.
inline reference::model poisoned(reference::model m)
{
    for (auto* part : {&m.gate, &m.gate_bias})
        for (double& v : *part) v = NAN;
    m.experts = poisoned(m.experts);
    return m;
}

/// A model of random numbers that G can hold: gradients that are to be added to.
template <class G>
reference::model redrawn(random& r, reference::model m)
{
    for (auto* part : {&m.gate, &m.gate_bias}) *part = widened(normal_vector<G>(r, static_cast<std::int64_t>(part->size())));
    m.experts = redrawn<G>(r, m.experts);
    return m;
}

} // namespace support
