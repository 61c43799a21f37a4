// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Fits coefficients that are not negative, and says how well a prediction does.
#pragma once

#include <cmath>
#include <vector>

namespace scaling {

/// Coefficients c >= 0 that make sum_i ((f_i + c . x_i - y_i) / y_i)^2 least: every point counts by its relative error,
/// whatever its size. Coordinate descent, which the bound makes exact at the end: the problem is convex.
/// @param x  terms of each point, none negative      // (points, terms)
/// @param y  measured, positive                      // (points)
/// @param f  what is known; none: 0                  // (points) or (0)
inline std::vector<double> fit_relative(const std::vector<std::vector<double>>& x, const std::vector<double>& y,
                                        const std::vector<double>& f = {})
{
    const std::size_t n = x.empty() ? 0 : x[0].size();
    std::vector<double> c(n, 0.0), norm(n, 0.0), rest(y.size(), 1.0); // rest: 1 - (f + c . x) / y
    for (std::size_t i = 0; i < f.size(); ++i) rest[i] -= f[i] / y[i];
    for (std::size_t i = 0; i < y.size(); ++i)
        for (std::size_t j = 0; j < n; ++j) norm[j] += (x[i][j] / y[i]) * (x[i][j] / y[i]);
    for (int round = 0; round < 200000; ++round) {
        double largest = 0;
        for (std::size_t j = 0; j < n; ++j) {
            if (norm[j] == 0) continue;
            double slope = 0;
            for (std::size_t i = 0; i < y.size(); ++i) slope += rest[i] * x[i][j] / y[i];
            const double next = std::fmax(0.0, c[j] + slope / norm[j]), step = next - c[j];
            c[j] = next;
            for (std::size_t i = 0; i < y.size(); ++i) rest[i] -= step * x[i][j] / y[i];
            largest = std::fmax(largest, std::fabs(step) * std::sqrt(norm[j]));
        }
        if (largest < 1e-12) break;
    }
    return c;
}

/// 1 - (sum of squared errors) / (sum of squared distances from the mean).
inline double r_squared(const std::vector<double>& predicted, const std::vector<double>& measured)
{
    double mean = 0, errors = 0, distances = 0;
    for (const double m : measured) mean += m / static_cast<double>(measured.size());
    for (std::size_t i = 0; i < measured.size(); ++i) {
        errors += (predicted[i] - measured[i]) * (predicted[i] - measured[i]);
        distances += (measured[i] - mean) * (measured[i] - mean);
    }
    return 1 - errors / distances;
}
/// The same of the logarithms, so that short steps count as much as long ones.
inline double r_squared_of_logarithms(std::vector<double> predicted, std::vector<double> measured)
{
    for (double& v : predicted) v = std::log(v);
    for (double& v : measured) v = std::log(v);
    return r_squared(predicted, measured);
}

/// y = a + b x with the least squared relative errors, and neither negative.
struct line {
    double a, b;
};
inline line fit_line(const std::vector<double>& x, const std::vector<double>& y)
{
    std::vector<std::vector<double>> points;
    for (const double v : x) points.push_back({1, v});
    const auto c = fit_relative(points, y);
    return {c[0], c[1]};
}

} // namespace scaling
