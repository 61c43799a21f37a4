// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The CUDA column's ways without a GPU: a stream over memory that the host may touch at any time. Loops run as late as they
/// may, when somebody waits, and the main thread's stack, which a GPU does not reach, is out of reach for them, too. Whoever
/// looks at a result too soon, frees it, hands over an array on the stack or expects a fault of the call is found out.
#pragma once

#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <ucontext.h>

#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include <fastmoe/exec/executor.hpp>
#include <fastmoe/exec/memory.hpp>

#include "support/sanitizers.hpp"

// Sanitizers look at stacks, and know of no others.
#define FASTMOE_STACKS_ARE_WATCHED (FASTMOE_UNDER_ASAN || FASTMOE_UNDER_TSAN)

namespace support {

class late {
public:
    late() : words_(static_cast<fastmoe::fault_words*>(heap_.allocate(sizeof(fastmoe::fault_words))))
    {
        scratch_ = static_cast<std::byte*>(heap_.allocate(fastmoe::team_scratch_bytes));
        clear();
    }
    late(const late&) = delete;
    late& operator=(const late&) = delete;
    ~late()
    {
        run();
        heap_.deallocate(scratch_, fastmoe::team_scratch_bytes);
        heap_.deallocate(words_, sizeof(fastmoe::fault_words));
    }

    /// All bits of the memory are set.
    void* allocate(std::int64_t bytes)
    {
        void* out = heap_.allocate(bytes);
        if (bytes > 0) std::memset(out, 0xff, static_cast<std::size_t>(bytes));
        return out;
    }
    /// Waits, as the column's does: the heap may lend the block to the host next.
    void deallocate(void* memory, std::int64_t bytes) noexcept
    {
        run();
        heap_.deallocate(memory, bytes);
    }

    template <class F>
    void for_each(std::int64_t n, const F& f)
    {
        static_assert(std::is_trivially_copyable_v<F>);
        queue([n, f] {
            for (std::int64_t i = n - 1; i >= 0; --i) f(i);
        });
    }
    template <class F>
    void for_each_row(std::int64_t n, const F& f, fastmoe::row_hint)
    {
        static_assert(std::is_trivially_copyable_v<F>);
        queue([n, f, scratch = scratch_] {
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
        run();
        fastmoe::fault found;
        if (!fastmoe::detail::first_fault(*words_, found)) return;
        clear();
        fastmoe::detail::raise_fault(found);
    }
    void copy_to_host(void* to, const void* from, std::int64_t bytes)
    {
        run();
        std::memcpy(to, from, static_cast<std::size_t>(bytes));
    }

protected:
    void queue(std::function<void()> step)
    {
        const std::lock_guard lock(mutex_);
        queue_.push_back(std::move(step));
    }

private:
    /// Work on the stream itself: whoever records from the host before it has run has recorded nothing.
    void clear()
    {
        queue([words = words_] { fastmoe::detail::clear(*words); });
    }
    void run()
    {
        const std::lock_guard lock(mutex_);
        if (queue_.empty()) return;
        const auto now = std::make_unique<errand>(); // the executor may lie on the stack itself
        now->steps.swap(queue_);
        now->run();
    }

    struct errand {
        std::vector<std::function<void()>> steps;

        void all()
        {
            for (const auto& step : steps) step();
        }
#if FASTMOE_STACKS_ARE_WATCHED
        void run() { all(); }
#else
        /// Runs the steps on a stack of their own, while nobody can touch the main thread's; where it is the only thread, since
        /// others may have their work there.
        void run()
        {
            struct stat tasks;
            pthread_attr_t attributes;
            const bool alone = ::stat("/proc/self/task", &tasks) == 0 && tasks.st_nlink == 3; // two, and one for each thread
            if (!alone || pthread_getattr_np(pthread_self(), &attributes) != 0) return all();
            void* low = nullptr;
            std::size_t size = 0;
            pthread_attr_getstack(&attributes, &low, &size);
            pthread_attr_destroy(&attributes);
            const auto here = reinterpret_cast<std::uintptr_t>(&attributes) / 4096 * 4096;
            pages = reinterpret_cast<void*>(here);
            bytes = reinterpret_cast<std::uintptr_t>(low) + size - here;
            stack.resize(std::size_t{1} << 20);
            getcontext(&there);
            there.uc_stack.ss_sp = stack.data();
            there.uc_stack.ss_size = stack.size();
            there.uc_link = &back;
            running() = this;
            makecontext(&there, [] {
                errand& self = *running();
                mprotect(self.pages, self.bytes, PROT_NONE);
                self.all();
                mprotect(self.pages, self.bytes, PROT_READ | PROT_WRITE);
            }, 0);
            swapcontext(&back, &there);
        }
        static errand*& running()
        {
            static errand* the = nullptr; // of the main thread
            return the;
        }

        ucontext_t back, there;
        std::vector<char> stack;
        void* pages = nullptr;
        std::size_t bytes = 0;
#endif
    };

    fastmoe::host_memory heap_;
    fastmoe::fault_words* words_;
    std::byte* scratch_ = nullptr;
    std::mutex mutex_;
    std::vector<std::function<void()>> queue_;
};

static_assert(fastmoe::executor<late>);
static_assert(!fastmoe::has_readable_memory<late>);

} // namespace support
