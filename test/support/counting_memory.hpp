// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A memory resource that knows how much of it is taken.
#pragma once

#include <fastmoe/exec/memory.hpp>

namespace support {

class counting_memory final : public fastmoe::memory_resource {
public:
    void* allocate(std::int64_t bytes) override
    {
        live_ += bytes;
        peak_ = live_ > peak_ ? live_ : peak_;
        ++calls_;
        return heap_.allocate(bytes);
    }
    void deallocate(void* memory, std::int64_t bytes) noexcept override
    {
        live_ -= bytes;
        heap_.deallocate(memory, bytes);
    }

    std::int64_t live() const { return live_; }   ///< bytes that are taken now
    std::int64_t peak() const { return peak_; }   ///< the most that were since reset()
    std::int64_t calls() const { return calls_; } ///< allocations since reset()
    void reset() { peak_ = live_, calls_ = 0; }

private:
    fastmoe::host_memory heap_;
    std::int64_t live_ = 0, peak_ = 0, calls_ = 0;
};

} // namespace support
