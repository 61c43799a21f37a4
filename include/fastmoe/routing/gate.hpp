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
/// gate that does not look at the router's product, which is then left out; `input_jitter jitter`, which multiplies
/// the router's input in training.
///
/// A gate with parameters of its own (a noise matrix, the embeddings of a cosine router) names them, and is handed them:
///
///     template <class T> struct parameters;                      // views; converts from T to const T
///     parameters<T> reserve_parameters<T>(arena&, int64_t width) const;
///     void initialize(Executor&, const parameters<T>&, std::uint64_t seed) const;
///     route(ex, in, own, c, state, scratch);
///     backward(ex, in, own, c, state, dweights, loss_scale, dlogits, dx, scratch);    // adds to dx (T,D)
///     parameter_gradients(ex, in, state, gradients, mode, scratch);   // later; reads what backward left in state
///     check_parameters(own, width, weight_role) const;                // optional: throws if the views do not fit
///     expects_state(state) const;                                     // optional: throws for another gate's, before dx is written
///
/// The layer asks the last of the parameters and of their gradients before it writes anything.
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/exec/executor.hpp>
#include <fastmoe/ops/reduce.hpp>
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
    const std::uint64_t* random = nullptr;     // (2) seed and step, memory of the executor; or null. A seed for each layer
    int64_t first_token = 0;                   ///< number of token 0 among all ranks' and microbatches' tokens: draws depend on it
};

/// Multiplies the router's input, and nothing else, by u in [1 - epsilon, 1 + epsilon), drawn for every element in
/// training (Switch, Fedus et al. 2021). A gate with such a member asks the layer for it.
struct input_jitter {
    double epsilon = 0;
};

template <class G>
concept jitters_input = requires(const G& g) {
    { g.jitter } -> std::convertible_to<input_jitter>;
};

/// The parameters of a gate that has none of its own.
template <class T>
struct no_parameters {
    template <class U>
    operator no_parameters<U>() const noexcept
    {
        return {};
    }
};

/// Names parameters of its own.
template <class G>
concept owns_parameters = requires {
    typename G::template parameters<float>;
    typename G::template parameters<const float>;
};

namespace detail {
template <class G>
struct parameters_of {
    template <class T>
    using type = no_parameters<T>;
};
template <owns_parameters G>
struct parameters_of<G> {
    template <class T>
    using type = typename G::template parameters<T>;
};
} // namespace detail

/// What the gate names, or no_parameters.
template <class G, class T>
using gate_parameters_t = typename detail::parameters_of<G>::template type<T>;

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

/// The same for a gate with parameters of its own.
template <class G, class Executor, class T, class Communicator>
concept routes_by_parameters = requires(const G& g, Executor& ex, const gate_input<T>& in,
                                        const gate_parameters_t<G, const T>& own, const Communicator& c,
                                        const gate_state_t<G, accumulate_t<T>>& state, arena& scratch) {
    g.route(ex, in, own, c, state, scratch);
};

/// Turns gradients of the weights, and its losses, into gradients of the logits. What forward and backward ask besides.
template <class G, class Executor, class T, class Communicator>
concept trains = requires(const G& g, Executor& ex, const gate_input<T>& in, const Communicator& c,
                          const gate_state_t<G, accumulate_t<T>>& state,
                          vector_view<const accumulate_t<T>> dweights, accumulate_t<T> loss_scale,
                          matrix_view<accumulate_t<T>> dlogits, arena& scratch) {
    g.backward(ex, in, c, state, dweights, loss_scale, dlogits, scratch);
};

/// The same for a gate with parameters of its own, and their gradients.
template <class G, class Executor, class T, class Communicator>
concept trains_parameters =
    requires(const G& g, Executor& ex, const gate_input<T>& in, const gate_parameters_t<G, const T>& own,
             const gate_parameters_t<G, T>& gradients, const Communicator& c,
             const gate_state_t<G, accumulate_t<T>>& state, vector_view<const accumulate_t<T>> dweights,
             accumulate_t<T> loss_scale, matrix_view<accumulate_t<T>> dlogits, matrix_view<T> dx, arena& scratch) {
        g.backward(ex, in, own, c, state, dweights, loss_scale, dlogits, dx, scratch);
        g.parameter_gradients(ex, in, state, gradients, write_mode::overwrite, scratch);
    };

/// Lays out and fills parameters of its own.
template <class G, class Executor, class T>
concept reserves_parameters = requires(const G& g, Executor& ex, arena& memory, int64_t width) {
    g.initialize(ex, g.template reserve_parameters<T>(memory, width), std::uint64_t{});
};

namespace detail {

/// Stands in a concept for the kind of gate that is not meant, so that no "or" hides which expression is missing.
struct any_gate {
    int64_t experts = 1, k = 1;
    template <class... Arguments>
    void route(Arguments&&...) const;
    template <class... Arguments>
    void backward(Arguments&&...) const;
};
struct any_owning_gate : any_gate {
    template <class T>
    using parameters = no_parameters<T>;
    template <class T>
    parameters<T> reserve_parameters(arena&, int64_t) const;
    template <class... Arguments>
    void initialize(Arguments&&...) const;
    template <class... Arguments>
    void parameter_gradients(Arguments&&...) const;
};
template <class G>
using plain_part = std::conditional_t<owns_parameters<G>, any_gate, G>;
template <class G>
using owning_part = std::conditional_t<owns_parameters<G>, G, any_owning_gate>;

} // namespace detail

/// What a layer needs to infer.
template <class G, class Executor, class T, class Communicator>
concept inference_gate = states_experts<G> && states_choices<G> &&
                         routes<detail::plain_part<G>, Executor, T, Communicator> &&
                         routes_by_parameters<detail::owning_part<G>, Executor, T, Communicator>;

/// What a layer needs to train.
template <class G, class Executor, class T, class Communicator>
concept gate_policy = inference_gate<G, Executor, T, Communicator> &&
                      trains<detail::plain_part<G>, Executor, T, Communicator> &&
                      trains_parameters<detail::owning_part<G>, Executor, T, Communicator> &&
                      reserves_parameters<detail::owning_part<G>, Executor, T>;

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
