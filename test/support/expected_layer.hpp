// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What a layer must give in dtype T: router, experts and shared experts put together, every result with its bound.
#pragma once

#include "expected_gate.hpp"

namespace support {

/// logits = x gate^T + bias, summed and kept in accumulate_t.                             // (T,E)
template <class T>
std::vector<bounded<fastmoe::accumulate_t<T>>> expected_logits(const reference::model& m, const reference::numbers& x,
                                                               int64_t tokens)
{
    std::vector<bounded<fastmoe::accumulate_t<T>>> out;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t e = 0; e < m.count(); ++e) {
            bounded_sum<fastmoe::accumulate_t<T>> sum;
            for (int64_t d = 0; d < m.width; ++d) sum.add(x[t * m.width + d] , m.gate[e * m.width + d]);
            if (!m.gate_bias.empty()) sum.add(m.gate_bias[e]);
            out.push_back(sum.total());
        }
    return out;
}

template <class T>
struct expected_layer {
    using real = fastmoe::accumulate_t<T>;
    using number = bounded<real>;
    using numbers = std::vector<number>;
    using sums = std::vector<bounded_sum<real>>;

    numbers y, dx;                                        // (T,D)  to be rounded once more
    sums gate, gate_bias;                                 // (E,D), (E)
    std::vector<expected_gradients<T>> experts, shared;

    /// @param choices  with their weights
    /// @param dlogits  of the weights' gradients, as function of them: numbers(const numbers& dweights)
    template <class Dlogits>
    expected_layer(const reference::model& m, const reference::numbers& x, int64_t tokens,
                   const std::vector<weighted_choice<T>>& choices, const reference::numbers& dy, const Dlogits& dlogits)
        : gate(m.gate.size()), gate_bias(m.gate_bias.size())
    {
        expected_experts<T> routed(m.experts, m.where, x, choices, dy);
        experts = routed.gradients;
        y = totals(routed.y);
        const numbers dl = dlogits(routed.dweights);
        for (int64_t t = 0; t < tokens && !dl.empty(); ++t) add_router(m, x, t, dl.data() + t * m.count(), routed.dx);
        dx = totals(routed.dx); // the rows and the router's part are rounded once
        for (const auto& e : m.shared) add_shared(e, x, tokens, dy);
    }

private:
    void add_router(const reference::model& m, const reference::numbers& x, int64_t t, const number* dl, sums& dx_sums)
    {
        for (int64_t d = 0; d < m.width; ++d) {
            bounded_sum<real> sum;
            for (int64_t e = 0; e < m.count(); ++e) {
                sum.add(dl[e], m.gate[e * m.width + d]);
                gate[e * m.width + d].add(dl[e], x[t * m.width + d]);
            }
            dx_sums[t * m.width + d].add(sum.total());
        }
        for (std::size_t e = 0; e < gate_bias.size(); ++e) gate_bias[e].add(dl[e]);
    }
    /// A shared expert is added to what is there.
    void add_shared(const reference::expert& e, const reference::numbers& x, int64_t tokens, const reference::numbers& dy)
    {
        std::vector<weighted_choice<T>> all;
        for (int64_t t = 0; t < tokens; ++t) all.push_back({t, 0, number(1)});
        expected_experts<T> out({e}, reference::weight_at::activation, x, all, dy);
        shared.push_back(out.gradients[0]);
        for (std::size_t i = 0; i < y.size(); ++i) {
            y[i] = stored<T>(y[i]) + stored<T>(out.y[i].total());
            dx[i] = stored<T>(dx[i]) + stored<T>(out.dx[i].total());
        }
    }
};

/// The same for a layer whose gate is a softmax router of the library.
template <class T>
expected_layer<T> expect_layer(const reference::model& m, const reference::numbers& x, const expected_routing<T>& r,
                               const reference::numbers& dy, double loss_scale = 1)
{
    return {m, x, r.tokens, r.choices, dy, [&](const auto& dweights) { return r.backward(dweights, loss_scale); }};
}

/// Everything of one kind, for all experts in turn.
template <class T>
std::vector<bounded<fastmoe::accumulate_t<T>>> gathered(const std::vector<expected_gradients<T>>& g,
                                                        typename expected_gradients<T>::sums expected_gradients<T>::*member)
{
    std::vector<bounded<fastmoe::accumulate_t<T>>> out;
    for (const auto& e : g)
        for (const auto& s : e.*member) out.push_back(s.total());
    return out;
}

} // namespace support
