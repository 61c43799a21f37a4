// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Weights and gradients of mlps as buffers that a test looks into: what was written, what stayed poisoned. Tests of values
/// use expert_weights.hpp and layer_memory.hpp instead; a program includes these or this.
#pragma once

#include <vector>

#include <fastmoe/moe.hpp>

#include "executors.hpp"
#include "poison.hpp"
#include "reference.hpp"
#include "scratch.hpp"

namespace support {

/// Experts with random weights that T can hold exactly.
template <class T>
std::vector<reference::expert> random_experts(random& r, std::int64_t count, reference::expert_kind kind,
                                              reference::activation act, std::int64_t width, std::int64_t hidden, bool biases)
{
    std::vector<reference::expert> out;
    for (std::int64_t e = 0; e < count; ++e) {
        auto expert = make_expert(kind, act, width, hidden, biases);
        const auto draw = [&](reference::numbers& v, double deviation) {
            v = widened(narrowed<T>(r.normals(static_cast<std::int64_t>(v.size()), deviation)));
        };
        draw(expert.up, 1 / std::sqrt(double(width)));
        draw(expert.down, 1 / std::sqrt(double(hidden)));
        draw(expert.up_bias, 0.5);
        draw(expert.down_bias, 0.5);
        out.push_back(expert);
    }
    return out;
}

/// How up and down lie in memory.
struct weight_layout {
    bool transposed = false, pointers = false;
    fastmoe::gated_layout gated = fastmoe::gated_layout::concatenated;
};

/// Weights of an mlp, or room for their gradients, as views over buffers that this owns.
template <class T, class Executor>
class mlp_memory {
public:
    mlp_memory(Executor& ex, const std::vector<reference::expert>& experts, weight_layout layout, bool poison)
        : experts_(experts), layout_(layout), up_(ex, 0), down_(ex, 0), up_bias_(ex, 0), down_bias_(ex, 0),
          up_pointers_(ex, 0), down_pointers_(ex, 0)
    {
        const auto& one = experts.at(0);
        const std::int64_t count = static_cast<std::int64_t>(experts.size());
        up_ = place(ex, &reference::expert::up, one.up_rows(), one.width, one.gated(), poison);
        down_ = place(ex, &reference::expert::down, one.width, one.hidden, false, poison);
        up_bias_ = place(ex, &reference::expert::up_bias, one.up_bias.empty() ? 0 : one.up_rows(), 1, one.gated(), poison);
        down_bias_ = place(ex, &reference::expert::down_bias, one.down_bias.empty() ? 0 : one.width, 1, false, poison);
        views_.up = matrices(ex, up_, up_pointers_, count, one.up_rows(), one.width);
        views_.down = matrices(ex, down_, down_pointers_, count, one.width, one.hidden);
        if (!one.up_bias.empty()) views_.up_bias = up_bias_.matrix(count, one.up_rows());
        if (!one.down_bias.empty()) views_.down_bias = down_bias_.matrix(count, one.width);
    }

    const fastmoe::mlp_weights<T>& views() const { return views_; }

    /// What the memory holds now, in the oracle's order, for all experts in turn.
    reference::numbers up() const { return read(views_.up, experts_[0].gated()); }
    reference::numbers down() const { return read(views_.down, false); }
    reference::numbers up_bias() const { return read_bias(views_.up_bias, experts_[0].gated()); }
    reference::numbers down_bias() const { return read_bias(views_.down_bias, false); }

private:
    /// Row of the oracle's order that stands at row o of the memory.
    std::int64_t source(std::int64_t o, std::int64_t rows, bool gated) const
    {
        if (!gated || layout_.gated == fastmoe::gated_layout::concatenated) return o;
        return o % 2 * (rows / 2) + o / 2;
    }
    fastmoe::buffer<T, Executor> place(Executor& ex, reference::numbers reference::expert::*member, std::int64_t rows,
                                       std::int64_t cols, bool gated, bool poison) const
    {
        std::vector<double> all;
        for (const auto& e : experts_) {
            std::vector<double> one(rows * cols);
            for (std::int64_t o = 0; o < rows; ++o)
                for (std::int64_t i = 0; i < cols; ++i) {
                    const double v = poison ? NAN : (e.*member)[source(o, rows, gated) * cols + i];
                    one[layout_.transposed && cols > 1 ? i * rows + o : o * cols + i] = v;
                }
            all.insert(all.end(), one.begin(), one.end());
        }
        return upload(ex, narrowed<T>(all));
    }
    fastmoe::weight_view<T> matrices(Executor& ex, fastmoe::buffer<T, Executor>& memory,
                                     fastmoe::buffer<T*, Executor>& pointers, std::int64_t count, std::int64_t rows,
                                     std::int64_t cols) const
    {
        fastmoe::weight_view<T> w = layout_.transposed
                                        ? fastmoe::stacked_transposed(fastmoe::tensor_view<T, 3>(memory.data(), count, cols, rows))
                                        : fastmoe::stacked(fastmoe::tensor_view<T, 3>(memory.data(), count, rows, cols));
        if (!layout_.pointers) return w;
        std::vector<T*> list;
        for (std::int64_t e = 0; e < count; ++e) list.push_back(w.base(e));
        pointers = upload(ex, list);
        w.pointers = pointers.data();
        w.data = nullptr;
        return w;
    }
    reference::numbers read(const fastmoe::weight_view<T>& w, bool gated) const
    {
        reference::numbers out(w.experts * w.out * w.in);
        for (std::int64_t e = 0; e < w.experts; ++e)
            for (std::int64_t o = 0; o < w.out; ++o)
                for (std::int64_t i = 0; i < w.in; ++i)
                    out[(e * w.out + source(o, w.out, gated)) * w.in + i] = double(w(e, o, i));
        return out;
    }
    reference::numbers read_bias(fastmoe::matrix_view<T> b, bool gated) const
    {
        reference::numbers out(size_of(b));
        for (std::int64_t e = 0; e < b.extent(0); ++e)
            for (std::int64_t o = 0; o < b.extent(1); ++o)
                out[e * b.extent(1) + source(o, b.extent(1), gated)] = double(b(e, o));
        return out;
    }

    std::vector<reference::expert> experts_;
    weight_layout layout_;
    fastmoe::buffer<T, Executor> up_, down_, up_bias_, down_bias_;
    fastmoe::buffer<T*, Executor> up_pointers_, down_pointers_;
    fastmoe::mlp_weights<T> views_;
};

template <class T, class Expert, class Executor>
struct layer_memory {
    reference::model model;
    fastmoe::buffer<T, Executor> gate, gate_bias;
    mlp_memory<T, Executor> experts;
    fastmoe::moe_weights<T, Expert> views;

    layer_memory(Executor& ex, random& r, const Expert& expert, std::int64_t count, reference::activation act, bool biases)
        : model{expert.width, {}, {}, random_experts<T>(r, count, reference::expert_kind::mlp, act, expert.width, expert.hidden, biases), {}, where(expert.weigh)},
          gate(upload(ex, narrowed<T>(r.normals(count * expert.width, 1 / std::sqrt(double(expert.width) + 1))))),
          gate_bias(upload(ex, narrowed<T>(r.normals(biases ? count : 0, 0.3)))),
          experts(ex, model.experts, {.gated = expert.layout}, false), views{gate.matrix(count, expert.width), {}, experts.views()}
    {
        if (biases) views.gate_bias = gate_bias.view();
        model.gate = widened(gate.view());
        model.gate_bias = widened(gate_bias.view());
    }

    static reference::weight_at where(fastmoe::weigh_at w)
    {
        return w == fastmoe::weigh_at::output  ? reference::weight_at::output
               : w == fastmoe::weigh_at::input ? reference::weight_at::input
                                               : reference::weight_at::activation;
    }
};

/// Room for the gradients of such a layer, poisoned.
template <class G, class Expert, class Executor>
struct gradient_memory {
    fastmoe::buffer<G, Executor> gate, gate_bias;
    mlp_memory<G, Executor> experts;
    fastmoe::moe_weights<G, Expert> views;

    gradient_memory(Executor& ex, const reference::model& model, fastmoe::gated_layout layout = {})
        : gate(ex, static_cast<std::int64_t>(model.gate.size())),
          gate_bias(ex, static_cast<std::int64_t>(model.gate_bias.size())), experts(ex, model.experts, {.gated = layout}, true),
          views{gate.matrix(model.count(), model.width), {}, experts.views()}
    {
        poison(gate.view());
        poison(gate_bias.view());
        if (!model.gate_bias.empty()) views.gate_bias = gate_bias.view();
    }
};

} // namespace support
