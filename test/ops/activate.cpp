// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <fastmoe/ops/activate_rows.hpp>

#include <cmath>
#include <limits>

#include "support/compare.hpp"
#include "support/poison.hpp"
#include "support/warps.hpp"

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

/// Slopes, written independently.
double slope(gelu, double x) { return phi(x) + x * std::exp(-x * x / 2) / std::sqrt(2 * std::acos(-1.0)); }
double slope(silu, double x) { return logistic(x) * (1 + x * (1 - logistic(x))); }

/// Each row by an activation and a weight, and back: a is overwritten with the activation, then d is given and dpre returns.
template <class Activation, class T>
struct there_and_back {
    using real = accumulate_t<T>;
    matrix_view<const T> pre; // (S,H')
    matrix_view<T> a, d, dpre; // (S,H) (S,H) (S,H')
    vector_view<real> products; // (S)
    detail::gated_columns columns;
    real weight;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t s) const
    {
        const int64_t hidden = a.extent(1);
        const T* x = pre.data_handle() + s * pre.extent(1);
        detail::activate_row<Activation, real>(team, Activation{}, x, a.data_handle() + s * hidden, hidden, columns, weight);
        const real product = detail::activate_row_backward<Activation, real>(
            team, Activation{}, x, d.data_handle() + s * hidden, dpre.data_handle() + s * pre.extent(1), hidden, columns, weight);
        if (team.lane() == 0) products(s) = product;
    }
};

/// Rows of one width at one place, held to the definitions.
template <class Activation, class Plain, class T, class Executor>
void check_rows(Executor& ex, support::random& r, int64_t hidden, int64_t skew, gated_layout layout)
{
    CAPTURE(hidden);
    CAPTURE(skew);
    CAPTURE(int(layout));
    using real = accumulate_t<T>;
    constexpr int64_t rows = 2, halves = Activation::gated ? 2 : 1;
    const double weight = 0.75;
    const auto columns = detail::gated_columns::of(layout, hidden);
    support::guarded<T> pre(rows, halves * hidden, skew), a(rows, hidden, skew), d(rows, hidden, skew), dpre(rows, halves * hidden, skew);
    support::guarded<real> products(rows);
    support::fill_normal(r, pre.view());
    const auto gradient = support::fill_normal(r, d.view());
    for_each_row(ex, rows, there_and_back<Activation, T>{pre.view(), a.view(), d.view(), dpre.view(), products.vector(), columns, real(weight)},
                 {.width = halves * hidden});
    ex.synchronize();
    std::vector<double> value(rows * hidden), back(rows * halves * hidden), product(rows), size(rows);
    for (int64_t s = 0; s < rows; ++s)
        for (int64_t j = 0; j < hidden; ++j) {
            const int64_t gate = Activation::gated ? j * columns.step : j, up = gate + columns.up_offset;
            const double g = double(pre.view()(s, gate)), u = Activation::gated ? double(pre.view()(s, up)) : 1.0;
            const double dj = gradient[s * hidden + j];
            value[s * hidden + j] = weight * definition(Plain{}, g) * u;
            back[s * halves * hidden + gate] = weight * dj * u * slope(Plain{}, g);
            if (Activation::gated) back[s * halves * hidden + up] = weight * dj * definition(Plain{}, g);
            product[s] += dj * definition(Plain{}, g) * u;
            size[s] += std::fabs(dj * definition(Plain{}, g) * u);
        }
    CHECK(support::close(a.view(), value, {.length = 24}));
    CHECK(support::close(d.view(), value, {.length = 24}));
    CHECK(support::close(dpre.view(), back, {.length = 24}));
    CHECK(support::close(products.vector(), product, {.length = double(hidden) + 24, .magnitudes = &size}));
    for (const auto& damage : {a.damage(), d.damage(), dpre.damage(), products.damage()}) CHECK(damage == "");
}

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

TEST_CASE_TEMPLATE("rows of every width and place have the values and gradients of the definition, in both layouts", Cell,
                   FASTMOE_CELLS_AND_WARPS)
{
    using T = typename Cell::type;
    FASTMOE_SEEDED(r, 74);
    FASTMOE_EXECUTOR(ex, Cell);
    for (const int64_t hidden : {1, 7, 8, 63, 64, 65, 72, 200, 1032, 2056})
        for (const int64_t skew : {0, 1}) {
            check_rows<gelu, gelu, T>(ex, r, hidden, skew, gated_layout::concatenated);
            check_rows<swiglu, silu, T>(ex, r, hidden, skew, gated_layout::concatenated);
            check_rows<swiglu, silu, T>(ex, r, hidden, skew, gated_layout::interleaved);
        }
}
