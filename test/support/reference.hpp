// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The oracle: a Mixture-of-Experts written per token in scalar double arithmetic, forward and backward. It includes
/// nothing of the library and shares nothing with it but the formulas, so that no mistake can be made on both sides.
///
///     route(options, logits, T, E)            which experts, with which weights, and the losses
///     apply(experts, where, x, choices, y)    y[t] += sum over the choices of t: weight * expert(x[t])
///     forward(model, options, x, T)           gate, route, apply, shared experts
///
/// Each has its ..._backward. Choices can be given instead of made, so that a comparison in bfloat16 does not hang on
/// near ties; lists of choices can be ragged, and every expert can be of another kind.
#pragma once

#include "reference_expert.hpp"
#include "reference_routing.hpp"

namespace support::reference {

/// A layer. Experts may differ in kind, activation and hidden width; shared experts see every token with weight 1.
struct model {
    int64_t width = 0;
    numbers gate;      // (E,D)
    numbers gate_bias; // (E) or empty
    std::vector<expert> experts;
    std::vector<expert> shared;
    weight_at where = weight_at::output;

    int64_t count() const { return static_cast<int64_t>(experts.size()); }
};

/// Row t of a row-major matrix.
inline numbers row_of(const numbers& x, int64_t t, int64_t width)
{
    return numbers(x.begin() + t * width, x.begin() + (t + 1) * width);
}

/// Adds to y every choice's expert output for its token.                       // x, y (T,D)
inline void apply(const std::vector<expert>& experts, weight_at where, const numbers& x,
                  const std::vector<choice>& choices, numbers& y)
{
    for (const choice& c : choices) {
        if (c.expert < 0) continue;
        const expert& e = experts[c.expert];
        const expert_pass p = run_expert(e, where, row_of(x, c.token, e.width), c.weight);
        for (int64_t d = 0; d < e.width; ++d) y[c.token * e.width + d] += p.result[d];
    }
}

/// Adds to dx and to the experts' gradients; returns dL/dweight of every choice, 0 for dropped ones.   // (C)
inline numbers apply_backward(const std::vector<expert>& experts, weight_at where, const numbers& x,
                              const std::vector<choice>& choices, const numbers& dy, numbers& dx,
                              std::vector<expert>& grads)
{
    numbers dweights;
    for (const choice& c : choices) {
        dweights.push_back(0);
        if (c.expert < 0) continue;
        const expert& e = experts[c.expert];
        const auto [d, dweight] = run_expert_backward(e, where, row_of(x, c.token, e.width), c.weight,
                                                      row_of(dy, c.token, e.width), grads[c.expert]);
        for (int64_t i = 0; i < e.width; ++i) dx[c.token * e.width + i] += d[i];
        dweights.back() = dweight;
    }
    return dweights;
}

/// Every token to one expert, with weight 1: how shared experts are applied.
inline std::vector<choice> all_tokens(int64_t tokens, int expert)
{
    std::vector<choice> out;
    for (int64_t t = 0; t < tokens; ++t) out.push_back({t, expert, 1.0});
    return out;
}

/// logits = x gate^T + bias.                                                   // (T,E)
inline numbers gate_logits(const model& m, const numbers& x, int64_t tokens)
{
    numbers out;
    for (int64_t t = 0; t < tokens; ++t) {
        const numbers l = affine(m.gate, m.gate_bias, row_of(x, t, m.width), m.count());
        out.insert(out.end(), l.begin(), l.end());
    }
    return out;
}

struct outputs {
    reference::routing routing;
    numbers y; // (T,D)
};

/// @param fixed, kept  as of route()
inline outputs forward(const model& m, const options& o, const numbers& x, int64_t tokens,
                       const std::vector<int>* fixed = nullptr, const std::vector<bool>* kept = nullptr)
{
    outputs out{route(o, gate_logits(m, x, tokens), tokens, m.count(), fixed, kept), numbers(tokens * m.width, 0.0)};
    apply(m.experts, m.where, x, out.routing.choices, out.y);
    for (std::size_t s = 0; s < m.shared.size(); ++s)
        apply(m.shared, weight_at::output, x, all_tokens(tokens, static_cast<int>(s)), out.y);
    return out;
}

struct gradients {
    numbers x;         // (T,D)
    numbers gate;      // (E,D)
    numbers gate_bias; // (E) or empty
    std::vector<expert> experts, shared;
    numbers weights; // (C) on the way: of the routing weights
    numbers logits;  // (T,E) on the way
};

/// The gradients of <dy, y> + loss_scale * (balance_loss + z_loss).
inline gradients backward(const model& m, const options& o, const numbers& x, int64_t tokens, const outputs& out,
                          const numbers& dy, double loss_scale = 1)
{
    gradients g;
    g.x.assign(x.size(), 0.0);
    g.gate.assign(m.gate.size(), 0.0);
    g.gate_bias.assign(m.gate_bias.size(), 0.0);
    for (const expert& e : m.experts) g.experts.push_back(zeros_like(e));
    for (const expert& e : m.shared) g.shared.push_back(zeros_like(e));
    g.weights = apply_backward(m.experts, m.where, x, out.routing.choices, dy, g.x, g.experts);
    for (std::size_t s = 0; s < m.shared.size(); ++s)
        apply_backward(m.shared, weight_at::output, x, all_tokens(tokens, static_cast<int>(s)), dy, g.x, g.shared);
    g.logits = route_backward(o, out.routing, g.weights, loss_scale);
    for (int64_t t = 0; t < tokens; ++t) {
        const numbers d =
            affine_backward(m.gate, row_of(x, t, m.width), row_of(g.logits, t, m.count()), g.gate, g.gate_bias);
        for (int64_t i = 0; i < m.width; ++i) g.x[t * m.width + i] += d[i];
    }
    return g;
}

} // namespace support::reference
