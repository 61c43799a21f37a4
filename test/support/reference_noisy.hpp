// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The oracle's noisy top-K (Shazeer et al. 2017, eq. 3 to 11): per token, scalar, in double, straight from the paper.
/// Includes nothing of the library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace support::reference {

/// The squared coefficient of variation.
inline double cv_squared(const std::vector<double>& v, bool sample = false)
{
    double mean = 0, squares = 0;
    for (double a : v) mean += a / static_cast<double>(v.size());
    for (double a : v) squares += (a - mean) * (a - mean);
    const auto n = static_cast<double>(v.size());
    return squares / (sample && n > 1 ? n - 1 : n) / (mean * mean + 1e-10);
}

struct noisy_rule {
    std::int64_t experts = 1, k = 1;
    double scale = 1;
    double importance = 0, load = 0;
    bool sample = false; ///< variance of both
};

struct noisy_result {
    std::vector<std::vector<int>> order; // by token: all experts, best first; empty for a token that is masked
    std::vector<int> experts;            // (T*K)
    std::vector<double> weights;         // (T*K)
    std::vector<double> noisy;           // (T,E)
    double importance = 0, load = 0;
};

/// @param logits  (T,E)   @param raw  (T,E)  x Wn^T   @param draws  (T,E)  z   @param mask  (T), or empty
/// @param fixed   if given, the orders to use instead of sorting
inline noisy_result noisy_top_k(const noisy_rule& rule, const std::vector<double>& logits, const std::vector<double>& raw,
                                const std::vector<double>& draws, const std::vector<std::uint8_t>& mask,
                                const std::vector<std::vector<int>>* fixed = nullptr)
{
    noisy_result r;
    const std::size_t all = static_cast<std::size_t>(rule.experts), k = static_cast<std::size_t>(rule.k);
    std::vector<double> importance(all, 0.0), load(all, 0.0);
    for (std::size_t t = 0; t < logits.size() / all; ++t) {
        std::vector<double> sigma, noisy;
        for (std::size_t e = 0; e < all; ++e) {
            sigma.push_back(std::log(1 + std::exp(raw[t * all + e])) + 0.01);
            noisy.push_back(logits[t * all + e] + draws[t * all + e] * sigma[e]);
        }
        r.noisy.insert(r.noisy.end(), noisy.begin(), noisy.end());
        if (!mask.empty() && mask[t] == 0) {
            r.order.emplace_back();
            r.experts.insert(r.experts.end(), k, -1);
            r.weights.insert(r.weights.end(), k, 0.0);
            continue;
        }
        std::vector<int> order(all);
        for (std::size_t e = 0; e < all; ++e) order[e] = static_cast<int>(e);
        std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return noisy[a] > noisy[b]; });
        if (fixed) order = (*fixed)[t];
        double sum = 0;
        for (std::size_t j = 0; j < k; ++j) sum += std::exp(noisy[order[j]] - noisy[order[0]]);
        for (std::size_t j = 0; j < k; ++j) {
            r.experts.push_back(order[j]);
            r.weights.push_back(rule.scale * std::exp(noisy[order[j]] - noisy[order[0]]) / sum);
            importance[order[j]] += r.weights.back();
        }
        for (std::size_t j = 0; j < all; ++j) { // by place in the order
            const int e = order[j];
            if (k == all) {
                load[e] += 1;
                continue;
            }
            const double threshold = noisy[order[j < k ? k : k - 1]]; // the k-th greatest of the others
            load[e] += 0.5 * std::erfc(-(logits[t * all + e] - threshold) / sigma[e] / std::sqrt(2.0));
        }
        r.order.push_back(order);
    }
    r.importance = rule.importance * cv_squared(importance, rule.sample);
    r.load = rule.load * cv_squared(load, rule.sample);
    return r;
}

} // namespace support::reference
