// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A communicator whose ranks are threads of one process: what runs on many machines can be tested on one.
///
///     fm::run_ranks(4, [](const fm::threads& c) {
///         fm::host_executor ex({.threads = 1});
///         c.all_reduce(ex, gradients[c.rank()]);
///     });
#pragma once

#include <exception>
#include <thread>
#include <type_traits>
#include <utility>

#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/comm/meeting.hpp>
#include <fastmoe/comm/rank_sums.hpp>
#include <fastmoe/comm/self.hpp>
#include <fastmoe/core/dtype.hpp>
#include <fastmoe/exec/start_thread.hpp>

namespace fastmoe::inline FASTMOE_ABI {

struct threads_options {
    std::chrono::milliseconds deadline{60000}; ///< how long ranks wait for one that does not come; 1 ms to 11 days
};

template <class Body>
void run_ranks(int ranks, const Body& body, threads_options options = {});

/// One of R ranks. Copies are the same rank; when the last copy is gone, the rank has left, and others that wait for it
/// throw. A communicator is used by one thread at a time.
///
/// Each rank may bring an executor of its own, if all reach each other's memory: CPU executors, or streams of one GPU. A
/// collective begins and ends with ex.synchronize(). Sums run in rank order, so all ranks get the same bits.
/// @throws comm_error from each collective, on all ranks, if ranks disagree about the collective, its element type, shape,
///         root or counts (nothing is written then, and the communicator can go on), if a rank has failed or left, or did
///         not come before the deadline (then every later call throws as well); invalid_argument on a rank whose arguments
///         break the contract by themselves
class threads {
public:
    int rank() const noexcept { return own_->rank; }
    int size() const noexcept { return own_->group->ranks(); }

    template <executor Executor, class T>
    void all_reduce(Executor& ex, vector_view<T> values) const // (N)
    {
        T* own = values.data_handle();
        meet<T>(ex, post_of<T>("all_reduce", "values (N)", values.extent(0), own, own),
                [&] { expects_shape(values, "values (N)", values.extent(0)); },
                [&] {
                    // A share of the elements each, for all: nobody else touches that share.
                    const int64_t n = values.extent(0), share = (n + size() - 1) / size();
                    const int64_t begin = rank() * share < n ? rank() * share : n, left = n - begin;
                    add<T>(ex, begin, left < share ? left : share, size(), [&](int r) {
                        return static_cast<T*>(at(r).received) + begin;
                    });
                });
    }

    template <executor Executor, class T>
    void reduce_scatter(Executor& ex, type_identity_t<vector_view<const T>> sent, vector_view<T> received) const
    {
        const int64_t n = received.extent(0);
        meet<T>(ex, post_of<T>("reduce_scatter", "received (N)", n, sent.data_handle(), received.data_handle()),
                [&] {
                    expects_shape(received, "received (N)", n);
                    expects_shape(sent, "sent (R*N)", size() * n);
                },
                [&] { add<T>(ex, rank() * n, n, 1, [&](int) { return received.data_handle(); }); });
    }

    template <executor Executor, class T>
    void all_gather(Executor& ex, type_identity_t<vector_view<const T>> sent, vector_view<T> received) const
    {
        const int64_t n = sent.extent(0);
        meet<T>(ex, post_of<T>("all_gather", "sent (N)", n, sent.data_handle(), received.data_handle()),
                [&] {
                    expects_shape(sent, "sent (N)", n);
                    expects_shape(received, "received (R*N)", size() * n);
                },
                [&] {
                    for (int r = 0; r < size(); ++r) copy<T>(ex, at(r).sent, 0, n, received.data_handle() + r * n);
                });
    }

    template <executor Executor, class T>
    void all_to_all(Executor& ex, type_identity_t<vector_view<const T>> sent, vector_view<T> received) const
    {
        const int64_t n = sent.extent(0) / size();
        meet<T>(ex, post_of<T>("all_to_all", "a block of sent (R*N)", n, sent.data_handle(), received.data_handle()),
                [&] {
                    expects_shape(sent, "sent (R*N)", size() * n);
                    expects_shape(received, "received (R*N)", size() * n);
                },
                [&] {
                    for (int r = 0; r < size(); ++r) copy<T>(ex, at(r).sent, rank() * n, n, received.data_handle() + r * n);
                });
    }

    /// Rows of `received` past the counts stay as they are.                             // (N,D), (R), (M,D), (R)
    template <executor Executor, class T>
    void all_to_all_v(Executor& ex, type_identity_t<matrix_view<const T>> sent, vector_view<const int64_t> sent_rows,
                      matrix_view<T> received, vector_view<const int64_t> received_rows) const
    {
        const int64_t width = sent.extent(1);
        detail::post mine = post_of<T>("all_to_all_v", "the width D", width, sent.data_handle(), received.data_handle());
        mine.sent_rows = sent_rows.data_handle();
        mine.received_rows = received_rows.data_handle();
        meet<T>(ex, mine,
                [&] {
                    expects_shape(sent, "sent (N,D)", sent.extent(0), width);
                    expects_shape(received, "received (M,D)", received.extent(0), width);
                    expects_counts(sent_rows, "sent_rows (R)", sent.extent(0), "sent (N,D)");
                    expects_counts(received_rows, "received_rows (R)", received.extent(0), "received (M,D)");
                },
                [&] {
                    T* to = received.data_handle();
                    for (int r = 0; r < size(); ++r) {
                        const int64_t rows = received_rows(r);
                        int64_t before = 0;
                        for (int other = 0; other < rank(); ++other) before += at(r).sent_rows[other];
                        copy<T>(ex, at(r).sent, before * width, rows * width, to);
                        to += rows * width;
                    }
                });
    }

    template <executor Executor, class T>
    void broadcast(Executor& ex, vector_view<T> values, int root) const // (N)
    {
        T* own = values.data_handle();
        detail::post mine = post_of<T>("broadcast", "values (N)", values.extent(0), own, own);
        mine.root = root;
        meet<T>(ex, mine,
                [&] {
                    expects_shape(values, "values (N)", values.extent(0));
                    expects(root >= 0 && root < size(), "root", root, "a rank: 0 to ", size() - 1);
                },
                [&] { copy<T>(ex, at(root).sent, 0, values.extent(0), own); });
    }

    template <executor Executor>
    void barrier(Executor& ex) const
    {
        meet<std::byte>(ex, post_of<std::byte>("barrier", "", 0, nullptr, nullptr), [] {}, [] {});
    }

    /// The deadline is that of this communicator.
    /// @throws invalid_argument if color is negative
    threads split(int color, int key) const
    {
        detail::presence here(*own_->group, rank(), "split");
        expects(color >= 0, "color", color, "zero or more");
        detail::post mine;
        mine.verb = "split";
        mine.color = color;
        mine.key = key;
        here.arrive(mine);
        auto child = std::make_shared<membership>(own_->group->child(rank()), own_->group->place(rank()));
        here.depart();
        return threads(std::move(child));
    }

private:
    template <class Body>
    friend void run_ranks(int ranks, const Body& body, threads_options options);

    struct membership {
        std::shared_ptr<detail::meeting> group;
        int rank;

        membership(std::shared_ptr<detail::meeting> g, int r) noexcept : group(std::move(g)), rank(r) {}
        membership(const membership&) = delete;
        membership& operator=(const membership&) = delete;
        ~membership() { group->leave(rank); }
    };

    explicit threads(std::shared_ptr<const membership> own) noexcept : own_(std::move(own)) {}

    const detail::post& at(int r) const noexcept { return own_->group->of(r); }

    template <class T>
    static detail::post post_of(const char* verb, const char* shape, int64_t count, const T* sent, T* received) noexcept
    {
        detail::post p;
        p.verb = verb;
        p.type = dtype_name<T> ? dtype_name<T> : "byte";
        p.shape = shape;
        p.count = count;
        p.sent = sent;
        p.received = received;
        return p;
    }

    /// Checks what is this rank's alone, meets the others, moves, and waits until all have.
    template <class T, class Executor, class Check, class Move>
    void meet(Executor& ex, const detail::post& mine, const Check& verify, const Move& move) const
    {
        static_assert(dtype_name<T> != nullptr || std::is_same_v<T, std::byte>, "an element type of communicator.hpp");
        detail::presence here(*own_->group, rank(), mine.verb);
        verify();
        ex.synchronize(); // what is sent has been written
        here.arrive(mine);
        move();
        ex.synchronize(); // what others sent has been read
        here.depart();
    }

    template <class T, class Executor>
    void copy(Executor& ex, const void* from, int64_t first, int64_t count, T* to) const
    {
        const T* source = static_cast<const T*>(from) + (count > 0 ? first : 0);
        if (source != to) fastmoe::for_each(ex, count, detail::copy_elements<T>{source, to});
    }

    /// Elements [begin, begin + count) of what the ranks sent, added, to `copies` places.
    template <class T, class Executor, class Place>
    void add(Executor& ex, int64_t begin, int64_t count, int copies, const Place& place) const
    {
        static_assert(!std::is_same_v<T, std::byte>, "bytes have no sum");
        if (count <= 0) return;
        detail::sum_rank_blocks<T> f{};
        f.ranks = size();
        f.copies = copies;
        f.count = count;
        for (int r = 0; r < size(); ++r) f.from[r] = static_cast<const T*>(at(r).sent) + begin;
        for (int r = 0; r < copies; ++r) f.to[r] = place(r);
        fastmoe::for_each_row(ex, (count + f.size - 1) / f.size, f,
                              {.width = f.size * size(), .scratch_bytes = f.scratch_bytes});
    }

    void expects_counts(vector_view<const int64_t> rows, const char* name, int64_t available, const char* matrix) const
    {
        expects_shape(rows, name, size());
        int64_t left = available;
        for (int r = 0; r < size(); ++r) {
            expects(rows(r) >= 0 && rows(r) <= left, name, rows(r), "counts from 0 on whose sum is at most the ", available,
                    " rows of ", matrix);
            left -= rows(r);
        }
    }

    std::shared_ptr<const membership> own_;
};

/// Runs body(communicator) on R threads, one a rank, and returns when all have ended. If any throws, the first exception
/// is rethrown then; a comm_error only if there is no other, since most are the echo of another's failure.
/// @throws invalid_argument if ranks is not 1 to 64 or the deadline makes no sense; error if the system does not start as
///         many threads, once those that it has started have ended: for them the others have left
template <class Body>
void run_ranks(int ranks, const Body& body, threads_options options)
{
    const int64_t wait = options.deadline.count();
    expects(ranks >= 1 && ranks <= detail::most_ranks, "ranks", ranks, "1 to ", detail::most_ranks);
    expects(wait >= 1 && wait <= 950400000, "options.deadline", wait, "1 to 950400000 ms");
    const auto group = std::make_shared<detail::meeting>(ranks, options.deadline);
    [[maybe_unused]] std::mutex mutex;
    std::exception_ptr failure, echo; // guarded by mutex
    const auto run = [&](int rank) {
        // The rank leaves when its body ends, however it does.
        const threads c(std::make_shared<threads::membership>(group, rank));
#if defined(__cpp_exceptions)
        try {
            body(c);
        } catch (const comm_error&) {
            std::lock_guard lock(mutex);
            if (!echo) echo = std::current_exception();
        } catch (...) {
            std::lock_guard lock(mutex);
            if (!failure) failure = std::current_exception();
        }
#else
        body(c);
#endif
    };
    {
        struct joined {
            detail::meeting& group;
            std::unique_ptr<std::thread[]> all;
            int count;
            ~joined()
            {
                for (int r = count; r < group.ranks(); ++r) group.leave(r); // threads that could not be had
                for (int r = 0; r < count; ++r) all[r].join();
            }
        } started{*group, std::make_unique<std::thread[]>(static_cast<std::size_t>(ranks)), 0};
        for (; started.count < ranks; ++started.count) {
            const int rank = started.count;
            started.all[rank] = detail::start_thread("the thread of a rank", [&run, rank] { run(rank); });
        }
    }
    if (failure) std::rethrow_exception(failure);
    if (echo) std::rethrow_exception(echo);
}

} // namespace fastmoe::inline FASTMOE_ABI
