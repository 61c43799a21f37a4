// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// An executor whose loops are kernels and whose team is a warp: what makes nvcc compile a functor, and all that it calls,
/// for a device. It is compiled and never run: it has no memory to give and waits for nothing.
#pragma once

#include <cstddef>

#include <fastmoe/exec/executor.hpp>

namespace support {

/// A team of 32 lanes; see fastmoe::single_lane_team for the contract of each member.
class warp_team {
public:
    __device__ explicit warp_team(std::byte* scratch) : scratch_(scratch) {}

    FASTMOE_HOST_DEVICE static constexpr std::int64_t lanes() noexcept { return 32; }
    FASTMOE_HOST_DEVICE std::int64_t lane() const noexcept
    {
#if defined(__CUDA_ARCH__)
        return threadIdx.x;
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

    template <class F>
    FASTMOE_HOST_DEVICE void for_each(std::int64_t n, F f) const
    {
        for (std::int64_t i = lane(); i < n; i += lanes()) f(i);
    }

    template <class T, class Op, class F>
    FASTMOE_HOST_DEVICE T reduce(std::int64_t n, T init, Op op, F f) const
    {
        T part = init;
        for (std::int64_t i = lane(); i < n; i += lanes()) part = op(part, f(i));
        for (int distance = 16; distance > 0; distance /= 2) part = op(part, from_lane(part, lane() ^ distance));
        return part;
    }

    template <class T, class Op, class F, class Out>
    FASTMOE_HOST_DEVICE T scan(std::int64_t n, T init, Op op, F f, Out out) const
    {
        T total = init;
        for (std::int64_t base = 0; base < n; base += lanes()) {
            const std::int64_t mine = base + lane();
            const T value = mine < n ? static_cast<T>(f(mine)) : init;
            for (std::int64_t other = 0; other < lanes(); ++other) {
                if (other == lane() && mine < n) out(mine, total);
                total = op(total, from_lane(value, other));
            }
        }
        return total;
    }

    template <class T>
    FASTMOE_HOST_DEVICE T* scratch(std::int64_t n) noexcept
    {
        auto* out = reinterpret_cast<T*>(scratch_);
        scratch_ += (n * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64;
        return out;
    }

private:
    template <class T>
    FASTMOE_HOST_DEVICE static T from_lane(T value, std::int64_t lane)
    {
#if defined(__CUDA_ARCH__)
        return __shfl_sync(0xffffffffu, value, static_cast<int>(lane));
#else
        (void)lane;
        return value;
#endif
    }

    std::byte* scratch_;
};

template <class F>
__global__ void elements_kernel(F f, std::int64_t n)
{
    const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) f(i);
}

template <class F>
__global__ void rows_kernel(F f)
{
    extern __shared__ std::byte scratch[];
    warp_team team(scratch);
    f(team, static_cast<std::int64_t>(blockIdx.x));
}

class compile_only {
public:
    void* allocate(std::int64_t) { return nullptr; }
    void deallocate(void*, std::int64_t) noexcept {}

    template <class F>
    void for_each(std::int64_t n, const F& f)
    {
        elements_kernel<<<static_cast<unsigned>((n + 255) / 256), 256>>>(f, n);
    }
    template <class F>
    void for_each_row(std::int64_t n, const F& f, fastmoe::row_hint hint)
    {
        rows_kernel<<<static_cast<unsigned>(n), 32, static_cast<std::size_t>(hint.scratch_bytes)>>>(f);
    }

    fastmoe::fault_recorder faults() noexcept { return {nullptr}; }
    void deliver_faults() {}
    void synchronize() {}
};

static_assert(fastmoe::executor<compile_only>);

} // namespace support
