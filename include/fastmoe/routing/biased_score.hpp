// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Scores that a bias may steer: sigmoid, sqrt-softplus, and softmax with a bias. The bias is seen by the choice alone,
/// never by a weight or a gradient; whoever balances experts without a loss moves it between steps.
///
/// Where a logit is not finite, its order of choice is that of the logit: +Inf first, then the finite ones by score and
/// bias, then -Inf and NaN, which weigh 0.
#pragma once

#include <fastmoe/core/tensor.hpp>
#include <fastmoe/routing/score.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

inline void expects_bias(vector_view<const float> bias, int64_t experts)
{
    if (bias.extent(0) != 0) expects_shape(bias, "score.bias (E)", experts);
}

/// The score with the bias, if there is one; a logit that is not finite stands for itself.
template <class Real>
FASTMOE_HOST_DEVICE Real biased_sum(Real logit, Real score, const float* bias, int64_t e) noexcept
{
    const Real biased = bias ? score + static_cast<Real>(bias[e]) : score;
    return math::is_finite(logit) ? biased : logit;
}

/// What the choice sees of that: the logit where there is no bias, so that saturation makes no ties.
template <class Real>
FASTMOE_HOST_DEVICE Real biased_selection(Real logit, Real score, const float* bias, int64_t e) noexcept
{
    return bias ? biased_sum(logit, score, bias, e) : logit;
}

/// Rows of a score that is a function of one logit. F has value(l) and slope(l, v).
template <class Real, class F>
struct single_scores {
    static constexpr bool sums_to_one = false;
    const Real* logits; // (E)
    const float* bias;  // (E), or null
    Real peak;          // the greatest logit

    FASTMOE_HOST_DEVICE bool empty() const noexcept { return peak == -infinity<Real>; }
    FASTMOE_HOST_DEVICE Real selection(int64_t e) const noexcept
    {
        return biased_selection(logits[e], F::value(logits[e]), bias, e);
    }
    FASTMOE_HOST_DEVICE Real score(int64_t e) const noexcept { return biased_sum(logits[e], F::value(logits[e]), bias, e); }
    /// Where one logit is +Inf, the limit: those share, all others get nothing.
    FASTMOE_HOST_DEVICE Real value(Real l) const noexcept
    {
        const Real finite = l == l ? F::value(l) : Real(0);
        const Real limit = l == peak ? Real(1) : Real(0);
        return peak == infinity<Real> ? limit : finite;
    }
    FASTMOE_HOST_DEVICE Real slope(Real l, Real v) const noexcept
    {
        return peak == infinity<Real> || !math::is_finite(l) ? Real(0) : F::slope(l, v);
    }
};

struct sigmoid_function {
    template <class Real>
    FASTMOE_HOST_DEVICE static Real value(Real l) noexcept
    {
        return math::sigmoid(l);
    }
    template <class Real>
    FASTMOE_HOST_DEVICE static Real slope(Real, Real v) noexcept
    {
        return v * (Real(1) - v);
    }
};

struct sqrt_softplus_function {
    template <class Real>
    FASTMOE_HOST_DEVICE static Real value(Real l) noexcept
    {
        return std::sqrt(math::softplus(l));
    }
    template <class Real>
    FASTMOE_HOST_DEVICE static Real slope(Real l, Real v) noexcept
    {
        return v > Real(0) ? math::sigmoid(l) / (Real(2) * v) : Real(0);
    }
};

template <class F>
struct single_score {
    vector_view<const float> bias{}; // (E)  memory of the executor; empty: none

    /// @throws invalid_argument if the bias has another length
    void validate(int64_t experts, int64_t) const { expects_bias(bias, experts); }

    template <class Team, class Real>
    FASTMOE_HOST_DEVICE single_scores<Real, F> row(Team& team, const Real* logits, int64_t experts) const
    {
        return {logits, pointer_or_null(bias), greatest(team, logits, experts)};
    }
};

} // namespace detail

/// s = sigmoid(l), chosen by s + b (DeepSeek-V3, eq. 16; Llama 4 without a bias).
struct sigmoid_score : detail::single_score<detail::sigmoid_function> {};

/// s = sqrt(log(1 + e^l)), chosen by s + b (DeepSeek-V4).
struct sqrt_softplus_score : detail::single_score<detail::sqrt_softplus_function> {};

/// p = softmax(l), chosen by p + b (ERNIE 4.5).
struct biased_softmax_score {
    vector_view<const float> bias{}; // (E)  memory of the executor; empty: none

    template <class Real>
    struct row_scores : softmax_score::row_scores<Real> {
        const float* bias;
        Real inverse; // of the sum of the values

        FASTMOE_HOST_DEVICE Real selection(int64_t e) const noexcept
        {
            return detail::biased_selection(this->logits[e], this->value(this->logits[e]) * inverse, bias, e);
        }
        FASTMOE_HOST_DEVICE Real score(int64_t e) const noexcept
        {
            return detail::biased_sum(this->logits[e], this->value(this->logits[e]) * inverse, bias, e);
        }
    };

    /// @throws invalid_argument if the bias has another length
    void validate(int64_t experts, int64_t) const { detail::expects_bias(bias, experts); }

    template <class Team, class Real>
    FASTMOE_HOST_DEVICE row_scores<Real> row(Team& team, const Real* logits, int64_t experts) const
    {
        const auto soft = softmax_score{}.row(team, logits, experts);
        const Real sum = detail::sum_of_values(team, soft, logits, experts);
        return {soft, pointer_or_null(bias), sum > Real(0) ? Real(1) / sum : Real(0)};
    }
};

} // namespace fastmoe::inline FASTMOE_ABI
