// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Device memory in the order of a stream. Part of cuda_executor.cuh.
#pragma once

#include <cstdint>

#include <fastmoe/cuda/cuda_check.cuh>
#include <fastmoe/exec/memory.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Memory of a pool, taken and given back in the order of a stream: what is given back may be handed out again by the next
/// call, though kernels that use it still run, since those that get it run after them. Nothing waits.
class cuda_memory final : public memory_resource {
public:
    /// A pool of its own on the current device, which keeps what it has got until it ends.
    explicit cuda_memory(cudaStream_t stream) : stream_(stream), owns_pool_(true)
    {
        cudaMemPoolProps what{};
        what.allocType = cudaMemAllocationTypePinned;
        what.location.type = cudaMemLocationTypeDevice;
        detail::cuda_check(cudaGetDevice(&what.location.id), "cudaGetDevice");
        detail::cuda_check(cudaMemPoolCreate(&pool_, &what), "cudaMemPoolCreate");
        std::uint64_t keep = UINT64_MAX;
        detail::cuda_check(cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrReleaseThreshold, &keep), "cudaMemPoolSetAttribute");
    }
    /// The caller's pool, which several streams may share.
    cuda_memory(cudaStream_t stream, cudaMemPool_t pool) noexcept : stream_(stream), pool_(pool) {}
    cuda_memory(const cuda_memory&) = delete;
    cuda_memory& operator=(const cuda_memory&) = delete;
    ~cuda_memory() override
    {
        if (owns_pool_) (void)cudaMemPoolDestroy(pool_); // ends when the last block comes back
    }

    void* allocate(int64_t bytes) override
    {
        void* memory = nullptr;
        const auto size = static_cast<std::size_t>(bytes > 0 ? bytes : 1);
        detail::cuda_check(cudaMallocFromPoolAsync(&memory, size, pool_, stream_), "cudaMallocFromPoolAsync");
        return memory;
    }
    void deallocate(void* memory, int64_t) noexcept override { (void)cudaFreeAsync(memory, stream_); }

private:
    cudaStream_t stream_;
    cudaMemPool_t pool_ = nullptr;
    bool owns_pool_ = false;
};

} // namespace fastmoe::inline FASTMOE_ABI
