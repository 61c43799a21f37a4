// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Verbs of several threads on one executor: a caller whose routing is sound never hears of another's mistake.
#include <doctest/doctest.h>

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include <fastmoe/routing/plan.hpp>

#include "support/executors.hpp"
#include "support/scratch.hpp"

using namespace fastmoe;

TEST_CASE("make_plan reports a bad id to the thread that brought it, in every round")
{
    host_executor ex({.threads = 2});
    const int64_t tokens = 40, experts = 8, k = 2;
    std::atomic<int> wrong{0};
    const auto plan_often = [&](int32_t first_id) {
        std::vector<int32_t> ids(tokens * k);
        for (int64_t c = 0; c < tokens * k; ++c) ids[c] = static_cast<int32_t>(c % experts);
        ids[0] = first_id;
        std::vector<float> weights(tokens * k, 0.5f);
        const routing<float> route{tokens, experts, k, as_vector(ids), as_vector(weights), {}};
        arena measure;
        const auto run = [&](arena& memory) {
            const plan p = reserve_plan(memory, tokens, tokens * k, experts);
            make_plan(ex, route, p, memory);
        };
        run(measure);
        support::workspace memory(ex, measure.bytes());
        for (int round = 0; round < 400; ++round) {
            memory.arena().rewind(0);
            const std::string text = support::message_of<invalid_argument>([&] { run(memory.arena()); });
            wrong += first_id < 0 ? !support::has(text, "routing.experts(0) is -5") : text != "nothing was thrown";
        }
    };
    ex.faults().record(fault_kind::token_out_of_range, 3, 77); // as a verb of this thread that is not done yet
    std::thread good([&] { plan_often(0); }), bad([&] { plan_often(-5); });
    good.join();
    bad.join();
    CHECK(wrong == 0);
    CHECK_THROWS_WITH_AS(ex.deliver_faults(), doctest::Contains("token_ids(3) is 77"), invalid_argument);
}
