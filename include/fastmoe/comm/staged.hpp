// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A communicator for executors whose memory the host cannot read, made of one that moves host memory: data pass through
/// staging memory, which is best page-locked.
///
///     fm::pinned_memory pinned;                                       // cuda/pinned_memory.cuh
///     const fm::staged ranks(session.world(), int64_t{64} << 20, pinned);
///     ranks.all_reduce(ex, gradients);                                // ex: a cuda_executor
#pragma once

#include <type_traits>
#include <utility>

#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/comm/device_memory.hpp>
#include <fastmoe/comm/staged_rank.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Whether all_gather, all_to_all, all_to_all_v and broadcast send and receive where the data lie, and stage nothing: if the
/// communicator says that it reaches devices (mpi asks the MPI library), always, which is for those who know better than the
/// library, or never. Sums are staged in any case. All ranks must be able and willing, else all stage. Memory of a CUDA pool, as
/// cuda_executor takes it if it is given none, is not reached by MPI libraries that open other processes' memory by the older
/// handles of CUDA: there never, or memory of cudaMalloc.
enum class direct_rows : std::uint8_t { if_reached, always, never };

struct staged_options {
    direct_rows rows = direct_rows::if_reached;
    int threads = 1; ///< of the host_executor that makes the sums
};

/// The ranks of Inner. Copies are the same rank; they and what is split from them share the staging memory, and are used by
/// one thread at a time.
///
/// Executors with readable memory go to Inner as they are. For all others a collective begins with ex.synchronize(), so that
/// what was queued before has been written, and what the work has found is thrown before anything is sent; it waits again
/// whenever a part of the data has come to the host, and at its end. The host waits, so no collective can be captured. Data
/// that do not fit into the least staging memory of all ranks go in parts. Counts of rows are not staged, nor is what a rank
/// has for itself. Sums are Inner's, so the bits are those that Inner gives on the host, whatever the size of the memory.
///
/// Nothing is allocated in a collective, beyond what Inner allocates. Before a collective each rank sends 88 bytes to each
/// other; all_to_all_v shares as many once more. Where rows go directly this is left out from the second collective on,
/// and errors are those of Inner.
///
/// @throws comm_error from each collective, on all ranks, if ranks disagree about the collective, its element type, shape,
///         root or counts, or if one refuses its own arguments or its executor has recorded a fault (nothing is written then,
///         and the communicator can go on); or if a rank has failed, left or is late, as Inner finds out. The object then
///         drops Inner, so that ranks which wait for this one learn at once if nobody else holds copies of it, and every
///         later call throws as well. invalid_argument, or what the executor throws, on the rank that refuses
template <counts_ranks Inner>
class staged {
public:
    /// Staging memory is lent, for as long as there are copies or splits. Once messages of one of them may be on their way to it
    /// for ever, all that share it throw comm_error.
    /// @param staging  that the executor's copies and the host both reach, aligned to memory_alignment; at least
    ///                 least_bytes() of the ranks. The ranks' sizes may differ: the least one cuts the parts    // (bytes)
    /// @throws invalid_argument if it is too small or misaligned, or if rows are to go directly and Inner knows no such thing
    staged(Inner inner, vector_view<std::byte> staging, staged_options options = {})
        : staged(std::move(inner), options, [&](int ranks) { return std::make_shared<detail::staging_memory>(staging, ranks); })
    {
    }
    /// Staging memory is taken from a resource here, and given back with the last copy and split; but after a failure while
    /// data moved, when late messages may still write to it, it is not given back, and who shares it takes as much anew.
    /// @param memory  outlives all copies and splits
    staged(Inner inner, int64_t bytes, memory_resource& memory, staged_options options = {})
        : staged(std::move(inner), options,
                 [&](int ranks) { return std::make_shared<detail::staging_memory>(bytes, memory, ranks); })
    {
    }

    static constexpr int64_t least_bytes(int ranks) noexcept { return detail::staging_memory::least_bytes(ranks); }

    int rank() const noexcept { return own_->table.rank; }
    int size() const noexcept { return own_->table.ranks(); }
    /// @throws comm_error after a failure
    const Inner& inner() const { return own_->inner(); }

    template <executor Executor, class T>
    void all_reduce(Executor& ex, vector_view<T> values) const // (N)
    {
        if constexpr (has_readable_memory<Executor>) return inner().all_reduce(ex, values);
        const int64_t n = values.extent(0);
        const use here(*own_->memory, "all_reduce");
        agree<T>(ex, verb::all_reduce, n, 0, [&] { expects_shape(values, "values (N)", n); });
        if (size() == 1) return;
        own_->move([&](const Inner& c) {
            own_->template in_parts<T>(ex, n, 1, [&](int64_t first, int64_t count, T* stage) {
                detail::queue_copy<T>(ex, values.data_handle() + first, count, stage);
                ex.synchronize();
                c.all_reduce(own_->host, vector_view<T>(stage, count));
                detail::queue_copy<T>(ex, stage, count, values.data_handle() + first);
            });
        });
    }

    template <executor Executor, class T>
    void reduce_scatter(Executor& ex, type_identity_t<vector_view<const T>> sent, vector_view<T> received) const
    {
        if constexpr (has_readable_memory<Executor>) return inner().reduce_scatter(ex, sent, received);
        const int64_t n = received.extent(0);
        const use here(*own_->memory, "reduce_scatter");
        agree<T>(ex, verb::reduce_scatter, n, 0, [&] {
            expects_shape(received, "received (N)", n);
            expects_shape(sent, "sent (R*N)", size() * n);
        });
        const T* from = sent.data_handle();
        T* to = received.data_handle();
        own_->move([&](const Inner& c) {
            if (size() == 1) {
                detail::queue_copy<T>(ex, from, n, to);
                return ex.synchronize();
            }
            own_->template in_parts<T>(ex, n, size() + 1, [&](int64_t first, int64_t count, T* stage) {
                detail::joined_copies<T, Executor> out(ex);
                for (int r = 0; r < size(); ++r) out.add(from + r * n + first, count, stage + r * count);
                out.flush();
                ex.synchronize();
                T* sum = stage + size() * count;
                c.reduce_scatter(own_->host, vector_view<const T>(stage, size() * count), vector_view<T>(sum, count));
                detail::queue_copy<T>(ex, sum, count, to + first);
            });
        });
    }

    template <executor Executor, class T>
    void all_gather(Executor& ex, type_identity_t<vector_view<const T>> sent, vector_view<T> received) const
    {
        if constexpr (has_readable_memory<Executor>) return inner().all_gather(ex, sent, received);
        const auto direct = [&](auto& on, const Inner& c) { c.all_gather(on, sent, received); };
        if (goes_directly(ex, direct)) return;
        const int64_t n = sent.extent(0);
        const use here(*own_->memory, "all_gather");
        agree<T>(ex, verb::all_gather, n, 0, [&] {
            expects_shape(sent, "sent (N)", n);
            expects_shape(received, "received (R*N)", size() * n);
        });
        if (goes_directly(ex, direct)) return;
        T* to = received.data_handle();
        own_->move([&](const Inner& c) {
            detail::queue_copy<T>(ex, sent.data_handle(), n, to + rank() * n);
            if (size() == 1) return ex.synchronize();
            own_->template in_parts<T>(ex, n, size() + 1, [&](int64_t first, int64_t count, T* stage) {
                detail::queue_copy<T>(ex, sent.data_handle() + first, count, stage);
                ex.synchronize();
                T* all = stage + count;
                c.all_gather(own_->host, vector_view<const T>(stage, count), vector_view<T>(all, size() * count));
                detail::joined_copies<T, Executor> in(ex);
                for (int r = 0; r < size(); ++r)
                    if (r != rank()) in.add(all + r * count, count, to + r * n + first);
                in.flush();
            });
        });
    }

    template <executor Executor, class T>
    void all_to_all(Executor& ex, type_identity_t<vector_view<const T>> sent, vector_view<T> received) const
    {
        if constexpr (has_readable_memory<Executor>) return inner().all_to_all(ex, sent, received);
        const auto direct = [&](auto& on, const Inner& c) { c.all_to_all(on, sent, received); };
        if (goes_directly(ex, direct)) return;
        const int64_t n = sent.extent(0) / size();
        const use here(*own_->memory, "all_to_all");
        agree<T>(ex, verb::all_to_all, n, 0, [&] {
            expects_shape(sent, "sent (R*N)", size() * n);
            expects_shape(received, "received (R*N)", size() * n);
        });
        if (goes_directly(ex, direct)) return;
        const auto each = [n](int) { return n; };
        own_->template exchange<T>(ex, sent.data_handle(), each, received.data_handle(), each, own_->template share_of<T>(each, each), n);
    }

    /// all_to_all of what the host needs to know as well: it passes through the host's arrays, so nothing is read back later.
    /// @param out, in  overwritten by what is sent and what has come; of the host       // (R*N), (R*N)
    template <executor Executor, class T>
        requires(!has_readable_memory<Executor>)
    void all_to_all_known(Executor& ex, type_identity_t<vector_view<const T>> sent, vector_view<T> received, vector_view<T> out,
                          vector_view<T> in) const
    {
        const int64_t n = sent.extent(0) / size();
        const use here(*own_->memory, "all_to_all");
        agree<T>(ex, verb::all_to_all, n, 0, [&] {
            expects_shape(sent, "sent (R*N)", size() * n);
            expects_shape(received, "received (R*N)", size() * n);
            expects_shape(out, "out (R*N)", size() * n);
            expects_shape(in, "in (R*N)", size() * n);
            detail::queue_copy<T>(ex, sent.data_handle(), size() * n, out.data_handle());
        });
        own_->move([&](const Inner& c) {
            c.all_to_all(own_->host, vector_view<const T>(out), in);
            detail::queue_copy<T>(ex, in.data_handle(), size() * n, received.data_handle());
            ex.synchronize();
        });
    }

    /// Rows of `received` past the counts stay as they are.                             // (N,D), (R), (M,D), (R)
    template <executor Executor, class T>
    void all_to_all_v(Executor& ex, type_identity_t<matrix_view<const T>> sent, vector_view<const int64_t> sent_rows,
                      matrix_view<T> received, vector_view<const int64_t> received_rows) const
    {
        if constexpr (has_readable_memory<Executor>)
            return inner().all_to_all_v(ex, sent, sent_rows, received, received_rows);
        const auto direct = [&](auto& on, const Inner& c) { c.all_to_all_v(on, sent, sent_rows, received, received_rows); };
        if (goes_directly(ex, direct)) return;
        const int64_t width = sent.extent(1);
        const use here(*own_->memory, "all_to_all_v");
        agree<T>(
            ex, verb::all_to_all_v, width, 0,
            [&] {
                expects_shape(sent, "sent (N,D)", sent.extent(0), width);
                expects_shape(received, "received (M,D)", received.extent(0), width);
                detail::expects_counts_of_rows(sent_rows, "sent_rows (R)", size(), sent.extent(0), "sent (N,D)");
                detail::expects_counts_of_rows(received_rows, "received_rows (R)", size(), received.extent(0),
                                               "received (M,D)");
            },
            sent_rows);
        if (goes_directly(ex, direct)) return;
        const auto out = [&](int r) { return sent_rows(r) * width; };
        const auto in = [&](int r) { return received_rows(r) * width; };
        int64_t share = own_->template share_of<T>(out, in), most = 0;
        for (int r = 0; r < size(); ++r)
            if (r != rank() && out(r) > most) most = out(r);
        own_->compare_rows(received_rows, share, most);
        own_->template exchange<T>(ex, sent.data_handle(), out, received.data_handle(), in, share, most);
    }

    template <executor Executor, class T>
    void broadcast(Executor& ex, vector_view<T> values, int root) const // (N)
    {
        if constexpr (has_readable_memory<Executor>) return inner().broadcast(ex, values, root);
        const auto direct = [&](auto& on, const Inner& c) { c.broadcast(on, values, root); };
        if (goes_directly(ex, direct)) return;
        const int64_t n = values.extent(0);
        const use here(*own_->memory, "broadcast");
        agree<T>(ex, verb::broadcast, n, root, [&] {
            expects_shape(values, "values (N)", n);
            expects(root >= 0 && root < size(), "root", root, "a rank: 0 to ", size() - 1);
        });
        if (size() == 1 || goes_directly(ex, direct)) return;
        own_->move([&](const Inner& c) {
            own_->template in_parts<T>(ex, n, 1, [&](int64_t first, int64_t count, T* stage) {
                if (rank() == root) detail::queue_copy<T>(ex, values.data_handle() + first, count, stage);
                ex.synchronize(); // elsewhere: the part before has been copied to the device
                c.broadcast(own_->host, vector_view<T>(stage, count), root);
                if (rank() != root) detail::queue_copy<T>(ex, stage, count, values.data_handle() + first);
            });
        });
    }

    template <executor Executor>
    void barrier(Executor& ex) const
    {
        if constexpr (has_readable_memory<Executor>) return inner().barrier(ex);
        const use here(*own_->memory, "barrier");
        agree<std::byte>(ex, verb::barrier, 0, 0, [] {});
    }

    /// Shares the staging memory; build another from inner().split() and memory of its own to be free of that.
    staged split(int color, int key) const
    {
        return staged(std::make_shared<detail::staged_rank<Inner>>(inner().split(color, key), own_->memory,
                                                                   own_->host.threads(), own_->direct != 0));
    }

private:
    using verb = detail::collective;
    using use = detail::staging_memory::use;

    template <class Memory>
    staged(Inner inner, staged_options options, const Memory& memory)
    {
        bool reaches = options.rows == direct_rows::always;
        if constexpr (reaches_devices<Inner>) {
            if (options.rows == direct_rows::if_reached) reaches = inner.reaches_devices();
        } else {
            expects(!reaches, "options.rows", "always", "if_reached or never: this communicator moves host memory only");
        }
        const int ranks = inner.size();
        own_ = std::make_shared<detail::staged_rank<Inner>>(std::move(inner), memory(ranks), options.threads, reaches);
    }
    explicit staged(std::shared_ptr<detail::staged_rank<Inner>> own) noexcept : own_(std::move(own)) {}

    /// Checks what is this rank's alone, then returns when all ranks are here and agree.
    template <class T, class Executor, class Check>
    void agree(Executor& ex, verb what, int64_t count, int64_t root, const Check& verify,
               vector_view<const int64_t> sent_rows = {}) const
    {
        static_assert(dtype_name<T> != nullptr || std::is_same_v<T, std::byte>, "an element type of communicator.hpp");
        own_->announce({.verb = static_cast<int64_t>(what), .type = detail::element_code<T>, .count = count, .root = root},
                       sent_rows, [&] {
                           verify();
                           ex.synchronize(); // what is sent has been written
                       });
    }

    /// Runs the collective where the data lie, if all ranks are known to reach them. It then is Inner's, errors and all.
    template <class Executor, class Collective>
    bool goes_directly(Executor& ex, const Collective& collective) const
    {
        if constexpr (reaches_devices<Inner>) {
            if (own_->direct == 1) {
                unstaged<Executor> on(ex);
                collective(on, inner());
                return true;
            }
        }
        return false;
    }

    std::shared_ptr<detail::staged_rank<Inner>> own_;
};

template <counts_ranks Inner>
staged(Inner, vector_view<std::byte>) -> staged<Inner>;

} // namespace fastmoe::inline FASTMOE_ABI
