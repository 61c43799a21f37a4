// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The losses of a router: what keeps experts evenly used and logits small. Forward, and backward, which adds.
///
///     balance   coefficient * E * sum_e f_e P_e      f_e = c_e / (K T), P_e = mean_t p_te        (Fedus 2021, eq. 4-6)
///     z         coefficient * mean_t (log sum_e exp l_te)^2                                      (ST-MoE, eq. 5)
///
/// p_te = value(e) / (sum of values): the softmax, or s / sum s for other scores. c counts choices before any is
/// dropped for capacity, and has no gradient: it flows through P only. T, c and the means are over all ranks' tokens,
/// summed through the communicator, so that the sum of the ranks' gradients is the gradient of the joined batch. Tokens
/// that the mask takes out count nowhere; those without a finite or +Inf logit count in T and add 0. A row with +Inf
/// adds nothing to z.
#pragma once

#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/routing/block_sums.hpp>
#include <fastmoe/routing/gate.hpp>
#include <fastmoe/routing/score.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// What c counts: all K choices of a token, so that f_e = c_e / (K T), or its first alone, f_e = c_e / T (GShard,
/// Lepikhin et al. 2020, algorithm 1).
enum class counted_choices : std::uint8_t { all, first };

/// The loss of Switch and GShard; 1 times the coefficient where experts are used evenly.
struct balance_loss {
    double coefficient = 0;
    counted_choices counts = counted_choices::all;
};

/// The router z-loss.
struct z_loss {
    double coefficient = 0;
};

/// What the losses leave for their backward.
template <class Real>
struct router_losses {
    vector_view<Real> losses; // (2)    balance, z: times their coefficients
    vector_view<Real> slopes; // (E+1)  d balance / d p_te, the same for every token; then 2 coefficient / T of z
};

template <class Real>
router_losses<Real> reserve_router_losses(arena& memory, int64_t experts)
{
    return {memory.vector<Real>(2), memory.vector<Real>(experts + 1)};
}

/// The part of a gate's input that losses read.
template <class Real>
struct gate_logits {
    matrix_view<const Real> logits;       // (T,E)
    vector_view<const std::uint8_t> mask; // (T), or empty

    void expects_sane() const
    {
        expects_shape(logits, "logits (T,E)", logits.extent(0), logits.extent(1));
        if (mask.extent(0) != 0) expects_shape(mask, "mask (T)", logits.extent(0));
    }
};

namespace verbs {
struct router_losses;
struct router_losses_backward;
} // namespace verbs

namespace detail {

/// Writes every expert's value; returns their sum.
template <class Team, class Row, class Real>
FASTMOE_HOST_DEVICE Real write_values(Team& team, const Row& row, const Real* logits, int64_t experts, Real* values)
{
    team.for_each(experts, [=](int64_t e) { values[e] = row.value(logits[e]); });
    team.sync();
    return team.reduce(experts, Real(0), adds{}, [values](int64_t e) { return values[e]; });
}

inline void expects_coefficients(const balance_loss& balance, const z_loss& z)
{
    const auto sound = [](double c) { return c >= 0 && c < std::numeric_limits<double>::infinity(); };
    expects(sound(balance.coefficient), "balance.coefficient", balance.coefficient, "a finite number from 0 on");
    expects(sound(z.coefficient), "z.coefficient", z.coefficient, "a finite number from 0 on");
}

/// Rows of a softmax, whose values serve both losses.
template <class Row>
concept has_log_sum_exp = requires(const Row& row) { row.log_sum_exp(row.peak); };

/// Partial sums of a block of tokens: p by expert, choices by expert, the squares for z, and the tokens that count.
template <class Real, class Score>
struct router_sums {
    using vectorized = void;
    matrix_view<const Real> logits; // (T,E)
    const std::uint8_t* mask;       // (T), or null
    const int32_t* chosen;          // (T,K)
    Real* partial;                  // (blocks,2E+2)
    Score score;
    int64_t tokens, k, each, block_size; ///< of the K choices of a token, `each` are counted
    bool with_z;

    static constexpr int64_t scratch_bytes(int64_t experts) noexcept
    {
        return experts * static_cast<int64_t>(2 * sizeof(Real) + sizeof(int32_t)) + 256;
    }

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t b) const
    {
        const int64_t experts = logits.extent(1);
        Real* values = team.template scratch<Real>(experts);
        Real* sum = team.template scratch<Real>(experts);
        int32_t* count = team.template scratch<int32_t>(experts);
        team.for_each(experts, [=](int64_t e) { sum[e] = Real(0); });
        team.for_each(experts, [=](int64_t e) { count[e] = 0; });
        team.sync();
        const int64_t end = (b + 1) * block_size < tokens ? (b + 1) * block_size : tokens;
        Real squares = 0;
        int32_t counted = 0;
        for (int64_t t = b * block_size; t < end; ++t) {
            if (mask && mask[t] == 0) continue;
            ++counted;
            squares += add_token(team, t, values, sum);
            if (team.lane() != 0) continue;
            for (int64_t c = t * k; c < t * k + each; ++c)
                if (chosen[c] >= 0) ++count[chosen[c]];
        }
        team.sync();
        Real* out = partial + b * (2 * experts + 2);
        team.for_each(experts, [=](int64_t e) { out[e] = static_cast<Real>(count[e]); });
        team.for_each(experts, [=](int64_t e) { out[experts + e] = sum[e]; });
        if (team.lane() == 0) {
            out[2 * experts] = squares;
            out[2 * experts + 1] = static_cast<Real>(counted);
        }
    }

    /// Adds the token's p to sum; returns its square for z.
    template <class Team>
    FASTMOE_HOST_DEVICE Real add_token(Team& team, int64_t t, Real* values, Real* sum) const
    {
        const int64_t experts = logits.extent(1);
        const Real* l = logits.data_handle() + t * experts;
        const auto row = score.row(team, l, experts);
        if (row.empty()) return Real(0);
        const Real total = write_values(team, row, l, experts, values), inverse = Real(1) / total;
        team.for_each(experts, [=](int64_t e) { sum[e] += values[e] * inverse; });
        team.sync();
        if (!with_z) return Real(0);
        Real z;
        if constexpr (has_log_sum_exp<decltype(row)>) {
            z = row.log_sum_exp(total);
        } else {
            const auto soft = softmax_score{}.row(team, l, experts);
            z = soft.log_sum_exp(sum_of_values(team, soft, l, experts));
        }
        return z * z;
    }
};

template <class Real>
struct router_loss_values {
    const double* totals; // (2E+2)
    router_losses<Real> out;
    int64_t experts, k;
    double balance, z;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const int64_t n = experts;
        const double* sums = totals;
        const double tokens = totals[2 * n + 1];
        // d balance / d p_te = coefficient * E * f_e / T
        const double choices = static_cast<double>(k) * tokens;
        const double each = choices > 0 ? balance * static_cast<double>(n) / (choices * tokens) : 0;
        Real* slopes = out.slopes.data_handle();
        team.for_each(n, [=](int64_t e) { slopes[e] = static_cast<Real>(each * sums[e]); });
        const double loss = team.reduce(n, 0.0, adds{}, [=](int64_t e) { return each * sums[e] * sums[n + e]; });
        if (team.lane() != 0) return;
        slopes[n] = static_cast<Real>(tokens > 0 ? 2 * z / tokens : 0);
        out.losses(0) = static_cast<Real>(loss);
        out.losses(1) = static_cast<Real>(tokens > 0 ? z * totals[2 * n] / tokens : 0);
    }
};

/// With s = slopes: dl_e += row.slope (s_e - <s, p>) / (sum of values) + s_E lse softmax(l)_e, all times loss_scale.
template <class Real, class Score>
struct router_loss_gradient {
    using vectorized = void;
    matrix_view<const Real> logits; // (T,E)
    const std::uint8_t* mask;       // (T), or null
    const Real* slopes;             // (E+1)
    Real* dlogits;                  // (T,E)
    Score score;
    Real scale;
    bool with_balance, with_z;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        if (mask && mask[t] == 0) return;
        const int64_t experts = logits.extent(1);
        const Real* l = logits.data_handle() + t * experts;
        Real* values = team.template scratch<Real>(experts);
        Real* out = dlogits + t * experts;
        const auto row = score.row(team, l, experts);
        if constexpr (has_log_sum_exp<decltype(row)>) {
            add(team, row, l, values, out, with_balance, with_z);
        } else {
            if (with_balance) add(team, row, l, values, out, true, false);
            if (with_z) add(team, softmax_score{}.row(team, l, experts), l, values, out, false, true);
        }
    }

    template <class Team, class Row>
    FASTMOE_HOST_DEVICE void add(Team& team, const Row& row, const Real* l, Real* values, Real* out, bool balance,
                                 bool z) const
    {
        if (row.empty()) return;
        const int64_t experts = logits.extent(1);
        const Real* s = slopes;
        const Real total = write_values(team, row, l, experts, values), factor = scale / total;
        if (balance) {
            const Real dot = team.reduce(experts, Real(0), adds{}, [=](int64_t e) { return s[e] * values[e]; });
            const Real mean = dot / total;
            team.for_each(experts, [=](int64_t e) { out[e] += factor * row.slope(l[e], values[e]) * (s[e] - mean); });
        }
        if constexpr (has_log_sum_exp<Row>) {
            const Real zeta = z ? factor * s[experts] * row.log_sum_exp(total) : Real(0);
            if (z) team.for_each(experts, [=](int64_t e) { out[e] += zeta * values[e]; });
        }
        team.sync(); // before the values are written again
    }
};

} // namespace detail

template <class Executor>
struct implementation<verbs::router_losses, Executor> {
    template <class Real, class Score, class Communicator>
    static void run(Executor& ex, const Score& score, const gate_logits<Real>& in, vector_view<const int32_t> chosen,
                    int64_t k, balance_loss balance, z_loss z, const Communicator& communicator,
                    const router_losses<Real>& out, arena& scratch)
    {
        const int64_t tokens = in.logits.extent(0), experts = in.logits.extent(1), width = 2 * experts + 2;
        const int64_t counted = balance.counts == counted_choices::first && k > 0 ? 1 : k;
        const auto blocks = detail::token_blocks::of(tokens);
        const auto partial = scratch.matrix<Real>(blocks.count, width);
        const auto totals = scratch.vector<double>(width);
        if (scratch.measuring()) return;
        using sums = detail::router_sums<Real, Score>;
        for_each_row(ex, blocks.count,
                     sums{in.logits, in.mask.data_handle(), chosen.data_handle(), partial.data_handle(), score, tokens,
                          k, counted, blocks.size, z.coefficient != 0},
                     {.width = blocks.size * experts, .scratch_bytes = sums::scratch_bytes(experts)});
        detail::sum_blocks(ex, partial, totals);
        communicator.all_reduce(ex, totals);
        for_each_row(ex, 1,
                     detail::router_loss_values<Real>{totals.data_handle(), out, experts, counted,
                                                      balance.coefficient, z.coefficient},
                     {.width = experts});
    }
};

template <class Executor>
struct implementation<verbs::router_losses_backward, Executor> {
    template <class Real, class Score>
    static void run(Executor& ex, const Score& score, const gate_logits<Real>& in, balance_loss balance, z_loss z,
                    vector_view<const Real> slopes, Real loss_scale, matrix_view<Real> dlogits)
    {
        const int64_t experts = in.logits.extent(1);
        for_each_row(ex, in.logits.extent(0),
                     detail::router_loss_gradient<Real, Score>{in.logits, in.mask.data_handle(), slopes.data_handle(),
                                                               dlogits.data_handle(), score, loss_scale,
                                                               balance.coefficient != 0, z.coefficient != 0},
                     {.width = 8 * experts, .scratch_bytes = experts * static_cast<int64_t>(sizeof(Real)) + 64});
    }
};

/// Both losses of the router, and what their backward needs.
/// @param chosen  the choices before any is dropped for capacity; -1 counts for none; k may be 0   // (T*K)
/// @param c       sums over the ranks
/// @param out     overwritten: losses (2) and slopes (E+1), from reserve_router_losses
/// @param scratch taken and given back; on a measuring arena only counted
/// @throws invalid_argument if shapes disagree or a coefficient is not a finite number from 0 on, out_of_memory
template <executor Executor, class Real, class Score, class Communicator>
void router_losses_forward(Executor& ex, const Score& score, const gate_logits<Real>& in,
                           type_identity_t<vector_view<const int32_t>> chosen, int64_t k, balance_loss balance,
                           z_loss z, const Communicator& c, const router_losses<Real>& out, arena& scratch)
{
    detail::expects_coefficients(balance, z);
    expects(k >= 0, "k", k, "zero or more");
    if (!scratch.measuring()) {
        in.expects_sane();
        expects_shape(chosen, "chosen (T*K)", in.logits.extent(0) * k);
        expects_shape(out.losses, "losses (2)", 2);
        expects_shape(out.slopes, "slopes (E+1)", in.logits.extent(1) + 1);
    }
    const int64_t mark = scratch.used();
    implementation<verbs::router_losses, Executor>::run(ex, score, in, chosen, k, balance, z, c, out, scratch);
    scratch.rewind(mark);
}

/// dlogits += loss_scale * the gradient of both losses.
/// @param slopes   what router_losses_forward left                                            // (E+1)
/// @param dlogits  added to                                                                   // (T,E)
/// @throws invalid_argument if shapes disagree
template <executor Executor, class Real, class Score>
void router_losses_backward(Executor& ex, const Score& score, const type_identity_t<gate_logits<Real>>& in,
                            balance_loss balance, z_loss z, type_identity_t<vector_view<const Real>> slopes,
                            type_identity_t<Real> loss_scale, matrix_view<Real> dlogits)
{
    detail::expects_coefficients(balance, z);
    in.expects_sane();
    expects_shape(slopes, "slopes (E+1)", in.logits.extent(1) + 1);
    expects_shape(dlogits, "dlogits (T,E)", in.logits.extent(0), in.logits.extent(1));
    if (balance.coefficient == 0 && z.coefficient == 0) return;
    implementation<verbs::router_losses_backward, Executor>::run(ex, score, in, balance, z, slopes, loss_scale, dlogits);
}

} // namespace fastmoe::inline FASTMOE_ABI
