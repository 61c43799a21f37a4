// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The oracle's experts: one row at a time, scalar, in double, forward and backward. Part of reference.hpp; includes
/// nothing of the library.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

namespace support::reference {

using std::int64_t;
using numbers = std::vector<double>;

/// clamped_swiglu is that of gpt-oss with a limit of 1, which small numbers reach.
enum class activation { relu, gelu, gelu_tanh, silu, swiglu, geglu, clamped_swiglu };
enum class expert_kind { mlp, linear };
enum class weight_at { input, activation, output };

/// The weights of one expert, or their gradients. Gated activations hold the gate rows of `up` first.
struct expert {
    expert_kind kind = expert_kind::mlp;
    activation act = activation::relu;
    int64_t width = 0, hidden = 0;
    numbers up, up_bias;     // mlp: (H or 2H,D), (H or 2H) or empty
    numbers down, down_bias; // mlp: (D,H); linear: (D,D). Bias (D) or empty

    bool gated() const { return act >= activation::swiglu; }
    int64_t up_rows() const { return kind == expert_kind::linear ? 0 : gated() ? 2 * hidden : hidden; }
    int64_t down_columns() const { return kind == expert_kind::linear ? width : hidden; }
};

/// An expert of zeros; biases of both products where asked.
inline expert make_expert(expert_kind kind, activation act, int64_t width, int64_t hidden, bool biases)
{
    expert e{kind, act, width, hidden, {}, {}, {}, {}};
    e.up.assign(e.up_rows() * width, 0.0);
    e.down.assign(width * e.down_columns(), 0.0);
    if (biases) e.up_bias.assign(e.up_rows(), 0.0);
    if (biases) e.down_bias.assign(width, 0.0);
    return e;
}

/// A same-shaped expert of zeros, to take gradients.
inline expert zeros_like(const expert& e)
{
    expert out = make_expert(e.kind, e.act, e.width, e.hidden, false);
    out.up_bias.assign(e.up_bias.size(), 0.0);
    out.down_bias.assign(e.down_bias.size(), 0.0);
    return out;
}

/// One member of every expert, concatenated: stacked(experts, &expert::up) is (E,H,D).
inline numbers stacked(const std::vector<expert>& experts, numbers expert::*member)
{
    numbers out;
    for (const expert& e : experts) out.insert(out.end(), (e.*member).begin(), (e.*member).end());
    return out;
}

/// The value and the slope of a plain nonlinearity; gated ones name the one on their gate rows.
inline std::pair<double, double> activate(activation act, double v)
{
    switch (act) {
    case activation::relu: return {v > 0 ? v : 0, v > 0 ? 1 : 0};
    case activation::gelu:
    case activation::geglu: {
        const double cdf = 0.5 * std::erfc(-v / std::sqrt(2.0));
        return {v * cdf, cdf + v * std::exp(-v * v / 2) / std::sqrt(2 * std::acos(-1.0))};
    }
    case activation::gelu_tanh: {
        const double c = std::sqrt(2 / std::acos(-1.0)), u = std::tanh(c * (v + 0.044715 * v * v * v));
        return {0.5 * v * (1 + u), 0.5 * (1 + u) + 0.5 * v * (1 - u * u) * c * (1 + 3 * 0.044715 * v * v)};
    }
    case activation::clamped_swiglu: {
        const double g = std::fmin(v, 1), s = 1 / (1 + std::exp(-1.702 * g));
        return {g * s, v > 1 ? 0 : s + g * 1.702 * s * (1 - s)};
    }
    default: {
        const double s = 1 / (1 + std::exp(-v));
        return {v * s, s * (1 + v * (1 - s))};
    }
    }
}

/// The factor that an up row gives, and its slope.
inline std::pair<double, double> up_factor(activation act, double u)
{
    if (act != activation::clamped_swiglu) return {u, 1};
    return {std::fmin(std::fmax(u, -1), 1) + 1, std::fabs(u) > 1 ? 0 : 1};
}

/// out = W in + b for a row-major W.
inline numbers affine(const numbers& w, const numbers& bias, const numbers& in, int64_t rows)
{
    numbers out(rows, 0.0);
    const int64_t columns = static_cast<int64_t>(in.size());
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < columns; ++c) out[r] += w[r * columns + c] * in[c];
        if (!bias.empty()) out[r] += bias[r];
    }
    return out;
}

/// dW += dout in^T, db += dout; returns W^T dout.
inline numbers affine_backward(const numbers& w, const numbers& in, const numbers& dout, numbers& dw, numbers& dbias)
{
    const int64_t columns = static_cast<int64_t>(in.size());
    numbers din(in.size(), 0.0);
    for (std::size_t r = 0; r < dout.size(); ++r) {
        for (int64_t c = 0; c < columns; ++c) {
            dw[r * columns + c] += dout[r] * in[c];
            din[c] += w[r * columns + c] * dout[r];
        }
        if (!dbias.empty()) dbias[r] += dout[r];
    }
    return din;
}

/// What one expert computes for one row, with every intermediate.
struct expert_pass {
    numbers in;             // (D) the row, weighted if the weight sits on the input
    numbers pre;            // (H or 2H)
    numbers hidden, plain;  // (H) the input of `down`; the same before the weight
    numbers result, before; // (D) what is added to y; the same before the weight
};

inline expert_pass run_expert(const expert& e, weight_at where, const numbers& x, double weight)
{
    const auto scaled = [weight](numbers v) {
        for (double& a : v) a *= weight;
        return v;
    };
    expert_pass p;
    p.in = where == weight_at::input ? scaled(x) : x;
    if (e.kind == expert_kind::linear) {
        if (where == weight_at::activation) throw std::logic_error("reference: a linear expert has no activation");
        p.hidden = p.in;
    } else {
        p.pre = affine(e.up, e.up_bias, p.in, e.up_rows());
        for (int64_t h = 0; h < e.hidden; ++h)
            p.plain.push_back(activate(e.act, p.pre[h]).first * (e.gated() ? up_factor(e.act, p.pre[e.hidden + h]).first : 1));
        p.hidden = where == weight_at::activation ? scaled(p.plain) : p.plain;
    }
    p.before = affine(e.down, e.down_bias, p.hidden, e.width);
    p.result = where == weight_at::output ? scaled(p.before) : p.before;
    return p;
}

/// Adds the parameters' gradients to `grads`; returns dx and the weight's gradient.
inline std::pair<numbers, double> run_expert_backward(const expert& e, weight_at where, const numbers& x, double weight,
                                                      const numbers& dy, expert& grads)
{
    const expert_pass p = run_expert(e, where, x, weight);
    // Takes the gradient of weight * v to that of v, and adds the weight's own.
    double dweight = 0;
    const auto unscale = [&](const numbers& v, numbers& d) {
        for (std::size_t i = 0; i < v.size(); ++i) {
            dweight += d[i] * v[i];
            d[i] *= weight;
        }
    };
    numbers d = dy;
    if (where == weight_at::output) unscale(p.before, d);
    d = affine_backward(e.down, p.hidden, d, grads.down, grads.down_bias);
    if (e.kind == expert_kind::mlp) {
        if (where == weight_at::activation) unscale(p.plain, d);
        numbers dpre(p.pre.size());
        for (int64_t h = 0; h < e.hidden; ++h) {
            const auto [value, slope] = activate(e.act, p.pre[h]);
            const auto [factor, factor_slope] = e.gated() ? up_factor(e.act, p.pre[e.hidden + h]) : std::pair(1.0, 0.0);
            dpre[h] = d[h] * slope * factor;
            if (e.gated()) dpre[e.hidden + h] = d[h] * value * factor_slope;
        }
        d = affine_backward(e.up, p.in, dpre, grads.up, grads.up_bias);
    }
    if (where == weight_at::input) unscale(x, d);
    return {d, dweight};
}

} // namespace support::reference
