// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The column of the GPU: cuda_executor in a program whose heap is managed memory, so that tests hand std::vectors to kernels
/// and look at results as they do on other executors, once they have called ex.synchronize() or download(). Goes with
/// managed_heap.cpp, which replaces operator new.
#pragma once

#include <fastmoe/cuda/cuda_executor.cuh>

#include "managed_heap.hpp"

namespace support {

class managed_memory final : public fastmoe::memory_resource {
public:
    void* allocate(std::int64_t bytes) override
    {
        return managed_heap().take(static_cast<std::size_t>(bytes), fastmoe::memory_alignment);
    }
    /// Waits: the heap may lend the block to the host next.
    void deallocate(void* memory, std::int64_t) noexcept override
    {
        (void)cudaDeviceSynchronize();
        managed_heap().give(memory);
    }
};

struct cuda_column {
    static constexpr const char* name = "cuda";

    static bool available()
    {
        int devices = 0;
        if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return false;
        static const bool started = [] {
            constexpr std::size_t bytes = std::size_t{16} << 30; // pages come when they are touched
            void* region = nullptr;
            fastmoe::detail::cuda_check(cudaMallocManaged(&region, bytes), "cudaMallocManaged");
            managed_heap().start(region, bytes);
            return true;
        }();
        return started;
    }
    static fastmoe::cuda_executor make()
    {
        (void)available(); // the heap has been started
        static managed_memory memory;
        return fastmoe::cuda_executor(nullptr, &memory);
    }
    /// For a rank that is a thread: on the thread's own stream, beside those of the others.
    static fastmoe::cuda_executor make_for_rank()
    {
        (void)available();
        static managed_memory memory;
        return fastmoe::cuda_executor(cudaStreamPerThread, &memory);
    }
};

} // namespace support
