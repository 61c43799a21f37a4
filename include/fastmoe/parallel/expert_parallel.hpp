// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How the ranks of a layer share its experts: which ranks, which expert where, and how tokens travel. A layer takes such a
/// value, or a plain communicator, which stands for blocks of experts and the exact exchange.
///
///     fm::moe_layer layer{gate, expert, fm::expert_parallel{group, world, fm::round_robin_placement{}, fm::gathered_exchange<>{}}};
#pragma once

#include <fastmoe/parallel/exact_exchange.hpp>
#include <fastmoe/parallel/gathered_exchange.hpp>
#include <fastmoe/parallel/padded_exchange.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// What backward does for the received tokens, which the gradients of the experts' weights read: forward kept them, M rows
/// of D elements, or they are sent once more.
enum class received_rows : std::uint8_t { keep, fetch_again };

/// @tparam Group     ranks that share the experts; split from the world by the caller, who keeps both
/// @tparam World     ranks whose tokens the gate's losses and capacities count: the group, or all replicas of it
/// @tparam Rule      see placement.hpp
/// @tparam Exchange  exact_exchange, padded_exchange, gathered_exchange, or one of the caller's
template <counts_ranks Group, counts_ranks World = Group, places_experts Rule = block_placement,
          class Exchange = exact_exchange<>>
    requires reserves_exchange<Exchange, float, Rule>
struct expert_parallel {
    Group group;
    World world;
    Rule placement = {};
    Exchange exchange = {};
    int slices = 1; ///< ranks over which an expert's hidden width is cut; a divisor of the group's size
    received_rows rows = received_rows::keep;
    int chunks = 1; ///< pieces of each rank's tokens: one travels while another is worked on. The same on all ranks

    int rank() const { return group.rank(); }
    int size() const { return group.size(); }
};

template <class Group, class World>
expert_parallel(Group, World) -> expert_parallel<Group, World>;
template <class Group, class World, class Rule>
expert_parallel(Group, World, Rule) -> expert_parallel<Group, World, Rule>;
template <class Group, class World, class Rule, class Exchange>
expert_parallel(Group, World, Rule, Exchange) -> expert_parallel<Group, World, Rule, Exchange>;
template <class Group, class World, class Rule, class Exchange>
expert_parallel(Group, World, Rule, Exchange, int) -> expert_parallel<Group, World, Rule, Exchange>;
template <class Group, class World, class Rule, class Exchange>
expert_parallel(Group, World, Rule, Exchange, int, received_rows) -> expert_parallel<Group, World, Rule, Exchange>;
template <class Group, class World, class Rule, class Exchange>
expert_parallel(Group, World, Rule, Exchange, int, received_rows, int) -> expert_parallel<Group, World, Rule, Exchange>;

namespace detail {

template <class C>
inline constexpr bool is_expert_parallel = false;
template <class... P>
inline constexpr bool is_expert_parallel<expert_parallel<P...>> = true;

/// One rank, and the type knows it.
template <class C>
concept always_single = requires { requires C::size() == 1; };

/// Ranks that can share experts, rather than sums alone.
template <class C>
concept shares_experts = is_expert_parallel<C> || (splits<C> && !always_single<C>);

/// What a layer's communicator says: itself, or what a plain one stands for.
template <class C>
const C& parallel_of(const C& c)
    requires is_expert_parallel<C>
{
    return c;
}
template <class C>
expert_parallel<C> parallel_of(const C& c)
{
    return {c, c};
}
template <class C>
using parallel_t = std::remove_cvref_t<decltype(parallel_of(std::declval<const C&>()))>;

/// The ranks that gates add up over.
template <class C>
const auto& gate_ranks(const C& c)
{
    if constexpr (is_expert_parallel<C>) return c.world;
    else return c;
}
template <class C>
using gate_ranks_t = std::remove_cvref_t<decltype(gate_ranks(std::declval<const C&>()))>;

/// The exchange of one chunk: what is said of a rank is shared by its chunks.
template <class Parallel>
auto exchange_of_chunk(const Parallel& parallel)
{
    if constexpr (requires { parallel.exchange.of_chunk(parallel.chunks); }) return parallel.exchange.of_chunk(parallel.chunks);
    else return parallel.exchange;
}

template <class C>
auto placed(const C& c, int64_t experts)
{
    const auto& p = parallel_of(c);
    using rule = std::remove_cvref_t<decltype(p.placement)>;
    expects(p.slices >= 1 && p.size() % p.slices == 0, "slices", p.slices, "a divisor of the group's ", p.size(), " ranks");
    if constexpr (requires { p.placement.verify(experts, int64_t{}); }) p.placement.verify(experts, p.size() / p.slices);
    return placed_experts<rule>{p.placement, experts, p.size() / p.slices, p.slices, p.rank()};
}

} // namespace detail

} // namespace fastmoe::inline FASTMOE_ABI
