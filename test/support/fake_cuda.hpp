// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The CUDA runtime, cuBLAS and cuBLASLt over host memory, for programs of a plain C++ compiler that link none of them. The
/// functions are those that the toolkit declares (fake_cuda.cpp, fake_cublas.cpp): a stream is a queue that runs when somebody
/// waits for it, a captured one keeps what it was given, a launch runs the functor itself, one lane a team, and the products
/// are what the descriptors say. Misuse that the real libraries would not report is written down in complaints.
///
///     #include "support/fake_cuda.hpp"            // before any header of cuda/
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include <cuda_runtime.h>

// What nvcc knows and others do not. Kernels are compiled and never called: launch_on_host looks through them.
#undef __launch_bounds__
#define __launch_bounds__(...)
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
#define cudaLaunchKernelEx ::support::launch_on_host
template <class... Arguments>
cudaError_t cudaFuncSetAttribute(void (*)(Arguments...), cudaFuncAttribute, int)
{
    return cudaSuccess;
}

#include <fastmoe/exec/team.hpp>

namespace support {

class fake_cuda {
public:
    static fake_cuda& of_program()
    {
        static fake_cuda one;
        return one;
    }

    /// Forgets counts, failures and complaints.
    void start()
    {
        const std::lock_guard lock(mutex);
        calls.clear();
        failures.clear();
        complaints.clear();
    }
    /// The function fails with this status, as it is called the n-th time from now.
    void fail(const std::string& function, int status, int nth = 1) { failures[function] = {status, nth}; }
    /// To be called first by each function: counts, and says how it has to fail, if it has to.
    int enter(const char* function);

    void complain(const std::string& text) { complaints.push_back(text); }
    /// Does work now or later: what the stream is there for.
    void enqueue(std::function<void()> work) { (capturing ? graph : queue).push_back(std::move(work)); }
    /// What the queue holds is done, in its order.
    void run();
    /// The same from outside of the runtime.
    void wait()
    {
        const std::lock_guard lock(mutex);
        run();
    }
    /// Queues what was captured once more.
    void replay() { queue.insert(queue.end(), graph.begin(), graph.end()); }
    /// Whether an address is memory of the device, or pinned, as the runtime knows it.
    static bool is_in(const std::map<const void*, std::size_t>& blocks, const void* p);

    std::recursive_mutex mutex;
    std::map<std::string, int> calls;
    std::vector<std::string> complaints;
    std::deque<std::function<void()>> queue, graph;
    bool capturing = false;
    std::map<const void*, std::size_t> device, pinned;
    /// Of what cuBLASLt answers: no algorithm at all.
    bool has_no_algorithm = false;

private:
    struct failure {
        int status, nth;
    };
    std::map<std::string, failure> failures;
};

/// for_each of cuda_executor.
template <class F>
cudaError_t launch_on_host(const cudaLaunchConfig_t* how, void (*)(F, std::int64_t), const F& f, std::int64_t n)
{
    auto& cuda = fake_cuda::of_program();
    const std::lock_guard lock(cuda.mutex);
    if (const int status = cuda.enter("cudaLaunchKernelEx")) return static_cast<cudaError_t>(status);
    if (how->gridDim.x == 0 || how->blockDim.x == 0) return cudaErrorInvalidConfiguration;
    cuda.enqueue([f, n] {
        for (std::int64_t i = 0; i < n; ++i) f(i);
    });
    return cudaSuccess;
}

/// for_each_row of cuda_executor.
template <class F>
cudaError_t launch_on_host(const cudaLaunchConfig_t* how, void (*)(F, std::int64_t, int, std::int64_t), const F& f, std::int64_t n, int,
                           std::int64_t)
{
    auto& cuda = fake_cuda::of_program();
    const std::lock_guard lock(cuda.mutex);
    if (const int status = cuda.enter("cudaLaunchKernelEx")) return static_cast<cudaError_t>(status);
    if (how->gridDim.x == 0 || how->blockDim.x == 0) return cudaErrorInvalidConfiguration;
    cuda.enqueue([f, n] {
        std::vector<std::byte> scratch(static_cast<std::size_t>(fastmoe::team_scratch_bytes));
        for (std::int64_t row = 0; row < n; ++row) {
            fastmoe::single_lane_team team(scratch.data());
            f(team, row);
        }
    });
    return cudaSuccess;
}

/// for_each_block of cuda_executor: no lane here could meet another.
template <class F>
cudaError_t launch_on_host(const cudaLaunchConfig_t*, void (*)(F), const F&)
{
    return cudaErrorNotSupported;
}

} // namespace support
