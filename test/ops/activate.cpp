// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <fastmoe/ops/activate.hpp>

#include <cmath>
#include <limits>

#include "support/executors.hpp"

using namespace fastmoe;

namespace {

double phi(double x) { return 0.5 * std::erfc(-x / std::sqrt(2.0)); }
double logistic(double x) { return 1 / (1 + std::exp(-x)); }

/// The definitions, written independently.
double definition(relu, double x) { return x > 0 ? x : 0; }
double definition(gelu, double x) { return x * phi(x); }
double definition(gelu_tanh, double x)
{
    return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
}
double definition(silu, double x) { return x * logistic(x); }

} // namespace

TEST_CASE_TEMPLATE("an activation equals its definition, and its derivative the definition's slope", A, relu, gelu, gelu_tanh,
                   silu)
{
    FASTMOE_SEEDED(r, 71);
    for (int i = 0; i < 20000; ++i) {
        const double x = r.uniform(-12, 12), h = 1e-5;
        CAPTURE(x);
        if (std::is_same_v<A, relu> && std::fabs(x) < 2 * h) continue;
        const double slope = (definition(A{}, x + h) - definition(A{}, x - h)) / (2 * h);
        REQUIRE(std::fabs(A::value(x) - definition(A{}, x)) <= 1e-14 * (1 + std::fabs(x)));
        REQUIRE(std::fabs(A::derivative(x) - slope) <= 1e-9);
        const float f = static_cast<float>(x);
        const double exact = definition(A{}, f), exact_slope = A::derivative(double(f));
        REQUIRE(std::fabs(A::value(f) - exact) <= 6e-7 * (1 + std::fabs(f)));
        REQUIRE(std::fabs(A::derivative(f) - exact_slope) <= 4e-6);
    }
}

TEST_CASE_TEMPLATE("activations keep their limits", A, relu, gelu, gelu_tanh, silu)
{
    CHECK(A::value(0.0f) == 0.0f);
    CHECK(A::value(200.0f) == 200.0f);
    CHECK(std::fabs(A::value(-200.0f)) < 1e-30f);
    CHECK(A::derivative(200.0f) == 1.0f);
    CHECK(A::derivative(-200.0f) == 0.0f);
    CHECK(std::isnan(A::value(NAN)));
    CHECK(std::isnan(A::value(std::nan(""))));
}

TEST_CASE_TEMPLATE("activations and their derivatives keep their limits up to the largest numbers", A, relu, gelu, gelu_tanh, silu)
{
    const auto keeps = [](auto large) {
        CAPTURE(large);
        CHECK(A::value(large) == large);
        CHECK(A::value(-large) == 0);
        CHECK(A::derivative(large) == 1);
        CHECK(A::derivative(-large) == 0);
        CHECK(gated_by<A>::value(-large, large) == 0);
        const auto shut = gated_by<A>::gradient(-large, large, large), open = gated_by<A>::gradient(large, large, decltype(large)(0.5));
        CHECK(shut.gate == 0);
        CHECK(shut.up == 0);
        CHECK(open.gate == large / 2);
        CHECK(open.up == large / 2);
    };
    for (const float large : {1e3f, 1e7f, 1e12f, 1e19f, 1e20f, 1e30f, std::numeric_limits<float>::max()}) keeps(large);
    for (const double large : {1e3, 1e20, 1e39, 1e103, 1e154, 1e200, std::numeric_limits<double>::max()}) keeps(large);
    CHECK(std::isnan(A::derivative(NAN)) == !std::is_same_v<A, relu>);
}

TEST_CASE_TEMPLATE("a gated activation is the product, and its gradient the product rule's", A, silu, gelu)
{
    FASTMOE_SEEDED(r, 72);
    for (int i = 0; i < 2000; ++i) {
        const double g = r.normal(2), u = r.normal(2), d = r.normal();
        const auto back = gated_by<A>::gradient(g, u, d);
        REQUIRE(gated_by<A>::value(g, u) == doctest::Approx(definition(A{}, g) * u));
        REQUIRE(back.up == doctest::Approx(d * definition(A{}, g)));
        REQUIRE(back.gate == doctest::Approx(d * u * A::derivative(g)));
    }
}

TEST_CASE("the activation of gpt-oss equals its definition and its gradient the definition's slope, whatever its constants are")
{
    FASTMOE_SEEDED(r, 73);
    for (int i = 0; i < 5000; ++i) {
        const clamped_swiglu a =
            i % 2 ? clamped_swiglu{} : clamped_swiglu{r.uniform(0.5, 3), r.uniform(0.5, 3), r.uniform(-1, 2)};
        const auto definition = [&](double g, double u) {
            g = std::fmin(g, a.limit);
            u = std::fmin(std::fmax(u, -a.limit), a.limit);
            return (u + a.shift) * g * logistic(a.alpha * g);
        };
        const double g = r.normal(a.limit), u = r.normal(a.limit), d = r.normal(), h = 1e-5;
        CAPTURE(g);
        CAPTURE(u);
        CAPTURE(a.limit);
        if (std::fabs(std::fabs(u) - a.limit) < 2 * h || std::fabs(g - a.limit) < 2 * h) continue;
        const auto back = a.gradient(g, u, d);
        const double size = 1 + a.limit * (a.limit + std::fabs(a.shift));
        REQUIRE(std::fabs(a.value(g, u) - definition(g, u)) <= 1e-14 * size);
        REQUIRE(std::fabs(back.gate - d * (definition(g + h, u) - definition(g - h, u)) / (2 * h)) <= 1e-8 * size);
        REQUIRE(std::fabs(back.up - d * (definition(g, u + h) - definition(g, u - h)) / (2 * h)) <= 1e-8 * size);
        REQUIRE(std::fabs(a.value(float(g), float(u)) - definition(float(g), float(u))) <= 1e-6 * size);
    }
    CHECK(std::isnan(clamped_swiglu{}.value(NAN, 1.0f)));
    CHECK(std::isnan(clamped_swiglu{}.value(1.0f, NAN)));
    CHECK_EQ(clamped_swiglu{}.gradient(7.0, 7.0, 1.0).gate, clamped_swiglu{.limit = 8}.gradient(7.0, 7.0, 1.0).gate);
    CHECK_EQ(clamped_swiglu{}.gradient(7.1, 7.1, 1.0).gate, 0);
    CHECK_EQ(clamped_swiglu{}.gradient(7.1, 7.1, 1.0).up, 0);
    CHECK_EQ(clamped_swiglu{}.gradient(1.0, -7.1, 1.0).up, 0);
}
