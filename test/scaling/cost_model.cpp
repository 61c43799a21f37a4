// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <array>
#include <cmath>
#include <vector>

#include "scaling/fit.hpp"
#include "scaling/loads.hpp"
#include "support/random.hpp"

using namespace scaling;
using doctest::Approx;

namespace {

/// P = 1e9 at every number of rows and every width.
rates flat_rates(double alpha, double beta)
{
    return {{{1, 100}, {10, 20}, {1e9, 1e9, 1e9, 1e9}}, {{1}, {1}, {2e9}}, alpha, beta};
}

} // namespace

TEST_CASE("a step is three times the products of the busiest rank and four exchanges with their metadata")
{
    const shape s{100, 20, 30, 8, 2};
    const load l{4, 250, 125, 60, 70};
    const rates r = flat_rates(1e-5, 1e-9);
    CHECK_EQ(compute_seconds(s, l, r), Approx(4.0 * 250 * 20 * 30 / 1e9));
    CHECK_EQ(row_bytes(s, l), 60 * 20 * 4);
    CHECK_EQ(metadata_bytes(l), 4 * 60 + 12 * 70 + 16 * 3);
    CHECK_EQ(exchange_seconds(1000, 4, r), Approx(3 * 1e-5 + 1000 * 1e-9));
    const double exchanges = 7 * 3 * 1e-5 + 1e-9 * (4 * 60 * 20 * 4 + 4 * 60 + 12 * 70 + 48);
    CHECK_EQ(exchanges_seconds(s, l, r), Approx(exchanges));
    CHECK_EQ(step_seconds(s, l, r), Approx(3 * 4.0 * 250 * 20 * 30 / 1e9 + exchanges));
    CHECK_EQ(router_seconds(s, r), Approx(6.0 * 100 * 8 * 20 / 2e9)); // logits, and the gradients of both that they came from
    CHECK_EQ(known_seconds(s, l, r), Approx(exchanges + 6.0 * 100 * 8 * 20 / 2e9));
    CHECK_EQ(exchanges_seconds(s, {1, 250, 125, 0, 0}, r), 0); // one rank sends nothing
}

TEST_CASE("overlapping saves at most the shorter of compute and exchange, as the paper's roofline says")
{
    const shape s{100, 20, 30, 8, 2};
    const load l{4, 250, 125, 60, 70};
    for (const double beta : {1e-10, 1e-7, 1e-6}) {
        const rates r = flat_rates(1e-7, beta);
        const double ratio = compute_to_exchange(s, l, r), compute = 3 * compute_seconds(s, l, r);
        CHECK_EQ(overlapped_seconds(s, l, r), Approx(compute / std::min(1.0, ratio)));
        CHECK(overlapped_seconds(s, l, r) <= step_seconds(s, l, r));
        CHECK_EQ(ratio, Approx(compute / exchanges_seconds(s, l, r)));
    }
}

TEST_CASE("throughput is what was measured at its points, geometric in the middle, and constant outside")
{
    const throughput t{{1, 16, 64}, {32, 128}, {1e9, 2e9, 4e9, 8e9, 9e9, 16e9}};
    CHECK_EQ(t.at(1, 32), Approx(1e9));
    CHECK_EQ(t.at(16, 128), Approx(8e9));
    CHECK_EQ(t.at(64, 128), Approx(16e9));
    CHECK_EQ(t.at(4, 32), Approx(2e9));    // halfway from 1 to 16 rows in logarithms
    CHECK_EQ(t.at(1, 64), Approx(std::sqrt(2.0) * 1e9));
    CHECK_EQ(t.at(4, 64), Approx(2e9 * std::sqrt(2.0)));
    CHECK_EQ(t.at(0.1, 1), Approx(1e9));
    CHECK_EQ(t.at(1e6, 1e6), Approx(16e9));
    CHECK_EQ(t.at(1e6, 32), Approx(9e9));
    CHECK_EQ(throughput{{8}, {8}, {5e9}}.at(3, 90), Approx(5e9));
}

TEST_CASE("a token crosses once to each other rank that holds one of its experts, with all its choices there")
{
    load_counter c(4, 8); // two experts a rank
    const int tokens[][3] = {{0, 1, -1}, {2, 3, 0}, {7, 6, 4}, {5, 5 - 5, 2}};
    for (const auto& t : tokens) c.add(0, t, 3);
    c.add(3, tokens[2], 3);
    // From rank 0: (), (rank 1 with 2), (rank 3 with 2, rank 2 with 1), (rank 2, rank 1). From rank 3: rank 2 with 1.
    CHECK_EQ(c.crossings(), 6);
    const load l = c.busiest();
    CHECK_EQ(l.ranks, 4);
    CHECK_EQ(l.choices, 4);              // rank 0: 0 1 0 0; rank 1: 2 3 2; rank 2: 4 5 4; rank 3: 7 6 7 6
    CHECK_EQ(l.choices_an_expert, 2);
    CHECK_EQ(l.rows, 5);                 // out of rank 0
    CHECK_EQ(l.crossing_choices, 7);
}

TEST_CASE("the expected number of ranks that a token goes to is the closed form, over all ways to choose")
{
    for (const auto& [ranks, experts, k] : {std::array{2, 4, 2}, std::array{3, 6, 2}, std::array{4, 8, 3}, std::array{2, 2, 2},
                                            std::array{4, 4, 4}, std::array{5, 5, 1}}) {
        double ways = 0, crossings = 0; // of a token of rank 0, every set of k experts counted once
        for (int set = 0; set < 1 << experts; ++set) {
            std::vector<int> chosen;
            for (int e = 0; e < experts; ++e)
                if (set >> e & 1) chosen.push_back(e);
            if (static_cast<int>(chosen.size()) != k) continue;
            load_counter c(ranks, experts);
            c.add(0, chosen.data(), k);
            ++ways;
            crossings += static_cast<double>(c.crossings());
        }
        CHECK_EQ(expected_crossings(ranks, experts, k), Approx(crossings / ways));
    }
    CHECK_EQ(expected_crossings(1, 8, 2), 0);
    CHECK_EQ(expected_crossings(8, 8, 8), 7); // all-gather: K = E
    CHECK_EQ(expected_crossings(1024, 4096, 2), Approx(2).epsilon(0.01)); // nearly T K rows when R >> K
}

TEST_CASE("random choices cross as often as expected, and the busiest rank has at least its share")
{
    for (const int ranks : {2, 4, 16}) {
        const shape s{2000, 8, 8, 4LL * ranks, 2};
        const auto drawn = draw_choices(s, ranks, 3);
        const double tokens = 2000.0 * ranks, mean = expected_crossings(ranks, s.experts, s.k);
        CHECK(std::fabs(static_cast<double>(drawn.crossings()) - tokens * mean) < 5 * std::sqrt(tokens)); // a token's variance is below 1
        const load l = drawn.busiest();
        CHECK(l.choices >= 4000);
        CHECK(l.choices < 4000 + 6 * std::sqrt(4000.0));
        CHECK_EQ(l.choices_an_expert * 4, Approx(l.choices));
        CHECK_EQ(draw_choices(s, ranks, 3).busiest().rows, l.rows); // the same on every run
    }
}

TEST_CASE("the fit finds coefficients that made the data, puts one that would be negative at zero, and respects what is known")
{
    FASTMOE_SEEDED(rng, 91);
    std::vector<std::vector<double>> x;
    std::vector<double> y, known, less;
    for (int i = 0; i < 40; ++i) {
        x.push_back({std::exp(rng.uniform(-9, 0)), 1, std::exp(rng.uniform(5, 14))});
        known.push_back(std::exp(rng.uniform(-9, -2)));
        y.push_back(1.5 * x[i][0] + 2e-3 + 3e-8 * x[i][2]);
        less.push_back(y[i] + known[i]);
    }
    for (const auto& c : {fit_relative(x, y), fit_relative(x, less, known)}) {
        CHECK_EQ(c[0], Approx(1.5).epsilon(1e-6));
        CHECK_EQ(c[1], Approx(2e-3).epsilon(1e-6));
        CHECK_EQ(c[2], Approx(3e-8).epsilon(1e-6));
    }
    // y = 3 x - 1 with a constant that may not be negative: then the best slope alone, sum(x/y) / sum((x/y)^2).
    std::vector<std::vector<double>> lines;
    std::vector<double> falls;
    double one = 0, two = 0;
    for (const double v : {1.0, 2.0, 3.0, 5.0}) {
        lines.push_back({v, 1});
        falls.push_back(3 * v - 1);
        one += v / falls.back(), two += v / falls.back() * v / falls.back();
    }
    const auto c = fit_relative(lines, falls);
    CHECK_EQ(c[1], 0);
    CHECK_EQ(c[0], Approx(one / two));
    const line l = fit_line({0, 10, 100}, {2, 7, 52});
    CHECK_EQ(l.a, Approx(2));
    CHECK_EQ(l.b, Approx(0.5));
}

TEST_CASE("R^2 is 1 for what is exact, 0 for the mean, and negative for what is worse than the mean")
{
    const std::vector<double> y{1, 2, 4, 9};
    CHECK_EQ(r_squared(y, y), 1);
    CHECK_EQ(r_squared({4, 4, 4, 4}, y), 0);
    CHECK_EQ(r_squared({1, 2, 4, 4}, y), Approx(1 - 25.0 / (9 + 4 + 0 + 25)));
    CHECK(r_squared({9, 4, 2, 1}, y) < 0);
    CHECK_EQ(r_squared_of_logarithms({2, 4, 8, 18}, {1, 2, 4, 9}), // off by log 2 everywhere
             Approx(1 - 4 * std::log(2.0) * std::log(2.0) /
                            [] {
                                double mean = 0, sum = 0;
                                for (const double v : {1.0, 2.0, 4.0, 9.0}) mean += std::log(v) / 4;
                                for (const double v : {1.0, 2.0, 4.0, 9.0}) sum += (std::log(v) - mean) * (std::log(v) - mean);
                                return sum;
                            }()));
}
