// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <cmath>
#include <set>
#include <string>
#include <tuple>

#include "scaling/plot.hpp"
#include "scaling/report.hpp"
#include "support/random.hpp"
#include "support/temporary_folder.hpp"

using namespace scaling;
using doctest::Approx;

namespace {

/// A machine that does exactly what the model says, with these coefficients.
measurements model_machine(const std::vector<double>& coefficients, double noise, support::random& rng)
{
    measurements m;
    m.cores = 2;
    m.processor = "a model";
    for (const int busy : {1, 2})
        m.compute.push_back({busy, throughput{{1, 64, 1024}, {64, 512}, {1e9, 2e9, 2e10, 3e10, 4e10 / busy, 5e10 / busy}},
                             throughput{{4, 4096}, {64}, {1e9, 5e10}}});
    link_times l{"threads", 2, {64, 4096, 1048576}, {}};
    for (const double b : l.bytes) l.seconds.push_back(1e-5 + b * 1e-10);
    m.links.push_back(l);
    for (const int ranks : {1, 2})
        for (const shape& s : drawn_shapes(32)) {
            const load busiest = draw_choices(s, ranks, 5).busiest();
            const rates r = m.rates_of(ranks, "threads");
            const double t = known_seconds(s, busiest, r) + predict(coefficients, terms_of(s, busiest, r));
            m.shapes.push_back({"threads", s, busiest, t, t * std::exp(rng.normal(noise)), t, 9});
        }
    return m;
}

} // namespace

TEST_CASE("on a machine that follows the model the fit finds its coefficients, and every unseen step")
{
    FASTMOE_SEEDED(rng, 92);
    const std::vector<double> truth{1.2, 3e-4, 2e-9, 4e-9, 8e-10, 5e-6};
    const predictor p(model_machine(truth, 0, rng));
    for (std::size_t i = 0; i < truth.size(); ++i) CHECK_EQ(p.coefficients()[i], Approx(truth[i]).epsilon(1e-3));
    CHECK(p.score_fitted(false).linear > 1 - 1e-6);
    CHECK(p.score_fitted(false).worst < 1e-3);
    CHECK(p.score_unfitted(false).logarithmic < 0.98); // the equations alone leave out what this machine adds
    const predictor noisy(model_machine(truth, 0.1, rng));
    CHECK(noisy.score_fitted(false).logarithmic > 0.95);
    CHECK(noisy.score_fitted(false).typical > 0.02);
}

TEST_CASE("fit and score use different shapes, each at both rank counts, and together all of them")
{
    FASTMOE_SEEDED(rng, 93);
    const predictor p(model_machine({1, 1e-4, 0, 0, 0, 0}, 0, rng));
    const auto key = [](const point& q) {
        return std::tuple(q.sizes.tokens, q.sizes.width, q.sizes.hidden, q.sizes.experts, q.sizes.k);
    };
    std::set<decltype(key(point{}))> fitted, scored;
    for (const auto& q : p.half(true)) fitted.insert(key(q));
    for (const auto& q : p.half(false)) {
        scored.insert(key(q));
        CHECK_EQ(fitted.count(key(q)), 0);
    }
    CHECK_EQ(fitted.size(), 16);
    CHECK_EQ(scored.size(), 16);
    CHECK_EQ(p.half(true).size() + p.half(false).size(), 64);
    CHECK_EQ(p.score_fitted(false).points, 32);
}

TEST_CASE("alpha and beta come out of times that follow them, at two ranks and at more")
{
    for (const int ranks : {2, 4}) {
        link_times l{"mpi", ranks, {64, 1024, 65536, 4194304}, {}};
        for (const double b : l.bytes) l.seconds.push_back((ranks - 1) * (3e-6 + b * 2e-10));
        CHECK_EQ(l.fitted().a, Approx(3e-6));
        CHECK_EQ(l.fitted().b, Approx(2e-10));
    }
}

TEST_CASE("measurements survive their file, and what is no such file is refused by name")
{
    FASTMOE_SEEDED(rng, 94);
    const support::temporary_folder folder;
    const std::string file = folder / "m.json";
    measurements m = model_machine({1, 1e-4, 0, 0, 0, 0}, 0.1, rng), back;
    m.weak.push_back(m.shapes[3]);
    write(file, m);
    read(file, back);
    CHECK_EQ(json_of(back), json_of(m));
    CHECK_EQ(predictor(back).coefficients(), predictor(m).coefficients());
    read(file, back); // a second file adds its points
    CHECK_EQ(back.shapes.size(), 2 * m.shapes.size());
    CHECK_THROWS_AS(read(folder / "none.json", back), fastmoe::format_error);
}

TEST_CASE("weak scaling is predicted to 1,024 ranks, and its exchanges take longer with every doubling")
{
    FASTMOE_SEEDED(rng, 95);
    const measurements m = model_machine({1, 0, 0, 0, 0, 0}, 0, rng);
    const predictor p(m);
    const auto all = predict_weak(p, m, "threads", 1024);
    REQUIRE_EQ(all.size(), 11);
    CHECK_EQ(all.back().ranks, 1024);
    const auto exchanges = [&](const prediction& q) {
        return exchanges_seconds(weak_shape(q.ranks), q.busiest, m.rates_of(q.ranks, "threads"));
    };
    CHECK_EQ(exchanges(all[0]), 0);
    for (std::size_t i = 1; i < all.size(); ++i) CHECK(exchanges(all[i]) > exchanges(all[i - 1]));
    for (const auto& q : all) // the other coefficients are zero, and that of the products is one
        CHECK_EQ(q.seconds, Approx(p.unfitted(weak_shape(q.ranks), q.busiest, "threads") + q.router).epsilon(1e-6));
    CHECK_EQ(all.back().router, Approx(6.0 * 256 * 4096 * 256 / 5e10));
    CHECK(all.back().seconds > 7 * 1023 * 1e-5); // latency alone
    CHECK(all.back().ratio < all[1].ratio);
    const load l = all[3].busiest;
    CHECK_EQ(p.shared(weak_shape(8), l, "threads"), Approx(4 * p.fitted(weak_shape(8), l, "threads"))); // 8 ranks, 2 cores
}

TEST_CASE("the picture has a filled mark for every measured point and a hollow one for every predicted one")
{
    const auto svg = weak_scaling_svg("t", "u", {{"a", {{1, 0.01}, {2, 0.02}}, "#111111", true}, {"b", {{1, 0.01}, {1024, 0.1}}, "#222222", false}});
    const auto count = [&](const std::string& what) {
        int n = 0;
        for (auto at = svg.find(what); at != std::string::npos; at = svg.find(what, at + 1)) ++n;
        return n;
    };
    CHECK_EQ(count("r=\"5.5\" fill=\"#111111\""), 3); // two points and the key
    CHECK_EQ(count("r=\"3.5\" fill=\"#222222\""), 3);
    CHECK_EQ(count("r=\"1.8\" fill=\"#FFFFFF\""), 3);
    CHECK_EQ(svg.find("nan"), std::string::npos);
    CHECK(svg.find(">1024<") != std::string::npos);
}
