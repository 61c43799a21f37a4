// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The oracle's assignments: expert choice, token rounding, Sinkhorn's scaling and the cheapest balanced assignment; in
/// long double, by sorting and by textbook algorithms. Includes nothing of the library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace support::reference {

/// Logits of T tokens and which of them take part.
struct batch {
    std::int64_t tokens = 0, experts = 0;
    std::vector<double> logits;     // (T,E)
    std::vector<std::uint8_t> mask; // (T), or empty

    double at(std::int64_t t, std::int64_t e) const { return logits[static_cast<std::size_t>(t * experts + e)]; }

    bool open(std::int64_t t) const
    {
        if (!mask.empty() && mask[static_cast<std::size_t>(t)] == 0) return false;
        for (std::int64_t e = 0; e < experts; ++e)
            if (at(t, e) > -INFINITY) return true; // finite or +Inf
        return false;
    }
    std::int64_t open_tokens() const
    {
        std::int64_t n = 0;
        for (std::int64_t t = 0; t < tokens; ++t) n += open(t);
        return n;
    }
};

/// log softmax of a token, NaN where the logit is: the +Inf share. Terms are added from the least, so that rows which are
/// permutations of each other have equal sums.
inline std::vector<long double> log_softmax(const batch& b, std::int64_t t)
{
    long double top = -INFINITY;
    for (std::int64_t e = 0; e < b.experts; ++e)
        if (b.at(t, e) > top) top = b.at(t, e);
    std::vector<long double> out, terms;
    for (std::int64_t e = 0; e < b.experts; ++e) {
        const long double l = b.at(t, e), distance = l == top ? 0 : l - top;
        out.push_back(distance);
        if (!std::isnan(distance)) terms.push_back(std::exp(distance));
    }
    std::sort(terms.begin(), terms.end());
    long double sum = 0;
    for (long double v : terms) sum += v;
    for (long double& v : out) v -= std::log(sum);
    return out;
}

/// Scores by expert, of the tokens that take part: log p. NaN ranks last.
inline std::vector<std::vector<long double>> probability_scores(const batch& b)
{
    std::vector<std::vector<long double>> out(b.experts, std::vector<long double>(b.tokens, NAN));
    for (std::int64_t t = 0; t < b.tokens; ++t) {
        if (!b.open(t)) continue;
        const auto p = log_softmax(b, t);
        for (std::int64_t e = 0; e < b.experts; ++e) out[e][t] = p[e];
    }
    return out;
}

/// The order of all tokens that take part, best first; ties go to the lower token.
inline std::vector<std::int64_t> ranked_tokens(const batch& b, const std::vector<long double>& score)
{
    std::vector<std::int64_t> order;
    for (std::int64_t t = 0; t < b.tokens; ++t)
        if (b.open(t)) order.push_back(t);
    std::stable_sort(order.begin(), order.end(), [&](std::int64_t x, std::int64_t y) {
        if (std::isnan(score[x]) || std::isnan(score[y])) return !std::isnan(score[x]) && std::isnan(score[y]);
        return score[x] > score[y];
    });
    return order;
}

/// A token's K best experts: +Inf > finite > -Inf > NaN, ties to the lower id; none if it takes no part.
inline std::vector<int> best_experts(const batch& b, std::int64_t t, std::int64_t k)
{
    std::vector<int> order;
    if (!b.open(t)) return order;
    for (int e = 0; e < b.experts; ++e) order.push_back(e);
    std::stable_sort(order.begin(), order.end(), [&](int x, int y) {
        const double l = b.at(t, x), m = b.at(t, y);
        if (std::isnan(l) || std::isnan(m)) return !std::isnan(l) && std::isnan(m);
        return l > m;
    });
    order.resize(static_cast<std::size_t>(k));
    return order;
}

/// Which experts have each token when expert e takes the first of its order; ascending.
using token_lists = std::vector<std::vector<int>>;

inline token_lists expert_choice(const batch& b, std::int64_t each)
{
    token_lists out(b.tokens);
    const auto scores = probability_scores(b);
    for (int e = 0; e < b.experts; ++e) {
        const auto order = ranked_tokens(b, scores[e]);
        for (std::int64_t i = 0; i < each && i < std::int64_t(order.size()); ++i) out[order[i]].push_back(e);
    }
    return out;
}

/// @param rounded  the number of tokens of an expert that was chosen by as many
template <class Rounded>
token_lists token_rounding(const batch& b, std::int64_t k, const Rounded& rounded)
{
    std::vector<std::vector<char>> own(b.experts, std::vector<char>(b.tokens, 0));
    for (std::int64_t t = 0; t < b.tokens; ++t)
        for (int e : best_experts(b, t, k)) own[e][t] = 1;
    token_lists out(b.tokens);
    const auto scores = probability_scores(b);
    for (int e = 0; e < b.experts; ++e) {
        auto order = ranked_tokens(b, scores[e]);
        std::stable_partition(order.begin(), order.end(), [&](std::int64_t t) { return own[e][t] != 0; });
        const std::int64_t n = rounded(std::count(own[e].begin(), own[e].end(), 1));
        for (std::int64_t i = 0; i < n && i < std::int64_t(order.size()); ++i) out[order[i]].push_back(e);
    }
    return out;
}

/// log(d1 C d0) after a number of rounds, straight from d0 = 1 / (T sum_e d1 C), d1 = 1 / (E sum_t d0 C) in logarithms.
/// Finite logits; tokens that take no part count nowhere, and their rows are NaN.                        // (T,E)
inline std::vector<long double> sinkhorn_scores(const batch& b, int rounds)
{
    const auto log_sum = [](const std::vector<long double>& terms) {
        const long double top = *std::max_element(terms.begin(), terms.end());
        long double sum = 0;
        for (long double v : terms) sum += std::exp(v - top);
        return top + std::log(sum);
    };
    std::vector<long double> d0(b.tokens, NAN), d1(b.experts, 0.0L), terms;
    const long double tokens = b.open_tokens(), experts = b.experts;
    for (int r = 0; r < rounds; ++r) {
        for (std::int64_t t = 0; t < b.tokens; ++t) {
            if (!b.open(t)) continue;
            terms.clear();
            for (std::int64_t e = 0; e < b.experts; ++e) terms.push_back(d1[e] + b.at(t, e));
            d0[t] = -std::log(tokens) - log_sum(terms);
        }
        for (std::int64_t e = 0; e < b.experts; ++e) {
            terms.clear();
            for (std::int64_t t = 0; t < b.tokens; ++t)
                if (b.open(t)) terms.push_back(d0[t] + b.at(t, e));
            if (!terms.empty()) d1[e] = -std::log(experts) - log_sum(terms);
        }
    }
    std::vector<long double> out;
    for (std::int64_t t = 0; t < b.tokens; ++t)
        for (std::int64_t e = 0; e < b.experts; ++e) out.push_back(d1[e] + b.at(t, e) + d0[t]);
    return out;
}

/// The least cost of giving each of n rows a column of its own, n <= m: the algorithm of Kuhn and Munkres with potentials,
/// row by row, in O(n^2 m).
/// @param cost  cost(i, j) for row i and column j
template <class Cost>
long double least_assignment_cost(std::int64_t n, std::int64_t m, const Cost& cost)
{
    std::vector<long double> u(n + 1, 0.0L), v(m + 1, 0.0L);
    std::vector<std::int64_t> row_of(m + 1, 0), way(m + 1, 0);
    for (std::int64_t i = 1; i <= n; ++i) {
        row_of[0] = i;
        std::int64_t j = 0;
        std::vector<long double> least(m + 1, INFINITY);
        std::vector<char> used(m + 1, 0);
        do {
            used[j] = 1;
            const std::int64_t row = row_of[j];
            long double delta = INFINITY;
            std::int64_t next = 0;
            for (std::int64_t c = 1; c <= m; ++c) {
                if (used[c]) continue;
                const long double reduced = cost(row - 1, c - 1) - u[row] - v[c];
                if (reduced < least[c]) least[c] = reduced, way[c] = j;
                if (least[c] < delta) delta = least[c], next = c;
            }
            for (std::int64_t c = 0; c <= m; ++c) {
                if (used[c]) u[row_of[c]] += delta, v[c] -= delta;
                else least[c] -= delta;
            }
            j = next;
        } while (row_of[j] != 0);
        while (j != 0) {
            row_of[j] = row_of[way[j]];
            j = way[j];
        }
    }
    long double total = 0;
    for (std::int64_t c = 1; c <= m; ++c)
        if (row_of[c] != 0) total += cost(row_of[c] - 1, c - 1);
    return total;
}

/// The greatest sum of logits of one expert for every token that takes part, with at most ceil(N/E) for each expert.
/// Finite logits.
inline long double greatest_balanced_sum(const batch& b)
{
    std::vector<std::int64_t> open;
    for (std::int64_t t = 0; t < b.tokens; ++t)
        if (b.open(t)) open.push_back(t);
    const auto n = static_cast<std::int64_t>(open.size());
    const std::int64_t each = (n + b.experts - 1) / b.experts;
    const auto cost = [&](std::int64_t i, std::int64_t slot) -> long double { return -b.at(open[i], slot / each); };
    return -least_assignment_cost(n, each * b.experts, cost);
}

} // namespace support::reference
