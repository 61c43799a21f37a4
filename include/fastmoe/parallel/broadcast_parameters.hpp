// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The values of a model's parameters on all ranks that hold them, from the first of these: once before training, so that
/// what was drawn or loaded on one rank is what all begin with.
#pragma once

#include <fastmoe/exec/scratch.hpp>
#include <fastmoe/parallel/agreement.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

template <class Executor, class Communicator>
void broadcast_tag(Executor& ex, vector_view<const parameter_view> parameters, parameter_tag tag, const Communicator& c)
{
    for (int64_t i = 0; i < parameters.extent(0) && c.size() > 1; ++i) {
        const parameter_view& p = parameters(i);
        if (p.tag != tag || p.count == 0) continue;
        with_scalar_type(p.value_type, [&](auto zero) {
            static_assert(broadcasts<Communicator, Executor, decltype(zero)>, "the communicator lacks broadcast");
            c.broadcast(ex, elements_of<decltype(zero)>(p, parameter_side::values), 0);
        });
    }
}

} // namespace detail

/// Values tagged `world` become those of rank 0 of world, values tagged `data` those of rank 0 of data, the first replica;
/// values tagged `none`, and all gradients, stay. Collective over both, as synchronize_gradients(), whose arguments and
/// errors these are; of a parameter's two types only that of the values is looked at.
template <executor Executor, counts_ranks World, counts_ranks Data>
void broadcast_parameters(Executor& ex, vector_view<const parameter_view> parameters, const World& world, const Data& data,
                          arena& scratch)
{
    using detail::parameter_facts;
    constexpr auto side = detail::parameter_side::values;
    if (!scratch.measuring()) detail::expects_parameters(parameters, side);
    detail::with_scratch(scratch, [&](arena& memory) {
        detail::expects_agreement(ex, world, data, parameter_facts::of(parameters, parameter_tag::world, side),
                                  parameter_facts::of(parameters, parameter_tag::data, side), memory);
        if (memory.measuring()) return;
        detail::broadcast_tag(ex, parameters, parameter_tag::world, world);
        detail::broadcast_tag(ex, parameters, parameter_tag::data, data);
    });
}
/// The same with memory of the executor.
template <executor Executor, counts_ranks World, counts_ranks Data>
void broadcast_parameters(Executor& ex, vector_view<const parameter_view> parameters, const World& world, const Data& data)
{
    detail::with_own_scratch(ex, [&](arena& scratch) { broadcast_parameters(ex, parameters, world, data, scratch); });
}

} // namespace fastmoe::inline FASTMOE_ABI
