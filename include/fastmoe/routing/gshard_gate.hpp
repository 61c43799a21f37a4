// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// GShard's gate (Lepikhin et al. 2020, algorithm 1): two experts a token, the second kept by chance in proportion to
/// its weight. A top_k_gate that loses choices once more. First step in the way of a token, forward and backward.
///
///     g_1, g_2 = softmax over the two best       the second is kept iff 2 g_2 > U(0,1)
///     balance    coefficient * E * sum_e f_e P_e, with f_e the share of tokens whose first choice is e
///     capacity   every second choice stands behind all first ones
///
/// U is drawn by the token's number among all ranks' tokens. The weight of the first does not grow when the second is
/// dropped, and a dropped choice is constant in backward. The paper's loss is this one over E^2, once for each group.
///
/// FastMoE's code draws in inference too (second_draw::always), fills its capacity without an order, whatever the schedule
/// gives, and takes for the first choice that of a top-k which is not sorted; none of the last two is offered. Keeping the
/// second by 2 p_2 with weights p is gshard_gate<raw_scores>.
#pragma once

#include <fastmoe/exec/random.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Whether a second choice that chance drops has taken a place in its expert's capacity.
enum class second_drop : std::uint8_t {
    after_capacity,  ///< it has: the count goes on in algorithm 1, and FastMoE's code prunes by capacity first
    before_capacity, ///< it leaves its place to others, as in Lingvo and Mesh TensorFlow
};

/// When chance acts.
enum class second_draw : std::uint8_t {
    in_training, ///< inference keeps every second choice
    always,      ///< FastMoE's code
};

namespace detail {

/// Drops the second choice of a token where 2 g > U is false. Everything is compared in double, so that executors whose
/// exponentials differ in the last bit of a float agree.
template <class Real, class Weigh>
struct drop_second {
    matrix_view<const Real> logits; // (T,E)
    const int32_t* chosen;          // (T,2)  before capacity
    int32_t* experts;               // (T,2)
    Real* weights;                  // (T,2)
    random_source random;
    int64_t first_token;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const int32_t first = chosen[2 * t], second = chosen[2 * t + 1];
        if (second < 0) return; // nothing was chosen
        const int64_t all = logits.extent(1);
        const Real* l = logits.data_handle() + t * all;
        const double top = static_cast<double>(l[first]);
        const auto power = [top](Real logit) {
            const double distance = static_cast<double>(logit) - top;
            return distance < 0 ? math::exp(distance) : static_cast<double>(static_cast<double>(logit) == top);
        };
        double sum = 1 + power(l[second]);
        if constexpr (!Weigh::over_chosen)
            sum = team.reduce(all, 0.0, adds{}, [=](int64_t e) { return power(l[e]); });
        const auto u = random.template uniform<double>(static_cast<std::uint64_t>(first_token + t));
        if (2 * power(l[second]) > u * sum || team.lane() != 0) return;
        experts[2 * t + 1] = -1;
        weights[2 * t + 1] = Real(0);
    }
};

} // namespace detail

/// Two choices a token. Training needs gate_input::random.
///
///     fm::gshard_gate<>{.experts = 64, .capacity = {.factor = 1}, .balance = {.coefficient = 0.01}}
///
/// @tparam Weigh  renormalize: weights g, kept by g_2. raw_scores: weights p, kept by p_2, the probabilities over all
template <class Weigh = renormalize>
struct gshard_gate {
    int64_t experts = 0;          ///< E, 2 or more
    fastmoe::capacity capacity{}; ///< token_major, the default, means choice_major here
    balance_loss balance{};       ///< counts first choices, whatever it says
    z_loss z{};
    input_jitter jitter{};
    second_drop drop = second_drop::after_capacity;
    second_draw draw = second_draw::in_training;

    static constexpr int64_t k = 2; ///< K

    template <class Real>
    top_k_state<Real> reserve(arena& memory, int64_t tokens) const
    {
        expects_sane();
        auto state = choice().template reserve<Real>(memory, tokens);
        if (!capacity.limited()) state.chosen = memory.vector<int32_t>(tokens * k); // chance drops too
        return state;
    }

    /// Fills state.routing, state.losses, and what backward reads.
    /// @throws invalid_argument if the gate's own values or the shapes of the input make no sense, or random is null where
    ///         chance acts; out_of_memory; nothing is written then
    template <executor Executor, class T, class Communicator, class Real>
        requires weighs_choices<Weigh>
    void route(Executor& ex, const gate_input<T>& in, const Communicator& c, const top_k_state<Real>& state,
               arena& scratch) const
    {
        expects_sane();
        const bool chance = in.mode == gate_mode::training || draw == second_draw::always;
        if (!scratch.measuring() && chance) {
            expects(in.random != nullptr, "random", "a null pointer", "seed and step");
            expects(in.first_token >= 0, "first_token", in.first_token, "zero or more");
        }
        if (!scratch.measuring()) {
            expects_state(state);
            arena needed;
            run(ex, in, c, state, chance, needed);
            scratch.require(needed.bytes());
        }
        run(ex, in, c, state, chance, scratch);
    }

    /// The gradient of <dweights, weights> + loss_scale * (sum of losses).
    /// @param dweights  of a dropped choice: not read                       // (T*2)
    /// @param dlogits   overwritten                                         // (T,E)
    template <executor Executor, class T, class Communicator, class Real>
    void backward(Executor& ex, const gate_input<T>& in, const Communicator& c, const top_k_state<Real>& state,
                  type_identity_t<vector_view<const Real>> dweights, type_identity_t<Real> loss_scale,
                  matrix_view<Real> dlogits, arena& scratch) const
    {
        expects_sane();
        if (!scratch.measuring()) expects_state(state);
        choice().backward(ex, in, c, state, dweights, loss_scale, dlogits, scratch);
    }

    /// @throws invalid_argument that names the member
    void expects_sane() const
    {
        expects(experts >= k, "experts", experts, "2 or more");
        expects(capacity.order != drop_order::by_weight, "capacity.order", "by_weight", "choice_major, or the default");
        expects(capacity.weights == after_drop::keep, "capacity.weights", "rescale", "keep: the first weight does not grow");
        choice().expects_sane();
    }

private:
    template <class Real>
    void expects_state(const top_k_state<Real>& s) const
    {
        choice().expects_state(s);
        expects(s.routing.tokens == 0 || s.chosen.data_handle() != s.routing.experts.data_handle(), "state.chosen",
                "state.routing.experts", "memory of its own");
    }

    top_k_gate<softmax_score, top_k, Weigh> choice() const
    {
        top_k_gate<softmax_score, top_k, Weigh> gate{
            .experts = experts, .k = k, .capacity = capacity, .balance = balance, .z = z};
        gate.capacity.order = drop_order::choice_major;
        gate.balance.counts = counted_choices::first;
        return gate;
    }

    template <class Executor, class T, class Communicator, class Real>
    void run(Executor& ex, const gate_input<T>& in, const Communicator& c, const top_k_state<Real>& state, bool chance,
             arena& scratch) const
    {
        const auto bounded = choice();
        auto first = bounded;
        const bool later = chance && drop == second_drop::before_capacity;
        if (later) first.capacity = {};
        first.route(ex, in, c, state, scratch);
        if (chance && !scratch.measuring())
            fastmoe::for_each_row(ex, state.routing.tokens,
                                  detail::drop_second<Real, Weigh>{in.logits,
                                                                   state.chosen.data_handle(),
                                                                   state.routing.experts.data_handle(),
                                                                   state.routing.weights.data_handle(),
                                                                   {in.random, random_stream::choice},
                                                                   in.first_token},
                                  {.width = Weigh::over_chosen ? 16 : 8 * experts});
        if (later) apply_capacity(ex, bounded.capacity, state.routing, c, scratch);
    }
};

} // namespace fastmoe::inline FASTMOE_ABI
