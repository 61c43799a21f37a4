// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Gradients by central differences in double: the judge of every backward, the oracle's included.
#pragma once

#include <cstddef>
#include <vector>

namespace support {

/// df/dx for every element of x, which is disturbed and put back. Five points, so the error is of order step^4: with
/// smooth functions of order 1 about 1e-11.
template <class F>
std::vector<double> finite_difference(const F& f, std::vector<double>& x, double step = 1e-3)
{
    std::vector<double> out(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) {
        const double kept = x[i];
        const auto at = [&](double offset) {
            x[i] = kept + offset;
            return static_cast<double>(f());
        };
        const double near = at(step) - at(-step), far = at(2 * step) - at(-2 * step);
        out[i] = (8 * near - far) / (12 * step);
        x[i] = kept;
    }
    return out;
}

} // namespace support
