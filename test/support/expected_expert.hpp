// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The oracle's experts with every rounding that the library documents, and bounds for what is left. The formulas are
/// those of reference_expert.hpp in the order in which the library stores: pre-activation, weighted activation, rows, and
/// on the way back the gradients of each. For double it is that oracle, which test/core/bounded.cpp shows.
#pragma once

#include <vector>

#include "bounded.hpp"
#include "reference.hpp"

namespace support {

/// A choice of a token; the weight as the library has it, up to its error. An expert of -1 is dropped.
template <class T>
struct weighted_choice {
    int64_t token;
    int expert;
    bounded<fastmoe::accumulate_t<T>> weight;
};

/// Sums of one expert's gradients, before they are written.
template <class T>
struct expected_gradients {
    using sums = std::vector<bounded_sum<fastmoe::accumulate_t<T>>>;
    sums up, up_bias, down, down_bias;

    explicit expected_gradients(const reference::expert& e)
        : up(e.up.size()), up_bias(e.up_bias.size()), down(e.down.size()), down_bias(e.down_bias.size())
    {
    }
};

/// One row through one expert, forward and backward.
template <class T>
class expected_row {
public:
    using real = fastmoe::accumulate_t<T>;
    using number = bounded<real>;
    using numbers = std::vector<number>;

    numbers result;  // (D)  as stored, without the routing weight if that sits on the output
    numbers dx;      // (D)  as stored
    number dweight;

    expected_row(const reference::expert& e, reference::weight_at where, const reference::numbers& x, const number& weight)
        : e_(e), where_(where), weight_(weight), x_(x)
    {
        for (const double v : x) in_.push_back(where == reference::weight_at::input ? stored<T>(weight * v) : number(v));
        if (e.kind == reference::expert_kind::linear) {
            result = product(e.down, e.down_bias, in_, e.width);
            return;
        }
        pre_ = product(e.up, e.up_bias, in_, e.up_rows());
        for (int64_t h = 0; h < e.hidden; ++h) {
            const bounded_activation<real> a(e.act, pre_[h]);
            plain_.push_back(e.gated() ? a.value * bounded_up_factor<real>(e.act, pre_[e.hidden + h]).value : a.value);
        }
        numbers hidden;
        for (const auto& a : plain_) hidden.push_back(stored<T>(where == reference::weight_at::activation ? weight * a : a));
        result = product(e.down, e.down_bias, hidden, e.width);
    }

    /// From the gradient of the combined output.
    void backward(const reference::numbers& dy, expected_gradients<T>& grads)
    {
        if (e_.kind == reference::expert_kind::linear) return backward_linear(dy, grads);
        const bool weighs_output = where_ == reference::weight_at::output, weighs_input = where_ == reference::weight_at::input;
        const number inside = weighs_input ? number(1) : weight_; // what the activation is multiplied with in this pass
        const numbers dy_row(dy.begin(), dy.end()), d = transposed_product(e_.down, dy_row, e_.hidden);
        numbers dpre(pre_.size()), hidden;
        bounded_sum<real> dweight_sum;
        for (int64_t h = 0; h < e_.hidden; ++h) {
            const bounded_activation<real> a(e_.act, pre_[h]);
            const number weighted = inside * d[h];
            if (e_.gated()) {
                const bounded_up_factor<real> up(e_.act, pre_[e_.hidden + h]);
                dpre[h] = stored<T>(weighted * up.value * a.slope);
                dpre[e_.hidden + h] = stored<T>(weighted * a.value * up.slope);
            } else {
                dpre[h] = stored<T>(weighted * a.slope);
            }
            hidden.push_back(stored<T>(inside * plain_[h]));
            dweight_sum.add(d[h], plain_[h]);
        }
        for (std::size_t i = 0; weighs_output && i < e_.down_bias.size(); ++i) dweight_sum.add(dy_row[i], e_.down_bias[i]);
        dx = transposed_product(e_.up, dpre, e_.width);
        if (weighs_input) {
            dweight_sum = {};
            for (int64_t i = 0; i < e_.width; ++i) dweight_sum.add(dx[i], x_[i]);
            for (auto& v : dx) v = stored<T>(weight_ * v);
        }
        dweight = dweight_sum.total();
        outer(grads.down, dy_row, hidden);
        outer(grads.up, dpre, in_);
        for (std::size_t i = 0; i < grads.up_bias.size(); ++i) grads.up_bias[i].add(dpre[i]);
        for (std::size_t i = 0; i < grads.down_bias.size(); ++i) grads.down_bias[i].add(weighs_output ? weight_ : number(1), dy_row[i]);
    }

private:
    /// A linear expert knows nothing of weights: it gets the weighted gradient of its own rows, and the weight's comes
    /// from them.
    void backward_linear(const reference::numbers& dy, expected_gradients<T>& grads)
    {
        bounded_sum<real> sum;
        numbers weighted;
        for (int64_t i = 0; i < e_.width; ++i) {
            sum.add(dy[i], result[i]);
            weighted.push_back(stored<T>(weight_ * dy[i]));
        }
        dweight = sum.total();
        dx = transposed_product(e_.down, weighted, e_.width);
        outer(grads.down, weighted, in_);
        for (std::size_t i = 0; i < grads.down_bias.size(); ++i) grads.down_bias[i].add(weighted[i]);
    }

    static numbers product(const reference::numbers& w, const reference::numbers& bias, const numbers& in, int64_t rows)
    {
        numbers out;
        const auto columns = static_cast<int64_t>(in.size());
        for (int64_t r = 0; r < rows; ++r) {
            bounded_sum<real> sum;
            for (int64_t c = 0; c < columns; ++c) sum.add(in[c], w[r * columns + c]);
            if (!bias.empty()) sum.add(bias[r]);
            out.push_back(stored<T>(sum.total()));
        }
        return out;
    }
    static numbers transposed_product(const reference::numbers& w, const numbers& d, int64_t columns)
    {
        numbers out;
        for (int64_t c = 0; c < columns; ++c) {
            bounded_sum<real> sum;
            for (std::size_t r = 0; r < d.size(); ++r) sum.add(d[r], w[static_cast<int64_t>(r) * columns + c]);
            out.push_back(stored<T>(sum.total()));
        }
        return out;
    }
    static void outer(typename expected_gradients<T>::sums& to, const numbers& rows, const numbers& columns)
    {
        for (std::size_t r = 0; r < rows.size(); ++r)
            for (std::size_t c = 0; c < columns.size(); ++c) to[r * columns.size() + c].add(rows[r], columns[c]);
    }

    const reference::expert& e_;
    reference::weight_at where_;
    number weight_;
    numbers in_, pre_, plain_;
    reference::numbers x_;
};

/// What the experts of a layer must give, before it is written: sums over each token's choices.
template <class T>
struct expected_experts {
    using real = fastmoe::accumulate_t<T>;
    std::vector<bounded_sum<real>> y, dx;         // (T,D)
    std::vector<bounded<real>> dweights;          // (C)
    std::vector<expected_gradients<T>> gradients; // (E)

    expected_experts(const std::vector<reference::expert>& experts, reference::weight_at where, const reference::numbers& x,
                     const std::vector<weighted_choice<T>>& choices, const reference::numbers& dy)
        : y(x.size()), dx(x.size()), dweights(choices.size())
    {
        for (const auto& e : experts) gradients.emplace_back(e);
        for (std::size_t c = 0; c < choices.size(); ++c) {
            const auto& [token, id, weight] = choices[c];
            if (id < 0) continue;
            const int64_t width = experts[id].width, at = token * width;
            expected_row<T> row(experts[id], where, reference::row_of(x, token, width), weight);
            row.backward(reference::row_of(dy, token, width), gradients[id]);
            dweights[c] = row.dweight;
            for (int64_t d = 0; d < width; ++d) {
                if (where == reference::weight_at::output) y[at + d].add(weight, row.result[d]);
                else y[at + d].add(row.result[d]);
                dx[at + d].add(row.dx[d]);
            }
        }
    }
};

} // namespace support
