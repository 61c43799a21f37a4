// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The oracle's cosine logits: per token, scalar, in double, straight from the formula. Includes nothing of the library.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace support::reference {

struct cosine_model {
    std::int64_t width = 1, inner = 1;        // D, N
    std::vector<double> x;                    // (T,D)
    std::vector<double> projection, bias;     // (N,D), (N) or empty
    std::vector<double> embeddings;           // (E,N)
    std::vector<double> temperature;          // (1)

    static std::vector<double> unit(std::vector<double> row)
    {
        double square = 0;
        for (double v : row) square += v * v;
        for (double& v : row) v = square == 0 ? 0 : v / std::sqrt(square);
        return row;
    }

    std::vector<double> logits() const // (T,E)
    {
        const double sharpness = std::exp(std::fmin(temperature[0], std::log(100.0)));
        std::vector<double> out;
        for (std::size_t t = 0; t < x.size() / width; ++t) {
            std::vector<double> a(static_cast<std::size_t>(inner), 0.0);
            for (std::int64_t n = 0; n < inner; ++n) {
                a[n] = bias.empty() ? 0 : bias[n];
                for (std::int64_t d = 0; d < width; ++d) a[n] += projection[n * width + d] * x[t * width + d];
            }
            a = unit(a);
            for (std::size_t e = 0; e < embeddings.size() / inner; ++e) {
                const auto m = unit({embeddings.begin() + e * inner, embeddings.begin() + (e + 1) * inner});
                double sum = 0;
                for (std::int64_t n = 0; n < inner; ++n) sum += a[n] * m[n];
                out.push_back(sharpness * sum);
            }
        }
        return out;
    }
};

} // namespace support::reference
