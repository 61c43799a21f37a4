// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A published model by name: the block of DeepSeek-V3, a hundred times smaller, makes a training step. docs/models.md has
/// the others, and shows this file.
#include <fastmoe/moe.hpp>

#include <cstdio>
#include <vector>

namespace fm = fastmoe;
using fm::int64_t;

/// f(arena) for its size, then with memory.
template <class F>
void with_memory(fm::host_executor& ex, fm::buffer<std::byte, fm::host_executor>& storage, const F& f)
{
    fm::arena measure;
    f(measure);
    storage = {ex, measure.bytes()};
    fm::arena memory(storage.view());
    f(memory);
}

constexpr int64_t tokens = 64, width = 96, experts = 32;

// [model]
/// The numbers of the configuration file. Whoever balances the experts moves the bias between steps.
auto make_block(fm::vector_view<const float> bias) // (E)
{
    return fm::models::deepseek_v3({.width = width,
                                    .hidden = 32,
                                    .experts = experts,
                                    .k = 8,
                                    .groups = 8,
                                    .keep = 4,
                                    .scale = 2.5,
                                    .shared_hidden = 32,
                                    .bias = bias});
}
// [model]

int main()
{
    fm::host_executor ex;
    std::vector<float> bias(experts), x(tokens * width), y(x.size()), dy(x.size(), 1.0f), dx(x.size());
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 7919 % 1009) / 504.5f - 1.0f;
    const auto matrix = [](auto& v) { return fm::as_matrix(v, tokens, width); }; // (T,D)

    const auto block = make_block(fm::as_vector(bias));
    const fm::moe_layer layer{block.gate, block.expert, fm::self{}};
    auto weights = fm::random_weights<float>(ex, layer, /*seed=*/1);
    auto gradients = fm::zero_weights<float>(ex, layer);

    fm::buffer<std::byte, fm::host_executor> parameters, workspace;
    fm::mlp_weights<float> shared, shared_gradients;
    with_memory(ex, parameters, [&](fm::arena& memory) {
        shared = block.shared.expert.reserve_weights<float>(memory, 1);
        shared_gradients = block.shared.expert.reserve_weights<float>(memory, 1);
    });
    block.shared.expert.initialize(ex, shared, /*seed=*/2);

    auto saved = layer.forward(ex, matrix(x), weights.view(), matrix(y));
    layer.backward(ex, saved, matrix(dy), weights.view(), matrix(dx), gradients.view());
    with_memory(ex, workspace, [&](fm::arena& memory) { // adds to y and to dx
        const auto kept = block.shared.forward(ex, matrix(x), shared, matrix(y), memory);
        block.shared.backward(ex, kept, matrix(dy), shared, matrix(dx), shared_gradients, fm::write_mode::overwrite, memory);
    });

    std::printf("token 0: expert %d first, weight %.4f of %.1f; y[0] %+.4f, dx[0] %+.4f\n", saved.routing().experts(0),
                saved.routing().weights(0), block.gate.scale, y[0], dx[0]);
}
