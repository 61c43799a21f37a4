// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How a router turns a token's logits into scores, and scores into weights: one row at a time, forward and backward.
///
/// A score policy makes a row; a row answers for each expert, and knows its scores up to a factor that the row shares:
///
///     auto row = score.row(team, logits, experts);     all lanes alike                                     // (E)
///     row.empty()          no logit is finite or +Inf: the token is dropped
///     row.selection(e)     what the choice sees: bias and noise included, or what orders in the same way
///     row.score(e)         optional: what sums of scores add up, where the selection is not that; up to the row's factor
///     row.value(l)         the score of a logit l times the row's factor: never the bias. 0 for -Inf and NaN
///     row.slope(l, v)      d value / d l, the factor held fixed; v is value(l)
///     Row::sums_to_one     whether a score is value / (sum of all values); else the factor is 1
///
/// A score that is greatest where the logit is may also offer score.row_of_best(logits, e), which is handed that e; one
/// that cannot serve every shape, score.validate(experts, k), which throws.
///
/// Of that everything is made: weights over the chosen need no factor at all, probabilities for the losses are always
/// value / (sum of all values), and a gradient of the values becomes one of the logits times slope.
#pragma once

#include <concepts>
#include <limits>
#include <utility>

#include <fastmoe/core/error.hpp>
#include <fastmoe/core/math.hpp>
#include <fastmoe/exec/team.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

/// A constant, since device code may not call std::numeric_limits.
template <class Real>
inline constexpr Real infinity = std::numeric_limits<Real>::infinity();

template <class Real>
inline constexpr Real not_a_number = std::numeric_limits<Real>::quiet_NaN();

struct adds {
    template <class Real>
    FASTMOE_HOST_DEVICE constexpr Real operator()(Real a, Real b) const noexcept
    {
        return a + b;
    }
};

/// The greater of two; NaN loses.
struct greater_of {
    template <class Real>
    FASTMOE_HOST_DEVICE constexpr Real operator()(Real a, Real b) const noexcept
    {
        return b > a ? b : a;
    }
};

/// A row whose selection scores are the logits.
template <class Real>
struct plain_logits {
    const Real* logits; // (E)
    FASTMOE_HOST_DEVICE Real selection(int64_t e) const noexcept { return logits[e]; }
};

/// The greatest logit that is not NaN; -Inf if there is none.
template <class Team, class Real>
FASTMOE_HOST_DEVICE Real greatest(Team& team, const Real* logits, int64_t experts)
{
    constexpr Real least = -infinity<Real>;
    return team.reduce(experts, least, greater_of{}, [logits](int64_t e) {
        const Real l = logits[e];
        return l > least ? l : least;
    });
}

/// The sum of a row's values.
template <class Team, class Row, class Real>
FASTMOE_HOST_DEVICE Real sum_of_values(Team& team, const Row& row, const Real* logits, int64_t experts)
{
    return team.reduce(experts, Real(0), adds{}, [row, logits](int64_t e) { return row.value(logits[e]); });
}

} // namespace detail

/// What a row of scores answers, see above.
template <class Row, class Real>
concept answers_for_experts = requires(const Row& row, Real l, int64_t e) {
    { row.empty() } -> std::convertible_to<bool>;
    { row.selection(e) } -> std::convertible_to<Real>;
    { row.value(l) } -> std::convertible_to<Real>;
    { row.slope(l, l) } -> std::convertible_to<Real>;
    { Row::sums_to_one } -> std::convertible_to<bool>;
};

namespace detail {

/// What a score policy makes of a row of logits.
template <class Score, class Real>
using score_row_t = decltype(std::declval<const Score&>().row(std::declval<single_lane_team&>(),
                                                              std::declval<const Real*>(), int64_t{}));

} // namespace detail

/// row(team, logits, experts), of whatever team.
template <class Score, class Real>
concept makes_rows = requires(const Score& s, single_lane_team& team, const Real* logits, int64_t experts) {
    s.row(team, logits, experts);
};
template <class Score, class Real>
concept scores_rows = makes_rows<Score, Real> && answers_for_experts<detail::score_row_t<Score, Real>, Real>;

/// Says whether weights are divided by what is chosen; epsilon, which is added to that, is a number.
template <class Weigh>
concept weighs_choices = requires(const Weigh& w) {
    { Weigh::over_chosen } -> std::convertible_to<bool>;
    requires !Weigh::over_chosen || requires { { w.epsilon } -> std::convertible_to<double>; };
};

/// p = softmax(l). Selection is on the logits, so that underflow of the exponential makes no ties.
/// The limit for rows that are not finite: the +Inf share 1 equally, -Inf and NaN get 0.
struct softmax_score {
    template <class Real>
    struct row_scores {
        static constexpr bool sums_to_one = true;
        const Real* logits; // (E)
        Real peak;          // their greatest: values are in [0, 1] and one of them is 1

        FASTMOE_HOST_DEVICE bool empty() const noexcept { return peak == -detail::infinity<Real>; }
        FASTMOE_HOST_DEVICE Real selection(int64_t e) const noexcept { return logits[e]; }
        FASTMOE_HOST_DEVICE Real score(int64_t e) const noexcept
        {
            return math::is_finite(logits[e]) ? value(logits[e]) : logits[e];
        }
        FASTMOE_HOST_DEVICE Real value(Real l) const noexcept
        {
            const Real distance = l - peak; // NaN for +Inf of +Inf, and for NaN
            const Real power = math::exp_of_nonpositive(distance);
            const Real limit = l == peak ? Real(1) : Real(0);
            return distance < Real(0) ? power : limit;
        }
        FASTMOE_HOST_DEVICE Real slope(Real, Real value) const noexcept { return value; }
        /// log sum_e exp l_e, given the sum of the values; 0 where it is not finite. Only rows of a softmax have it.
        FASTMOE_HOST_DEVICE Real log_sum_exp(Real sum) const noexcept
        {
            return math::is_finite(peak) ? peak + math::log(sum) : Real(0);
        }
    };

    template <class Team, class Real>
    FASTMOE_HOST_DEVICE row_scores<Real> row(Team& team, const Real* logits, int64_t experts) const
    {
        return {logits, detail::greatest(team, logits, experts)};
    }

    template <class Real>
    FASTMOE_HOST_DEVICE row_scores<Real> row_of_best(const Real* logits, int64_t best) const noexcept
    {
        const Real peak = logits[best];
        return {logits, peak == peak ? peak : -detail::infinity<Real>};
    }
};

/// Weights are the chosen scores divided by their sum: after softmax_score, softmax over the chosen alone, with the
/// same gradient. With one choice the weight is constant and the router gets no gradient, so training refuses K = 1.
/// A weighing policy states over_chosen, and epsilon where that is true; validate(experts, k) may throw.
struct renormalize {
    static constexpr bool over_chosen = true;
    double epsilon = 0; ///< added to the sum, as sigmoid routers do (1e-20); not where all scores sum to one

    /// @throws invalid_argument if epsilon is negative or not finite
    void validate(int64_t, int64_t) const
    {
        expects(epsilon >= 0 && epsilon - epsilon == 0, "weigh.epsilon", epsilon, "a finite number from 0 on");
    }
};

/// The same, with a sum that is taken to be `least` where it is less (ERNIE 4.5): such weights sum to less than one.
struct renormalize_at_least : renormalize {
    double least = 1e-12;
};

/// Weights are the chosen scores divided by their norm, (sum s^power)^(1/power) (DBRX, whose power is 1 by default).
struct divide_by_norm : renormalize {
    double power = 2; ///< 0.3 or more: below that, the gradient of the least float would be too great for one

    /// @throws invalid_argument
    void validate(int64_t, int64_t) const
    {
        expects(power >= 0.3 && power - power == 0, "weigh.power", power, "0.3 or more, finite");
    }
};

/// Weights are the scores as they are (Switch, GShard, DeepSeek-V2): after softmax_score, probabilities over all.
struct raw_scores {
    static constexpr bool over_chosen = false;
};

} // namespace fastmoe::inline FASTMOE_ABI
