// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Between the host's memory and the executor's: the one place where the program knows that these may be two. A new
/// executor whose memory the host cannot reach overloads these two functions.
#pragma once

#include <cstring>
#include <vector>

#include "train_gpt/team_math.hpp"

namespace train_gpt {

/// The elements of a view, once all work before is done.
template <class Executor, class T>
std::vector<std::remove_const_t<T>> to_host(Executor& ex, vector_view<T> from)
{
    ex.synchronize();
    std::vector<std::remove_const_t<T>> out(static_cast<std::size_t>(from.extent(0)));
    if (!out.empty()) std::memcpy(out.data(), from.data_handle(), out.size() * sizeof(T));
    return out;
}

/// Overwrites a view with as many elements from the host.
template <class Executor, class T>
void to_executor(Executor& ex, const type_identity_t<T>* from, vector_view<T> to)
{
    ex.synchronize();
    if (to.extent(0) > 0)
        std::memcpy(to.data_handle(), from, static_cast<std::size_t>(to.extent(0)) * sizeof(T));
}

} // namespace train_gpt
