// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Errors name the argument, its value, what was expected, and the line that refused.
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include <doctest/doctest.h>

#include <fastmoe/core/error.hpp>

namespace fm = fastmoe;

namespace {

std::string message_of(const auto& f)
{
    try {
        f();
    } catch (const fm::error& e) {
        return e.what();
    }
    return "nothing was thrown";
}

struct counted {
    int* made;
};
std::string to_text(const counted& c)
{
    ++*c.made;
    return "counted";
}

} // namespace

TEST_CASE("a refusal reads: argument is value; expected what, and where")
{
    int line = 0;
    const std::string text = message_of([&line] {
        line = __LINE__ + 1;
        fm::expects(false, "k", 9, "at most E = ", std::int64_t{8}, " experts");
    });
    CHECK(text == "fastmoe: k is 9; expected at most E = 8 experts [error.cpp:" + std::to_string(line) + "]");
}

TEST_CASE("numbers, truths, strings and pointers can stand in the text")
{
    CHECK(message_of([] {
              fm::expects(false, "scale", -0.5, "more than ", 0);
          }).find("scale is -0.5; expected more than 0") != std::string::npos);
    CHECK(message_of([] { fm::expects(false, "flag", true, std::string("it to be "), false); })
              .find("flag is true; expected it to be false") != std::string::npos);
    CHECK(message_of([] { fm::expects(false, "n", std::uint64_t{18446744073709551615u}, "less"); })
              .find("n is 18446744073709551615; expected less") != std::string::npos);
    CHECK(message_of([] {
              fm::expects(false, "p", reinterpret_cast<const void*>(0x1234), "null");
          }).find("p is 0x1234; ") != std::string::npos);
}

TEST_CASE("nothing is put into words while the condition holds")
{
    int made = 0;
    fm::expects(true, "argument", counted{&made}, counted{&made});
    CHECK(made == 0);
    CHECK_THROWS_AS(fm::expects(false, "argument", counted{&made}, counted{&made}), fm::invalid_argument);
    CHECK(made == 2);
}

TEST_CASE("every kind of failure is its own type below fastmoe::error, and a standard runtime_error")
{
    CHECK_THROWS_AS(fm::raise<>("x"), fm::invalid_argument);
    CHECK_THROWS_AS(fm::raise<fm::out_of_memory>("x"), fm::out_of_memory);
    CHECK_THROWS_AS(fm::raise<fm::cuda_error>("x"), fm::cuda_error);
    CHECK_THROWS_AS(fm::raise<fm::comm_error>("x"), fm::comm_error);
    CHECK_THROWS_AS(fm::raise<fm::format_error>("x"), fm::format_error);
    CHECK_THROWS_AS(fm::expects<fm::out_of_memory>(false, "x", 1, 2), fm::out_of_memory);
    static_assert(std::is_base_of_v<fm::error, fm::format_error> && std::is_base_of_v<std::runtime_error, fm::error>);
    static_assert(!std::is_base_of_v<fm::invalid_argument, fm::out_of_memory>);
}
