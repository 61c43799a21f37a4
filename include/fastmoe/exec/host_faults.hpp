// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Whose fault it was: an executor whose calls return when their work is done keeps a log for each thread that calls it.
#pragma once

#include <memory>
#include <mutex>
#include <thread>
#include <utility>

#include <fastmoe/exec/fault.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// One fault log a calling thread, so that nobody is thrown what the call of another found. The first thread's log is
/// part of this object; the first call of each further thread allocates one, which it keeps. What a thread that has ended
/// never asked for goes to the next one that the system gives the same id.
class host_faults {
public:
    host_faults() noexcept { detail::clear(first_.words); }
    host_faults(const host_faults&) = delete;
    host_faults& operator=(const host_faults&) = delete;
    ~host_faults()
    {
        while (first_.next) first_.next = std::exchange(first_.next->next, nullptr); // in turn: a list may be long
    }

    /// Where the work of the calling thread's verbs records.
    fault_recorder recorder()
    {
        const std::lock_guard lock(mutex_);
        const auto self = std::this_thread::get_id();
        log* found = find(self);
        if (!found) {
            if (first_.owner == std::thread::id()) {
                found = &first_;
            } else {
                auto fresh = std::make_unique<log>();
                detail::clear(fresh->words);
                fresh->next = std::move(first_.next);
                found = (first_.next = std::move(fresh)).get();
            }
            found->owner = self;
        }
        return {&found->words};
    }

    /// Throws what the work of the calling thread has recorded, and forgets it.
    void deliver()
    {
        log* mine;
        {
            const std::lock_guard lock(mutex_);
            mine = find(std::this_thread::get_id());
        }
        fault f;
        if (!mine || !detail::first_fault(mine->words, f)) [[likely]]
            return;
        detail::clear(mine->words);
        detail::raise_fault(f);
    }

private:
    struct log {
        std::thread::id owner; // none: nobody's yet
        fault_words words;
        std::unique_ptr<log> next;
    };

    log* find(std::thread::id owner) noexcept
    {
        for (log* l = &first_; l; l = l->next.get())
            if (l->owner == owner) return l;
        return nullptr;
    }

    std::mutex mutex_; // guards the list; the words of a log are its thread's
    log first_;
};

} // namespace fastmoe::inline FASTMOE_ABI
