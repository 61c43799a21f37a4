// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The quickstart on a GPU, held to the host: forward, backward and inference, eager and as a replayed graph, in three
/// dtypes, with gemm::portable and gemm::hopper, whose graph is replayed a thousand times; and ranks whose messages are staged. Ends with 77, skipped, where there is no GPU; there it shows that an executor cannot be made, and says why.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include <fastmoe/cuda.cuh>

#include "staged_ranks.cuh"

namespace fm = fastmoe;
using fm::int64_t;

namespace {

constexpr int64_t width = 64;
int wrong = 0;

void check(bool holds, const char* what, double found = 0)
{
    if (holds) return;
    std::printf("FAILED: %s (%g)\n", what, found);
    ++wrong;
}

template <class Gemm>
using layer_of = fm::moe_layer<fm::top_k_gate<fm::softmax_score>, fm::mlp<fm::swiglu, Gemm>, fm::self>;

/// Gate and up interleaved, so that what can be in registers is. The host multiplies by portable whatever Gemm is.
template <class Gemm>
layer_of<Gemm> make_layer()
{
    return {{.experts = 8, .k = 2, .capacity = {.factor = 1.5}, .balance = {.coefficient = 0.01}},
            {.width = width, .hidden = 128, .biases = true, .layout = fm::gated_layout::interleaved}, {}};
}

template <class T, class Executor>
void copy_in(Executor& ex, const std::vector<T>& values, T* to)
{
    if constexpr (requires { ex.copy(to, values.data(), 1); }) ex.copy(to, values.data(), static_cast<int64_t>(values.size() * sizeof(T)));
    else std::copy(values.begin(), values.end(), to);
    ex.synchronize();
}
template <class T, class Executor>
void append(Executor& ex, const T* values, int64_t n, std::vector<double>& to)
{
    std::vector<T> host(static_cast<std::size_t>(n));
    if constexpr (requires { ex.copy(host.data(), values, 1); }) ex.copy(host.data(), values, n * static_cast<int64_t>(sizeof(T)));
    else std::copy(values, values + n, host.data());
    ex.synchronize();
    for (const T v : host) to.push_back(static_cast<double>(v));
}

template <class T, class Executor, class Gemm>
struct step {
    using layer_type = layer_of<Gemm>;
    Executor& ex;
    int64_t tokens;
    layer_type layer = make_layer<Gemm>();
    fm::owned_weights_t<T, layer_type, Executor> weights, gradients;
    fm::buffer<T, Executor> x, y, dy, dx, inferred;
    fm::buffer<std::byte, Executor> memory, scratch;

    step(Executor& e, int64_t n)
        : ex(e), tokens(n), weights(fm::random_weights<T>(e, layer, 1)), gradients(fm::zero_weights<T>(e, layer)), x(e, tokens * width),
          y(e, tokens * width), dy(e, tokens * width), dx(e, tokens * width), inferred(e, tokens * width),
          memory(e, layer.template forward_bytes<T>(e, tokens, width)),
          scratch(e, layer.template backward_bytes<T>(e, tokens, width) + layer.template infer_bytes<T>(e, tokens, width))
    {
    }
    /// Other values into the same memory, for a graph that knows where it is.
    void fill(int seed)
    {
        std::vector<T> a, b;
        for (int64_t i = 0; i < tokens * width; ++i) a.push_back(T(static_cast<float>(i * 7919 % (1009 + seed)) / 504.5f - 1.0f));
        for (int64_t i = 0; i < tokens * width; ++i) b.push_back(T(static_cast<float>(i * 104729 % (997 + seed)) / 498.5f - 1.0f));
        copy_in(ex, a, x.data());
        copy_in(ex, b, dy.data());
    }
    void run()
    {
        fm::arena a(memory.view()), b(scratch.view());
        const auto matrix = [this](auto& m) { return m.matrix(tokens, width); }; // (T,D)
        const auto saved = layer.forward(ex, matrix(x), weights.view(), matrix(y), a);
        layer.backward(ex, saved, matrix(dy), weights.view(), matrix(dx), gradients.view(), b);
        layer.infer(ex, matrix(x), weights.view(), matrix(inferred), b);
    }
    std::vector<double> results()
    {
        std::vector<double> out;
        append(ex, y.data(), y.size(), out);
        append(ex, dx.data(), dx.size(), out);
        append(ex, inferred.data(), inferred.size(), out);
        append(ex, gradients.view().gate.data_handle(), 8 * width, out);
        append(ex, gradients.view().expert.up.data, 8 * 256 * width, out);
        return out;
    }
};

struct how_to_compare {
    int replays = 2;
    int64_t tokens = 256;
    fm::cuda_options options{};
};

template <class T, class Gemm = fm::gemm::portable>
void compare(cudaStream_t stream, const char* dtype, double bound, const how_to_compare& how = {})
{
    fm::cuda_executor gpu{stream, nullptr, how.options};
    fm::host_executor cpu;
    step<T, fm::cuda_executor, Gemm> a(gpu, how.tokens);
    step<T, fm::host_executor, Gemm> b(cpu, how.tokens);
    a.fill(0);
    b.fill(0);
    a.run();
    b.run();
    const auto mine = a.results(), expected = b.results();
    double most = 0;
    for (std::size_t i = 0; i < mine.size(); ++i) {
        const double d = std::fabs(mine[i] - expected[i]) / (1 + std::fabs(expected[i]));
        most = d <= most ? most : d;
    }
    std::printf("%s: at most %.3g from the host\n", dtype, most);
    check(most <= bound, dtype, most);
    a.run();
    check(a.results() == mine, "a second run gives the same bits");

    cudaGraph_t graph = nullptr;
    cudaGraphExec_t program = nullptr;
    fm::detail::cuda_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    a.run();
    fm::detail::cuda_check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    fm::detail::cuda_check(cudaGraphInstantiate(&program, graph, 0), "cudaGraphInstantiate");
    for (int seed = 1; seed <= how.replays; ++seed) {
        a.fill(seed);
        fm::detail::cuda_check(cudaGraphLaunch(program, stream), "cudaGraphLaunch");
        const auto replayed = a.results();
        a.run();
        check(replayed == a.results(), "a replay with other routing gives the bits of an eager run");
        check(replayed != mine, "another input gives another result");
    }
    cudaGraphExecDestroy(program);
    cudaGraphDestroy(graph);
}

struct record_fault {
    fm::fault_recorder faults;
    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { faults.record(fm::fault_kind::expert_out_of_range, 7 + i, 99); }
};

void faults(cudaStream_t stream)
{
    fm::cuda_executor ex{stream};
    fm::for_each(ex, 1000, record_fault{ex.faults()});
    std::string text = "nothing";
    try {
        ex.synchronize();
    } catch (const fm::invalid_argument& e) {
        text = e.what();
    }
    check(text.find("routing.experts(7) is 99") != std::string::npos, text.c_str());
    check(!ex.fault(), "a fault is thrown once");
}

} // namespace

int main()
{
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        try {
            fm::cuda_executor ex;
        } catch (const fm::cuda_error& e) {
            std::printf("skipped: no GPU: %s\n", e.what());
            return 77;
        }
        std::printf("FAILED: without a GPU an executor was made\n");
        return 1;
    }
    cudaStream_t stream = nullptr;
    fm::detail::cuda_check(cudaStreamCreate(&stream), "cudaStreamCreate");
    compare<float>(stream, "float32", 1e-4);
    compare<fm::bfloat16>(stream, "bfloat16", 4e-2);
    compare<fm::half>(stream, "float16", 5e-3);
#if defined(FASTMOE_TEST_CUDA) // minutes of compiling, for who can run it
    compare<fm::bfloat16, fm::gemm::hopper>(stream, "bfloat16, hopper", 4e-2, {.replays = 1000});
    compare<fm::half, fm::gemm::hopper>(stream, "float16, hopper", 5e-3, {.replays = 1000});
    // As in decoding: features down, logits and plan of few tokens, kernels that begin early.
    compare<fm::bfloat16, fm::gemm::hopper>(stream, "bfloat16, hopper, few tokens", 4e-2, {.replays = 100, .tokens = 24});
    compare<fm::bfloat16, fm::gemm::hopper>(stream, "bfloat16, hopper, few tokens, early kernels", 4e-2,
                                            {.replays = 100, .tokens = 24, .options = {.programmatic_launch = true}});
    compare<fm::half, fm::gemm::hopper>(stream, "float16, hopper, early kernels", 5e-3, {.replays = 100, .options = {.programmatic_launch = true}});
    compare<fm::bfloat16>(stream, "bfloat16, few tokens, early kernels", 4e-2, {.replays = 100, .tokens = 7, .options = {.programmatic_launch = true}});
#endif
    faults(stream);
    check(staged_ranks::count_wrong_elements(int64_t{1} << 20) == 0, "staged ranks, in whole");
    check(staged_ranks::count_wrong_elements(4096) == 0, "staged ranks, in parts");
    cudaStreamDestroy(stream);
    return wrong == 0 ? 0 : 1;
}
