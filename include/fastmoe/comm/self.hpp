// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The communicator of a single rank: it moves what must be moved, checks what all communicators check, and costs
/// nothing else.
#pragma once

#include <type_traits>

#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/exec/executor.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

template <class T>
struct copy_elements {
    using vectorized = void;
    const T* from; // (N)
    T* to;         // (N)

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { to[i] = from[i]; }
};

} // namespace detail

/// One rank. Every collective is its own definition for R = 1: sums change nothing, exchanges copy.
/// @throws invalid_argument from each collective if shapes or counts break its contract
struct self {
    static constexpr int rank() noexcept { return 0; }
    static constexpr int size() noexcept { return 1; }

    template <executor Executor, class T>
    void all_reduce(Executor&, vector_view<T> values) const // (N)
    {
        expects_shape(values, "values (N)", values.extent(0));
    }

    template <executor Executor, class T>
    void reduce_scatter(Executor& ex, type_identity_t<vector_view<const T>> sent, vector_view<T> received) const
    {
        copy<T>(ex, sent, received);
    }

    template <executor Executor, class T>
    void all_gather(Executor& ex, type_identity_t<vector_view<const T>> sent, vector_view<T> received) const
    {
        copy<T>(ex, sent, received);
    }

    template <executor Executor, class T>
    void all_to_all(Executor& ex, type_identity_t<vector_view<const T>> sent, vector_view<T> received) const
    {
        copy<T>(ex, sent, received);
    }

    /// Rows of `received` past the count stay as they are.                              // (N,D), (1), (M,D), (1)
    template <executor Executor, class T>
    void all_to_all_v(Executor& ex, type_identity_t<matrix_view<const T>> sent, vector_view<const int64_t> sent_rows,
                      matrix_view<T> received, vector_view<const int64_t> received_rows) const
    {
        expects_shape(sent_rows, "sent_rows (R)", 1);
        expects_shape(received_rows, "received_rows (R)", 1);
        const int64_t rows = sent_rows(0), width = sent.extent(1);
        expects(rows >= 0 && rows <= sent.extent(0), "sent_rows(0)", rows, "0 to ", sent.extent(0));
        expects(received_rows(0) == rows, "received_rows(0)", received_rows(0), rows, ", as sent");
        expects(rows <= received.extent(0), "received (M,D)", received.extent(0), rows, " rows or more");
        expects_shape(received, "received (M,D)", received.extent(0), width);
        expects_shape(sent, "sent (N,D)", sent.extent(0), width);
        fastmoe::for_each(ex, rows * width, detail::copy_elements<T>{sent.data_handle(), received.data_handle()});
    }

    template <executor Executor, class T>
    void broadcast(Executor&, vector_view<T> values, int root) const // (N)
    {
        expects_shape(values, "values (N)", values.extent(0));
        expects(root == 0, "root", root, "a rank: 0");
    }

    template <executor Executor>
    void barrier(Executor& ex) const
    {
        ex.synchronize();
    }

    /// @throws invalid_argument if color is negative
    self split(int color, int /*key*/) const
    {
        expects(color >= 0, "color", color, "zero or more");
        return {};
    }

private:
    template <class T, class Executor>
    static void copy(Executor& ex, vector_view<const T> sent, vector_view<T> received)
    {
        expects_shape(received, "received (N)", sent.extent(0));
        expects_shape(sent, "sent (N)", sent.extent(0));
        fastmoe::for_each(ex, sent.extent(0), detail::copy_elements<T>{sent.data_handle(), received.data_handle()});
    }
};

} // namespace fastmoe::inline FASTMOE_ABI
