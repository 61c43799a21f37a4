// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Thirty lines of user code: a layer of policies, one training step, and inference. The README shows this file.
// [quickstart]
#include <fastmoe/moe.hpp>

#include <cstdio>
#include <vector>

namespace fm = fastmoe;

int main()
{
    constexpr int tokens = 256, width = 64;

    fm::host_executor ex;
    fm::moe_layer layer{
        fm::top_k_gate<fm::softmax_score>{.experts = 8, .k = 2, .balance = {.coefficient = 0.01}},
        fm::mlp<fm::swiglu>{.width = width, .hidden = 128},
        fm::self{}};
    auto weights = fm::random_weights<float>(ex, layer, /*seed=*/1);
    auto gradients = fm::zero_weights<float>(ex, layer);

    std::vector<float> x(tokens * width), y(x.size()), dy(x.size(), 1.0f), dx(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 7919 % 1009) / 504.5f - 1.0f;
    const auto matrix = [](auto& v) { return fm::as_matrix(v, tokens, width); }; // (T,D)

    auto saved = layer.forward(ex, matrix(x), weights.view(), matrix(y));
    layer.backward(ex, saved, matrix(dy), weights.view(), matrix(dx), gradients.view());
    layer.infer(ex, matrix(x), weights.view(), matrix(y)); // keeps nothing

    std::printf("balance loss %.4f, tokens of expert 0: %d, dx[0] %+.4f\n", saved.losses()(0), saved.plan().counts(0),
                dx[0]);
}
// [quickstart]
