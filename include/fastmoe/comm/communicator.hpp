// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The communicator concept: what R ranks exchange with each other, collective by collective. Gates ask only for sums
/// over ranks; expert parallelism asks for all of it.
///
/// Every collective is called by all ranks in the same order, takes the executor first and works on memory of that
/// executor. Counts are host memory. Element types are the library's scalars, int32, int64 and std::byte. A peer that
/// fails, or does not arrive before the deadline, is a comm_error on every other rank.
#pragma once

#include <concepts>
#include <cstdint>

#include <fastmoe/core/tensor.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Knows its place: rank() in [0, size()).
template <class C>
concept counts_ranks = requires(const C& c) {
    { c.rank() } -> std::convertible_to<int>;
    { c.size() } -> std::convertible_to<int>;
};

/// all_reduce: values on every rank become their sum over the ranks, added in rank order.       // (N)
template <class C, class Executor, class T = float>
concept sums_over_ranks =
    requires(const C& c, Executor& ex, vector_view<T> values) { c.all_reduce(ex, values); };

/// reduce_scatter: rank r gets block r of the sum over the ranks.                     // sent (R*N) -> received (N)
template <class C, class Executor, class T = float>
concept scatters_sums = requires(const C& c, Executor& ex, vector_view<const T> sent, vector_view<T> received) {
    c.reduce_scatter(ex, sent, received);
};

/// all_gather: every rank gets the blocks of all, in rank order.                      // sent (N) -> received (R*N)
template <class C, class Executor, class T = float>
concept gathers_from_ranks = requires(const C& c, Executor& ex, vector_view<const T> sent, vector_view<T> received) {
    c.all_gather(ex, sent, received);
};

/// all_to_all: block r goes to rank r, and block r came from rank r.                  // sent, received (R*N)
template <class C, class Executor, class T = float>
concept exchanges_blocks = requires(const C& c, Executor& ex, vector_view<const T> sent, vector_view<T> received) {
    c.all_to_all(ex, sent, received);
};

/// all_to_all_known, which a communicator need not have: all_to_all of what the host needs to know as well, where it cannot
/// read the executor's memory. It gets copies of both.                                // out, in (R*N), of the host
template <class C, class Executor, class T = float>
concept exchanges_known_blocks =
    requires(const C& c, Executor& ex, vector_view<const T> sent, vector_view<T> received, vector_view<T> out, vector_view<T> in) {
        c.all_to_all_known(ex, sent, received, out, in);
    };

/// all_to_all_v: sent_rows(r) rows go to rank r and received_rows(r) rows come from it, packed in rank order; the sums
/// of the counts are at most the rows that the matrices hold.               // sent (N,D), received (M,D), counts (R)
template <class C, class Executor, class T = float>
concept exchanges_rows = requires(const C& c, Executor& ex, matrix_view<const T> sent, matrix_view<T> received,
                                  vector_view<const int64_t> counts) {
    c.all_to_all_v(ex, sent, counts, received, counts);
};

/// broadcast: every rank gets the root's values.                                      // (N)
template <class C, class Executor, class T = float>
concept broadcasts = requires(const C& c, Executor& ex, vector_view<T> values, int root) {
    c.broadcast(ex, values, root);
};

/// barrier: returns when every rank has called it and the executor's work before it is done.
template <class C, class Executor>
concept waits_for_ranks = requires(const C& c, Executor& ex) { c.barrier(ex); };

/// split: ranks that name the same color form a communicator of their own, ordered by key, then by rank.
template <class C>
concept splits = requires(const C& c, int color, int key) { c.split(color, key); };

template <class C, class Executor>
concept communicator = counts_ranks<C> && sums_over_ranks<C, Executor> && scatters_sums<C, Executor> &&
                       gathers_from_ranks<C, Executor> && exchanges_blocks<C, Executor> &&
                       exchanges_rows<C, Executor> && broadcasts<C, Executor> && waits_for_ranks<C, Executor> &&
                       splits<C>;

} // namespace fastmoe::inline FASTMOE_ABI
