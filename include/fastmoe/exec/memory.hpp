// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Memory that the signature shows: an arena over the caller's workspace, a memory resource, and an owning buffer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <type_traits>
#include <utility>

#include <fastmoe/core/error.hpp>
#include <fastmoe/core/tensor.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Every block that an arena hands out starts at a multiple of this many bytes.
inline constexpr int64_t memory_alignment = 256;

/// Where an executor takes memory from. Implement it to plug in a pool.
class memory_resource {
public:
    virtual ~memory_resource() = default;
    /// At least `bytes` bytes aligned to memory_alignment. @throws out_of_memory
    virtual void* allocate(int64_t bytes) = 0;
    virtual void deallocate(void* memory, int64_t bytes) noexcept = 0;
};

/// Aligned operator new.
class host_memory final : public memory_resource {
public:
    void* allocate(int64_t bytes) override
    {
        void* memory = ::operator new(static_cast<std::size_t>(bytes), alignment(), std::nothrow);
        expects<out_of_memory>(memory != nullptr, "allocation", bytes, "that many bytes to be free");
        return memory;
    }
    void deallocate(void* memory, int64_t) noexcept override { ::operator delete(memory, alignment()); }

private:
    static constexpr std::align_val_t alignment() noexcept { return std::align_val_t{memory_alignment}; }
};

/// Hands out consecutive blocks of a workspace. Without storage it only counts, so that the function that takes the
/// blocks is also the query for their size:
///
///     arena measure;                reserve(measure, shape);   // measure.bytes() is what the next line needs
///     arena memory(workspace);      auto parts = reserve(memory, shape);
class arena {
public:
    /// Counts; the views that it gives have extents and null pointers.
    arena() = default;

    /// @param storage  memory of the executor, aligned to memory_alignment       // (bytes)
    /// @throws invalid_argument if the storage is null though it has bytes, or misaligned
    explicit arena(vector_view<std::byte> storage) : storage_(storage.data_handle()), capacity_(storage.extent(0))
    {
        expects(storage_ != nullptr || capacity_ == 0, "workspace", "a null pointer", capacity_, " bytes of memory");
        expects(reinterpret_cast<std::uintptr_t>(storage_) % memory_alignment == 0, "workspace",
                static_cast<const void*>(storage_), "a pointer aligned to ", memory_alignment, " bytes");
        measuring_ = false;
    }

    /// @throws invalid_argument if count is negative, out_of_memory if the storage is too small
    template <class T>
    vector_view<T> vector(int64_t count)
    {
        return vector_view<T>(take<T>(count, 1), count);
    }

    template <class T>
    matrix_view<T> matrix(int64_t rows, int64_t cols)
    {
        return matrix_view<T>(take<T>(rows, cols), rows, cols);
    }

    /// True for an arena without storage: nothing that it hands out may be touched.
    bool measuring() const noexcept { return measuring_; }
    /// The most bytes that were taken at one time.
    int64_t bytes() const noexcept { return peak_; }
    /// Bytes taken now; rewind(used()) gives back what is taken afterwards, and a `scope` does so whatever happens.
    int64_t used() const noexcept { return used_; }
    void rewind(int64_t used) noexcept { used_ = used; }
    /// Bytes that can still be taken.
    int64_t available() const noexcept { return measuring_ ? INT64_MAX : capacity_ - used_; }

    /// Throws out_of_memory unless `bytes` more can be taken. Verbs ask before they write anything.
    void require(int64_t bytes, location where = location::current()) const
    {
        if (!measuring_ && available() < bytes)
            expects<out_of_memory>({false, where}, "workspace", capacity_, used_ + bytes, " bytes or more");
    }

    /// What is taken from the arena while this lives is given back when it ends, by an exception too; the memory of views
    /// from within may then be handed out again. Scopes end in the reverse order of their beginnings.
    ///
    ///     const arena::scope lent(scratch);
    class [[nodiscard]] scope {
    public:
        explicit scope(arena& memory) noexcept : memory_(memory), used_(memory.used()) {}
        scope(const scope&) = delete;
        scope& operator=(const scope&) = delete;
        ~scope() { memory_.rewind(used_); }

    private:
        arena& memory_;
        int64_t used_;
    };

private:
    template <class T>
    T* take(int64_t rows, int64_t cols)
    {
        static_assert(std::is_trivially_copyable_v<T>);
        expects(rows >= 0 && cols >= 0, "extent", rows < 0 ? rows : cols, "zero or more");
        const int64_t limit = INT64_MAX / 4 / static_cast<int64_t>(sizeof(T));
        expects(cols == 0 || rows <= limit / cols, "extent", rows, "a product with ", cols, " that fits in memory");
        const int64_t bytes = rows * cols * static_cast<int64_t>(sizeof(T));
        const int64_t padded = (bytes + memory_alignment - 1) / memory_alignment * memory_alignment;
        expects(padded <= INT64_MAX - used_, "extent", rows, "blocks whose sum fits in memory");
        require(padded);
        T* out = measuring_ ? nullptr : reinterpret_cast<T*>(storage_ + used_);
        used_ += padded;
        peak_ = used_ > peak_ ? used_ : peak_;
        return out;
    }

    std::byte* storage_ = nullptr;
    int64_t capacity_ = 0, used_ = 0, peak_ = 0;
    bool measuring_ = true;
};

/// Memory of an executor that frees itself. Movable; the executor must outlive it. Elements start uninitialized.
template <class T, class Executor>
class buffer {
public:
    buffer() = default;
    /// @throws invalid_argument if count is negative, out_of_memory
    buffer(Executor& ex, int64_t count) : executor_(&ex), count_(count)
    {
        static_assert(std::is_trivially_copyable_v<T>);
        expects(count >= 0 && count <= INT64_MAX / 4 / static_cast<int64_t>(sizeof(T)), "buffer size", count,
                "a number of elements from 0 on that fits in memory");
        if (count > 0) data_ = static_cast<T*>(ex.allocate(count * static_cast<int64_t>(sizeof(T))));
    }
    buffer(buffer&& other) noexcept
        : executor_(other.executor_), data_(std::exchange(other.data_, nullptr)), count_(std::exchange(other.count_, 0))
    {
    }
    buffer& operator=(buffer&& other) noexcept
    {
        std::swap(executor_, other.executor_);
        std::swap(data_, other.data_);
        std::swap(count_, other.count_);
        return *this;
    }
    ~buffer()
    {
        if (data_) executor_->deallocate(data_, count_ * static_cast<int64_t>(sizeof(T)));
    }

    /// Never gives the memory back: somebody may still write to it.
    void abandon() noexcept
    {
        data_ = nullptr;
        count_ = 0;
    }

    T* data() noexcept { return data_; }
    const T* data() const noexcept { return data_; }
    int64_t size() const noexcept { return count_; }
    vector_view<T> view() noexcept { return vector_view<T>(data_, count_); }
    vector_view<const T> view() const noexcept { return vector_view<const T>(data_, count_); }
    /// The first rows * cols elements as a matrix. @throws invalid_argument if there are fewer
    matrix_view<T> matrix(int64_t rows, int64_t cols)
    {
        expects(rows >= 0 && cols >= 0 && (cols == 0 || rows <= count_ / cols), "rows", rows, "rows * ", cols,
                " of at most ", count_, " elements");
        return matrix_view<T>(data_, rows, cols);
    }

private:
    Executor* executor_ = nullptr;
    T* data_ = nullptr;
    int64_t count_ = 0;
};

/// call(), whose messages to other ranks may begin and end in these buffers: nobody else ever gets their memory if some are
/// still on their way when it ends (comm_error::messages_pending).
template <class Call, class... Buffers>
decltype(auto) call_on(const Call& call, Buffers&... buffers)
{
#if defined(__cpp_exceptions)
    try {
        return call();
    } catch (const comm_error& e) {
        if (e.messages_pending) (buffers.abandon(), ...);
        throw;
    }
#else
    (static_cast<void>(buffers), ...);
    return call();
#endif
}

} // namespace fastmoe::inline FASTMOE_ABI
