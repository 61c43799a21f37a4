// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Calls that say how much scratch they take, held to it.
#pragma once

#include <cstddef>

#include <doctest/doctest.h>

#include <fastmoe/exec/memory.hpp>

#include "poison.hpp"

namespace support {

/// A call on a poisoned workspace of exactly what it asks for, and once more on one that is a byte too small.
template <class Executor, class Call>
void with_exact_scratch(Executor& ex, const Call& call)
{
    fastmoe::arena query;
    call(query);
    fastmoe::buffer<std::byte, Executor> lent(ex, query.bytes());
    poison(lent.view());
    fastmoe::arena scratch(lent.view());
    call(scratch);
    ex.synchronize();
    CHECK_EQ(scratch.used(), 0);
    if (query.bytes() == 0) return;
    fastmoe::arena little(fastmoe::slice(lent.view(), 0, query.bytes() - 1));
    CHECK_THROWS_AS(call(little), fastmoe::out_of_memory);
}

} // namespace support
