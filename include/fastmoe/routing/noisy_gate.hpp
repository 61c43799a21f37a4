// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Noisy top-K (Shazeer et al. 2017, "Outrageously large neural networks"): the choice is made on logits with learned
/// noise, and two losses keep what experts get even. First step in the way of a token, forward and backward.
///
///     l' = l + z sigma          z ~ N(0,1), sigma = softplus(x Wn^T) + 0.01; l' = l in inference      (eq. 4)
///     chosen = top-K of l'      weights = softmax of the chosen l'                                    (eq. 3, 5)
///     importance                coefficient * cv^2(sum_t w_te)                                        (eq. 6, 7)
///     load                      coefficient * cv^2(sum_t Phi((l_te - threshold_te) / sigma_te))       (eq. 8 to 11)
///
/// threshold_te is the K-th best of the other l': that of place K+1 where e was chosen, of place K where it was not. At
/// K = E every load is T. The 0.01 is of Shazeer's code; his paper has none. Gradients are those of his code too: the
/// choice is constant, and all else is not: a threshold passes its gradient on to the l' that it is, and so to l and
/// sigma. Losses count choices before capacity; masked tokens, and those without a logit to choose by, count nowhere.
#pragma once

#include <fastmoe/routing/noisy_load.hpp>
#include <fastmoe/routing/project.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// The loss on the load of experts.
struct load_loss {
    double coefficient = 0;
    fastmoe::variance variance = fastmoe::variance::population;
};

template <class T>
struct noisy_parameters {
    matrix_view<T> noise; // (E,D)  Wn

    template <std::same_as<const T> U>
    operator noisy_parameters<U>() const noexcept
    {
        return {noise};
    }
};

/// What a noisy_gate keeps from route to backward.
template <class Real>
struct noisy_state {
    fastmoe::routing<Real> routing;
    vector_view<Real> losses; // (4)  balance, z, importance, load: times their coefficients; zero in inference
    top_k_state<Real> choice; //      of the noisy logits; losses are the first two
    evenness<Real> importance, load;
    matrix_view<Real> raw;    // (T,E)  r = x Wn^T
    matrix_view<Real> draws;  // (T,E)  z
    matrix_view<Real> noisy;  // (T,E)  l'
    matrix_view<Real> dnoise; // (T,E)  d loss / d r, by backward
};

/// Chooses by noisy logits. Training needs gate_input::random, and K = 1 is refused there: its weight is constant.
///
///     fm::noisy_gate{.experts = 16, .k = 4, .importance = {0.1}, .load = {0.1}}
///
/// Balance and z losses, where asked for, see the noisy logits. FastMoE's code differs in its losses: a sample variance
/// (variance::sample), no coefficients, one rank's tokens alone, and at K = E a load that leaves out weights of 0.
struct noisy_gate {
    int64_t experts = 0; ///< E
    int64_t k = 2;       ///< K
    double scale = 1;    ///< multiplies every weight
    fastmoe::capacity capacity{};
    balance_loss balance{};
    z_loss z{};
    importance_loss importance{};
    load_loss load{};

    template <class T>
    using parameters = noisy_parameters<T>;

    template <class T>
    parameters<T> reserve_parameters(arena& memory, int64_t width) const
    {
        return {memory.matrix<T>(experts, width)};
    }

    /// Zeros, as in the paper's appendix A: every sigma starts at log 2 + 0.01.
    template <executor Executor, class T>
    void initialize(Executor& ex, const parameters<T>& own, std::uint64_t) const
    {
        fastmoe::for_each(ex, own.noise.extent(0) * own.noise.extent(1), detail::fill<T>{own.noise.data_handle(), T(0)});
    }

    template <class Real>
    noisy_state<Real> reserve(arena& memory, int64_t tokens) const
    {
        expects_sane();
        noisy_state<Real> s;
        s.choice = choice().template reserve<Real>(memory, tokens);
        s.routing = s.choice.routing;
        s.losses = memory.vector<Real>(4);
        const auto part = [&](int64_t at, int64_t n) { // no arithmetic on a null pointer
            return vector_view<Real>(memory.measuring() ? nullptr : s.losses.data_handle() + at, n);
        };
        s.choice.losses = part(0, 2);
        // A loss that forward does not take leaves backward nothing: a gate that asks for it later is refused.
        s.importance = {part(2, 1), memory.vector<Real>(importance.coefficient != 0 ? experts : 0)};
        s.load = {part(3, 1), memory.vector<Real>(load.coefficient != 0 ? experts : 0)};
        for (auto* m : {&s.raw, &s.draws, &s.noisy, &s.dnoise}) *m = memory.matrix<Real>(tokens, experts);
        return s;
    }

    /// Fills state.routing, state.losses, and what backward reads.
    /// @throws invalid_argument if the gate's own values or shapes make no sense, the noise matrix is not (E,D), or random
    ///         is null in training; out_of_memory; nothing is written then
    template <executor Executor, class T, class Communicator, class Real>
    void route(Executor& ex, const gate_input<T>& in, const parameters<const T>& own, const Communicator& c,
               const noisy_state<Real>& state, arena& scratch) const
    {
        expects_sane();
        const bool training = in.mode == gate_mode::training;
        if (!scratch.measuring()) {
            expects_state(state);
            detail::expects_gate_input(in, state.routing.tokens, experts);
            if (training) {
                expects_shape(in.x, "x (T,D)", state.routing.tokens, in.x.extent(1));
                expects_shape(own.noise, "noise matrix (E,D)", experts, in.x.extent(1));
                expects(in.random != nullptr, "random", "a null pointer", "seed and step");
                expects(in.first_token >= 0, "first_token", in.first_token, "zero or more");
            }
        }
        detail::with_scratch(scratch, [&](arena& memory) {
            if (training) {
                project(ex, in.x, own.noise, vector_view<const T>(), state.raw, memory);
                if (!memory.measuring())
                    fastmoe::for_each(ex, state.routing.tokens * experts,
                                      detail::add_noise<Real>{in.logits.data_handle(),
                                                              state.raw.data_handle(),
                                                              state.draws.data_handle(),
                                                              state.noisy.data_handle(),
                                                              {in.random, random_stream::noise},
                                                              static_cast<std::uint64_t>(in.first_token * experts)});
            }
            auto chooser = choice();
            chooser.capacity = {}; // importance comes first
            chooser.route(ex, training ? seen(in, state) : in, c, state.choice, memory);
            if (!memory.measuring())
                fastmoe::for_each(ex, 2, detail::fill<Real>{state.importance.loss.data_handle(), Real(0)});
            if (training && importance.coefficient != 0)
                importance_loss_forward(ex, state.routing, importance, c, state.importance, memory);
            if (training && load.coefficient != 0) take_load(ex, in, c, state, memory);
            apply_capacity(ex, capacity, state.routing, c, memory);
        });
    }

    /// The gradient of <dweights, weights> + loss_scale * (sum of losses).
    /// @param dweights  of a dropped choice: not read                       // (T*K)
    /// @param dlogits   overwritten                                         // (T,E)
    /// @param dx        what flows through the noise is added               // (T,D)
    template <executor Executor, class T, class Communicator, class Real>
    void backward(Executor& ex, const gate_input<T>& in, const parameters<const T>& own, const Communicator& c,
                  const noisy_state<Real>& state, type_identity_t<vector_view<const Real>> dweights,
                  type_identity_t<Real> loss_scale, matrix_view<Real> dlogits, type_identity_t<matrix_view<T>> dx,
                  arena& scratch) const
    {
        expects_sane();
        if (!scratch.measuring()) {
            expects_state(state);
            expects_shape(own.noise, "noise matrix (E,D)", experts, in.x.extent(1));
            expects_shape(dx, "dx (T,D)", state.routing.tokens, in.x.extent(1));
        }
        detail::with_scratch(scratch, [&](arena& memory) {
            choice().backward(ex, seen(in, state), c, state.choice, dweights, loss_scale, dlogits, memory);
            if (!memory.measuring())
                fastmoe::for_each_row(
                    ex, state.routing.tokens,
                    detail::noise_row_backward<Real>{
                        in.logits, state.raw, state.draws, state.noisy, state.choice.chosen.data_handle(),
                        importance.coefficient != 0 ? state.importance.slopes.data_handle() : nullptr,
                        load.coefficient != 0 ? state.load.slopes.data_handle() : nullptr, dlogits.data_handle(),
                        state.dnoise.data_handle(), k, static_cast<Real>(scale), loss_scale},
                    {.width = 16 * experts});
            project_input_backward(ex, state.dnoise, own.noise, dx, write_mode::accumulate, memory);
        });
    }

    /// dWn (+)= dr^T x, with the dr that backward left.
    /// @param gradients  overwritten or added to                            // (E,D)
    template <executor Executor, class T, class Real, class G>
    void parameter_gradients(Executor& ex, const gate_input<T>& in, const noisy_state<Real>& state,
                             const parameters<G>& gradients, write_mode mode, arena& scratch) const
    {
        if (!scratch.measuring()) {
            expects_state(state);
            expects_shape(gradients.noise, "gradient of the noise matrix (E,D)", experts, in.x.extent(1));
        }
        project_weights_backward(ex, state.dnoise, in.x, gradients.noise, {}, mode, scratch);
    }

    /// Inference does without the noise matrix: there it may be empty.
    template <class T, class Role>
    void check_parameters(const parameters<T>& own, int64_t width, Role role) const
    {
        const bool given = role == Role::weights;
        if (!given || own.noise.extent(0) > 0)
            expects_shape(own.noise, given ? "noise matrix (E,D)" : "gradient of the noise matrix (E,D)", experts, width);
    }

    /// @throws invalid_argument that names the member
    void expects_sane() const
    {
        choice().expects_sane();
        detail::expects_coefficient(importance.coefficient, "importance.coefficient");
        detail::expects_coefficient(load.coefficient, "load.coefficient");
    }

    /// Refuses the state of another gate. @throws invalid_argument that names what does not fit
    template <class Real>
    void expects_state(const noisy_state<Real>& s) const
    {
        choice().expects_state(s.choice);
        const int64_t tokens = s.choice.routing.tokens;
        expects(s.routing.tokens == tokens, "state.routing.tokens", s.routing.tokens, "those of the choice, ", tokens);
        expects_shape(s.losses, "state.losses (4)", 4);
        if (importance.coefficient != 0) expects_shape(s.importance.slopes, "state.importance.slopes (E)", experts);
        if (load.coefficient != 0) expects_shape(s.load.slopes, "state.load.slopes (E)", experts);
        expects_shape(s.raw, "state.raw (T,E)", tokens, experts);
        expects_shape(s.draws, "state.draws (T,E)", tokens, experts);
        expects_shape(s.noisy, "state.noisy (T,E)", tokens, experts);
        expects_shape(s.dnoise, "state.dnoise (T,E)", tokens, experts);
    }

private:
    top_k_gate<> choice() const
    {
        return {.experts = experts, .k = k, .scale = scale, .capacity = capacity, .balance = balance, .z = z};
    }

    template <class T, class Real>
    static gate_input<T> seen(gate_input<T> in, const noisy_state<Real>& state)
    {
        in.logits = state.noisy;
        return in;
    }

    template <class Executor, class T, class Communicator, class Real>
    void take_load(Executor& ex, const gate_input<T>& in, const Communicator& c, const noisy_state<Real>& state,
                   arena& memory) const
    {
        const arena::scope lent(memory);
        const auto blocks = detail::token_blocks::of(state.routing.tokens);
        const auto partial = memory.matrix<Real>(blocks.count, experts);
        const auto totals = memory.vector<double>(experts);
        if (!memory.measuring()) {
            fastmoe::for_each_row(ex, blocks.count,
                                  detail::load_sums<Real>{in.logits, state.raw, state.noisy,
                                                          state.choice.chosen.data_handle(), partial, k, blocks.size},
                                  {.width = 8 * blocks.size * experts});
            detail::sum_blocks(ex, partial, totals);
            detail::finish_cv_squared(ex, totals, load.coefficient, load.variance, c, state.load);
        }
    }
};

} // namespace fastmoe::inline FASTMOE_ABI
