// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Every allocation of the program is a piece of managed memory of its own, so that a kernel that leaves it is seen.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <new>

namespace {

void* take(std::size_t bytes, std::size_t align)
{
    void* p = nullptr;
    if (align > 256) return std::aligned_alloc(align, (bytes + align - 1) / align * align); // not for kernels
    (void)cudaMallocManaged(&p, bytes, cudaMemAttachGlobal);                                // there is memory after an error, too
    return p;
}
void* take_or_throw(std::size_t bytes, std::size_t align)
{
    if (void* p = take(bytes, align)) return p;
    throw std::bad_alloc();
}

} // namespace

void* operator new(std::size_t bytes) { return take_or_throw(bytes, 16); }
void* operator new(std::size_t bytes, std::align_val_t align) { return take_or_throw(bytes, static_cast<std::size_t>(align)); }
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept { return take(bytes, 16); }
void* operator new(std::size_t bytes, std::align_val_t align, const std::nothrow_t&) noexcept
{
    return take(bytes, static_cast<std::size_t>(align));
}
void operator delete(void* p) noexcept { (void)cudaFree(p); }
void operator delete(void* p, std::size_t) noexcept { (void)cudaFree(p); }
void operator delete(void* p, std::align_val_t) noexcept { (void)cudaFree(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { (void)cudaFree(p); }
void operator delete(void* p, std::align_val_t, const std::nothrow_t&) noexcept { (void)cudaFree(p); }
void operator delete(void* p, const std::nothrow_t&) noexcept { (void)cudaFree(p); }
