// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Random choices, and which of them a capacity keeps: decided one at a time. Shares no code with the library.
#pragma once

#include <algorithm>
#include <vector>

#include <fastmoe/routing/capacity.hpp>

#include "random.hpp"

namespace support {

/// A routing in memory that the test can read and write.
template <class Real>
struct choices {
    std::int64_t tokens, experts_total, k; // k = 0: ragged
    std::vector<std::int32_t> experts, first;
    std::vector<Real> weights;

    fastmoe::routing<Real> view()
    {
        fastmoe::routing<Real> r{tokens, experts_total, k, fastmoe::as_vector(experts), fastmoe::as_vector(weights), {}};
        if (k == 0) r.first = fastmoe::vector_view<const std::int32_t>(first.data(), tokens + 1);
        return r;
    }
};

/// Random choices: distinct ids in a token, some dropped already, weights with many ties.
template <class Real>
choices<Real> random_choices(random& rng, std::int64_t tokens, std::int64_t experts, std::int64_t k)
{
    choices<Real> c{tokens, experts, k, {}, {0}, {}};
    for (std::int64_t t = 0; t < tokens; ++t) {
        const auto order = rng.permutation(experts);
        const std::int64_t n = k > 0 ? k : rng.integer(0, std::min<std::int64_t>(experts, 5));
        for (std::int64_t j = 0; j < n; ++j) {
            const bool lost = rng.coin(0.1);
            c.experts.push_back(lost ? -1 : order[j]);
            c.weights.push_back(lost ? Real(0) : Real(rng.integer(1, 6)) / 8);
        }
        c.first.push_back(static_cast<std::int32_t>(c.experts.size()));
    }
    return c;
}

/// Which choices stay, decided one at a time in the order that the policy names.
template <class Real>
std::vector<bool> kept(const choices<Real>& c, fastmoe::drop_order order, std::int64_t limit)
{
    const std::int64_t n = static_cast<std::int64_t>(c.experts.size());
    std::vector<std::int64_t> turn;
    if (order == fastmoe::drop_order::choice_major)
        for (std::int64_t j = 0; j < c.k; ++j)
            for (std::int64_t t = 0; t < c.tokens; ++t) turn.push_back(t * c.k + j);
    else
        for (std::int64_t i = 0; i < n; ++i) turn.push_back(i);
    if (order == fastmoe::drop_order::by_weight)
        std::stable_sort(turn.begin(), turn.end(),
                         [&](std::int64_t a, std::int64_t b) { return c.weights[a] > c.weights[b]; });
    std::vector<std::int64_t> taken(c.experts_total, 0);
    std::vector<bool> out(n, false);
    for (std::int64_t i : turn)
        if (c.experts[i] >= 0) out[i] = taken[c.experts[i]]++ < limit;
    return out;
}

} // namespace support
