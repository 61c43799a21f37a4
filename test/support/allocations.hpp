// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Counts every operator new of the program. It replaces the global operators: include it in one file of an executable.
///
///     const support::allocations before;   layer.infer(...);   CHECK(before.since() == 0);
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace support {

inline std::atomic<std::int64_t> allocation_count{0};

/// A point in time; since() is the number of allocations after it, by any thread.
struct allocations {
    std::int64_t start = allocation_count.load();
    std::int64_t since() const { return allocation_count.load() - start; }
};

inline void* counted_allocation(std::size_t bytes, std::size_t align) noexcept
{
    ++allocation_count;
    const std::size_t rounded = (bytes + align - 1) / align * align;
    return align > alignof(std::max_align_t) ? std::aligned_alloc(align, rounded ? rounded : align)
                                             : std::malloc(bytes ? bytes : 1);
}

inline void* counted_or_throw(std::size_t bytes, std::size_t align)
{
    void* out = counted_allocation(bytes, align);
    if (!out) throw std::bad_alloc();
    return out;
}

} // namespace support

// All forms, since a sanitizer brings its own for those that are left out. Not inlined: the compiler would see memory
// of operator new go to free().
#define FASTMOE_COUNTED [[gnu::noinline]]
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
