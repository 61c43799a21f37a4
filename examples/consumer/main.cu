// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The same on a GPU: a stream of the program's own, memory of its own, one layer. Ends with 77 where there is no GPU.
#include <cstdio>
#include <vector>

#include <cuda_runtime.h>

#include <fastmoe/cuda.cuh>
#include <fastmoe/moe.hpp>

namespace fm = fastmoe;

int main()
{
    constexpr int tokens = 32, width = 64;
    constexpr std::size_t size = tokens * width * sizeof(float);

    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::printf("skipped: no GPU\n");
        return 77;
    }
    cudaStream_t stream = nullptr;
    float *x = nullptr, *y = nullptr; // (T,D)
    if (cudaStreamCreate(&stream) != cudaSuccess || cudaMalloc(&x, size) != cudaSuccess || cudaMalloc(&y, size) != cudaSuccess) return 1;
    std::vector<float> host(tokens * width);
    for (std::size_t i = 0; i < host.size(); ++i) host[i] = static_cast<float>(i % 7) - 3.0f;
    if (cudaMemcpy(x, host.data(), size, cudaMemcpyHostToDevice) != cudaSuccess) return 1;
    {
        fm::cuda_executor ex{stream};
        fm::moe_layer layer{
            fm::top_k_gate<fm::softmax_score>{.experts = 64, .k = 2},
            fm::mlp<fm::swiglu>{.width = width, .hidden = 256},
            fm::self{}};
        auto weights = fm::random_weights<float>(ex, layer, /*seed=*/1);
        layer.infer(ex, fm::matrix_view<float>(x, tokens, width), weights.view(), fm::matrix_view<float>(y, tokens, width));
        ex.synchronize(); // until here all was queued
    }
    if (cudaMemcpy(host.data(), y, size, cudaMemcpyDeviceToHost) != cudaSuccess) return 1;
    std::printf("the first token out: %g %g %g ...\n", host[0], host[1], host[2]);
    cudaFree(x);
    cudaFree(y);
    cudaStreamDestroy(stream);
}
