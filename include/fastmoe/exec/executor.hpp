// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The executor concept: what every verb takes first, and the two parallel loops that every verb is written over.
#pragma once

#include <concepts>
#include <cstddef>

#include <fastmoe/core/tensor.hpp>
#include <fastmoe/exec/fault.hpp>
#include <fastmoe/exec/team.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {
struct element_archetype {
    FASTMOE_HOST_DEVICE void operator()(int64_t) const {}
};
struct row_archetype {
    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team&, int64_t) const
    {
    }
};
} // namespace detail

/// Gives and takes back memory that its own parallel loops can reach.
template <class Executor>
concept allocates = requires(Executor& ex, void* p, int64_t n) {
    { ex.allocate(n) } -> std::same_as<void*>;
    ex.deallocate(p, n);
};

/// Runs f(i) for i in [0, n).
template <class Executor>
concept runs_elements = requires(Executor& ex, int64_t n) { ex.for_each(n, detail::element_archetype{}); };

/// Runs f(team, row) for every row in [0, n).
template <class Executor>
concept runs_rows = requires(Executor& ex, int64_t n, row_hint hint) { ex.for_each_row(n, detail::row_archetype{}, hint); };

/// Records faults that parallel work finds, and throws them: at the end of a verb if the verb has ended by then
/// (deliver_faults), or when the executor is waited for (synchronize). faults() says where: an executor whose calls end
/// with their work keeps the faults of each calling thread apart; one with a stream has one record, in the stream's memory,
/// for deliver_faults() to leave alone and for synchronize() to throw to whoever waits.
template <class Executor>
concept reports_faults = requires(Executor& ex) {
    { ex.faults() } -> std::same_as<fault_recorder>;
    ex.deliver_faults();
    ex.synchronize();
};

/// Whether its caller may read the executor's memory between two calls, and waits for nothing by that. Verbs then look at
/// what stands in small arrays before they begin; elsewhere the work itself looks, and records faults.
template <class Executor>
inline constexpr bool has_readable_memory = requires { requires Executor::readable_memory; };

/// Brings bytes of its memory to the host, after the work before it is done: for an executor without readable memory.
/// Only verbs that say so wait for it.
template <class Executor>
concept copies_to_host = requires(Executor& ex, void* to, const void* from, int64_t bytes) { ex.copy_to_host(to, from, bytes); };

template <class Executor>
concept executor = allocates<Executor> && runs_elements<Executor> && runs_rows<Executor> && reports_faults<Executor>;

/// f(i) for i in [0, n), in parallel; f is a copyable functor whose operator() is FASTMOE_HOST_DEVICE.
template <executor Executor, class F>
void for_each(Executor& ex, int64_t n, const F& f)
{
    if (n > 0) ex.for_each(n, f);
}

/// f(team, row) for row in [0, n), in parallel; the lanes of a team call it together.
template <executor Executor, class F>
void for_each_row(Executor& ex, int64_t n, const F& f, row_hint hint)
{
    expects(hint.scratch_bytes <= team_scratch_bytes, "scratch_bytes", hint.scratch_bytes, "at most ", team_scratch_bytes);
    if (n > 0) ex.for_each_row(n, f, hint);
}

namespace detail {

/// Numbers that the host must know before it can go on. Waits for the executor where its memory cannot be read.
template <class Executor, class T>
void read_back(Executor& ex, vector_view<const T> from, T* to)
{
    const int64_t n = from.extent(0);
    if constexpr (has_readable_memory<Executor>) {
        for (int64_t i = 0; i < n; ++i) to[i] = from(i);
    } else {
        static_assert(copies_to_host<Executor>, "the executor has neither readable_memory nor copy_to_host");
        ex.copy_to_host(to, from.data_handle(), n * static_cast<int64_t>(sizeof(T)));
    }
}

} // namespace detail

/// A verb's body. The generic source is the partial specialization over Executor; a tuned twin in cuda/ is the full
/// specialization for its executor, so that a qualified call can never skip it.
template <class Verb, class Executor>
struct implementation;

} // namespace fastmoe::inline FASTMOE_ABI
