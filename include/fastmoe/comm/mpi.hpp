// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A communicator over MPI: its ranks are processes. It needs an MPI library (component `mpi`), so it is included by name.
///
///     const fm::mpi_session session;                 // first of all in main
///     const fm::mpi& c = session.world();            // or: fm::mpi c(my_mpi_comm);
///     c.all_reduce(ex, gradients);
///
///     mpirun -np 4 --enable-recovery program
///
/// Only with --enable-recovery do the other ranks live on when one has died, so that they can say which; without it
/// Open MPI's launcher ends them all. With it, mpirun itself exits with 0 whatever the ranks do. Messages go from rank to
/// rank and are polled for, since a collective of MPI can neither time out nor tell who is missing. Each collective costs a
/// rank R-1 messages of 80 bytes, to which all_to_all_v adds 16 R and which carry small data; what is larger follows when all
/// have agreed.
///
/// Known limit: when a peer dies while a large message is on its way by TCP (nodes without a faster network), Open MPI 4.1.4
/// aborts the survivor, or locks up inside of MPI, where no deadline reaches. Shared memory has no such fault.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/comm/mpi_channel.hpp>
#include <fastmoe/comm/mpi_link.hpp>
#include <fastmoe/comm/mpi_mailbox.hpp>
#include <fastmoe/comm/mpi_steps.hpp>
#include <fastmoe/comm/post.hpp>
#include <fastmoe/exec/executor.hpp>

namespace fastmoe::inline FASTMOE_ABI {

struct mpi_options {
    /// How long ranks wait for one that does not come, or for the next GiB of what it sends; 1 ms to 11 days.
    std::chrono::milliseconds deadline{60000};
};

/// One of R ranks. Copies are the same rank; when the last copy is gone, the rank has left, and others that wait for it
/// throw. One call of a process at a time, from any thread if MPI was told MPI_THREAD_SERIALIZED or more.
///
/// Data are in memory of the host; `staged` serves executors with other memory, and unstaged<Executor> hands MPI their
/// pointers. A collective begins and ends with ex.synchronize(). Sums run in rank order, so all ranks get the same bits, which are
/// those of `threads`; they keep up to 4 MB of staging memory, or 16 KB a rank. Every call is a rendezvous of all ranks.
/// @throws comm_error from each collective, on all ranks, if ranks disagree about the collective, its element type, shape,
///         root or counts (nothing is written then, and the communicator can go on), if a rank has failed or left, or did
///         not come before the deadline (then every later call throws the same at once); invalid_argument on a rank whose
///         arguments break the contract by themselves. A rank that comes when the others have given it up may still complete
///         that collective, with what they had sent, and is told by its next call. If a rank was lost while data was on its
///         way, the error says messages_pending: memory that was sent and received must stay allocated, since a rank that
///         was only stopped may still send when it goes on. The library does so with memory of its own
class mpi {
    using steps = detail::mpi_steps;

public:
    /// All ranks of `comm`, which is duplicated; it stays the caller's. The last copy goes before MPI_Finalize, which will
    /// hang after a comm_error: then end the process without it.
    /// @throws comm_error unless all its ranks do so before the deadline
    explicit mpi(MPI_Comm comm, mpi_options options = {})
        : own_(steps::whole(std::make_shared<detail::mpi_link>(comm, options.deadline)))
    {}

    int rank() const noexcept { return own_->rank(); }
    int size() const noexcept { return own_->size(); }
    /// Whether MPI says that it reaches memory of CUDA devices, so that collectives which do not add take unstaged<Executor>.
    static bool reaches_devices() noexcept { return detail::mpi_reaches_devices(); }

    template <executor Executor, class T>
    void all_reduce(Executor& ex, vector_view<T> values) const // (N)
    {
        T* own = values.data_handle();
        const int64_t n = values.extent(0);
        const auto mine = steps::post_of<T>("all_reduce", "values (N)", n);
        const auto verify = [&] { expects_shape(values, "values (N)", n); };
        if (own_->is_small<T>(mine, n)) { // all to all, and everybody adds
            const auto staging = [&] { return own_->stacked<T>(n); };
            own_->move<T>(
                ex, mine, verify, [&](int r) { return own_->both(own, n, staging() + r * n, n); },
                [&] { own_->add<T>(ex, staging(), n, own, own, n); });
            return;
        }
        const detail::rank_shares s(n, size());
        own_->in_steps<T>(ex, mine, verify, [&] {
            own_->add_shares<T>(ex, mine.verb, s, own, own + s.begin(rank()));
            own_->pass_shares<T>(mine.verb, s, own, -1);
        });
    }

    template <executor Executor, class T>
    void reduce_scatter(Executor& ex, type_identity_t<vector_view<const T>> sent, vector_view<T> received) const
    {
        const int64_t n = received.extent(0);
        const T* from = sent.data_handle();
        T* to = received.data_handle();
        const auto mine = steps::post_of<T>("reduce_scatter", "received (N)", n);
        const auto verify = [&] {
            expects_shape(received, "received (N)", n);
            expects_shape(sent, "sent (R*N)", size() * n);
        };
        if (own_->is_small<T>(mine, n)) {
            const auto staging = [&] { return own_->stacked<T>(n); };
            own_->move<T>(
                ex, mine, verify, [&](int r) { return own_->both(from + r * n, n, staging() + r * n, n); },
                [&] { own_->add<T>(ex, staging(), n, from + rank() * n, to, n); });
            return;
        }
        own_->in_steps<T>(ex, mine, verify, [&] {
            own_->add_shares<T>(ex, mine.verb, detail::rank_shares(size() * n, size()), from, to);
        });
    }

    template <executor Executor, class T>
    void all_gather(Executor& ex, type_identity_t<vector_view<const T>> sent, vector_view<T> received) const
    {
        const int64_t n = sent.extent(0);
        const T* from = sent.data_handle();
        T* to = received.data_handle();
        own_->move<T>(
            ex, steps::post_of<T>("all_gather", "sent (N)", n),
            [&] {
                expects_shape(sent, "sent (N)", n);
                expects_shape(received, "received (R*N)", size() * n);
            },
            [&](int r) { return own_->both(from, n, to + r * n, n); },
            [&] { own_->copy<T>(ex, from, n, to + rank() * n); });
    }

    template <executor Executor, class T>
    void all_to_all(Executor& ex, type_identity_t<vector_view<const T>> sent, vector_view<T> received) const
    {
        const int64_t n = sent.extent(0) / size();
        const T* from = sent.data_handle();
        T* to = received.data_handle();
        own_->move<T>(
            ex, steps::post_of<T>("all_to_all", "a block of sent (R*N)", n),
            [&] {
                expects_shape(sent, "sent (R*N)", size() * n);
                expects_shape(received, "received (R*N)", size() * n);
            },
            [&](int r) { return own_->both(from + r * n, n, to + r * n, n); },
            [&] { own_->copy<T>(ex, from + rank() * n, n, to + rank() * n); });
    }

    /// Rows of `received` past the counts stay as they are.                             // (N,D), (R), (M,D), (R)
    template <executor Executor, class T>
    void all_to_all_v(Executor& ex, type_identity_t<matrix_view<const T>> sent, vector_view<const int64_t> sent_rows,
                      matrix_view<T> received, vector_view<const int64_t> received_rows) const
    {
        const int64_t width = sent.extent(1);
        auto mine = steps::post_of<T>("all_to_all_v", "the width D", width);
        mine.sent_rows = sent_rows.data_handle();
        mine.received_rows = received_rows.data_handle();
        const T *from = sent.data_handle(), *own_from = from;
        T *to = received.data_handle(), *own_to = to;
        own_->move<T>(
            ex, mine,
            [&] {
                expects_shape(sent, "sent (N,D)", sent.extent(0), width);
                expects_shape(received, "received (M,D)", received.extent(0), width);
                own_->expects_counts(sent_rows, "sent_rows (R)", sent.extent(0), "sent (N,D)");
                own_->expects_counts(received_rows, "received_rows (R)", received.extent(0), "received (M,D)");
            },
            [&](int r) {
                const int64_t out = sent_rows(r) * width, in = received_rows(r) * width;
                const auto m = own_->both(from, out, to, in);
                if (r == rank()) own_from = from, own_to = to;
                from += out;
                to += in;
                return m;
            },
            [&] { own_->copy<T>(ex, own_from, received_rows(rank()) * width, own_to); });
    }

    template <executor Executor, class T>
    void broadcast(Executor& ex, vector_view<T> values, int root) const // (N)
    {
        T* own = values.data_handle();
        const int64_t n = values.extent(0);
        auto mine = steps::post_of<T>("broadcast", "values (N)", n);
        mine.root = root;
        const auto verify = [&] {
            expects_shape(values, "values (N)", n);
            expects(root >= 0 && root < size(), "root", root, "a rank: 0 to ", size() - 1);
        };
        const auto from_root = [&](int r) { return own_->both(own, rank() == root ? n : 0, own, r == root ? n : 0); };
        if (size() == 2 || n * steps::element<T> <= steps::large_bytes)
            return own_->move<T>(ex, mine, verify, from_root, [] {});
        // A share to each rank, which passes it on: the root sends everything twice at most, and not R-1 times.
        const detail::rank_shares s(n, size());
        own_->in_steps<T>(ex, mine, verify, [&] {
            own_->every([&](int r) {
                const int64_t out = rank() == root ? s.count(r) : 0, in = r == root ? s.count(rank()) : 0;
                return own_->both(own + s.begin(r), out, own + s.begin(rank()), in);
            });
            own_->channel().exchange(mine.verb, 0, [] {});
            own_->pass_shares<T>(mine.verb, s, own, root);
        });
    }

    template <executor Executor>
    void barrier(Executor& ex) const
    {
        own_->move<std::byte>(
            ex, steps::post_of<std::byte>("barrier", "", 0), [] {}, [](int) { return detail::mpi_move{}; }, [] {});
    }

    /// The deadline is that of this communicator.
    /// @throws invalid_argument if color is negative
    mpi split(int color, int key) const
    {
        auto mine = steps::post_of<std::byte>("split", "", 0);
        mine.color = color;
        mine.key = key;
        detail::mpi_call here(own_->channel(), mine.verb);
        expects(color >= 0, "color", color, "zero or more");
        own_->channel().clear_moves();
        here.meet(mine);
        const int64_t number = own_->channel().free_number();
        auto& link = own_->channel().link();
        if (!link.has_tags(number)) raise<comm_error>("split: MPI has no more tags; there were too many communicators");
        link.took_number(number); // by all, so that all know the same
        std::vector<int> order;
        for (int r = 0; r < size(); ++r) {
            if (own_->channel().of(r).color != color) continue;
            auto at = order.end();
            while (at != order.begin() && own_->channel().of(at[-1]).key > own_->channel().of(r).key) --at;
            order.insert(at, r);
        }
        int place = 0;
        for (std::size_t i = 0; i < order.size(); ++i) {
            if (order[i] == rank()) place = static_cast<int>(i);
            order[i] = own_->channel().member(order[i]);
        }
        here.done();
        return mpi(std::make_shared<const detail::mpi_steps>(own_->link(), std::move(order), place, number));
    }

private:
    friend class mpi_session;

    explicit mpi(std::shared_ptr<const detail::mpi_steps> own) noexcept : own_(std::move(own)) {}

    std::shared_ptr<const detail::mpi_steps> own_;
};

/// MPI from its beginning to its end, first of all in main: initializes MPI unless that was done before, and finalizes it in
/// that case. The end waits, up to the deadline, for all ranks to come to theirs. If one does not, or a collective has thrown
/// comm_error because a rank was lost, MPI_Finalize would wait for it for ever: then it is left out, and the process ends
/// when main returns. A rank that throws tells the others only if the exception is caught: let main catch.
class mpi_session {
public:
    /// @throws comm_error if MPI cannot be called from more than one thread in turn, or not all ranks come in time
    explicit mpi_session(mpi_options options = {}) : world_(MPI_COMM_WORLD, options) {}
    mpi_session(const mpi_session&) = delete;
    mpi_session& operator=(const mpi_session&) = delete;
    ~mpi_session()
    {
        if (world_.own_->link()->close(&world_.own_->channel()) && start_.is_ours) MPI_Finalize();
    }

    /// All ranks. Calls throw once the session has ended.
    const mpi& world() const noexcept { return world_; }

private:
    struct start {
        bool is_ours;

        start()
        {
            int before = 0, level = MPI_THREAD_SERIALIZED;
            MPI_Initialized(&before);
            is_ours = !before;
            if (is_ours) MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &level);
            expects<comm_error>(level >= MPI_THREAD_SERIALIZED, "MPI's thread level", level,
                                "MPI_THREAD_SERIALIZED or more");
        }
    };

    start start_;
    mpi world_;
};

} // namespace fastmoe::inline FASTMOE_ABI
