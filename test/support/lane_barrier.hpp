// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Where the four threads of a lanes team meet. Every arrival says which collective it is; arrivals that differ, a lane
/// that has left and a lane that never comes become errors that say so. Part of lanes.hpp.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "support/sanitizers.hpp"

namespace support {

using std::int64_t;

inline constexpr int64_t lane_count = 4;

/// A functor that breaks the rules of a team.
struct misuse : std::logic_error {
    using std::logic_error::logic_error;
};

/// A collective and its argument.
struct collective {
    const char* name;
    int64_t argument;
};

/// Whether what a lane wrote before the meeting is visible to all after it.
enum class meeting { publishes, quiet };

class lane_barrier {
public:
    lane_barrier(std::chrono::milliseconds patience, void (*give_up)(const char*))
        : patience_(patience), give_up_(give_up ? give_up : &print_and_abort)
    {
    }

    /// Forgets how the last loop went; called while no lane runs.
    void reset() noexcept
    {
        std::uint32_t exchanges = 0;
        for (const record& r : seen_) exchanges = r.exchanges > exchanges ? r.exchanges : exchanges;
        for (record& r : seen_) {
            r.exchanges = exchanges; // lanes that failed may have stopped at different counts
            r.history.store(0, relaxed);
            r.calls.store(0, relaxed);
            r.name.store("nothing", relaxed);
        }
        arrived_.store(0, relaxed);
        failed_.store(false, relaxed);
        gone_.store(false, relaxed);
    }

    /// Remembers a call that does not wait; the next meeting compares.
    void note(int64_t lane, collective what) noexcept
    {
        record& mine = seen_[lane];
        std::uint64_t h = mine.history.load(relaxed);
        for (const char* p = what.name; *p; ++p) h = (h ^ static_cast<unsigned char>(*p)) * 0x100000001b3u;
        h = (h ^ static_cast<std::uint64_t>(what.argument)) * 0x100000001b3u;
        mine.history.store(h, relaxed);
        mine.name.store(what.name, relaxed);
        mine.argument.store(what.argument, relaxed);
        mine.calls.fetch_add(1, relaxed);
    }

    /// Waits for all lanes; the last one runs done(), which returns a complaint or nothing.
    /// @throws misuse if the lanes do not meet in the same collective after the same calls
    template <class Done>
    void arrive(int64_t lane, collective what, meeting how, const Done& done)
    {
        const bool quiet = how == meeting::quiet;
        note(lane, what);
        const std::uint32_t round = generation_.load(relaxed);
        if (arrived_.fetch_add(1, quiet ? quiet_both : std::memory_order_acq_rel) == lane_count - 1) {
            for (int64_t other = 1; other < lane_count; ++other)
                if (seen_[other].history.load(relaxed) != seen_[0].history.load(relaxed)) fail(disagreement());
            if (!failed_.load(relaxed)) {
                const std::string complaint = done();
                if (!complaint.empty()) fail(complaint);
            }
            arrived_.store(0, relaxed);
            generation_.store(round + 1, quiet ? quiet_release : std::memory_order_release);
            wake();
        } else {
            wait(lane, round, quiet ? quiet_acquire : std::memory_order_acquire);
        }
        if (failed_.load(relaxed)) throw misuse(text());
    }
    void arrive(int64_t lane, collective what, meeting how)
    {
        arrive(lane, what, how, [] { return std::string(); });
    }

    /// The lane will not come again. Lanes that wait for it, now or later, fail.
    void leave(int64_t lane, const char* how) noexcept
    {
        seen_[lane].name.store(how, relaxed);
        gone_.store(true, std::memory_order_release);
        wake();
    }

    /// Gives every lane the values of all, by meeting quietly. The words carry their round, so that a relaxed load can
    /// tell old from new: nothing else is ordered by this.
    template <class T>
    void exchange(int64_t lane, collective what, const T& value, T (&all)[lane_count])
    {
        static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(std::uint32_t) * words);
        const std::uint32_t tag = ++seen_[lane].exchanges;
        std::uint32_t raw[words] = {};
        std::memcpy(raw, &value, sizeof(T));
        for (int w = 0; w < words; ++w)
            slot_[tag % 2][lane][w].store(std::uint64_t{tag} << 32 | raw[w], relaxed);
        arrive(lane, what, meeting::quiet);
        for (int64_t other = 0; other < lane_count; ++other) {
            for (int w = 0; w < words; ++w) {
                std::uint64_t word;
                while ((word = slot_[tag % 2][other][w].load(relaxed)) >> 32 != tag) std::this_thread::yield();
                raw[w] = static_cast<std::uint32_t>(word);
            }
            std::memcpy(static_cast<void*>(&all[other]), raw, sizeof(T));
        }
    }

private:
    static constexpr int words = 8;
    static constexpr auto relaxed = std::memory_order_relaxed;
#if FASTMOE_UNDER_TSAN
    // A quiet meeting must not look like a sync().
    static constexpr auto quiet_both = relaxed, quiet_release = relaxed, quiet_acquire = relaxed;
#else
    static constexpr auto quiet_both = std::memory_order_acq_rel, quiet_release = std::memory_order_release,
                          quiet_acquire = std::memory_order_acquire;
#endif

    struct alignas(64) record {
        std::atomic<std::uint64_t> history{0};
        std::atomic<const char*> name{"nothing"};
        std::atomic<int64_t> argument{0}, calls{0};
        std::uint32_t exchanges = 0; // the lane's own
    };

    /// Lanes sleep, not yield: where something else wants the cores, every yield of a lane gives it a slice of
    /// milliseconds, and a team meets thousands of times. A lane may go to sleep just as another leaves; it looks again soon.
    void wait(int64_t lane, std::uint32_t round, std::memory_order order)
    {
        using clock = std::chrono::steady_clock;
        for (auto start = clock::now();;) {
            if (generation_.load(order) != round) return;
            if (gone_.load(std::memory_order_acquire) && generation_.load(order) == round) return fail(disagreement());
            const timespec moment{0, 5'000'000};
            ::syscall(SYS_futex, &generation_, FUTEX_WAIT_PRIVATE, round, &moment, nullptr, 0);
            if (clock::now() - start < patience_) continue;
            give_up_(("lane " + std::to_string(lane) + " waits in vain: " + disagreement()).c_str());
            start = clock::now();
        }
    }
    void wake() noexcept { ::syscall(SYS_futex, &generation_, FUTEX_WAKE_PRIVATE, lane_count, nullptr, nullptr, 0); }

    std::string disagreement() const
    {
        std::string out = "the lanes of a team disagree:";
        for (int64_t lane = 0; lane < lane_count; ++lane) {
            const record& r = seen_[lane];
            out += " lane " + std::to_string(lane) + " after " + std::to_string(r.calls.load(relaxed)) + " calls: " +
                   r.name.load(relaxed) + "(" + std::to_string(r.argument.load(relaxed)) + ")" +
                   (lane + 1 < lane_count ? "," : "");
        }
        return out;
    }

    void fail(const std::string& text)
    {
        std::lock_guard lock(text_mutex_);
        if (!failed_.load(relaxed)) text_ = text;
        failed_.store(true, relaxed);
    }
    std::string text()
    {
        std::lock_guard lock(text_mutex_);
        return text_;
    }

    static void print_and_abort(const char* text)
    {
        std::fprintf(stderr, "%s\n", text);
        std::abort();
    }

    std::chrono::milliseconds patience_;
    void (*give_up_)(const char*);
    record seen_[lane_count];
    std::atomic<std::uint64_t> slot_[2][lane_count][words] = {};
    std::atomic<int64_t> arrived_{0};
    std::atomic<std::uint32_t> generation_{0}; // lanes sleep on it
    static_assert(sizeof(generation_) == sizeof(std::uint32_t));
    std::atomic<bool> failed_{false}, gone_{false};
    std::mutex text_mutex_;
    std::string text_;
};

} // namespace support
