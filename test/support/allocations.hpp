// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Counts every operator new of the program and, where the C library allows, every call of malloc and its kin, from the
/// program and from the libraries that it uses. It replaces them: include it in one file of an executable.
///
///     const support::allocations before;   layer.infer(...);   CHECK(before.since() == 0);   CHECK(before.mallocs() == 0);
#pragma once

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "support/sanitizers.hpp"

// glibc names its own allocator, so that one which counts can stand before it. Sanitizers stand there themselves.
#if defined(__GLIBC__) && !FASTMOE_UNDER_ASAN && !FASTMOE_UNDER_TSAN
#define FASTMOE_COUNTS_MALLOC 1
#endif

namespace support {

#if defined(FASTMOE_COUNTS_MALLOC)
inline constexpr bool counts_malloc = true;
#else
inline constexpr bool counts_malloc = false;
#endif

inline std::atomic<std::int64_t> allocation_count{0}, malloc_count{0}, malloc_largest{0};

/// A point in time; since() is the number of calls of operator new after it, by any thread, and mallocs() that of malloc,
/// calloc, realloc and the aligned ones, without those that operator new makes.
struct allocations {
    std::int64_t start = allocation_count.load(), c_start = malloc_count.load();
    std::int64_t since() const { return allocation_count.load() - start; }
    std::int64_t mallocs() const { return malloc_count.load() - c_start; }
};

inline void count_malloc(std::size_t bytes) noexcept
{
    ++malloc_count;
    const auto n = static_cast<std::int64_t>(bytes);
    for (std::int64_t seen = malloc_largest.load(); n > seen && !malloc_largest.compare_exchange_weak(seen, n);) {}
}

} // namespace support

// The bodies are not inlined: the compiler would see memory of operator new go to free().
#define FASTMOE_COUNTED [[gnu::noinline]]

#if defined(FASTMOE_COUNTS_MALLOC)
extern "C" {
void* __libc_malloc(std::size_t);
void* __libc_calloc(std::size_t, std::size_t);
void* __libc_realloc(void*, std::size_t);
void* __libc_memalign(std::size_t, std::size_t);

FASTMOE_COUNTED void* malloc(std::size_t n) noexcept
{
    support::count_malloc(n);
    return __libc_malloc(n);
}
FASTMOE_COUNTED void* calloc(std::size_t n, std::size_t size) noexcept
{
    support::count_malloc(n * size);
    return __libc_calloc(n, size);
}
FASTMOE_COUNTED void* realloc(void* p, std::size_t n) noexcept
{
    support::count_malloc(n);
    return __libc_realloc(p, n);
}
FASTMOE_COUNTED void* memalign(std::size_t align, std::size_t n) noexcept
{
    support::count_malloc(n);
    return __libc_memalign(align, n);
}
FASTMOE_COUNTED void* aligned_alloc(std::size_t align, std::size_t n) noexcept
{
    support::count_malloc(n);
    return __libc_memalign(align, n);
}
FASTMOE_COUNTED int posix_memalign(void** out, std::size_t align, std::size_t n) noexcept
{
    support::count_malloc(n);
    void* p = __libc_memalign(align, n);
    if (p) *out = p;
    return p ? 0 : ENOMEM;
}
}
#endif

namespace support {

inline void* counted_allocation(std::size_t bytes, std::size_t align) noexcept
{
    ++allocation_count;
    const std::size_t rounded = (bytes + align - 1) / align * align, least = rounded ? rounded : align;
#if defined(FASTMOE_COUNTS_MALLOC)
    return align > alignof(std::max_align_t) ? __libc_memalign(align, least) : __libc_malloc(least);
#else
    return align > alignof(std::max_align_t) ? std::aligned_alloc(align, least) : std::malloc(least);
#endif
}

inline void* counted_or_throw(std::size_t bytes, std::size_t align)
{
    void* out = counted_allocation(bytes, align);
    if (!out) throw std::bad_alloc();
    return out;
}

} // namespace support

// All forms, since a sanitizer brings its own for those that are left out.
FASTMOE_COUNTED void* operator new(std::size_t n) { return support::counted_or_throw(n, 1); }
FASTMOE_COUNTED void* operator new[](std::size_t n) { return support::counted_or_throw(n, 1); }
FASTMOE_COUNTED void* operator new(std::size_t n, std::align_val_t a)
{
    return support::counted_or_throw(n, static_cast<std::size_t>(a));
}
FASTMOE_COUNTED void* operator new[](std::size_t n, std::align_val_t a)
{
    return support::counted_or_throw(n, static_cast<std::size_t>(a));
}
FASTMOE_COUNTED void* operator new(std::size_t n, const std::nothrow_t&) noexcept
{
    return support::counted_allocation(n, 1);
}
FASTMOE_COUNTED void* operator new[](std::size_t n, const std::nothrow_t&) noexcept
{
    return support::counted_allocation(n, 1);
}
FASTMOE_COUNTED void* operator new(std::size_t n, std::align_val_t a, const std::nothrow_t&) noexcept
{
    return support::counted_allocation(n, static_cast<std::size_t>(a));
}
FASTMOE_COUNTED void* operator new[](std::size_t n, std::align_val_t a, const std::nothrow_t&) noexcept
{
    return support::counted_allocation(n, static_cast<std::size_t>(a));
}
FASTMOE_COUNTED void operator delete(void* p) noexcept { std::free(p); }
FASTMOE_COUNTED void operator delete[](void* p) noexcept { std::free(p); }
FASTMOE_COUNTED void operator delete(void* p, std::size_t) noexcept { std::free(p); }
FASTMOE_COUNTED void operator delete[](void* p, std::size_t) noexcept { std::free(p); }
FASTMOE_COUNTED void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
FASTMOE_COUNTED void operator delete[](void* p, std::align_val_t) noexcept { std::free(p); }
FASTMOE_COUNTED void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
FASTMOE_COUNTED void operator delete[](void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }
#undef FASTMOE_COUNTED
