// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Numbers that know how far the library's may be from them. The oracle in a narrow dtype is made of them: it rounds where
/// the library stores, and what remains are the errors of fp32 sums and the few roundings that those can flip.
///
///     bounded<float> sum of w x: value, and n u sum |w x|          in any order (Higham, Accuracy and Stability, 3.1)
///     stored<bfloat16>(v)                                          v as the library's memory holds it
///     CHECK(support::within(y, expected));                         every y is a rounding of value +- error
///
/// An error in bfloat16 is 0 after stored(), or one unit in the last place where the exact value is so near the middle of
/// two neighbours that an fp32 sum may fall on either side. So the bound on a result is not the sum of all roundings on
/// the way, which would be as large as the result, but of those that are in doubt.
#pragma once

#include <cmath>
#include <vector>

#include "compare.hpp"
#include "reference_expert.hpp"

namespace support {

/// Bits of the significand.
template <class T>
inline constexpr int digits = 24;
template <>
inline constexpr int digits<fastmoe::bfloat16> = 8;
template <>
inline constexpr int digits<fastmoe::half> = 11;

/// To the nearest number of T, ties to even, by arithmetic on exponents: shares nothing with the library's conversions.
template <class T>
double rounded(double v)
{
    if constexpr (std::is_same_v<T, double>) return v;
    if (v == 0 || !std::isfinite(v)) return v;
    if (std::fabs(v) >= overflow<T>) return std::copysign(INFINITY, v);
    const double unit = std::fmax(std::ldexp(1.0, std::ilogb(v) + 1 - digits<T>), smallest<T>);
    return std::nearbyint(v / unit) * unit;
}

/// A value, and a bound on the distance of the library's, which is computed in Real. Operations add the error of one
/// rounding; sums of many terms, whose order is the library's business, are bounded_sum.
template <class Real>
struct bounded {
    static constexpr double unit = roundoff<Real> + roundoff<double>; // the oracle's own roundings as well
    double value = 0, error = 0;

    bounded() = default;
    bounded(double exact) : value(exact) {}
    bounded(double v, double e) : value(v), error(e) {}

    friend bounded operator+(const bounded& a, const bounded& b) { return rounding(a.value + b.value, a.error + b.error); }
    friend bounded operator-(const bounded& a, const bounded& b) { return rounding(a.value - b.value, a.error + b.error); }
    friend bounded operator*(const bounded& a, const bounded& b)
    {
        return rounding(a.value * b.value, product_error(a, b));
    }
    friend bounded operator/(const bounded& a, const bounded& b)
    {
        const double q = a.value / b.value, least = std::fabs(b.value) - b.error;
        return rounding(q, least > 0 ? (a.error + std::fabs(q) * b.error) / least : INFINITY);
    }
    static double product_error(const bounded& a, const bounded& b)
    {
        return std::fabs(a.value) * b.error + std::fabs(b.value) * a.error + a.error * b.error;
    }
    static bounded rounding(double v, double e) { return {v, e + unit * std::fabs(v)}; }
};

/// e^x and log x with the library's promise of 2 units in the last place, and one more rounding.
template <class Real>
bounded<Real> exponential(const bounded<Real>& x)
{
    const double v = std::exp(x.value);
    return {v, v * (std::expm1(x.error) + 6 * bounded<Real>::unit)};
}
template <class Real>
bounded<Real> logarithm(const bounded<Real>& x)
{
    const double v = std::log(x.value);
    return {v, x.error / (x.value - x.error) + 6 * bounded<Real>::unit * (1 + std::fabs(v))};
}

/// What T keeps of a number.
template <class T, class Real>
bounded<Real> stored(const bounded<Real>& v)
{
    if constexpr (std::is_same_v<T, Real>) return v;
    const double middle = rounded<T>(v.value);
    return {middle, std::fmax(rounded<T>(v.value + v.error) - middle, middle - rounded<T>(v.value - v.error))};
}

/// A sum in any order, of products that are rounded or fused.
template <class Real>
class bounded_sum {
public:
    void add(const bounded<Real>& term)
    {
        value_ += term.value;
        error_ += term.error;
        magnitude_ += std::fabs(term.value) + term.error;
        ++terms_;
    }
    void add(const bounded<Real>& a, const bounded<Real>& b)
    {
        add({a.value * b.value, bounded<Real>::product_error(a, b)});
    }
    bounded<Real> total() const { return {value_, error_ + (terms_ + 1) * bounded<Real>::unit * magnitude_}; }

private:
    double value_ = 0, error_ = 0, magnitude_ = 0, terms_ = 0;
};

template <class Real>
std::vector<bounded<Real>> totals(const std::vector<bounded_sum<Real>>& sums)
{
    std::vector<bounded<Real>> out;
    for (const auto& s : sums) out.push_back(s.total());
    return out;
}

/// An activation's value and slope. Its argument is known up to its error; at a kink both slopes are possible.
template <class Real>
struct bounded_activation {
    bounded<Real> value, slope;

    bounded_activation(reference::activation act, const bounded<Real>& x)
    {
        constexpr bool wide = std::is_same_v<Real, double>;
        const auto [v, s] = reference::activate(act, x.value);
        value.value = v;
        slope.value = s;
        for (const double at : {x.value - x.error, x.value + x.error}) {
            const auto [other, steep] = reference::activate(act, at);
            value.error = std::fmax(value.error, std::fabs(other - v));
            slope.error = std::fmax(slope.error, std::fabs(steep - s));
        }
        if (act == reference::activation::relu) return;
        // What test/ops/activate.cpp and test/core/math.cpp hold the library's functions to.
        const double most = 1 + std::fabs(x.value);
        value.error = 1.1 * value.error + std::fmin((wide ? 1e-14 : 6e-7) * most, (wide ? 1e-13 : 6e-6) * std::fabs(v));
        slope.error = 1.1 * slope.error + (wide ? 1e-14 : 4e-6) * most;
    }
};

/// The factor that an up row gives, and its slope; at a kink both slopes are possible.
template <class Real>
struct bounded_up_factor {
    bounded<Real> value, slope;

    bounded_up_factor(reference::activation act, const bounded<Real>& x) : value(x), slope(1)
    {
        if (act != reference::activation::clamped_swiglu) return; // the row itself
        const auto [v, s] = reference::up_factor(act, x.value);
        value = bounded<Real>::rounding(v, x.error);
        slope = s;
        for (const double at : {x.value - x.error, x.value + x.error})
            slope.error = std::fmax(slope.error, std::fabs(reference::up_factor(act, at).second - s));
    }
};

/// Whether every element is a rounding to T of a number within its bound. The text tells the worst, in units of the bound.
template <class T, class Real>
verdict within(const std::vector<T>& actual, const std::vector<bounded<Real>>& expected)
{
    if (actual.size() != expected.size())
        return {false, std::to_string(actual.size()) + " elements, expected " + std::to_string(expected.size())};
    verdict out;
    std::size_t outside = 0;
    double worst = -1;
    for (std::size_t i = 0; i < actual.size(); ++i) {
        const auto a = static_cast<double>(actual[i]);
        const auto& e = expected[i];
        const double low = rounded<T>(e.value - e.error), high = rounded<T>(e.value + e.error);
        if (low <= a && a <= high) continue;
        ++outside;
        const double off = std::isnan(a) ? INFINITY : std::fmax(low - a, a - high) / (high - low + smallest<T>);
        if (off <= worst) continue;
        worst = off;
        char line[240];
        std::snprintf(line, sizeof line, "element %zu of %zu is %.17g, expected %.17g, a number from %.9g to %.9g", i,
                      actual.size(), a, e.value, low, high);
        out = {false, line};
    }
    if (outside > 0) out.text += "; " + std::to_string(outside) + " elements are out of bounds";
    return out;
}
template <class T, class Shape, class Real>
verdict within(::cuda::std::mdspan<T, Shape> actual, const std::vector<bounded<Real>>& expected)
{
    using element = std::remove_const_t<T>;
    return within(std::vector<element>(actual.data_handle(), actual.data_handle() + size_of(actual)), expected);
}

} // namespace support
