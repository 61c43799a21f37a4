// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What a layer and its parts take on a GPU: medians of event times, and claims that are held to their targets, as JSON into the
/// file that is named. Ends with 77, skipped, where there is no GPU; a claim that falls short is no failure.
///
///     device_bench figures.json                   everything, what matters most first
///     device_bench figures.json layers decode     these parts: layers verbs decode skew
///     device_bench_cublas products.json           what needs cuBLAS: products policies
#include <cstdio>
#include <cstring>

#include "bench_parts.cuh"

int main(int count, char** arguments)
{
    using namespace timing;
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::printf("skipped: no GPU\n");
        return 77;
    }
    const struct {
        const char* name;
        void (*run)(fm::cuda_executor&, figures&);
    } parts[] = {
#if defined(FASTMOE_BENCH_CUBLAS)
        {"products", bench_products}, {"policies", bench_policies}
#else
        {"layers", bench_layers}, {"verbs", bench_verbs}, {"decode", bench_decode}, {"skew", bench_skew}
#endif
    };
    for (int i = 2; i < count; ++i) {
        bool known = false;
        for (const auto& part : parts) known = known || std::strcmp(part.name, arguments[i]) == 0;
        if (!known) {
            std::fprintf(stderr, "there is no part '%s':", arguments[i]);
            for (const auto& part : parts) std::fprintf(stderr, " %s", part.name);
            std::fprintf(stderr, "\n");
            return 2;
        }
    }
    cudaStream_t stream = nullptr;
    fm::detail::cuda_check(cudaStreamCreate(&stream), "cudaStreamCreate");
    figures out(count > 1 ? arguments[1] : nullptr);
    {
        fm::cuda_executor ex{stream};
        if (!runs_hopper(ex)) std::printf("gemm::hopper is gemm::portable here: no GPU of 9.x, or not compiled for 9.0a\n");
        const int64_t bytes = int64_t{1} << 30;
        {
            const auto a = random_values(ex, bytes / 2);
            fm::buffer<bfloat16, fm::cuda_executor> b(ex, bytes / 2);
            const double ms = milliseconds_of(ex, 20, [&] { ex.copy(b.data(), a.data(), bytes); });
            out.add("device copy of 1 GiB", ms, 2.0 * static_cast<double>(bytes));
            out.copy_gb_per_s = 2.0 * static_cast<double>(bytes) / ms * 1e-6;
        }
        for (const auto& part : parts) {
            bool asked = count <= 2;
            for (int i = 2; i < count; ++i) asked = asked || std::strcmp(part.name, arguments[i]) == 0;
            if (asked) part.run(ex, out);
        }
    }
    cudaStreamDestroy(stream);
    return 0;
}
