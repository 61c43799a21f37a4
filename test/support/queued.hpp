// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What a CUDA stream demands of those who use it, without a GPU: an executor that queues every loop and runs it later,
/// over memory that only its own loops may touch. Whoever reads a result on the host, lets a functor point to something
/// that is gone when it runs, or waits where a graph is captured, is found out. What is captured can be replayed.
#pragma once

#include <sys/mman.h>

#include <cstring>
#include <functional>
#include <stdexcept>
#include <vector>

#include <fastmoe/exec/executor.hpp>
#include <fastmoe/exec/memory.hpp>

namespace support {

class queued {
public:
    queued() : scratch_(static_cast<std::byte*>(heap_.allocate(fastmoe::team_scratch_bytes)))
    {
        words_ = static_cast<fastmoe::fault_words*>(allocate(sizeof(fastmoe::fault_words)));
        touch([this] { fastmoe::detail::clear(*words_); });
    }
    queued(const queued&) = delete;
    queued& operator=(const queued&) = delete;
    ~queued()
    {
        for (const block& b : blocks_) munmap(b.memory, b.bytes);
        heap_.deallocate(scratch_, fastmoe::team_scratch_bytes);
    }

    /// Memory that kills the program which touches it outside of a loop; all bits are set, at the place of whose use the
    /// loops say. Nothing is handed out twice.
    void* allocate(std::int64_t bytes)
    {
        refuse_in_capture("allocate");
        const auto size = (static_cast<std::size_t>(bytes) / 4096 + 1) * 4096;
        void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (memory == MAP_FAILED) throw std::bad_alloc();
        std::memset(memory, 0xff, size);
        mprotect(memory, size, PROT_NONE);
        blocks_.push_back({memory, size});
        return memory;
    }
    void deallocate(void*, std::int64_t) noexcept {}

    template <class F>
    void for_each(std::int64_t n, const F& f)
    {
        static_assert(std::is_trivially_copyable_v<F>);
        queue_.push_back([n, f] {
            for (std::int64_t i = n - 1; i >= 0; --i) f(i);
        });
    }
    template <class F>
    void for_each_row(std::int64_t n, const F& f, fastmoe::row_hint)
    {
        static_assert(std::is_trivially_copyable_v<F>);
        queue_.push_back([n, f, scratch = scratch_] {
            for (std::int64_t row = n - 1; row >= 0; --row) {
                std::memset(static_cast<void*>(scratch), 0xff, fastmoe::team_scratch_bytes);
                fastmoe::single_lane_team team(scratch);
                f(team, row);
            }
        });
    }

    fastmoe::fault_recorder faults() noexcept { return {words_}; }
    void deliver_faults() noexcept {}
    void synchronize()
    {
        refuse_in_capture("synchronize");
        run(queue_);
        queue_.clear();
        fastmoe::fault found;
        bool any = false;
        touch([&] {
            any = fastmoe::detail::first_fault(*words_, found);
            fastmoe::detail::clear(*words_);
        });
        if (any) fastmoe::detail::raise_fault(found);
    }

    /// Waits, as a copy from a device does; in a capture nobody may.
    void copy_to_host(void* to, const void* from, int64_t bytes)
    {
        refuse_in_capture("copy_to_host");
        run(queue_);
        queue_.clear();
        touch([&] { std::memcpy(to, from, static_cast<std::size_t>(bytes)); });
    }
    /// f() may touch the memory.
    template <class F>
    void touch(const F& f)
    {
        for (const block& b : blocks_) mprotect(b.memory, b.bytes, PROT_READ | PROT_WRITE);
        f();
        for (const block& b : blocks_) mprotect(b.memory, b.bytes, PROT_NONE);
    }

    /// What f() queues, kept instead of run. f() may neither wait nor allocate.
    using graph = std::vector<std::function<void()>>;
    template <class F>
    graph capture(const F& f)
    {
        synchronize();
        capturing_ = true;
        f();
        capturing_ = false;
        return std::exchange(queue_, {});
    }
    void replay(const graph& g) { queue_.insert(queue_.end(), g.begin(), g.end()); }

protected:
    template <class F>
    void queue(const F& f)
    {
        queue_.push_back(f);
    }

private:
    struct block {
        void* memory;
        std::size_t bytes;
    };

    void refuse_in_capture(const char* call) const
    {
        if (capturing_) throw std::logic_error(std::string(call) + "() was called during a capture");
    }
    void run(const graph& g)
    {
        touch([&g] {
            for (const auto& step : g) step();
        });
    }

    fastmoe::host_memory heap_;
    std::byte* scratch_;
    std::vector<block> blocks_;
    fastmoe::fault_words* words_ = nullptr;
    graph queue_;
    bool capturing_ = false;
};

static_assert(fastmoe::executor<queued>);
static_assert(!fastmoe::has_readable_memory<queued>);

} // namespace support
