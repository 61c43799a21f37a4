// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// With the caller's workspace, nothing between backward and the step allocates.
#include <doctest/doctest.h>

#include <thread>
#include <vector>

#include <fastmoe/comm/threads.hpp>
#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/parallel/broadcast_parameters.hpp>
#include <fastmoe/parallel/gradient_norm.hpp>
#include <fastmoe/parallel/gradients.hpp>

#include "support/allocations.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
using fm::int64_t;

TEST_CASE("no step of synchronization, clipping, looking or broadcasting allocates on two ranks with a workspace")
{
    int64_t made[2] = {-1, -1};
    fm::run_ranks(2, [&](const fm::threads& c) {
        fm::host_executor ex({.threads = 2});
        std::vector<float> a(3000, 1.f), b(50, 2.f);
        std::vector<fm::bfloat16> d(70, fm::bfloat16(1.f));
        const fm::parameter_view list[] = {
            fm::as_parameter(fm::as_vector(a), fm::as_vector(a), fm::parameter_tag::world),
            fm::as_parameter(fm::as_vector(b), fm::as_vector(b), fm::parameter_tag::data),
            fm::as_parameter(fm::as_vector(d), fm::as_vector(d), fm::parameter_tag::world)};
        const fm::vector_view<const fm::parameter_view> all(list, 3);
        const fm::synchronize_options options{.bucket_bytes = 1000, .accumulate = fm::gradient_accumulation::float32};
        const auto step = [&](fm::arena& scratch) {
            fm::broadcast_parameters(ex, all, c, c, scratch);
            fm::synchronize_gradients(ex, all, c, c, options, scratch);
            const bool finite = fm::all_finite(ex, all, c, scratch);
            const double norm = fm::clip_gradients(ex, all, c, c, 0.5, scratch);
            return scratch.measuring() || (finite && norm > 0.5);
        };
        fm::arena measure;
        step(measure);
        support::workspace memory(ex, measure.bytes());
        CHECK(step(memory)); // whatever is made once has been made
        c.barrier(ex);
        const support::allocations before;
        c.barrier(ex);
        const bool done = step(memory);
        c.barrier(ex);
        made[c.rank()] = before.since() + before.mallocs();
        c.barrier(ex);
        CHECK(done);
        CHECK_EQ(memory.arena().used(), 0);
    });
    CHECK_EQ(made[0], 0);
    CHECK_EQ(made[1], 0);
}
