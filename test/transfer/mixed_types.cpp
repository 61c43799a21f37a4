// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Types that differ: whatever the rows, the weights and the output are kept in, sums run in the widest of them.
#include <doctest/doctest.h>

#include <fastmoe/transfer/combine.hpp>

#include "support/compare.hpp"
#include "support/executors.hpp"
#include "support/poison.hpp"
#include "support/scratch.hpp"
#include "support/warps.hpp"

using namespace fastmoe;

namespace {

/// Two choices a token, both kept, whose rows stand in choice order.
struct pairs {
    static constexpr int64_t tokens = 5, experts = 10, width = 70;
    std::vector<int32_t> ids;
    std::vector<float> weights;
    std::vector<std::byte> memory = std::vector<std::byte>(1 << 14);
    routing<float> route;
    plan p;

    pairs(auto& ex, support::random& r)
    {
        for (int32_t c = 0; c < 2 * tokens; ++c) ids.push_back(c), weights.push_back(static_cast<float>(r.uniform(0.1, 1)));
        route = {tokens, experts, 2, as_vector(ids), as_vector(weights), {}};
        const auto at = reinterpret_cast<std::uintptr_t>(memory.data());
        arena a(vector_view<std::byte>(memory.data() + (256 - at % 256) % 256, (1 << 14) - 256));
        p = reserve_plan(a, tokens, 2 * tokens, experts);
        make_plan(ex, route, p, a);
        ex.synchronize();
    }
};

constexpr double unit = 0x1p-53;

} // namespace

TEST_CASE_TEMPLATE("rows of double are combined in double, and so is their weights' gradient, though the weights are float", Cell,
                   FASTMOE_EXECUTORS_AND_WARPS)
{
    FASTMOE_SEEDED(r, 301);
    FASTMOE_EXECUTOR(ex, Cell);
    pairs in(ex, r);
    support::guarded<double> rows(10, pairs::width), dy(pairs::tokens, pairs::width), y(pairs::tokens, pairs::width);
    support::guarded<float> dweights(10);
    support::fill_normal(r, rows.view());
    support::fill_normal(r, dy.view());
    combine(ex, rows.view(), in.route, in.p, y.view());
    combine_weights_backward<typename Cell::executor, double>(ex, dy.view(), rows.view(), in.route, in.p, dweights.vector());
    ex.synchronize();
    int64_t wrong = 0;
    for (int64_t t = 0; t < pairs::tokens; ++t) {
        for (int64_t d = 0; d < pairs::width; ++d) {
            const double a = double(in.weights[2 * t]) * rows.view()(2 * t, d), b = double(in.weights[2 * t + 1]) * rows.view()(2 * t + 1, d);
            wrong += !(std::fabs(y.view()(t, d) - (a + b)) <= 4 * unit * (std::fabs(a) + std::fabs(b)));
        }
        for (int64_t c = 2 * t; c < 2 * t + 2; ++c) {
            double dot = 0;
            for (int64_t d = 0; d < pairs::width; ++d) dot += dy.view()(t, d) * rows.view()(c, d);
            wrong += !(std::fabs(dweights.data()[c] - dot) <= 0x1p-24 * std::fabs(dot) + 0x1p-40); // rounded once
        }
    }
    CHECK(wrong == 0);
}

TEST_CASE_TEMPLATE("what is added to an output in double keeps its digits", Cell, FASTMOE_EXECUTORS_AND_WARPS)
{
    FASTMOE_SEEDED(r, 302);
    FASTMOE_EXECUTOR(ex, Cell);
    pairs in(ex, r);
    support::guarded<float> rows(10, pairs::width);
    support::guarded<double> y(pairs::tokens, pairs::width);
    support::fill_normal(r, rows.view(), 1e-5);
    std::fill_n(y.data(), pairs::tokens * pairs::width, 1.0);
    combine(ex, rows.view(), in.route, in.p, y.view(), write_mode::accumulate);
    ex.synchronize();
    int64_t wrong = 0;
    for (int64_t t = 0; t < pairs::tokens; ++t)
        for (int64_t d = 0; d < pairs::width; ++d) {
            double expected = 1;
            for (int64_t c = 2 * t; c < 2 * t + 2; ++c) expected += double(in.weights[c]) * double(rows.view()(c, d));
            wrong += !(std::fabs(y.view()(t, d) - expected) <= 8 * unit);
        }
    CHECK(wrong == 0);
}
