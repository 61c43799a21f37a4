// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The gate concept: what decides where every token goes. First step in the way of a token; a user's own gate is one
/// function for inference, two for training.
///
///     struct my_gate {
///         int64_t experts, k;                                     // E; choices a token, 0 if ragged
///
///         void route(Executor& ex, const gate_input<T>& in, const Communicator& c, const State& state,
///                    arena& scratch) const;                       // fills state.routing
///         void backward(Executor& ex, const gate_input<T>& in, const Communicator& c, const State& state,
///                       vector_view<const Real> dweights, Real loss_scale, matrix_view<Real> dlogits,
///                       arena& scratch) const;                    // overwrites dlogits
///     };
///
/// Real is accumulate_t<T>. `route` writes every choice: an expert in [0, E), or -1 and a weight of 0 for a choice that
/// is dropped. An id twice in one token, or out of range, is a fault that the plan reports. `backward` gets the
/// gradient of the weights that `route` wrote and the factor of the gate's own losses. Both take what scratch they need
/// from the arena, give it back, and on a measuring arena only count.
///
/// Optional: `auto reserve<Real>(arena&, int64_t tokens) const`, a state with more than a routing, which the layer
/// keeps from route to backward; `vector_view<Real> losses` in it; `static constexpr bool reads_logits = false` for a
/// gate that does not look at the router's product, which is then left out.
#pragma once

#include <concepts>
#include <cstdint>

#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/exec/executor.hpp>
#include <fastmoe/routing/routing.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Losses and noise act in training alone.
enum class gate_mode : std::uint8_t { training, inference };

/// What a gate may look at.
template <class T>
struct gate_input {
    matrix_view<const T> x;                    // (T,D)
    matrix_view<const accumulate_t<T>> logits; // (T,E)
    vector_view<const int32_t> token_ids;      // (T), or empty
    vector_view<const std::uint8_t> mask;      // (T), or empty: a token with 0 takes no part, in losses neither
    gate_mode mode = gate_mode::training;
    const std::uint64_t* random = nullptr;     // (2) seed and step, memory of the executor; or null
};

/// The state of a gate that declares none.
template <class Real>
struct gate_state {
    fastmoe::routing<Real> routing;
};

/// Says how many experts there are.
template <class G>
concept states_experts = requires(const G& g) {
    { g.experts } -> std::convertible_to<int64_t>;
};

/// Says how many choices a token has.
template <class G>
concept states_choices = requires(const G& g) {
    { g.k } -> std::convertible_to<int64_t>;
};

/// Declares a state of its own.
template <class G, class Real>
concept reserves_state = requires(const G& g, arena& memory, int64_t tokens) {
    { g.template reserve<Real>(memory, tokens).routing } -> std::convertible_to<routing<Real>>;
};

/// Room for the state of a gate: what it declares, or a routing alone.
template <class Real, class Gate>
auto reserve_gate(const Gate& gate, arena& memory, int64_t tokens)
{
    if constexpr (reserves_state<Gate, Real>) return gate.template reserve<Real>(memory, tokens);
    else return gate_state<Real>{reserve_routing<Real>(memory, tokens, gate.experts, gate.k)};
}

/// The state that reserve_gate gives.
template <class Gate, class Real>
using gate_state_t = decltype(reserve_gate<Real>(std::declval<const Gate&>(), std::declval<arena&>(), int64_t{}));

/// Has losses, (balance, z) by convention, already times their coefficients.
template <class State>
concept has_losses = requires(const State& s) { s.losses.extent(0); };

/// False for a gate that states reads_logits = false.
template <class G>
inline constexpr bool gate_reads_logits = true;
template <class G>
    requires requires { G::reads_logits; }
inline constexpr bool gate_reads_logits<G> = G::reads_logits;

/// Decides. What infer asks of a gate.
template <class G, class Executor, class T, class Communicator>
concept routes = requires(const G& g, Executor& ex, const gate_input<T>& in, const Communicator& c,
                          const gate_state_t<G, accumulate_t<T>>& state, arena& scratch) {
    g.route(ex, in, c, state, scratch);
};

/// Turns gradients of the weights, and its losses, into gradients of the logits. What forward and backward ask besides.
template <class G, class Executor, class T, class Communicator>
concept trains = requires(const G& g, Executor& ex, const gate_input<T>& in, const Communicator& c,
                          const gate_state_t<G, accumulate_t<T>>& state,
                          vector_view<const accumulate_t<T>> dweights, accumulate_t<T> loss_scale,
                          matrix_view<accumulate_t<T>> dlogits, arena& scratch) {
    g.backward(ex, in, c, state, dweights, loss_scale, dlogits, scratch);
};

/// What a layer needs to infer.
template <class G, class Executor, class T, class Communicator>
concept inference_gate = states_experts<G> && states_choices<G> && routes<G, Executor, T, Communicator>;

/// What a layer needs to train.
template <class G, class Executor, class T, class Communicator>
concept gate_policy = inference_gate<G, Executor, T, Communicator> && trains<G, Executor, T, Communicator>;

namespace detail {

/// What every gate asks of its input.
template <class T>
void expects_gate_input(const gate_input<T>& in, int64_t tokens, int64_t experts)
{
    expects_shape(in.logits, "logits (T,E)", tokens, experts);
    if (in.mask.extent(0) != 0) expects_shape(in.mask, "mask (T)", tokens);
}

} // namespace detail

} // namespace fastmoe::inline FASTMOE_ABI
