// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Weights of a layer in memory of their own, for those who have no parameter store: random to begin with, or zero.
#pragma once

#include <fastmoe/expert/initialize.hpp>
#include <fastmoe/layer/moe_layer.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// One buffer with all parameters of a layer. Movable; the executor must outlive it.
/// @tparam Gate  the layer's, if it has parameters of its own
template <class T, class Expert, class Executor, class Gate = plain_gate>
class owned_weights {
public:
    template <class Layer>
    owned_weights(Executor& ex, const Layer& layer, int64_t width) : memory_(ex, bytes(layer, width))
    {
        arena from(memory_.view());
        views_ = layer.template reserve_weights<T>(from, width);
        fastmoe::for_each(ex, memory_.size(), detail::set_zero<char>{reinterpret_cast<char*>(memory_.data())});
    }

    const moe_weights<T, Expert, Gate>& view() const noexcept { return views_; }

private:
    template <class Layer>
    static int64_t bytes(const Layer& layer, int64_t width)
    {
        arena measure;
        layer.template reserve_weights<T>(measure, width);
        return measure.bytes();
    }

    buffer<std::byte, Executor> memory_;
    moe_weights<T, Expert, Gate> views_;
};

namespace detail {
template <class T, class Layer, class Executor>
struct owned_weights_of;
template <class T, class Gate, class Expert, class Communicator, class Executor>
struct owned_weights_of<T, moe_layer<Gate, Expert, Communicator>, Executor> {
    using type = owned_weights<T, Expert, Executor, std::conditional_t<owns_parameters<Gate>, Gate, plain_gate>>;
};
} // namespace detail

/// What zero_weights() and random_weights() give for a layer.
template <class T, class Layer, class Executor>
using owned_weights_t = typename detail::owned_weights_of<T, Layer, Executor>::type;

/// Room for all parameters, zero: for gradients and optimizer state.
template <class T, executor Executor, class Gate, class Expert, class Communicator>
owned_weights_t<T, moe_layer<Gate, Expert, Communicator>, Executor>
zero_weights(Executor& ex, const moe_layer<Gate, Expert, Communicator>& layer)
{
    return {ex, layer, layer.expert.model_width()};
}

namespace detail {

/// numbers(l) = the global number of this rank's l-th expert.
template <class Place>
struct number_experts {
    Place place;
    vector_view<int32_t> numbers; // (L)

    FASTMOE_HOST_DEVICE void operator()(int64_t l) const { numbers(l) = static_cast<int32_t>(place.expert(l)); }
};

/// Where ranks share experts, expert e gets the same values on whichever rank it lives; slices of a hidden width get draws
/// of their own, and so do experts whose initialize() takes no numbers, on each rank.
template <class Executor, class Layer, class Views>
void initialize_experts(Executor& ex, const Layer& layer, const Views& w, std::uint64_t seed)
{
    if constexpr (exchanging<Layer>) {
        const auto place = placed(layer.communicator, layer.gate.experts);
        if constexpr (requires(vector_view<const int32_t> numbers) { layer.expert.initialize(ex, w, seed, numbers); }) {
            buffer<int32_t, Executor> numbers(ex, place.local_experts());
            fastmoe::for_each(ex, numbers.size(),
                              number_experts<std::remove_const_t<decltype(place)>>{place, numbers.view()});
            if (place.slices > 1) seed = seed_of_part(seed, static_cast<std::uint32_t>(place.slice()));
            if constexpr (requires { layer.expert.initialize(ex, w, seed, numbers.view(), place.slices); })
                layer.expert.initialize(ex, w, seed, numbers.view(), place.slices);
            else layer.expert.initialize(ex, w, seed, numbers.view());
        } else {
            layer.expert.initialize(ex, w, seed_of_part(seed, static_cast<std::uint32_t>(place.rank)));
        }
    } else {
        layer.expert.initialize(ex, w, seed);
    }
}

} // namespace detail

/// Uniform in +-1/sqrt(fan in), biases zero: the same values for a seed on any executor, and for no two seeds, nor for two
/// parts of a layer, the same draws. Where ranks share experts, all give the same seed and get the experts of one layer.
template <class T, executor Executor, class Gate, class Expert, class Communicator>
owned_weights_t<T, moe_layer<Gate, Expert, Communicator>, Executor>
random_weights(Executor& ex, const moe_layer<Gate, Expert, Communicator>& layer, std::uint64_t seed)
{
    owned_weights_t<T, moe_layer<Gate, Expert, Communicator>, Executor> out(ex, layer, layer.expert.model_width());
    if constexpr (gate_reads_logits<Gate>) fill_uniform(ex, single(out.view().gate), seed_of_part(seed, 0), 0);
    detail::initialize_experts(ex, layer, out.view().expert, seed_of_part(seed, 1));
    if constexpr (owns_parameters<Gate>) layer.gate.initialize(ex, out.view().own, seed_of_part(seed, 2));
    return out;
}

} // namespace fastmoe::inline FASTMOE_ABI
