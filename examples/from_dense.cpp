// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A dense feed-forward becomes experts: every expert starts as a copy of it, so the block computes what it did until training
/// moves the experts apart (sparse upcycling, Komatsuzaki et al. 2022). The matrices lie as Megatron-LM and Transformer-XL keep them.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include <fastmoe/expert/layout.hpp>
#include <fastmoe/moe.hpp>

namespace fm = fastmoe;

namespace {

constexpr std::int64_t sequences = 4, length = 32, width = 48, hidden = 96, experts = 8;

/// y = relu(x up^T + up_bias) down^T + down_bias. Rows are outputs, as in torch.nn.Linear.
struct dense {
    std::vector<float> up, up_bias, down, down_bias; // (H,D) (H) (D,H) (D)
};

std::vector<float> numbers(std::int64_t n, std::uint64_t seed, double scale)
{
    std::vector<float> out(static_cast<std::size_t>(n));
    std::uint64_t state = seed * 0x9E3779B97F4A7C15u + 1;
    for (float& each : out) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        each = static_cast<float>(scale * (static_cast<double>(state >> 40) / (1 << 23) - 1));
    }
    return out;
}

// [copies]
/// One matrix for every expert: no distance from an expert to the next.
fm::weight_view<const float> for_all(const std::vector<float>& matrix, std::int64_t out, std::int64_t in)
{
    return {matrix.data(), nullptr, experts, out, in, /*expert_stride=*/0, /*row_stride=*/in, /*col_stride=*/1};
}

template <class Expert>
void copy_to_experts(fm::host_executor& ex, const dense& ffn, const Expert& expert)
{
    fm::copy_weights(ex, for_all(ffn.up, hidden, width), expert.up); // converts, too, if the expert is bfloat16
    fm::copy_weights(ex, for_all(ffn.down, width, hidden), expert.down);
    for (std::int64_t e = 0; e < experts; ++e) {
        for (std::int64_t h = 0; h < hidden; ++h) expert.up_bias(e, h) = ffn.up_bias[static_cast<std::size_t>(h)];
        for (std::int64_t d = 0; d < width; ++d) expert.down_bias(e, d) = ffn.down_bias[static_cast<std::size_t>(d)];
    }
}
// [copies]

/// The dense block in double, for one token.
std::vector<double> compute(const dense& ffn, const float* x)
{
    std::vector<double> y(ffn.down_bias.begin(), ffn.down_bias.end());
    for (std::size_t h = 0; h < hidden; ++h) {
        double a = static_cast<double>(ffn.up_bias[h]);
        for (std::size_t d = 0; d < width; ++d) a += static_cast<double>(ffn.up[h * width + d]) * static_cast<double>(x[d]);
        for (std::size_t d = 0; d < width && a > 0; ++d) y[d] += static_cast<double>(ffn.down[d * hidden + h]) * a;
    }
    return y;
}

} // namespace

int main()
{
    const dense ffn{numbers(hidden * width, 1, 0.2), numbers(hidden, 2, 0.1), numbers(width * hidden, 3, 0.2), numbers(width, 4, 0.1)};
    fm::host_executor ex;
    // [block]
    // Weights of the chosen experts sum to 1 (renormalize, the default), and no capacity drops a token: K copies are the dense block.
    const fm::moe_layer layer{fm::top_k_gate<>{.experts = experts, .k = 2, .balance = {.coefficient = 0.01}},
                              fm::mlp<fm::relu>{.width = width, .hidden = hidden, .biases = true}};
    const auto weights = fm::random_weights<float>(ex, layer, /*seed=*/7); // the router has none to start from
    copy_to_experts(ex, ffn, weights.view().expert);

    // Activations (length,batch,D) of Megatron-LM and Transformer-XL are T = length * batch tokens as they lie; norms and the
    // residual stay with the block around it.
    const std::vector<float> x = numbers(length * sequences * width, 5, 1);
    std::vector<float> y(x.size());
    layer.infer(ex, fm::as_matrix(x, length * sequences, width), weights.view(), fm::as_matrix(y, length * sequences, width));
    // [block]

    double worst = 0, largest = 0;
    for (std::int64_t t = 0; t < length * sequences; ++t) {
        const std::vector<double> expected = compute(ffn, x.data() + t * width);
        for (std::int64_t d = 0; d < width; ++d) {
            const auto at = static_cast<std::size_t>(d);
            worst = std::fmax(worst, std::fabs(expected[at] - static_cast<double>(y[static_cast<std::size_t>(t * width + d)])));
            largest = std::fmax(largest, std::fabs(expected[at]));
        }
    }
    std::printf("%d experts of 2 a token differ from the dense block by %.1e, of numbers up to %.2f\n", static_cast<int>(experts), worst, largest);
    return worst < 1e-5 * largest ? 0 : 1;
}
