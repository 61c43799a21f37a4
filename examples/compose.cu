// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Inside an engine on CUDA: its own kernels, then a MoE of primitives with a gate and an expert of its own, then its own
/// kernels again; forward and backward are captured in a graph and replayed. The engine brings pointers, a stream and a
/// workspace. compose/block.hpp has the step, for any executor, and the host's results are what the GPU's are held to.
/// Ends with 77 where there is no GPU.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include <fastmoe/cuda.cuh>

#include "compose/block.hpp"
#include "compose/loops.hpp"

namespace {

namespace fm = fastmoe;
using fm::int64_t;

// [kernels]
__device__ float sum_of_warp(float v)
{
    for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
    return v;
}

/// s = 1 / sqrt(<h, h> / D + epsilon) of a row; a warp calls it.
__device__ float scale_of_row(const float* h, int width)
{
    float squares = 0;
    for (int d = static_cast<int>(threadIdx.x); d < width; d += 32) squares += h[d] * h[d];
    return rsqrtf(sum_of_warp(squares) / static_cast<float>(width) + static_cast<float>(compose::norm_epsilon));
}

/// A warp a token: x = s h.
__global__ void normalize_rows(const float* h, float* x, int width)
{
    const std::size_t row = std::size_t{blockIdx.x} * static_cast<std::size_t>(width);
    const float scale = scale_of_row(h + row, width);
    for (int d = static_cast<int>(threadIdx.x); d < width; d += 32) x[row + d] = scale * h[row + d];
}

__global__ void add_rows(const float* h, const float* y, float* out, int64_t n)
{
    const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    if (i < n) out[i] = h[i] + y[i];
}

/// A warp a token: dh = dout + s (dx - h s^2 <h, dx> / D).
__global__ void normalize_rows_backward(const float* h, const float* dx, const float* dout, float* dh, int width)
{
    const std::size_t row = std::size_t{blockIdx.x} * static_cast<std::size_t>(width);
    const float scale = scale_of_row(h + row, width);
    float along = 0;
    for (int d = static_cast<int>(threadIdx.x); d < width; d += 32) along += h[row + d] * dx[row + d];
    const float back = sum_of_warp(along) * scale * scale / static_cast<float>(width);
    for (int d = static_cast<int>(threadIdx.x); d < width; d += 32)
        dh[row + d] = dout[row + d] + scale * (dx[row + d] - h[row + d] * back);
}

/// How the engine launches them: on its stream, between the library's kernels.
struct engine_kernels {
    cudaStream_t stream;
    int tokens, width;

    void normalize(const float* h, float* x) const { normalize_rows<<<tokens, 32, 0, stream>>>(h, x, width); }
    void add(const float* h, const float* y, float* out) const
    {
        const int64_t n = int64_t{tokens} * width;
        add_rows<<<static_cast<unsigned>((n + 255) / 256), 256, 0, stream>>>(h, y, out, n);
    }
    void normalize_backward(const float* h, const float* dx, const float* dout, float* dh) const
    {
        normalize_rows_backward<<<tokens, 32, 0, stream>>>(h, dx, dout, dh, width);
    }
};
// [kernels]

void check(cudaError_t status, const char* call)
{
    if (status == cudaSuccess) return;
    std::fprintf(stderr, "%s: %s\n", call, cudaGetErrorString(status));
    std::exit(1);
}
#define CHECK(call) check(call, #call)

constexpr compose::block_shape shape{.tokens = 512, .width = 128, .hidden = 256, .experts = 8};

/// Some numbers in [-1, 1], others for each seed; weights are a tenth of them.
std::vector<float> draw(int seed)
{
    std::vector<float> in(static_cast<std::size_t>(shape.elements()));
    const auto rows = static_cast<std::size_t>(shape.tokens * shape.width);
    std::uint64_t state = 0x9e3779b97f4a7c15u * static_cast<std::uint64_t>(seed + 1);
    for (std::size_t i = 0; i < in.size(); ++i) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        const float u = static_cast<float>(state >> 40) / 8388608.0f - 1.0f;
        in[i] = i < rows || i >= in.size() - rows ? u : 0.1f * u;
    }
    return in;
}

/// The same step on the host.
std::vector<float> on_host(const std::vector<float>& in)
{
    fm::host_executor ex;
    const compose::loops<fm::host_executor> kernels{ex, shape.tokens, shape.width};
    std::vector<float> out(in.size());
    const auto p = shape.lay_out(in.data(), out.data());
    fm::buffer<std::byte, fm::host_executor> workspace(ex, compose::step_bytes(ex, kernels, p));
    fm::arena memory(workspace.view());
    compose::train_step(ex, kernels, p, memory);
    return out;
}

/// The largest difference, as a part of 1 + |expected|; NaN counts as infinitely large.
double difference(const std::vector<float>& found, const std::vector<float>& expected)
{
    double most = 0;
    for (std::size_t i = 0; i < found.size(); ++i) {
        const double d = std::fabs(double(found[i]) - double(expected[i])) / (1 + std::fabs(double(expected[i])));
        most = d <= most ? most : std::isnan(d) ? INFINITY : d;
    }
    return most;
}

/// Returns how many replays were wrong.
int compose_on(cudaStream_t stream)
{
    const std::size_t size = static_cast<std::size_t>(shape.elements()) * sizeof(float);

    // [engine]
    // What the engine has anyway: a stream, memory, kernels.
    float *in = nullptr, *out = nullptr;
    CHECK(cudaMalloc(&in, size));
    CHECK(cudaMalloc(&out, size));
    const compose::block_pointers<float> p = shape.lay_out<float>(in, out);
    const engine_kernels kernels{stream, static_cast<int>(shape.tokens), static_cast<int>(shape.width)};

    // What the library adds: an executor on that stream, and a workspace of the size that the step says.
    fm::cuda_executor ex{stream};
    const int64_t bytes = compose::step_bytes(ex, kernels, p);
    std::byte* workspace = nullptr;
    CHECK(cudaMalloc(&workspace, static_cast<std::size_t>(bytes)));
    const auto step = [&] {
        fm::arena memory(fm::vector_view<std::byte>(workspace, bytes));
        compose::train_step(ex, kernels, p, memory); // queued: it allocates nothing and waits for nothing
        CHECK(cudaGetLastError());                   // of the engine's own launches
    };

    // Tokens come in; what a step does not write shows as NaN.
    const auto begin = [&](int seed) {
        CHECK(cudaMemsetAsync(out, 0xff, size, stream));
        CHECK(cudaMemsetAsync(workspace, 0xff, static_cast<std::size_t>(bytes), stream));
        CHECK(cudaMemcpy(in, draw(seed).data(), size, cudaMemcpyHostToDevice));
    };
    begin(0);
    step();
    ex.synchronize(); // waits, and throws what the work has found, such as an expert out of range

    // Captured once. Counts, offsets and routing stay on the device, so the graph is right for other tokens.
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t program = nullptr;
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    step();
    CHECK(cudaStreamEndCapture(stream, &graph));
    CHECK(cudaGraphInstantiate(&program, graph, 0));
    // [engine]

    const auto results = [&] {
        std::vector<float> values(size / sizeof(float));
        ex.synchronize();
        CHECK(cudaMemcpy(values.data(), out, size, cudaMemcpyDeviceToHost));
        return values;
    };
    cudaDeviceProp device{};
    std::size_t nodes = 0;
    CHECK(cudaGetDeviceProperties(&device, 0));
    CHECK(cudaGraphGetNodes(graph, nullptr, &nodes));
    std::printf("%s: a step of %lld tokens and %lld experts, %zu nodes in the graph, %lld bytes of workspace\n", device.name,
                static_cast<long long>(shape.tokens), static_cast<long long>(shape.experts), nodes, static_cast<long long>(bytes));
    int wrong = 0;
    for (const int seed : {1, 2, 3}) {
        begin(seed);
        CHECK(cudaGraphLaunch(program, stream));
        const auto replayed = results();
        begin(seed);
        step();
        const auto eager = results();
        const bool same = std::memcmp(replayed.data(), eager.data(), size) == 0;
        const double off = difference(replayed, on_host(draw(seed)));
        std::printf("tokens %d: the replay %s the eager step, and is %.2g from the host's\n", seed, same ? "equals" : "DIFFERS FROM", off);
        if (!same || !(off < 1e-4)) ++wrong;
    }
    CHECK(cudaGraphExecDestroy(program));
    CHECK(cudaGraphDestroy(graph));
    CHECK(cudaFree(workspace));
    CHECK(cudaFree(out));
    CHECK(cudaFree(in));
    return wrong;
}

} // namespace

int main()
{
    int devices = 0;
    if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
        std::printf("skipped: no GPU\n");
        return 77;
    }
    cudaStream_t stream = nullptr;
    CHECK(cudaStreamCreate(&stream));
    const int wrong = compose_on(stream);
    CHECK(cudaStreamDestroy(stream)); // it outlives the executor
    return wrong == 0 ? 0 : 1;
}
