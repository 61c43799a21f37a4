// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A rank is lost in the middle of a message, and goes on later: what arrives then does so in memory that is nobody else's.
#include <doctest/doctest.h>

#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include <fastmoe/comm/hierarchical.hpp>
#include <fastmoe/comm/rendezvous.hpp>
#include <fastmoe/comm/staged.hpp>
#include <fastmoe/comm/threads.hpp>
#include <fastmoe/exec/host_executor.hpp>

#include "support/communicator_cases.hpp"
#include "support/compare.hpp"
#include "support/losing_communicator.hpp"
#include "support/queued.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
using fm::int64_t;
using losing = support::losing_communicator<fm::threads>;

static_assert(fm::communicator<losing, fm::host_executor>);

namespace {

/// each(communicator, executor) on two ranks that lose each other in call 0, 1, and so on, until there is no such call.
/// Returns how many calls there were whose data lay in memory of the executor.
template <class Make, class Each>
int64_t lose_at_every_call(const Make& make, const Each& each)
{
    int64_t within = 0;
    for (int64_t at = 0;; ++at) {
        support::loss lost[2];
        support::remembering_memory memory[2];
        bool thrown[2] = {};
        fm::run_ranks(2, [&](const fm::threads& c) {
            const int r = c.rank();
            fm::host_executor ex({.threads = 1, .memory = &memory[r]});
            std::vector<float> kept; // the caller's memory stays
            {
                auto made = make(losing(c, lost[r]));
                lost[r].calls = 0; // those of the making are others
                lost[r].lose_at = at;
                try {
                    each(made, ex, kept);
                } catch (const fm::comm_error& e) {
                    thrown[r] = true;
                    CHECK(e.messages_pending);
                    if constexpr (!std::is_same_v<decltype(made), losing>) CHECK_THROWS_AS(each(made, ex, kept), fm::comm_error);
                }
            }
            c.barrier(ex);
            lost[r].arrive(); // memory of the communicator's own: for AddressSanitizer to look at
        });
        CHECK_EQ(thrown[0], lost[0].happened());
        CHECK_EQ(thrown[1], lost[1].happened());
        for (int r = 0; r < 2; ++r) {
            CHECK_EQ(memory[r].lost(lost[r]), 0);
            within += memory[r].within(lost[r]);
        }
        if (!lost[0].happened()) {
            CHECK(at > 1);
            return within;
        }
    }
}

struct two_levels {
    int node_size;
    auto operator()(const losing& c) const { return fm::make_hierarchical(c, node_size); }
};

} // namespace

TEST_CASE("two levels never give back staging memory, or tables of their own, that late messages may come to")
{
    for (const int node_size : {1, 2}) {
        CAPTURE(node_size);
        const two_levels make{node_size};
        const int64_t n = 1000;
        const auto all = [&](const auto& verb) {
            return lose_at_every_call(make, [&](const auto& c, auto& ex, std::vector<float>& kept) {
                kept.resize(static_cast<std::size_t>(4 * n), 1.f);
                verb(c, ex, fm::vector_view<const float>(kept.data(), n), fm::vector_view<float>(kept.data() + 2 * n, n));
            });
        };
        using in = fm::vector_view<const float>;
        using out = fm::vector_view<float>;
        all([&](const auto& c, auto& ex, in, out o) { c.all_reduce(ex, o); });
        CHECK(all([&](const auto& c, auto& ex, in i, out o) { c.reduce_scatter(ex, i, fm::slice(o, 0, n / 2)); }) > 0);
        CHECK(all([&](const auto& c, auto& ex, in i, out o) { c.all_gather(ex, fm::slice(i, 0, n / 2), o); }) > 0);
        CHECK(all([&](const auto& c, auto& ex, in i, out o) { c.all_to_all(ex, i, o); }) > 0);
        CHECK(all([&](const auto& c, auto& ex, in i, out o) {
                  const std::vector<int64_t> half(2, n / 2);
                  const fm::vector_view<const int64_t> rows(half.data(), 2);
                  c.all_to_all_v(ex, fm::matrix_view<const float>(i.data_handle(), n, 1), rows,
                                 fm::matrix_view<float>(o.data_handle(), n, 1), rows);
              }) > 0);
        // Only the root's place crosses over, so with one rank a node alone both make the same calls.
        if (node_size == 1) CHECK_EQ(all([&](const auto& c, auto& ex, in, out o) { c.broadcast(ex, o, 1); }), 0);
    }
}

TEST_CASE("a workspace that late messages may come to is refused by what was split from the communicator that lost a rank")
{
    std::string told[2];
    support::loss lost[2];
    alignas(256) static std::byte lent[2][1 << 16]; // it stays
    fm::run_ranks(2, [&](const fm::threads& c) {
        fm::host_executor ex({.threads = 1});
        auto& mine = lost[c.rank()];
        const losing flat(c, mine);
        const auto whole = fm::make_hierarchical(flat, 1, fm::vector_view<std::byte>(lent[c.rank()], 1 << 16));
        const auto part = whole.split(0, c.rank());
        std::vector<float> x(100, 1.f), y(200);
        const auto gather = [&](const auto& over) {
            over.all_gather(ex, fm::vector_view<const float>(fm::as_vector(x)), fm::as_vector(y));
        };
        gather(part);
        CHECK_EQ(y, std::vector<float>(200, 1.f));
        mine.lose_at = mine.calls + 2; // metadata take two
        CHECK_THROWS_WITH(gather(whole), doctest::Contains("a rank was lost"));
        const std::byte* to = mine.late.back().begin;
        CHECK(to >= lent[c.rank()]);
        CHECK(to < lent[c.rank()] + sizeof lent[0]);
        told[c.rank()] = support::message_of<fm::comm_error>([&] { gather(part); });
    });
    for (const auto& t : told) CHECK(support::has(t, "the workspace may still be written to"));
}

TEST_CASE("staging memory that late messages may come to is left alone: taken anew from a resource, refused if it was lent")
{
    const int64_t bytes = 1024;
    for (const bool is_lent : {false, true}) {
        CAPTURE(is_lent);
        support::loss lost[2];
        support::remembering_memory memory[2];
        alignas(256) static std::byte lent[2][1024]; // it stays
        std::string told[2];
        fm::run_ranks(2, [&](const fm::threads& c) {
            const int r = c.rank();
            support::queued ex;
            const losing flat(c, lost[r]);
            using made = fm::staged<losing>;
            const made whole = is_lent ? made(flat, fm::vector_view<std::byte>(lent[r], bytes)) : made(flat, bytes, memory[r]);
            const auto part = whole.split(0, r);
            std::optional<made> other(whole.split(0, r));
            auto x = support::upload(ex, std::vector<float>(900, 1.f + static_cast<float>(r)));
            fm::buffer<float, support::queued> y(ex, 900);
            lost[r].lose_at = lost[r].calls + 1; // once they have met
            CHECK_THROWS_WITH(other->all_to_all(ex, x.view(), y.view()), doctest::Contains("a rank was lost"));
            REQUIRE(lost[r].happened());
            const auto again = [&] {
                part.all_to_all(ex, x.view(), y.view());
                lost[r].arrive();
                part.all_gather(ex, fm::vector_view<const float>(fm::slice(x.view(), 0, 450)), y.view());
                lost[r].arrive();
            };
            other.reset();
            if (is_lent)
                told[r] = support::message_of<fm::comm_error>(again);
            else {
                again();
                support::is(ex, y.view(), [&](int64_t i) { return i < 450 ? 1.f : 2.f; });
            }
        });
        for (int r = 0; r < 2 && is_lent; ++r) CHECK(support::has(told[r], "the staging memory may still be written to"));
        for (int r = 0; r < 2 && !is_lent; ++r) {
            CHECK_EQ(memory[r].lost(lost[r]), 0);
            CHECK(memory[r].within(lost[r]) > 0);
            CHECK_EQ(memory[r].given_back(), 1); // what was taken in its place
        }
    }
}

TEST_CASE("a staged communicator that lost a rank while they met never gives back its tables")
{
    support::loss lost[2];
    support::remembering_memory memory[2];
    fm::run_ranks(2, [&](const fm::threads& c) {
        const int r = c.rank();
        support::queued ex;
        {
            const fm::staged<losing> s(losing(c, lost[r]), 1024, memory[r]);
            fm::buffer<float, support::queued> x(ex, 40), y(ex, 40);
            lost[r].lose_at = 0;
            CHECK_THROWS_WITH(s.all_to_all(ex, x.view(), y.view()), doctest::Contains("a rank was lost"));
        }
        lost[r].arrive();
    });
    CHECK(lost[0].happened());
    CHECK_EQ(memory[0].given_back(), 1); // nothing had come to the staging memory
}

TEST_CASE("a value that is shared over ranks goes through memory that nobody else gets")
{
    const int64_t within = lose_at_every_call([](const losing& c) { return c; }, [](const losing& c, auto& ex, std::vector<float>&) {
        int value = 3;
        fm::share_over(ex, c, value);
        fm::share_over(ex, c, value);
        if (c.rank() < 0) throw value;
    });
    CHECK_EQ(within, 4 * 2); // two calls, on two ranks, each sent from and received into
}
