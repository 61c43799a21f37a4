// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The oracle's scores, biased and group-limited choices, and weights: per token, scalar, in double, straight from the
/// formulas. Includes nothing of the library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace support::reference {

enum class score_kind { softmax, sigmoid, sqrt_softplus };

/// How one token is routed.
struct score_rule {
    score_kind score = score_kind::softmax;
    std::vector<double> bias;    // (E), or empty
    std::int64_t k = 1;
    bool renormalize = false;    ///< weights over their sum; a single sigmoid or sqrt-softplus score is not divided
    double epsilon = 0;          ///< added to that sum, but not for softmax
    double least = 0;            ///< that sum is taken to be at least this
    double power = 1;            ///< a norm instead of that sum; then without epsilon and least
    double scale = 1;
    std::int64_t groups = 1, keep = 1, top = 1;
    bool outside_is_zero = false;
};

struct scored_token {
    std::vector<int> ids;        // (K) best first
    std::vector<double> weights; // (K)
};

/// All scores of a token. Logits are finite.
inline std::vector<double> scores(score_kind kind, const std::vector<double>& l)
{
    std::vector<double> s(l.size());
    double top = -INFINITY, sum = 0;
    for (double v : l) top = std::max(top, v);
    for (std::size_t e = 0; e < l.size(); ++e) {
        if (kind == score_kind::softmax) sum += s[e] = std::exp(l[e] - top);
        else if (kind == score_kind::sigmoid) s[e] = 1 / (1 + std::exp(-l[e]));
        else s[e] = std::sqrt(std::max(l[e], 0.0) + std::log1p(std::exp(-std::fabs(l[e]))));
    }
    if (kind == score_kind::softmax)
        for (double& v : s) v /= sum;
    return s;
}

/// The order of the n best of some values; ties go to the lower index.
inline std::vector<int> best_of(const std::vector<double>& values, std::int64_t n)
{
    std::vector<int> order(values.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return values[a] > values[b]; });
    order.resize(static_cast<std::size_t>(n));
    return order;
}

/// @param fixed  if given, the experts to weigh instead of choosing
inline scored_token score_token(const score_rule& rule, const std::vector<double>& l, const std::vector<int>* fixed = nullptr)
{
    const auto s = scores(rule.score, l);
    std::vector<double> seen = rule.bias.empty() ? l : s; // without a bias a monotonic score orders as the logits do
    for (std::size_t e = 0; e < seen.size() && !rule.bias.empty(); ++e) seen[e] += rule.bias[e];
    if (rule.groups > 1) {
        const std::size_t size = l.size() / static_cast<std::size_t>(rule.groups);
        std::vector<double> group;
        for (std::int64_t g = 0; g < rule.groups; ++g) {
            std::vector<double> inner;
            for (std::size_t i = static_cast<std::size_t>(g) * size; i < static_cast<std::size_t>(g + 1) * size; ++i)
                inner.push_back(s[i] + (rule.bias.empty() ? 0 : rule.bias[i]));
            std::sort(inner.rbegin(), inner.rend());
            double sum = 0;
            for (std::int64_t i = 0; i < rule.top; ++i) sum += inner[static_cast<std::size_t>(i)];
            group.push_back(sum);
        }
        const auto kept = best_of(group, rule.keep);
        for (std::size_t e = 0; e < seen.size(); ++e)
            if (std::find(kept.begin(), kept.end(), static_cast<int>(e / size)) == kept.end())
                seen[e] = rule.outside_is_zero ? 0 : -INFINITY;
    }
    scored_token out;
    out.ids = fixed ? *fixed : best_of(seen, rule.k);
    double divisor = 1;
    if (rule.renormalize && (rule.k > 1 || rule.score == score_kind::softmax)) {
        divisor = rule.score == score_kind::softmax ? 0 : rule.epsilon;
        for (int e : out.ids) divisor += s[static_cast<std::size_t>(e)];
        divisor = std::max(divisor, rule.least);
        if (rule.power != 1) {
            double sum = 0;
            for (int e : out.ids) sum += std::pow(s[static_cast<std::size_t>(e)], rule.power);
            divisor = std::pow(sum, 1 / rule.power);
        }
    }
    for (int e : out.ids) out.weights.push_back(rule.scale * s[static_cast<std::size_t>(e)] / divisor);
    return out;
}

} // namespace support::reference
