// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <cstdint>
#include <string>
#include <vector>

#include <fastmoe/comm/self.hpp>

#include "support/executors.hpp"
#include "support/poison.hpp"

namespace fm = fastmoe;
using fm::int64_t;

static_assert(fm::communicator<fm::self, fm::host_executor>);
static_assert(fm::communicator<fm::self, support::lanes>);
static_assert(fm::sums_over_ranks<fm::self, fm::host_executor, double>);
static_assert(fm::exchanges_rows<fm::self, fm::host_executor, fm::bfloat16>);
static_assert(fm::gathers_from_ranks<fm::self, fm::host_executor, std::int32_t>);
static_assert(fm::exchanges_blocks<fm::self, fm::host_executor, std::byte>);
static_assert(std::is_empty_v<fm::self>, "one rank costs a layer no memory");

namespace {

template <class F>
std::string refusal(F f)
{
    try {
        f();
    } catch (const fm::invalid_argument& e) {
        return e.what();
    }
    return "";
}

} // namespace

TEST_CASE_TEMPLATE("each collective of one rank is its definition for R = 1", Cell, FASTMOE_CELLS)
{
    using T = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 11);
    const fm::self c;
    CHECK_EQ(c.rank(), 0);
    CHECK_EQ(c.size(), 1);
    const std::vector<T> values = support::normal_vector<T>(rng, 37);
    const auto sent = support::upload(ex, values);
    auto received = fm::buffer<T, decltype(ex)>(ex, 37);
    const auto arrives = [&](auto collective) {
        support::poison(received.view());
        collective();
        const auto got = support::download(ex, received.view());
        for (int i = 0; i < 37; ++i) CHECK_EQ(double(got[i]), double(values[i]));
    };
    arrives([&] { c.all_gather(ex, sent.view(), received.view()); });
    arrives([&] { c.reduce_scatter(ex, sent.view(), received.view()); });
    arrives([&] { c.all_to_all(ex, sent.view(), received.view()); });
    c.all_reduce(ex, received.view());
    c.broadcast(ex, received.view(), 0);
    c.barrier(ex);
    const auto got = support::download(ex, received.view());
    for (int i = 0; i < 37; ++i) CHECK_EQ(double(got[i]), double(values[i]));
    CHECK_EQ(c.split(3, -1).size(), 1);
}

TEST_CASE_TEMPLATE("all_to_all_v of one rank copies the counted rows and leaves the others alone", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    const fm::self c;
    const std::vector<float> values{1, 2, 3, 4, 5, 6};
    const auto sent = support::upload(ex, values);
    support::guarded<float> received(4, 2);
    const int64_t two[] = {2};
    const fm::vector_view<const int64_t> counts(two, 1);
    const fm::matrix_view<const float> from(sent.data(), 3, 2);
    c.all_to_all_v(ex, from, counts, received.view(), counts);
    ex.synchronize();
    for (int i = 0; i < 4; ++i) CHECK_EQ(received.data()[i], values[i]);
    for (int i = 4; i < 8; ++i) CHECK(support::is_poison(received.data()[i]));
    CHECK_EQ(received.damage(), "");
}

TEST_CASE("one rank refuses what breaks the contract of a collective, and names it")
{
    fm::host_executor ex({.threads = 1});
    const fm::self c;
    std::vector<float> a(6), b(5);
    const auto contains = [](const std::string& text, const char* part) { return text.find(part) != std::string::npos; };
    CHECK(contains(refusal([&] { c.all_gather(ex, fm::as_vector(a), fm::as_vector(b)); }), "received (N) is of shape (5)"));
    CHECK(contains(refusal([&] { c.broadcast(ex, fm::as_vector(a), 1); }), "root is 1"));
    CHECK(contains(refusal([&] { (void)c.split(-1, 0); }), "color is -1"));
    const int64_t two[] = {2}, three[] = {3}, four[] = {4};
    const auto exchange = [&](const int64_t* out, const int64_t* in, int64_t width) {
        return refusal([&] {
            c.all_to_all_v(ex, fm::matrix_view<const float>(a.data(), 3, 2), fm::vector_view<const int64_t>(out, 1),
                           fm::matrix_view<float>(b.data(), 2, width), fm::vector_view<const int64_t>(in, 1));
        });
    };
    CHECK(contains(exchange(four, four, 2), "sent_rows(0) is 4"));
    CHECK(contains(exchange(two, three, 2), "received_rows(0) is 3"));
    CHECK(contains(exchange(three, three, 2), "received (M,D) is 2"));
    CHECK(contains(exchange(two, two, 1), "received (M,D) is of shape (2,1)"));
    CHECK_EQ(exchange(two, two, 2), "");
}
