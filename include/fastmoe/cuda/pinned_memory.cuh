// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Page-locked host memory: what a stream copies to and from without waiting, for communicators that stage.
#pragma once

#include <fastmoe/cuda/cuda_check.cuh>
#include <fastmoe/exec/memory.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Memory of cudaMallocHost, which host and all devices reach. To take it, and to give it back, may wait for the device and
/// takes long: do so once, outside of a capture.
class pinned_memory final : public memory_resource {
public:
    void* allocate(int64_t bytes) override
    {
        void* memory = nullptr;
        detail::cuda_check(cudaMallocHost(&memory, static_cast<std::size_t>(bytes > 0 ? bytes : 1)), "cudaMallocHost");
        return memory; // aligned to pages
    }
    void deallocate(void* memory, int64_t) noexcept override { (void)cudaFreeHost(memory); }
};

} // namespace fastmoe::inline FASTMOE_ABI
