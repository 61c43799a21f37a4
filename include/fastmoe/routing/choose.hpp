// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The K best experts of every token, ids alone: what an assignment starts from, or falls back on in inference.
#pragma once

#include <fastmoe/exec/executor.hpp>
#include <fastmoe/routing/score.hpp>
#include <fastmoe/routing/select.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// Rows whose selection scores are the logits.
struct logit_rows {
    template <class Real>
    FASTMOE_HOST_DEVICE plain_logits<Real> operator()(const Real* logits) const noexcept
    {
        return {logits};
    }
};

/// A masked token, and one without a finite or +Inf logit, chooses nothing.
template <class Real, class Rows>
struct choose_ids {
    using vectorized = void;
    matrix_view<const Real> logits; // (T,E)
    const std::uint8_t* mask;       // (T), or null
    int32_t* experts;               // (T,K)
    int64_t k;
    Rows rows;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const int64_t all = logits.extent(1);
        const Real* l = logits.data_handle() + t * all;
        int32_t* chosen = experts + t * k;
        if (!mask || mask[t] != 0) {
            top_k{}(team, rows(l), all, k, chosen);
            if (l[chosen[0]] > -infinity<Real>) return;
            team.sync(); // before the choice is taken back
        }
        team.for_each(k, [=](int64_t j) { chosen[j] = -1; });
    }
};

/// @param rows     rows(logits).selection(e): what the choice sees. Not finite exactly where the logit is not
/// @param experts  overwritten, best first; -1 for a token that chooses nothing                          // (T*K)
template <class Executor, class Real, class Rows>
void choose_rows(Executor& ex, matrix_view<const Real> logits, vector_view<const std::uint8_t> mask, int64_t k,
                 const Rows& rows, vector_view<int32_t> experts)
{
    using selection = std::remove_cvref_t<decltype(rows(static_cast<const Real*>(nullptr)).selection(0))>;
    const int64_t all = logits.extent(1);
    fastmoe::for_each_row(ex, logits.extent(0),
                          choose_ids<Real, Rows>{logits, pointer_or_null(mask), experts.data_handle(), k, rows},
                          {.width = 2 * all, .scratch_bytes = top_k::scratch_bytes<selection>(all, k)});
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
