// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <cstdint>
#include <vector>

#include <fastmoe/comm/threads.hpp>

#include "support/counting_communicator.hpp"
#include "support/executors.hpp"

namespace fm = fastmoe;
using fm::int64_t;
using counted = support::counting_communicator<fm::threads>;

static_assert(fm::communicator<counted, fm::host_executor>);
static_assert(fm::communicator<support::counting_communicator<fm::self>, support::lanes>);

TEST_CASE("every collective is counted by receiver as its plain algorithm sends it, and gives what the counted one gives")
{
    fm::run_ranks(3, [](const fm::threads& world) {
        fm::host_executor ex({.threads = 1});
        const counted c(world);
        const int me = c.rank();
        std::vector<double> a(12, me + 1.0), b(12), four(4, me + 1.0);
        const auto first = [](std::vector<double>& v, int64_t n) { return fm::slice(fm::as_vector(v), 0, n); };
        for (int round = 1; round <= 2; ++round) {
            c.all_gather(ex, first(a, 4), fm::as_vector(b));
            CHECK_EQ(b, std::vector<double>{1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3});
            c.all_to_all(ex, fm::as_vector(a), fm::as_vector(b));
            CHECK_EQ(b, std::vector<double>{1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3});
            c.reduce_scatter(ex, fm::as_vector(a), first(b, 4));
            CHECK_EQ(b[3], 6.0);
            for (int r = 0; r < 3; ++r) {
                const support::traffic four_each{r == me ? 0 : round * 4 * 8, r == me ? 0 : round};
                CHECK_EQ(c.log().of("all_gather", r), four_each);
                CHECK_EQ(c.log().of("all_to_all", r), four_each);
                CHECK_EQ(c.log().of("reduce_scatter", r), four_each);
            }
        }
        CHECK_EQ(c.log().calls("all_gather"), 2);
        CHECK_EQ(c.log().of(), support::traffic{3 * 2 * 2 * 32, 3 * 2 * 2});

        c.log().reset();
        CHECK_EQ(c.log().of(), support::traffic{});
        c.all_reduce(ex, fm::as_vector(four)); // shares of 2, 1 and 1: out, and the own one back
        CHECK_EQ(four, std::vector<double>(4, 6.0));
        const auto share = [](int r) { return r == 0 ? 2 : 1; };
        for (int r = 0; r < 3; ++r)
            if (r != me) CHECK_EQ(c.log().of("all_reduce", r), support::traffic{8 * (share(r) + share(me)), 2});

        c.broadcast(ex, fm::as_vector(four), 1);
        CHECK_EQ(c.log().of("broadcast"), me == 1 ? support::traffic{2 * 32, 2} : support::traffic{});
        c.barrier(ex);
        CHECK_EQ(c.log().of("barrier"), support::traffic{});
        CHECK_EQ(c.log().calls("barrier"), 1);
    });
}

TEST_CASE("rows are counted where there are any, and a split has a log of its own")
{
    fm::run_ranks(4, [](const fm::threads& world) {
        fm::host_executor ex({.threads = 1});
        const counted c(world);
        const int me = c.rank();
        std::vector<int64_t> out(4), in(4); // me + r rows to r, but none to rank 0
        int64_t sent = 0, received = 0;
        for (int r = 0; r < 4; ++r) {
            out[r] = r == 0 ? 0 : me + r;
            in[r] = me == 0 ? 0 : me + r;
            sent += out[r], received += in[r];
        }
        std::vector<fm::bfloat16> a(sent * 3), b(received * 3);
        c.all_to_all_v(ex, fm::as_matrix(a, sent, 3), fm::as_vector(out), fm::as_matrix(b, received, 3), fm::as_vector(in));
        for (int r = 0; r < 4; ++r) {
            const bool moves = r != me && r != 0;
            CHECK_EQ(c.log().of("all_to_all_v", r), support::traffic{moves ? (me + r) * 3 * 2 : 0, moves});
        }
        const counted copy = c, half = c.split(me / 2, 0);
        const auto before = c.log().of();
        std::vector<float> v(4);
        half.all_reduce(ex, fm::as_vector(v));
        CHECK_EQ(half.log().of("all_reduce", 1 - half.rank()), support::traffic{4 * 4, 2});
        CHECK_EQ(c.log().of(), before);
        copy.barrier(ex);
        CHECK_EQ(c.log().calls("barrier"), 1);
    });
}
