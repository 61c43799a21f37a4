// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Between the host's memory and the executor's: the one place where the program knows that these may be two.
#pragma once

#include <cstring>
#include <vector>

#include "train_gpt/team_math.hpp"

namespace train_gpt {

/// An executor with memory of its own: copies are queued both ways.
template <class Executor>
concept copies_both_ways = fm::copies_to_host<Executor> &&
                           requires(Executor& ex, void* to, const void* from, int64_t bytes) { ex.copy(to, from, bytes); };

/// The elements of a view, once all work before is done.
template <class Executor, class T>
std::vector<std::remove_const_t<T>> to_host(Executor& ex, vector_view<T> from)
{
    ex.synchronize(); // throws what that work has found
    std::vector<std::remove_const_t<T>> out(static_cast<std::size_t>(from.extent(0)));
    if (out.empty()) return out;
    if constexpr (copies_both_ways<Executor>) ex.copy_to_host(out.data(), from.data_handle(), std::ssize(out) * int64_t{sizeof(T)});
    else std::memcpy(out.data(), from.data_handle(), out.size() * sizeof(T));
    return out;
}

/// Overwrites a view with as many elements from the host.
template <class Executor, class T>
void to_executor(Executor& ex, const type_identity_t<T>* from, vector_view<T> to)
{
    if (to.extent(0) == 0) return;
    ex.synchronize();
    const int64_t bytes = to.extent(0) * int64_t{sizeof(T)};
    if constexpr (copies_both_ways<Executor>) {
        ex.copy(to.data_handle(), from, bytes);
        ex.synchronize(); // `from` is the caller's again
    } else {
        std::memcpy(to.data_handle(), from, static_cast<std::size_t>(bytes));
    }
}

} // namespace train_gpt
