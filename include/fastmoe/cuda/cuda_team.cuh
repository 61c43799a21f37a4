// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How the lanes of a warp and of a block meet, and the kernels that call functors. Part of cuda_executor.cuh.
#pragma once

#include <cstddef>
#include <cstring>
#include <type_traits>

#include <cuda_runtime.h>

#include <fastmoe/cuda/cuda_check.cuh>
#include <fastmoe/exec/wide_team.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI {

/// The lanes of a warp: values go through shuffles. Members are host-device, as all that functors touch, and do nothing on
/// the host, where no such lanes are.
struct warp_lanes {
    static constexpr int lanes = 32, warp = 32;

    FASTMOE_HOST_DEVICE int lane() const noexcept
    {
#if defined(__CUDA_ARCH__)
        return static_cast<int>(threadIdx.x) % warp;
#else
        return 0;
#endif
    }
    FASTMOE_HOST_DEVICE void sync() const noexcept
    {
#if defined(__CUDA_ARCH__)
        __syncwarp();
#endif
    }
    template <class T>
    FASTMOE_HOST_DEVICE T from(const T& value, [[maybe_unused]] int other) const noexcept
    {
#if defined(__CUDA_ARCH__)
        if constexpr (std::is_arithmetic_v<T> && sizeof(T) >= 4) {
            return __shfl_sync(0xffffffffu, value, other);
        } else {
            static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 32);
            constexpr int words = (sizeof(T) + 3) / 4;
            unsigned raw[words] = {};
            std::memcpy(raw, &value, sizeof(T));
            for (int w = 0; w < words; ++w) raw[w] = __shfl_sync(0xffffffffu, raw[w], other);
            T out;
            std::memcpy(static_cast<void*>(&out), raw, sizeof(T));
            return out;
        }
#else
        return value;
#endif
    }
};

/// The lanes of a block of 256: warps leave their totals in shared memory.
struct block_lanes : warp_lanes {
    static constexpr int lanes = 256;
    static constexpr int64_t slot_bytes = 2 * (lanes / warp) * 32;
    std::byte* slots; // (slot_bytes)

    FASTMOE_HOST_DEVICE explicit block_lanes(std::byte* s) noexcept : slots(s) {}
    FASTMOE_HOST_DEVICE int lane() const noexcept
    {
#if defined(__CUDA_ARCH__)
        return static_cast<int>(threadIdx.x);
#else
        return 0;
#endif
    }
    FASTMOE_HOST_DEVICE void sync() const noexcept
    {
#if defined(__CUDA_ARCH__)
        __syncthreads();
#endif
    }
    template <class T>
    FASTMOE_HOST_DEVICE T* slot(int set, int w) const noexcept
    {
        return reinterpret_cast<T*>(slots + set * (slot_bytes / 2)) + w;
    }
};

/// Four elements a thread, a block apart: what a warp touches at one time is contiguous.
template <class F>
__global__ void __launch_bounds__(256) run_elements(const __grid_constant__ F f, const int64_t n)
{
    constexpr int each = 4, block = 256;
    for (int64_t base = int64_t{blockIdx.x} * (each * block); base < n; base += int64_t{gridDim.x} * (each * block))
        for (int j = 0; j < each; ++j) {
            const int64_t i = base + j * block + threadIdx.x;
            if (i < n) f(i);
        }
}

/// A warp a row; blockDim.x / 32 rows a block at a time.
template <class F>
__global__ void __launch_bounds__(256) run_warp_rows(const __grid_constant__ F f, const int64_t n, const int64_t scratch_bytes)
{
    extern __shared__ __align__(128) unsigned char fastmoe_shared[];
    const int64_t teams = blockDim.x / 32, own = threadIdx.x / 32;
    auto* scratch = reinterpret_cast<std::byte*>(fastmoe_shared) + own * scratch_bytes;
    for (int64_t row = int64_t{blockIdx.x} * teams + own; row < n; row += int64_t{gridDim.x} * teams) {
        wide_team<warp_lanes> team({}, scratch);
        f(team, row);
        team.sync(); // before scratch is the next row's
    }
}

/// A block a row.
template <class F>
__global__ void __launch_bounds__(256) run_block_rows(const __grid_constant__ F f, const int64_t n)
{
    extern __shared__ __align__(128) unsigned char fastmoe_shared[];
    auto* shared = reinterpret_cast<std::byte*>(fastmoe_shared);
    for (int64_t row = blockIdx.x; row < n; row += gridDim.x) {
        wide_team<block_lanes> team(block_lanes(shared), shared + block_lanes::slot_bytes);
        f(team, row);
        team.sync();
    }
}

} // namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI
