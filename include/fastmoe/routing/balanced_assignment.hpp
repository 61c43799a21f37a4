// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// BASE: the assignment of tokens to experts that has the greatest sum of logits among those in which every expert gets
/// as many tokens as any other.
#pragma once

#include <fastmoe/routing/assigned_gate.hpp>
#include <fastmoe/routing/assignment_solver.hpp>
#include <fastmoe/routing/biased_score.hpp>
#include <fastmoe/routing/choose.hpp>
#include <fastmoe/routing/columns.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

/// Logits as costs: how far below the greatest of its row, in units of a power of two that gives the furthest 40 bits.
template <class Real>
struct logit_costs {
    static constexpr int bits = 40;
    static constexpr double reach = 65536; // what is further counts as -Inf, so that it cannot coarsen the unit
    matrix_view<const Real> logits; // (T,E)
    const Real* peaks;              // (T)  greatest logit
    const double* scale;            // (1)  units in 1

    FASTMOE_HOST_DEVICE int64_t operator()(int64_t t, int64_t e) const
    {
        if (t >= logits.extent(0)) return 0; // a filler
        // More than E moves can gain together, so that as few tokens as can be get such an expert.
        const int64_t beyond = (logits.extent(1) + 1) << bits;
        const Real l = logits(t, e), peak = peaks[t];
        const double distance = static_cast<double>(peak) - static_cast<double>(l);
        if (l == peak) return 0;
        if (l != l) return beyond + 2;
        if (l == -infinity<Real>) return beyond + 1;
        if (distance < 0) return 0; // the token takes no part
        return distance <= reach ? static_cast<int64_t>(distance * *scale + 0.5) : beyond;
    }
};

/// Whether a token takes part, its greatest logit, and how far the row reaches down from it.
template <class Real>
struct measure_row {
    using vectorized = void;
    matrix_view<const Real> logits; // (T,E)
    const std::uint8_t* mask;       // (T), or null
    int32_t* experts;               // (T+E)  0 or -1
    Real* peaks;                    // (T)
    double* reaches;                // (T)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const int64_t all = logits.extent(1);
        const Real* l = logits.data_handle() + t * all;
        const Real peak = mask && mask[t] == 0 ? -infinity<Real> : greatest(team, l, all);
        const double reach = team.reduce(all, 0.0, greater_of{}, [=](int64_t e) {
            const double distance = static_cast<double>(peak) - static_cast<double>(l[e]); // NaN loses
            return distance <= logit_costs<Real>::reach ? distance : 0.0;
        });
        if (team.lane() != 0) return;
        experts[t] = peak > -infinity<Real> ? 0 : -1;
        peaks[t] = peak;
        reaches[t] = reach;
    }
};

/// The power of two that puts the furthest distance just below 2^bits; and as many fillers, to which all experts are alike,
/// as make the number of tokens one that E divides.
template <class Real>
struct measure_batch {
    const double* reaches; // (T)
    double* scale;         // (1)
    int32_t* experts;      // (T+E)
    int64_t tokens, total;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const double* from = reaches;
        int32_t *start = experts, *fillers = experts + tokens;
        const double furthest = team.reduce(tokens, 0.0, greater_of{}, [from](int64_t t) { return from[t]; });
        const int64_t open =
            team.reduce(tokens, int64_t{0}, adds{}, [start](int64_t t) { return static_cast<int64_t>(start[t] >= 0); });
        const int64_t missing = (open + total - 1) / total * total - open;
        team.for_each(total, [fillers, missing](int64_t i) { fillers[i] = i < missing ? 0 : -1; });
        if (team.lane() != 0) return;
        const auto exponent = static_cast<int>(::cuda::std::bit_cast<std::uint64_t>(furthest) >> 52) - 1023;
        int power = logit_costs<Real>::bits - 1 - exponent;
        power = power > 1000 ? 1000 : power;
        *scale = ::cuda::std::bit_cast<double>(static_cast<std::uint64_t>(power + 1023) << 52);
    }
};

/// A first price for every expert, which does away with what all tokens think of it: minus its mean cost.
struct price_experts {
    using vectorized = void;
    matrix_view<const int64_t> costs; // (E,T+E)
    const int32_t* experts;           // (T+E)
    int64_t* prices;                  // (E)
    int64_t tokens, most;             // most: that one cost counts

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t e) const
    {
        constexpr int coarse = 12; // bits that are left out, so that no sum overflows
        const int64_t n = tokens, bound = most;
        const int64_t* cost = costs.data_handle() + e * costs.extent(1);
        const int32_t* here = experts;
        const int64_t sum = team.reduce(n, int64_t{0}, adds{}, [=](int64_t t) {
            const int64_t own = (cost[t] < bound ? cost[t] : bound) >> coarse;
            return own * (here[t] >= 0);
        });
        const int64_t count =
            team.reduce(n, int64_t{0}, adds{}, [here](int64_t t) { return static_cast<int64_t>(here[t] >= 0); });
        if (team.lane() == 0) prices[e] = count > 0 ? -(sum / count << coarse) : 0;
    }
};

/// Fillers go where the price is least. Prices below the n-th least of n fillers are raised to it, so that the fillers find
/// n experts at that price, and crowd none.
struct place_fillers {
    int64_t* prices;  // (E)
    int32_t* fillers; // (E)  0 or -1
    int64_t total;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        int64_t* price = prices;
        int32_t* to = fillers;
        const int64_t n =
            team.reduce(total, int64_t{0}, adds{}, [to](int64_t i) { return static_cast<int64_t>(to[i] >= 0); });
        if (n == 0) return;
        const int64_t least = kth_greatest(team, price, total, total - n + 1);
        team.sync();
        team.for_each(total, [price, least](int64_t e) { price[e] = price[e] < least ? least : price[e]; });
        team.sync();
        team.scan(
            total, int64_t{0}, adds{}, [=](int64_t e) { return static_cast<int64_t>(price[e] == least); },
            [=](int64_t e, int64_t before) {
                if (price[e] == least && before < n) to[before] = static_cast<int32_t>(e);
            });
    }
};

/// Sends every token where cost and price are least, a block of tokens at a time.
struct take_cheapest {
    using vectorized = void;
    matrix_view<const int64_t> costs; // (E,T+E)
    const int64_t* prices;            // (E)
    int32_t* experts;                 // (T)
    int64_t tokens;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t b) const
    {
        constexpr int64_t width = 16;
        const int64_t n = costs.extent(1), all = costs.extent(0), begin = b * column_block;
        const int64_t end = begin + column_block < tokens ? begin + column_block : tokens;
        const int64_t* from = costs.data_handle();
        const int64_t* price = prices;
        int32_t* to = experts;
        team.for_each((end - begin + width - 1) / width, [=](int64_t piece) {
            const int64_t first = begin + piece * width, here = end - first < width ? end - first : width;
            int64_t least[width], best[width];
            for (int64_t j = 0; j < width; ++j) least[j] = unreachable;
            for (int64_t j = 0; j < width; ++j) best[j] = 0;
            for (int64_t e = 0; e < all; ++e) {
                const int64_t* cost = from + e * n + first;
                for (int64_t j = 0; j < here; ++j) {
                    const int64_t sum = cost[j] + price[e], before = least[j], was = best[j];
                    least[j] = sum < before ? sum : before;
                    best[j] = sum < before ? e : was;
                }
            }
            for (int64_t j = 0; j < here; ++j)
                if (to[first + j] >= 0) to[first + j] = static_cast<int32_t>(best[j]);
        });
    }
};

} // namespace detail

/// In training, of all assignments of one expert to every token that give no expert more than ceil(N / E) of the N tokens
/// that take part, one with the greatest sum of logits (Lewis et al. 2021, eq. 2, where E divides N). In inference the
/// greatest logit of each token, as there. K is 1. No gradient flows through the assignment.
///
/// Sums are compared exactly, in integers: a logit counts by its distance from the greatest of its row, rounded to D / 2^39
/// or finer, D the furthest distance in the batch. So the sum is less than the greatest by at most N D / 2^39; float logits
/// are mostly not rounded at all. Tokens, experts and logits alone decide, not the executor; ties are broken somehow, but
/// always alike.
///
/// A masked token, and one without a finite or +Inf logit, gets no expert and counts in no bound. As few tokens as can be
/// get an expert whose logit is -Inf, NaN, finite beside a +Inf, or more than 2^16 below the greatest of its row; where one
/// must, in the order of choice.
///
/// Every token starts where its logit, less the expert's mean, is greatest; time grows with those that must move from there,
/// at most N + E. Memory is 8 (T + E) E + 12 E^2 bytes and a little. One team solves it: see assignment_solver.hpp.
struct balanced_assignment {
    static constexpr bool reads_logits = true;
    static constexpr bool ragged = false;

    /// @throws invalid_argument if K is not 1, or there are more than 2^18 experts
    void validate(int64_t experts, int64_t k) const
    {
        expects(k == 1, "k", k, "1 for a balanced assignment");
        expects(experts <= int64_t{1} << 18, "experts", experts, "at most 2^18 for a balanced assignment");
    }

    template <class Executor, class T, class Communicator, class Real>
    void assign(Executor& ex, const gate_input<T>& in, const Communicator&, const assignment<Real>& to, arena& scratch) const
    {
        const int64_t tokens = to.tokens, experts = to.total_experts;
        if (in.mode == gate_mode::inference) {
            if (!scratch.measuring()) detail::choose_rows(ex, in.logits, in.mask, 1, detail::logit_rows{}, to.experts);
            return;
        }
        const int64_t filled = tokens + experts;
        const auto costs = scratch.matrix<int64_t>(experts, filled);
        const auto chosen = scratch.vector<int32_t>(filled);
        const auto problem = detail::assignment_problem::reserve(scratch, costs, chosen);
        const auto peaks = scratch.vector<Real>(tokens);
        const auto reaches = scratch.vector<double>(tokens);
        const auto scale = scratch.vector<double>(1);
        if (scratch.measuring()) return;
        int32_t* ids = chosen.data_handle();
        fastmoe::for_each_row(ex, tokens,
                              detail::measure_row<Real>{in.logits, pointer_or_null(in.mask), ids, peaks.data_handle(),
                                                        reaches.data_handle()},
                              {.width = 2 * experts});
        fastmoe::for_each_row(
            ex, 1, detail::measure_batch<Real>{reaches.data_handle(), scale.data_handle(), ids, tokens, experts},
            {.width = tokens});
        using to_costs = detail::logit_costs<Real>;
        detail::fill_columns(ex, costs, to_costs{in.logits, peaks.data_handle(), scale.data_handle()});
        fastmoe::for_each_row(ex, experts,
                              detail::price_experts{costs, ids, problem.prices, tokens, int64_t{1} << to_costs::bits},
                              {.width = 2 * tokens});
        fastmoe::for_each_row(ex, 1, detail::place_fillers{problem.prices, ids + tokens, experts}, {.width = 64 * experts});
        fastmoe::for_each_row(ex, detail::column_blocks(tokens),
                              detail::take_cheapest{costs, problem.prices, ids, tokens},
                              {.width = detail::column_block * experts});
        detail::solve_assignment(ex, problem);
        fastmoe::for_each(ex, tokens, detail::copy_ids<int32_t>{ids, to.experts.data_handle()});
    }
};

/// Weights are sigmoid(l_S), as in the paper: `base_gate{.experts = 64}`.
using base_gate = assigned_gate<balanced_assignment, sigmoid_score, raw_scores>;

} // namespace fastmoe::inline FASTMOE_ABI
