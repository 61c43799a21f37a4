// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A router by direction: tokens and experts are compared on a sphere, and a learned temperature sharpens (Tutel's cosine
/// router; Chi et al. 2022, "On the representation collapse of sparse mixture of experts"). It computes logits of its
/// own; scores, selection, weights, capacity and losses are those of a top_k_gate. First step in the way of a token.
///
///     l = normalize(x P^T + b) . normalize(M) * exp(min(tau, ln 100))      normalize(a) = a / |a|, by row
///
/// A row of x P^T or of M whose norm is below 1e-12 has no direction: it becomes zeros, its logits are 0, and it gets
/// no gradient (Tutel divides such a row by 1e-12, and multiplies its gradient by 1e12). A row whose square is not finite
/// makes its logits NaN: the token is dropped, the expert chosen last with weight 0; neither gets a gradient.
#pragma once

#include <fastmoe/exec/random.hpp>
#include <fastmoe/routing/cosine_rows.hpp>
#include <fastmoe/routing/project.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Whether tokens are projected with a bias, as Tutel does.
enum class projection_bias : std::uint8_t { none, learned };

template <class T>
struct cosine_parameters {
    matrix_view<T> projection;  // (N,D)  P
    vector_view<T> bias;        // (N)    b; without memory: none
    matrix_view<T> embeddings;  // (E,N)  M; Tutel stores its transpose
    vector_view<T> temperature; // (1)    tau, a logarithm

    template <std::same_as<const T> U>
    operator cosine_parameters<U>() const noexcept
    {
        return {projection, bias, embeddings, temperature};
    }
};

/// What a cosine_gate keeps from route to backward.
template <class Real>
struct cosine_state {
    fastmoe::routing<Real> routing;
    vector_view<Real> losses;             // (2)  balance, z: times their coefficients; zero in inference
    top_k_state<Real> choice;             //      of the logits below
    detail::unit_rows<Real> tokens;       // (T,N)
    detail::unit_rows<Real> embeddings;   // (E,N)
    matrix_view<Real> logits;             // (T,E)
    vector_view<Real> sharpness;          // (2)    exp(min(tau, ln 100)), and its slope in tau
    matrix_view<Real> dlogits;            // (T,E)  by backward
    matrix_view<Real> dprojected;         // (T,N)  by backward
};

/// Chooses by cosine. The layer's own router is left out.
///
///     fm::cosine_gate<>{.experts = 64, .k = 2}                                        softmax over the chosen
///     fm::cosine_gate<fm::top_k, fm::raw_scores>{.experts = 64, .k = 1}               probabilities over all
///
/// @tparam Select  which scores are taken: top_k, group_limited
/// @tparam Weigh   what the chosen weigh: renormalize, raw_scores
template <class Select = top_k, class Weigh = renormalize>
struct cosine_gate {
    int64_t experts = 0;            ///< E
    int64_t k = 1;                  ///< K; over 1 to train with renormalize
    int64_t projection_width = 256; ///< N
    projection_bias bias = projection_bias::none;
    double scale = 1;               ///< multiplies every weight
    fastmoe::capacity capacity{};
    balance_loss balance{};
    z_loss z{};
    Select select{};
    Weigh weigh{};

    static constexpr bool reads_logits = false;

    template <class T>
    using parameters = cosine_parameters<T>;

    template <class T>
    parameters<T> reserve_parameters(arena& memory, int64_t width) const
    {
        parameters<T> p;
        p.projection = memory.matrix<T>(projection_width, width);
        if (bias == projection_bias::learned) p.bias = memory.vector<T>(projection_width);
        p.embeddings = memory.matrix<T>(experts, projection_width);
        p.temperature = memory.vector<T>(1);
        return p;
    }

    /// P uniform in +-1/sqrt(D), b zero, M normal with deviation 0.01, tau = ln 2, as in Tutel but for b.
    template <executor Executor, class T>
    void initialize(Executor& ex, const parameters<T>& own, std::uint64_t seed) const
    {
        const auto draw = [&](matrix_view<T> m, std::uint32_t which, detail::first_values values, double reach) {
            fastmoe::for_each(ex, m.extent(0) * m.extent(1),
                              detail::draw_first<T>{m.data_handle(), {seed, which}, values, reach});
        };
        const auto width = static_cast<double>(own.projection.extent(1));
        draw(own.projection, 1, detail::first_values::uniform, width > 0 ? 1 / std::sqrt(width) : 0);
        draw(own.embeddings, 2, detail::first_values::normal, 0.01);
        if (pointer_or_null(own.bias))
            fastmoe::for_each(ex, own.bias.extent(0), detail::fill<T>{own.bias.data_handle(), T(0)});
        fastmoe::for_each(ex, 1, detail::fill<T>{own.temperature.data_handle(), T(accumulate_t<T>(0.6931471805599453))});
    }

    template <class Real>
    cosine_state<Real> reserve(arena& memory, int64_t tokens) const
    {
        expects_sane();
        cosine_state<Real> s;
        s.choice = choice().template reserve<Real>(memory, tokens);
        s.routing = s.choice.routing;
        s.losses = s.choice.losses;
        s.tokens = detail::reserve_unit_rows<Real>(memory, tokens, projection_width);
        s.embeddings = detail::reserve_unit_rows<Real>(memory, experts, projection_width);
        s.logits = memory.matrix<Real>(tokens, experts);
        s.sharpness = memory.vector<Real>(2);
        s.dlogits = memory.matrix<Real>(tokens, experts);
        s.dprojected = memory.matrix<Real>(tokens, projection_width);
        return s;
    }

    /// Fills state.routing, state.losses, and what backward reads.
    /// @throws invalid_argument if the gate's own values or the shapes of input and parameters make no sense, or if
    ///         training would give the router no gradient (K = 1, renormalized); out_of_memory; nothing is written then
    template <executor Executor, class T, class Communicator, class Real>
        requires selects_experts<Select, Real> && weighs_choices<Weigh>
    void route(Executor& ex, const gate_input<T>& in, const parameters<const T>& own, const Communicator& c,
               const cosine_state<Real>& state, arena& scratch) const
    {
        expects_sane();
        const auto& s = state;
        if (!scratch.measuring()) {
            expects_state(s);
            expects_shape(in.x, "x (T,D)", s.routing.tokens, in.x.extent(1));
            expects_parameters(own, in.x.extent(1));
            if (in.mask.extent(0) != 0) expects_shape(in.mask, "mask (T)", s.routing.tokens);
        }
        detail::with_scratch(scratch, [&](arena& memory) {
            const bool live = !memory.measuring();
            project(ex, in.x, own.projection, own.bias, s.tokens.rows, memory);
            if (live) {
                fastmoe::for_each_row(ex, s.routing.tokens, detail::normalize_row<Real, Real>{s.tokens.rows, s.tokens},
                                      hint());
                fastmoe::for_each_row(ex, experts, detail::normalize_row<T, Real>{own.embeddings, s.embeddings}, hint());
                fastmoe::for_each(ex, 1,
                                  detail::sharpen<T, Real>{own.temperature.data_handle(), s.sharpness.data_handle()});
            }
            project(ex, matrix_view<const Real>(s.tokens.rows), matrix_view<const Real>(s.embeddings.rows),
                    vector_view<const Real>(), s.logits, memory);
            if (live)
                fastmoe::for_each_row(
                    ex, s.routing.tokens,
                    detail::sharpen_row<Real>{s.logits, s.tokens, s.embeddings, s.sharpness.data_handle()},
                    {.width = 2 * experts});
            choice().route(ex, seen(in, s), c, s.choice, memory);
        });
    }

    /// The gradient of <dweights, weights> + loss_scale * (sum of losses).
    /// @param dweights  of a dropped choice: not read                       // (T*K)
    /// @param dx        added to                                            // (T,D)
    template <executor Executor, class T, class Communicator, class Real>
    void backward(Executor& ex, const gate_input<T>& in, const parameters<const T>& own, const Communicator& c,
                  const cosine_state<Real>& state, type_identity_t<vector_view<const Real>> dweights,
                  type_identity_t<Real> loss_scale, matrix_view<Real> /* no logits of the layer */,
                  type_identity_t<matrix_view<T>> dx, arena& scratch) const
    {
        expects_sane();
        const auto& s = state;
        if (!scratch.measuring()) {
            expects_state(s);
            expects_parameters(own, in.x.extent(1));
            expects_shape(dx, "dx (T,D)", s.routing.tokens, in.x.extent(1));
        }
        detail::with_scratch(scratch, [&](arena& memory) {
            const bool live = !memory.measuring();
            choice().backward(ex, seen(in, s), c, s.choice, dweights, loss_scale, s.dlogits, memory);
            project_input_backward(ex, s.dlogits, s.embeddings.rows, s.dprojected, write_mode::overwrite, memory);
            if (live)
                fastmoe::for_each_row(ex, s.routing.tokens,
                                      detail::normalize_row_backward<Real, Real>{s.tokens, s.dprojected, s.dprojected,
                                                                                 s.sharpness.data_handle(),
                                                                                 write_mode::overwrite},
                                      hint());
            project_input_backward(ex, s.dprojected, own.projection, dx, write_mode::accumulate, memory);
        });
    }

    /// The gradients of P, b, M and tau, with what backward left.
    /// @param gradients  overwritten or added to
    template <executor Executor, class T, class Real, class G>
    void parameter_gradients(Executor& ex, const gate_input<T>& in, const cosine_state<Real>& state,
                             const parameters<G>& gradients, write_mode mode, arena& scratch) const
    {
        const auto& s = state;
        if (!scratch.measuring()) {
            expects_state(s);
            expects_parameters(gradients, in.x.extent(1));
        }
        detail::with_scratch(scratch, [&](arena& memory) {
            const auto rows = memory.matrix<Real>(experts, projection_width);
            const auto slopes = memory.vector<Real>(s.routing.tokens);
            project_weights_backward(ex, s.dprojected, in.x, gradients.projection, gradients.bias, mode, memory);
            project_weights_backward(ex, s.dlogits, matrix_view<const Real>(s.tokens.rows), rows, {}, write_mode::overwrite,
                                     memory);
            if (memory.measuring()) return;
            fastmoe::for_each_row(ex, experts,
                                  detail::normalize_row_backward<Real, G>{s.embeddings, rows, gradients.embeddings,
                                                                          s.sharpness.data_handle(), mode},
                                  hint());
            fastmoe::for_each_row(ex, s.routing.tokens,
                                  detail::temperature_row<Real>{s.logits, s.dlogits, slopes.data_handle()},
                                  {.width = experts});
            fastmoe::for_each_row(ex, 1,
                                  detail::temperature_sum<Real, G>{slopes, s.sharpness.data_handle(),
                                                                   gradients.temperature.data_handle(), mode},
                                  {.width = s.routing.tokens});
        });
    }

    template <class T, class Role>
    void check_parameters(const parameters<T>& own, int64_t width, Role) const
    {
        expects_parameters(own, width);
    }

    /// @throws invalid_argument that names the member
    void expects_sane() const
    {
        choice().expects_sane();
        expects(projection_width > 0, "projection_width", projection_width, "1 or more");
    }

    /// Refuses the state of another gate. @throws invalid_argument that names what does not fit
    template <class Real>
    void expects_state(const cosine_state<Real>& s) const
    {
        choice().expects_state(s.choice);
        const int64_t tokens = s.choice.routing.tokens, inner = projection_width;
        expects(s.routing.tokens == tokens, "state.routing.tokens", s.routing.tokens, "those of the choice, ", tokens);
        expects_shape(s.tokens.rows, "state.tokens.rows (T,N)", tokens, inner);
        expects_shape(s.tokens.inverse, "state.tokens.inverse (T)", tokens);
        expects_shape(s.embeddings.rows, "state.embeddings.rows (E,N)", experts, inner);
        expects_shape(s.embeddings.inverse, "state.embeddings.inverse (E)", experts);
        expects_shape(s.logits, "state.logits (T,E)", tokens, experts);
        expects_shape(s.sharpness, "state.sharpness (2)", 2);
        expects_shape(s.dlogits, "state.dlogits (T,E)", tokens, experts);
        expects_shape(s.dprojected, "state.dprojected (T,N)", tokens, inner);
    }

private:
    top_k_gate<softmax_score, Select, Weigh> choice() const
    {
        return {.experts = experts, .k = k, .scale = scale, .capacity = capacity, .balance = balance, .z = z,
                .select = select, .weigh = weigh};
    }
    row_hint hint() const { return {.width = 2 * projection_width}; }

    template <class T, class Real>
    static gate_input<T> seen(gate_input<T> in, const cosine_state<Real>& state)
    {
        in.logits = state.logits;
        return in;
    }

    template <class T>
    void expects_parameters(const parameters<T>& p, int64_t width) const
    {
        expects_shape(p.projection, "projection (N,D)", projection_width, width);
        if (bias == projection_bias::learned) expects_shape(p.bias, "projection bias (N)", projection_width);
        else expects(!pointer_or_null(p.bias), "projection bias", "not empty", "none without projection_bias::learned");
        expects_shape(p.embeddings, "embeddings (E,N)", experts, projection_width);
        expects_shape(p.temperature, "temperature (1)", 1);
    }
};

} // namespace fastmoe::inline FASTMOE_ABI
