// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A program without exceptions: it computes as any other, and what would be thrown ends it with the same text. The
/// argument says which mistake to make: none, shape, or fault (one that parallel work finds).
#include <cstdio>
#include <cstring>
#include <vector>

#include <fastmoe/moe.hpp>

#if defined(__cpp_exceptions)
#error "this file is to be compiled with exceptions off"
#endif

namespace fm = fastmoe;

bool throws_and_catches(); // beside.cpp

int main(int argc, char** argv)
{
    const char* mistake = argc > 1 ? argv[1] : "none";
    fm::host_executor ex({.threads = 2});
    fm::moe_layer layer{fm::top_k_gate<fm::softmax_score>{.experts = 4, .k = 2},
                        fm::mlp<fm::swiglu>{.width = 16, .hidden = 32}, fm::self{}};
    auto weights = fm::random_weights<float>(ex, layer, /*seed=*/1);
    auto gradients = fm::zero_weights<float>(ex, layer);
    std::vector<float> x(8 * 16, 0.5f), y(8 * 16, -1.0f), dx(8 * 16);
    const auto rows = [](auto& v) { return fm::as_matrix(v, 8, 16); };
    const auto saved = layer.forward(ex, rows(x), weights.view(), rows(y));
    layer.backward(ex, saved, rows(y), weights.view(), rows(dx), gradients.view());
    layer.infer(ex, rows(x), weights.view(), rows(y));
    for (std::size_t i = 0; i < y.size(); ++i)
        if (y[i] != y[i % 16] || y[i] == -1.0f) return 2;
    if (!throws_and_catches()) return 3; // or it has called this file's functions, and the program has ended
    std::puts("computed");
    std::fflush(stdout);

    if (std::strcmp(mistake, "shape") == 0) layer.infer(ex, rows(x), weights.view(), fm::as_matrix(y, 16, 8));
    if (std::strcmp(mistake, "fault") == 0) {
        std::vector<fm::int32_t> experts{0, 7};
        std::vector<float> w(2, 0.5f);
        const fm::routing<float> wrong{1, 4, 2, fm::as_vector(experts), fm::as_vector(w), {}};
        fm::arena measure;
        fm::make_plan(ex, wrong, fm::reserve_plan(measure, 1, 2, 4), measure);
        fm::buffer<std::byte, fm::host_executor> storage(ex, 2 * measure.bytes());
        fm::arena memory(storage.view());
        fm::make_plan(ex, wrong, fm::reserve_plan(memory, 1, 2, 4), memory);
    }
    return 0;
}
