// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A gate in two parts: an assignment says who goes where, by whatever means, and a score says what the choices weigh.
/// Hash and random routing, expert choice, Sinkhorn, balanced assignment and token rounding are assignments.
///
///     struct my_assignment {
///         static constexpr bool reads_logits = true;       // false: the layer does not compute them
///         static constexpr bool ragged = false;            // true: it says itself how many choices a token has
///         int64_t choices(int64_t tokens, int64_t experts, int64_t k) const;   // C; only if ragged
///         void validate(int64_t experts, int64_t k) const;    // optional: throws
///
///         template <class Executor, class T, class Communicator, class Real>
///         void assign(Executor& ex, const gate_input<T>& in, const Communicator& c, const assignment<Real>& to,
///                     arena& scratch) const;
///     };
///
/// `assign` writes every one of to.experts, an id in [0, E) or -1, at most once each in a token; if ragged, also to.first,
/// and -1 where a choice belongs to no token. A masked token, and one without a finite or +Inf logit where logits are
/// read, gets -1. Scratch is taken from the arena; on a measuring arena only counted.
#pragma once

#include <fastmoe/ops/rows.hpp>
#include <fastmoe/routing/balance.hpp>
#include <fastmoe/routing/capacity.hpp>
#include <fastmoe/routing/gate.hpp>
#include <fastmoe/routing/weigh.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// What an assignment fills.
template <class Real>
struct assignment {
    int64_t tokens;               ///< T
    int64_t total_experts;        ///< E
    int64_t k;                    ///< K of the gate
    vector_view<int32_t> experts; // (C)
    vector_view<int32_t> first;   // (T+1)  of a ragged assignment: from 0, without a decrease; choices past its end
                                  //        belong to no token
};

/// Says whether it reads logits and whether its choices are ragged, and then how many there are.
template <class A>
concept states_assignment = requires(const A& a, int64_t n) {
    { A::reads_logits } -> std::convertible_to<bool>;
    { A::ragged } -> std::convertible_to<bool>;
    requires !A::ragged || requires { { a.choices(n, n, n) } -> std::convertible_to<int64_t>; };
};

template <class A, class Executor, class T, class Communicator>
concept assigns = states_assignment<A> &&
                  requires(const A& a, Executor& ex, const gate_input<T>& in, const Communicator& c,
                           const assignment<accumulate_t<T>>& to, arena& scratch) { a.assign(ex, in, c, to, scratch); };

/// Every choice has the same score, 1, which no logit changes. With raw_scores the weight is the gate's scale.
struct constant_score {
    static constexpr bool reads_logits = false;
};

namespace detail {

template <class Score>
inline constexpr bool score_reads_logits = true;
template <class Score>
    requires requires { Score::reads_logits; }
inline constexpr bool score_reads_logits<Score> = Score::reads_logits; // of an assignment, too

/// weight = scale, or scale / (choices of the token that are not dropped).
template <class Real>
struct weigh_constant {
    routing<Real> route;
    Real scale;
    bool share;

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        int64_t n = 0;
        for (int64_t c = route.begin(t); c < route.end(t); ++c) n += route.experts(c) >= 0;
        const Real each = share && n > 0 ? scale / static_cast<Real>(n) : scale;
        for (int64_t c = route.begin(t); c < route.end(t); ++c) route.weights(c) = route.experts(c) >= 0 ? each : Real(0);
    }
};

/// What an assignment wrote is not trusted: an id out of range is recorded, and dropped.
struct check_assigned {
    vector_view<int32_t> experts; // (C)
    int64_t total;
    fault_recorder faults;

    FASTMOE_HOST_DEVICE void operator()(int64_t c) const
    {
        const int32_t e = experts(c);
        if (e >= -1 && e < total) return;
        faults.record(fault_kind::expert_out_of_range, c, e);
        experts(c) = -1;
    }
};

template <class T>
struct copy_ids {
    using vectorized = void;
    const T* from;
    T* to;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { to[i] = from[i]; }
};

} // namespace detail

/// A score policy, or constant_score. Written without an "or", whose failure would not be explained.
template <class Score, class Real>
concept scores_assigned = scores_rows<std::conditional_t<detail::score_reads_logits<Score>, Score, softmax_score>, Real>;

/// What an assigned_gate keeps from route to backward.
template <class Real>
struct assigned_state {
    fastmoe::routing<Real> routing;
    vector_view<Real> losses;    // (2)    balance, z: times their coefficients; zero in inference
    vector_view<Real> slopes;    // (Q*E+1) see router_losses; without memory if there is no loss
    vector_view<int32_t> chosen; // (C)    before capacity; routing.experts itself if that is not limited
    vector_view<int32_t> first;  // (T+1)  of ragged choices
};

/// Assigns, weighs, bounds.
/// @tparam Assign  who goes where
/// @tparam Score   how a row is scored, see score.hpp; or constant_score
/// @tparam Weigh   what the chosen weigh: raw_scores, renormalize
template <class Assign, class Score = softmax_score, class Weigh = raw_scores>
struct assigned_gate {
    int64_t experts = 0; ///< E
    int64_t k = 1;       ///< K; what it means to a ragged assignment, that says
    double scale = 1;    ///< multiplies every weight
    fastmoe::capacity capacity{};
    balance_loss balance{}; ///< not of ragged choices
    z_loss z{};
    input_jitter jitter{};
    Assign assignment{};
    Score score{};
    Weigh weigh{};

    static constexpr bool reads_logits = detail::score_reads_logits<Assign> || detail::score_reads_logits<Score>;

    template <class Real>
    assigned_state<Real> reserve(arena& memory, int64_t tokens) const
    {
        expects_room<Real>();
        assigned_state<Real> s;
        if constexpr (Assign::ragged) {
            const int64_t choices = assignment.choices(tokens, experts, k);
            expects(choices >= 0 && choices <= INT32_MAX, "choices", choices, "0 to 2^31 - 1");
            s.first = memory.vector<int32_t>(tokens + 1);
            s.routing = {tokens, experts, 0, memory.vector<int32_t>(choices), memory.vector<Real>(choices), s.first};
        } else {
            s.routing = reserve_routing<Real>(memory, tokens, experts, k);
        }
        s.losses = memory.vector<Real>(2);
        if (has_loss()) s.slopes = memory.vector<Real>(balance.sequences(tokens) * experts + 1);
        s.chosen = capacity.limited() ? memory.vector<int32_t>(s.routing.choices()) : s.routing.experts;
        return s;
    }

    /// Fills state.routing, state.losses, and what backward reads.
    /// @throws invalid_argument if the gate's own values or the shapes of the input make no sense, or the state is not one
    ///         that reserve() gave; out_of_memory; nothing is written then
    template <executor Executor, class T, class Communicator, class Real>
        requires states_assignment<Assign> && scores_assigned<Score, Real> && weighs_choices<Weigh>
    void route(Executor& ex, const gate_input<T>& in, const Communicator& c, const assigned_state<Real>& state,
               arena& scratch) const
    {
        static_assert(assigns<Assign, Executor, T, Communicator>, "the assignment lacks what a gate asks; see assigned_gate.hpp");
        expects_room<Real>();
        if (!scratch.measuring()) {
            expects_state(state);
            if constexpr (reads_logits) detail::expects_gate_input(in, state.routing.tokens, experts);
            else if (in.mask.extent(0) != 0) expects_shape(in.mask, "mask (T)", state.routing.tokens);
            arena measure;
            run(ex, in, c, state, measure);
            scratch.require(measure.bytes());
        }
        run(ex, in, c, state, scratch);
    }

    /// The gradient of <dweights, weights> + loss_scale * (sum of losses). None flows through the assignment.
    /// @param dweights  of a dropped choice: not read                       // (C)
    /// @param dlogits   overwritten                                         // (T,E)
    /// @throws invalid_argument as route
    template <executor Executor, class T, class Communicator, class Real>
    void backward(Executor& ex, const gate_input<T>& in, const Communicator&, const assigned_state<Real>& state,
                  type_identity_t<vector_view<const Real>> dweights, type_identity_t<Real> loss_scale,
                  matrix_view<Real> dlogits, arena& scratch) const
    {
        expects_sane();
        if (scratch.measuring()) return;
        expects_state(state);
        if constexpr (reads_logits) {
            detail::expects_gate_input(in, state.routing.tokens, experts);
            expects_shape(dweights, "dweights (C)", state.routing.choices());
            expects_shape(dlogits, "dlogits (T,E)", state.routing.tokens, experts);
            if constexpr (detail::score_reads_logits<Score>) {
                detail::weigh_backward(ex, score, weigh, scale, in.logits, state.routing, state.chosen,
                                       state.routing.experts, capacity.rescales(), dweights, dlogits, most());
                if (has_loss())
                    router_losses_backward(ex, score, {in.logits, in.mask}, balance, z, state.slopes, loss_scale, dlogits);
            } else {
                fastmoe::for_each(ex, state.routing.tokens * experts, detail::fill<Real>{dlogits.data_handle(), Real(0)});
            }
        }
    }

    /// @throws invalid_argument that names the member
    void expects_sane() const
    {
        expects(experts > 0 && experts <= INT32_MAX, "experts", experts, "1 to 2^31 - 1");
        expects(k > 0, "k", k, "1 or more");
        if constexpr (!Assign::ragged) expects(k <= experts, "k", k, "at most the number of experts, ", experts);
        expects(scale - scale == 0, "scale", scale, "a finite number");
        (void)capacity.of(0, experts);
        detail::expects_coefficients(balance, z);
        if constexpr (Assign::ragged || !detail::score_reads_logits<Score>)
            expects(balance.coefficient == 0, "balance.coefficient", balance.coefficient, "0 for this assignment");
        if constexpr (!detail::score_reads_logits<Score>)
            expects(z.coefficient == 0, "z.coefficient", z.coefficient, "0 for a score that reads no logits");
        detail::check_policy(assignment, experts, k);
        detail::check_policy(score, experts, k);
        detail::check_policy(weigh, experts, k);
    }

private:
    /// The state of another gate would be written, or read, out of bounds.
    template <class Real>
    void expects_state(const assigned_state<Real>& s) const
    {
        const auto& route = s.routing;
        arena measure;
        const auto room = reserve<Real>(measure, route.tokens);
        expects(route.total_experts == experts, "state.routing.total_experts", route.total_experts, "the gate's E = ",
                experts);
        expects(route.ragged() == Assign::ragged, "state.routing.first", route.ragged() ? "ragged" : "empty",
                Assign::ragged ? "ragged choices" : "K choices of every token");
        if constexpr (Assign::ragged) {
            expects_shape(route.experts, "state.routing.experts (C)", room.routing.choices());
            expects_shape(s.first, "state.first (T+1)", route.tokens + 1);
        } else {
            expects(route.k == k, "state.routing.k", route.k, "the gate's K = ", k);
        }
        detail::expects_routing(route);
        expects_shape(s.losses, "state.losses (2)", 2);
        if (has_loss()) expects_shape(s.slopes, "state.slopes", room.slopes.extent(0));
        expects_shape(s.chosen, "state.chosen (C)", room.chosen.extent(0));
        expects(!capacity.limited() || route.choices() == 0 || s.chosen.data_handle() != route.experts.data_handle(),
                "state.chosen", "state.routing.experts", "memory of its own for a gate with capacity");
    }

    /// expects_sane(), and that a team has room for the gradients of a token's weights.
    template <class Real>
    void expects_room() const
    {
        expects_sane();
        if constexpr (detail::score_reads_logits<Score>)
            detail::expects_team_room(detail::weigh_scratch_bytes<Real>(most()), Assign::ragged ? "experts" : "k", most());
    }

    /// The most choices that a token can have.
    int64_t most() const noexcept { return Assign::ragged ? experts : k; }

    bool has_loss() const noexcept { return balance.coefficient != 0 || z.coefficient != 0; }

    template <class Executor, class T, class Communicator, class Real>
    void run(Executor& ex, const gate_input<T>& in, const Communicator& c, const assigned_state<Real>& state,
             arena& scratch) const
    {
        const auto& route = state.routing;
        const bool live = !scratch.measuring();
        {
            const arena::scope lent(scratch);
            assignment.assign(ex, in, c, fastmoe::assignment<Real>{route.tokens, experts, k, route.experts, state.first},
                              scratch);
        }
        if (live) {
            fastmoe::for_each(ex, route.choices(), detail::check_assigned{route.experts, experts, ex.faults()});
            if constexpr (Assign::ragged)
                fastmoe::for_each_row(ex, 1, detail::repair_first<Real>{route, state.first, ex.faults()},
                                      {.width = route.tokens});
            if constexpr (Assign::ragged) // those that belong to no token
                fastmoe::for_each(ex, route.choices(), detail::fill<Real>{route.weights.data_handle(), Real(0)});
            if constexpr (detail::score_reads_logits<Score>) detail::weigh(ex, score, weigh, scale, in.logits, route);
            else fastmoe::for_each(ex, route.tokens, detail::weigh_constant<Real>{route, Real(scale), Weigh::over_chosen});
            if (state.chosen.data_handle() != route.experts.data_handle())
                fastmoe::for_each(ex, route.choices(),
                                  detail::copy_ids<int32_t>{route.experts.data_handle(), state.chosen.data_handle()});
            ex.deliver_faults(); // a communicator that fails next would leave them to another call
        }
        if constexpr (detail::score_reads_logits<Score>) {
            if (in.mode == gate_mode::training && has_loss())
                router_losses_forward(ex, score, gate_logits<Real>{in.logits, in.mask},
                                      Assign::ragged ? vector_view<int32_t>() : route.experts, Assign::ragged ? 0 : k,
                                      balance, z, c, router_losses<Real>{state.losses, state.slopes}, scratch);
            else if (live) fastmoe::for_each(ex, 2, detail::fill<Real>{state.losses.data_handle(), Real(0)});
        } else if (live) {
            fastmoe::for_each(ex, 2, detail::fill<Real>{state.losses.data_handle(), Real(0)});
        }
        apply_capacity(ex, capacity, route, c, scratch);
    }
};

} // namespace fastmoe::inline FASTMOE_ABI
