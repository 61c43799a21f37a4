// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What a layer asks of the views that it is given, at its door: all of it is checked before anything is written. Nothing
/// here looks at elements.
#pragma once

#include <cstdint>

#include <fastmoe/layer/exchanged_passes.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// Throws unless y is x, or has no byte in common with it: chunks of y are written before later ones of x are read.
template <class T>
void expects_apart_or_same(matrix_view<T> y, matrix_view<const T> x)
{
    if (y.data_handle() != x.data_handle()) expects_apart(y, "y (T,D)", x, "x (T,D), unless it is x");
}

/// A gate whose parameters, or their gradients, can be checked early.
template <class Gate, class Views>
concept checks_parameters = requires(const Gate& g, const Views& own, int64_t width) {
    g.check_parameters(own, width, weight_role::weights);
};

/// All parameters of a layer, or their gradients.
template <class Layer, class Weights>
void expects_parameters(const Layer& layer, const Weights& w, int64_t width, weight_role role)
{
    using gate_type = std::remove_cvref_t<decltype(layer.gate)>;
    const bool given = role == weight_role::weights;
    const int64_t experts = layer.gate.experts;
    if constexpr (!exchanging<Layer>)
        expects(layer.communicator.size() == 1, "communicator.size()", layer.communicator.size(),
                "1, or a communicator with all that communicator.hpp asks, which could share experts");
    check_weights(layer.expert, w.expert, experts_here(layer), width, role); // first: it knows which width is right
    if constexpr (gate_reads_logits<gate_type>) {
        expects_shape(w.gate, given ? "weights.gate (E,D)" : "gradients.gate (E,D)", experts, width);
        if (pointer_or_null(w.gate_bias)) // an empty one is none, whatever its pointer
            expects_shape(w.gate_bias, given ? "weights.gate_bias (E)" : "gradients.gate_bias (E)", experts);
    }
    if constexpr (checks_parameters<gate_type, decltype(w.own)>) layer.gate.check_parameters(w.own, width, role);
}

/// Tokens in, tokens out.
template <class T, class Layer, class Weights>
void expects_call(const Layer& layer, matrix_view<const T> x, const Weights& w, matrix_view<T> y)
{
    expects_shape(x, "x (T,D)", y.extent(0), y.extent(1));
    expects_shape(y, "y (T,D)", x.extent(0), x.extent(1));
    expects_parameters(layer, w, x.extent(1), weight_role::weights);
}

/// A router learns from the gradients of its weights, which an expert can withhold.
template <class Gate, class Expert>
void expects_learning(const Gate&, const Expert& expert)
{
    if constexpr (!Expert::applies_weights && (gate_reads_logits<Gate> || owns_parameters<Gate>))
        expects(expert.weighs_output(), "expert.weighs_output()", "false",
                "true: an expert that does not apply the routing weights leaves them to combine(), or the gate learns ",
                "nothing");
}

/// What forward kept is of this layer, and the gradients that go in and out fit it. dx may be dy, not x.
template <class T, class Layer, class Parts, class Weights>
void expects_backward(const Layer& layer, const Parts& kept, matrix_view<const T> dy, const Weights& w, matrix_view<T> dx)
{
    const int64_t tokens = kept.x.extent(0), width = kept.x.extent(1), experts = experts_here(layer);
    int64_t counts = experts;
    if constexpr (exchanging<Layer>) {
        const auto chunks = static_cast<int64_t>(kept.pieces.size());
        expects(chunks == parallel_of(layer.communicator).chunks, "saved", chunks, parallel_of(layer.communicator).chunks,
                " chunks");
        counts = kept.pieces[0].slots.counts.extent(0);
    } else {
        counts = kept.slots.counts.extent(0);
    }
    expects(counts == experts, "saved.plan().counts (E)", counts, exchanging<Layer> ? "this rank's L = " : "the gate's E = ",
            experts);
    expects_shape(dy, "dy (T,D)", tokens, width);
    expects_shape(dx, "dx (T,D)", tokens, width);
    expects_apart(dx, "dx (T,D)", kept.x, "x (T,D), which the weight gradients read");
    expects_parameters(layer, w, width, weight_role::weights);
    expects_learning(layer.gate, layer.expert);
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
