// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Selection in two steps: the best groups of experts first, then the best experts of those. It bounds how many devices
/// a token visits.
#pragma once

#include <fastmoe/core/error.hpp>
#include <fastmoe/routing/score.hpp>
#include <fastmoe/routing/select.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// What an expert outside of the kept groups competes with.
enum class outside_groups : std::uint8_t {
    excluded, ///< -Inf: never chosen
    zero,     ///< 0, as some published code masks: chosen before an inner expert whose selection score is negative
};

/// E experts stand in `groups` groups of equal size, in order. A group scores the sum of the `top` best scores in it, bias
/// included (DeepSeek-V2: 1, the maximum; DeepSeek-V3: 2); the `keep` best groups, ties to the lower one, offer their
/// experts. NaN counts as -Inf in a group's score.
struct group_limited {
    int64_t groups = 1;
    int64_t keep = 1;
    int64_t top = 2;
    outside_groups outside = outside_groups::excluded;

    static constexpr bool takes_greatest = false;

    /// @throws invalid_argument if groups do not divide the experts, or the kept groups hold fewer than K of them
    void validate(int64_t experts, int64_t k) const
    {
        expects(groups >= 1 && experts % groups == 0, "select.groups", groups, "a divisor of the ", experts, " experts");
        expects(keep >= 1 && keep <= groups, "select.keep", keep, "1 to groups = ", groups);
        expects(top >= 1 && top <= experts / groups, "select.top", top, "1 to the ", experts / groups, " experts of a group");
        expects(k <= keep * (experts / groups), "k", k, "at most the ", keep * (experts / groups),
                " experts of the kept groups");
    }

    template <class Real>
    int64_t scratch_bytes(int64_t experts, int64_t k) const noexcept
    {
        const int64_t each = static_cast<int64_t>(sizeof(Real) + 2 * sizeof(int32_t));
        return top_k::scratch_bytes<Real>(experts, k) + top_k::scratch_bytes<Real>(groups, keep) + groups * each + 256;
    }

    template <class Team, class Row>
    FASTMOE_HOST_DEVICE void operator()(Team& team, const Row& row, int64_t experts, int64_t k, int32_t* chosen) const
    {
        using real = std::remove_cvref_t<decltype(row.selection(0))>;
        const int64_t size = experts / groups, best = top;
        real* score = team.template scratch<real>(groups);
        int32_t* kept = team.template scratch<int32_t>(keep);
        int32_t* open = team.template scratch<int32_t>(groups);
        team.for_each(groups, [=](int64_t g) { score[g] = score_of(row, g * size, size, best); });
        team.for_each(groups, [=](int64_t g) { open[g] = 0; });
        team.sync();
        top_k{}(team, detail::plain_logits<real>{score}, groups, keep, kept);
        team.for_each(keep, [=](int64_t j) { open[kept[j]] = 1; });
        team.sync();
        const real closed = outside == outside_groups::zero ? real(0) : -detail::infinity<real>;
        top_k{}(team, inner_row<Row, real>{row, open, size, closed, outside == outside_groups::zero}, experts, k, chosen);
    }

private:
    /// What is added up. A row may select by a quantity that orders as the score does (its logit), which serves a
    /// maximum, but no sum.
    template <class Row>
    FASTMOE_HOST_DEVICE static auto addend(const Row& row, int64_t e, int64_t best)
    {
        if constexpr (requires { row.score(e); }) return best == 1 ? row.selection(e) : row.score(e);
        else return row.selection(e);
    }

    /// The row as the second step sees it. With exclusion, an inner expert whose own score is -Inf or NaN still goes
    /// before all outer ones, which rank with NaN.
    template <class Row, class Real>
    struct inner_row {
        Row row;
        const int32_t* open; // (groups)
        int64_t size;
        Real closed;
        bool compete;

        FASTMOE_HOST_DEVICE Real selection(int64_t e) const noexcept
        {
            const Real own = row.selection(e);
            if (open[e / size]) return compete || own == own ? own : -detail::infinity<Real>;
            return compete ? closed : detail::not_a_number<Real>;
        }
    };

    /// The sum of the `best` greatest of `size` scores, greatest first.
    template <class Row>
    FASTMOE_HOST_DEVICE static auto score_of(const Row& row, int64_t begin, int64_t size, int64_t best)
    {
        using real = std::remove_cvref_t<decltype(row.selection(0))>;
        constexpr real least = -detail::infinity<real>;
        real sum = 0, previous = 0;
        int64_t taken = -1; // the last that was taken
        for (int64_t round = 0; round < best; ++round) {
            real here = least;
            int64_t at = -1;
            for (int64_t i = begin; i < begin + size; ++i) {
                const real s = addend(row, i, best);
                const bool after = taken < 0 || s < previous || (s == previous && i > taken);
                if (after && (s > here || (at < 0 && s == here))) {
                    here = s;
                    at = i;
                }
            }
            sum = sum == detail::infinity<real> ? sum : sum + here; // not +Inf - Inf
            previous = here;
            taken = at < 0 ? begin + size : at;
        }
        return sum;
    }
};

} // namespace fastmoe::inline FASTMOE_ABI
