// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What communicators need to know of memory that the host cannot read: how to queue a copy out of it and into it, and how a
/// caller says that messages may start and end there.
#pragma once

#include <concepts>
#include <cstddef>

#include <fastmoe/comm/self.hpp>
#include <fastmoe/exec/executor.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Queues a copy between its memory and any that it reaches, the host's page-locked memory among it. An executor without
/// this copies by a loop, which must reach the host's memory as well.
template <class Executor>
concept queues_copies = requires(Executor& ex, void* to, const void* from, int64_t bytes) { ex.copy(to, from, bytes); };

/// An executor over memory of a device that the communicator is to send from and receive into where it lies:
///
///     fm::unstaged<fm::cuda_executor> direct(ex);      // a CUDA-aware MPI: ranks.reaches_devices()
///     ranks.all_gather(direct, sent, received);
///
/// It is for collectives that move and do not add. All else is the executor that it refers to, which must outlive it.
template <executor Executor>
class unstaged {
public:
    explicit unstaged(Executor& ex) noexcept : ex_(ex) {}

    Executor& underlying() const noexcept { return ex_; }

    void* allocate(int64_t bytes) { return ex_.allocate(bytes); }
    void deallocate(void* memory, int64_t bytes) noexcept { ex_.deallocate(memory, bytes); }
    template <class F>
    void for_each(int64_t n, const F& f)
    {
        ex_.for_each(n, f);
    }
    template <class F>
    void for_each_row(int64_t n, const F& f, row_hint hint)
    {
        ex_.for_each_row(n, f, hint);
    }
    fault_recorder faults() { return ex_.faults(); }
    void deliver_faults() { ex_.deliver_faults(); }
    void synchronize() { ex_.synchronize(); }
    void copy(void* to, const void* from, int64_t bytes)
        requires queues_copies<Executor>
    {
        ex_.copy(to, from, bytes);
    }

private:
    Executor& ex_;
};

/// A communicator over host memory that takes unstaged<Executor> as well, if what carries its messages can.
template <class C>
concept reaches_devices = requires(const C& c) {
    { c.reaches_devices() } -> std::convertible_to<bool>;
};

namespace detail {

template <class Executor>
inline constexpr bool is_unstaged = false;
template <class Executor>
inline constexpr bool is_unstaged<unstaged<Executor>> = true;

/// Queues a copy of `count` elements.
template <class T, class Executor>
void queue_copy(Executor& ex, const T* from, int64_t count, T* to)
{
    if (count <= 0 || from == to) return;
    if constexpr (queues_copies<Executor>) ex.copy(to, from, count * static_cast<int64_t>(sizeof(T)));
    else fastmoe::for_each(ex, count, copy_elements<T>{from, to});
}

/// Copies that are queued as one where they continue each other on both sides.
template <class T, class Executor>
class joined_copies {
public:
    explicit joined_copies(Executor& ex) noexcept : ex_(ex) {}

    void add(const T* from, int64_t count, T* to)
    {
        if (count <= 0) return;
        if (count_ > 0 && from == from_ + count_ && to == to_ + count_) {
            count_ += count;
            return;
        }
        flush();
        from_ = from, to_ = to, count_ = count;
    }
    void flush()
    {
        queue_copy(ex_, from_, count_, to_);
        count_ = 0;
    }

private:
    Executor& ex_;
    const T* from_ = nullptr;
    T* to_ = nullptr;
    int64_t count_ = 0;
};

} // namespace detail
} // namespace fastmoe::inline FASTMOE_ABI
