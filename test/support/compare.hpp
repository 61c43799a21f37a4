// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Comparison with the oracle: bounds that follow from the dtype and the length of the sums, never from what passes.
///
///     CHECK(support::close(y, expected, {.length = width, .magnitudes = &absolute}));
///
/// A sum of n products, accumulated in A = accumulate_t<T> in any order and rounded once to T, is off by at most about
/// n eps(A) sum |a_i b_i| + eps(T) |y| (Higham, Accuracy and Stability, section 3.1), with eps the unit roundoff.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <limits>
#include <ostream>
#include <string>
#include <type_traits>
#include <vector>

#include <fastmoe/core/dtype.hpp>

#include "random.hpp"

namespace support {

/// Unit roundoff: half the distance from 1 to the next number.
template <class T>
inline constexpr double roundoff = 0x1p-24;
template <>
inline constexpr double roundoff<double> = 0x1p-53;
template <>
inline constexpr double roundoff<fastmoe::bfloat16> = 0x1p-8;
template <>
inline constexpr double roundoff<fastmoe::half> = 0x1p-11;

/// The smallest positive number of T, which bounds the error of underflow.
template <class T>
inline constexpr double smallest = 0x1p-149;
template <>
inline constexpr double smallest<double> = 0x1p-1074;
template <>
inline constexpr double smallest<fastmoe::bfloat16> = 0x1p-133;
template <>
inline constexpr double smallest<fastmoe::half> = 0x1p-24;

/// From here on a number rounds to infinity.
template <class T>
inline constexpr double overflow = 0x1.ffffffp127;
template <>
inline constexpr double overflow<double> = std::numeric_limits<double>::infinity();
template <>
inline constexpr double overflow<fastmoe::bfloat16> = 0x1.ffp127;
template <>
inline constexpr double overflow<fastmoe::half> = 65520;

struct tolerance {
    double length = 1;    ///< terms of the longest sum, roundings in accumulate_t in all
    double roundings = 1; ///< roundings to T between the inputs and the output
    /// What the errors are relative to, for every element: the sum of the absolute terms. Without it, `magnitude` for
    /// all elements, and without that the largest expected value.
    const std::vector<double>* magnitudes = nullptr;
    double magnitude = 0;
};

/// The outcome of a comparison: true if every element is within its bound; the text shows the worst element.
struct verdict {
    bool within = true;
    std::string text = "equal within bounds";

    explicit operator bool() const { return within; }
    friend std::ostream& operator<<(std::ostream& out, const verdict& v) { return out << v.text; }
};

/// Compares element by element with values in double. NaN must meet NaN and infinity the same infinity, except that a
/// finite expectation beyond the range of T may have overflowed.
template <class T>
verdict close(const std::vector<T>& actual, const std::vector<double>& expected, const tolerance& tol = {})
{
    if (actual.size() != expected.size())
        return {false, std::to_string(actual.size()) + " elements, expected " + std::to_string(expected.size())};
    double largest = tol.magnitude;
    if (!tol.magnitudes && largest == 0)
        for (double e : expected)
            if (std::isfinite(e)) largest = std::fmax(largest, std::fabs(e));
    double worst = 0;
    verdict out;
    std::size_t beyond = 0, at = 0;
    const auto describe = [&](double bound) {
        char line[240];
        std::snprintf(line, sizeof line,
                      "element %zu of %zu is %.17g, expected %.17g, off by %.3g with a bound of %.3g", at,
                      actual.size(), static_cast<double>(actual[at]), expected[at],
                      std::fabs(static_cast<double>(actual[at]) - expected[at]), bound);
        return std::string(line);
    };
    for (std::size_t i = 0; i < actual.size(); ++i) {
        const double a = static_cast<double>(actual[i]), e = expected[i];
        const double scale = std::fmax(std::fabs(e), tol.magnitudes ? tol.magnitudes->at(i) : largest);
        const double sums = roundoff<fastmoe::accumulate_t<T>> + roundoff<double>; // the oracle's own sums as well
        const double bound =
            tol.length * sums * scale +
            tol.roundings * (roundoff<T> * std::fmax(std::fabs(e), tol.roundings > 1 ? scale : 0) + smallest<T>);
        double ratio = std::fabs(a - e) / bound;
        if (std::isnan(a) || std::isnan(e)) ratio = std::isnan(a) == std::isnan(e) ? 0 : INFINITY;
        else if (a == e) ratio = 0;
        else if (std::isinf(e)) ratio = INFINITY;
        else if (std::isinf(a))
            ratio = std::signbit(a) == std::signbit(e) && std::fabs(e) + bound >= overflow<T> ? 0 : INFINITY;
        beyond += ratio > 1;
        if (ratio > worst) {
            worst = ratio;
            at = i;
            out.within = worst <= 1;
            out.text = describe(bound);
        }
    }
    if (beyond > 0) out.text += "; " + std::to_string(beyond) + " elements are out of bounds";
    return out;
}

template <class T, class Shape>
verdict close(::cuda::std::mdspan<T, Shape> actual, const std::vector<double>& expected, const tolerance& tol = {})
{
    using element = std::remove_const_t<T>;
    return close(std::vector<element>(actual.data_handle(), actual.data_handle() + size_of(actual)), expected, tol);
}

/// The same bits, for results that must not depend on threads or runs. -0 and 0 differ, equal NaNs do not.
template <class T>
verdict same_bits(const std::vector<T>& actual, const std::vector<T>& expected)
{
    if (actual.size() != expected.size())
        return {false, std::to_string(actual.size()) + " elements, expected " + std::to_string(expected.size())};
    for (std::size_t i = 0; i < actual.size(); ++i) {
        const auto* a = reinterpret_cast<const unsigned char*>(&actual[i]);
        const auto* e = reinterpret_cast<const unsigned char*>(&expected[i]);
        for (std::size_t b = 0; b < sizeof(T); ++b)
            if (a[b] != e[b]) {
                char line[160];
                std::snprintf(line, sizeof line, "element %zu is %.17g, expected exactly %.17g", i,
                              static_cast<double>(actual[i]), static_cast<double>(expected[i]));
                return {false, line};
            }
    }
    return {true, "the same bits"};
}

} // namespace support
