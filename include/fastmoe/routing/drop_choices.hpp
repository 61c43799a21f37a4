// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The steps of a capacity: choices that are safe to count, their order by weight, and the drop itself. Part of
/// capacity.hpp.
#pragma once

#include <fastmoe/ops/bucket.hpp>
#include <fastmoe/routing/routing.hpp>
#include <fastmoe/routing/select.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// What happens to the other weights of a token that lost a choice.
enum class after_drop : std::uint8_t {
    keep,    ///< nothing
    rescale, ///< they grow in proportion until the sum of the token's magnitudes is what it was
};

namespace detail {

/// An expert keeps ceil(factor * choices / experts), in double, and at most `choices`.
FASTMOE_HOST_DEVICE inline int64_t capacity_of(double factor, int64_t choices, int64_t experts) noexcept
{
    const double all = static_cast<double>(choices), bound = factor * all / static_cast<double>(experts);
    if (!(bound < all)) return choices;
    const auto below = static_cast<int64_t>(bound);
    return below + (static_cast<double>(below) < bound);
}

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

/// A routing whose `first` is in order, and ids that are safe to index by.
template <class Real>
struct safe_choices {
    routing<Real> route;
    vector_view<int32_t> ids; // (C)
};

template <class Executor, class Real>
safe_choices<Real> make_safe(Executor& ex, const routing<Real>& route, arena& scratch)
{
    safe_choices<Real> safe{route, scratch.vector<int32_t>(route.choices())};
    if (route.ragged()) {
        const auto repaired = scratch.vector<int32_t>(route.tokens + 1);
        safe.route.first = repaired;
        if (!scratch.measuring())
            fastmoe::for_each_row(ex, 1, repair_first<Real>{route, repaired, ex.faults()}, {.width = route.tokens});
    }
    if (!scratch.measuring()) fastmoe::for_each(ex, route.choices(), copy_choices<Real>{safe.route, safe.ids, ex.faults()});
    return safe;
}

/// Choices by expert. ranks(c) is the place of c among those of its expert.
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

template <class Real>
struct sort_keys {
    safe_choices<Real> safe;
    sorted_choices<order_key<Real>> by_expert;

    FASTMOE_HOST_DEVICE void operator()(int64_t c) const
    {
        const int32_t e = safe.ids(c);
        if (e >= 0) by_expert.keys(by_expert.offsets(e) + by_expert.ranks(c)) = ordered(safe.route.weights(c));
    }
};

/// Ranks choices within their expert, and sorts the keys of their weights by expert.
template <class Executor, class Real>
sorted_choices<order_key<Real>> sort_by_weight(Executor& ex, const safe_choices<Real>& safe, arena& scratch)
{
    using key = order_key<Real>;
    const int64_t choices = safe.route.choices(), experts = safe.route.total_experts;
    sorted_choices<key> sorted{scratch.vector<int32_t>(choices), scratch.vector<int32_t>(experts),
                               scratch.vector<int64_t>(experts), scratch.vector<key>(choices),
                               scratch.vector<int32_t>(choices)};
    bucket(ex, safe.ids, sorted.counts, sorted.ranks, scratch);
    if (!scratch.measuring()) {
        fastmoe::for_each_row(ex, 1, sort_offsets<key>{sorted}, {.width = experts});
        fastmoe::for_each(ex, choices, sort_keys<Real>{safe, sorted});
    }
    return sorted;
}

/// Marks the keys of an expert that are above the least, and of those equal to it the first `room`.
template <class Team, class Key>
FASTMOE_HOST_DEVICE void mark_kept(Team& team, const Key* keys, int64_t n, Key least, int64_t room, int32_t* kept)
{
    team.scan(
        n, int32_t{0}, [](int32_t a, int32_t b) { return a + b; },
        [=](int64_t i) { return static_cast<int32_t>(keys[i] == least); },
        [=](int64_t i, int32_t equal) { kept[i] = keys[i] > least || (keys[i] == least && equal < room); });
}

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
            n, int32_t{0}, [](int32_t a, int32_t b) { return a + b; },
            [=](int64_t i) { return static_cast<int32_t>(keys[i] > least); });
        mark_kept(team, keys, n, least, limit - above, kept);
    }
};

/// Stays if fewer than `limit` choices of the expert come before it.
struct before_limit {
    const int32_t* ranks; // (C)
    int64_t limit;

    FASTMOE_HOST_DEVICE bool operator()(int64_t c, int64_t /*place*/, int32_t /*expert*/) const { return ranks[c] < limit; }
};

/// Stays if it is marked.
struct marked {
    const int32_t* ranks;   // (C)
    const int64_t* offsets; // (E)
    const int32_t* kept;    // (C)

    FASTMOE_HOST_DEVICE bool operator()(int64_t c, int64_t /*place*/, int32_t expert) const
    {
        return kept[offsets[expert] + ranks[c]] != 0;
    }
};

template <class Key>
marked marks_of(const sorted_choices<Key>& sorted) noexcept
{
    return {sorted.ranks.data_handle(), sorted.offsets.data_handle(), sorted.kept.data_handle()};
}

/// Drops what does not stay, a token at a time, so that what is left of its weights can grow.
template <class Real, class Stays>
struct drop_choices {
    safe_choices<Real> safe;
    after_drop weights;
    Stays stays; ///< (choice, its place in the token, expert)

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        const auto& route = safe.route;
        const int64_t begin = route.begin(t), end = route.end(t);
        Real before = 0, left = 0;
        bool dropped = false;
        for (int64_t c = begin; c < end; ++c) {
            const int32_t e = safe.ids(c);
            const Real size = e < 0 ? Real(0) : magnitude(route.weights(c));
            before += size;
            if (e >= 0 && stays(c, c - begin, e)) {
                left += size;
                continue;
            }
            dropped = dropped || e >= 0;
            route.experts(c) = -1;
            route.weights(c) = Real(0);
        }
        if (weights != after_drop::rescale || !dropped || !(left > Real(0))) return;
        // The quotient first: it is at most 1, where one over a subnormal sum is infinite.
        for (int64_t c = begin; c < end; ++c)
            if (route.experts(c) >= 0) route.weights(c) = route.weights(c) / left * before;
    }

    FASTMOE_HOST_DEVICE static Real magnitude(Real weight) noexcept { return weight < Real(0) ? -weight : weight; }
};

template <class Executor, class Real, class Stays>
void drop(Executor& ex, const safe_choices<Real>& safe, after_drop weights, const Stays& stays)
{
    fastmoe::for_each(ex, safe.route.tokens, drop_choices<Real, Stays>{safe, weights, stays});
}

} // namespace detail

} // namespace fastmoe::inline FASTMOE_ABI
