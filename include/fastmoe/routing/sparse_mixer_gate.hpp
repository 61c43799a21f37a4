// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// SparseMixer, the router of Phi-3.5-MoE (Liu et al. 2023, "Sparse backpropagation for MoE training", and 2024, "GRIN"):
/// K rounds, each a softmax over the experts that are left and close to the best. First step in the way of a token.
///
///     round j    top = the greatest logit left;  e is masked where (top - l_e) / max(|l_e|, top) > 2 eps
///                the choice is the top           its weight is its share of the softmax over what is left and unmasked
///                then it is removed              the next round measures against its own top
///
/// The weights of a token do not sum to one, and depend on logits that were not chosen. A mask is constant in backward;
/// the gradient is that of each round's softmax. 0 / 0, where l_e and the top are 0, masks nothing.
///
/// Training as published, mixer_pick::sampled, draws each choice from its round's softmax p instead. With m the p of the
/// choice, its weight is m if it is the top; else m in one of four cases and m / 3 in three (the code: 0.3333 m). The
/// gradient is that of m in any case. With L_e(w) the loss where e is chosen and weighs w, the expectation of all this is
/// sum_e L_e(p_e) dp_e, what a draw adds to the gradient: by Heun's third-order method where e is not the top, exact for
/// a cubic L_e, and to first order where it is.
#pragma once

#include <fastmoe/ops/rows.hpp>
#include <fastmoe/routing/sparse_mixer_rows.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// How a round picks its expert in training; inference takes the greatest.
enum class mixer_pick : std::uint8_t {
    greatest, ///< deterministic, with the exact gradient
    sampled,  ///< the published estimator; needs gate_input::random, draws by the token's number
};

///     fm::sparse_mixer_gate{.experts = 16, .k = 2, .epsilon = 0.01}
///
/// Rows that are not finite: the +Inf that are left share a round, -Inf and NaN weigh 0. Balance and z losses see the
/// softmax over all logits, as Phi's do.
struct sparse_mixer_gate {
    int64_t experts = 0;   ///< E
    int64_t k = 2;         ///< K
    double epsilon = 0.01; ///< eps, from 0 on
    mixer_pick pick = mixer_pick::greatest;
    fastmoe::capacity capacity{};
    balance_loss balance{};
    z_loss z{};
    input_jitter jitter{};

    template <class Real>
    top_k_state<Real> reserve(arena& memory, int64_t tokens) const
    {
        expects_room<Real>();
        return rest().template reserve<Real>(memory, tokens);
    }

    /// Fills state.routing, state.losses, and what backward reads.
    /// @throws invalid_argument if the gate's own values or the shapes of the input make no sense, or random is null where
    ///         choices are sampled; out_of_memory; nothing is written then
    template <executor Executor, class T, class Communicator, class Real>
    void route(Executor& ex, const gate_input<T>& in, const Communicator& c, const top_k_state<Real>& state,
               arena& scratch) const
    {
        expects_room<Real>();
        if (!scratch.measuring()) {
            rest().expects_state(state);
            detail::expects_gate_input(in, state.routing.tokens, experts);
            arena needed;
            rest().finish(ex, in, c, state, needed);
            scratch.require(needed.bytes());
            choose(ex, in, state);
        }
        rest().finish(ex, in, c, state, scratch);
    }

    /// The gradient of <dweights, weights>, or its published estimate, + loss_scale * (sum of losses).
    /// @param dweights  of a dropped choice: not read                       // (T*K)
    /// @param dlogits   overwritten                                         // (T,E)
    template <executor Executor, class T, class Communicator, class Real>
    void backward(Executor& ex, const gate_input<T>& in, const Communicator&, const top_k_state<Real>& state,
                  type_identity_t<vector_view<const Real>> dweights, type_identity_t<Real> loss_scale,
                  matrix_view<Real> dlogits, arena& scratch) const
    {
        expects_sane();
        if (scratch.measuring()) return;
        rest().expects_state(state);
        detail::expects_gate_input(in, state.routing.tokens, experts);
        expects_shape(dweights, "dweights (T*K)", state.routing.choices());
        expects_shape(dlogits, "dlogits (T,E)", state.routing.tokens, experts);
        using row = detail::mixer_row_backward<Real>;
        fastmoe::for_each_row(ex, state.routing.tokens,
                              row{in.logits, state.chosen.data_handle(), state.routing.experts.data_handle(),
                                  dweights.data_handle(), dlogits.data_handle(), coin(in), k, reach<Real>(),
                                  samples(in.mode), capacity.rescales()},
                              {.width = 4 * k * experts, .scratch_bytes = row::scratch_bytes(experts, k)});
        rest().finish_backward(ex, in, state, loss_scale, dlogits);
    }

    /// @throws invalid_argument that names the member
    void expects_sane() const
    {
        rest().expects_sane();
        expects(epsilon >= 0 && epsilon < std::numeric_limits<double>::infinity(), "epsilon", epsilon,
                "a finite number from 0 on");
    }

private:
    /// expects_sane(), and that a team has room for every row of both forms.
    template <class Real>
    void expects_room() const
    {
        expects_sane();
        detail::expects_team_room(top_k::scratch_bytes<Real>(experts, k), "experts", experts);
        detail::expects_team_room(detail::mixer_row_backward<Real>::scratch_bytes(experts, k), "experts", experts);
        if (pick == mixer_pick::sampled)
            detail::expects_team_room(detail::mixer_sample<Real>::scratch_bytes(experts), "experts", experts);
    }

    top_k_gate<softmax_score, top_k, raw_scores> rest() const
    {
        return {.experts = experts, .k = k, .capacity = capacity, .balance = balance, .z = z};
    }
    bool samples(gate_mode mode) const noexcept { return pick == mixer_pick::sampled && mode == gate_mode::training; }
    template <class Real>
    Real reach() const noexcept
    {
        return static_cast<Real>(2 * epsilon);
    }
    template <class T>
    detail::mixer_coin coin(const gate_input<T>& in) const
    {
        return {{in.random, random_stream::noise}, k, in.first_token};
    }

    template <class Executor, class T, class Real>
    void choose(Executor& ex, const gate_input<T>& in, const top_k_state<Real>& state) const
    {
        const int64_t tokens = state.routing.tokens;
        int32_t* ids = state.routing.experts.data_handle();
        if (samples(in.mode)) {
            expects(in.random != nullptr, "random", "a null pointer", "seed and step");
            expects(in.first_token >= 0, "first_token", in.first_token, "zero or more");
            using row = detail::mixer_sample<Real>;
            fastmoe::for_each_row(ex, tokens,
                                  row{in.logits,
                                      pointer_or_null(in.mask),
                                      ids,
                                      {in.random, random_stream::choice},
                                      k,
                                      in.first_token,
                                      reach<Real>()},
                                  {.width = 16 * k * experts, .scratch_bytes = row::scratch_bytes(experts)});
        } else {
            fastmoe::for_each_row(ex, tokens, detail::mixer_choose<Real>{in.logits, pointer_or_null(in.mask), ids, k},
                                  {.width = 2 * experts, .scratch_bytes = top_k::scratch_bytes<Real>(experts, k)});
        }
        fastmoe::for_each_row(
            ex, tokens,
            detail::mixer_weigh<Real>{in.logits, ids, state.chosen.data_handle(), state.routing.weights.data_handle(),
                                      coin(in), k, reach<Real>(), samples(in.mode)},
            {.width = 4 * k * experts, .scratch_bytes = detail::mixer_weigh<Real>::scratch_bytes(experts)});
    }
};

} // namespace fastmoe::inline FASTMOE_ABI
