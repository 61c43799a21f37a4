// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What a layer's parts take on a GPU: medians of event times, as JSON into the file that is named. Ends with 77, skipped,
/// where there is no GPU. Verbs that only move memory are given beside a device copy of the same run.
///
///     device_bench figures.json
#include <cstdio>
#include <string>

#include <fastmoe/cuda/cublaslt.cuh>
#include <fastmoe/cuda/cublaslt_grouped.cuh>

#include "timing.cuh"

namespace {

namespace fm = fastmoe;
using fm::bfloat16;
using fm::int64_t;
using timing::fill_values;
using timing::milliseconds_of;

struct figures {
    std::string json;
    /// @param bytes, operations  moved and done in that time; 0: not said
    void add(const std::string& name, double ms, double bytes = 0, double operations = 0)
    {
        char line[256];
        std::snprintf(line, sizeof line, "%s\n  {\"name\": \"%s\", \"ms\": %.6g, \"gb_per_s\": %.5g, \"tflops\": %.5g}", json.empty() ? "" : ",",
                      name.c_str(), ms, bytes / ms * 1e-6, operations / ms * 1e-9);
        json += line;
        std::printf("%-72s %10.4f ms", name.c_str(), ms);
        if (bytes > 0) std::printf(" %10.1f GB/s", bytes / ms * 1e-6);
        if (operations > 0) std::printf(" %10.1f TFLOPS", operations / ms * 1e-9);
        std::printf("\n");
        std::fflush(stdout);
    }
};

struct shape {
    const char* name;
    int64_t tokens, width, hidden, experts, k;
    int rounds;
};

/// A layer's three passes, and what moves rows around its products. Forward is 6 T K H D operations, backward 12.
template <class Gemm>
void layer(fm::cuda_executor& ex, figures& out, const shape& s, const std::string& label, const Gemm& gemm,
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
    const std::string name = std::string(s.name) + " " + label;
    const double forward = 6.0 * static_cast<double>(s.tokens * s.k) * static_cast<double>(s.hidden * s.width);
    out.add(name + " infer", milliseconds_of(ex, s.rounds, [&] {
                fm::arena a(small.view());
                l.infer(ex, matrix(x), weights.view(), matrix(y), a);
            }), 0, forward);
    out.add(name + " forward", milliseconds_of(ex, s.rounds, [&] {
                fm::arena a(kept.view());
                l.forward(ex, matrix(x), weights.view(), matrix(y), a);
            }), 0, forward);
    fm::arena a(kept.view());
    const auto saved = l.forward(ex, matrix(x), weights.view(), matrix(y), a);
    out.add(name + " backward", milliseconds_of(ex, s.rounds, [&] {
                fm::arena b(lent.view());
                l.backward(ex, saved, matrix(dy), weights.view(), matrix(dx), gradients.view(), b);
            }), 0, 2 * forward);
    if (label != "portable") return;
    const auto& plan = saved.plan();
    fm::buffer<bfloat16, fm::cuda_executor> rows(ex, plan.slots * s.width);
    const double moved = 2.0 * 2.0 * static_cast<double>(s.tokens * s.k * s.width);
    out.add(name + " dispatch", milliseconds_of(ex, s.rounds, [&] { fm::dispatch(ex, matrix(x), plan, rows.matrix(plan.slots, s.width)); }), moved);
}

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
    out.add(std::string(s.name) + " hopper_fp8_stored, interleaved infer", milliseconds_of(ex, s.rounds, [&] {
                fm::arena a(small.view());
                l.infer(ex, x.matrix(s.tokens, s.width), read, y.matrix(s.tokens, s.width), a);
            }), 0, 6.0 * static_cast<double>(s.tokens * s.k) * static_cast<double>(s.hidden * s.width));
}

/// gemm::hopper ends its products with activations where gate and up lie side by side.
void layer_by_hopper(fm::cuda_executor& ex, figures& out, const shape& s)
{
    if (!timing::runs_hopper(ex)) return;
    layer(ex, out, s, "hopper, interleaved", fm::gemm::hopper{}, fm::gated_layout::interleaved);
    layer(ex, out, s, "hopper_fp8, interleaved", fm::gemm::hopper_fp8{}, fm::gated_layout::interleaved);
    infer_of_codes(ex, out, s);
}

/// The same layer over each policy: cuBLASLt a group at a time, cuBLAS for all groups, and cuBLASLt for all on the device.
void layer_by_each(fm::cuda_executor& ex, figures& out, const shape& s, fm::cublaslt_context& each, fm::cublaslt_context& all)
{
    layer_by_hopper(ex, out, s);
    layer(ex, out, s, "portable", fm::gemm::portable{});
    layer(ex, out, s, "cublaslt", fm::gemm::cublaslt{&each});
    layer(ex, out, s, "cublas, one call", fm::gemm::cublaslt{&all});
#if CUBLAS_VERSION >= 130400
    layer(ex, out, s, "cublaslt_grouped", fm::gemm::cublaslt_grouped{&each});
#endif
}

} // namespace

int main(int count, char** arguments)
{
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::printf("skipped: no GPU\n");
        return 77;
    }
    cudaStream_t stream = nullptr;
    fm::detail::cuda_check(cudaStreamCreate(&stream), "cudaStreamCreate");
    figures out;
    {
        fm::cuda_executor ex{stream};
        if (!timing::runs_hopper(ex)) std::printf("gemm::hopper is left out: no GPU of 9.x, or not compiled for 9.0a\n");
        fm::cublaslt_context each, all({.calls = fm::group_calls::one_for_all});
        const int64_t bytes = int64_t{256} << 20;
        fm::buffer<std::byte, fm::cuda_executor> a(ex, bytes), b(ex, bytes);
        out.add("device copy of 256 MiB", milliseconds_of(ex, 20, [&] { ex.copy(b.data(), a.data(), bytes); }), 2.0 * static_cast<double>(bytes));
        layer_by_each(ex, out, {"T 4096 D 1024 H 1024 E 16 K 2", 4096, 1024, 1024, 16, 2, 10}, each, all);
        layer_by_each(ex, out, {"T 32768 D 4096 H 2048 E 64 K 4", 32768, 4096, 2048, 64, 4, 10}, each, all);
        for (const shape& s : {shape{"T 32768 D 4096 H 1024 E 128 K 8", 32768, 4096, 1024, 128, 8, 5},
                               shape{"T 32768 D 4096 H 256 E 256 K 16", 32768, 4096, 256, 256, 16, 5},
                               shape{"T 24576 D 1536 H 256 E 128 K 8", 24576, 1536, 256, 128, 8, 5}}) {
            layer_by_hopper(ex, out, s);
            layer(ex, out, s, "cublaslt", fm::gemm::cublaslt{&each});
        }
        for (const int64_t tokens : {1, 8, 32, 128}) {
            const std::string name = "T " + std::to_string(tokens) + " D 4096 H 14336 E 8 K 2";
            layer_by_each(ex, out, {name.c_str(), tokens, 4096, 14336, 8, 2, 20}, each, all);
        }
    }
    cudaStreamDestroy(stream);
    if (count > 1) {
        std::FILE* file = std::fopen(arguments[1], "w");
        if (!file) return 1;
        std::fprintf(file, "[%s\n]\n", out.json.c_str());
        std::fclose(file);
    }
    return 0;
}
