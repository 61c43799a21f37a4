// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The gate that most models have: score every expert, choose K, weigh the chosen. Capacity and losses are values
/// beside it. First step in the way of a token, forward and backward.
#pragma once

#include <fastmoe/ops/rows.hpp>
#include <fastmoe/routing/balance.hpp>
#include <fastmoe/routing/capacity.hpp>
#include <fastmoe/routing/gate.hpp>
#include <fastmoe/routing/select.hpp>
#include <fastmoe/routing/weigh.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// What a top_k_gate keeps from route to backward. The balance loss and its gradient see the choices before capacity.
template <class Real>
struct top_k_state {
    fastmoe::routing<Real> routing;
    vector_view<Real> losses;    // (2)    balance, z: times their coefficients; zero in inference
    vector_view<Real> slopes;    // (Q*E+1) see router_losses; without memory if there is no loss
    vector_view<int32_t> chosen; // (T*K)  before capacity; routing.experts itself if that is not limited
};

namespace verbs {
struct choose;
} // namespace verbs

namespace detail {

/// Chooses and weighs one token.
template <class Real, class Score, class Select, class Weigh>
struct choose_row {
    using vectorized = void;
    static constexpr int resident = 2; ///< blocks of a multiprocessor
    matrix_view<const Real> logits; // (T,E)
    const std::uint8_t* mask;       // (T), or null
    int32_t* experts;               // (T,K)
    int32_t* before;                // (T,K)  the same, for what capacity will drop; or experts itself
    Real* weights;                  // (T,K)
    Real* losses;                   // (2)    cleared by token 0's team; or null
    Score score;
    Select select;
    Weigh weigh;
    int64_t k;
    Real scale;

    /// The first choice is the greatest logit, so the row need not be searched for it again.
    static constexpr bool best_is_first =
        Select::takes_greatest && requires(const Score& s, const Real* l) { s.row_of_best(l, int64_t{}); };

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const int64_t all = logits.extent(1);
        int32_t *chosen = experts + t * k, *copy = before + t * k;
        Real* weight = weights + t * k;
        const Real* l = logits.data_handle() + t * all;
        const bool open = !mask || mask[t] != 0;
        if (losses && t == 0) team.for_each(2, [to = losses](int64_t i) { to[i] = Real(0); });
        if constexpr (best_is_first) {
            if (open) {
                select(team, plain_logits<Real>{l}, all, k, chosen);
                const auto row = score.row_of_best(l, chosen[0]);
                if (!row.empty()) return weigh_row(team, row, l, chosen, copy, weight);
                team.sync(); // before the choice is taken back
            }
        } else if (open) {
            const auto row = score.row(team, l, all);
            if (!row.empty()) {
                select(team, row, all, k, chosen);
                return weigh_row(team, row, l, chosen, copy, weight);
            }
        }
        team.for_each(k, [=](int64_t j) { chosen[j] = copy[j] = -1; });
        team.for_each(k, [=](int64_t j) { weight[j] = Real(0); });
    }

    template <class Team, class Row>
    FASTMOE_HOST_DEVICE void weigh_row(Team& team, const Row& row, const Real* l, const int32_t* chosen, int32_t* copy,
                                       Real* weight) const
    {
        team.for_each(k, [=](int64_t j) { weight[j] = l[chosen[j]]; }); // two loops: this one does not vectorize
        team.for_each(k, [=](int64_t j) { weight[j] = row.value(weight[j]); });
        if (copy != chosen) team.for_each(k, [=](int64_t j) { copy[j] = chosen[j]; });
        divide_values(team, weigh, row, l, logits.extent(1), weight, k, scale);
    }
};

} // namespace detail

template <class Executor>
struct implementation<verbs::choose, Executor> {
    template <class Row>
    static void run(Executor& ex, int64_t tokens, const Row& row, int64_t scratch_bytes)
    {
        fastmoe::for_each_row(ex, tokens, row, {.width = 2 * row.logits.extent(1), .scratch_bytes = scratch_bytes});
    }
};

/// Scores, chooses K, weighs:
///
///     fm::top_k_gate<fm::softmax_score>{.experts = 64, .k = 2}                       softmax over the chosen
///     fm::switch_gate{.experts = 64, .capacity = {.factor = 1.25}, .balance = {.coefficient = 0.01}}
///
/// Choices are written best first. A masked token, and one without a finite or +Inf logit, chooses nothing: experts -1,
/// weights and gradients 0. Capacity acts in both modes, so that infer gives what forward gives; losses in training.
/// @tparam Score   how a row is scored: softmax_score, sigmoid_score, ...; see score.hpp
/// @tparam Select  which scores are taken: top_k, group_limited
/// @tparam Weigh   what the chosen weigh: renormalize, raw_scores
template <class Score = softmax_score, class Select = top_k, class Weigh = renormalize>
struct top_k_gate {
    int64_t experts = 0; ///< E
    int64_t k = 1;       ///< K, 1 to E; over 1 to train with renormalize
    double scale = 1;    ///< multiplies every weight
    fastmoe::capacity capacity{};
    balance_loss balance{};
    z_loss z{};
    input_jitter jitter{};
    Score score{};
    Select select{};
    Weigh weigh{};

    template <class Real>
    top_k_state<Real> reserve(arena& memory, int64_t tokens) const
    {
        expects_room<Real>();
        top_k_state<Real> state;
        state.routing = reserve_routing<Real>(memory, tokens, experts, k);
        state.losses = memory.vector<Real>(2);
        if (has_loss()) state.slopes = memory.vector<Real>(balance.sequences(tokens) * experts + 1);
        state.chosen = capacity.limited() ? memory.vector<int32_t>(tokens * k) : state.routing.experts;
        return state;
    }

    /// Fills state.routing, state.losses, and what backward reads.
    /// @throws invalid_argument if the gate's own values or the shapes of the input make no sense, the state is not one that
    ///         reserve() gave, or training would give the router no gradient (K = 1, renormalized); out_of_memory; nothing
    ///         is written then
    template <executor Executor, class T, class Communicator, class Real>
        requires scores_rows<Score, Real> && selects_experts<Select, Real> && weighs_choices<Weigh>
    void route(Executor& ex, const gate_input<T>& in, const Communicator& c, const top_k_state<Real>& state,
               arena& scratch) const
    {
        expects_room<Real>();
        if (in.mode == gate_mode::training) check_training();
        if (!scratch.measuring()) {
            expects_state(state);
            detail::expects_gate_input(in, state.routing.tokens, experts);
            arena measure;
            finish(ex, in, c, state, measure);
            scratch.require(measure.bytes());
            choose(ex, in, state);
            if (state.routing.tokens > 0 && !has_loss(in.mode)) return apply_capacity(ex, capacity, state.routing, c, scratch);
        }
        finish(ex, in, c, state, scratch);
    }

    /// The gradient of <dweights, weights> + loss_scale * (sum of losses).
    /// @param dweights  of a dropped choice: not read                       // (T*K)
    /// @param dlogits   overwritten                                         // (T,E)
    /// @throws invalid_argument as route
    template <executor Executor, class T, class Communicator, class Real>
    void backward(Executor& ex, const gate_input<T>& in, const Communicator&, const top_k_state<Real>& state,
                  type_identity_t<vector_view<const Real>> dweights, type_identity_t<Real> loss_scale,
                  matrix_view<Real> dlogits, arena& scratch) const
    {
        expects_sane();
        check_training();
        if (scratch.measuring()) return;
        expects_state(state);
        detail::expects_gate_input(in, state.routing.tokens, experts);
        expects_shape(dweights, "dweights (T*K)", state.routing.choices());
        expects_shape(dlogits, "dlogits (T,E)", state.routing.tokens, experts);
        detail::weigh_backward(ex, score, weigh, scale, in.logits, detail::fixed_choices{k}, state.chosen,
                               state.routing.experts, capacity.rescales(), dweights, dlogits, k);
        finish_backward(ex, in, state, loss_scale, dlogits);
    }

    /// The second half of route, for gates that choose and weigh by themselves: losses, then capacity. Takes scratch
    /// and gives it back; on a measuring arena only counts.
    /// @param state  routing, and chosen, hold all choices; losses and slopes are written
    template <executor Executor, class T, class Communicator, class Real>
    void finish(Executor& ex, const gate_input<T>& in, const Communicator& c, const top_k_state<Real>& state,
                arena& scratch) const
    {
        const bool live = !scratch.measuring();
        if (has_loss(in.mode))
            router_losses_forward(ex, score, gate_logits<Real>{in.logits, in.mask}, state.routing.experts, k, balance,
                                  z, c, router_losses<Real>{state.losses, state.slopes}, scratch);
        else if (live) fastmoe::for_each(ex, 2, detail::fill<Real>{state.losses.data_handle(), Real(0)});
        apply_capacity(ex, capacity, state.routing, c, scratch);
    }

    /// The second half of backward: adds the losses' gradient.
    /// @param dlogits  added to                                             // (T,E)
    template <executor Executor, class T, class Real>
    void finish_backward(Executor& ex, const gate_input<T>& in, const top_k_state<Real>& state,
                         type_identity_t<Real> loss_scale, matrix_view<Real> dlogits) const
    {
        if (has_loss())
            router_losses_backward(ex, score, {in.logits, in.mask}, balance, z, state.slopes, loss_scale, dlogits);
    }

    /// @throws invalid_argument that names the member
    void expects_sane() const
    {
        expects(experts > 0 && experts <= INT32_MAX, "experts", experts, "1 to 2^31 - 1");
        expects(k > 0, "k", k, "1 or more");
        expects(k <= experts, "k", k, "at most the number of experts, ", experts);
        expects(scale - scale == 0, "scale", scale, "a finite number");
        (void)capacity.of(0, experts);
        detail::expects_coefficients(balance, z);
        detail::check_policy(score, experts, k);
        detail::check_policy(select, experts, k);
        detail::check_policy(weigh, experts, k);
    }

    /// Refuses the state of another gate, which would be written, or read, out of bounds.
    /// @throws invalid_argument that names what does not fit
    template <class Real>
    void expects_state(const top_k_state<Real>& s) const
    {
        const auto& route = s.routing;
        arena measure;
        const auto room = reserve<Real>(measure, route.tokens);
        expects(route.total_experts == experts, "state.routing.total_experts", route.total_experts, "the gate's E = ",
                experts);
        expects(!route.ragged(), "state.routing.first", "ragged", "K choices of every token");
        expects(route.k == k, "state.routing.k", route.k, "the gate's K = ", k);
        detail::expects_routing(route);
        expects_shape(s.losses, "state.losses (2)", 2);
        if (has_loss()) expects_shape(s.slopes, "state.slopes", room.slopes.extent(0));
        expects_shape(s.chosen, "state.chosen (T*K)", room.chosen.extent(0));
        expects(!capacity.limited() || route.choices() == 0 || s.chosen.data_handle() != route.experts.data_handle(),
                "state.chosen", "state.routing.experts", "memory of its own for a gate with capacity");
    }

private:
    /// expects_sane(), and that a team has room to choose and to weigh.
    template <class Real>
    void expects_room() const
    {
        expects_sane();
        detail::expects_team_room(select.template scratch_bytes<Real>(experts, k), "experts", experts);
        detail::expects_team_room(detail::weigh_scratch_bytes<Real>(k), "k", k);
    }

    bool has_loss() const noexcept { return balance.coefficient != 0 || z.coefficient != 0; }
    bool has_loss(gate_mode mode) const noexcept { return mode == gate_mode::training && has_loss(); }

    void check_training() const
    {
        if constexpr (Weigh::over_chosen && detail::score_row_t<Score, float>::sums_to_one)
            expects(k > 1, "k", k, "2 or more to train with renormalize: a single weight is constant and gives the ",
                    "router no gradient; use raw_scores");
    }

    template <class Executor, class T, class Real>
    void choose(Executor& ex, const gate_input<T>& in, const top_k_state<Real>& state) const
    {
        implementation<verbs::choose, Executor>::run(
            ex, state.routing.tokens,
            detail::choose_row<Real, Score, Select, Weigh>{
                in.logits, pointer_or_null(in.mask), state.routing.experts.data_handle(), state.chosen.data_handle(),
                state.routing.weights.data_handle(), has_loss(in.mode) ? nullptr : state.losses.data_handle(), score, select,
                weigh, k, static_cast<Real>(scale)},
            select.template scratch_bytes<Real>(experts, k));
    }
};

/// Switch (Fedus et al. 2021): the best expert, weighed by its probability.
using switch_gate = top_k_gate<softmax_score, top_k, raw_scores>;

} // namespace fastmoe::inline FASTMOE_ABI
