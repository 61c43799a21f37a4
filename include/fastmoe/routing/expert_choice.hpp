// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Expert choice: every expert takes the tokens that want it most, so that all work the same and a token is served by as
/// many experts as take it, or by none.
#pragma once

#include <fastmoe/routing/capacity.hpp>
#include <fastmoe/routing/columns.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

struct same_for_all {
    int64_t tokens;

    template <class Team, class Key>
    FASTMOE_HOST_DEVICE int64_t operator()(Team&, const Key*, int64_t) const noexcept
    {
        return tokens;
    }
};

} // namespace detail

/// With p = softmax(l) over the experts, expert e takes the n tokens of greatest p_te (Zhou et al. 2022, sec. 3.2):
///
///     n = ceil(factor * K * T / E), at most T
///
/// where K, the gate's k, is the paper's capacity factor c: on average a token gets K experts. T counts all of this
/// rank's tokens, masked ones too; a fraction is rounded up, as capacities are. Ties go to the lower token. A masked
/// token, and one without a finite or +Inf logit, is never taken; so there may be fewer than n, and choices past the last
/// that was filled are -1. A logit of -Inf or NaN is taken only when nothing better is left, and weighs 0.
///
/// Which tokens are taken depends on all tokens of the batch, later ones of a sequence included: training and inference
/// are alike, and neither is causal.
struct expert_choice {
    static constexpr bool reads_logits = true;
    static constexpr bool ragged = true;
    double factor = 1; ///< multiplies K, for a mean of choices that is no whole number

    /// C = E * n.
    int64_t choices(int64_t tokens, int64_t experts, int64_t k) const
    {
        const int64_t each = taken(tokens, experts, k);
        expects(each <= INT32_MAX / experts, "tokens * k", tokens, "at most 2^31 - 1 choices");
        return each * experts;
    }

    /// @throws invalid_argument if the factor is not a finite number above 0
    void validate(int64_t, int64_t) const
    {
        expects(factor > 0 && factor - factor == 0, "assignment.factor", factor, "a finite number above 0");
    }

    template <class Executor, class T, class Communicator, class Real>
    void assign(Executor& ex, const gate_input<T>& in, const Communicator&, const assignment<Real>& to, arena& scratch) const
    {
        const auto columns =
            detail::probability_columns(ex, in.logits, in.mask, to.tokens, to.total_experts, scratch);
        detail::take_greatest(ex, columns, detail::same_for_all{taken(to.tokens, to.total_experts, to.k)}, to, scratch);
    }

private:
    int64_t taken(int64_t tokens, int64_t experts, int64_t k) const
    {
        const double exact = factor * static_cast<double>(k) * static_cast<double>(tokens) / static_cast<double>(experts);
        if (exact >= static_cast<double>(tokens)) return tokens;
        const auto below = static_cast<int64_t>(exact);
        return below + (static_cast<double>(below) < exact);
    }
};

/// Weights are p: `expert_choice_gate{.experts = 64, .k = 2}`.
using expert_choice_gate = assigned_gate<expert_choice, softmax_score, raw_scores>;

} // namespace fastmoe::inline FASTMOE_ABI
