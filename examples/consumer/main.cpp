// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// One MoE layer in a program of its own: 64 experts, each token goes to two of them.
#include <cstdio>
#include <vector>

#include <fastmoe/moe.hpp>

namespace fm = fastmoe;

int main()
{
    constexpr int tokens = 32, width = 64;

    fm::host_executor ex;
    fm::moe_layer layer{
        fm::top_k_gate<fm::softmax_score>{.experts = 64, .k = 2},
        fm::mlp<fm::swiglu>{.width = width, .hidden = 256},
        fm::self{}};
    auto weights = fm::random_weights<float>(ex, layer, /*seed=*/1);

    std::vector<float> x(tokens * width), y(tokens * width); // (T,D)
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7) - 3.0f;
    layer.infer(ex, fm::as_matrix(x, tokens, width), weights.view(), fm::as_matrix(y, tokens, width));

    std::printf("the first token in: %g %g %g ...\n", x[0], x[1], x[2]);
    std::printf("the first token out: %g %g %g ...\n", y[0], y[1], y[2]);
}
