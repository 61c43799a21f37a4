// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A bound on what an expert gets: choices beyond it are dropped, in a chosen order.
#pragma once

#include <limits>

#include <fastmoe/ops/bucket.hpp>
#include <fastmoe/routing/routing.hpp>
#include <fastmoe/routing/score.hpp>
#include <fastmoe/routing/select.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Which choices of an expert come first, and so stay.
enum class drop_order : std::uint8_t {
    token_major,  ///< by token
    choice_major, ///< every token's first choice before any second (GShard); needs the same k for every token
    by_weight,    ///< the greatest weights; ties by token
};

/// What happens to the other weights of a token that lost a choice.
enum class after_drop : std::uint8_t {
    keep,    ///< nothing
    rescale, ///< they grow in proportion until the sum of the token's magnitudes is what it was
};

/// An expert keeps ceil(factor * C / E) of the choices, C = K * T, computed in double; T counts all of this rank's
/// tokens, masked ones too. Infinity, the default, keeps all; 0 drops all.
struct capacity {
    double factor = std::numeric_limits<double>::infinity();
    drop_order order = drop_order::token_major;
    after_drop weights = after_drop::keep;

    constexpr bool limited() const noexcept { return factor < std::numeric_limits<double>::infinity(); }

    /// Whether the weights that stay grow when others are dropped.
    constexpr bool rescales() const noexcept { return limited() && weights == after_drop::rescale; }

    /// The bound, at most `choices`.
    /// @throws invalid_argument if factor is negative or NaN
    int64_t of(int64_t choices, int64_t experts) const
    {
        expects(factor >= 0, "capacity.factor", factor, "zero or more");
        if (!limited() || experts <= 0) return choices;
        const double bound = factor * static_cast<double>(choices) / static_cast<double>(experts);
        if (bound >= static_cast<double>(choices)) return choices;
        const auto below = static_cast<int64_t>(bound);
        return below + (static_cast<double>(below) < bound);
    }
};

namespace verbs {
struct apply_capacity;
}

namespace detail {

/// ranks(c) becomes the place of c among its expert's choices, ordered by expert: offset + rank.
template <class Key>
struct sorted_choices {
    vector_view<int32_t> ranks;   // (C)    by bucket()
    vector_view<int32_t> counts;  // (E)
    vector_view<int64_t> offsets; // (E)
    vector_view<Key> keys;        // (C)    of the weights, by expert, in order of choice
    vector_view<int32_t> kept;    // (C)    in the same places: 1 or 0
};

template <class Key>
struct sort_offsets {
    sorted_choices<Key> by_expert;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const auto& s = by_expert;
        team.scan(
            s.counts.extent(0), int64_t{0}, [](int64_t a, int64_t b) { return a + b; },
            [&s](int64_t e) { return static_cast<int64_t>(s.counts(e)); },
            [&s](int64_t e, int64_t start) { s.offsets(e) = start; });
    }
};

/// Copies ids; -1 for one that is out of range, which is recorded, and for a choice of no token.
template <class Real>
struct copy_choices {
    routing<Real> route;
    vector_view<int32_t> ids; // (C)
    fault_recorder faults;

    FASTMOE_HOST_DEVICE void operator()(int64_t c) const
    {
        const int32_t e = route.experts(c);
        const bool inside = e >= -1 && e < route.total_experts, owned = !route.ragged() || c < route.first(route.tokens);
        if (!inside) faults.record(fault_kind::expert_out_of_range, c, e);
        ids(c) = inside && owned ? e : -1;
    }
};

template <class Real>
struct sort_keys {
    routing<Real> route;
    vector_view<const int32_t> ids; // (C)
    sorted_choices<order_key<Real>> by_expert;

    FASTMOE_HOST_DEVICE void operator()(int64_t c) const
    {
        const int32_t e = ids(c);
        if (e >= 0) by_expert.keys(by_expert.offsets(e) + by_expert.ranks(c)) = ordered(route.weights(c));
    }
};

/// Marks the `limit` greatest keys of an expert; of those equal to the least of them, the first.
template <class Key>
struct keep_greatest {
    using vectorized = void;
    sorted_choices<Key> by_expert;
    int64_t limit;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t e) const
    {
        const int64_t n = by_expert.counts(e);
        const Key* keys = by_expert.keys.data_handle() + by_expert.offsets(e);
        int32_t* kept = by_expert.kept.data_handle() + by_expert.offsets(e);
        if (n <= limit || limit == 0) {
            const int32_t all = limit != 0;
            team.for_each(n, [=](int64_t i) { kept[i] = all; });
            return;
        }
        const Key least = kth_greatest(team, keys, n, limit);
        const int32_t above = team.reduce(
            n, int32_t{0}, adds{}, [=](int64_t i) { return static_cast<int32_t>(keys[i] > least); });
        const int32_t room = static_cast<int32_t>(limit) - above;
        team.scan(
            n, int32_t{0}, adds{}, [=](int64_t i) { return static_cast<int32_t>(keys[i] == least); },
            [=](int64_t i, int32_t equal) { kept[i] = keys[i] > least || (keys[i] == least && equal < room); });
    }
};

/// Drops what is beyond the limit, a token at a time, so that what is left of its weights can grow.
template <class Real>
struct drop_choices {
    routing<Real> route;
    vector_view<const int32_t> ids;   // (C)
    vector_view<const int32_t> ranks; // (C)
    int64_t limit;
    after_drop weights;
    sorted_choices<order_key<Real>> by_expert;
    bool by_weight;

    FASTMOE_HOST_DEVICE bool stays(int64_t c) const
    {
        const int64_t at = ranks(c);
        return by_weight ? by_expert.kept(by_expert.offsets(ids(c)) + at) != 0 : at < limit;
    }

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        Real before = 0, left = 0;
        bool dropped = false;
        for (int64_t c = route.begin(t); c < route.end(t); ++c) {
            const Real size = ids(c) < 0 ? Real(0) : magnitude(route.weights(c));
            before += size;
            if (ids(c) >= 0 && stays(c)) {
                left += size;
                continue;
            }
            dropped = dropped || ids(c) >= 0;
            route.experts(c) = -1;
            route.weights(c) = Real(0);
        }
        if (weights != after_drop::rescale || !dropped || !(left > Real(0))) return;
        // The quotient first: it is at most 1, where one over a subnormal sum is infinite.
        for (int64_t c = route.begin(t); c < route.end(t); ++c)
            if (route.experts(c) >= 0) route.weights(c) = route.weights(c) / left * before;
    }

    FASTMOE_HOST_DEVICE static Real magnitude(Real weight) noexcept { return weight < Real(0) ? -weight : weight; }
};

} // namespace detail

template <class Executor>
struct implementation<verbs::apply_capacity, Executor> {
    template <class Real>
    static void run(Executor& ex, const capacity& bound, const routing<Real>& route, arena& scratch)
    {
        using key = detail::order_key<Real>;
        const int64_t choices = route.choices(), experts = route.total_experts, limit = bound.of(choices, experts);
        const bool by_weight = bound.order == drop_order::by_weight;
        detail::sorted_choices<key> sorted{};
        const auto ids = scratch.vector<int32_t>(choices);
        routing<Real> safe = route;
        if (route.ragged()) {
            const auto repaired = scratch.vector<int32_t>(route.tokens + 1);
            safe.first = repaired;
            if (!scratch.measuring())
                for_each_row(ex, 1, detail::repair_first<Real>{route, repaired, ex.faults()}, {.width = route.tokens});
        }
        if (!scratch.measuring()) for_each(ex, choices, detail::copy_choices<Real>{safe, ids, ex.faults()});
        sorted.ranks = scratch.vector<int32_t>(choices);
        sorted.counts = scratch.vector<int32_t>(experts);
        if (by_weight) {
            sorted.offsets = scratch.vector<int64_t>(experts);
            sorted.keys = scratch.vector<key>(choices);
            sorted.kept = scratch.vector<int32_t>(choices);
        }
        const bool columns = bound.order == drop_order::choice_major && route.k > 0;
        bucket(ex, ids, sorted.counts, sorted.ranks, scratch,
               columns ? bucket_order::by_column : bucket_order::by_position, columns ? route.k : 1);
        if (scratch.measuring()) return;
        if (by_weight) {
            for_each_row(ex, 1, detail::sort_offsets<key>{sorted}, {.width = experts});
            for_each(ex, choices, detail::sort_keys<Real>{route, ids, sorted});
            const int64_t mean = experts > 0 ? choices / experts + 1 : 1;
            for_each_row(ex, experts, detail::keep_greatest<key>{sorted, limit}, {.width = 64 * mean});
        }
        for_each(ex, route.tokens,
                 detail::drop_choices<Real>{safe, ids, sorted.ranks, limit, bound.weights, sorted, by_weight});
    }
};

/// Drops choices beyond the capacity: their expert becomes -1, their weight 0. The same choices on any executor.
/// An id out of range counts as dropped, and so does what stands in a disorderly `first` twice; both are reported as
/// make_plan does, when all is done.
/// @param route    ids in [-1, E); read and overwritten
/// @param scratch  taken and given back; on a measuring arena only counted
/// @throws invalid_argument if the factor is negative or NaN, shapes disagree, or choice_major meets ragged choices;
///         out_of_memory if the scratch is too small; nothing is written then
template <executor Executor, class Real>
void apply_capacity(Executor& ex, const capacity& bound, const routing<Real>& route, arena& scratch)
{
    const int64_t limit = bound.of(route.choices(), route.total_experts);
    expects(bound.order != drop_order::choice_major || !route.ragged(), "capacity.order", "choice_major",
            "token_major or by_weight where choices are ragged");
    if (!bound.limited() || limit >= route.choices()) return;
    const int64_t mark = scratch.used();
    if (!scratch.measuring()) {
        detail::expects_routing(route);
        arena measure;
        implementation<verbs::apply_capacity, Executor>::run(ex, bound, route, measure);
        scratch.require(measure.bytes());
    }
    implementation<verbs::apply_capacity, Executor>::run(ex, bound, route, scratch);
    scratch.rewind(mark);
    if (!scratch.measuring()) ex.deliver_faults();
}

} // namespace fastmoe::inline FASTMOE_ABI
