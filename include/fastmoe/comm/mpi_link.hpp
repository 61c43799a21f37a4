// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// One MPI communicator of our own, which all communicators that are split from it share, and polling under a deadline.
/// Part of mpi.hpp.
#pragma once

#if !defined(OMPI_SKIP_MPICXX)
#define OMPI_SKIP_MPICXX 1 // MPI's former C++ interface: not used, and slow to compile
#endif
#if !defined(MPICH_SKIP_MPICXX)
#define MPICH_SKIP_MPICXX 1
#endif
#include <mpi.h>
#if defined(OPEN_MPI) && __has_include(<mpi-ext.h>)
#include <mpi-ext.h> // MPIX_Query_cuda_support
#endif

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <fastmoe/core/error.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// What MPI says of an error.
inline std::string mpi_text(int code)
{
    char text[MPI_MAX_ERROR_STRING] = {};
    int length = 0;
    return MPI_Error_string(code, text, &length) == MPI_SUCCESS ? text : "error " + std::to_string(code);
}

/// Whether the MPI that runs says that it sends from and receives into memory of CUDA devices. False where it cannot be asked.
inline bool mpi_reaches_devices() noexcept
{
#if defined(MPIX_CUDA_AWARE_SUPPORT)
    return MPIX_Query_cuda_support() == 1;
#else
    return false;
#endif
}

/// The ranks of a caller's communicator, duplicated. A communicator of ours is a number here, which becomes the tags of its
/// messages: to split needs nothing of MPI that could wait for a rank that is dead.
class mpi_link {
public:
    using clock = std::chrono::steady_clock;

    /// A communicator that is going, or has gone and waits for its peers to do so.
    struct tenant {
        virtual ~tenant() = default;
        /// Says so to its peers, once.
        virtual void leave() noexcept = 0;
        /// Whether every peer has left or failed. Polls; does not wait and does not throw.
        virtual bool ended() noexcept = 0;
    };

    /// @throws comm_error if not all ranks of `of` come before the deadline
    mpi_link(MPI_Comm of, std::chrono::milliseconds deadline) : deadline_(deadline)
    {
        const int64_t wait = deadline.count();
        expects(wait >= 1 && wait <= 950400000, "options.deadline", wait, "1 to 950400000 ms");
        int initialized = 0, is_inter = 1;
        MPI_Initialized(&initialized);
        expects(initialized && !is_finalized(), "MPI", "not running", "MPI_Init to come before, and MPI_Finalize after");
        expects(of != MPI_COMM_NULL, "comm", "MPI_COMM_NULL", "an intracommunicator");
        MPI_Comm_test_inter(of, &is_inter);
        expects(!is_inter, "comm", "an intercommunicator", "an intracommunicator");
        auto copy = std::make_unique<MPI_Comm>(MPI_COMM_NULL);
        MPI_Request request = MPI_REQUEST_NULL;
        int code = MPI_Comm_idup(of, copy.get(), &request), done = 0;
        const bool came = poll(
            manner::resting, 0,
            [&] {
                if (code == MPI_SUCCESS) code = MPI_Test(&request, &done, MPI_STATUS_IGNORE);
                return done != 0 || code != MPI_SUCCESS;
            },
            [] {});
        if (!came) {
            static_cast<void>(copy.release()); // MPI may still write to it
            raise<comm_error>("mpi: not all ranks came within " + std::to_string(wait) + " ms to make a communicator");
        }
        if (code != MPI_SUCCESS) raise<comm_error>("mpi: MPI_Comm_idup: " + mpi_text(code));
        comm_ = *copy;
        MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
        MPI_Comm_rank(comm_, &rank_);
        MPI_Comm_size(comm_, &size_);
        int found = 0;
        void* bound = nullptr;
        MPI_Comm_get_attr(comm_, MPI_TAG_UB, &bound, &found);
        highest_tag_ = found ? *static_cast<int*>(bound) : 32767;
    }
    mpi_link(const mpi_link&) = delete;
    mpi_link& operator=(const mpi_link&) = delete;
    ~mpi_link()
    {
        close();
        if (is_finalized()) return;
        for (auto& t : lingering_) static_cast<void>(t.release()); // MPI may still write to it
        static_cast<void>(lingering_.empty() ? nullptr : staging_.release());
    }

    MPI_Comm comm() const noexcept { return comm_; }
    int rank() const noexcept { return rank_; }
    int size() const noexcept { return size_; }
    std::chrono::milliseconds deadline() const noexcept { return deadline_; }

    /// How to wait: for a rank that may compute for long, its processor's time is left to others after a while; MPI moves
    /// bulk only while it is polled.
    enum class manner : unsigned char { resting, busy };

    /// Polls ready() until it holds, or the deadline has passed since `progress` last changed; stalled() is called once,
    /// after half of that time.
    /// @returns whether ready() held
    template <class Ready, class Stalled>
    bool poll(manner how, const int64_t& progress, const Ready& ready, const Stalled& stalled) const
    {
        clock::time_point start{};
        int64_t seen = progress;
        bool told = false, rests = false;
        for (int64_t polls = 1; !ready(); ++polls) {
            if (polls % 64 != 0 && !rests) continue;
            const auto now = clock::now();
            if (start == clock::time_point{} || progress != seen) start = now;
            seen = progress;
            const auto waited = now - start;
            if (waited > deadline_) return ready();
            if (waited > deadline_ / 2 && !told) {
                told = true;
                stalled();
            }
            rests = how == manner::resting && waited > std::chrono::milliseconds(20);
            if (rests) std::this_thread::sleep_for(std::chrono::microseconds(20));
            else if (waited > std::chrono::milliseconds(1)) std::this_thread::yield();
        }
        return true;
    }

    /// The least number that no communicator of this rank has had, and what to do when one was taken.
    int64_t next_number() const noexcept { return next_number_; }
    void took_number(int64_t number) noexcept { next_number_ = number + 1; }
    /// Whether two tags can be made of a number.
    bool has_tags(int64_t number) const noexcept { return 2 * number + 1 <= highest_tag_; }

    /// One call at a time: MPI may be told no more than MPI_THREAD_SERIALIZED.
    /// @returns null, or the verb of the call that is not over
    const char* enter(const char* verb) noexcept
    {
        const char* other = nullptr;
        return busy_.compare_exchange_strong(other, verb, std::memory_order_acquire) ? nullptr : other;
    }
    void exit() noexcept { busy_.store(nullptr, std::memory_order_release); }

    /// A failure that this rank knows of: MPI_Finalize would wait for it for ever.
    void spoil() noexcept { whole_ = false; }
    bool whole() const noexcept { return whole_; }
    bool closed() const noexcept { return closed_; }

    /// Lets a communicator go, and keeps it until its peers have left as well, so that no message finds nobody. Once
    /// something has failed, MPI may still write to its memory: that is never given back.
    void retire(std::unique_ptr<tenant> t) noexcept
    {
        if (is_finalized() || (closed_ && t->ended())) return;
        lingering_.push_back(std::move(t));
        if (!closed_)
            in_turn([&] {
                lingering_.back()->leave();
                sweep();
            });
    }

    /// Waits for those that linger, and for `last`; then gives the communicator back.
    /// @returns whether every peer has come to this, too: only then may MPI be finalized
    bool close(tenant* last = nullptr) noexcept
    {
        if (closed_ || is_finalized()) return false;
        bool all = false;
        in_turn([&] {
            if (last) last->leave();
            closed_ = true;
            all = poll(manner::resting, 0, [&] { return (sweep() && (!last || last->ended())) || !whole_; }, [] {});
        });
        if (!all || !whole_) return whole_ = false;
        MPI_Comm_free(&comm_);
        return true;
    }

    /// At least so many bytes, the same for every call.
    std::byte* staging(int64_t bytes)
    {
        if (bytes > staging_bytes_) {
            staging_ = std::make_unique_for_overwrite<std::byte[]>(static_cast<std::size_t>(bytes));
            staging_bytes_ = bytes;
        }
        return staging_.get();
    }
    /// MPI may still write there, when a rank that was thought lost goes on: nobody else ever gets that memory.
    void abandon_staging() noexcept
    {
        (void)staging_.release();
        staging_bytes_ = 0;
    }

private:
    static bool is_finalized() noexcept
    {
        int finalized = 0;
        MPI_Finalized(&finalized);
        return finalized != 0;
    }

    /// Runs f when no call is under way.
    template <class F>
    void in_turn(const F& f) noexcept
    {
        while (enter("leave")) std::this_thread::yield();
        f();
        exit();
    }

    /// @returns whether none is left
    bool sweep() noexcept
    {
        for (std::size_t i = 0; i < lingering_.size();)
            if (lingering_[i]->ended())
                lingering_.erase(lingering_.begin() + static_cast<std::ptrdiff_t>(i));
            else
                ++i;
        return lingering_.empty();
    }

    const std::chrono::milliseconds deadline_;
    MPI_Comm comm_ = MPI_COMM_NULL;
    int rank_ = 0, size_ = 1, highest_tag_ = 0;
    int64_t next_number_ = 0;
    std::atomic<const char*> busy_{nullptr};
    bool whole_ = true, closed_ = false;
    std::vector<std::unique_ptr<tenant>> lingering_;
    std::unique_ptr<std::byte[]> staging_;
    int64_t staging_bytes_ = 0;
};

} // namespace fastmoe::inline FASTMOE_ABI::detail
