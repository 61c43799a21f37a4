// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The life of a rank of NCCL: how it begins, is polled while it works, is given up when something fails, and ends.
/// Part of nccl_ranks.hpp.
#pragma once

#include <memory>
#include <string>

#include <fastmoe/comm/rendezvous.hpp>
#include <fastmoe/exec/executor.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// When a collective returns.
enum class nccl_completion : std::uint8_t {
    waited, ///< when its work is done: what failed is thrown by the call that failed
    queued, ///< when its work is queued: what failed is thrown by wait() or by a later call
};

/// A peer that fails, that asks for something else, or that does not come before the deadline makes this rank's call throw
/// comm_error and ends the communicator: NCCL's handle is aborted, and every later call throws. NCCL does not say which rank
/// it was, and neither can we. Who waits for queued work does so with wait(), since ex.synchronize() knows no deadline.
struct nccl_options {
    milliseconds deadline{60000}; ///< of each call; 1 ms to 11 days
    nccl_completion completion = nccl_completion::waited;
    int64_t sum_bytes = int64_t{64} << 20; ///< the most scratch that a sum of floating-point numbers takes (but R elements)
};

namespace detail {

struct fill_word {
    int32_t* word;
    FASTMOE_HOST_DEVICE void operator()(int64_t) const { *word = 1; }
};

/// What copies of a communicator share. Api is NCCL's verbs as static functions (see nccl_api in cuda/nccl.cuh).
template <class Api>
struct nccl_membership {
    using status = typename Api::status;

    typename Api::handle handle{};
    int rank = 0, ranks = 1;
    nccl_options options;

    nccl_membership(const typename Api::id& id, int r, int count, const nccl_options& o) : rank(r), ranks(count), options(o)
    {
        expects_rank(r, count, o.deadline);
        expects(o.sum_bytes >= 1, "options.sum_bytes", o.sum_bytes, "1 or more");
        begun("the start", Api::begin(handle, count, id, r));
    }
    /// A part of another one. Its ranks wait for each other.
    nccl_membership(nccl_membership& whole, int color, int key) : options(whole.options)
    {
        whole.expects_alive("split");
        const patience until(options.deadline);
        const status s = Api::split(whole.handle, color, key, handle);
        whole.settle("split", s, until); // only then is the new handle there
        begun("split", Api::ask(handle));
        const status placed = Api::place(handle, rank, ranks);
        if (!Api::succeeded(placed)) fail("split", Api::text(placed));
    }
    nccl_membership(const nccl_membership&) = delete;
    nccl_membership& operator=(const nccl_membership&) = delete;
    /// Ends in order with the others if they come before the deadline, and without them otherwise.
    ~nccl_membership()
    {
        if (!alive()) return;
        const patience until(options.deadline);
        status s = Api::finalize(handle);
        for (; Api::pending(s) && !until.over(); s = Api::ask(handle)) nap();
        if (Api::succeeded(s)) (void)Api::destroy(handle);
        else (void)Api::abort(handle);
    }

    bool alive() const noexcept { return failure_.empty(); }
    void expects_alive(const char* verb) const
    {
        if (alive()) return;
        std::string text = verb;
        text += ": this communicator has ended: ";
        text += failure_;
        raise<comm_error>(text);
    }

    /// Polls until NCCL has taken what it was asked; gives up if it reports a failure or the time is over.
    void settle(const char* verb, status s, const patience& until)
    {
        for (int tries = 0; Api::pending(s); ++tries) {
            if (until.over()) fail(verb, nullptr);
            rest(tries);
            s = Api::ask(handle);
        }
        if (!Api::succeeded(s)) fail(verb, Api::text(s));
    }

    /// Waits until the executor has nothing left to do, and looks after NCCL meanwhile.
    template <class Executor>
    void wait_for(Executor& ex, const char* verb, const patience& until)
    {
        for (int tries = 0;; ++tries) {
            const bool done = Api::idle(ex);
            const status s = Api::ask(handle);
            if (!Api::succeeded(s) && !Api::pending(s)) fail(verb, Api::text(s));
            if (done) return;
            if (until.over()) fail(verb, nullptr);
            rest(tries);
        }
    }

    /// Ends the communicator, on this rank, and throws.
    [[noreturn]] void fail(const char* verb, const char* reported)
    {
        std::string text = verb;
        text += " of rank " + std::to_string(rank);
        text += reported ? ": NCCL reports: " : ": no end within ";
        text += reported ? std::string(reported) : std::to_string(options.deadline.count()) + " ms: another rank has failed or did not come";
        failure_ = text;
        (void)Api::abort(handle);
        raise<comm_error>(text);
    }

private:
    /// The rank is ours to end only if all of this goes well.
    void begun(const char* verb, status s) { settle(verb, s, patience(options.deadline)); }

    /// Most calls take microseconds.
    static void rest(int tries)
    {
        if (tries < 1000) std::this_thread::yield();
        else std::this_thread::sleep_for(std::chrono::microseconds(50));
    }

    std::string failure_; ///< why it ended before its time
};

} // namespace detail

} // namespace fastmoe::inline FASTMOE_ABI
