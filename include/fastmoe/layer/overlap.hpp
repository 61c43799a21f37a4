// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Pieces of an exchange beside work: while one piece is worked on, the next comes in and the one before goes back. Part of
/// the layer.
#pragma once

#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>

#include <fastmoe/exec/executor.hpp>
#include <fastmoe/exec/start_thread.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// Gives an executor of its own for transfers, which may run at the same time.
template <class Executor>
concept has_executor_beside = requires(Executor& ex) {
    { ex.beside() } -> std::same_as<Executor>;
};

/// How far two threads are that wait for each other; one that fails takes the other along.
class piece_gate {
public:
    void advance(int& to, int value)
    {
        const std::lock_guard lock(mutex_);
        to = value;
        changed_.notify_all();
    }
    /// False if the other side has failed.
    bool wait(const int& what, int value)
    {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return what >= value || failed_; });
        return what >= value;
    }
    void fail()
    {
        const std::lock_guard lock(mutex_);
        failed_ = true;
        changed_.notify_all();
    }

    int came = 0, worked = 0;

private:
    std::mutex mutex_;
    std::condition_variable changed_;
    bool failed_ = false;
};

/// Throws comm_error if that says that messages are pending: whoever lent them memory must hear it, whatever else went wrong.
inline void raise_if_pending(const std::exception_ptr& failure)
{
#if defined(__cpp_exceptions)
    try {
        if (failure) std::rethrow_exception(failure);
    } catch (const comm_error& e) {
        if (e.messages_pending) throw;
    } catch (...) { // the caller has a failure of its own to tell
    }
#else
    static_cast<void>(failure);
#endif
}

/// For pieces 0 to n - 1: in(executor, i), work(executor, i), out(executor, i). Transfers run in one order on every rank:
/// in(0), in(1), out(0), in(2), out(1), and so on. Where the executor has another beside it, a thread of this call runs them
/// on that one while work() runs here; elsewhere they take turns.
template <class Executor, class In, class Work, class Out>
void overlap_pieces(Executor& ex, int n, const In& in, const Work& work, const Out& out)
{
    if constexpr (has_executor_beside<Executor>) {
        if (n > 1) {
            piece_gate gate;
            std::exception_ptr failure;
            const auto transfer = [&] {
                Executor other = ex.beside();
                in(other, 0);
                gate.advance(gate.came, 1);
                for (int i = 0; i < n; ++i) {
                    if (i + 1 < n) {
                        in(other, i + 1);
                        gate.advance(gate.came, i + 2);
                    }
                    if (!gate.wait(gate.worked, i + 1)) return;
                    out(other, i);
                }
            };
            struct joined {
                piece_gate& gate;
                std::thread thread;
                bool done = false;
                ~joined()
                {
                    if (!done) gate.fail();
                    thread.join();
                }
            };
            const auto beside = [&] {
                bool all = true;
                joined other{gate, start_thread("a thread for transfers", [&] {
#if defined(__cpp_exceptions)
                                 try {
                                     transfer();
                                 } catch (...) {
                                     failure = std::current_exception();
                                     gate.fail();
                                 }
#else
                                 transfer();
#endif
                             })};
                for (int i = 0; i < n && all; ++i) {
                    all = gate.wait(gate.came, i + 1);
                    if (all) work(ex, i);
                    if (all) gate.advance(gate.worked, i + 1);
                }
                other.done = all;
            };
#if defined(__cpp_exceptions)
            try {
                beside();
            } catch (...) {
                raise_if_pending(failure);
                throw;
            }
#else
            beside();
#endif
            if (failure) std::rethrow_exception(failure);
            return;
        }
    }
    for (int i = 0; i < n; ++i) {
        if (i == 0) in(ex, 0);
        if (i + 1 < n) in(ex, i + 1);
        work(ex, i);
        out(ex, i);
    }
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
