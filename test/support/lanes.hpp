// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A third executor, for tests: every team is four real threads, so that a row functor's use of its team is put to the
/// proof without a GPU. It throws `misuse` where the lanes do not call the same collectives, where scratch is taken
/// beyond the hint, and where a loop is started inside of a loop. Scratch is NaN at the start of every row. Rows and
/// elements run backwards, so that nothing leans on their order.
///
/// Only sync() makes memory visible between lanes: reduce and scan hand their values over in a way that ThreadSanitizer
/// does not take for an order of anything else, so that it finds a missing sync() next to them.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#include <fastmoe/exec/executor.hpp>
#include <fastmoe/exec/host_faults.hpp>
#include <fastmoe/exec/memory.hpp>

#include "functor_log.hpp"
#include "lane_barrier.hpp"

namespace support {

// Every member of a team is host-device, so that host-device functors compile with nvcc. This team runs on the host
// alone, and the compiler is told not to ask.
#if defined(__CUDACC__)
#define FASTMOE_LANE_MEMBER _Pragma("nv_exec_check_disable")
#else
#define FASTMOE_LANE_MEMBER
#endif

/// A team of four threads; see fastmoe::single_lane_team for the contract of each member.
class lane_team {
public:
    lane_team(lane_barrier& barrier, int64_t lane, std::byte* scratch, int64_t announced) noexcept
        : barrier_(&barrier), lane_(lane), scratch_(scratch), announced_(announced)
    {
    }

    FASTMOE_HOST_DEVICE int64_t lane() const noexcept { return lane_; }
    FASTMOE_HOST_DEVICE static constexpr int64_t lanes() noexcept { return lane_count; }

    FASTMOE_LANE_MEMBER
    FASTMOE_HOST_DEVICE void sync() const { barrier_->arrive(lane_, {"sync", 0}, meeting::publishes); }

    FASTMOE_LANE_MEMBER
    template <class F>
    FASTMOE_HOST_DEVICE void for_each(int64_t n, F f) const
    {
        barrier_->note(lane_, {"for_each", n});
        backwards(lane_, n, f);
    }

    FASTMOE_LANE_MEMBER
    template <class T, class Op, class F>
    FASTMOE_HOST_DEVICE T reduce(int64_t n, T init, Op op, F f) const
    {
        T part = init, all[lane_count];
        for (int64_t i = lane_; i < n; i += lane_count) part = op(part, f(i));
        barrier_->exchange(lane_, {"reduce", n}, part, all);
        T total = all[0];
        for (int64_t other = 1; other < lane_count; ++other) total = op(total, all[other]);
        return total;
    }

    FASTMOE_LANE_MEMBER
    template <class T, class Op, class F, class Out>
    FASTMOE_HOST_DEVICE T scan(int64_t n, T init, Op op, F f, Out out) const
    {
        T total = init, all[lane_count];
        barrier_->note(lane_, {"scan", n});
        for (int64_t base = 0; base < n; base += lane_count) {
            const int64_t mine = base + lane_;
            const T value = mine < n ? static_cast<T>(f(mine)) : init;
            barrier_->exchange(lane_, {"a part of scan", base}, value, all);
            for (int64_t i = base; i < base + lane_count && i < n; ++i) {
                if (i == mine) out(i, total);
                total = op(total, all[i - base]);
            }
        }
        return total;
    }

    FASTMOE_LANE_MEMBER
    template <class Key, class Out>
    FASTMOE_HOST_DEVICE void tally(int64_t n, int32_t* counts, Key key, Out out) const
    {
        barrier_->note(lane_, {"tally", n});
        constexpr int64_t part = 64; // that a lane counts before it is another's turn
        sync();
        for (int64_t begin = 0; begin < n; begin += part) {
            for (int64_t i = begin; i < begin + part && i < n && begin / part % lane_count == lane_; ++i) {
                const int32_t e = static_cast<int32_t>(key(i));
                out(i, e >= 0 ? counts[e]++ : -1);
            }
            sync();
        }
    }

    FASTMOE_LANE_MEMBER
    template <class T>
    FASTMOE_HOST_DEVICE T* scratch(int64_t n)
    {
        const int64_t bytes = n * static_cast<int64_t>(sizeof(T));
        barrier_->note(lane_, {"scratch", bytes});
        if (n < 0 || taken_ + bytes > announced_) refuse_scratch(bytes);
        auto* out = reinterpret_cast<T*>(scratch_ + taken_);
        taken_ += (bytes + 63) / 64 * 64;
        return out;
    }

    /// f(i) for the lane's share of [0, n), the last first.
    FASTMOE_LANE_MEMBER
    template <class F>
    FASTMOE_HOST_DEVICE static void backwards(int64_t lane, int64_t n, F& f)
    {
        if (n <= lane) return;
        for (int64_t i = lane + (n - 1 - lane) / lane_count * lane_count; i >= lane; i -= lane_count) f(i);
    }

private:
    [[noreturn]] void refuse_scratch(int64_t bytes) const
    {
        throw misuse("scratch up to byte " + std::to_string(taken_ + bytes) + " was taken; row_hint announced " +
                     std::to_string(announced_));
    }

    lane_barrier* barrier_;
    int64_t lane_;
    std::byte* scratch_;
    int64_t announced_, taken_ = 0;
};

#undef FASTMOE_LANE_MEMBER

struct lanes_options {
    std::chrono::milliseconds patience{60000}; ///< how long lanes wait for one that does not come
    void (*give_up)(const char* text) = nullptr; ///< what happens then; null: print the text and abort
};

/// The executor. Its calls return when the work is done; exceptions of functors are rethrown.
class lanes {
public:
    explicit lanes(lanes_options options = {}) : barrier_(options.patience, options.give_up)
    {
        scratch_ = static_cast<std::byte*>(heap_.allocate(scratch_bytes));
        for (int64_t lane = 1; lane < lane_count; ++lane)
            threads_[lane - 1] = std::thread([this, lane] { serve(lane); });
    }
    lanes(const lanes&) = delete;
    lanes& operator=(const lanes&) = delete;
    ~lanes()
    {
        {
            std::lock_guard lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (std::thread& t : threads_) t.join();
        heap_.deallocate(scratch_, scratch_bytes);
    }

    /// Memory is poisoned: NaN, or -1.
    void* allocate(int64_t bytes)
    {
        void* out = heap_.allocate(bytes);
        if (bytes > 0) std::memset(out, poison_bits, static_cast<std::size_t>(bytes));
        return out;
    }
    void deallocate(void* memory, int64_t bytes) noexcept { heap_.deallocate(memory, bytes); }
    void copy_to_host(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, static_cast<std::size_t>(bytes)); }

    template <class F>
    void for_each(int64_t n, const F& f)
    {
        expects_outside();
        std::lock_guard turn(turn_);
        launch([&](int64_t lane) { lane_team::backwards(lane, n, f); });
    }

    template <class F>
    void for_each_row(int64_t n, const F& f, fastmoe::row_hint hint)
    {
        expects_outside();
        note_functor<F>();
        std::lock_guard turn(turn_);
        poison_scratch(hint.scratch_bytes);
        launch([&](int64_t lane) {
            for (int64_t row = n - 1; row >= 0; --row) {
                lane_team team(barrier_, lane, scratch_, hint.scratch_bytes);
                F copy = f; // as every thread of a GPU has its own
                copy(team, row);
                barrier_.arrive(lane, {"the end of the row", row}, meeting::publishes, [&] {
                    std::string complaint = check_scratch(hint.scratch_bytes);
                    poison_scratch(hint.scratch_bytes);
                    return complaint;
                });
            }
        });
    }

    fastmoe::fault_recorder faults() { return faults_.recorder(); }
    void deliver_faults() { faults_.deliver(); }
    void synchronize() { deliver_faults(); }

private:
    static constexpr int poison_bits = 0xff;
    static constexpr int64_t guard_bytes = 1024;
    static constexpr int64_t scratch_bytes = fastmoe::team_scratch_bytes + guard_bytes;

    void poison_scratch(int64_t announced) noexcept
    {
        std::memset(static_cast<void*>(scratch_), poison_bits, static_cast<std::size_t>(announced + guard_bytes));
    }
    std::string check_scratch(int64_t announced) const
    {
        for (int64_t i = announced; i < announced + guard_bytes; ++i)
            if (scratch_[i] != std::byte{poison_bits})
                return "scratch byte " + std::to_string(i) + " was written; row_hint announced " +
                       std::to_string(announced);
        return "";
    }

    /// A loop inside of a loop would wait for itself.
    static void expects_outside()
    {
        if (inside_) throw misuse("a parallel loop was started inside of a parallel loop");
    }

    /// body(lane) on the four threads; the caller is lane 0.
    template <class Body>
    void launch(const Body& body)
    {
        barrier_.reset();
        for (std::exception_ptr& e : failures_) e = nullptr;
        {
            std::lock_guard lock(mutex_);
            run_ = [](const void* context, int64_t lane) { (*static_cast<const Body*>(context))(lane); };
            context_ = &body;
            ++epoch_;
            busy_ = lane_count - 1;
        }
        wake_.notify_all();
        work(0);
        {
            std::unique_lock lock(mutex_);
            idle_.wait(lock, [this] { return busy_ == 0; });
        }
        rethrow();
    }

    void work(int64_t lane)
    {
        inside_ = true;
        try {
            run_(context_, lane);
            barrier_.leave(lane, "returned");
        } catch (...) {
            failures_[lane] = std::current_exception();
            barrier_.leave(lane, "threw an exception");
        }
        inside_ = false;
    }

    /// A functor's own exception first: other lanes then fail only because they waited for that one.
    void rethrow()
    {
        for (const bool own : {true, false})
            for (const std::exception_ptr& e : failures_) {
                if (!e) continue;
                try {
                    std::rethrow_exception(e);
                } catch (const misuse&) {
                    if (!own) throw;
                } catch (...) {
                    throw;
                }
            }
    }

    void serve(int64_t lane)
    {
        for (std::uint64_t seen = 0;;) {
            {
                std::unique_lock lock(mutex_);
                wake_.wait(lock, [&] { return stopping_ || epoch_ != seen; });
                if (stopping_) return;
                seen = epoch_;
            }
            work(lane);
            std::lock_guard lock(mutex_);
            if (--busy_ == 0) idle_.notify_one();
        }
    }

    static inline thread_local bool inside_ = false;

    fastmoe::host_memory heap_;
    lane_barrier barrier_;
    std::byte* scratch_ = nullptr;
    fastmoe::host_faults faults_;
    std::exception_ptr failures_[lane_count];

    std::mutex turn_;  // held by the caller whose loop runs
    std::mutex mutex_; // guards what follows
    std::condition_variable wake_, idle_;
    void (*run_)(const void*, int64_t) = nullptr;
    const void* context_ = nullptr;
    std::uint64_t epoch_ = 0;
    int64_t busy_ = 0;
    bool stopping_ = false;
    std::thread threads_[lane_count - 1];
};

static_assert(fastmoe::executor<lanes>);

} // namespace support
