// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the programs that measure a GPU share: times of events, of calls and of captured graphs, random values, and whether
/// gemm::hopper runs here.
#pragma once

#include <algorithm>
#include <vector>

#include <fastmoe/cuda.cuh>

namespace timing {

namespace fm = fastmoe;
using fm::bfloat16;
using fm::int64_t;

/// The time of what body() queues, between two events, in milliseconds; waits for it.
class stopwatch {
public:
    explicit stopwatch(fm::cuda_executor& ex) : ex_(ex)
    {
        fm::detail::cuda_check(cudaEventCreate(&begin_), "cudaEventCreate");
        fm::detail::cuda_check(cudaEventCreate(&end_), "cudaEventCreate");
    }
    stopwatch(const stopwatch&) = delete;
    stopwatch& operator=(const stopwatch&) = delete;
    ~stopwatch()
    {
        cudaEventDestroy(begin_);
        cudaEventDestroy(end_);
    }
    template <class Body>
    float operator()(const Body& body)
    {
        fm::detail::cuda_check(cudaEventRecord(begin_, ex_.stream()), "cudaEventRecord");
        body();
        fm::detail::cuda_check(cudaEventRecord(end_, ex_.stream()), "cudaEventRecord");
        ex_.synchronize();
        float took = 0;
        fm::detail::cuda_check(cudaEventElapsedTime(&took, begin_, end_), "cudaEventElapsedTime");
        return took;
    }

private:
    fm::cuda_executor& ex_;
    cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

/// @param times  at least one
inline double median(std::vector<float> times)
{
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

/// The median time of what body() queues.
template <class Body>
double milliseconds_of(fm::cuda_executor& ex, int rounds, const Body& body)
{
    stopwatch watch(ex);
    std::vector<float> times;
    for (int round = -3; round < rounds; ++round) { // three to warm up
        const float took = watch(body);
        if (round >= 0) times.push_back(took);
    }
    return median(times);
}

/// The median time of one of the replays of a graph, in which body()'s call stands alone: what an engine pays for a step whose
/// calls the host has prepared.
template <class Body>
double captured_milliseconds_of(fm::cuda_executor& ex, int rounds, const Body& body)
{
    constexpr int at_once = 20;
    body(); // its kernels are loaded before the capture
    ex.synchronize();
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t ready = nullptr;
    fm::detail::cuda_check(cudaStreamBeginCapture(ex.stream(), cudaStreamCaptureModeThreadLocal), "cudaStreamBeginCapture");
    body();
    fm::detail::cuda_check(cudaStreamEndCapture(ex.stream(), &graph), "cudaStreamEndCapture");
    fm::detail::cuda_check(cudaGraphInstantiate(&ready, graph, 0), "cudaGraphInstantiate");
    const double all = milliseconds_of(ex, rounds, [&] {
        for (int i = 0; i < at_once; ++i) fm::detail::cuda_check(cudaGraphLaunch(ready, ex.stream()), "cudaGraphLaunch");
    });
    cudaGraphExecDestroy(ready);
    cudaGraphDestroy(graph);
    return all / at_once;
}

/// Uniform in [-scale, scale).
struct fill_values {
    bfloat16* to;
    float scale = 1;
    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        const auto word = fm::philox({{static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(i >> 32), 0, 7}}, 1).word[0];
        to[i] = bfloat16(scale * (static_cast<float>(word) * 4.6566129e-10f - 1.0f));
    }
};

struct empty_cluster {
    static constexpr int cluster = 1;
    template <class Block>
    FASTMOE_HOST_DEVICE void operator()(Block&) const
    {
    }
};

/// Whether this is a device of 9.x and this program was compiled for 9.0a: elsewhere gemm::hopper is gemm::portable.
inline bool runs_hopper(const fm::cuda_executor& ex) { return ex.has_clusters<empty_cluster>(); }

} // namespace timing
