// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <vector>

#include <fastmoe/expert/initialize.hpp>
#include <fastmoe/expert/layout.hpp>

#include "support/compare.hpp"
#include "support/executors.hpp"

using namespace fastmoe;

namespace {

/// Every element tells where it belongs.
double code(int64_t e, int64_t o, int64_t i) { return double(e * 100 + o * 10 + i); }

template <class T>
bool holds(const weight_view<T>& w, auto row)
{
    for (int64_t e = 0; e < w.experts; ++e)
        for (int64_t o = 0; o < w.out; ++o)
            for (int64_t i = 0; i < w.in; ++i)
                if (double(w(e, o, i)) != code(e, row(o), i)) return false;
    return true;
}

} // namespace

TEST_CASE_TEMPLATE("weights move between layouts and types without changing what they are", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    std::vector<float> values;
    for (int64_t e = 0; e < 3; ++e)
        for (int64_t o = 0; o < 6; ++o)
            for (int64_t i = 0; i < 5; ++i) values.push_back(static_cast<float>(code(e, o, i)));
    auto memory = support::upload(ex, values);
    const auto from = stacked(tensor_view<float, 3>(memory.data(), 3, 6, 5));

    auto turned = support::upload(ex, std::vector<fastmoe::half>(90));
    const auto transposed = stacked_transposed(tensor_view<fastmoe::half, 3>(turned.data(), 3, 5, 6));
    copy_weights(ex, from, transposed);
    ex.synchronize();
    CHECK(holds(transposed, [](int64_t o) { return o; }));
    CHECK(double(turned.data()[1]) == code(0, 1, 0)); // (in,out): the next element is the next output

    auto a = support::upload(ex, std::vector<double>(30)), b = support::upload(ex, std::vector<double>(30)),
         c = support::upload(ex, std::vector<double>(30));
    auto pointers = support::upload(ex, std::vector<double*>{c.data(), a.data(), b.data()});
    const auto apart = separate(vector_view<double* const>(pointers.data(), 3), 6, 5);
    copy_weights(ex, transposed, apart);
    ex.synchronize();
    CHECK(holds(apart, [](int64_t o) { return o; }));
    CHECK(a.data()[0] == code(1, 0, 0));
}

TEST_CASE_TEMPLATE("gate and up rows are interleaved and put apart again", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    std::vector<double> values;
    for (int64_t e = 0; e < 2; ++e)
        for (int64_t o = 0; o < 8; ++o)
            for (int64_t i = 0; i < 3; ++i) values.push_back(code(e, o, i));
    auto memory = support::upload(ex, values), turns = support::upload(ex, std::vector<double>(48)), back = support::upload(ex, std::vector<double>(48));
    const auto apart = stacked(tensor_view<double, 3>(memory.data(), 2, 8, 3)), mixed = stacked(tensor_view<double, 3>(turns.data(), 2, 8, 3)),
               again = stacked(tensor_view<double, 3>(back.data(), 2, 8, 3));
    copy_gated_weights(ex, apart, gated_layout::concatenated, mixed, gated_layout::interleaved);
    copy_gated_weights(ex, mixed, gated_layout::interleaved, again, gated_layout::concatenated);
    ex.synchronize();
    CHECK(holds(mixed, [](int64_t o) { return o % 2 ? 4 + o / 2 : o / 2; })); // gate 0, up 0, gate 1, up 1, ...
    CHECK(holds(again, [](int64_t o) { return o; }));
}

TEST_CASE("layouts that do not fit are refused by name")
{
    host_executor ex({.threads = 1});
    std::vector<float> memory(1000);
    const auto w = [&](int64_t e, int64_t o, int64_t i) { return stacked(tensor_view<float, 3>(memory.data(), e, o, i)); };
    CHECK_THROWS_WITH_AS(copy_weights(ex, w(2, 3, 4), w(2, 4, 4)), doctest::Contains("from.out is 3; expected 4"), invalid_argument);
    CHECK_THROWS_AS(copy_weights(ex, w(1, 3, 4), w(2, 3, 4)), invalid_argument);
    CHECK_THROWS_WITH_AS(copy_gated_weights(ex, w(1, 3, 4), {}, w(1, 3, 4), {}), doctest::Contains("to.out is 3; expected an even number"),
                         invalid_argument);
    // Without memory, and with less of it than the matrices need.
    auto lost = w(2, 3, 4), flat = w(2, 3, 4);
    lost.data = nullptr;
    flat.expert_stride = 0;
    float* const apart[] = {memory.data(), nullptr};
    const auto pointed = separate(vector_view<float* const>(apart, 2), 3, 4);
    CHECK_THROWS_WITH_AS(copy_weights(ex, lost, w(2, 3, 4)), doctest::Contains("from (E,out,in) is a null pointer"), invalid_argument);
    CHECK_THROWS_WITH_AS(copy_weights(ex, w(2, 3, 4), lost), doctest::Contains("to (E,out,in) is a null pointer"), invalid_argument);
    CHECK_THROWS_WITH_AS(copy_weights(ex, w(2, 3, 4), flat), doctest::Contains("matrices that do not overlap"), invalid_argument);
    CHECK_THROWS_WITH_AS(copy_weights(ex, pointed, w(2, 3, 4)), doctest::Contains("memory for expert 1"), invalid_argument);
    CHECK_THROWS_WITH_AS(fill_uniform(ex, lost, 1, 0), doctest::Contains("w (E,out,in) is a null pointer"), invalid_argument);
    CHECK_THROWS_WITH_AS(fill_uniform(ex, flat, 1, 0), doctest::Contains("matrices that do not overlap"), invalid_argument);
    std::vector<float> other(24);
    CHECK_NOTHROW(copy_weights(ex, flat, stacked(tensor_view<float, 3>(other.data(), 2, 3, 4))));
}

TEST_CASE("a copy over what it reads is refused, unless every element stays where it is")
{
    host_executor ex({.threads = 1});
    std::vector<float> memory(400);
    for (std::size_t i = 0; i < memory.size(); ++i) memory[i] = float(i);
    const std::vector<float> before = memory;
    const auto at = [&](int64_t first, int64_t e, int64_t o, int64_t i) { return stacked(tensor_view<float, 3>(memory.data() + first, e, o, i)); };
    const auto refuses = [&](auto call) {
        CHECK_THROWS_WITH_AS(call(), doctest::Contains("to (E,out,in) is memory that is shared; expected none in common with from"), invalid_argument);
        CHECK(memory == before);
    };
    const auto w = at(0, 2, 4, 4);
    const auto turned = stacked_transposed(tensor_view<float, 3>(memory.data(), 2, 4, 4));
    refuses([&] { copy_gated_weights(ex, w, gated_layout::concatenated, w, gated_layout::interleaved); });
    refuses([&] { copy_weights(ex, w, turned); });
    refuses([&] { copy_weights(ex, w, at(1, 2, 4, 4)); });
    refuses([&] { copy_weights(ex, at(31, 2, 4, 4), w); });
    // The same bytes by another type.
    const weight_view<bfloat16> narrow{reinterpret_cast<bfloat16*>(memory.data()), nullptr, 2, 4, 4, 16, 4, 1};
    refuses([&] { copy_weights(ex, w, narrow); });
    CHECK_NOTHROW(copy_weights(ex, w, w));
    CHECK_NOTHROW(copy_gated_weights(ex, w, gated_layout::interleaved, w, gated_layout::interleaved));
    CHECK(memory == before);
    // Beside each other: behind, and in the same lines.
    CHECK_NOTHROW(copy_weights(ex, w, at(32, 2, 4, 4)));
    weight_view<float> left{memory.data() + 100, nullptr, 2, 4, 4, 40, 10, 1}, right = left;
    right.data += 6;
    CHECK_NOTHROW(copy_weights(ex, left, right));
    CHECK(memory[106] == memory[100]);
    CHECK(memory[106 + 40 + 33] == memory[100 + 40 + 33]);
    memory = before;
    right.data -= 3; // and columns 3 to 6 of the lines
    refuses([&] { copy_weights(ex, left, right); });
    right.data += 5; // 8 and 9, then 0 and 1 of the next lines
    refuses([&] { copy_weights(ex, left, right); });
    weight_view<float> above{memory.data() + 100, nullptr, 1, 4, 10, 100, 1, 10}, below = above; // the same, transposed
    below.data += 5;
    CHECK_NOTHROW(copy_weights(ex, above, below));
    memory = before;
    below.data -= 2;
    refuses([&] { copy_weights(ex, above, below); });
}
