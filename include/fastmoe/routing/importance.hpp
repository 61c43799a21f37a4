// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Losses on how unevenly a sum falls on the experts, and the one on their importance, the sum of the weights that they
/// get. Beside a gate, forward and backward; the other such loss, on the load, is noisy_gate.hpp's.
///
///     coefficient * cv^2(v)       cv^2 = variance(v) / (mean(v)^2 + 1e-10) over the experts
///     importance                  v_e = sum of the weights of the choices that went to e          (Shazeer 2017, eq. 6, 7)
///
/// Sums are over all ranks' tokens, through the communicator: cv^2 is of the joined batch, and so is its gradient.
#pragma once

#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/exec/memory.hpp>
#include <fastmoe/ops/rows.hpp>
#include <fastmoe/routing/block_sums.hpp>
#include <fastmoe/routing/routing.hpp>
#include <fastmoe/routing/score.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Divisor of the squares: E, as Shazeer's own code has it, or E - 1, as FastMoE's code and other code on torch's var()
/// has it. A single expert has a variance of 0 either way.
enum class variance : std::uint8_t { population, sample };

/// The loss on the importance of experts.
struct importance_loss {
    double coefficient = 0;
    fastmoe::variance variance = fastmoe::variance::population;
};

/// What a loss on cv^2 leaves for its backward.
template <class Real>
struct evenness {
    vector_view<Real> loss;   // (1)  times its coefficient
    vector_view<Real> slopes; // (E)  d loss / d v_e
};

template <class Real>
evenness<Real> reserve_evenness(arena& memory, int64_t experts)
{
    return {memory.vector<Real>(1), memory.vector<Real>(experts)};
}

namespace verbs {
struct importance_loss;
}

namespace detail {

inline void expects_coefficient(double coefficient, const char* name)
{
    expects(coefficient >= 0 && coefficient < std::numeric_limits<double>::infinity(), name, coefficient,
            "a finite number from 0 on");
}

/// coefficient * cv^2 of n sums, and its slopes.
template <class Real>
struct cv_squared {
    const double* sums; // (E)
    evenness<Real> out;
    int64_t n;
    double coefficient;
    variance of;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const double* v = sums;
        Real* slopes = out.slopes.data_handle();
        const double mean = team.reduce(n, 0.0, adds{}, [=](int64_t e) { return v[e]; }) / static_cast<double>(n);
        const double squares =
            team.reduce(n, 0.0, adds{}, [=](int64_t e) { return (v[e] - mean) * (v[e] - mean); });
        const auto divisor = static_cast<double>(of == variance::sample && n > 1 ? n - 1 : n);
        const double below = mean * mean + 1e-10, cv = squares / divisor / below;
        // The mean's own slope is in the divisor alone: in the variance it cancels.
        const double own = coefficient * 2 / (divisor * below);
        const double shared = coefficient * cv * 2 * mean / (static_cast<double>(n) * below);
        team.for_each(n, [=](int64_t e) { slopes[e] = static_cast<Real>(own * (v[e] - mean) - shared); });
        if (team.lane() == 0) out.loss(0) = static_cast<Real>(coefficient * cv);
    }
};

/// Sums over ranks, then the loss.
/// @param totals  this rank's sums; overwritten by all ranks'                                    // (E)
template <class Executor, class Real, class Communicator>
void finish_cv_squared(Executor& ex, vector_view<double> totals, double coefficient, variance of, const Communicator& c,
                       const evenness<Real>& out)
{
    c.all_reduce(ex, totals);
    fastmoe::for_each_row(ex, 1, cv_squared<Real>{totals.data_handle(), out, totals.extent(0), coefficient, of},
                          {.width = 4 * totals.extent(0)});
}

/// Sums of the weights of a block of choices.
template <class Real>
struct importance_sums {
    const int32_t* experts; // (C)
    const Real* weights;    // (C)
    matrix_view<Real> sums; // (blocks,E)
    int64_t choices, block_size;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t b) const
    {
        Real* to = sums.data_handle() + b * sums.extent(1);
        team.for_each(sums.extent(1), [to](int64_t e) { to[e] = Real(0); });
        team.sync();
        if (team.lane() != 0) return;
        const int64_t end = (b + 1) * block_size < choices ? (b + 1) * block_size : choices;
        for (int64_t i = b * block_size; i < end; ++i)
            if (experts[i] >= 0) to[experts[i]] += weights[i];
    }
};

/// dweights += scale * slopes of the expert.
template <class Real>
struct add_importance_slopes {
    const int32_t* experts; // (C)
    const Real* slopes;     // (E)
    Real* dweights;         // (C)
    Real scale;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        if (experts[i] >= 0) dweights[i] += scale * slopes[experts[i]];
    }
};

} // namespace detail

template <class Executor>
struct implementation<verbs::importance_loss, Executor> {
    template <class Real, class Communicator>
    static void run(Executor& ex, const routing<Real>& route, importance_loss loss, const Communicator& c,
                    const evenness<Real>& out, arena& scratch)
    {
        const auto blocks = detail::token_blocks::of(route.choices());
        const auto partial = scratch.matrix<Real>(blocks.count, route.total_experts);
        const auto totals = scratch.vector<double>(route.total_experts);
        if (scratch.measuring()) return;
        fastmoe::for_each_row(ex, blocks.count,
                              detail::importance_sums<Real>{route.experts.data_handle(), route.weights.data_handle(),
                                                            partial, route.choices(), blocks.size},
                              {.width = blocks.size + route.total_experts});
        detail::sum_blocks(ex, partial, totals);
        detail::finish_cv_squared(ex, totals, loss.coefficient, loss.variance, c, out);
    }
};

/// The loss on the importance of experts, for any routing: fixed or ragged; -1 adds nothing.
/// @param route    ids in [-1, E); before capacity, if what is dropped there is to count
/// @param c        sums over the ranks
/// @param out      overwritten
/// @param scratch  taken and given back; on a measuring arena only counted
/// @throws invalid_argument if shapes disagree or the coefficient is not a finite number from 0 on, out_of_memory
template <executor Executor, class Real, class Communicator>
void importance_loss_forward(Executor& ex, const routing<Real>& route, importance_loss loss, const Communicator& c,
                             const evenness<Real>& out, arena& scratch)
{
    detail::expects_coefficient(loss.coefficient, "importance.coefficient");
    expects(route.total_experts > 0, "routing.total_experts", route.total_experts, "1 or more");
    const arena::scope lent(scratch);
    if (!scratch.measuring()) {
        detail::expects_routing(route);
        expects_shape(out.loss, "loss (1)", 1);
        expects_shape(out.slopes, "slopes (E)", route.total_experts);
        arena needed;
        implementation<verbs::importance_loss, Executor>::run(ex, route, loss, c, out, needed);
        scratch.require(needed.bytes());
    }
    implementation<verbs::importance_loss, Executor>::run(ex, route, loss, c, out, scratch);
}

/// dweights += loss_scale * the loss's gradient.
/// @param experts   of the routing that forward saw                                             // (C)
/// @param slopes    what forward left                                                           // (E)
/// @param dweights  added to; left alone where the expert is -1                                  // (C)
/// @throws invalid_argument if shapes disagree
template <executor Executor, class Real>
void importance_loss_backward(Executor& ex, type_identity_t<vector_view<const int32_t>> experts,
                              type_identity_t<vector_view<const Real>> slopes, type_identity_t<Real> loss_scale,
                              vector_view<Real> dweights)
{
    expects_shape(experts, "experts (C)", dweights.extent(0));
    expects_shape(slopes, "slopes (E)", slopes.extent(0));
    expects_shape(dweights, "dweights (C)", dweights.extent(0));
    fastmoe::for_each(ex, dweights.extent(0),
                      detail::add_importance_slopes<Real>{experts.data_handle(), slopes.data_handle(),
                                                          dweights.data_handle(), loss_scale});
}

} // namespace fastmoe::inline FASTMOE_ABI
