// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Clusters of the GPU: the instructions behind exec/cluster.hpp, and tensor maps. Part of cuda_executor.cuh.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/cuda/cuda_check.cuh>
#include <fastmoe/cuda/kernel_order.cuh>
#include <fastmoe/cuda/warpgroup_product.cuh>
#include <fastmoe/exec/cluster.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI {

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FASTMOE_HAS_CLUSTERS 1
#else
#define FASTMOE_HAS_CLUSTERS 0
#endif

/// A thread's view of its CUDA block, on sm_90a. Members do nothing elsewhere.
/// @tparam size  blocks of a cluster
template <unsigned size>
struct device_cluster {
    std::byte* memory;

    FASTMOE_HOST_DEVICE int thread() const noexcept
    {
#if defined(__CUDA_ARCH__)
        return static_cast<int>(threadIdx.x);
#else
        return 0;
#endif
    }
    /// The same for all threads of a warp, and known to be so.
    FASTMOE_HOST_DEVICE int warpgroup() const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / warpgroup_threads, 0);
#else
        return 0;
#endif
    }
    FASTMOE_HOST_DEVICE int64_t cluster() const noexcept { return index(); }
    FASTMOE_HOST_DEVICE int64_t clusters() const noexcept { return count(); }
    FASTMOE_HOST_DEVICE int rank() const noexcept { return rank_of(); }
    FASTMOE_HOST_DEVICE std::byte* shared() const noexcept { return memory; }
    FASTMOE_HOST_DEVICE std::uint32_t address([[maybe_unused]] const void* shared) const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        return static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
#else
        return 0;
#endif
    }

    FASTMOE_HOST_DEVICE void init([[maybe_unused]] barrier_word* w, [[maybe_unused]] int arrivals) const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(w)), "r"(arrivals) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    }
    FASTMOE_HOST_DEVICE void sync_cluster() const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        __syncwarp();
        if constexpr (size == 1) __syncthreads();
        else asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
    }
    /// Of the block's scope alone: what it tells others is that products are done with their operands, which wait_products()
    /// has seen to. A release to the cluster would wait for all of the thread's stores.
    FASTMOE_HOST_DEVICE void arrive([[maybe_unused]] barrier_word* w, [[maybe_unused]] int rank) const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        if constexpr (size == 1)
            asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(address(w)) : "memory");
        else
            asm volatile("{\n\t.reg .b32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
                         "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(address(w)),
                         "r"(rank)
                         : "memory");
#endif
    }
    FASTMOE_HOST_DEVICE void expect([[maybe_unused]] barrier_word* w, [[maybe_unused]] int bytes) const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(address(w)), "r"(bytes) : "memory");
#endif
    }
    FASTMOE_HOST_DEVICE void wait([[maybe_unused]] barrier_word* w, [[maybe_unused]] unsigned parity) const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        asm volatile("{\n\t.reg .pred done;\n\tagain:\n\t"
                     "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t@!done bra again;\n\t}" ::"r"(address(w)),
                     "r"(parity)
                     : "memory");
#endif
    }
    FASTMOE_HOST_DEVICE void copy_line([[maybe_unused]] void* to, [[maybe_unused]] const void* from, [[maybe_unused]] int bytes) const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes) : "memory");
#endif
    }
    FASTMOE_HOST_DEVICE void arrive_with_lines([[maybe_unused]] barrier_word* w) const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(address(w)) : "memory");
#endif
    }
    FASTMOE_HOST_DEVICE void copy_box([[maybe_unused]] void* to, [[maybe_unused]] const CUtensorMap& map, [[maybe_unused]] barrier_word* w,
                                      [[maybe_unused]] int x, [[maybe_unused]] int y, [[maybe_unused]] int z,
                                      [[maybe_unused]] std::uint32_t ranks) const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        if (ranks == 0) {
            asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
                             address(to)),
                         "l"(&map), "r"(x), "r"(y), "r"(z), "r"(address(w))
                         : "memory");
        } else {
            asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], "
                         "[%1, {%2, %3, %4}], [%5], %6;" ::"r"(address(to)),
                         "l"(&map), "r"(x), "r"(y), "r"(z), "r"(address(w)), "h"(static_cast<std::uint16_t>(ranks))
                         : "memory");
        }
#endif
    }
    FASTMOE_HOST_DEVICE void show_lines() const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
    }

    FASTMOE_HOST_DEVICE void begin_products() const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
    }
    FASTMOE_HOST_DEVICE void commit_products() const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
    }
    template <int n>
    FASTMOE_HOST_DEVICE void wait_products() const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(n) : "memory");
#endif
    }
    template <class T, int n, lie a, lie b, bool adds = true>
    FASTMOE_HOST_DEVICE void multiply([[maybe_unused]] float (&c)[n / 2], [[maybe_unused]] std::uint64_t from_a,
                                      [[maybe_unused]] std::uint64_t from_b) const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        warpgroup_product<T, n, a == lie::wide, b == lie::wide>::template run<adds>(c, from_a, from_b);
#endif
    }

    template <int count>
    FASTMOE_HOST_DEVICE void hold([[maybe_unused]] float (&c)[count]) const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        FASTMOE_UNROLL
        for (int i = 0; i < count; ++i) asm volatile("" : "+f"(c[i])::"memory");
#endif
    }

    template <int n>
    FASTMOE_HOST_DEVICE void give_registers() const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(n));
#endif
    }
    template <int n>
    FASTMOE_HOST_DEVICE void take_registers() const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(n));
#endif
    }
    FASTMOE_HOST_DEVICE void sync_warp() const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        __syncwarp();
#endif
    }
    FASTMOE_HOST_DEVICE std::uint32_t exchange([[maybe_unused]] std::uint32_t v, [[maybe_unused]] int mask) const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        return __shfl_xor_sync(0xffffffffu, v, mask);
#else
        return 0;
#endif
    }
    FASTMOE_HOST_DEVICE std::uint32_t broadcast([[maybe_unused]] std::uint32_t v, [[maybe_unused]] int lane) const noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        return __shfl_sync(0xffffffffu, v, lane);
#else
        return 0;
#endif
    }

private:
    // Of the grid, not of the special registers for clusters: a kernel of one block a cluster is launched as any other.
    FASTMOE_HOST_DEVICE static std::uint32_t index() noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        return blockIdx.x / size;
#else
        return 0;
#endif
    }
    FASTMOE_HOST_DEVICE static std::uint32_t count() noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        return gridDim.x / size;
#else
        return 1;
#endif
    }
    FASTMOE_HOST_DEVICE static int rank_of() noexcept
    {
#if FASTMOE_HAS_CLUSTERS
        return static_cast<int>(blockIdx.x % size);
#else
        return 0;
#endif
    }
};

static_assert(cluster_block<device_cluster<2>, CUtensorMap>);

/// Code for anything but sm_90a is a kernel for one thread, by which has_clusters() knows it.
inline constexpr int clusterless_threads = 32;
template <class F>
__global__ void __launch_bounds__(FASTMOE_HAS_CLUSTERS ? cluster_block_threads : clusterless_threads, 1)
    run_clusters([[maybe_unused]] const __grid_constant__ F f)
{
#if FASTMOE_HAS_CLUSTERS
    extern __shared__ __align__(1024) unsigned char fastmoe_cluster_shared[];
    device_cluster<F::cluster> block{reinterpret_cast<std::byte*>(fastmoe_cluster_shared)};
    block.memory += (1024 - block.address(block.memory) % 1024) % 1024;
    wait_for_kernels();
    f(block);
#elif defined(__CUDA_ARCH__)
    __trap();
#endif
}

/// The driver's function that makes tensor maps: looked up once for an executor, since that takes longer than the call.
using tensor_map_encoder = CUresult(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                    const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
/// @throws cuda_error if the driver has none
inline tensor_map_encoder* find_tensor_map_encoder()
{
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    cuda_check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
               "cudaGetDriverEntryPointByVersion");
    expects<cuda_error>(found == cudaDriverEntryPointSuccess, "cuTensorMapEncodeTiled", static_cast<int>(found), "in the driver");
    return reinterpret_cast<tensor_map_encoder*>(entry);
}

/// @throws cuda_error if the driver refuses
inline CUtensorMap tensor_map(tensor_map_encoder* encode, const box_source& s)
{
    cuuint64_t extent[3], stride[2];
    for (int i = 0; i < 3; ++i) extent[i] = static_cast<cuuint64_t>(s.extent[i]);
    for (int i = 0; i < 2; ++i) stride[i] = static_cast<cuuint64_t>(s.stride[i]);
    const cuuint32_t box[3] = {static_cast<cuuint32_t>(s.box[0]), static_cast<cuuint32_t>(s.box[1]), 1}, every[3] = {1, 1, 1};
    CUtensorMap out; // aligned by its type
    const CUresult status =
        encode(&out, s.element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(s.data), extent,
               stride, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    expects<cuda_error>(status == CUDA_SUCCESS, "cuTensorMapEncodeTiled", static_cast<int>(status), "CUDA_SUCCESS for a matrix of ",
                        s.extent[0], " by ", s.extent[1]);
    return out;
}

#undef FASTMOE_HAS_CLUSTERS

} // namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI
