// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The values that a layer's passes hand to each other: weights, what forward keeps, what the weight gradients wait for.
#pragma once

#include <concepts>
#include <cstddef>
#include <utility>
#include <vector>

#include <fastmoe/expert/expert.hpp>
#include <fastmoe/comm/self.hpp>
#include <fastmoe/expert/weighed_rows.hpp>
#include <fastmoe/parallel/expert_parallel.hpp>
#include <fastmoe/routing/gate.hpp>
#include <fastmoe/routing/plan.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// A gate whose only parameters are the router's matrix and bias.
struct plain_gate {};

/// All parameters of a layer, or their gradients, as views.
/// @tparam Gate  the layer's, if it has parameters of its own
template <class T, class Expert, class Gate = plain_gate>
struct moe_weights {
    matrix_view<T> gate;                           // (E,D)  router; a gate without logits leaves it and its gradient alone
    vector_view<T> gate_bias;                      // (E)    without memory: none
    typename Expert::template weights<T> expert{}; //        see the expert
    gate_parameters_t<Gate, T> own{};              //        the gate's own, see the gate

    template <std::same_as<const T> U>
    operator moe_weights<U, Expert, Gate>() const noexcept
    {
        return {gate, gate_bias, expert, own};
    }
};

/// The weights of a layer with this gate: one type for all gates without parameters of their own.
template <class T, class Expert, class Gate>
using weights_of_layer = moe_weights<T, Expert, std::conditional_t<owns_parameters<Gate>, Gate, plain_gate>>;

/// What a call may bring besides tokens.
struct gate_options {
    vector_view<const int32_t> token_ids = {};  // (T)  for gates that read them
    vector_view<const std::uint8_t> mask = {};  // (T)  zero: a padding token, which chooses nothing
    const std::uint64_t* random = nullptr;      // (2)  seed and step, in the executor's memory; the same until backward is done
    int64_t first_token = 0;                    ///< number of x's first token among all ranks' tokens
};

struct backward_options {
    write_mode gradients = write_mode::overwrite; ///< of the weights; dx is always overwritten
    double loss_scale = 1;                        ///< factor of the gate's own losses, e.g. 1 / microbatches
};

template <class Gate, class T>
using gate_state_of = gate_state_t<Gate, accumulate_t<T>>;

namespace detail {
/// What a layer's expert keeps; where it does not apply the weights, its outputs too.
template <class Expert, class T>
using kept_of = saved_of<std::remove_cvref_t<applying_t<Expert>>, T>;
template <class Expert, class T>
using left_of = pending_of<std::remove_cvref_t<applying_t<Expert>>, T>;

/// What a layer keeps of its own tokens.
template <class T, class Gate>
struct decided {
    matrix_view<const T> x;              // (T,D)
    gate_options options;
    matrix_view<accumulate_t<T>> logits; // (T,E)
    gate_state_of<Gate, T> gate;

    gate_input<T> gate_view(gate_mode mode) const
    {
        return {x, logits, options.token_ids, options.mask, mode, options.random, options.first_token};
    }
};

/// What one piece of an exchange keeps: the lists of some of this rank's tokens, and the local path of what was received.
template <class T, class Expert, class Communicator>
struct exchanged_piece {
    using exchange = std::remove_cvref_t<decltype(std::declval<const parallel_t<Communicator>&>().exchange)>;
    using real = accumulate_t<T>;
    int64_t first = 0, tokens = 0; ///< own ones: [first, first + tokens)
    typename exchange::template state<real> state;
    routing<real> received; // (Cr)   of M tokens over L experts
    matrix_view<T> rows;    // (M,D)  empty if they are fetched again
    plan slots;
    kept_of<Expert, T> expert;

    expert_input<T> expert_view(matrix_view<const T> x) const
    {
        return {{x, slots.token_of}, slots.groups(), received.weights, slots.choice_of};
    }
};
} // namespace detail

/// What forward keeps, as views: x by reference, the routing, the plan, and what the expert declares.
template <class T, class Gate, class Expert, class Communicator = self>
struct moe_parts : detail::decided<T, Gate> {
    plan slots;
    detail::kept_of<Expert, T> expert;

    expert_input<T> expert_view() const
    {
        return {{this->x, slots.token_of}, slots.groups(), this->gate.routing.weights, slots.choice_of};
    }
};

/// Where ranks share the experts, plans and all after them are of the M received tokens and the L experts of this rank, one
/// for each chunk of the exchange.
template <class T, class Gate, class Expert, class Communicator>
    requires detail::shares_experts<Communicator>
struct moe_parts<T, Gate, Expert, Communicator> : detail::decided<T, Gate> {
    std::vector<detail::exchanged_piece<T, Expert, Communicator>> pieces;
};

/// What forward() returns and backward() takes. Owns its memory if the caller gave none. The layer's x must outlive it.
template <class T, class Gate, class Expert, class Executor, class Communicator = self>
class moe_saved {
public:
    using parts_type = moe_parts<T, Gate, Expert, Communicator>;

    /// @param received  memory for what other ranks sent, whose size is known later
    moe_saved(parts_type parts, buffer<std::byte, Executor> storage, buffer<std::byte, Executor> received = {})
        : parts_(std::move(parts)), storage_(std::move(storage)), received_(std::move(received))
    {
    }

    matrix_view<const T> x() const noexcept { return parts_.x; }
    const fastmoe::routing<accumulate_t<T>>& routing() const noexcept { return parts_.gate.routing; }
    const fastmoe::plan& plan() const noexcept
        requires(!detail::shares_experts<Communicator>)
    {
        return parts_.slots;
    }
    /// What this rank received: the plan of its experts, and what the exchange says of itself, e.g. how many rows did not fit.
    const fastmoe::plan& plan(int chunk = 0) const noexcept
        requires detail::shares_experts<Communicator>
    {
        return parts_.pieces[static_cast<std::size_t>(chunk)].slots;
    }
    const auto& exchange(int chunk = 0) const noexcept
        requires detail::shares_experts<Communicator>
    {
        return parts_.pieces[static_cast<std::size_t>(chunk)].state;
    }
    matrix_view<const accumulate_t<T>> logits() const noexcept { return parts_.logits; }
    /// The gate's own losses, scaled by their coefficients, in the order that the gate documents.
    auto losses() const noexcept
        requires requires(const gate_state_of<Gate, T>& s) { s.losses; }
    {
        return parts_.gate.losses;
    }
    const parts_type& parts() const noexcept { return parts_; }

private:
    parts_type parts_;
    buffer<std::byte, Executor> storage_, received_;
};

/// What the weight gradients still need after the input's gradient is done.
template <class T, class Expert, class Communicator = self>
struct moe_pending {
    indexed_rows<T> dy;                   // (S,D)  gradient of the output, by token
    matrix_view<accumulate_t<T>> dlogits; // (T,E)
    detail::left_of<Expert, T> expert;
};

namespace detail {
template <class T, class Expert>
struct pending_piece {
    matrix_view<const T> x; // (M,D)  received tokens
    indexed_rows<T> dy;     // (S,D)  gradient of their outputs
    left_of<Expert, T> expert;
};
} // namespace detail

template <class T, class Expert, class Communicator>
    requires detail::shares_experts<Communicator>
struct moe_pending<T, Expert, Communicator> {
    matrix_view<accumulate_t<T>> dlogits; // (T,E)
    std::vector<detail::pending_piece<T, Expert>> pieces;
};

} // namespace fastmoe::inline FASTMOE_ABI
