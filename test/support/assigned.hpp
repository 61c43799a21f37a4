// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the tests of assignments share: random batches, and what must hold of every routing.
#pragma once

#include <doctest/doctest.h>

#include <set>
#include <vector>

#include "compare.hpp"
#include "finite_difference.hpp"
#include "reference_assignment.hpp"
#include "reference_routing.hpp"
#include "run_gate.hpp"

namespace support {

/// Random logits as they are stored, and about `closed` of the tokens masked.
template <class Real>
struct random_batch : reference::batch {
    std::vector<Real> stored;

    random_batch(random& rng, std::int64_t t, std::int64_t e, double spread, double closed = 0)
        : stored(normal_vector<Real>(rng, t * e, spread))
    {
        tokens = t;
        experts = e;
        if (closed > 0)
            for (std::int64_t i = 0; i < t; ++i) mask.push_back(rng.coin(closed) ? 0 : 1);
        widen();
    }
    /// After `stored` was changed.
    void widen() { logits = widened(stored); }
};

/// The choices of a token.
struct range {
    std::int64_t begin, end;
};
template <class Run>
range range_of(const Run& r, std::int64_t t, std::int64_t k)
{
    if (r.first.empty()) return {t * k, (t + 1) * k};
    return {r.first[t], r.first[t + 1]};
}

/// The experts of every token.
template <class Run>
std::vector<std::vector<std::int32_t>> lists_of(const Run& r, std::int64_t tokens, std::int64_t k)
{
    std::vector<std::vector<std::int32_t>> out(tokens);
    for (std::int64_t t = 0; t < tokens; ++t) {
        const range c = range_of(r, t, k);
        out[t].assign(r.experts.begin() + c.begin, r.experts.begin() + c.end);
    }
    return out;
}

/// Bounds and uniqueness: what no routing may break, whatever the logits are.
template <class Run>
void holds_together(const Run& r, const reference::batch& b, std::int64_t k)
{
    if (!r.first.empty()) {
        REQUIRE_EQ(r.first.size(), std::size_t(b.tokens + 1));
        REQUIRE_EQ(r.first[0], 0);
        REQUIRE(std::is_sorted(r.first.begin(), r.first.end()));
        REQUIRE(r.first[b.tokens] <= std::int64_t(r.experts.size()));
        const std::int64_t rest = std::int64_t(r.experts.size()) - r.first[b.tokens];
        REQUIRE_EQ(std::count(r.experts.end() - rest, r.experts.end(), -1), rest);
        REQUIRE_EQ(std::count(r.weights.end() - rest, r.weights.end(), 0), rest);
    } else {
        REQUIRE_EQ(r.experts.size(), std::size_t(b.tokens * k));
    }
    const auto lists = lists_of(r, b.tokens, k);
    for (std::int64_t t = 0; t < b.tokens; ++t) {
        std::set<std::int32_t> once;
        const bool open = b.open(t);
        bool sound = true;
        for (std::int32_t e : lists[t]) sound = sound && (e == -1 || (e >= 0 && e < b.experts && open && once.insert(e).second));
        REQUIRE(sound);
    }
    const auto finite = [](auto v) { return std::isfinite(double(v)); };
    REQUIRE(std::all_of(r.weights.begin(), r.weights.end(), finite));
    REQUIRE(std::all_of(r.dlogits.begin(), r.dlogits.end(), finite));
}

/// Weights as a function of a token's logits, and the gradient of <dweights, weights> by finite differences of it, against
/// what a gate gave. Finite logits.
/// @param weigh  weigh(l, ids) -> weights, in double
template <class Real, class Run, class Weigh>
void weighs_as(const Run& r, const reference::batch& b, std::int64_t k, const std::vector<Real>& dweights, double spread,
               const Weigh& weigh)
{
    const double length = 2 * double(b.experts) + 8 * spread + 64;
    double largest = 1;
    for (Real d : dweights) largest = std::max(largest, std::fabs(double(d)));
    for (std::int64_t t = 0; t < b.tokens; ++t) {
        const range chosen = range_of(r, t, k);
        const std::int64_t begin = chosen.begin, end = chosen.end; // clang++ 14 has no lambdas that take structured bindings
        std::vector<double> l(b.logits.begin() + t * b.experts, b.logits.begin() + (t + 1) * b.experts);
        const std::vector<int> ids(r.experts.begin() + begin, r.experts.begin() + end);
        if (ids.empty() || ids[0] < 0) {
            for (std::int64_t c = begin; c < end; ++c) REQUIRE_EQ(double(r.weights[c]), 0.0);
            for (std::int64_t e = 0; e < b.experts; ++e) REQUIRE_EQ(double(r.dlogits[t * b.experts + e]), 0.0);
            continue;
        }
        const std::vector<Real> actual(r.weights.begin() + begin, r.weights.begin() + end);
        REQUIRE(close(actual, weigh(l, ids), {.length = length, .magnitude = 1}));
        const auto gradient = finite_difference(
            [&] {
                const auto w = weigh(l, ids);
                double sum = 0;
                for (std::size_t j = 0; j < ids.size(); ++j) sum += w[j] * double(dweights[begin + j]);
                return sum;
            },
            l);
        for (std::int64_t e = 0; e < b.experts; ++e) {
            const double bound = (roundoff<Real> * 8 * length + 1e-10) * largest;
            REQUIRE(std::fabs(double(r.dlogits[t * b.experts + e]) - gradient[e]) <= bound);
        }
    }
}

/// p_S of the softmax over all experts.
inline std::vector<double> over_all(const std::vector<double>& l, const std::vector<int>& ids)
{
    std::vector<int> all(l.size());
    for (std::size_t e = 0; e < all.size(); ++e) all[e] = static_cast<int>(e);
    const auto p = reference::softmax(l.data(), all);
    std::vector<double> out;
    for (int e : ids) out.push_back(p[e]);
    return out;
}

/// sigmoid(l_S).
inline std::vector<double> sigmoids(const std::vector<double>& l, const std::vector<int>& ids)
{
    std::vector<double> out;
    for (int e : ids) out.push_back(1 / (1 + std::exp(-l[e])));
    return out;
}

} // namespace support
