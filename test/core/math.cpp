// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The scalar functions over the whole range of float, at every instruction set, against long double.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/core/math.hpp>
#include <fastmoe/exec/host_executor.hpp>

#include "support/random.hpp"

namespace fm = fastmoe;
using fm::instruction_set;
using std::int64_t;

namespace {

constexpr long double ulp = 0x1p-23L;        // of float, relative to a power of two
constexpr long double least = 0x1p-149L;     // the smallest float
constexpr long double least_normal = 0x1p-126L;

/// Each function three times: in the library, exactly, and by how much the first may be off. The bounds are what the
/// header states, or what follows from the stated error of exp and one rounding for every further operation.
struct exponential {
    template <class Real>
    FASTMOE_HOST_DEVICE static Real value(Real x) { return fm::math::exp(x); }
    static long double exact(long double x) { return std::exp(x); }
    static long double bound(long double, long double y)
    {
        const long double spacing = y < least_normal ? least : std::ldexp(ulp, std::ilogb(y));
        return 2 * spacing;
    }
};
struct sigmoid {
    template <class Real>
    FASTMOE_HOST_DEVICE static Real value(Real x) { return fm::math::sigmoid(x); }
    static long double exact(long double x) { return 1 / (1 + std::exp(-x)); }
    // exp(-x) overflows a little before the result does, so that the last subnormal results are 0.
    static long double bound(long double x, long double y) { return x < -88.0L ? y + least : 3.1L * ulp * y; }
};
struct softplus {
    template <class Real>
    FASTMOE_HOST_DEVICE static Real value(Real x) { return fm::math::softplus(x); }
    static long double exact(long double x) { return (x > 0 ? x : 0) + std::log1p(std::exp(-std::fabs(x))); }
    static long double bound(long double, long double y) { return 3.6L * ulp * y + 3 * least; }
};
struct normal_density {
    template <class Real>
    FASTMOE_HOST_DEVICE static Real value(Real x) { return fm::math::normal_density(x); }
    static long double exact(long double x) { return std::exp(-x * x / 2) / std::sqrt(2 * std::acos(-1.0L)); }
    // The rounding of x * x is an absolute error of the exponent.
    static long double bound(long double x, long double y)
    {
        return y == 0 ? least : (3.1L + x * x / 4) * ulp * y + 2 * least;
    }
};
struct normal_cdf {
    template <class Real>
    FASTMOE_HOST_DEVICE static Real value(Real x) { return fm::math::normal_cdf(x); }
    static long double exact(long double x) { return std::erfc(-x / std::sqrt(2.0L)) / 2; }
    static long double bound(long double x, long double y)
    {
        return std::fmin(3e-7L, (std::fabs(x) <= 5 ? 1e-6L : 5e-6L) * y + 2 * least);
    }
};
struct error_function {
    template <class Real>
    FASTMOE_HOST_DEVICE static Real value(Real x) { return fm::math::erf(x); }
    static long double exact(long double x) { return std::erf(x); }
    static long double bound(long double, long double y) { return 1.5L * ulp * std::fabs(y) + least; }
};
struct logarithm {
    template <class Real>
    FASTMOE_HOST_DEVICE static Real value(Real x) { return fm::math::log(x); }
    static long double exact(long double x) { return std::log(x); }
    static long double bound(long double, long double y) { return 1.5L * ulp * std::fabs(y); }
};

/// The function in a loop that the compiler vectorizes.
template <class Function, class Real>
struct apply {
    const Real* x; // (n)
    Real* y;       // (n)
    using vectorized = void;
    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { y[i] = Function::value(x[i]); }
};

float from_bits(std::uint32_t bits)
{
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

/// A thousandth of all floats, every sign and exponent among them, NaNs included; the range where things happen,
/// densely; and all that is special.
std::vector<float> floats()
{
    support::random r(support::seed_or(17));
    std::vector<float> out;
    for (std::uint64_t bits = 0; bits < (std::uint64_t{1} << 32); bits += 4099)
        out.push_back(from_bits(static_cast<std::uint32_t>(bits)));
    for (int i = 0; i < 200000; ++i) out.push_back(static_cast<float>(r.uniform(-110, 95)));
    for (int i = 0; i < 200000; ++i) out.push_back(static_cast<float>(r.uniform(-6, 6)));
    for (const float edge : {0.0f, 1.0f, 5.0f, 13.0f, 14.2f, 87.33655f, 88.0f, 88.72284f, 88.73f, 89.0f, 103.28f,
                             103.98f, 104.0f, std::numeric_limits<float>::max(), std::numeric_limits<float>::min(),
                             std::numeric_limits<float>::denorm_min(), std::numeric_limits<float>::infinity()})
        for (const float x : {edge, std::nextafter(edge, 0.0f), std::nextafter(edge, INFINITY)}) {
            out.push_back(x);
            out.push_back(-x);
        }
    out.push_back(NAN);
    out.push_back(-NAN);
    return out;
}

/// How many bounds y is off: 0 for exact, infinity for a wrong NaN or infinity.
template <class Function>
long double badness(float x, float y)
{
    const long double exact = Function::exact(x);
    if (std::isnan(exact) || std::isnan(y)) return std::isnan(exact) && std::isnan(y) ? 0 : INFINITY;
    if (std::isinf(exact)) return y == exact ? 0 : INFINITY;
    const long double bound = Function::bound(x, exact);
    constexpr long double overflow = 0x1.ffffffp127L; // what is beyond rounds to infinity
    if (std::isinf(y))
        return std::signbit(y) == std::signbit(exact) && std::fabs(exact) + bound >= overflow ? 0 : INFINITY;
    return y == exact ? 0 : std::fabs(y - exact) / bound;
}

} // namespace

TEST_CASE_TEMPLATE("float functions keep their bounds over the whole range, with every instruction set", Function,
                   exponential, sigmoid, softplus, normal_density, normal_cdf, error_function, logarithm)
{
    const std::vector<float> x = floats();
    for (int level = 0; level <= static_cast<int>(fm::native_instruction_set()); ++level) {
        fm::host_executor ex({.threads = 2, .best = static_cast<instruction_set>(level)});
        std::vector<float> y(x.size(), -7.0f);
        fm::for_each(ex, static_cast<int64_t>(x.size()), apply<Function, float>{x.data(), y.data()});
        long double worst = 0;
        std::size_t at = 0;
        for (std::size_t i = 0; i < x.size(); ++i) {
            const long double bad = badness<Function>(x[i], y[i]);
            if (bad > worst) at = i;
            worst = std::fmax(worst, bad);
        }
        INFO("level ", level, ": f(", x[at], ") is ", y[at], " where ", static_cast<double>(Function::exact(x[at])),
             " is exact; off by ", static_cast<double>(worst), " bounds");
        CHECK(worst <= 1);
    }
}

TEST_CASE_TEMPLATE("double functions are good to a few units in the last place", Function, exponential, sigmoid,
                   softplus, normal_density, normal_cdf, error_function, logarithm)
{
    FASTMOE_SEEDED(r, 5);
    long double worst = 0;
    double where = 0;
    for (int i = 0; i < 100000; ++i) {
        const double x = r.coin() ? r.uniform(-40, 40) : r.normal() * std::exp(r.uniform(-40, 3));
        const double y = Function::value(x);
        const long double exact = Function::exact(x);
        if (std::isnan(exact)) {
            CHECK(std::isnan(y));
            continue;
        }
        // The argument of erfc is rounded twice, in 1 / sqrt 2 and in the product, and the tail answers with x^2 times
        // as much; the square in the density's exponent counts for less.
        const long double roundings = 8 + 2 * static_cast<long double>(x) * x;
        const long double off = std::fabs(y - exact) / (0x1p-53L * roundings * std::fabs(exact) + 0x1p-1074L);
        if (off > worst) where = x;
        worst = std::fmax(worst, off);
    }
    INFO("at ", where, " off by ", static_cast<double>(worst), " bounds");
    CHECK(worst <= 1);
    CHECK(std::isnan(Function::value(std::numeric_limits<double>::quiet_NaN())));
}

TEST_CASE_TEMPLATE("the functions have their limits at infinity", Real, float, double)
{
    constexpr Real infinity = std::numeric_limits<Real>::infinity();
    CHECK(fm::math::exp(infinity) == infinity);
    CHECK(fm::math::exp(-infinity) == 0);
    CHECK(fm::math::exp(Real(0)) == 1);
    CHECK(fm::math::sigmoid(infinity) == 1);
    CHECK(fm::math::sigmoid(-infinity) == 0);
    CHECK(fm::math::sigmoid(Real(0)) == Real(0.5));
    CHECK(fm::math::softplus(infinity) == infinity);
    CHECK(fm::math::softplus(-infinity) == 0);
    CHECK(fm::math::normal_cdf(infinity) == 1);
    CHECK(fm::math::normal_cdf(-infinity) == 0);
    CHECK(fm::math::normal_density(infinity) == 0);
    CHECK(fm::math::log(Real(0)) == -infinity);
    CHECK(std::isnan(fm::math::log(Real(-1))));
}

TEST_CASE_TEMPLATE("finite and NaN are told apart for every exponent", Real, float, double)
{
    using limits = std::numeric_limits<Real>;
    for (const Real x : {Real(0), Real(-0.0), limits::denorm_min(), limits::max(), limits::lowest()}) {
        CHECK(fm::math::is_finite(x));
        CHECK_FALSE(fm::math::is_nan(x));
    }
    for (const Real x : {limits::infinity(), -limits::infinity()}) {
        CHECK_FALSE(fm::math::is_finite(x));
        CHECK_FALSE(fm::math::is_nan(x));
    }
    CHECK_FALSE(fm::math::is_finite(limits::quiet_NaN()));
    CHECK(fm::math::is_nan(limits::quiet_NaN()));
}
