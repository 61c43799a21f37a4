// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The column of the GPU: cuda_executor in a program whose heap is managed memory, so that tests hand std::vectors to kernels
/// and look at results as they do on other executors, once they have called ex.synchronize() or download(). Goes with
/// managed_heap.cpp, which replaces operator new. The stack, static storage and what mmap gives are no managed memory.
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

    /// Why the column is not available: null if it is. The host looks at managed memory while kernels run.
    static const char* missing()
    {
        int devices = 0, device = 0, concurrent = 0;
        if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return "no device";
        const bool known = cudaGetDevice(&device) == cudaSuccess &&
                           cudaDeviceGetAttribute(&concurrent, cudaDevAttrConcurrentManagedAccess, device) == cudaSuccess;
        return known && concurrent != 0 ? nullptr : "no concurrent access of host and device to managed memory";
    }
    static bool available()
    {
        if (missing() != nullptr) return false;
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
    /// Zeros, where the device has room for all of them; else null.
    static void* take_zeros(std::size_t bytes)
    {
        constexpr std::size_t others = std::size_t{2} << 30;
        std::size_t left = 0, all = 0;
        void* zeros = nullptr;
        if (cudaMemGetInfo(&left, &all) != cudaSuccess || left < bytes + others) return nullptr;
        fastmoe::detail::cuda_check(cudaMallocManaged(&zeros, bytes), "cudaMallocManaged");
        fastmoe::detail::cuda_check(cudaMemset(zeros, 0, bytes), "cudaMemset");
        fastmoe::detail::cuda_check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
        return zeros;
    }
    static void give_zeros(void* zeros) noexcept
    {
        (void)cudaDeviceSynchronize();
        (void)cudaFree(zeros);
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
