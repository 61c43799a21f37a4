// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Placement: which ranks hold which expert. Ranks stand in groups of `slices`; an expert lives on one group, whole if the
/// group is one rank, and cut along its hidden width over the group's ranks if it is more.
#pragma once

#include <concepts>
#include <cstdint>

#include <fastmoe/exec/executor.hpp>
#include <fastmoe/exec/memory.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Where an expert lives.
struct expert_place {
    int32_t group; ///< of ranks
    int32_t local; ///< number of the expert among those of its group
};

/// How a rule spreads `experts` over `groups`: of(e) says where e is, count(g) how many g has, expert(g, l) which one is
/// its l-th. of() and expert() are inverse to each other, and in a group local numbers follow global ones.
template <class P>
concept places_experts = requires(const P& p, int64_t n, int64_t experts, int64_t groups) {
    { p.of(n, experts, groups) } -> std::same_as<expert_place>;
    { p.count(n, experts, groups) } -> std::convertible_to<int64_t>;
    { p.expert(n, n, experts, groups) } -> std::convertible_to<int64_t>;
};

/// Consecutive experts on each group, as even as can be: the first E % groups have one more.
struct block_placement {
    FASTMOE_HOST_DEVICE expert_place of(int64_t e, int64_t experts, int64_t groups) const noexcept
    {
        const int64_t each = experts / groups, more = experts % groups, larger = more * (each + 1);
        const int64_t g = e < larger ? e / (each + 1) : more + (e - larger) / (each > 0 ? each : 1);
        return {static_cast<int32_t>(g), static_cast<int32_t>(e - expert(g, 0, experts, groups))};
    }
    FASTMOE_HOST_DEVICE int64_t count(int64_t group, int64_t experts, int64_t groups) const noexcept
    {
        return experts / groups + (group < experts % groups ? 1 : 0);
    }
    FASTMOE_HOST_DEVICE int64_t expert(int64_t group, int64_t local, int64_t experts, int64_t groups) const noexcept
    {
        const int64_t more = experts % groups;
        return group * (experts / groups) + (group < more ? group : more) + local;
    }
};

/// Expert e on group e % groups: neighbours, which often are hot together, are apart.
struct round_robin_placement {
    FASTMOE_HOST_DEVICE expert_place of(int64_t e, int64_t, int64_t groups) const noexcept
    {
        return {static_cast<int32_t>(e % groups), static_cast<int32_t>(e / groups)};
    }
    FASTMOE_HOST_DEVICE int64_t count(int64_t group, int64_t experts, int64_t groups) const noexcept
    {
        return experts / groups + (group < experts % groups ? 1 : 0);
    }
    FASTMOE_HOST_DEVICE int64_t expert(int64_t group, int64_t local, int64_t, int64_t groups) const noexcept
    {
        return local * groups + group;
    }
};

/// A map of the caller's, in memory that the host and the executor can both read; see placement_map, which makes one.
struct mapped_placement {
    vector_view<const expert_place> place_of; // (E)

    /// @throws invalid_argument if it is not of these experts, or names a group that there is not
    void verify(int64_t experts, int64_t groups) const
    {
        expects_shape(place_of, "placement.place_of (E)", experts);
        for (int64_t e = 0; e < experts; ++e)
            expects(place_of(e).group >= 0 && place_of(e).group < groups, "placement.place_of (E)", place_of(e).group,
                    "a group: 0 to ", groups - 1);
    }
    FASTMOE_HOST_DEVICE expert_place of(int64_t e, int64_t, int64_t) const noexcept { return place_of(e); }
    FASTMOE_HOST_DEVICE int64_t count(int64_t group, int64_t, int64_t) const noexcept
    {
        int64_t n = 0;
        for (int64_t e = 0; e < place_of.extent(0); ++e) n += place_of(e).group == group;
        return n;
    }
    FASTMOE_HOST_DEVICE int64_t expert(int64_t group, int64_t local, int64_t, int64_t) const noexcept
    {
        int64_t e = 0;
        while (e < place_of.extent(0) && (place_of(e).group != group || place_of(e).local != local)) ++e;
        return e;
    }
};

/// Owns a map. The executor must outlive it.
template <class Executor>
class placement_map {
public:
    /// @param group_of  the group of each expert; host memory, read here alone       // (E)
    /// @throws invalid_argument if a group is not in [0, groups)
    placement_map(Executor& ex, vector_view<const int32_t> group_of, int64_t groups) : places_(ex, group_of.extent(0))
    {
        static_assert(has_readable_memory<Executor>, "the host writes the map: the executor's memory must be readable");
        for (int64_t e = 0; e < group_of.extent(0); ++e) {
            const int32_t g = group_of(e);
            expects(g >= 0 && g < groups, "group_of (E)", g, "a group: 0 to ", groups - 1);
            int32_t earlier = 0;
            for (int64_t other = 0; other < e; ++other) earlier += group_of(other) == g;
            places_.view()(e) = {g, earlier};
        }
    }

    mapped_placement placement() const noexcept { return {places_.view()}; }

private:
    buffer<expert_place, Executor> places_;
};

/// A rule with the numbers that it is asked for: what the exchanges read.
template <places_experts Rule>
struct placed_experts {
    Rule rule;
    int64_t experts = 0; ///< E
    int64_t groups = 1;  ///< P = R / slices
    int slices = 1;      ///< ranks of a group
    int rank = 0;        ///< this one

    FASTMOE_HOST_DEVICE expert_place of(int64_t e) const { return rule.of(e, experts, groups); }
    /// L: experts that this rank holds, or holds a slice of.
    int64_t local_experts() const { return rule.count(rank / slices, experts, groups); }
    /// The global number of its l-th.
    FASTMOE_HOST_DEVICE int64_t expert(int64_t local) const { return rule.expert(rank / slices, local, experts, groups); }
    FASTMOE_HOST_DEVICE int slice() const noexcept { return rank % slices; }
    int64_t ranks() const noexcept { return groups * slices; }
};

static_assert(places_experts<block_placement> && places_experts<round_robin_placement> && places_experts<mapped_placement>);

} // namespace fastmoe::inline FASTMOE_ABI
