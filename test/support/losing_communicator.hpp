// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A communicator over another one that loses a rank in the middle of a chosen call, with messages still on their way; these
/// arrive when a test says so. And a resource that knows whether what they arrive in was given back.
#pragma once

#include <cstddef>
#include <cstring>
#include <memory>
#include <mutex>
#include <type_traits>
#include <utility>
#include <vector>

#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/exec/executor.hpp>
#include <fastmoe/exec/memory.hpp>

namespace support {

/// Memory that a lost call has lent: [begin, begin + bytes).
struct lent_bytes {
    std::byte* begin;
    fastmoe::int64_t bytes;
    bool is_received;
};

/// Of one rank, for all its communicators. `lose_at` counts calls from 0.
struct loss {
    fastmoe::int64_t lose_at = -1, calls = 0;
    std::vector<lent_bytes> late;

    bool happened() const { return calls > lose_at && lose_at >= 0; }
    /// What was on its way comes.
    void arrive() const
    {
        for (const auto& l : late)
            if (l.is_received) std::memset(l.begin, 0x5a, static_cast<std::size_t>(l.bytes));
    }
};

template <class Communicator>
class losing_communicator {
public:
    losing_communicator(Communicator c, loss& what) : inner_(std::move(c)), loss_(&what) {}

    int rank() const { return inner_.rank(); }
    int size() const { return inner_.size(); }

    template <fastmoe::executor Executor, class T>
    void all_reduce(Executor& ex, fastmoe::vector_view<T> values) const
    {
        call("all_reduce", values, values);
        inner_.all_reduce(ex, values);
    }
    template <fastmoe::executor Executor, class T>
    void reduce_scatter(Executor& ex, std::type_identity_t<fastmoe::vector_view<const T>> sent, fastmoe::vector_view<T> received) const
    {
        call("reduce_scatter", sent, received);
        inner_.reduce_scatter(ex, sent, received);
    }
    template <fastmoe::executor Executor, class T>
    void all_gather(Executor& ex, std::type_identity_t<fastmoe::vector_view<const T>> sent, fastmoe::vector_view<T> received) const
    {
        call("all_gather", sent, received);
        inner_.all_gather(ex, sent, received);
    }
    template <fastmoe::executor Executor, class T>
    void all_to_all(Executor& ex, std::type_identity_t<fastmoe::vector_view<const T>> sent, fastmoe::vector_view<T> received) const
    {
        call("all_to_all", sent, received);
        inner_.all_to_all(ex, sent, received);
    }
    template <fastmoe::executor Executor, class T>
    void all_to_all_v(Executor& ex, std::type_identity_t<fastmoe::matrix_view<const T>> sent,
                      fastmoe::vector_view<const fastmoe::int64_t> sent_rows, fastmoe::matrix_view<T> received,
                      fastmoe::vector_view<const fastmoe::int64_t> received_rows) const
    {
        call("all_to_all_v", sent, received);
        inner_.all_to_all_v(ex, sent, sent_rows, received, received_rows);
    }
    template <fastmoe::executor Executor, class T>
    void broadcast(Executor& ex, fastmoe::vector_view<T> values, int root) const
    {
        call("broadcast", values, values);
        inner_.broadcast(ex, values, root);
    }
    template <fastmoe::executor Executor>
    void barrier(Executor& ex) const
    {
        inner_.barrier(ex);
    }
    losing_communicator split(int color, int key) const { return {inner_.split(color, key), *loss_}; }

private:
    template <class View>
    static fastmoe::int64_t bytes_of(const View& v)
    {
        fastmoe::int64_t n = sizeof(typename View::element_type);
        for (std::size_t d = 0; d < View::rank(); ++d) n *= v.extent(d);
        return n;
    }
    template <class From, class To>
    void call(const char* verb, const From& from, const To& to) const
    {
        if (loss_->calls++ != loss_->lose_at) return;
        using byte = std::byte;
        if (bytes_of(from) > 0)
            loss_->late.push_back({const_cast<byte*>(reinterpret_cast<const byte*>(from.data_handle())), bytes_of(from), false});
        if (bytes_of(to) > 0) loss_->late.push_back({reinterpret_cast<byte*>(to.data_handle()), bytes_of(to), true});
        fastmoe::raise<fastmoe::comm_error>(std::string(verb) + ": a rank was lost", fastmoe::location::current(), true);
    }

    Communicator inner_;
    loss* loss_;
};

/// Remembers what was given back, and gives nobody else that memory.
class remembering_memory final : public fastmoe::memory_resource {
public:
    ~remembering_memory() override
    {
        for (const auto& b : taken_) heap_.deallocate(b.begin, b.bytes);
    }
    void* allocate(std::int64_t bytes) override
    {
        void* memory = heap_.allocate(bytes);
        const std::lock_guard lock(mutex_);
        taken_.push_back({static_cast<std::byte*>(memory), bytes, true});
        return memory;
    }
    void deallocate(void* memory, std::int64_t) noexcept override
    {
        const std::lock_guard lock(mutex_);
        for (auto& b : taken_)
            if (b.begin == memory) b.is_received = false;
        ++given_back_;
    }

    std::int64_t given_back() const { return given_back_; }
    /// Of late messages, how many lie in memory that was given back, or in any of this resource.
    std::int64_t lost(const loss& what) const { return count(what, false); }
    std::int64_t within(const loss& what) const { return count(what, false) + count(what, true); }

private:
    std::int64_t count(const loss& what, bool is_taken) const
    {
        std::int64_t n = 0;
        for (const auto& l : what.late)
            for (const auto& b : taken_)
                n += b.is_received == is_taken && l.begin < b.begin + b.bytes && b.begin < l.begin + l.bytes;
        return n;
    }

    fastmoe::host_memory heap_;
    std::mutex mutex_;
    std::vector<lent_bytes> taken_; ///< is_received: not given back yet
    std::int64_t given_back_ = 0;
};

} // namespace support
