// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The CUDA runtime of fake_cuda.hpp: one device without tensor cores, one stream for all.
#include "fake_cuda.hpp"

#include <cstdlib>
#include <cstring>

#include <fastmoe/cuda/cuda_check.cuh>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI {
unsigned char fastmoe_shared[1]; // of kernels that are never called
}

namespace support {

int fake_cuda::enter(const char* function)
{
    ++calls[function];
    const auto found = failures.find(function);
    if (found == failures.end() || --found->second.nth > 0) return 0;
    const int status = found->second.status;
    failures.erase(found);
    return status;
}

void fake_cuda::run()
{
    while (!queue.empty()) {
        const auto work = std::move(queue.front());
        queue.pop_front();
        work();
    }
}

bool fake_cuda::is_in(const std::map<const void*, std::size_t>& blocks, const void* p)
{
    auto after = blocks.upper_bound(p);
    if (after == blocks.begin()) return false;
    --after;
    return static_cast<const char*>(p) < static_cast<const char*>(after->first) + after->second;
}

namespace {

fake_cuda& fake() { return fake_cuda::of_program(); }

/// Memory of the device is never taken from, or given back to, the host's heap by accident.
void* take(std::size_t bytes, std::map<const void*, std::size_t>& blocks)
{
    void* out = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
    std::memset(out, 0xff, bytes);
    blocks[out] = bytes;
    return out;
}

} // namespace
} // namespace support

using support::fake;

#define FASTMOE_ENTER(name)                                                                                           \
    const std::lock_guard lock(fake().mutex);                                                                         \
    if (const int status = fake().enter(name)) return static_cast<cudaError_t>(status)

extern "C" {

cudaError_t cudaGetDevice(int* device)
{
    FASTMOE_ENTER("cudaGetDevice");
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int device)
{
    FASTMOE_ENTER("cudaSetDevice");
    return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int)
{
    FASTMOE_ENTER("cudaDeviceGetAttribute");
    *value = what == cudaDevAttrComputeCapabilityMajor ? 7 : 4;
    return cudaSuccess;
}
/// A device of 7.0 is not asked for tensor maps.
cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long, cudaDriverEntryPointQueryResult* found)
{
    *function = nullptr;
    *found = cudaDriverEntryPointSymbolNotFound;
    return cudaErrorNotSupported;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorName(cudaError_t status) { return status == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorFake"; }
const char* cudaGetErrorString(cudaError_t status) { return status == cudaErrorMemoryAllocation ? "out of memory" : "as told"; }

cudaError_t cudaMallocHost(void** memory, size_t bytes)
{
    FASTMOE_ENTER("cudaMallocHost");
    *memory = support::take(bytes, fake().pinned);
    return cudaSuccess;
}
cudaError_t cudaFreeHost(void* memory)
{
    FASTMOE_ENTER("cudaFreeHost");
    fake().run(); // as the real one waits
    fake().pinned.erase(memory);
    std::free(memory);
    return cudaSuccess;
}
cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*)
{
    FASTMOE_ENTER("cudaMemPoolCreate");
    static char place;
    *pool = reinterpret_cast<cudaMemPool_t>(&place);
    return cudaSuccess;
}
cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
cudaError_t cudaMemPoolDestroy(cudaMemPool_t)
{
    FASTMOE_ENTER("cudaMemPoolDestroy");
    fake().run();
    return cudaSuccess;
}
cudaError_t cudaMallocFromPoolAsync(void** memory, size_t bytes, cudaMemPool_t, cudaStream_t)
{
    FASTMOE_ENTER("cudaMallocFromPoolAsync");
    *memory = support::take(bytes, fake().device);
    return cudaSuccess;
}
cudaError_t cudaFreeAsync(void* memory, cudaStream_t)
{
    FASTMOE_ENTER("cudaFreeAsync");
    fake().enqueue([memory] {
        fake().device.erase(memory);
        std::free(memory);
    });
    return cudaSuccess;
}

/// Memory that is not pinned has been read when the call returns; all other is read in the order of the stream.
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t)
{
    FASTMOE_ENTER("cudaMemcpyAsync");
    const auto& c = fake();
    if (c.is_in(c.device, to) && !c.is_in(c.device, from) && !c.is_in(c.pinned, from)) {
        std::vector<char> staged(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
        fake().enqueue([to, staged] { std::memcpy(to, staged.data(), staged.size()); });
    } else {
        fake().enqueue([to, from, bytes] { std::memcpy(to, from, bytes); });
    }
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t)
{
    FASTMOE_ENTER("cudaMemsetAsync");
    fake().enqueue([=] { std::memset(memory, value, bytes); });
    return cudaSuccess;
}
cudaError_t cudaMemset2DAsync(void* memory, size_t pitch, int value, size_t width, size_t height, cudaStream_t)
{
    FASTMOE_ENTER("cudaMemset2DAsync");
    if (height > 1 && pitch < width) return cudaErrorInvalidPitchValue;
    fake().enqueue([=] {
        for (size_t i = 0; i < height; ++i) std::memset(static_cast<char*>(memory) + i * pitch, value, width);
    });
    return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t)
{
    FASTMOE_ENTER("cudaStreamSynchronize");
    if (fake().capturing) return cudaErrorStreamCaptureUnsupported;
    fake().run();
    return cudaSuccess;
}
/// Events are all of them everything that was queued.
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned)
{
    FASTMOE_ENTER("cudaEventCreateWithFlags");
    *event = reinterpret_cast<cudaEvent_t>(new int(0));
    return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t)
{
    FASTMOE_ENTER("cudaEventRecord");
    return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t)
{
    FASTMOE_ENTER("cudaEventSynchronize");
    fake().run();
    return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event)
{
    delete reinterpret_cast<int*>(event);
    return cudaSuccess;
}

} // extern "C"
