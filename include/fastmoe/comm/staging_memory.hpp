// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The host memory that a `staged` communicator's data pass through: who uses it, and what becomes of it when a message may
/// still be on its way there. Part of staged.hpp.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>

#include <fastmoe/core/error.hpp>
#include <fastmoe/core/tensor.hpp>
#include <fastmoe/exec/memory.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// Host memory that data pass through, lent by the caller or taken from a resource; and who is using it.
class staging_memory {
public:
    staging_memory(vector_view<std::byte> lent, int ranks) : data_(lent.data_handle()), bytes_(lent.extent(0)) { verify(ranks); }
    staging_memory(int64_t bytes, memory_resource& from, int ranks) : bytes_(bytes)
    {
        verify_size(ranks);
        data_ = static_cast<std::byte*>(from.allocate(bytes));
        from_ = &from;
    }
    staging_memory(const staging_memory&) = delete;
    staging_memory& operator=(const staging_memory&) = delete;
    ~staging_memory()
    {
        if (from_ && !lost_) from_->deallocate(data_, bytes_);
    }

    /// A block of one element for each rank and one more, of the widest type; or one to send and one to get from each.
    static constexpr int64_t least_bytes(int ranks) noexcept { return 16 * static_cast<int64_t>(ranks); }

    int64_t bytes() const noexcept { return bytes_; }
    template <class T>
    T* at(int64_t element) const noexcept
    {
        return reinterpret_cast<T*>(data_) + element;
    }

    /// A copy may still be under way, or, if it is `pending`, a message: nobody else may get this memory.
    void lose(bool pending) noexcept
    {
        lost_ = true;
        pending_ = pending_ || pending;
    }
    /// Called before the memory is used. What messages may still be written to is left for another of the same size.
    /// @throws comm_error if it was lent, out_of_memory
    void renew()
    {
        if (!pending_) return;
        if (!from_)
            raise<comm_error>("the staging memory may still be written to, by a rank that another communicator has lost");
        data_ = static_cast<std::byte*>(from_->allocate(bytes_));
        lost_ = pending_ = false;
    }

    /// The memory is a verb's while this lives.
    class [[nodiscard]] use {
    public:
        /// @throws comm_error if another call uses it
        use(staging_memory& memory, const char* verb) : memory_(memory)
        {
            const char* other = nullptr;
            if (!memory.verb_.compare_exchange_strong(other, verb))
                raise<comm_error>(std::string(verb) + ": the staging memory is in use by " + other +
                                  "; expected one call at a time");
        }
        use(const use&) = delete;
        use& operator=(const use&) = delete;
        ~use() { memory_.verb_ = nullptr; }

    private:
        staging_memory& memory_;
    };

private:
    void verify_size(int ranks) const
    {
        expects(bytes_ >= least_bytes(ranks), "staging", bytes_, least_bytes(ranks), " bytes or more for ", ranks, " ranks");
    }
    void verify(int ranks) const
    {
        verify_size(ranks);
        expects(reinterpret_cast<std::uintptr_t>(data_) % memory_alignment == 0, "staging", static_cast<const void*>(data_),
                "a pointer aligned to ", memory_alignment, " bytes");
    }

    std::byte* data_ = nullptr;
    int64_t bytes_;
    memory_resource* from_ = nullptr;
    bool lost_ = false, pending_ = false;
    std::atomic<const char*> verb_ = nullptr;
};

} // namespace fastmoe::inline FASTMOE_ABI::detail
