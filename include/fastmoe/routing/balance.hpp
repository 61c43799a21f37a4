// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The losses of a router: what keeps experts evenly used and logits small. Forward and backward; the gradient is added.
///
///     balance   coefficient * E * sum_e f_e P_e      f_e = c_e / (K T), P_e = mean_t p_te        (Fedus 2021, eq. 4-6)
///     z         coefficient * mean_t (log sum_e exp l_te)^2                                      (ST-MoE, eq. 5)
///
/// p_te = value(e) / (sum of values): the softmax, or s / sum s for other scores. c counts choices before any is dropped
/// for capacity, and has no gradient: it flows through P only. T, c and the means are over all ranks' tokens, summed
/// through the communicator, so that the sum of the ranks' gradients is the gradient of the joined batch. Tokens that
/// the mask takes out count nowhere; tokens without a finite or +Inf logit count in T and add 0. A row with +Inf adds
/// nothing to z.
#pragma once

#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/routing/gate.hpp>
#include <fastmoe/routing/score.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// The loss of Switch and GShard; 1 times the coefficient where experts are used evenly.
struct balance_loss {
    double coefficient = 0;
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

namespace verbs {
struct router_losses;
struct router_losses_backward;
} // namespace verbs

namespace detail {

/// Blocks of tokens whose sums are taken on their own: cut by the shape alone.
struct token_blocks {
    int64_t size, count;

    static constexpr token_blocks of(int64_t tokens) noexcept
    {
        const int64_t size = tokens / 512 > 64 ? (tokens + 511) / 512 : 64;
        return {size, (tokens + size - 1) / size};
    }
};

/// Writes row.value(e) for every e; returns one over their sum.
template <class Team, class Row, class Real>
FASTMOE_HOST_DEVICE Real write_values(Team& team, const Row& row, int64_t experts, Real* values)
{
    team.for_each(experts, [values, row](int64_t e) { values[e] = row.value(e); });
    team.sync();
    return Real(1) / team.reduce(experts, Real(0), add{}, [values](int64_t e) { return values[e]; });
}

/// log sum exp of a row of logits, or 0 where it is not finite. `values` is left with the softmax times the sum.
template <class Team, class Row, class Real>
FASTMOE_HOST_DEVICE Real log_sum_exp(const Row& row, Real inverse_sum, Team&)
{
    return math::is_finite(row.peak) ? row.peak - math::log(inverse_sum) : Real(0);
}

/// Partial sums of a block of tokens: p by expert, choices by expert, the squares for z, and the tokens that count.
template <class Real, class Score>
struct router_sums {
    using vectorized = void;
    matrix_view<const Real> logits; // (T,E)
    const std::uint8_t* mask;       // (T), or null
    const int32_t* chosen;          // (T,K)
    Real* partial;                  // (blocks,2E+2)
    Score score;
    int64_t tokens, k, block_size;
    bool with_z;

    static constexpr int64_t scratch_bytes(int64_t experts) noexcept
    {
        return 3 * experts * static_cast<int64_t>(sizeof(Real)) + 256;
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
            for (int64_t c = t * k; c < (t + 1) * k; ++c)
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
        const Real inverse = write_values(team, row, experts, values);
        team.for_each(experts, [=](int64_t e) { sum[e] += values[e] * inverse; });
        team.sync();
        if (!with_z) return Real(0);
        const auto soft = softmax_score{}.row(team, l, experts);
        const Real z = log_sum_exp(soft, Real(1) / sum_of_values(team, soft, experts), team);
        return z * z;
    }
};

/// Adds the blocks' partial sums, in order and in double.
template <class Real>
struct router_totals {
    using vectorized = void;
    const Real* partial; // (blocks,2E+2)
    double* totals;      // (2E+2)
    int64_t blocks, width;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t part) const
    {
        const int64_t begin = part * 64, n = width - begin < 64 ? width - begin : 64;
        const Real* from = partial + begin;
        double* to = totals + begin;
        const int64_t stride = width;
        team.for_each(n, [=](int64_t i) { to[i] = 0; });
        for (int64_t b = 0; b < blocks; ++b, from += stride)
            team.for_each(n, [=](int64_t i) { to[i] += static_cast<double>(from[i]); });
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
        const double each = tokens > 0 ? balance * static_cast<double>(n) / (static_cast<double>(k) * tokens * tokens) : 0;
        Real* slopes = out.slopes.data_handle();
        team.for_each(n, [=](int64_t e) { slopes[e] = static_cast<Real>(each * sums[e]); });
        const double loss = team.reduce(n, 0.0, add{}, [=](int64_t e) { return each * sums[e] * sums[n + e]; });
        if (team.lane() != 0) return;
        slopes[n] = static_cast<Real>(tokens > 0 ? 2 * z / tokens : 0);
        out.losses(0) = static_cast<Real>(loss);
        out.losses(1) = static_cast<Real>(tokens > 0 ? z * totals[2 * n] / tokens : 0);
    }
};

/// With s = slopes: dl_e += slope(e) (s_e - <s, p>) / (sum of values) + z_slope lse softmax(l)_e, all times loss_scale.
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
        if (with_balance) add_balance(team, score.row(team, l, experts), values, out);
        if (with_z) add_z(team, softmax_score{}.row(team, l, experts), values, out);
    }

    template <class Team, class Row>
    FASTMOE_HOST_DEVICE void add_balance(Team& team, const Row& row, Real* values, Real* out) const
    {
        if (row.empty()) return;
        const int64_t experts = logits.extent(1);
        const Real* s = slopes;
        const Real inverse = write_values(team, row, experts, values);
        const Real mean =
            inverse * team.reduce(experts, Real(0), add{}, [=](int64_t e) { return s[e] * values[e]; });
        const Real factor = scale * inverse;
        if constexpr (Row::sums_to_one) // value is its own slope
            team.for_each(experts, [=](int64_t e) { out[e] += factor * values[e] * (s[e] - mean); });
        else
            team.for_each(experts, [=](int64_t e) { out[e] += factor * row.slope(e) * (s[e] - mean); });
        team.sync();
    }

    template <class Team, class Row>
    FASTMOE_HOST_DEVICE void add_z(Team& team, const Row& row, Real* values, Real* out) const
    {
        if (!math::is_finite(row.peak)) return;
        const int64_t experts = logits.extent(1);
        const Real inverse = write_values(team, row, experts, values);
        const Real factor = scale * slopes[experts] * log_sum_exp(row, inverse, team) * inverse;
        team.for_each(experts, [=](int64_t e) { out[e] += factor * values[e]; });
    }
};

} // namespace detail
