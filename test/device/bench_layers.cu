// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Layers by gemm::hopper, which ends its products with activations where gate and up lie side by side, and by codes of eight bits.
#include <fastmoe/gemm/hopper.hpp>
#include <fastmoe/gemm/hopper_fp8.hpp>

#include "bench_parts.cuh"

namespace timing {
namespace {

/// Inference with weights that are stored as codes, whose bytes are those of the experts that are there.
void infer_of_codes(fm::cuda_executor& ex, figures& out, const shape& s)
{
    using expert = fm::mlp<fm::swiglu, fm::gemm::hopper_fp8_stored>;
    const fm::moe_layer l{fm::top_k_gate<fm::softmax_score>{.experts = s.experts, .k = s.k},
                          expert{.width = s.width, .hidden = s.hidden, .layout = fm::gated_layout::interleaved}, fm::self{}};
    const int64_t n = s.tokens * s.width;
    fm::buffer<bfloat16, fm::cuda_executor> x(ex, n), y(ex, n);
    fm::for_each(ex, n, fill_values{x.data()});
    fm::arena measure;
    (void)l.template reserve_weights<bfloat16>(measure, s.width);
    fm::buffer<std::byte, fm::cuda_executor> room(ex, measure.bytes());
    fm::arena memory(room.view());
    const auto w = l.template reserve_weights<bfloat16>(memory, s.width);
    fm::for_each(ex, w.gate.size(), fill_values{w.gate.data_handle()});
    const auto quantize = [&](const auto& to) {
        const int64_t cells = to.codes.out * to.codes.in;
        fm::buffer<bfloat16, fm::cuda_executor> numbers(ex, to.codes.experts * cells);
        fm::for_each(ex, to.codes.experts * cells, fill_values{numbers.data(), 0.05f});
        fm::quantize_weights(ex, fm::stacked(fm::tensor_view<bfloat16, 3>(numbers.data(), to.codes.experts, to.codes.out, to.codes.in)), to);
        ex.synchronize();
    };
    quantize(w.expert.up), quantize(w.expert.down);
    const typename decltype(l)::template weights<const bfloat16> read = w;
    fm::buffer<std::byte, fm::cuda_executor> small(ex, l.template infer_bytes<bfloat16>(ex, s.tokens, s.width, read));
    out.add(s.name() + " hopper_fp8_stored, interleaved infer", milliseconds_of(ex, s.rounds, [&] {
                fm::arena a(small.view());
                l.infer(ex, x.matrix(s.tokens, s.width), read, y.matrix(s.tokens, s.width), a);
            }), 0, 6.0 * static_cast<double>(s.tokens * s.k) * static_cast<double>(s.hidden * s.width));
}

} // namespace

void bench_layers(fm::cuda_executor& ex, figures& out)
{
    constexpr double targets[] = {590, 565, 450, 390};
    int row = 0;
    for (const shape& s : published) {
        const passes took = layer(ex, out, s, "hopper, interleaved", fm::gemm::hopper{}, fm::gated_layout::interleaved);
        const double operations = 18.0 * static_cast<double>(s.tokens * s.k) * static_cast<double>(s.hidden * s.width);
        out.claim(s.name() + " forward + backward, TFLOPS", operations / (took.forward + took.backward) * 1e-9, wanted::at_least, targets[row++]);
    }
    for (const shape& s : published) {
        layer(ex, out, s, "hopper_fp8, interleaved", fm::gemm::hopper_fp8{}, fm::gated_layout::interleaved);
        infer_of_codes(ex, out, s);
    }
}

} // namespace timing
