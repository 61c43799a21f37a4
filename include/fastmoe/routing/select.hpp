// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Which experts a token gets: the K best of a row of selection scores, best first, by a total order.
///
/// The order is +Inf > finite > -Inf > NaN; equal scores (0 and -0 are equal) go to the lower id. -Inf and NaN are
/// chosen only when nothing better is left; their weight is 0.
#pragma once

#include <concepts>
#include <cstdint>
#include <type_traits>

#include <cuda/std/bit>

#include <fastmoe/exec/team.hpp>
#include <fastmoe/routing/score.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

/// An integer of the same width whose order is the order of choice. The least integer stands for no score at all.
template <class Real>
using order_key = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;

template <class Key>
inline constexpr Key no_key = static_cast<Key>(Key(1) << (sizeof(Key) * 8 - 1));

/// Orders by value where bits of negative numbers run backwards; adding zero makes -0 into 0.
template <class Real>
FASTMOE_HOST_DEVICE constexpr order_key<Real> ordered(Real score) noexcept
{
    using key = order_key<Real>;
    const auto bits = ::cuda::std::bit_cast<key>(score + Real(0));
    const key flipped = bits ^ ((bits >> (sizeof(Real) * 8 - 1)) & ~no_key<key>);
    return score != score ? key(no_key<key> + 1) : flipped;
}

/// How many of n keys are at least `bound`.
template <class Team, class Key>
FASTMOE_HOST_DEVICE int32_t count_at_least(Team& team, const Key* keys, int64_t n, Key bound)
{
    const auto add = [](int32_t a, int32_t b) { return a + b; };
    const auto reaches = [keys, bound](int64_t i) { return static_cast<int32_t>(keys[i] >= bound); };
    if constexpr (!is_single_lane<Team>) {
        return team.reduce(n, int32_t{0}, add, reaches);
    } else {
        constexpr int64_t block = 64; // a loop of fixed length, which compilers vectorize
        const int64_t blocks = n / block;
        const int32_t most = team.reduce(blocks, int32_t{0}, add, [keys, bound](int64_t b) {
            int32_t here = 0;
            for (int i = 0; i < block; ++i) here += keys[b * block + i] >= bound;
            return here;
        });
        if (blocks * block == n) return most;
        return most + team.reduce(n - blocks * block, int32_t{0}, add, [=](int64_t i) { return reaches(blocks * block + i); });
    }
}

/// The k-th greatest of n keys, exactly, bit by bit from the highest.
template <class Team, class Key>
FASTMOE_HOST_DEVICE Key kth_greatest(Team& team, const Key* keys, int64_t n, int64_t k)
{
    using bits = std::make_unsigned_t<Key>;
    const bits bias = bits(1) << (sizeof(Key) * 8 - 1);
    bits prefix = 0;
    FASTMOE_KEEP_LOOP
    for (bits bit = bias; bit != 0; bit >>= 1) {
        const int32_t reached = count_at_least(team, keys, n, static_cast<Key>((prefix | bit) ^ bias));
        prefix = reached >= k ? (prefix | bit) : prefix;
    }
    return static_cast<Key>(prefix ^ bias);
}

} // namespace detail

/// What a selection policy offers, see top_k.
template <class Select, class Real>
concept selects_experts = requires(const Select& s, single_lane_team& team, const detail::plain_logits<Real>& row, int64_t n,
                                   int32_t* chosen) {
    { Select::takes_greatest } -> std::convertible_to<bool>;
    { s.template scratch_bytes<Real>(n, n) } -> std::convertible_to<int64_t>;
    s(team, row, n, n, chosen);
};

/// Chooses the K greatest selection scores of a row. A selection policy is such a value:
///
///     select.scratch_bytes<Real>(experts, k)            what a team needs
///     select(team, row, experts, k, chosen)             row.selection(e) -> Real; writes k ids, best first     // (K)
///     Select::takes_greatest                            whether the first is always the greatest of the whole row
///
/// Lanes of a team look for the greatest together, K times over. A lane alone ranks candidates by counting. In a small row
/// all are candidates; of a larger one, few are chosen by a threshold that leaves little more than K (the K-th of 32 column
/// maxima), many by the exact K-th key, found bit by bit. O(E) for K up to 16, O(32 E + K^2) above; no branch depends on a
/// score but the number of candidates.
struct top_k {
    static constexpr bool takes_greatest = true;

    template <class Real>
    static constexpr int64_t scratch_bytes(int64_t experts, int64_t k) noexcept
    {
        const auto size = static_cast<int64_t>(sizeof(Real)), id = static_cast<int64_t>(sizeof(int32_t));
        return pad(experts) * size + room(k) * (size + id) + pad(experts) / 8 + 256;
    }

    template <class Team, class Row>
    FASTMOE_HOST_DEVICE void operator()(Team& team, const Row& row, int64_t experts, int64_t k, int32_t* chosen) const
    {
        using real = std::remove_cvref_t<decltype(row.selection(0))>;
        using key = detail::order_key<real>;
        const int64_t padded = pad(experts);
        const candidates<key> all{team.template scratch<key>(padded),
                                  team.template scratch<key>(room(k)),
                                  team.template scratch<int32_t>(room(k)),
                                  team.template scratch<std::uint64_t>(padded / group),
                                  experts,
                                  padded};
        key* keys = all.keys;
        team.for_each(experts, [keys, row](int64_t e) { keys[e] = detail::ordered(row.selection(e)); });
        if constexpr (is_single_lane<Team>) {
            for (int64_t e = experts; e < padded; ++e) keys[e] = detail::no_key<key>;
            rank(team, all, find(team, all, k), k, chosen);
        } else {
            take_in_turn(team, keys, experts, k, chosen);
        }
        team.sync(); // the choice is complete, and the scratch may be used again
    }

private:
    static constexpr int columns = 32;     // more than the 16 steps that GCC unrolls before it can vectorize them
    static constexpr int group = 64;       // bits of a mask
    static constexpr int64_t few = 16;     // up to here a threshold among the column maxima is worth it
    static constexpr int64_t enough = 64;  // candidates that are ranked without more ado

    static constexpr FASTMOE_HOST_DEVICE int64_t pad(int64_t n) noexcept { return (n + group - 1) / group * group; }
    static constexpr FASTMOE_HOST_DEVICE int64_t room(int64_t k) noexcept { return k > enough ? pad(k) : enough; }

    template <class Key>
    struct candidates {
        Key* keys;           // (padded)         of the row
        Key* best;           // (room)           of the candidates, equal ones in order of id
        int32_t* ids;        // (room)
        std::uint64_t* mask; // (padded/group)
        int64_t experts, padded;
    };

    /// The greatest key, k times over: where many lanes look, each looks at few.
    template <class Team, class Key>
    FASTMOE_HOST_DEVICE static void take_in_turn(Team& team, Key* keys, int64_t experts, int64_t k, int32_t* chosen)
    {
        struct entry {
            Key key;
            int32_t id;
        };
        const auto better = [](const entry& a, const entry& b) { return b.key > a.key || (b.key == a.key && b.id < a.id) ? b : a; };
        FASTMOE_KEEP_LOOP
        for (int64_t j = 0; j < k; ++j) {
            team.sync(); // all keys are there
            const int32_t id = team.reduce(experts, entry{detail::no_key<Key>, INT32_MAX}, better, [=](int64_t e) {
                                   return entry{keys[e], static_cast<int32_t>(e)};
                               }).id;
            team.sync(); // and were read
            if (team.lane() != 0) continue;
            chosen[j] = id;
            keys[id] = detail::no_key<Key>;
        }
    }

    /// Finds candidates among which the k best are; returns how many.
    template <class Team, class Key>
    FASTMOE_HOST_DEVICE static int64_t find(Team& team, const candidates<Key>& all, int64_t k)
    {
        const bool filter = k <= few;
        if (all.experts <= (filter ? columns : enough) || k == all.experts) {
            const Key* keys = all.keys;
            Key* best = all.best;
            int32_t* ids = all.ids;
            team.for_each(all.experts, [keys, best](int64_t e) { best[e] = keys[e]; });
            team.for_each(all.experts, [ids](int64_t e) { ids[e] = static_cast<int32_t>(e); });
            team.sync();
            return all.experts;
        }
        if (filter) {
            const int64_t found = gather<at_least>(team, all, threshold(all, k), 0, enough);
            if (found <= enough) return found; // more: ties, or an unlucky row
        }
        const Key exact = detail::kth_greatest(team, all.keys, all.padded, k);
        const int64_t above = gather<at_least>(team, all, exact + 1, 0, k);
        gather<equal>(team, all, exact, above, k);
        return k;
    }

    /// The k-th greatest of the column maxima: at least k keys are as great. Every lane computes it alike.
    template <class Key>
    FASTMOE_HOST_DEVICE static Key threshold(const candidates<Key>& all, int64_t k)
    {
        const Key* keys = all.keys;
        Key column[columns];
        int32_t above[columns];
        const int used = k <= columns / 4 ? columns / 2 : columns; // few choices need few columns
        for (int j = 0; j < columns; ++j) column[j] = keys[j];
        for (int64_t b = used; b + columns <= all.padded; b += used)
            for (int j = 0; j < columns; ++j) column[j] = keys[b + j] > column[j] ? keys[b + j] : column[j];
        for (int j = 0; j < columns; ++j) above[j] = 0;
        for (int i = 0; i < used; ++i)
            for (int j = 0; j < columns; ++j) above[j] += column[i] > column[j];
        // Two plain loops, each of which the compiler recognizes: hide the columns below the k-th, take the minimum.
        constexpr Key most = ~(Key(1) << (sizeof(Key) * 8 - 1));
        for (int j = 0; j < columns; ++j) {
            const Key shown = -static_cast<Key>((above[j] < static_cast<int32_t>(k)) & (j < used));
            column[j] = (column[j] & shown) | (most & ~shown);
        }
        Key least = most;
        for (int j = 0; j < columns; ++j) least = column[j] < least ? column[j] : least;
        return least;
    }

    struct at_least {
        template <class Key>
        FASTMOE_HOST_DEVICE constexpr bool operator()(Key key, Key bound) const noexcept
        {
            return key >= bound;
        }
    };
    struct equal {
        template <class Key>
        FASTMOE_HOST_DEVICE constexpr bool operator()(Key key, Key bound) const noexcept
        {
            return key == bound;
        }
    };

    /// Appends the experts whose key compares true with the bound to the candidates, which then end at the result;
    /// those past the limit are counted only.
    template <class Compare, class Team, class Key>
    FASTMOE_HOST_DEVICE static int64_t gather(Team& team, const candidates<Key>& all, Key bound, int64_t begin,
                                              int64_t limit)
    {
        const Key* keys = all.keys;
        Key* best = all.best;
        int32_t* ids = all.ids;
        std::uint64_t* mask = all.mask;
        team.for_each(all.padded / group, [=](int64_t g) {
            const Key *first = keys + g * group, *second = first + group / 2;
            std::uint32_t low = 0, high = 0;
            for (int i = 0; i < group / 2; ++i) low |= static_cast<std::uint32_t>(Compare{}(first[i], bound)) << i;
            for (int i = 0; i < group / 2; ++i) high |= static_cast<std::uint32_t>(Compare{}(second[i], bound)) << i;
            mask[g] = std::uint64_t{high} << 32 | low;
        });
        team.sync();
        const int64_t found = team.scan(
            all.padded / group, begin, [](int64_t a, int64_t b) { return a + b; },
            [mask](int64_t g) { return static_cast<int64_t>(::cuda::std::popcount(mask[g])); },
            [=](int64_t g, int64_t at) {
                for (std::uint64_t left = mask[g]; left != 0 && at < limit; left &= left - 1, ++at) {
                    const int64_t e = g * group + ::cuda::std::countr_zero(left);
                    ids[at] = static_cast<int32_t>(e);
                    best[at] = keys[e];
                }
            });
        team.sync();
        return found;
    }

    /// Writes the k best of n candidates, each to the place that the number of better ones says.
    template <class Team, class Key>
    FASTMOE_HOST_DEVICE static void rank(Team& team, const candidates<Key>& all, int64_t n, int64_t k, int32_t* chosen)
    {
        const Key* best = all.best;
        const int32_t* ids = all.ids;
        team.for_each((n + columns - 1) / columns, [=](int64_t b) {
            const int64_t first = b * columns;
            Key mine[columns]; // past n: what the scratch held, and nobody reads its place
            int32_t place[columns];
            for (int i = 0; i < columns; ++i) mine[i] = best[first + i] > detail::no_key<Key> ? best[first + i] : 0;
            for (int i = 0; i < columns; ++i) place[i] = 0;
            for (int64_t j = 0; j < n; ++j) {
                const Key other = best[j];
                const auto ahead = static_cast<int32_t>(j - first); // candidates after j lose a tie with it
                for (int i = 0; i < columns; ++i) place[i] += other > mine[i] - static_cast<Key>(ahead < i);
            }
            int32_t nowhere;
            for (int i = 0; i < columns && first + i < n; ++i) {
                int32_t* to = place[i] < k ? chosen + place[i] : &nowhere;
                *to = ids[first + i];
            }
        });
    }
};

} // namespace fastmoe::inline FASTMOE_ABI
