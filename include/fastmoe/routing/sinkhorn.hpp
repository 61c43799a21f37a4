// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Sinkhorn routing: logits are scaled by row and column until experts are wanted equally, and the choice is made on
/// what comes out. Weights read the logits as they were.
///
///     C = exp(l);   d0_t = 1 / (T sum_e d1_e C_te),   d1_e = 1 / (E sum_t d0_t C_te),   d1 = 1 before
///
/// In logarithms, with v = log d1 and p_t = softmax(l_t + v), one round is v_e -= log(E/T sum_t p_te). Nothing but
/// differences to a row's greatest is ever raised to a power, so no logit is too large.
#pragma once

#include <cuda/std/bit>

#include <fastmoe/routing/assigned_gate.hpp>
#include <fastmoe/routing/biased_score.hpp>
#include <fastmoe/routing/block_sums.hpp>
#include <fastmoe/routing/choose.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

/// All in double, whatever the logits are: the choice then depends on how sums were ordered only where two scores agree
/// in some fifteen digits, and where they agree by symmetry, v is rounded, see settle_scales.
template <class Real>
struct scaling {
    matrix_view<const Real> logits; // (T,E)
    const Real* peaks;              // (T)  greatest logit; -Inf: takes no part
    double* scales;                 // (E)  v
    double* normalizers;            // (T)  log sum_e exp(l_e + v_e)
    double* partial;                // (blocks,2E)  sums of p, greatest log p
    int64_t* tokens;                // (1)  that take part
    int64_t block_size, blocks;

    /// What a logit stands for. Beside a +Inf nothing else counts; NaN is -Inf. A bound, far out, so that v can be added.
    FASTMOE_HOST_DEVICE double logit(int64_t t, int64_t e) const noexcept
    {
        constexpr double bound = 1e300;
        const auto l = static_cast<double>(logits.data_handle()[t * logits.extent(1) + e]);
        const double below = l > bound ? bound : l, inside = below < -bound ? -bound : below;
        const double finite = math::is_finite(l) ? inside : -infinity<double>;
        const double limit = l == infinity<double> ? 0.0 : -infinity<double>;
        return peaks[t] == infinity<Real> ? limit : finite;
    }

    /// e^x for x from -Inf to 0, within 2 units in the last place: a polynomial, since the standard library's does not
    /// vectorize and this is most of the work.
    FASTMOE_HOST_DEVICE static double power(double x) noexcept
    {
        using ::cuda::std::bit_cast;
        constexpr double magic = 6755399441055744.0; // 1.5 * 2^52: adding it rounds to an integer in the low bits
        const double y = x < -750.0 ? -750.0 : x;
        const double shifted = y * 1.4426950408889634 + magic, n = shifted - magic;
        const double r = (y - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10; // ln 2 in two parts
        double p = 1.6059043836821613e-10;                                                   // 1 / 13!
        p = p * r + 2.0876756987868099e-09;
        p = p * r + 2.5052108385441719e-08;
        p = p * r + 2.7557319223985891e-07;
        p = p * r + 2.7557319223985891e-06;
        p = p * r + 2.4801587301587302e-05;
        p = p * r + 1.9841269841269841e-04;
        p = p * r + 1.3888888888888889e-03;
        p = p * r + 8.3333333333333333e-03;
        p = p * r + 4.1666666666666667e-02;
        p = p * r + 1.6666666666666667e-01;
        p = p * r + 0.5;
        p = p * r * r + r + 1.0;
        const std::uint64_t k = bit_cast<std::uint64_t>(shifted) - bit_cast<std::uint64_t>(magic) + 2048;
        const std::uint64_t half = k >> 1, rest = k - half; // 2^n in two factors, so that small results come out right
        return p * bit_cast<double>((half - 1) << 52) * bit_cast<double>((rest - 1) << 52);
    }
};

template <class Real>
struct start_scaling {
    scaling<Real> s;
    const std::uint8_t* mask; // (T), or null
    Real* peaks;              // (T)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const int64_t experts = s.logits.extent(1);
        const Real* l = s.logits.data_handle() + t * experts;
        const Real peak = mask && mask[t] == 0 ? -infinity<Real> : greatest(team, l, experts);
        if (team.lane() == 0) peaks[t] = peak;
    }
};

template <class Real>
struct count_scaled {
    scaling<Real> s;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const Real* peaks = s.peaks;
        double* scales = s.scales;
        const int64_t n = team.reduce(s.logits.extent(0), int64_t{0}, adds{}, [peaks](int64_t t) {
            return static_cast<int64_t>(peaks[t] > -infinity<Real>);
        });
        team.for_each(s.logits.extent(1), [scales](int64_t e) { scales[e] = 0; });
        if (team.lane() == 0) *s.tokens = n;
    }
};

/// p of a block of tokens: its sums, and the greatest of its logarithms, by expert.
template <class Real>
struct scale_rows {
    using vectorized = void;
    scaling<Real> s;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t b) const
    {
        const scaling<Real> in = s;
        const int64_t experts = in.logits.extent(1), tokens = in.logits.extent(0), begin = b * in.block_size;
        const int64_t end = begin + in.block_size < tokens ? begin + in.block_size : tokens;
        double* power = team.template scratch<double>(experts);
        double *sum = in.partial + 2 * b * experts, *top = sum + experts;
        const double* v = in.scales;
        team.for_each(experts, [=](int64_t e) { sum[e] = 0; });
        team.for_each(experts, [=](int64_t e) { top[e] = -infinity<double>; });
        for (int64_t t = begin; t < end; ++t) {
            if (!(in.peaks[t] > -infinity<Real>)) continue;
            const double peak = team.reduce(experts, -infinity<double>, greater_of{},
                                            [&in, v, t](int64_t e) { return in.logit(t, e) + v[e]; });
            team.for_each(experts, [&in, v, t, power, peak](int64_t e) {
                power[e] = in.power(in.logit(t, e) + v[e] - peak);
            });
            team.sync();
            const double total = team.reduce(experts, 0.0, adds{}, [power](int64_t e) { return power[e]; });
            const double normalizer = peak + math::log(total), inverse = 1 / total;
            team.for_each(experts, [&in, v, t, power, sum, top, inverse, normalizer](int64_t e) {
                const double log_p = in.logit(t, e) + v[e] - normalizer;
                sum[e] += power[e] * inverse;
                top[e] = log_p > top[e] ? log_p : top[e];
            });
            team.sync();
            if (team.lane() == 0) in.normalizers[t] = normalizer;
        }
    }
};

/// v_e -= log(E/T sum_t p_te). An expert whose every p is too small to be represented is summed relative to the greatest;
/// one that nobody can choose stays.
template <class Real>
struct scale_columns {
    scaling<Real> s;

    FASTMOE_HOST_DEVICE void operator()(int64_t e) const
    {
        const int64_t experts = s.logits.extent(1);
        double sum = 0, top = -infinity<double>;
        for (int64_t b = 0; b < s.blocks; ++b) {
            const double* here = s.partial + 2 * b * experts + e;
            sum += here[0];
            top = here[experts] > top ? here[experts] : top;
        }
        if (top == -infinity<double>) return;
        double shift = 0;
        if (top < -600) {
            shift = top;
            sum = 0;
            for (int64_t t = 0; t < s.logits.extent(0); ++t)
                if (s.peaks[t] > -infinity<Real>)
                    sum += s.power(s.logit(t, e) + s.scales[e] - s.normalizers[t] - shift);
        }
        const double share = static_cast<double>(experts) / static_cast<double>(*s.tokens);
        s.scales[e] -= shift + math::log(sum * share);
    }
};

/// Rounds v to 24 bits, near 0 to as many behind the point: what sums of other orders make of it is the same then, and
/// scores that are equal by symmetry are equal.
struct settle_scales {
    double* scales; // (E)

    FASTMOE_HOST_DEVICE void operator()(int64_t e) const
    {
        const double v = scales[e], one = v < 0 ? -1 : 1;
        const double bounded = v > 1e38 ? 1e38 : (v < -1e38 ? -1e38 : v);
        scales[e] = static_cast<double>(static_cast<float>(bounded + one)) - one;
    }
};

/// Rows whose selection scores are l + v.
struct scaled_rows {
    const double* scales; // (E)

    template <class Real>
    struct scores {
        const Real* logits;   // (E)
        const double* scales; // (E)
        FASTMOE_HOST_DEVICE double selection(int64_t e) const noexcept
        {
            return static_cast<double>(logits[e]) + scales[e];
        }
    };

    template <class Real>
    FASTMOE_HOST_DEVICE scores<Real> operator()(const Real* logits) const noexcept
    {
        return {logits, scales};
    }
};

} // namespace detail

/// In training, the top K of d1 C d0 after a fixed number of rounds (Megatron-LM, where they run until d1 moves less than
/// a tolerance, which would have to be read by the host; S-BASE, Clark et al. 2022); no gradient flows through them. In
/// inference the top K of the logits. Experts are balanced as far as the rounds go and no exact count is promised:
/// a capacity beside it is a bound.
///
/// Sums run over this rank's tokens. A masked token, and one without a finite or +Inf logit, chooses nothing and counts in
/// no sum. Beside a +Inf a row's other logits count as -Inf, as NaN does everywhere; an expert that no row can choose is
/// left out. The order of choice is that of the logits: +Inf, then what is finite by l + v, then -Inf, then NaN.
struct sinkhorn {
    static constexpr bool reads_logits = true;
    static constexpr bool ragged = false;
    int rounds = 8;

    /// @throws invalid_argument if there is no round
    void validate(int64_t, int64_t) const { expects(rounds >= 1, "assignment.rounds", rounds, "1 or more"); }

    template <class Executor, class T, class Communicator, class Real>
    void assign(Executor& ex, const gate_input<T>& in, const Communicator&, const assignment<Real>& to, arena& scratch) const
    {
        const int64_t tokens = to.tokens, experts = to.total_experts;
        if (in.mode == gate_mode::inference) {
            if (!scratch.measuring())
                detail::choose_rows(ex, in.logits, in.mask, to.k, detail::logit_rows{}, to.experts);
            return;
        }
        const auto blocks = detail::token_blocks::of(tokens);
        const auto peaks = scratch.vector<Real>(tokens);
        const detail::scaling<Real> s{in.logits,
                                      peaks.data_handle(),
                                      scratch.vector<double>(experts).data_handle(),
                                      scratch.vector<double>(tokens).data_handle(),
                                      scratch.matrix<double>(blocks.count, 2 * experts).data_handle(),
                                      scratch.vector<int64_t>(1).data_handle(),
                                      blocks.size,
                                      blocks.count};
        if (scratch.measuring()) return;
        fastmoe::for_each_row(ex, tokens, detail::start_scaling<Real>{s, pointer_or_null(in.mask), peaks.data_handle()},
                              {.width = experts});
        fastmoe::for_each_row(ex, 1, detail::count_scaled<Real>{s}, {.width = tokens});
        const row_hint hint{.width = blocks.size * experts, .scratch_bytes = experts * int64_t{sizeof(double)} + 64};
        for (int round = 0; round < rounds; ++round) {
            fastmoe::for_each_row(ex, blocks.count, detail::scale_rows<Real>{s}, hint);
            fastmoe::for_each(ex, experts, detail::scale_columns<Real>{s});
        }
        fastmoe::for_each(ex, experts, detail::settle_scales{s.scales});
        detail::choose_rows(ex, in.logits, in.mask, to.k, detail::scaled_rows{s.scales}, to.experts);
    }
};

/// Weights are sigmoid(l_S): Megatron's at K = 1.
using sinkhorn_gate = assigned_gate<sinkhorn, sigmoid_score, raw_scores>;

/// Weights are p_S of p = softmax(l) over all: Megatron's at K > 1.
using sinkhorn_softmax_gate = assigned_gate<sinkhorn, softmax_score, raw_scores>;

} // namespace fastmoe::inline FASTMOE_ABI
