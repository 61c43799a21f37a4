// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The oracle's softmax router with bounds: logits and weights are sums in accumulate_t whatever T is. The formulas are
/// those of reference_routing.hpp. Choices are given, and checked: logits that are nearer than their errors may come in
/// either order, all others in one.
#pragma once

#include <string>
#include <vector>

#include "expected_expert.hpp"

namespace support {

template <class T>
struct expected_routing {
    using real = fastmoe::accumulate_t<T>;
    using number = bounded<real>;
    using numbers = std::vector<number>;

    reference::options options;
    int64_t tokens = 0, experts = 0;
    numbers logits, probabilities;            // (T,E)
    std::vector<int> chosen;                  // (C)  before anything is dropped
    std::vector<weighted_choice<T>> choices;  // (C)
    numbers before;                           // (C)  weights before anything is dropped
    number balance_loss, z_loss;

    /// @param chosen  experts before capacity           // (C)
    /// @param kept    which of them stay                // (C)
    expected_routing(const reference::options& o, const numbers& logits_, int64_t tokens_, int64_t experts_,
                     const std::vector<int>& chosen_, const std::vector<bool>& kept)
        : options(o), tokens(tokens_), experts(experts_), logits(logits_), chosen(chosen_)
    {
        std::vector<int> all;
        for (int e = 0; e < experts; ++e) all.push_back(e);
        for (int64_t t = 0; t < tokens; ++t) {
            const numbers p = softmax(t, all);
            probabilities.insert(probabilities.end(), p.begin(), p.end());
            const numbers among = softmax(t, choices_of(t));
            for (int64_t j = 0; j < o.k; ++j) {
                const int id = chosen[t * o.k + j];
                before.push_back(!is_expert(id) ? number(0) : (o.renormalize ? among[j] : p[id]) * number(o.scale));
                choices.push_back({t, kept[t * o.k + j] ? id : -1, kept[t * o.k + j] ? before.back() : number(0)});
            }
            if (o.rescale) rescale(t);
        }
        take_losses();
    }

    /// dL/dlogits for L = <dweights, weights> + loss_scale * (balance + z).                  // (T,E)
    numbers backward(const numbers& dweights, double loss_scale) const
    {
        numbers out;
        for (int64_t t = 0; t < tokens; ++t) {
            const auto ids = choices_of(t);
            const numbers dw = gradient_before(t, dweights), w = softmax(t, ids);
            numbers dl(experts), dp(experts);
            if (options.renormalize) {
                bounded_sum<real> inner;
                for (int64_t j = 0; j < options.k; ++j) inner.add(w[j], dw[j]);
                for (int64_t j = 0; j < options.k; ++j)
                    if (ids[j] >= 0) dl[ids[j]] = w[j] * (dw[j] - inner.total());
            } else {
                for (int64_t j = 0; j < options.k; ++j)
                    if (ids[j] >= 0) dp[ids[j]] = dw[j];
            }
            through_softmax(t, dp, dl);
            add_losses(t, loss_scale, dl);
            out.insert(out.end(), dl.begin(), dl.end());
        }
        return out;
    }

    /// What is wrong with the choices, or nothing: best first, each at least as good as all that were not chosen.
    std::string complaint() const
    {
        for (int64_t t = 0; t < tokens; ++t) {
            const auto ids = choices_of(t);
            const auto better = [&](int a, int b) { // surely
                const auto &x = logits[t * experts + a], &y = logits[t * experts + b];
                return x.value - x.error > y.value + y.error;
            };
            std::vector<bool> taken(experts);
            for (int64_t j = 0; j < options.k; ++j) {
                if (ids[j] < 0 || ids[j] >= experts || taken[ids[j]]) return "token " + std::to_string(t) + " chose amiss";
                taken[ids[j]] = true;
                if (j > 0 && better(ids[j], ids[j - 1])) return "token " + std::to_string(t) + " is not sorted";
            }
            for (int e = 0; e < experts && options.k > 0; ++e)
                if (!taken[e] && better(e, ids.back())) return "token " + std::to_string(t) + " passed over " + std::to_string(e);
        }
        return "";
    }

private:
    bool is_expert(int id) const { return id >= 0 && id < experts; } // others are complaints, and weigh nothing
    std::vector<int> choices_of(int64_t t) const
    {
        return {chosen.begin() + t * options.k, chosen.begin() + (t + 1) * options.k};
    }
    numbers softmax(int64_t t, const std::vector<int>& ids) const
    {
        const number* l = logits.data() + t * experts;
        double top = -INFINITY;
        for (const int e : ids)
            if (is_expert(e)) top = std::fmax(top, l[e].value);
        bounded_sum<real> sum;
        numbers p;
        for (const int e : ids) {
            p.push_back(!is_expert(e) ? number(0) : exponential(l[e] - number(top)));
            sum.add(p.back());
        }
        for (number& v : p)
            if (v.value != 0) v = v / sum.total();
        return p;
    }
    number log_sum_exp(int64_t t) const
    {
        const number* l = logits.data() + t * experts;
        double top = -INFINITY;
        for (int64_t e = 0; e < experts; ++e) top = std::fmax(top, l[e].value);
        bounded_sum<real> sum;
        for (int64_t e = 0; e < experts; ++e) sum.add(exponential(l[e] - number(top)));
        return number(top) + logarithm(sum.total());
    }

    struct growth_of_token {
        number sum, rest;
    };
    growth_of_token growth(int64_t t) const
    {
        bounded_sum<real> sum, rest;
        for (int64_t c = t * options.k; c < (t + 1) * options.k; ++c) {
            sum.add(before[c]);
            if (choices[c].expert >= 0) rest.add(before[c]);
        }
        return {sum.total(), rest.total()};
    }
    void rescale(int64_t t)
    {
        const auto [sum, rest] = growth(t);
        if (!(rest.value > 0)) return;
        for (int64_t c = t * options.k; c < (t + 1) * options.k; ++c)
            if (choices[c].expert >= 0) choices[c].weight = before[c] * (sum / rest);
    }
    /// The gradient of the weights as they were before a choice was dropped, times scale.
    numbers gradient_before(int64_t t, const numbers& dweights) const
    {
        const int64_t begin = t * options.k;
        numbers g(options.k);
        for (int64_t j = 0; j < options.k; ++j)
            if (choices[begin + j].expert >= 0) g[j] = dweights[begin + j] * number(options.scale);
        if (!options.rescale) return g;
        const auto [sum, rest] = growth(t);
        if (!(rest.value > 0)) return g;
        bounded_sum<real> dot; // d (w sum / rest): through w, through the sum and through what is left
        for (int64_t j = 0; j < options.k; ++j) dot.add(g[j], before[begin + j]);
        const number mean = dot.total() / rest;
        for (int64_t j = 0; j < options.k; ++j)
            g[j] = (choices[begin + j].expert >= 0 ? (sum / rest) * (g[j] - mean) : number(0)) + mean;
        return g;
    }
    void through_softmax(int64_t t, const numbers& dp, numbers& dl) const
    {
        const number* p = probabilities.data() + t * experts;
        bounded_sum<real> inner;
        for (int64_t e = 0; e < experts; ++e) inner.add(p[e], dp[e]);
        for (int64_t e = 0; e < experts; ++e) dl[e] = dl[e] + p[e] * (dp[e] - inner.total());
    }
    void add_losses(int64_t t, double loss_scale, numbers& dl) const
    {
        const double count = static_cast<double>(tokens), scaled = loss_scale * options.balance * static_cast<double>(experts);
        numbers slope(experts);
        for (int e = 0; e < experts && options.k > 0 && scaled != 0; ++e)
            slope[e] = number::rounding(scaled * chose(e) / (count * static_cast<double>(options.k)) / count, 0);
        through_softmax(t, slope, dl);
        const number z = log_sum_exp(t) * number::rounding(2 * loss_scale * options.z / count, 0);
        for (int64_t e = 0; e < experts && options.z != 0; ++e) dl[e] = dl[e] + z * probabilities[t * experts + e];
    }
    double chose(int e) const
    {
        double n = 0;
        for (const int id : chosen) n += id == e;
        return n;
    }
    void take_losses()
    {
        if (tokens == 0) return;
        bounded_sum<real> balance, squares;
        const double count = static_cast<double>(tokens);
        for (int e = 0; e < experts && options.k > 0 && options.balance != 0; ++e) {
            const double share = options.balance * static_cast<double>(experts) * chose(e) / (count * count * static_cast<double>(options.k));
            for (int64_t t = 0; t < tokens; ++t) balance.add(probabilities[t * experts + e], number::rounding(share, 0));
        }
        for (int64_t t = 0; t < tokens && options.z != 0; ++t) {
            const number lse = log_sum_exp(t);
            squares.add(lse * lse, number::rounding(options.z / count, 0));
        }
        balance_loss = balance.total();
        z_loss = squares.total();
    }
};

/// What is wrong with the choices that capacity kept, or nothing. Counted by hand where the order is that of positions;
/// by weight, only what the weights' errors leave no doubt of.
template <class T>
std::string capacity_complaint(const expected_routing<T>& r)
{
    const int64_t cap = r.options.capacity;
    if (cap < 0 || r.options.drop != reference::drop_order::by_weight) {
        reference::routing plain{r.tokens, r.experts, r.options.k, {}, {}, r.chosen, {}, {}, 0, 0};
        auto positions = r.options;
        if (cap < 0) positions.drop = reference::drop_order::token_major; // all stay; there are no weights to sort here
        const auto stays = kept_by_capacity(positions, plain);
        for (std::size_t c = 0; c < stays.size(); ++c)
            if (stays[c] != (r.choices[c].expert >= 0)) return "choice " + std::to_string(c) + (stays[c] ? " was dropped" : " stayed");
        return "";
    }
    for (int e = 0; e < r.experts; ++e) {
        int64_t kept = 0, all = 0;
        double least = INFINITY, greatest = -INFINITY;
        for (std::size_t c = 0; c < r.chosen.size(); ++c) {
            if (r.chosen[c] != e) continue;
            ++all;
            const bool stays = r.choices[c].expert >= 0;
            kept += stays;
            if (stays) least = std::fmin(least, r.before[c].value + r.before[c].error);
            else greatest = std::fmax(greatest, r.before[c].value - r.before[c].error);
        }
        if (kept != std::min(cap, all)) return "expert " + std::to_string(e) + " kept " + std::to_string(kept) + " choices";
        if (greatest > least) return "expert " + std::to_string(e) + " dropped a greater weight than it kept";
    }
    return "";
}

} // namespace support
