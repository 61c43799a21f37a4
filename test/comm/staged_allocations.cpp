// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What a staged communicator takes, it takes when it is made.
#include <doctest/doctest.h>

#include <cstdint>
#include <vector>

#include <fastmoe/comm/staged.hpp>
#include <fastmoe/comm/threads.hpp>

#include "support/allocations.hpp"

namespace fm = fastmoe;
using fm::int64_t;

namespace {

/// Loops that allocate nothing, over memory that only they are thought to reach.
struct unread : fm::host_executor {
    using host_executor::host_executor;
    static constexpr bool readable_memory = false;
};
static_assert(!fm::has_readable_memory<unread>);

} // namespace

TEST_CASE("no staged collective allocates, in whole or in parts")
{
    int64_t made[3] = {-1, -1, -1};
    fm::host_memory heap;
    fm::run_ranks(3, [&](const fm::threads& c) {
        unread ex({.threads = 1});
        const fm::staged s(c, 2000, heap);
        std::vector<float> one(900, 1.f), all(900);
        const std::vector<int64_t> counts(3, 40);
        const auto run = [&](int64_t n) {
            const auto head = [n](std::vector<float>& v, int64_t blocks) { return fm::slice(fm::as_vector(v), 0, blocks * n); };
            s.all_reduce(ex, head(one, 1));
            s.reduce_scatter(ex, head(one, 3), head(all, 1));
            s.all_gather(ex, head(one, 1), head(all, 3));
            s.all_to_all(ex, head(one, 3), head(all, 3));
            s.broadcast(ex, head(one, 1), 2);
            s.all_to_all_v(ex, fm::matrix_view<const float>(one.data(), 120, 7), fm::as_vector(counts),
                           fm::matrix_view<float>(all.data(), 120, 7), fm::as_vector(counts));
            s.barrier(ex);
        };
        run(300); // whatever is made once has been made
        const support::allocations before;
        s.barrier(ex);
        run(10);
        run(300);
        made[c.rank()] = before.since() + before.mallocs();
        s.barrier(ex);
    });
    for (const int64_t m : made) CHECK_EQ(m, 0);
}
