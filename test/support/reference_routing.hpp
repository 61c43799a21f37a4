// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The oracle's router: choice, weights, capacity, the Switch balance loss and the z-loss, with their gradients; per
/// token, scalar, in double. Part of reference.hpp; includes nothing of the library.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace support::reference {

using std::int64_t;
using numbers = std::vector<double>;

enum class drop_order { token_major, choice_major, by_weight };

struct options {
    int64_t k = 2;
    bool renormalize = true; ///< softmax over the chosen; otherwise the probabilities of the softmax over all
    double scale = 1;        ///< multiplies every weight
    int64_t capacity = -1;   ///< choices an expert keeps; negative: all
    drop_order drop = drop_order::token_major;
    bool rescale = false; ///< a token's weights that stay grow in proportion until their sum is what it was
    double balance = 0; ///< coefficient of the Switch balance loss
    double z = 0;       ///< coefficient of the z-loss
};

/// One choice of a token. An expert of -1 is dropped: it adds nothing and its weight is 0.
struct choice {
    int64_t token;
    int expert;
    double weight;
};

/// What route() decided. Choice c = t*K + j is the j-th of token t; `chosen` is the expert before capacity drops it.
struct routing {
    int64_t tokens = 0, experts = 0, k = 0;
    numbers logits, probabilities; // (T,E)
    std::vector<int> chosen;       // (C)
    std::vector<choice> choices;   // (C)
    std::vector<int64_t> counts;   // (E) choices that capacity kept
    double balance_loss = 0, z_loss = 0;

    std::vector<int> expert_ids() const
    {
        std::vector<int> out;
        for (const choice& c : choices) out.push_back(c.expert);
        return out;
    }
    numbers weights() const
    {
        numbers out;
        for (const choice& c : choices) out.push_back(c.weight);
        return out;
    }
};

/// +Inf > finite > -Inf > NaN, then the larger logit, then the lower id.
inline bool goes_before(const double* logits, int a, int b)
{
    const auto rank = [](double l) { return std::isnan(l) ? 0 : l == -INFINITY ? 1 : std::isfinite(l) ? 2 : 3; };
    if (rank(logits[a]) != rank(logits[b])) return rank(logits[a]) > rank(logits[b]);
    if (rank(logits[a]) == 2 && logits[a] != logits[b]) return logits[a] > logits[b];
    return a < b;
}

/// Softmax over some logits: +Inf share everything equally; -Inf, NaN and the id -1 get nothing. All zeros if nothing
/// is left.
inline numbers softmax(const double* logits, const std::vector<int>& ids)
{
    const auto counts = [&](int e) { return e >= 0 && !std::isnan(logits[e]); };
    double top = -INFINITY, sum = 0;
    for (int e : ids)
        if (counts(e)) top = std::max(top, logits[e]);
    numbers p(ids.size(), 0.0);
    if (top == -INFINITY) return p;
    for (std::size_t i = 0; i < ids.size(); ++i) {
        if (!counts(ids[i])) continue;
        const double l = logits[ids[i]];
        p[i] = top == INFINITY ? (l == INFINITY ? 1 : 0) : std::exp(l - top);
        sum += p[i];
    }
    for (double& v : p) v /= sum;
    return p;
}

/// log of the sum of exp over a token's logits, without NaN; not finite if one is +Inf or none is finite.
inline double logsumexp(const double* logits, int64_t experts)
{
    double top = -INFINITY, sum = 0;
    for (int64_t e = 0; e < experts; ++e) top = std::isnan(logits[e]) ? top : std::max(top, logits[e]);
    if (!std::isfinite(top)) return top;
    for (int64_t e = 0; e < experts; ++e) sum += std::isnan(logits[e]) ? 0.0 : std::exp(logits[e] - top);
    return top + std::log(sum);
}

/// ceil(factor * K * T / E), counted up so that no rounding is shared with anyone.
inline int64_t capacity_of(double factor, int64_t k, int64_t tokens, int64_t experts)
{
    const double wanted = factor * static_cast<double>(k * tokens);
    int64_t cap = static_cast<int64_t>(wanted / static_cast<double>(experts));
    cap = std::max<int64_t>(cap - 2, 0);
    while (static_cast<double>(cap * experts) < wanted) ++cap;
    return cap;
}

/// Which choices stay when an expert keeps only `capacity` of them.
inline std::vector<bool> kept_by_capacity(const options& o, const routing& r)
{
    std::vector<int64_t> order;
    if (o.drop == drop_order::choice_major)
        for (int64_t j = 0; j < r.k; ++j)
            for (int64_t t = 0; t < r.tokens; ++t) order.push_back(t * r.k + j);
    else
        for (int64_t c = 0; c < r.tokens * r.k; ++c) order.push_back(c);
    if (o.drop == drop_order::by_weight)
        std::stable_sort(order.begin(), order.end(),
                         [&](int64_t a, int64_t b) { return r.choices[a].weight > r.choices[b].weight; });
    std::vector<int64_t> taken(r.experts, 0);
    std::vector<bool> kept(order.size(), false);
    for (int64_t c : order)
        if (r.chosen[c] >= 0) kept[c] = o.capacity < 0 || taken[r.chosen[c]]++ < o.capacity;
    return kept;
}

/// What the weights of a token sum to before anything is dropped, and what those that stay do.
struct token_sums {
    double all = 0, rest = 0;
    double growth() const { return rest > 0 ? all / rest : 1; }
};

/// @param before  the token's weights before anything is dropped         // (K)
/// @param stays   whether choice j of the token does
template <class Stays>
token_sums sums_of(const numbers& before, const Stays& stays)
{
    token_sums out;
    for (std::size_t j = 0; j < before.size(); ++j) {
        out.all += before[j];
        if (stays(j)) out.rest += before[j];
    }
    return out;
}

/// Chooses, weighs, drops and takes the losses. A token with neither a finite logit nor +Inf has all its choices
/// dropped; it adds nothing to a loss, but counts in T.
/// @param fixed  if given, the (C) experts to use instead of choosing (-1 for a dropped token), before capacity;
/// @param kept   if given, which of them stay instead of the capacity rule
inline routing route(const options& o, const numbers& logits, int64_t tokens, int64_t experts,
                     const std::vector<int>* fixed = nullptr, const std::vector<bool>* kept = nullptr)
{
    if (static_cast<int64_t>(logits.size()) != tokens * experts) throw std::logic_error("reference: logits (T,E)");
    if (o.k < 0 || o.k > experts) throw std::logic_error("reference: k");
    routing r{tokens, experts, o.k, logits, numbers(logits.size(), 0.0), {}, {}, {}, 0, 0};
    std::vector<int> all(experts);
    for (int e = 0; e < experts; ++e) all[e] = e;
    for (int64_t t = 0; t < tokens; ++t) {
        const double* l = logits.data() + t * experts;
        const numbers p = softmax(l, all);
        std::copy(p.begin(), p.end(), r.probabilities.begin() + t * experts);
        std::vector<int> ids = all;
        std::stable_sort(ids.begin(), ids.end(), [l](int a, int b) { return goes_before(l, a, b); });
        ids.resize(o.k);
        if (fixed) ids.assign(fixed->begin() + t * o.k, fixed->begin() + (t + 1) * o.k);
        const bool lost = std::none_of(l, l + experts, [](double v) { return std::isfinite(v) || v == INFINITY; });
        if (lost) ids.assign(o.k, -1);
        const numbers among = softmax(l, ids);
        for (int64_t j = 0; j < o.k; ++j) {
            const double w = ids[j] < 0 ? 0.0 : o.renormalize ? among[j] : p[ids[j]];
            r.chosen.push_back(ids[j]);
            r.choices.push_back({t, ids[j], o.scale * w});
        }
    }
    const std::vector<bool> stays = kept ? *kept : kept_by_capacity(o, r);
    for (int64_t t = 0; t < tokens && o.rescale; ++t) {
        numbers before;
        for (int64_t j = 0; j < o.k; ++j) before.push_back(r.choices[t * o.k + j].weight);
        const double growth = sums_of(before, [&](std::size_t j) { return stays[t * o.k + j]; }).growth();
        for (int64_t j = 0; j < o.k; ++j) r.choices[t * o.k + j].weight *= growth;
    }
    r.counts.assign(experts, 0);
    for (std::size_t c = 0; c < r.choices.size(); ++c) {
        if (!stays[c]) r.choices[c] = {r.choices[c].token, -1, 0.0};
        else if (r.choices[c].expert >= 0) ++r.counts[r.choices[c].expert];
    }
    if (tokens == 0) return r;
    const double count = static_cast<double>(tokens);
    for (int e = 0; e < experts; ++e) { // Switch Transformer (2021), eq. 4 to 6, with K choices a token
        double mean = 0;
        for (int64_t t = 0; t < tokens; ++t) mean += r.probabilities[t * experts + e] / count;
        const auto chose = static_cast<double>(std::count(r.chosen.begin(), r.chosen.end(), e));
        if (o.k > 0)
            r.balance_loss +=
                o.balance * static_cast<double>(experts) * mean * chose / (count * static_cast<double>(o.k));
    }
    for (int64_t t = 0; t < tokens; ++t) { // ST-MoE (2022), eq. 5
        const double lse = logsumexp(logits.data() + t * experts, experts);
        if (std::isfinite(lse)) r.z_loss += o.z * lse * lse / count;
    }
    return r;
}

/// dL/dlogits (T,E) for L = <dweights, weights> + loss_scale * (balance + z). The choice itself has no gradient.
inline numbers route_backward(const options& o, const routing& r, const numbers& dweights, double loss_scale = 1)
{
    numbers out(r.logits.size(), 0.0);
    const double tokens = static_cast<double>(r.tokens), experts = static_cast<double>(r.experts);
    numbers balance(r.experts, 0.0); // d(balance loss)/dp, the same for every token
    for (int e = 0; e < r.experts && r.k > 0; ++e)
        balance[e] = o.balance * experts * static_cast<double>(std::count(r.chosen.begin(), r.chosen.end(), e)) /
                     (tokens * static_cast<double>(r.k)) / tokens;
    for (int64_t t = 0; t < r.tokens; ++t) {
        const double* l = r.logits.data() + t * r.experts;
        const double* p = r.probabilities.data() + t * r.experts;
        double* dl = out.data() + t * r.experts;
        const std::vector<int> ids(r.chosen.begin() + t * r.k, r.chosen.begin() + (t + 1) * r.k);
        numbers dw(r.k, 0.0); // a dropped choice has weight 0, whatever the logits are
        const auto stays = [&](std::size_t j) { return r.choices[t * r.k + static_cast<int64_t>(j)].expert >= 0; };
        for (int64_t j = 0; j < r.k; ++j)
            if (stays(j)) dw[j] = o.scale * dweights[t * r.k + j];
        if (o.rescale) { // v = w A / R: dv_i / dw_j = [i = j] A / R + w_i / R - [j stays] w_i A / R^2
            numbers before = softmax(l, ids);
            for (int64_t j = 0; j < r.k && !o.renormalize; ++j) before[j] = ids[j] < 0 ? 0 : p[ids[j]];
            const token_sums sums = sums_of(before, stays);
            double dot = 0;
            for (int64_t j = 0; j < r.k; ++j) dot += dw[j] * before[j];
            for (int64_t j = 0; j < r.k && sums.rest > 0; ++j)
                dw[j] = sums.growth() * (dw[j] - (stays(j) ? dot / sums.rest : 0)) + dot / sums.rest;
        }
        numbers dp(r.experts);
        for (int e = 0; e < r.experts; ++e) dp[e] = loss_scale * balance[e];
        if (o.renormalize) {
            const numbers w = softmax(l, ids);
            double inner = 0;
            for (int64_t j = 0; j < r.k; ++j) inner += w[j] * dw[j];
            for (int64_t j = 0; j < r.k; ++j)
                if (ids[j] >= 0) dl[ids[j]] += w[j] * (dw[j] - inner);
        } else {
            for (int64_t j = 0; j < r.k; ++j)
                if (ids[j] >= 0) dp[ids[j]] += dw[j];
        }
        double inner = 0;
        for (int e = 0; e < r.experts; ++e) inner += p[e] * dp[e];
        const double lse = logsumexp(l, r.experts);
        for (int e = 0; e < r.experts; ++e) {
            dl[e] += p[e] * (dp[e] - inner);
            if (std::isfinite(lse)) dl[e] += loss_scale * o.z * 2 * lse * p[e] / tokens;
        }
    }
    return out;
}

} // namespace support::reference
