// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A bound on what an expert gets: choices beyond it are dropped, in a chosen order, counted over one rank or over all.
#pragma once

#include <limits>

#include <fastmoe/comm/self.hpp>
#include <fastmoe/routing/capacity_over_ranks.hpp>
#include <fastmoe/routing/drop_choices.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Which choices of an expert come first, and so stay.
enum class drop_order : std::uint8_t {
    token_major,  ///< by token
    choice_major, ///< every token's first choice before any second (GShard); needs the same k for every token
    by_weight,    ///< the greatest weights; ties by token
};

/// Whose choices the bound counts.
enum class capacity_scope : std::uint8_t {
    one_rank,  ///< those of each rank by themselves
    all_ranks, ///< those of all ranks, rank 0's tokens first: R ranks drop what one rank drops of the joined batch
};

/// An expert keeps ceil(factor * C / E) of the choices, C = K * T, computed in double. T counts all tokens of the rank, or
/// of all ranks, masked tokens as well: a padding mask frees places, it does not take them. Infinity, the default, keeps
/// all; 0 drops all.
struct capacity {
    double factor = std::numeric_limits<double>::infinity();
    drop_order order = drop_order::token_major;
    after_drop weights = after_drop::keep;
    capacity_scope over = capacity_scope::one_rank;

    constexpr bool limited() const noexcept { return factor < std::numeric_limits<double>::infinity(); }

    /// Whether the weights that stay grow when others are dropped.
    constexpr bool rescales() const noexcept { return limited() && weights == after_drop::rescale; }

    /// The bound, at most `choices`: of the rank, or of all ranks.
    /// @throws invalid_argument if factor is negative or NaN
    int64_t of(int64_t choices, int64_t experts) const
    {
        expects(factor >= 0, "capacity.factor", factor, "zero or more");
        return limited() && experts > 0 ? detail::capacity_of(factor, choices, experts) : choices;
    }
};

namespace verbs {
struct apply_capacity;
}

namespace detail {

/// A communicator that never has a second rank.
template <class C>
concept alone = requires { requires C::size() == 1; };

} // namespace detail

template <class Executor>
struct implementation<verbs::apply_capacity, Executor> {
    template <class Real, class Communicator>
    static void run(Executor& ex, const capacity& bound, const routing<Real>& route, const Communicator& c, arena& scratch)
    {
        const bool by_weight = bound.order == drop_order::by_weight;
        const int64_t places = bound.order == drop_order::choice_major && route.k > 0 ? route.k : 1;
        const auto safe = detail::make_safe(ex, route, scratch);
        if constexpr (!detail::alone<Communicator>)
            if (bound.over == capacity_scope::all_ranks && c.size() > 1) {
                if (by_weight) detail::drop_least_of_all(ex, safe, bound.factor, bound.weights, c, scratch);
                else detail::drop_last_of_all(ex, safe, bound.factor, bound.weights, places, c, scratch);
                return;
            }
        const int64_t choices = route.choices(), experts = route.total_experts, limit = bound.of(choices, experts);
        if (by_weight) {
            using key = detail::order_key<Real>;
            const auto sorted = detail::sort_by_weight(ex, safe, scratch);
            if (scratch.measuring()) return;
            const int64_t mean = experts > 0 ? choices / experts + 1 : 1;
            fastmoe::for_each_row(ex, experts, detail::keep_greatest<key>{sorted, limit}, {.width = 64 * mean});
            detail::drop(ex, safe, bound.weights, detail::marks_of(sorted));
            return;
        }
        const auto ranks = scratch.vector<int32_t>(choices), counts = scratch.vector<int32_t>(experts);
        const auto order = places > 1 ? bucket_order::by_column : bucket_order::by_position;
        bucket(ex, safe.ids, counts, ranks, scratch, order, places);
        if (!scratch.measuring())
            detail::drop(ex, safe, bound.weights, detail::before_limit{ranks.data_handle(), limit});
    }
};

/// Drops choices beyond the capacity: their expert becomes -1, their weight 0. The same choices on any executor.
/// An id out of range counts as dropped, and so does what stands in a disorderly `first` twice; both are reported as
/// make_plan does, when all is done.
/// @param route    ids in [-1, E); read and overwritten
/// @param c        the ranks whose choices count, if the capacity counts those of all
/// @param scratch  taken and given back; on a measuring arena only counted
/// @throws invalid_argument if the factor is negative or NaN, shapes disagree, or choice_major meets ragged choices;
///         out_of_memory if the scratch is too small; nothing is written then
template <executor Executor, class Real, class Communicator>
void apply_capacity(Executor& ex, const capacity& bound, const routing<Real>& route, const Communicator& c, arena& scratch)
{
    const int64_t limit = bound.of(route.choices(), route.total_experts);
    expects(bound.order != drop_order::choice_major || !route.ragged(), "capacity.order", "choice_major",
            "token_major or by_weight where choices are ragged");
    const bool alone = bound.over == capacity_scope::one_rank || c.size() == 1;
    if (!bound.limited() || route.total_experts <= 0 || (alone && limit >= route.choices())) return;
    using verb = implementation<verbs::apply_capacity, Executor>;
    const arena::scope lent(scratch);
    if (!scratch.measuring()) {
        detail::expects_routing(route);
        arena measure;
        verb::run(ex, bound, route, c, measure);
        scratch.require(measure.bytes());
    }
    verb::run(ex, bound, route, c, scratch);
    if (!scratch.measuring()) ex.deliver_faults();
}

/// The same for one rank.
/// @throws invalid_argument if the capacity counts all ranks' choices, besides
template <executor Executor, class Real>
void apply_capacity(Executor& ex, const capacity& bound, const routing<Real>& route, arena& scratch)
{
    expects(bound.over == capacity_scope::one_rank, "capacity.over", "all_ranks", "one_rank where no communicator is given");
    apply_capacity(ex, bound, route, self{}, scratch);
}

} // namespace fastmoe::inline FASTMOE_ABI
