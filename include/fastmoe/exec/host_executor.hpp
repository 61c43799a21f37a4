// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Runs verbs on threads of its own. Work is cut by the shape alone, so the same bits come out for any thread count.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>

#include <fastmoe/exec/executor.hpp>
#include <fastmoe/exec/host_faults.hpp>
#include <fastmoe/exec/instruction_set.hpp>
#include <fastmoe/exec/memory.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// A functor with a member type `vectorized` is compiled for every instruction set and runs with the best one.
template <class F>
concept vectorized_functor = requires { typename F::vectorized; };

struct host_options {
    int threads = 0;                             ///< 0: as many as the machine has
    instruction_set best = native_instruction_set(); ///< lower it to test the other paths; raised, it is refused
    memory_resource* memory = nullptr;           ///< null: aligned operator new. Must outlive the executor
};

/// The CPU executor. Calls return when the work is done; an exception inside of it is rethrown to the caller.
/// Several threads may use one executor: their parallel loops run one after the other. Inside of a loop, loops are refused
/// unless they are of an executor that was made after the outer one's: so loops can wait for each other in one direction
/// only, and never for ever. (A thread that a task starts by itself is not known to be inside.)
class host_executor {
public:
    static constexpr bool readable_memory = true;

    /// @throws invalid_argument if options.threads is negative or over 1024, or options.best is beyond this machine
    /// @throws out_of_memory, or error if the system does not start as many threads
    explicit host_executor(host_options options = {}) : best_(options.best), memory_(options.memory ? options.memory : &heap_)
    {
        expects(options.threads >= 0 && options.threads <= 1024, "threads", options.threads, "0 to 1024");
        const instruction_set native = native_instruction_set();
        expects(options.best <= native, "best", name_of(options.best), "at most ", name_of(native), ", this machine's level");
        const int found = static_cast<int>(std::thread::hardware_concurrency());
        threads_ = options.threads > 0 ? options.threads : (found > 0 ? found : 1);
        scratch_ = static_cast<std::byte*>(heap_.allocate(threads_ * team_scratch_bytes));
        start();
    }
    host_executor(const host_executor&) = delete;
    host_executor& operator=(const host_executor&) = delete;
    ~host_executor() { stop(); }

    /// One thread more, for transfers that run beside this executor's work, on the same memory.
    host_executor beside() const { return host_executor({.threads = 1, .best = best_, .memory = memory_}); }

    int threads() const noexcept { return threads_; }
    instruction_set best() const noexcept { return best_; }

    void* allocate(int64_t bytes) { return memory_->allocate(bytes); }
    void deallocate(void* memory, int64_t bytes) noexcept { memory_->deallocate(memory, bytes); }

    template <class F>
    void for_each(int64_t n, const F& f)
    {
        // Cheap elements: a task is at least 2048 of them.
        const int64_t grain = chunk(n, 2048);
        for_each_task(tasks(n, grain), [&](int, int64_t t) {
            const auto body = [&f](int64_t i) { f(i); };
            lift<F>(body, t * grain, end(t, grain, n));
        });
    }

    template <class F>
    void for_each_row(int64_t n, const F& f, row_hint hint)
    {
        const int64_t width = hint.width > 0 ? hint.width : 1;
        const int64_t grain = chunk(n, width >= 2048 ? 1 : 2048 / width);
        for_each_task(tasks(n, grain),
                      [&](int worker, int64_t t) { run_rows(worker, t * grain, end(t, grain, n), f); });
    }

    /// f(team, row) for row in [begin, end) on the calling worker, with the best instruction set: for epilogues of
    /// host-only algorithms, inside of for_each_task.
    template <class F>
    void run_rows(int worker, int64_t begin, int64_t end, const F& f) const
    {
        std::byte* scratch = scratch_ + worker * team_scratch_bytes;
        const auto body = [&f, scratch](int64_t i) {
            single_lane_team team(scratch);
            f(team, i);
        };
        lift<F>(body, begin, end);
    }

    /// f(worker, task) for task in [0, n): what host-only algorithms such as a blocked GEMM are built on. `worker` is
    /// in [0, threads()) and names the thread, for its part of a workspace; which worker gets a task is not fixed.
    template <class F>
    void for_each_task(int64_t n, const F& f)
    {
        run(n, [](const void* context, int worker, int64_t task) { (*static_cast<const F*>(context))(worker, task); }, &f);
    }

    /// Where the work of the calling thread's verbs records faults: threads that share an executor get their own alone.
    fault_recorder faults() { return faults_.recorder(); }
    /// Throws what the work of the calling thread has recorded, and forgets it.
    void deliver_faults() { faults_.deliver(); }
    /// The same as deliver_faults(): host work is done when a call returns.
    void synchronize() { deliver_faults(); }

private:
    using task_function = void (*)(const void* context, int worker, int64_t task);

    struct job {
        task_function function = nullptr;
        const void* context = nullptr;
        int64_t tasks = 0;
        std::atomic<int64_t> next{0};
        std::exception_ptr failure; // guarded by mutex_
    };

    static int64_t tasks(int64_t n, int64_t grain) noexcept { return (n + grain - 1) / grain; }
    static int64_t end(int64_t task, int64_t grain, int64_t n) noexcept
    {
        return (task + 1) * grain < n ? (task + 1) * grain : n;
    }
    /// Elements a task: enough tasks to balance, but none below the grain that pays for its start.
    static int64_t chunk(int64_t n, int64_t least) noexcept
    {
        const int64_t even = (n + 63) / 64;
        return even > least ? even : least;
    }

    template <class Body>
    static void loop(const Body& body, int64_t begin, int64_t end)
    {
        for (int64_t i = begin; i < end; ++i) body(i);
    }
    // Sanitizers watch the plain loop: the same source, where their checks in three copies would cost minutes to compile.
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define FASTMOE_LIFT 1
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#undef FASTMOE_LIFT
#endif
#endif
#endif
    // g++ at -O2 vectorizes no loop that may have a rest; and its -ftree-pre makes a branch of a choice by sign, which AVX2 cannot mask.
#if defined(__GNUC__) && !defined(__clang__)
#define FASTMOE_VECTORIZED gnu::flatten, gnu::optimize("tree-vectorize", "vect-cost-model=dynamic", "no-tree-pre")
#else
#define FASTMOE_VECTORIZED gnu::flatten
#endif
#if defined(__clang__)
#define FASTMOE_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#else
#define FASTMOE_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512"
#endif
    // flatten pulls the functor and all that it calls into the loop, where the wider instructions are allowed.
#if defined(FASTMOE_LIFT) && FASTMOE_X86_DISPATCH
    template <class Body>
    [[FASTMOE_VECTORIZED, gnu::target("avx2,fma,f16c")]] static void loop_avx2(const Body& body, int64_t begin, int64_t end)
    {
        for (int64_t i = begin; i < end; ++i) body(i);
    }
    template <class Body>
    [[FASTMOE_VECTORIZED, gnu::target(FASTMOE_AVX512)]] static void loop_avx512(const Body& body, int64_t begin, int64_t end)
    {
        for (int64_t i = begin; i < end; ++i) body(i);
    }
#elif defined(FASTMOE_LIFT)
    template <class Body>
    [[FASTMOE_VECTORIZED]] static void loop_vectorized(const Body& body, int64_t begin, int64_t end)
    {
        for (int64_t i = begin; i < end; ++i) body(i);
    }
#endif

    template <class F, class Body>
    void lift(const Body& body, int64_t begin, int64_t end) const
    {
#if defined(FASTMOE_LIFT)
        if constexpr (vectorized_functor<F>) {
#if FASTMOE_X86_DISPATCH
            if (best_ >= instruction_set::avx512) return loop_avx512(body, begin, end);
            if (best_ >= instruction_set::avx2) return loop_avx2(body, begin, end);
#else
            return loop_vectorized(body, begin, end);
#endif
        }
#endif
        loop(body, begin, end);
    }
#undef FASTMOE_LIFT
#undef FASTMOE_VECTORIZED
#undef FASTMOE_AVX512

    void start()
    {
        int w = 1;
        const auto start_all = [&] {
            workers_ = std::make_unique<std::thread[]>(static_cast<std::size_t>(threads_ - 1));
            for (; w < threads_; ++w) workers_[w - 1] = std::thread([this, w] { serve(w); });
        };
#if defined(__cpp_exceptions)
        try {
            start_all();
        } catch (const std::exception& e) {
            stop();
            expects<error>(false, "threads", threads_, "no more than can be started: ", w, " (", e.what(), ")");
        }
#else
        start_all();
#endif
    }
    /// Ends the workers that there are, and frees the scratch.
    void stop() noexcept
    {
        {
            std::lock_guard lock(mutex_);
            stopping_ = true;
        }
        wake_.notify_all();
        for (int w = 1; workers_ && w < threads_; ++w)
            if (workers_[w - 1].joinable()) workers_[w - 1].join();
        heap_.deallocate(scratch_, threads_ * team_scratch_bytes);
    }

    /// While it lives, the calling thread is at work in a loop of this executor.
    struct at_work {
        std::uint64_t outer;
        explicit at_work(std::uint64_t number) noexcept : outer(innermost_) { innermost_ = number; }
        at_work(const at_work&) = delete;
        at_work& operator=(const at_work&) = delete;
        ~at_work() { innermost_ = outer; }
    };

    void run(int64_t n, task_function function, const void* context)
    {
        if (n <= 0) return;
        expects(number_ > innermost_, "a parallel loop", "started inside of another",
                "the outer one to have ended, or an executor that was made after the outer one's");
        const at_work mark(number_);
        std::unique_lock turn(turn_); // one parallel loop at a time
        if (n == 1 || threads_ == 1) {
            for (int64_t t = 0; t < n; ++t) function(context, 0, t);
            return;
        }
        job work;
        work.function = function;
        work.context = context;
        work.tasks = n;
        {
            std::lock_guard lock(mutex_);
            current_ = &work;
            ++epoch_;
        }
        wake_.notify_all();
        take_tasks(work, 0);
        std::unique_lock lock(mutex_);
        current_ = nullptr; // a worker that wakes from here on finds nothing to do
        idle_.wait(lock, [this] { return busy_ == 0; });
        if (work.failure) std::rethrow_exception(work.failure);
    }

    void take_tasks(job& work, int worker)
    {
        const auto step = [&] {
            for (int64_t t; (t = work.next.fetch_add(1, std::memory_order_relaxed)) < work.tasks;)
                work.function(work.context, worker, t);
        };
#if defined(__cpp_exceptions)
        try {
            step();
        } catch (...) {
            work.next.store(work.tasks, std::memory_order_relaxed);
            std::lock_guard lock(mutex_);
            if (!work.failure) work.failure = std::current_exception();
        }
#else
        step();
#endif
    }

    void serve(int worker)
    {
        const at_work mark(number_);
        std::unique_lock lock(mutex_);
        for (std::uint64_t seen = 0;;) {
            wake_.wait(lock, [&] { return stopping_ || (current_ && epoch_ != seen); });
            if (stopping_) return;
            seen = epoch_;
            job& work = *current_;
            ++busy_;
            lock.unlock();
            take_tasks(work, worker);
            lock.lock();
            if (--busy_ == 0) idle_.notify_one();
        }
    }

    static inline std::atomic<std::uint64_t> made_{0};
    /// The number of the executor in whose loop the thread is at work; 0: in none. Of loops inside of loops it is the
    /// largest, so that it alone has to be compared.
    static inline thread_local std::uint64_t innermost_ = 0;

    host_memory heap_;
    const std::uint64_t number_ = 1 + made_.fetch_add(1, std::memory_order_relaxed); ///< by order of construction
    instruction_set best_;
    memory_resource* memory_;
    int threads_ = 1;
    std::byte* scratch_ = nullptr; // team_scratch_bytes a thread
    std::unique_ptr<std::thread[]> workers_;
    host_faults faults_;

    std::mutex turn_; // held by the caller whose loop runs
    std::mutex mutex_; // guards what follows
    std::condition_variable wake_, idle_;
    job* current_ = nullptr;
    std::uint64_t epoch_ = 0;
    int busy_ = 0;
    bool stopping_ = false;
};

static_assert(executor<host_executor>);

} // namespace fastmoe::inline FASTMOE_ABI
