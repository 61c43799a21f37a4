// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Weights of a layer in memory of their own, for those who have no parameter store: random to begin with, or zero.
#pragma once

#include <fastmoe/expert/initialize.hpp>
#include <fastmoe/layer/moe_layer.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// One buffer with all parameters of a layer. Movable; the executor must outlive it.
template <class T, class Expert, class Executor>
class owned_weights {
public:
    template <class Layer>
    owned_weights(Executor& ex, const Layer& layer, int64_t width) : memory_(ex, bytes(layer, width))
    {
        arena from(memory_.view());
        views_ = layer.template reserve_weights<T>(from, width);
        for_each(ex, memory_.size(), detail::set_zero<char>{reinterpret_cast<char*>(memory_.data())});
    }

    const moe_weights<T, Expert>& view() const noexcept { return views_; }

private:
    template <class Layer>
    static int64_t bytes(const Layer& layer, int64_t width)
    {
        arena measure;
        layer.template reserve_weights<T>(measure, width);
        return measure.bytes();
    }

    buffer<std::byte, Executor> memory_;
    moe_weights<T, Expert> views_;
};

/// Room for all parameters, zero: for gradients and optimizer state.
template <class T, executor Executor, class Gate, class Expert, class Communicator>
owned_weights<T, Expert, Executor> zero_weights(Executor& ex, const moe_layer<Gate, Expert, Communicator>& layer)
{
    return {ex, layer, layer.expert.model_width()};
}

/// Uniform in +-1/sqrt(fan in), biases zero: the same values for a seed on any executor.
template <class T, executor Executor, class Gate, class Expert, class Communicator>
owned_weights<T, Expert, Executor> random_weights(Executor& ex, const moe_layer<Gate, Expert, Communicator>& layer,
                                                  std::uint64_t seed)
{
    owned_weights<T, Expert, Executor> out(ex, layer, layer.expert.model_width());
    fill_uniform(ex, single(out.view().gate), seed, 2);
    layer.expert.initialize(ex, out.view().expert, seed + 1);
    return out;
}

} // namespace fastmoe::inline FASTMOE_ABI
