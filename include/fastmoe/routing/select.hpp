// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Which experts a token gets: the K best of a row of selection scores, best first, by a total order.
///
/// The order is +Inf > finite > -Inf > NaN; equal scores (0 and -0 are equal) go to the lower id. -Inf and NaN are chosen
/// only when nothing better is left; their weight is 0.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda/std/bit>

#include <fastmoe/exec/team.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

/// An integer of the same width whose order is the order of choice. The least integer stands for no score at all.
template <class Real>
using order_key = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;

template <class Real>
inline constexpr order_key<Real> no_key = order_key<Real>(order_key<Real>(1) << (sizeof(Real) * 8 - 1));

/// Orders by value where bits of negative numbers run backwards; adding zero makes -0 into 0.
template <class Real>
FASTMOE_HOST_DEVICE constexpr order_key<Real> ordered(Real score) noexcept
{
    using key = order_key<Real>;
    const auto bits = ::cuda::std::bit_cast<key>(score + Real(0));
    const key flipped = bits ^ ((bits >> (sizeof(Real) * 8 - 1)) & ~no_key<Real>);
    return score != score ? key(no_key<Real> + 1) : flipped;
}

/// The k-th greatest of n keys, exactly, bit by bit from the highest.
template <class Team, class Key>
FASTMOE_HOST_DEVICE Key kth_greatest(Team& team, const Key* keys, int64_t n, int64_t k)
{
    using bits = std::make_unsigned_t<Key>;
    const bits bias = bits(1) << (sizeof(Key) * 8 - 1);
    bits prefix = 0;
    for (bits bit = bias; bit != 0; bit >>= 1) {
        const auto trial = static_cast<Key>((prefix | bit) ^ bias);
        const int32_t reached = team.reduce(
            n, int32_t{0}, [](int32_t a, int32_t b) { return a + b; },
            [keys, trial](int64_t i) { return static_cast<int32_t>(keys[i] >= trial); });
        prefix = reached >= k ? (prefix | bit) : prefix;
    }
    return static_cast<Key>(prefix ^ bias);
}

} // namespace detail

/// Chooses the K greatest selection scores of a row. A selection policy is such a value:
///
///     select.scratch_bytes<Real>(experts, k)            what a team needs
///     select(team, row, experts, k, chosen)             row.selection(e) -> Real; writes k ids, best first     // (K)
///
/// Small rows are ranked by counting. Of a larger row, few are chosen by a threshold that leaves little more than K
/// candidates (the K-th of 16 column maxima), many by the exact K-th key, found bit by bit. O(E) for K up to 8,
/// O(32 E + K^2) above; the loops are free of branches that depend on scores.
struct top_k {
    template <class Real>
    static constexpr int64_t scratch_bytes(int64_t experts, int64_t /*k*/) noexcept
    {
        const int64_t padded = pad(experts);
        return padded * static_cast<int64_t>(sizeof(Real) + sizeof(int32_t)) + padded / 8 + 256;
    }

    template <class Team, class Row>
    FASTMOE_HOST_DEVICE void operator()(Team& team, const Row& row, int64_t experts, int64_t k, int32_t* chosen) const
    {
        using real = std::remove_cvref_t<decltype(row.selection(0))>;
        using key = detail::order_key<real>;
        const int64_t padded = pad(experts);
        const candidates<key> all{team.template scratch<key>(padded), team.template scratch<int32_t>(padded),
                                  team.template scratch<std::uint32_t>(padded / group), experts, padded};
        key* keys = all.keys;
        team.for_each(experts, [keys, row](int64_t e) { keys[e] = detail::ordered(row.selection(e)); });
        team.for_each(padded - experts, [keys, experts](int64_t e) { keys[experts + e] = detail::no_key<real>; });
        team.sync();
        rank(team, all, find(team, all, k), k, chosen);
        team.sync(); // the choice is complete, and the scratch may be used again
    }

private:
    static constexpr int columns = 32; // more than the 16 steps that GCC unrolls before it can vectorize them
    static constexpr int group = 32;   // bits of a mask
    static constexpr int64_t few = 16;

    static constexpr FASTMOE_HOST_DEVICE int64_t pad(int64_t experts) noexcept { return (experts + 63) / 64 * 64; }

    template <class Key>
    struct candidates {
        Key* keys;           // (padded)
        int32_t* ids;        // (padded)    the candidates, equal keys in order of id
        std::uint32_t* mask; // (padded/group)
        int64_t experts, padded;
    };

    /// Fills ids with candidates among which the k best are; returns how many.
    template <class Team, class Key>
    FASTMOE_HOST_DEVICE static int64_t find(Team& team, const candidates<Key>& all, int64_t k)
    {
        int32_t* ids = all.ids;
        const bool filter = k <= few;
        if (all.experts <= (filter ? 32 : 64) || k == all.experts) {
            team.for_each(all.experts, [ids](int64_t e) { ids[e] = static_cast<int32_t>(e); });
            team.sync();
            return all.experts;
        }
        if (filter) {
            const int64_t found = gather(team, all, threshold(all, k), true, 0, all.padded);
            if (found <= 64) return found; // else: ties, or an unlucky row
        }
        const Key exact = detail::kth_greatest(team, all.keys, all.experts, k);
        const int64_t above = gather(team, all, exact + 1, true, 0, k);
        return gather(team, all, exact, false, above, k);
    }

    /// The k-th greatest of the column maxima: at least k keys are as great. Every lane computes it alike.
    template <class Key>
    FASTMOE_HOST_DEVICE static Key threshold(const candidates<Key>& all, int64_t k)
    {
        const Key* keys = all.keys;
        Key column[columns];
        int32_t above[columns];
        for (int j = 0; j < columns; ++j) column[j] = keys[j];
        for (int64_t b = columns; b < all.padded; b += columns)
            for (int j = 0; j < columns; ++j) column[j] = keys[b + j] > column[j] ? keys[b + j] : column[j];
        for (int j = 0; j < columns; ++j) above[j] = 0;
        for (int i = 0; i < columns; ++i)
            for (int j = 0; j < columns; ++j) above[j] += column[i] > column[j];
        // Two plain loops, each of which the compiler recognizes: hide the columns below the k-th, take the minimum.
        constexpr Key most = ~(Key(1) << (sizeof(Key) * 8 - 1));
        for (int j = 0; j < columns; ++j) {
            const Key shown = -static_cast<Key>(above[j] < static_cast<int32_t>(k));
            column[j] = (column[j] & shown) | (most & ~shown);
        }
        Key least = most;
        for (int j = 0; j < columns; ++j) least = column[j] < least ? column[j] : least;
        return least;
    }

    /// Appends to ids, from `begin` and up to `limit`, the experts whose key is at least (or exactly) `bound`.
    template <class Team, class Key>
    FASTMOE_HOST_DEVICE static int64_t gather(Team& team, const candidates<Key>& all, Key bound, bool at_least,
                                              int64_t begin, int64_t limit)
    {
        const Key* keys = all.keys;
        int32_t* ids = all.ids;
        std::uint32_t* mask = all.mask;
        team.for_each(all.padded / group, [=](int64_t g) {
            const Key* first = keys + g * group;
            std::uint32_t low = 0, same = 0;
            for (int i = 0; i < group; ++i) low |= static_cast<std::uint32_t>(first[i] >= bound) << i;
            if (!at_least) {
                for (int i = 0; i < group; ++i) same |= static_cast<std::uint32_t>(first[i] == bound) << i;
                low = same;
            }
            mask[g] = low;
        });
        team.sync();
        const int64_t found = team.scan(
            all.padded / group, begin, [](int64_t a, int64_t b) { return a + b; },
            [mask](int64_t g) { return static_cast<int64_t>(::cuda::std::popcount(mask[g])); },
            [=](int64_t g, int64_t at) {
                for (std::uint32_t left = mask[g]; left != 0 && at < limit; left &= left - 1, ++at)
                    ids[at] = static_cast<int32_t>(g * group + ::cuda::std::countr_zero(left));
            });
        team.sync();
        return found < limit ? found : limit;
    }

    /// Writes the k best of n candidates, each to the place that the number of better ones says.
    template <class Team, class Key>
    FASTMOE_HOST_DEVICE static void rank(Team& team, const candidates<Key>& all, int64_t n, int64_t k, int32_t* chosen)
    {
        const Key* keys = all.keys;
        const int32_t* ids = all.ids;
        team.for_each((n + columns - 1) / columns, [=](int64_t b) {
            const int64_t first = b * columns;
            Key mine[columns];
            int32_t place[columns];
            for (int i = 0; i < columns; ++i) mine[i] = keys[ids[first + i < n ? first + i : 0]];
            for (int i = 0; i < columns; ++i) place[i] = 0;
            for (int64_t j = 0; j < n; ++j) {
                const Key other = keys[ids[j]];
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
