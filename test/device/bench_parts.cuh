// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The parts of device_bench, a file each, and a layer's passes, which several of them measure.
#pragma once

#include <string>

#include "figures.cuh"
#include "timing.cuh"

namespace timing {

// Most important first.
void bench_layers(fm::cuda_executor& ex, figures& out);   ///< by gemm::hopper, at the published sizes
void bench_verbs(fm::cuda_executor& ex, figures& out);    ///< what moves rows, beside a device copy; the share of gate, plan and combine
void bench_decode(fm::cuda_executor& ex, figures& out);   ///< inference of few tokens, in captured graphs
void bench_products(fm::cuda_executor& ex, figures& out); ///< each product beside a dense one of as many operations
void bench_skew(fm::cuda_executor& ex, figures& out);     ///< half of all tokens on one expert
void bench_policies(fm::cuda_executor& ex, figures& out); ///< a layer by every policy

/// The published sizes of a Hopper's layer.
inline constexpr shape published[] = {
    {32768, 4096, 2048, 64, 4, 10}, {32768, 4096, 1024, 128, 8, 7}, {32768, 4096, 256, 256, 16, 7}, {24576, 1536, 256, 128, 8, 10}};

inline fm::buffer<bfloat16, fm::cuda_executor> random_values(fm::cuda_executor& ex, int64_t n, float scale = 1)
{
    fm::buffer<bfloat16, fm::cuda_executor> out(ex, n);
    fm::for_each(ex, n, fill_values{out.data(), scale});
    return out;
}

/// A layer's three passes. Forward is 6 T K H D operations, backward 12.
struct passes {
    double infer, forward, backward; // ms
};
template <class Gemm>
passes layer(fm::cuda_executor& ex, figures& out, const shape& s, const std::string& label, const Gemm& gemm,
           fm::gated_layout layout = fm::gated_layout::concatenated)
{
    using expert = fm::mlp<fm::swiglu, Gemm>;
    const fm::moe_layer l{fm::top_k_gate<fm::softmax_score>{.experts = s.experts, .k = s.k},
                          expert{.width = s.width, .hidden = s.hidden, .layout = layout, .gemm = gemm}, fm::self{}};
    const int64_t n = s.tokens * s.width;
    const auto weights = fm::random_weights<bfloat16>(ex, l, 1);
    const auto gradients = fm::zero_weights<bfloat16>(ex, l);
    fm::buffer<bfloat16, fm::cuda_executor> x(ex, n), y(ex, n), dy(ex, n), dx(ex, n);
    fm::for_each(ex, n, fill_values{x.data()});
    fm::for_each(ex, n, fill_values{dy.data()});
    fm::buffer<std::byte, fm::cuda_executor> kept(ex, l.template forward_bytes<bfloat16>(ex, s.tokens, s.width)),
        lent(ex, l.template backward_bytes<bfloat16>(ex, s.tokens, s.width)), small(ex, l.template infer_bytes<bfloat16>(ex, s.tokens, s.width));
    const auto matrix = [&](auto& m) { return m.matrix(s.tokens, s.width); };
    const std::string name = s.name() + " " + label;
    const double forward = 6.0 * static_cast<double>(s.tokens * s.k) * static_cast<double>(s.hidden * s.width);
    passes took{};
    took.infer = milliseconds_of(ex, s.rounds, [&] {
        fm::arena a(small.view());
        l.infer(ex, matrix(x), weights.view(), matrix(y), a);
    });
    out.add(name + " infer", took.infer, 0, forward);
    took.forward = milliseconds_of(ex, s.rounds, [&] {
        fm::arena a(kept.view());
        l.forward(ex, matrix(x), weights.view(), matrix(y), a);
    });
    out.add(name + " forward", took.forward, 0, forward);
    fm::arena a(kept.view());
    const auto saved = l.forward(ex, matrix(x), weights.view(), matrix(y), a);
    took.backward = milliseconds_of(ex, s.rounds, [&] {
        fm::arena b(lent.view());
        l.backward(ex, saved, matrix(dy), weights.view(), matrix(dx), gradients.view(), b);
    });
    out.add(name + " backward", took.backward, 0, 2 * forward);
    return took;
}

} // namespace timing
