// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The rows of a noisy gate: noise on the logits, the smooth load that an expert gets of a token, and the gradients of
/// both. Parts of noisy_gate.hpp, where the formulas stand.
#pragma once

#include <fastmoe/exec/random.hpp>
#include <fastmoe/routing/importance.hpp>
#include <fastmoe/routing/select.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// sigma = softplus(r) + 0.01.
template <class Real>
FASTMOE_HOST_DEVICE Real noise_deviation(Real raw) noexcept
{
    return math::softplus(raw) + Real(0.01);
}

/// l' = l + z sigma; a logit that is not finite stays what it is.
template <class Real>
struct add_noise {
    const Real* logits; // (T,E)
    const Real* raw;    // (T,E)
    Real* draws;        // (T,E)
    Real* noisy;        // (T,E)
    random_source random;
    std::uint64_t first;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        const Real l = logits[i], z = random.template normal<Real>(first + static_cast<std::uint64_t>(i));
        draws[i] = z;
        noisy[i] = math::is_finite(l) ? l + z * noise_deviation(raw[i]) : l;
    }
};

/// Whether an expert is among the chosen: at or before the last of them in the order of choice.
template <class Real>
struct among_chosen {
    const Real* noisy; // (E)
    order_key<Real> least;
    int32_t last;

    FASTMOE_HOST_DEVICE bool operator()(int64_t e) const noexcept
    {
        const auto key = ordered(noisy[e]);
        return key > least || (key == least && e <= last);
    }
};

/// The load that each expert gets of one token, as a function of its logit, its sigma and two thresholds. Without a
/// threshold, and where a logit is not finite, the load is certain: 1 or 0, without a slope.
template <class Real>
struct load_row {
    const Real* logits; // (E)
    const Real* raw;    // (E)
    among_chosen<Real> chosen;
    Real next; // the best noisy logit that was not chosen; -Inf: none
    Real last; // the last that was

    FASTMOE_HOST_DEVICE Real threshold(int64_t e) const noexcept { return chosen(e) ? next : last; }
    /// The distance to the threshold in sigmas; NaN where the load is certain.
    FASTMOE_HOST_DEVICE Real distance(int64_t e) const noexcept
    {
        const Real away = logits[e] - threshold(e);
        return math::is_finite(away) ? away / noise_deviation(raw[e]) : not_a_number<Real>;
    }
    FASTMOE_HOST_DEVICE Real value(int64_t e) const noexcept
    {
        const Real u = distance(e), l = logits[e], limit = threshold(e);
        const Real certain = l == l && l > -infinity<Real> && !(limit > l) ? Real(1) : Real(0);
        return u == u ? math::normal_cdf(u) : certain;
    }
    /// d load / d l, which is minus the slope in the threshold; times -distance, it is the slope in sigma.
    FASTMOE_HOST_DEVICE Real slope(int64_t e, Real distance) const noexcept
    {
        return distance == distance ? math::normal_density(distance) / noise_deviation(raw[e]) : Real(0);
    }
};

/// @param ids  the chosen of the token, best first                                                // (K)
template <class Team, class Real>
FASTMOE_HOST_DEVICE load_row<Real> load_of(Team& team, const Real* logits, const Real* raw, const Real* noisy,
                                           int64_t experts, const int32_t* ids, int64_t k)
{
    const int32_t last = ids[k - 1];
    const among_chosen<Real> chosen{noisy, ordered(noisy[last]), last};
    constexpr Real least = -infinity<Real>;
    const Real next = team.reduce(experts, least, greater_of{}, [=](int64_t e) {
        return chosen(e) || noisy[e] != noisy[e] ? least : noisy[e];
    });
    return {logits, raw, chosen, next, noisy[last]};
}

/// Sums of the loads of a block of tokens.
template <class Real>
struct load_sums {
    matrix_view<const Real> logits, raw, noisy; // (T,E)
    const int32_t* chosen;                      // (T,K)  before capacity
    matrix_view<Real> sums;                     // (blocks,E)
    int64_t k, block_size;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t b) const
    {
        const int64_t tokens = logits.extent(0), experts = logits.extent(1);
        Real* to = sums.data_handle() + b * experts;
        team.for_each(experts, [to](int64_t e) { to[e] = Real(0); });
        const int64_t end = (b + 1) * block_size < tokens ? (b + 1) * block_size : tokens;
        for (int64_t t = b * block_size; t < end; ++t) {
            if (chosen[t * k] < 0) continue; // masked, or without a logit to choose by
            team.sync();
            if (k == experts) {
                team.for_each(experts, [to](int64_t e) { to[e] += Real(1); });
                continue;
            }
            const int64_t at = t * experts;
            const auto row = load_of(team, logits.data_handle() + at, raw.data_handle() + at, noisy.data_handle() + at,
                                     experts, chosen + t * k, k);
            team.for_each(experts, [to, row](int64_t e) { to[e] += row.value(e); });
        }
    }
};

/// From d loss / d l' of what was chosen by l', adds that of importance and load, and gives d loss / d l and d loss / d r.
template <class Real>
struct noise_row_backward {
    matrix_view<const Real> logits, raw, draws, noisy; // (T,E)
    const int32_t* chosen;                             // (T,K)  before capacity
    const Real* importance;                            // (E)    slopes; null where there is no such loss
    const Real* load;                                  // (E)    the same
    Real* dlogits;                                     // (T,E)  in: of l'; out: of l
    Real* dnoise;                                      // (T,E)  out: of r
    int64_t k;
    Real scale, loss_scale;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const int64_t experts = logits.extent(1), at = t * experts;
        const int32_t* ids = chosen + t * k;
        const Real *r = raw.data_handle() + at, *z = draws.data_handle() + at, *s = noisy.data_handle() + at;
        Real *dl = dlogits + at, *dr = dnoise + at;
        if (ids[0] < 0) {
            team.for_each(experts, [dr](int64_t e) { dr[e] = Real(0); });
            return;
        }
        if (importance) add_importance(team, ids, s, dl);
        const Real* slopes = k < experts ? load : nullptr;
        const Real factor = loss_scale;
        const auto row = load_of(team, logits.data_handle() + at, r, s, experts, ids, k);
        if (slopes) add_thresholds(team, row, slopes, ids, s, dl);
        team.for_each(experts, [=](int64_t e) {
            const Real u = row.distance(e), direct = slopes ? factor * slopes[e] * row.slope(e, u) : Real(0);
            const Real through = direct != Real(0) ? direct * u : Real(0); // u may be NaN
            const Real dsigma = dl[e] * z[e] - through;
            dl[e] += direct;
            dr[e] = math::is_finite(r[e]) ? dsigma * math::sigmoid(r[e]) : Real(0);
        });
    }

    /// The weights are scale * softmax(l'_S): their gradient is the slope of the expert that they went to.
    template <class Team>
    FASTMOE_HOST_DEVICE void add_importance(Team& team, const int32_t* ids, const Real* s, Real* dl) const
    {
        const auto row = softmax_score{}.row_of_best(s, ids[0]);
        const Real* slopes = importance;
        const Real sum = team.reduce(k, Real(0), adds{}, [=](int64_t j) { return row.value(s[ids[j]]); });
        const Real dot =
            team.reduce(k, Real(0), adds{}, [=](int64_t j) { return slopes[ids[j]] * row.value(s[ids[j]]); });
        const Real mean = dot / sum, factor = loss_scale * scale / sum;
        team.for_each(k, [=](int64_t j) { dl[ids[j]] += factor * row.value(s[ids[j]]) * (slopes[ids[j]] - mean); });
        team.sync();
    }

    /// Each threshold is the noisy logit of an expert, which gets its gradient.
    template <class Team>
    FASTMOE_HOST_DEVICE void add_thresholds(Team& team, const load_row<Real>& row, const Real* slopes, const int32_t* ids,
                                            const Real* s, Real* dl) const
    {
        const int64_t experts = logits.extent(1);
        const auto part = [=](int64_t e, bool of_chosen) {
            return row.chosen(e) == of_chosen ? slopes[e] * row.slope(e, row.distance(e)) : Real(0);
        };
        const Real next = team.reduce(experts, Real(0), adds{}, [=](int64_t e) { return part(e, true); });
        const Real last = team.reduce(experts, Real(0), adds{}, [=](int64_t e) { return part(e, false); });
        const auto lesser = [](int64_t a, int64_t b) { return b < a ? b : a; };
        const int64_t place = team.reduce(experts, experts, lesser, [=](int64_t e) {
            return !row.chosen(e) && s[e] == row.next ? e : experts;
        });
        if (team.lane() == 0) {
            if (place < experts) dl[place] -= loss_scale * next;
            dl[ids[k - 1]] -= loss_scale * last;
        }
        team.sync();
    }
};

} // namespace fastmoe::inline FASTMOE_ABI::detail
