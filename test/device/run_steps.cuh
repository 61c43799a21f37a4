// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The quickstart's layer on a GPU, held to the host: forward, backward and inference, eager and as a replayed graph. Part of device_run.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <exception>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <fastmoe/cuda.cuh>

namespace device_run {

namespace fm = fastmoe;
using fm::int64_t;

// A file each; see run.cu.
void portable_float();
void portable_bfloat16();
void portable_half();
void hopper_bfloat16();
void hopper_half();

constexpr int64_t width = 64;
inline int wrong = 0;
inline int most_replays = std::numeric_limits<int>::max(); ///< of each graph

inline void check(bool holds, const char* what, double found = 0)
{
    if (holds) return;
    std::printf("FAILED: %s (%g)\n", what, found);
    ++wrong;
}

struct cluster_launches {
    int64_t forward = 0, backward = 0, infer = 0;
};

/// A cuda_executor that counts launches on clusters: gemm::hopper makes them and gemm::portable does not.
struct watched_executor : fm::cuda_executor {
    using fm::cuda_executor::cuda_executor;
    int64_t launches = 0;

    template <class F>
    void for_each_cluster(int64_t tasks, const F& f, int64_t shared_bytes)
    {
        ++launches;
        fm::cuda_executor::for_each_cluster(tasks, f, shared_bytes);
    }
};
template <class Executor>
int64_t launches_of(const Executor& ex)
{
    if constexpr (requires { ex.launches; }) return ex.launches;
    else return 0;
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
    cluster_launches by_clusters{}; ///< of the last run

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
        auto count = [this, last = launches_of(ex)]() mutable { return launches_of(ex) - std::exchange(last, launches_of(ex)); };
        const auto saved = layer.forward(ex, matrix(x), weights.view(), matrix(y), a);
        by_clusters.forward = count();
        layer.backward(ex, saved, matrix(dy), weights.view(), matrix(dx), gradients.view(), b);
        by_clusters.backward = count();
        layer.infer(ex, matrix(x), weights.view(), matrix(inferred), b);
        by_clusters.infer = count();
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

/// Says which policy's kernels ran. On a device of 9.0 gemm::hopper is not to be gemm::portable in silence.
inline void name_policy(const char* name, const cluster_launches& n, bool asks_hopper)
{
    const int passes = (n.forward > 0) + (n.backward > 0) + (n.infer > 0);
    const char* const ran = passes == 3 ? "gemm::hopper" : passes == 0 ? "gemm::portable" : "gemm::hopper in part";
    std::printf("%s: %s ran; launches on clusters: forward %lld, backward %lld, inference %lld\n", name, ran,
                static_cast<long long>(n.forward), static_cast<long long>(n.backward), static_cast<long long>(n.infer));
    if (!asks_hopper) return;
    int device = 0, major = 0, minor = 0;
    fm::detail::cuda_check(cudaGetDevice(&device), "cudaGetDevice");
    fm::detail::cuda_check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    fm::detail::cuda_check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
    if (major == 9 && minor == 0)
        check(passes == 3, (std::string(name) + ": on a device of 9.0, and in the place of gemm::hopper, " + ran + " ran").c_str());
    else std::printf("%s: the device is of %d.%d, where gemm::hopper is gemm::portable\n", name, major, minor);
}

template <class T, class Gemm>
void compare_on(cudaStream_t stream, const char* name, double bound, const how_to_compare& how)
{
    watched_executor gpu{stream, nullptr, how.options};
    fm::host_executor cpu;
    step<T, watched_executor, Gemm> a(gpu, how.tokens);
    step<T, fm::host_executor, Gemm> b(cpu, how.tokens);
    a.fill(0);
    b.fill(0);
    a.run();
    b.run();
    const auto mine = a.results(), expected = b.results();
    name_policy(name, a.by_clusters, std::is_same_v<Gemm, fm::gemm::hopper>);
    double most = 0;
    for (std::size_t i = 0; i < mine.size(); ++i) {
        const double d = std::fabs(mine[i] - expected[i]) / (1 + std::fabs(expected[i]));
        most = d <= most ? most : d;
    }
    std::printf("%s: at most %.3g from the host\n", name, most);
    check(most <= bound, name, most);
    a.run();
    check(a.results() == mine, "a second run gives the same bits");

    cudaGraph_t graph = nullptr;
    cudaGraphExec_t program = nullptr;
    fm::detail::cuda_check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    a.run();
    fm::detail::cuda_check(cudaStreamEndCapture(stream, &graph), "cudaStreamEndCapture");
    fm::detail::cuda_check(cudaGraphInstantiate(&program, graph, 0), "cudaGraphInstantiate");
    const int replays = std::min(how.replays, most_replays);
    for (int seed = 1; seed <= replays; ++seed) {
        a.fill(seed);
        fm::detail::cuda_check(cudaGraphLaunch(program, stream), "cudaGraphLaunch");
        const auto replayed = a.results();
        a.run();
        check(replayed == a.results(), "a replay with other routing gives the bits of an eager run");
        check(replayed != mine, "another input gives another result");
    }
    cudaGraphExecDestroy(program);
    cudaGraphDestroy(graph);
    std::printf("%s: %d replays\n", name, replays);
}

/// body(), its name before it and what it throws after it: a log shows where a program stopped, and the next one begins.
template <class Body>
void guarded(const char* name, const Body& body)
{
    std::printf("%s: begins\n", name);
    try {
        body();
    } catch (const std::exception& e) {
        check(false, (std::string(name) + ": " + e.what()).c_str());
    }
}

/// A layer on the GPU beside the host's, on a stream of its own.
template <class T, class Gemm = fm::gemm::portable>
void compare(const char* name, double bound, const how_to_compare& how = {})
{
    guarded(name, [&] {
        cudaStream_t stream = nullptr;
        fm::detail::cuda_check(cudaStreamCreate(&stream), "cudaStreamCreate");
        compare_on<T, Gemm>(stream, name, bound, how);
        cudaStreamDestroy(stream);
    });
}

} // namespace device_run
