// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The communicator over NCCL's verbs: what is grouped, skipped, summed by ourselves, polled and given up. The verbs
/// themselves are a policy, so that all this is tested without NCCL. Part of cuda/nccl.cuh.
#pragma once

#include <utility>

#include <fastmoe/comm/nccl_membership.hpp>
#include <fastmoe/comm/rank_sums.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

/// to[i] = the sum over the ranks of their element i, in rank order, rounded once: what every communicator computes.
template <class T>
struct sum_received_blocks {
    using vectorized = void;
    using sum = typename rank_sum<T>::type;
    const T* blocks; // (R,stride)  that of this rank is not read
    const T* own;    // (n)         that of this rank
    T* to;           // (n)         may be own
    int rank, ranks;
    int64_t stride;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        sum total = static_cast<sum>(rank == 0 ? own[i] : blocks[i]);
        for (int r = 1; r < ranks; ++r) total += static_cast<sum>(r == rank ? own[i] : blocks[r * stride + i]);
        to[i] = static_cast<T>(total);
    }
};

} // namespace detail

/// One of R ranks. Copies are the same rank; the last one to go ends it. A communicator is used by one thread at a time, and
/// with one executor at a time. See nccl_options for when calls return, and what failure is.
///
/// Sums of integers are NCCL's. Those of floating-point numbers are made here, in rank order and rounded once, as every
/// communicator makes them: each rank gets its share of the elements from all others, adds, and hands the sum on. That moves
/// as many bytes as a ring does, and needs scratch of the executor for what is received, at most options.sum_bytes.
/// all_reduce_in_any_order() is NCCL's own, for those who would rather have its speed than the same bits for any R.
/// @throws comm_error from each call as nccl_options says; invalid_argument if arguments break the contract by themselves
template <class Api>
class nccl_ranks {
    using membership = detail::nccl_membership<Api>;
    using status = typename Api::status;

public:
    /// Called by all ranks. @param id  the same on all ranks: Api::fresh_id() of one of them
    nccl_ranks(const typename Api::id& id, int rank, int ranks, const nccl_options& options = {})
        : own_(std::make_shared<membership>(id, rank, ranks, options))
    {
    }

    int rank() const noexcept { return own_->rank; }
    int size() const noexcept { return own_->ranks; }
    typename Api::handle handle() const noexcept { return own_->handle; }

    template <executor Executor, class T>
    void all_reduce(Executor& ex, vector_view<T> values) const // (N)
    {
        expects_shape(values, "values (N)", values.extent(0));
        const detail::patience until(own_->options.deadline);
        T* all = values.data_handle();
        if constexpr (std::is_integral_v<T>) {
            if (values.extent(0) > 0) group("all_reduce", until, [&] { return Api::all_reduce(all, values.extent(0), own_->handle, ex); });
        } else {
            const int64_t most = piece<T>(1);
            buffer<T, Executor> blocks(ex, size() > 1 ? size() * share_of(least(most, values.extent(0))) : 0);
            for (int64_t at = 0; size() > 1 && at < values.extent(0); at += most)
                sum_piece<T>(ex, until, all + at, least(most, values.extent(0) - at), blocks.data());
        }
        finish(ex, "all_reduce", until);
    }

    /// The sum by NCCL, in an order of its own.                                             // (N)
    template <executor Executor, class T>
    void all_reduce_in_any_order(Executor& ex, vector_view<T> values) const
    {
        expects_shape(values, "values (N)", values.extent(0));
        const detail::patience until(own_->options.deadline);
        if (values.extent(0) > 0)
            group("all_reduce", until, [&] { return Api::all_reduce(values.data_handle(), values.extent(0), own_->handle, ex); });
        finish(ex, "all_reduce", until);
    }

    template <executor Executor, class T>
    void reduce_scatter(Executor& ex, type_identity_t<vector_view<const T>> sent, vector_view<T> received) const
    {
        const int64_t n = received.extent(0);
        expects_shape(received, "received (N)", n);
        expects_shape(sent, "sent (R*N)", size() * n);
        const detail::patience until(own_->options.deadline);
        const T* from = sent.data_handle();
        if constexpr (std::is_integral_v<T>) {
            if (n > 0) group("reduce_scatter", until, [&] { return Api::reduce_scatter(from, received.data_handle(), n, own_->handle, ex); });
        } else {
            const int64_t most = piece<T>(size());
            buffer<T, Executor> blocks(ex, n > 0 ? size() * least(most, n) : 0);
            for (int64_t at = 0; at < n; at += most) {
                const int64_t count = least(most, n - at);
                exchange<T>(ex, "reduce_scatter", until, [&](int r) { return block<const T>{from + r * n + at, count}; },
                            [&](int r) { return block<T>{blocks.data() + r * count, count}; });
                fastmoe::for_each(ex, count,
                                  detail::sum_received_blocks<T>{blocks.data(), from + rank() * n + at,
                                                                 received.data_handle() + at, rank(), size(), count});
            }
        }
        finish(ex, "reduce_scatter", until);
    }

    template <executor Executor, class T>
    void all_gather(Executor& ex, type_identity_t<vector_view<const T>> sent, vector_view<T> received) const
    {
        const int64_t n = sent.extent(0);
        expects_shape(sent, "sent (N)", n);
        expects_shape(received, "received (R*N)", size() * n);
        const detail::patience until(own_->options.deadline);
        if (n > 0)
            group("all_gather", until,
                  [&] { return Api::all_gather(sent.data_handle(), received.data_handle(), bytes<T>(n), own_->handle, ex); });
        finish(ex, "all_gather", until);
    }

    template <executor Executor, class T>
    void all_to_all(Executor& ex, type_identity_t<vector_view<const T>> sent, vector_view<T> received) const
    {
        const int64_t n = sent.extent(0) / size();
        expects_shape(sent, "sent (R*N)", size() * n);
        expects_shape(received, "received (R*N)", size() * n);
        const detail::patience until(own_->options.deadline);
        move<T>(ex, "all_to_all", until, [&](int r) { return block<const T>{sent.data_handle() + r * n, n}; },
                [&](int r) { return block<T>{received.data_handle() + r * n, n}; });
        finish(ex, "all_to_all", until);
    }

    /// Rows of `received` past the counts stay as they are. Ranks between which no row goes do not meet.  // (N,D), (R), (M,D), (R)
    template <executor Executor, class T>
    void all_to_all_v(Executor& ex, type_identity_t<matrix_view<const T>> sent, vector_view<const int64_t> sent_rows,
                      matrix_view<T> received, vector_view<const int64_t> received_rows) const
    {
        const int64_t width = sent.extent(1);
        expects_shape(sent, "sent (N,D)", sent.extent(0), width);
        expects_shape(received, "received (M,D)", received.extent(0), width);
        expects_counts(sent_rows, "sent_rows (R)", sent.extent(0), "sent (N,D)");
        expects_counts(received_rows, "received_rows (R)", received.extent(0), "received (M,D)");
        expects(received_rows(rank()) == sent_rows(rank()), "received_rows of this rank", received_rows(rank()), sent_rows(rank()), ", as sent");
        const detail::patience until(own_->options.deadline);
        const T* from = sent.data_handle();
        T* to = received.data_handle();
        // Called once for each rank, in order.
        move<T>(ex, "all_to_all_v", until,
                [&](int r) { return block<const T>{std::exchange(from, from + sent_rows(r) * width), sent_rows(r) * width}; },
                [&](int r) { return block<T>{std::exchange(to, to + received_rows(r) * width), received_rows(r) * width}; });
        finish(ex, "all_to_all_v", until);
    }

    template <executor Executor, class T>
    void broadcast(Executor& ex, vector_view<T> values, int root) const // (N)
    {
        expects_shape(values, "values (N)", values.extent(0));
        expects(root >= 0 && root < size(), "root", root, "a rank: 0 to ", size() - 1);
        const detail::patience until(own_->options.deadline);
        const int64_t n = values.extent(0);
        if (n > 0) group("broadcast", until, [&] { return Api::broadcast(values.data_handle(), bytes<T>(n), root, own_->handle, ex); });
        finish(ex, "broadcast", until);
    }

    /// Waits, whatever the options say.
    template <executor Executor>
    void barrier(Executor& ex) const
    {
        const detail::patience until(own_->options.deadline);
        buffer<int32_t, Executor> word(ex, 1);
        fastmoe::for_each(ex, 1, detail::fill_word{word.data()});
        group("barrier", until, [&] { return Api::all_reduce(word.data(), 1, own_->handle, ex); });
        own_->wait_for(ex, "barrier", until);
    }

    /// The options are those of this communicator. @throws invalid_argument if color is negative
    nccl_ranks split(int color, int key) const
    {
        expects(color >= 0, "color", color, "zero or more");
        return nccl_ranks(std::make_shared<membership>(*own_, color, key));
    }

    /// Waits until all that was queued has been done. @throws comm_error if a peer failed or the deadline passed meanwhile
    template <executor Executor>
    void wait(Executor& ex) const
    {
        own_->expects_alive("wait");
        own_->wait_for(ex, "wait", detail::patience(own_->options.deadline));
    }

    /// While it lives, NCCL may read and write this memory without copies of its own.
    class [[nodiscard]] registration {
    public:
        registration(registration&& other) noexcept : own_(std::move(other.own_)), token_(other.token_) {}
        registration& operator=(registration&& other) noexcept
        {
            std::swap(own_, other.own_);
            std::swap(token_, other.token_);
            return *this;
        }
        ~registration()
        {
            if (own_ && own_->alive()) (void)Api::dismiss(own_->handle, token_);
        }

    private:
        friend nccl_ranks;
        registration(std::shared_ptr<membership> own, void* token) noexcept : own_(std::move(own)), token_(token) {}
        std::shared_ptr<membership> own_;
        void* token_;
    };
    /// @param memory  of the device, from an allocation that lives as long as the result; best of ncclMemAlloc
    template <class T>
    registration register_memory(vector_view<T> memory) const
    {
        own_->expects_alive("register_memory");
        void* token = nullptr;
        own_->settle("register_memory", Api::enroll(own_->handle, memory.data_handle(), bytes<T>(memory.extent(0)), token),
                     detail::patience(own_->options.deadline));
        return registration(own_, token);
    }

private:
    template <class T>
    struct block {
        T* data;
        int64_t count;
    };

    explicit nccl_ranks(std::shared_ptr<membership> own) noexcept : own_(std::move(own)) {}

    static constexpr int64_t least(int64_t a, int64_t b) noexcept { return a < b ? a : b; }
    int64_t share_of(int64_t n) const noexcept { return (n + size() - 1) / size(); }
    template <class T>
    static constexpr int64_t bytes(int64_t n) noexcept
    {
        static_assert(dtype_name<T> != nullptr || std::is_same_v<T, std::byte>, "an element type of communicator.hpp");
        return n * static_cast<int64_t>(sizeof(T));
    }
    /// Elements that one piece of a sum has, if `blocks` of them are received.
    template <class T>
    int64_t piece(int blocks) const noexcept
    {
        static_assert(!std::is_same_v<T, std::byte>, "bytes have no sum");
        const int64_t n = own_->options.sum_bytes / (blocks * static_cast<int64_t>(sizeof(T)));
        return n > size() ? n / size() * size() : size();
    }

    /// Queues what enqueue() asks of NCCL as one group.
    template <class Enqueue>
    void group(const char* verb, const detail::patience& until, const Enqueue& enqueue) const
    {
        own_->expects_alive(verb);
        status s = Api::group_begin();
        if (Api::succeeded(s)) {
            const status asked = enqueue();
            const status ended = Api::group_end(); // whatever was asked: a group that stays open swallows all later calls
            s = Api::succeeded(asked) || Api::pending(asked) ? ended : asked;
        }
        own_->settle(verb, s, until);
    }
    template <class Executor>
    void finish(Executor& ex, const char* verb, const detail::patience& until) const
    {
        own_->expects_alive(verb);
        if (own_->options.completion == nccl_completion::waited) own_->wait_for(ex, verb, until);
    }

    /// to(r) of this rank becomes from(rank) of rank r, for all other ranks. No call where there is nothing to move: both
    /// sides know that alike.
    template <class T, class Executor, class From, class To>
    void exchange(Executor& ex, const char* verb, const detail::patience& until, const From& from, const To& to) const
    {
        group(verb, until, [&] {
            status problem{};
            const auto keep = [&problem](status s) {
                if (!Api::succeeded(s) && !Api::pending(s) && Api::succeeded(problem)) problem = s;
            };
            for (int r = 0; r < size(); ++r) {
                const block<const T> out = from(r);
                const block<T> in = to(r);
                if (r == rank()) continue;
                if (out.count > 0) keep(Api::send(out.data, bytes<T>(out.count), r, own_->handle, ex));
                if (in.count > 0) keep(Api::receive(in.data, bytes<T>(in.count), r, own_->handle, ex));
            }
            return problem;
        });
    }
    /// The same with this rank's own block.
    template <class T, class Executor, class From, class To>
    void move(Executor& ex, const char* verb, const detail::patience& until, const From& from, const To& to) const
    {
        block<const T> out{};
        block<T> in{};
        exchange<T>(ex, verb, until,
                    [&](int r) {
                        const block<const T> b = from(r);
                        if (r == rank()) out = b;
                        return b;
                    },
                    [&](int r) {
                        const block<T> b = to(r);
                        if (r == rank()) in = b;
                        return b;
                    });
        if (out.count > 0 && in.data != out.data) Api::copy(ex, in.data, out.data, bytes<T>(out.count));
    }

    /// n elements become their sums. @param blocks  scratch                                   // (R * share of n)
    template <class T, class Executor>
    void sum_piece(Executor& ex, const detail::patience& until, T* values, int64_t n, T* blocks) const
    {
        const int64_t share = share_of(n);
        const auto of = [&](int r) {
            const int64_t begin = least(r * share, n);
            return block<T>{values + begin, least(share, n - begin)};
        };
        const block<T> mine = of(rank());
        exchange<T>(ex, "all_reduce", until, [&](int r) { return block<const T>{of(r).data, of(r).count}; },
                    [&](int r) { return block<T>{blocks + r * share, mine.count}; });
        fastmoe::for_each(ex, mine.count,
                          detail::sum_received_blocks<T>{blocks, mine.data, mine.data, rank(), size(), share});
        if (share * size() == n)
            group("all_reduce", until, [&] { return Api::all_gather(mine.data, values, bytes<T>(share), own_->handle, ex); });
        else
            exchange<T>(ex, "all_reduce", until, [&](int) { return block<const T>{mine.data, mine.count}; }, of);
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

    std::shared_ptr<membership> own_;
};

} // namespace fastmoe::inline FASTMOE_ABI
