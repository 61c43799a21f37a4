// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A heap over one region that somebody hands it, for programs whose every allocation shall lie there: the C library's until
/// it has the region, and when the region is full.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdlib>
#include <mutex>
#include <new>

namespace support {

class region_heap {
public:
    /// The first region stays.
    void start(void* region, std::size_t bytes)
    {
        const std::lock_guard lock(mutex_);
        if (region_) return;
        region_ = static_cast<char*>(region);
        bytes_ = bytes;
    }

    /// Null if there is none. Blocks are powers of two, so that what is given back fits others.
    void* take(std::size_t size, std::size_t alignment)
    {
        const std::size_t room = alignment < least ? least : alignment; // before the memory, for the note
        if (size > SIZE_MAX / 4 - room) return nullptr;
        const std::size_t block = std::bit_ceil(size + room);
        char* raw = nullptr;
        bool ours = true;
        {
            const std::lock_guard lock(mutex_);
            free_block*& list = free_[std::bit_width(block)];
            if (list) {
                raw = reinterpret_cast<char*>(list);
                list = list->next;
            } else if (const std::size_t at = (used_ + block - 1) / block * block; region_ && at + block <= bytes_) {
                raw = region_ + at;
                used_ = at + block;
            }
        }
        if (!raw) {
            ours = false;
            raw = static_cast<char*>(std::aligned_alloc(room, (size + room + room - 1) / room * room));
        }
        if (!raw) return nullptr;
        new (raw + room - sizeof(note)) note{raw, ours ? block : 0};
        return raw + room;
    }
    void give(void* memory) noexcept
    {
        if (!memory) return;
        const note n = *reinterpret_cast<note*>(static_cast<char*>(memory) - sizeof(note));
        if (n.block == 0) return std::free(n.raw);
        const std::lock_guard lock(mutex_);
        free_[std::bit_width(n.block)] = new (n.raw) free_block{free_[std::bit_width(n.block)]};
    }

private:
    struct note {
        void* raw;
        std::size_t block; ///< 0: of the C library
    };
    struct free_block {
        free_block* next;
    };
    static constexpr std::size_t least = 64;

    std::mutex mutex_;
    char* region_ = nullptr;
    std::size_t bytes_ = 0, used_ = 0;
    free_block* free_[65] = {};
};

/// The heap of a program that is linked with managed_heap.cpp. Never destroyed: what it gave comes back until the very end.
inline region_heap& managed_heap()
{
    alignas(region_heap) static unsigned char room[sizeof(region_heap)];
    static region_heap* heap = new (room) region_heap;
    return *heap;
}

} // namespace support
