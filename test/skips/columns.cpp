// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A program with one column that every machine has and one that none has.
#include <cstdlib>

#include <doctest/doctest.h>

#include "support/executors.hpp"

/// An executor whose device is never there; never made.
struct absent_executor : support::lanes {};

template <>
struct support::column<absent_executor> {
    static constexpr const char* name = "nowhere";
    static bool available() { return false; }
    static lanes make() { std::abort(); }
};

TEST_CASE_TEMPLATE("a column runs or is skipped", Cell, support::cell<fastmoe::host_executor, float>,
                   support::cell<absent_executor, float>)
{
    FASTMOE_EXECUTOR(ex, Cell);
    int ran = 0;
    ex.for_each_row(1, [&](auto&, fastmoe::int64_t) { ++ran; }, {});
    CHECK(ran == (std::getenv("FASTMOE_SKIPS_FAIL") ? 2 : 1));
}

TEST_CASE("a case that says so is on no machine")
{
    FASTMOE_NEEDS(support::cell<absent_executor, float>);
    CHECK(false);
}
