// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Every allocation of the program comes from support::managed_heap().
#include "managed_heap.hpp"

void* operator new(std::size_t size)
{
    if (void* memory = support::managed_heap().take(size, 16)) return memory;
    throw std::bad_alloc();
}
void* operator new(std::size_t size, std::align_val_t alignment)
{
    if (void* memory = support::managed_heap().take(size, static_cast<std::size_t>(alignment))) return memory;
    throw std::bad_alloc();
}
void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return support::managed_heap().take(size, 16); }
void* operator new(std::size_t size, std::align_val_t alignment, const std::nothrow_t&) noexcept
{
    return support::managed_heap().take(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { support::managed_heap().give(memory); }
void operator delete(void* memory, std::size_t) noexcept { support::managed_heap().give(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { support::managed_heap().give(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { support::managed_heap().give(memory); }
void operator delete(void* memory, std::align_val_t, const std::nothrow_t&) noexcept { support::managed_heap().give(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { support::managed_heap().give(memory); }
