// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Two versions of the library in one program, and one version in two files of it.
#include <doctest/doctest.h>

#include "witness.hpp"

witness use_v0_1_here();
witness use_v9_9();
witness use_from_first();
witness use_from_second();

TEST_CASE("Two versions run in one program and share no name")
{
    const witness here = use_v0_1_here();
    const witness other = use_v9_9();
    CHECK(here.first_output == other.first_output);
    CHECK(here.first_output != 0.0);
    CHECK(here.other_output == other.other_output);
    CHECK(here.other_output == doctest::Approx(here.first_output).epsilon(1e-5));
    CHECK(here.header == other.header);
    CHECK(*here.type_of_library != *other.type_of_library);
    CHECK(*here.type_of_file != *other.type_of_file);
    CHECK(here.address_of_inline != other.address_of_inline);
}

TEST_CASE("Two files that include one version agree on its types and its variables")
{
    const witness first = use_from_first();
    const witness second = use_from_second();
    CHECK(first.first_output == second.first_output);
    CHECK(first.other_output == second.other_output);
    CHECK(*first.type_of_library == *second.type_of_library);
    CHECK(*first.type_of_file == *second.type_of_file);
    CHECK(first.address_of_inline == second.address_of_inline);
}
