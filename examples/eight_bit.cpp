// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Inference with weights of eight bits: matrices become codes and scales once, and the layer reads those. docs/eight-bit.md shows
/// this file.
#include <fastmoe/gemm/hopper_fp8.hpp>
#include <fastmoe/moe.hpp>

#include <cmath>
#include <cstdio>
#include <vector>

namespace fm = fastmoe;
using fm::bfloat16;
using fm::int64_t;

constexpr int64_t tokens = 64, width = 256, hidden = 128, experts = 8;

template <class Gemm>
auto make_layer()
{
    using expert = fm::mlp<fm::swiglu, Gemm>;
    return fm::moe_layer{fm::top_k_gate<fm::softmax_score>{.experts = experts, .k = 2},
                         expert{.width = width, .hidden = hidden, .layout = fm::gated_layout::interleaved}, fm::self{}};
}

/// y of a layer whose weights lie in a buffer of their own.
template <class Layer, class Weights>
std::vector<bfloat16> infer(fm::host_executor& ex, const Layer& layer, const Weights& weights, const std::vector<bfloat16>& x)
{
    std::vector<bfloat16> y(x.size());
    layer.infer(ex, fm::matrix_view<const bfloat16>(x.data(), tokens, width), weights, fm::matrix_view<bfloat16>(y.data(), tokens, width));
    return y;
}

int main()
{
    fm::host_executor ex;
    const auto numbers = make_layer<fm::gemm::portable>();
    const auto weights = fm::random_weights<bfloat16>(ex, numbers, 1);
    std::vector<bfloat16> x(static_cast<std::size_t>(tokens * width));
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = bfloat16(std::sin(0.37f * static_cast<float>(i)));

    // [store]
    const auto codes = make_layer<fm::gemm::hopper_fp8_stored>();
    fm::arena measure;
    codes.reserve_weights<bfloat16>(measure, width);
    fm::buffer<std::byte, fm::host_executor> storage(ex, measure.bytes());
    fm::arena memory(storage.view());
    auto stored = codes.reserve_weights<bfloat16>(memory, width); // the router in bfloat16, experts as codes and scales
    fm::quantize_weights(ex, weights.view().expert.up, stored.expert.up);
    fm::quantize_weights(ex, weights.view().expert.down, stored.expert.down);
    // [store]
    for (int64_t e = 0; e < experts; ++e)
        for (int64_t d = 0; d < width; ++d) stored.gate(e, d) = weights.view().gate(e, d);

    const auto y = infer(ex, numbers, weights.view(), x), of_codes = infer(ex, codes, stored, x);
    double off = 0, all = 0;
    for (std::size_t i = 0; i < y.size(); ++i) {
        const double a = static_cast<float>(y[i]), b = static_cast<float>(of_codes[i]);
        off += (a - b) * (a - b), all += a * a;
    }
    const double distance = std::sqrt(off / all);
    const double cells = 3.0 * experts * hidden * width;
    std::printf("%.0f weights of experts: %.0f bytes as bfloat16, %lld as codes and scales with the router\n", cells, 2 * cells,
                static_cast<long long>(measure.bytes()));
    std::printf("outputs differ by %.1f %% in the root of the mean square\n", 100 * distance);
    return distance > 0 && distance < 0.1 ? 0 : 1;
}
