// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the collectives of `mpi` are made of: a meeting of all ranks, then moves between them and sums of what has come.
/// Part of mpi.hpp.
#pragma once

#include <cstddef>
#include <cstring>
#include <exception>
#include <memory>
#include <string_view>
#include <type_traits>
#include <utility>

#include <fastmoe/comm/device_memory.hpp>
#include <fastmoe/comm/mpi_channel.hpp>
#include <fastmoe/comm/rank_sums.hpp>
#include <fastmoe/comm/self.hpp>
#include <fastmoe/core/dtype.hpp>
#include <fastmoe/exec/executor.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Whether MPI can read and write the executor's memory where it lies. Specialize it for an executor whose memory is host
/// memory though it is not readable_memory. What is in the memory of a device is for `staged`, or, if MPI reaches it, for
/// unstaged<Executor>.
template <class Executor>
inline constexpr bool reached_by_mpi = has_readable_memory<Executor>;

namespace detail {

/// A collective whose data MPI moves between devices: none of them with the heads, which the host writes. It has a name of
/// its own, so that a rank whose data are on the host disagrees.
inline void keep_from_host(post& mine) noexcept
{
    mine.on_device = true;
    static constexpr const char* names[][2] = {{"all_gather", "device gather"},
                                               {"all_to_all", "device all2all"},
                                               {"all_to_all_v", "device rows"},
                                               {"broadcast", "device bcast"}};
    for (const auto& [name, other] : names)
        if (std::string_view(mine.verb) == name) mine.verb = other;
}

/// `total` elements in R shares, which differ where R does not divide.
struct rank_shares {
    int64_t total, share;

    rank_shares(int64_t n, int ranks) noexcept : total(n), share((n + ranks - 1) / ranks) {}
    int64_t begin(int r) const noexcept { return r * share < total ? r * share : total; }
    int64_t count(int r) const noexcept { return begin(r + 1) - begin(r); }
};

/// One rank of one communicator. It leaves when it ends.
class mpi_steps {
public:
    /// @param members  ranks of the link, in the order of this communicator's        // (R)
    mpi_steps(std::shared_ptr<mpi_link> link, std::vector<int> members, int rank, int64_t number)
        : link_(std::move(link)), channel_(std::make_unique<mpi_channel>(*link_, std::move(members), rank, number))
    {}
    mpi_steps(const mpi_steps&) = delete;
    mpi_steps& operator=(const mpi_steps&) = delete;
    ~mpi_steps() { link_->retire(std::move(channel_)); }

    /// All ranks of a link.
    static std::shared_ptr<const mpi_steps> whole(std::shared_ptr<mpi_link> link)
    {
        std::vector<int> members(static_cast<std::size_t>(link->size()));
        for (std::size_t r = 0; r < members.size(); ++r) members[r] = static_cast<int>(r);
        const int rank = link->rank();
        link->took_number(0);
        return std::make_shared<const mpi_steps>(std::move(link), std::move(members), rank, 0);
    }

    int rank() const noexcept { return channel_->rank(); }
    int size() const noexcept { return channel_->size(); }
    mpi_channel& channel() const noexcept { return *channel_; }
    const std::shared_ptr<mpi_link>& link() const noexcept { return link_; }

    /// From so many bytes on, a second step costs less than a busy root.
    static constexpr int64_t large_bytes = int64_t{1} << 16;
    /// What sums are staged in, in bytes of all ranks, and at least of one.
    static constexpr int64_t staging_bytes = int64_t{1} << 22, least_staging_bytes = int64_t{1} << 14;
    template <class T>
    static constexpr int64_t element = static_cast<int64_t>(sizeof(T));

    template <class T>
    static post post_of(const char* verb, const char* shape, int64_t count) noexcept
    {
        static_assert(dtype_name<T> != nullptr || std::is_same_v<T, std::byte>, "an element type of communicator.hpp");
        post p;
        p.verb = verb;
        p.type = dtype_name<T> ? dtype_name<T> : "byte";
        p.shape = shape;
        p.count = count;
        return p;
    }

    template <class T>
    bool is_small(const post& mine, int64_t n) const noexcept
    {
        return n * element<T> <= channel_->room(mine);
    }

    template <class T>
    static mpi_move both(const T* from, int64_t out, T* to, int64_t in) noexcept
    {
        return {from, out * element<T>, to, in * element<T>};
    }

    template <class Move>
    void every(const Move& of) const
    {
        for (int r = 0; r < size(); ++r) channel_->move(r) = of(r);
    }

    /// Checks what is this rank's alone, meets the others, moves of(r) to and from every other rank r, and calls own().
    template <class T, class Executor, class Verify, class Move, class Own>
    void move(Executor& ex, post mine, const Verify& verify, const Move& of, const Own& own) const
    {
        if constexpr (is_unstaged<Executor>) keep_from_host(mine);
        run(
            ex, mine, verify, [&] { every(of); }, [&] { channel_->exchange(mine.verb, channel_->room(mine), own); });
    }

    /// The same, with several exchanges once all have met.
    template <class T, class Executor, class Verify, class Steps>
    void in_steps(Executor& ex, post mine, const Verify& verify, const Steps& steps) const
    {
        if constexpr (is_unstaged<Executor>) keep_from_host(mine);
        run(
            ex, mine, verify, [&] { channel_->clear_moves(); }, steps);
    }

    template <class Executor, class Verify, class Prepare, class Steps>
    void run(Executor& ex, const post& mine, const Verify& verify, const Prepare& prepare, const Steps& steps) const
    {
        static_assert(reached_by_mpi<Executor> || is_unstaged<Executor>,
                      "mpi moves host memory only: see comm/staged.hpp, and reached_by_mpi<Executor> in comm/mpi_steps.hpp");
        mpi_call here(*channel_, mine.verb);
        verify();
        ex.synchronize(); // what is sent has been written
        prepare();
        here.meet(mine);
        finish(mine.verb, [&] {
            steps();
            ex.synchronize();
        });
        here.done();
    }

    template <class T, class Executor>
    static void copy(Executor& ex, const T* from, int64_t count, T* to)
    {
        if (from == to || count == 0) return;
        if constexpr (is_unstaged<Executor>) queue_copy<T>(ex, from, count, to);
        else if (count * element<T> <= large_bytes)
            std::memcpy(to, from, static_cast<std::size_t>(count * element<T>));
        else
            fastmoe::for_each(ex, count, copy_elements<T>{from, to});
    }

    /// Staging memory for so many elements of every rank.                                       // (R,n)
    template <class T>
    T* stacked(int64_t n) const
    {
        return reinterpret_cast<T*>(channel_->link().staging(size() * n * element<T>));
    }

    /// Adds what the ranks sent, in rank order: block r at staging + r * stride, that of this rank at own.
    template <class T, class Executor>
    void add(Executor& ex, const T* staging, int64_t stride, const T* own, T* to, int64_t count) const
    {
        static_assert(!std::is_same_v<T, std::byte>, "bytes have no sum");
        static_assert(!is_unstaged<Executor>, "mpi adds in host memory only: see comm/staged.hpp");
        const sum_stacked_blocks<T> f{staging, own, to, rank(), size(), stride, count};
        fastmoe::for_each_row(ex, (count + f.size - 1) / f.size, f,
                              {.width = f.size * size(), .scratch_bytes = f.scratch_bytes});
    }

    /// Share r of `from` goes to rank r, which adds what it gets; as much at a time as the staging memory holds.
    template <class T, class Executor>
    void add_shares(Executor& ex, const char* verb, const rank_shares& s, const T* from, T* to) const
    {
        int64_t piece = staging_bytes / size() > least_staging_bytes ? staging_bytes / size() : least_staging_bytes;
        piece /= element<T>;
        if (piece > s.share) piece = s.share;
        T* staging = stacked<T>(piece);
        for (int64_t first = 0; first < s.share; first += piece) {
            const auto count = [&](int r) {
                const int64_t left = s.count(r) - first;
                return left < 0 ? 0 : (left < piece ? left : piece);
            };
            const int64_t own = count(rank());
            every([&](int r) {
                return both(from + s.begin(r) + (count(r) > 0 ? first : 0), count(r), staging + r * piece, own);
            });
            channel_->exchange(verb, 0, [] {});
            if (own > 0) add<T>(ex, staging, piece, from + s.begin(rank()) + first, to + first, own);
        }
    }

    /// Every rank gets share r of `values` from rank r; who `has_all` already gets nothing.
    template <class T>
    void pass_shares(const char* verb, const rank_shares& s, T* values, int has_all) const
    {
        every([&](int r) {
            const int64_t out = r == has_all ? 0 : s.count(rank()), in = rank() == has_all ? 0 : s.count(r);
            return both(values + s.begin(rank()), out, values + s.begin(r), in);
        });
        channel_->exchange(verb, 0, [] {});
    }

    void expects_counts(vector_view<const int64_t> rows, const char* name, int64_t available, const char* matrix) const
    {
        expects_shape(rows, name, size());
        int64_t left = available;
        for (int r = 0; r < size(); ++r) {
            expects(rows(r) >= 0 && rows(r) <= left, name, rows(r), "counts from 0 on whose sum is at most the ",
                    available, " rows of ", matrix);
            left -= rows(r);
        }
    }

private:
    /// f(). What it throws while messages are on their way becomes a comm_error that says so.
    template <class F>
    void finish(const char* verb, const F& f) const
    {
#if defined(__cpp_exceptions)
        const auto fail = [&](const char* why) {
            channel_->fail(verb, true);
            if (channel_->moves_pending())
                raise<comm_error>(std::string(verb) + ": this rank failed: " + why, location::current(), true);
        };
        try {
            f();
        } catch (const comm_error&) {
            throw;
        } catch (const std::exception& e) {
            fail(e.what());
            throw;
        } catch (...) {
            fail("an exception that is no std::exception");
            throw;
        }
#else
        static_cast<void>(verb);
        f();
#endif
    }

    std::shared_ptr<mpi_link> link_;
    std::unique_ptr<mpi_channel> channel_;
};

} // namespace detail
} // namespace fastmoe::inline FASTMOE_ABI
