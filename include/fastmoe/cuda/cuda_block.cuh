// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Blocks of the GPU: the instructions behind exec/block.hpp. Part of cuda_executor.cuh.
#pragma once

#include <cuda_runtime.h>

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/cuda/kernel_order.cuh>
#include <fastmoe/exec/block.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI {

/// A thread's view of its CUDA block, from sm_80 on. Members do nothing on the host, where no such threads are.
struct device_block {
    std::byte* memory;

    FASTMOE_HOST_DEVICE int thread() const noexcept
    {
#if defined(__CUDA_ARCH__)
        return static_cast<int>(threadIdx.x);
#else
        return 0;
#endif
    }
    FASTMOE_HOST_DEVICE int64_t index() const noexcept
    {
#if defined(__CUDA_ARCH__)
        return blockIdx.x;
#else
        return 0;
#endif
    }
    FASTMOE_HOST_DEVICE int64_t count() const noexcept
    {
#if defined(__CUDA_ARCH__)
        return gridDim.x;
#else
        return 1;
#endif
    }
    FASTMOE_HOST_DEVICE std::byte* shared() const noexcept { return memory; }
    FASTMOE_HOST_DEVICE void sync() const noexcept
    {
#if defined(__CUDA_ARCH__)
        __syncthreads();
#endif
    }
    FASTMOE_HOST_DEVICE void copy_line([[maybe_unused]] void* to, [[maybe_unused]] const void* from) const noexcept
    {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(to)), "l"(__cvta_generic_to_global(from)) : "memory");
#endif
    }
    FASTMOE_HOST_DEVICE void commit() const noexcept
    {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        asm volatile("cp.async.commit_group;" ::: "memory");
#endif
    }
    template <int n>
    FASTMOE_HOST_DEVICE void wait() const noexcept
    {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
    }
    FASTMOE_HOST_DEVICE void load([[maybe_unused]] std::uint32_t (&r)[4], [[maybe_unused]] const std::byte* line) const noexcept
    {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address(line))
                     : "memory");
#endif
    }
    FASTMOE_HOST_DEVICE void load_transposed([[maybe_unused]] std::uint32_t (&r)[4],
                                             [[maybe_unused]] const std::byte* line) const noexcept
    {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address(line))
                     : "memory");
#endif
    }
    template <class T>
    FASTMOE_HOST_DEVICE void multiply([[maybe_unused]] float (&c)[4], [[maybe_unused]] const std::uint32_t (&a)[4],
                                      [[maybe_unused]] std::uint32_t b0, [[maybe_unused]] std::uint32_t b1) const noexcept
    {
        static_assert(std::is_same_v<T, bfloat16> || std::is_same_v<T, half>);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
        if constexpr (std::is_same_v<T, bfloat16>) {
            asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                "{%0, %1, %2, %3};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
        } else {
            asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                "{%0, %1, %2, %3};"
                : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
        }
#endif
    }

private:
#if defined(__CUDA_ARCH__)
    static __device__ unsigned address(const void* shared) noexcept { return static_cast<unsigned>(__cvta_generic_to_shared(shared)); }
#endif
};

static_assert(thread_block<device_block>);

/// What was compiled for devices before 8.0 alone ends the kernel with an error: it has no
/// instructions for it, and has_blocks() keeps it from being called on such a device.
template <class F>
__global__ void __launch_bounds__(block_threads, F::resident) run_blocks([[maybe_unused]] const __grid_constant__ F f)
{
    extern __shared__ __align__(128) unsigned char fastmoe_shared[];
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    device_block block{reinterpret_cast<std::byte*>(fastmoe_shared)};
    wait_for_kernels();
    f(block);
#elif defined(__CUDA_ARCH__)
    __trap();
#endif
}

} // namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI
