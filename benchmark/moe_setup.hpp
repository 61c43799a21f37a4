// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A layer with all that its calls need, taken before the clock runs: weights, tokens, gradients and workspaces.
#pragma once

#include <cstdint>
#include <string>

#include <fastmoe/expert/mlp.hpp>
#include <fastmoe/layer/owned_weights.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

#include "inputs.hpp"

namespace bench {

struct shape {
    int64_t tokens, width, hidden, experts, k;

    int64_t choices() const { return tokens * k; }
};

template <class T>
const char* type_name()
{
    return std::is_same_v<T, fm::bfloat16> ? "bf16" : "fp32";
}

/// GELU (erf) experts behind a softmax top-k gate.
template <class T, class Gemm>
class moe_setup {
public:
    using gate_type = fm::top_k_gate<fm::softmax_score>;
    using expert_type = fm::mlp<fm::gelu, Gemm>;
    using layer_type = fm::moe_layer<gate_type, expert_type, fm::self>;

    moe_setup(fm::host_executor& on, const shape& s)
        : ex(on), sizes(s), layer{gate_type{.experts = s.experts, .k = s.k},
                                  expert_type{.width = s.width, .hidden = s.hidden}, fm::self{}},
          weights(fm::random_weights<T>(on, layer, 1)), gradients(fm::zero_weights<T>(on, layer)),
          x_(random_buffer<T>(on, s.tokens * s.width, 1)), dy_(random_buffer<T>(on, s.tokens * s.width, 2)),
          y_(on, s.tokens * s.width), dx_(on, s.tokens * s.width)
    {
        const int64_t forward = layer.template forward_bytes<T>(ex, s.tokens, s.width);
        const int64_t backward = layer.template backward_bytes<T>(ex, s.tokens, s.width);
        const int64_t infer = layer.template infer_bytes<T>(ex, s.tokens, s.width);
        space_ = memory<std::byte>(ex, std::max(forward + backward, infer));
    }

    fm::matrix_view<T> x() { return x_.matrix(sizes.tokens, sizes.width); }
    fm::matrix_view<T> y() { return y_.matrix(sizes.tokens, sizes.width); }
    fm::matrix_view<T> dy() { return dy_.matrix(sizes.tokens, sizes.width); }
    fm::matrix_view<T> dx() { return dx_.matrix(sizes.tokens, sizes.width); }

    void infer()
    {
        fm::arena a(space_.view());
        layer.infer(ex, x(), weights.view(), y(), a);
    }
    /// f(saved), which refers to memory that the next call uses again.
    template <class F>
    void forward(F f)
    {
        fm::arena a(space_.view());
        f(layer.forward(ex, x(), weights.view(), y(), a));
    }
    void forward()
    {
        forward([](const auto&) {});
    }
    void train()
    {
        fm::arena a(space_.view());
        const auto saved = layer.forward(ex, x(), weights.view(), y(), a);
        layer.backward(ex, saved, dy(), weights.view(), dx(), gradients.view(), a);
    }

    fm::host_executor& ex;
    shape sizes;
    layer_type layer;
    fm::owned_weights<T, expert_type, fm::host_executor> weights, gradients;

private:
    memory<T> x_, dy_, y_, dx_;
    memory<std::byte> space_;
};

/// The products of an MLP over the rows of given groups and nothing else: plain rows in, no bias, no epilogue. With one
/// group it is the dense MLP that is the roof of a layer.
template <class T, class Gemm>
class mlp_products {
public:
    /// @param rows  S, the rows of all groups
    mlp_products(fm::host_executor& on, int64_t experts, int64_t rows, int64_t width, int64_t hidden)
        : ex_(on), e_(experts), s_(rows), d_(width), h_(hidden), x_(random_buffer<T>(on, rows * width, 3)),
          dy_(random_buffer<T>(on, rows * width, 4)), a_(random_buffer<T>(on, rows * hidden, 5)),
          du_(random_buffer<T>(on, rows * hidden, 6)), y_(on, rows * width), u_(on, rows * hidden),
          up_(random_buffer<T>(on, experts * width * hidden, 7, 0.04f)),
          down_(random_buffer<T>(on, experts * width * hidden, 8, 0.02f)), dup_(on, experts * width * hidden),
          ddown_(on, experts * width * hidden)
    {
        const even_groups all(experts, 0);
        auto groups = all.view();
        groups.slots = rows;
        space_ = workspace_for(on, [&](fm::arena& a) {
            forward_calls(groups, a);
            backward_calls(groups, a);
        });
    }

    /// Two products.
    void forward(const fm::row_groups& groups)
    {
        fm::arena a(space_.view());
        forward_calls(groups, a);
    }
    /// Two for the inputs' gradients, two for the weights'.
    void backward(const fm::row_groups& groups)
    {
        fm::arena a(space_.view());
        backward_calls(groups, a);
    }
    double forward_flops() const { return 4.0 * static_cast<double>(s_) * static_cast<double>(d_ * h_); }

private:
    void forward_calls(const fm::row_groups& g, fm::arena& a)
    {
        gemm_.forward(ex_, g, rows(x_, d_), weights(up_, h_, d_), none(), u_.matrix(s_, h_), fm::no_epilogue{}, a);
        gemm_.forward(ex_, g, rows(a_, h_), weights(down_, d_, h_), none(), y_.matrix(s_, d_), fm::no_epilogue{}, a);
    }
    void backward_calls(const fm::row_groups& g, fm::arena& a)
    {
        gemm_.dgrad(ex_, g, rows(dy_, d_), weights(down_, d_, h_), u_.matrix(s_, h_), fm::no_epilogue{}, a);
        gemm_.dgrad(ex_, g, rows(du_, h_), weights(up_, h_, d_), y_.matrix(s_, d_), fm::no_epilogue{}, a);
        gemm_.wgrad(ex_, g, rows(dy_, d_), rows(a_, h_), gradients(ddown_, d_, h_), fm::write_mode::overwrite, a);
        gemm_.wgrad(ex_, g, rows(du_, h_), rows(x_, d_), gradients(dup_, h_, d_), fm::write_mode::overwrite, a);
    }
    fm::plain_rows<T> rows(const memory<T>& data, int64_t width) const
    {
        return {fm::matrix_view<const T>(data.data(), s_, width)};
    }
    static fm::matrix_view<const T> none() { return {}; }
    fm::weight_view<const T> weights(const memory<T>& w, int64_t out, int64_t in) const
    {
        return {w.data(), nullptr, e_, out, in, out * in, in, 1};
    }
    fm::weight_view<T> gradients(memory<T>& w, int64_t out, int64_t in) const
    {
        return {w.data(), nullptr, e_, out, in, out * in, in, 1};
    }

    fm::host_executor& ex_;
    int64_t e_, s_, d_, h_;
    memory<T> x_, dy_, a_, du_, y_, u_, up_, down_, dup_, ddown_;
    memory<std::byte> space_;
    Gemm gemm_;
};

} // namespace bench
