// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <string>

#include <fastmoe/comm/threads.hpp>
#include <fastmoe/routing/load.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

#include "support/executors.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
using fm::int64_t;

namespace {

template <class Executor, class Communicator = fm::self>
fm::load_report report_of(Executor& ex, const std::vector<int32_t>& chosen, const std::vector<int32_t>& kept,
                          int64_t experts, const Communicator& c = {})
{
    const auto before = support::upload(ex, chosen), after = support::upload(ex, kept);
    fm::buffer<fm::load_report, Executor> out(ex, 1);
    support::in_workspace(ex, [&](fm::arena& scratch) {
        fm::measure_load(ex, before.view(), after.view(), experts, c, out.view(), scratch);
    });
    return support::download(ex, out.view())[0];
}

void is(const fm::load_report& r, double cv, double max_over_min, double max_over_mean, double dropped)
{
    CHECK(std::fabs(r.cv - cv) < 1e-12);
    CHECK((r.max_over_min == max_over_min || std::fabs(r.max_over_min - max_over_min) < 1e-12));
    CHECK(std::fabs(r.max_over_mean - max_over_mean) < 1e-12);
    CHECK(std::fabs(r.dropped - dropped) < 1e-12);
}

} // namespace

TEST_CASE_TEMPLATE("the load of small cases by hand", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    is(report_of(ex, {0, 1, 2, 3}, {0, 1, 2, 3}, 4), 0, 1, 1, 0);
    is(report_of(ex, {0, 0, 0, 1}, {0, -1, -1, 1}, 2), 0.5, 3, 1.5, 0.5); // counts 3, 1
    is(report_of(ex, {2, 2}, {2, 2}, 3), std::sqrt(2.0), INFINITY, 3, 0);
    is(report_of(ex, {0, -1, 1, -1}, {0, -1, -1, -1}, 2), 0, 1, 1, 0.5); // what was never chosen was not dropped
    is(report_of(ex, {-1, -1}, {-1, -1}, 5), 0, 1, 1, 0);
    is(report_of(ex, {}, {}, 5), 0, 1, 1, 0);
    is(report_of(ex, {0, 0}, {0, 0}, 1), 0, 1, 1, 0);
}

TEST_CASE("the load over ranks is that of all their choices")
{
    FASTMOE_SEEDED(rng, 96);
    std::vector<int32_t> chosen, kept;
    for (int i = 0; i < 5000; ++i) {
        chosen.push_back(static_cast<int32_t>(rng.integer(-1, 11)));
        kept.push_back(rng.coin(0.9) ? chosen.back() : -1);
    }
    fm::host_executor one({.threads = 2});
    const auto joined = report_of(one, chosen, kept, 12);
    CHECK((joined.cv > 0 && joined.dropped > 0.05));
    fm::run_ranks(3, [&](const fm::threads& c) {
        fm::host_executor ex({.threads = 1});
        const int from[] = {0, 1000, 1000, 5000};
        const auto part = [&](const std::vector<int32_t>& v) {
            return std::vector<int32_t>(v.begin() + from[c.rank()], v.begin() + from[c.rank() + 1]);
        };
        const auto r = report_of(ex, part(chosen), part(kept), 12, c);
        is(r, joined.cv, joined.max_over_min, joined.max_over_mean, joined.dropped);
    });
}

TEST_CASE_TEMPLATE("counts are those of a loop, overwritten or added to, and ids out of range are named", Cell,
                   FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 97);
    for (int64_t n : {0, 1, 4000}) {
        std::vector<int32_t> chosen;
        std::vector<int64_t> expected(7, 0);
        for (int64_t i = 0; i < n; ++i) {
            chosen.push_back(static_cast<int32_t>(rng.integer(-1, 6)));
            if (chosen.back() >= 0) ++expected[chosen.back()];
        }
        const auto ids = support::upload(ex, chosen);
        auto counts = support::upload(ex, std::vector<int64_t>(7, 1000));
        const auto count = [&](fm::write_mode mode) {
            support::in_workspace(
                ex, [&](fm::arena& scratch) { fm::count_choices(ex, ids.view(), counts.view(), mode, scratch); });
            return support::download(ex, counts.view());
        };
        CHECK_EQ(count(fm::write_mode::overwrite), expected);
        for (int64_t& e : expected) e *= 2;
        CHECK_EQ(count(fm::write_mode::accumulate), expected);
    }
    const std::string text = support::message_of<fm::invalid_argument>([&] { report_of(ex, {0, 5, 1}, {0, -1, 1}, 5); });
    CHECK(support::has(text, "routing.experts(1) is 5; expected -1 or an id below E"));
    CHECK(support::has(support::message_of<fm::invalid_argument>([&] { report_of(ex, {0}, {0}, 0); }), "experts is 0"));
    CHECK(support::has(support::message_of<fm::invalid_argument>([&] { report_of(ex, {0}, {0, 1}, 3); }),
                       "kept (C) is of shape (2); expected (1)"));
}

using namespace fastmoe;

TEST_CASE("scratch comes back when a verb throws, by its workspace or by its communicator")
{
    host_executor ex({.threads = 1});
    const std::vector<int32_t> chosen{0, 1, 1, 2};
    std::vector<load_report> report(1);
    arena measure;
    measure_load(ex, as_vector(chosen), as_vector(chosen), 3, self{}, vector_view<load_report>(report.data(), 1), measure);
    support::workspace small(ex, measure.bytes() - 1);
    CHECK_THROWS_AS(measure_load(ex, as_vector(chosen), as_vector(chosen), 3, self{}, vector_view<load_report>(report.data(), 1), small.arena()),
                    out_of_memory);
    CHECK_EQ(small.arena().used(), 0);

    support::workspace enough(ex, measure.bytes());
    CHECK_THROWS_AS(run_ranks(2,
                              [&](const threads& c) {
                                  if (c.rank() == 1) return; // gone
                                  measure_load(ex, as_vector(chosen), as_vector(chosen), 3, c, vector_view<load_report>(report.data(), 1),
                                               enough.arena());
                              }),
                    comm_error);
    CHECK_EQ(enough.arena().used(), 0);
}
