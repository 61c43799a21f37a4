// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// AdamW against its published recursion in double, the norm against a plain sum, the schedule against its end points.
#include <cmath>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/exec/host_executor.hpp>

#include "support/lanes.hpp"
#include "support/random.hpp"
#include "train_gpt/adamw.hpp"

namespace {

using namespace train_gpt;

template <class Real>
Real norm_of(fm::host_executor& ex, const std::vector<Real>& values)
{
    std::vector<Real> norm(1, Real(NAN));
    fm::arena measure;
    global_norm<Real>(ex, fm::as_vector(values), fm::as_vector(norm), measure);
    fm::buffer<std::byte, fm::host_executor> storage(ex, measure.bytes());
    fm::arena memory(storage.view());
    global_norm<Real>(ex, fm::as_vector(values), fm::as_vector(norm), memory);
    return norm[0];
}

/// The algorithm as Loshchilov and Hutter write it, one parameter at a time.
struct oracle {
    double m = 0, v = 0;
    double step(double p, double g, double rate, int t, const adamw_options& o, bool decays)
    {
        m = o.beta1 * m + (1 - o.beta1) * g;
        v = o.beta2 * v + (1 - o.beta2) * g * g;
        const double a = m / (1 - std::pow(o.beta1, t)), b = v / (1 - std::pow(o.beta2, t));
        return p - rate * (a / (std::sqrt(b) + o.epsilon) + (decays ? o.weight_decay * p : 0));
    }
};

} // namespace

TEST_CASE_TEMPLATE("ten steps of AdamW are the published recursion, with clipping and with decay of the first part only",
                   Real, double, float)
{
    FASTMOE_SEEDED(draw, 101);
    fm::host_executor ex;
    const std::int64_t n = 5000, decayed = 3001;
    const auto size = static_cast<std::size_t>(n);
    const auto begin = draw.normals(n);
    std::vector<Real> p(begin.begin(), begin.end()), m(size, Real(0)), v(size, Real(0));
    std::vector<double> expected(p.begin(), p.end());
    std::vector<oracle> state(size);
    const adamw_options o{.clip = 20.0};
    int clipped = 0;
    for (int step = 0; step < 10; ++step) {
        const auto wide = draw.normals(n, 0.6);
        const double grow = step % 2 ? 1.0 : 0.25; // norms of about 41 and 10, around the clip
        std::vector<Real> g;
        for (const double x : wide) g.push_back(static_cast<Real>(grow * x));
        double square = 0;
        for (const Real x : g) square += double(x) * double(x);
        const double norm = std::sqrt(square), shrink = norm > o.clip ? o.clip / norm : 1.0;
        clipped += norm > o.clip;
        const std::vector<Real> on_device{norm_of<Real>(ex, g)};
        CHECK(double(on_device[0]) == doctest::Approx(norm).epsilon(1e-6));
        adamw<Real>(ex, o, 1e-2, step, fm::as_vector(g), fm::as_vector(on_device), decayed,
                 {fm::as_vector(p), fm::as_vector(m), fm::as_vector(v)});
        for (std::size_t i = 0; i < size; ++i)
            expected[i] = state[i].step(expected[i], double(g[i]) * shrink, 1e-2, step + 1, o,
                                        static_cast<std::int64_t>(i) < decayed);
    }
    CHECK(clipped == 5);
    const double bound = std::is_same_v<Real, double> ? 1e-9 : 2e-5;
    for (std::size_t i = 0; i < size; ++i) CHECK(std::abs(double(p[i]) - expected[i]) < bound);
}

TEST_CASE("the global norm has the same bits for any number of threads")
{
    FASTMOE_SEEDED(draw, 102);
    const auto wide = draw.normals(123457);
    const std::vector<float> g(wide.begin(), wide.end());
    fm::host_executor one({.threads = 1}), three({.threads = 3});
    CHECK(norm_of(one, g) == norm_of(three, g));
}

TEST_CASE("the learning rate rises to its peak in the warm-up and ends at its floor on the last step")
{
    const learning_rate_schedule s{.peak = 2.0, .warmup = 10, .steps = 110, .floor = 0.1};
    CHECK(s.at(0) == doctest::Approx(0.2));
    CHECK(s.at(9) == doctest::Approx(2.0));
    CHECK(s.at(10) == doctest::Approx(2.0));
    CHECK(s.at(109) == doctest::Approx(0.2));
    for (std::int64_t i = 10; i + 1 < 110; ++i) CHECK(s.at(i + 1) < s.at(i));
    const learning_rate_schedule one{.peak = 1.0, .warmup = 0, .steps = 1};
    CHECK(one.at(0) == doctest::Approx(1.0));
}
