// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the values of a token's choices are divided by, and how that moves with them: a part of weigh.hpp.
#pragma once

#include <cmath>

#include <fastmoe/routing/score.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// What is added to a sum of chosen values: nothing where values are known up to a factor only.
template <class Row, class Real, class Weigh>
FASTMOE_HOST_DEVICE constexpr Real epsilon_of(const Weigh& weigh) noexcept
{
    return Row::sums_to_one ? Real(0) : static_cast<Real>(weigh.epsilon);
}

/// Whether n chosen values are divided by their sum. A single score that need not sum to one with others is left as it
/// is: divided by itself it would say nothing.
template <class Row, class Weigh>
FASTMOE_HOST_DEVICE constexpr bool divides_by_chosen(int64_t n) noexcept
{
    return Weigh::over_chosen && (Row::sums_to_one || n > 1);
}

template <class Weigh>
concept has_least_divisor = requires(const Weigh& w) { w.least; };
template <class Weigh>
concept has_norm_power = requires(const Weigh& w) { w.power; };

/// What values are divided by, and how it moves with them: d divisor / d v is of_all for every expert, and for a chosen
/// one, also of_chosen (v / divisor)^(power - 1).
template <class Real>
struct division {
    Real divisor = 1, of_all = 0, of_chosen = 0, power = 1;

    FASTMOE_HOST_DEVICE Real slope(Real value) const noexcept
    {
        if (power == Real(1)) return of_chosen;
        if (!(value > Real(0))) return Real(0);
        // A power below 1 is great where the value is small: so small that its ratio to the divisor is no number any more.
        if (power < Real(1)) return of_chosen * (std::pow(value, power - Real(1)) * std::pow(divisor, Real(1) - power));
        return of_chosen * std::pow(value / divisor, power - Real(1));
    }
};

/// The division of n chosen values. All lanes alike; `values` is in order.
template <class Team, class Weigh, class Row, class Real>
FASTMOE_HOST_DEVICE division<Real> division_of(Team& team, const Weigh& weigh, const Row& row, const Real* logits,
                                               int64_t experts, const Real* values, int64_t n)
{
    division<Real> d;
    if constexpr (Weigh::over_chosen) {
        if (!divides_by_chosen<Row, Weigh>(n)) return d;
        d.of_chosen = 1;
        if constexpr (has_norm_power<Weigh>) {
            const Real power = d.power = static_cast<Real>(weigh.power);
            // By the greatest, whose power may be too small, or too great, for a number.
            const auto value = [=](int64_t j) { return values[j]; };
            const Real unit = power == Real(1) ? Real(1) : team.reduce(n, Real(0), greater_of{}, value);
            const Real sum = team.reduce(n, Real(0), adds{}, [=](int64_t j) {
                return values[j] > Real(0) ? std::pow(values[j] / unit, power) : Real(0);
            });
            d.divisor = math::is_finite(unit) ? unit * std::pow(sum, Real(1) / power) : unit;
        } else {
            d.divisor = epsilon_of<Row, Real>(weigh) +
                        team.reduce(n, Real(0), adds{}, [=](int64_t j) { return values[j]; });
        }
        if constexpr (has_least_divisor<Weigh>) {
            const Real all = Row::sums_to_one ? sum_of_values(team, row, logits, experts) : Real(1);
            const Real least = static_cast<Real>(weigh.least);
            if (d.divisor < least * all) d = {least * all, Row::sums_to_one ? least : Real(0), Real(0), Real(1)};
        }
    } else if constexpr (Row::sums_to_one) {
        d = {sum_of_values(team, row, logits, experts), Real(1), Real(0), Real(1)};
    }
    if (d.divisor == Real(0)) d.divisor = 1;
    return d;
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
