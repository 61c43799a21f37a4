// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Threads of a GPU's block as fibers of one thread, which take turns and meet. Part of fiber_blocks.hpp and fiber_clusters.hpp.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "support/sanitizers.hpp"

namespace support {

/// Where a fiber, or who runs it, goes on. The first turn is a context's, all later ones are jumps, since to swap contexts
/// takes two calls of the system; AddressSanitizer, which has to know of stacks, is left with those.
class fiber_context {
public:
    /// @param run  called on the stack as run(self), when this is entered first; does not return
    void start(char* stack, std::size_t bytes, void (*run)(unsigned, unsigned), void* self)
    {
        getcontext(&context_);
        context_.uc_stack.ss_sp = stack;
        context_.uc_stack.ss_size = bytes;
        context_.uc_link = nullptr;
        const auto at = reinterpret_cast<std::uintptr_t>(self);
        makecontext(&context_, reinterpret_cast<void (*)()>(run), 2, static_cast<unsigned>(at >> 32), static_cast<unsigned>(at & 0xffffffffu));
        is_new_ = true;
    }
    static void* self(unsigned high, unsigned low)
    {
        return reinterpret_cast<void*>((static_cast<std::uintptr_t>(high) << 32) | low);
    }
    /// Goes on there, until somebody leaves for here.
    void leave_for(fiber_context& there)
    {
#if FASTMOE_UNDER_ASAN
        swapcontext(&context_, &there.context_);
#else
        if (_setjmp(place_) != 0) return;
        if (there.is_new_) {
            there.is_new_ = false;
            setcontext(&there.context_);
        }
        _longjmp(there.place_, 1);
#endif
    }

private:
    ucontext_t context_{}; // no stack to be known of, where a fiber is left for who runs it
#if !FASTMOE_UNDER_ASAN
    jmp_buf place_;
#endif
    bool is_new_ = false;
};

/// A base class: what a thread does calls its members, so they are the derived class's business alone.
class fibers {
protected:
    struct meeting {
        int arrived = 0;
        std::uint64_t held = 0;
    };

    /// Runs body() once on each of `count` fibers, until all have ended or somebody has complained.
    /// @param first  after every round, which fiber begins the next
    /// @param after  called after each round, with whether nothing went on in it
    template <class First, class After>
    void take_turns(std::size_t count, std::size_t stack, std::function<void()> body, const First& first, const After& after)
    {
        static thread_local std::vector<std::unique_ptr<char[]>> stacks;
        static thread_local std::size_t size = 0;
        if (size < stack) stacks.clear(), size = stack;
        body_ = std::move(body);
        turns_.resize(count);
        for (std::size_t t = 0; t < count; ++t) {
            if (stacks.size() <= t) stacks.emplace_back(new char[size]);
            turns_[t].context.start(stacks[t].get(), size, &enter, this);
        }
        for (bool any = true; any && complaint_.empty();) {
            any = false;
            const std::uint64_t before = progress_;
            const std::size_t turn = first();
            for (std::size_t i = 0; i < count && complaint_.empty(); ++i) {
                const std::size_t t = (i + turn) % count;
                if (turns_[t].done) continue;
                any = true;
                if (turns_[t].until && !turns_[t].until()) continue;
                now_ = static_cast<int>(t);
                main_.leave_for(turns_[t].context);
            }
            after(before == progress_);
            if (any && before == progress_) complain("threads wait for others that do not come");
        }
    }
    int now() const { return now_; }
    bool has_ended(std::size_t t) const { return turns_[t].done; }
    const std::string& complaint() const { return complaint_; }
    /// Of the thread that has its turn; the first complaint stands.
    void complain(const char* what)
    {
        if (complaint_.empty()) complaint_ = "thread " + std::to_string(now_) + ": " + what;
    }
    /// Something happened that others may wait for.
    void go_on() { ++progress_; }

    /// Others have their turns until it says true.
    template <class Until>
    void wait_until(Until until)
    {
        if (until()) return;
        const int mine = now_;
        turn& of = turns_[static_cast<std::size_t>(mine)];
        of.until = until;
        of.context.leave_for(main_);
        now_ = mine;
        of.until = nullptr;
    }
    /// Waits for `many` threads; the last one calls then() before all go on.
    template <class Then>
    void meet(meeting& m, int many, const Then& then)
    {
        go_on();
        const std::uint64_t held = m.held;
        if (++m.arrived == many) {
            then();
            m.arrived = 0;
            ++m.held;
            return;
        }
        wait_until([&m, held] { return m.held != held; });
    }

private:
    struct turn {
        fiber_context context;
        bool done = false;
        std::function<bool()> until;
    };
    static void enter(unsigned high, unsigned low)
    {
        auto* self = static_cast<fibers*>(fiber_context::self(high, low));
        self->body_();
        turn& mine = self->turns_[static_cast<std::size_t>(self->now_)];
        mine.done = true;
        self->go_on();
        mine.context.leave_for(self->main_);
    }

    std::function<void()> body_;
    std::vector<turn> turns_;
    fiber_context main_;
    int now_ = 0;
    std::uint64_t progress_ = 0;
    std::string complaint_;
};

} // namespace support
