// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How the lanes of a warp and of a block meet, and the kernels that call functors. Part of cuda_executor.cuh.
#pragma once

#include <cstddef>
#include <cstring>
#include <type_traits>

#include <cuda_runtime.h>

#include <fastmoe/cuda/kernel_order.cuh>
#include <fastmoe/exec/wide_team.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI {

/// The lanes of a warp or of a block, by their number: one kernel serves both. Values go through shuffles within a warp and
/// through shared memory between warps. Members are host-device, as all that functors touch, and do nothing on the host,
/// where no such lanes are.
struct device_lanes {
    static constexpr int warp = 32, most = 256;
    static constexpr int64_t slot_bytes = 2 * (most / warp) * 32; ///< what teams of several warps need
    int count;        // a power of two, from warp to most
    std::byte* slots; // (slot_bytes)

    FASTMOE_HOST_DEVICE int lanes() const noexcept { return count; }
    FASTMOE_HOST_DEVICE int lane() const noexcept
    {
#if defined(__CUDA_ARCH__)
        return static_cast<int>(threadIdx.x) & (count - 1);
#else
        return 0;
#endif
    }
    FASTMOE_HOST_DEVICE void sync() const noexcept
    {
#if defined(__CUDA_ARCH__)
        if (count > warp) __syncthreads();
        else __syncwarp();
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
    wait_for_kernels();
    for (int64_t base = int64_t{blockIdx.x} * (each * block); base < n; base += int64_t{gridDim.x} * (each * block))
        for (int j = 0; j < each; ++j) {
            const int64_t i = base + j * block + threadIdx.x;
            if (i < n) f(i);
        }
}

/// Blocks whose registers a multiprocessor has room for, if a functor says; otherwise the compiler trades them for spills.
template <class F>
inline constexpr int resident_blocks = 0;
template <class F>
    requires requires { F::resident; }
inline constexpr int resident_blocks<F> = F::resident;

/// A row a team: blockDim.x / lanes rows a block at a time. Shared memory: the slots, if a team has several warps, then
/// scratch_bytes a team.
template <class F>
__global__ void __launch_bounds__(256, resident_blocks<F>)
    run_rows(const __grid_constant__ F f, const int64_t n, const int lanes, const int64_t scratch_bytes)
{
    extern __shared__ __align__(128) unsigned char fastmoe_shared[];
    auto* shared = reinterpret_cast<std::byte*>(fastmoe_shared);
    const unsigned teams = blockDim.x / lanes, own = threadIdx.x / lanes;
    wait_for_kernels();
    std::byte* scratch = shared + (teams == 1 ? device_lanes::slot_bytes : own * scratch_bytes);
    for (int64_t row = int64_t{blockIdx.x} * teams + own; row < n; row += int64_t{gridDim.x} * teams) {
        wide_team<device_lanes> team({lanes, shared}, scratch);
        f(team, row);
        team.sync(); // before scratch is the next row's
    }
}

} // namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI
