// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A communicator of two levels, made of any two: `inner` joins the ranks of a node, `outer` the ranks that have the same
/// place on every node. Each collective takes a hop in either, so that nodes exchange few large messages instead of many
/// small ones.
///
///     const auto c = fm::make_hierarchical(world, 8); // 8 consecutive ranks are a node
#pragma once

#include <optional>
#include <tuple>

#include <fastmoe/comm/announcement.hpp>
#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/comm/hierarchical_levels.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Rank outer.rank() * inner.size() + inner.rank() of outer.size() * inner.size(). Copies are the same rank, used by one
/// thread at a time.
///
/// Sums: first those of a node, in the order and with the roundings of `inner`, then those of the nodes, as `outer` adds
/// them. So all ranks get the same bits on every run; a half type is rounded twice.
///
/// Staging comes from the executor's resource, or from the workspace that the object was built with and shares with what is
/// split from it; the *_bytes() say how much. broadcast, barrier and split take none.
///
/// Metadata travel in host memory, through a host_executor of this object, which both levels must serve beside the
/// executor of the data. Before a collective each rank announces what it is about to do: 64 bytes to each other rank of its
/// node, and 8 more for each node, the rows of all_to_all_v; 72 for each rank of the node to each other node. all_to_all_v
/// announces once more, with what did not fit: 64 bytes, and 64 for each rank of the node. That is six hops with the rows.
///
/// @throws comm_error from each collective, on all ranks, if ranks disagree about the collective, its element type, shape,
///         root or counts, or if one refuses its own arguments or has no memory (nothing is written then, and the
///         communicator can go on); or if a rank has failed, left or is late, as the levels find out. The object then drops
///         both levels, so that ranks which wait for this one learn at once if nobody else holds copies of them, and every
///         later call throws as well. If messages of a level are still on their way then, memory that they may be written to
///         is not used again: what was taken is never given back, a workspace is refused. invalid_argument or out_of_memory
///         on the rank that refuses
template <counts_ranks Inner, counts_ranks Outer>
class hierarchical {
public:
    /// @param inner  the ranks of this node; as many on every node
    /// @param outer  the ranks with this place on their nodes, one a node, nodes in the same order for every place
    hierarchical(Inner inner, Outer outer) : hierarchical(std::move(inner), std::move(outer), vector_view<std::byte>{}) {}
    /// @param workspace  memory of the executor for staging, lent for as long as there are copies            // (bytes)
    hierarchical(Inner inner, Outer outer, vector_view<std::byte> workspace)
        : hierarchical(std::move(inner), std::move(outer), std::make_shared<detail::lent_memory>(detail::lent_memory{workspace}))
    {
    }

    int rank() const noexcept { return own_->table.rank; }
    int size() const noexcept { return own_->table.ranks(); }
    int nodes() const noexcept { return own_->table.nodes; }
    int places() const noexcept { return own_->table.places; } ///< ranks of a node

    /// A share of the node's sum for each rank of it, so that every value crosses over once.
    template <executor Executor, class T>
    void all_reduce(Executor& ex, vector_view<T> values) const // (N)
    {
        const int64_t n = values.extent(0), share = share_of(n);
        detail::staging<Executor> memory(ex, *own_->workspace, own_->messages_pending);
        vector_view<T> part;
        agree<T>(ex, verb::all_reduce, n, 0, [&] {
            expects_shape(values, "values (N)", n);
            part = memory.template take<T>(share, 0).first;
        });
        if (share > 0) {
            const auto whole = slice(values, 0, share * places());
            inner([&](const Inner& c) { c.reduce_scatter(ex, vector_view<const T>(whole), part); });
            outer([&](const Outer& c) { c.all_reduce(ex, part); });
            inner([&](const Inner& c) { c.all_gather(ex, vector_view<const T>(part), whole); });
        }
        if (share * places() == n) return;
        const auto rest = slice(values, share * places(), n - share * places());
        inner([&](const Inner& c) { c.all_reduce(ex, rest); });
        outer([&](const Outer& c) { c.all_reduce(ex, rest); });
    }

    /// Within the nodes first, so that a node's sum crosses over, not what it is the sum of.
    template <executor Executor, class T>
    void reduce_scatter(Executor& ex, type_identity_t<vector_view<const T>> sent, vector_view<T> received) const
    {
        const int64_t n = received.extent(0);
        detail::staging<Executor> memory(ex, *own_->workspace, own_->messages_pending);
        vector_view<T> packed, sums; // (R*N), (nodes*N)
        agree<T>(ex, verb::reduce_scatter, n, 0, [&] {
            expects_shape(received, "received (N)", n);
            expects_shape(sent, "sent (R*N)", size() * n);
            std::tie(packed, sums) = memory.template take<T>(size() * n, nodes() * n);
        });
        detail::turn_blocks<T>(ex, sent.data_handle(), nodes(), places(), n, packed.data_handle());
        inner([&](const Inner& c) { c.reduce_scatter(ex, vector_view<const T>(packed), sums); });
        outer([&](const Outer& c) { c.reduce_scatter(ex, vector_view<const T>(sums), received); });
    }

    /// Across first, so that what a rank has crosses over once, not once for each rank of its node.
    template <executor Executor, class T>
    void all_gather(Executor& ex, type_identity_t<vector_view<const T>> sent, vector_view<T> received) const
    {
        const int64_t n = sent.extent(0);
        detail::staging<Executor> memory(ex, *own_->workspace, own_->messages_pending);
        vector_view<T> gathered, crossed; // (R*N), (nodes*N)
        agree<T>(ex, verb::all_gather, n, 0, [&] {
            expects_shape(sent, "sent (N)", n);
            expects_shape(received, "received (R*N)", size() * n);
            std::tie(gathered, crossed) = memory.template take<T>(size() * n, nodes() * n);
        });
        outer([&](const Outer& c) { c.all_gather(ex, sent, crossed); });
        inner([&](const Inner& c) { c.all_gather(ex, vector_view<const T>(crossed), gathered); });
        detail::turn_blocks<T>(ex, gathered.data_handle(), places(), nodes(), n, received.data_handle());
        ex.synchronize();
    }

    template <executor Executor, class T>
    void all_to_all(Executor& ex, type_identity_t<vector_view<const T>> sent, vector_view<T> received) const
    {
        const int64_t n = sent.extent(0) / size();
        detail::staging<Executor> memory(ex, *own_->workspace, own_->messages_pending);
        vector_view<T> packed, passing; // (R*N), (R*N)
        agree<T>(ex, verb::all_to_all, n, 0, [&] {
            expects_shape(sent, "sent (R*N)", size() * n);
            expects_shape(received, "received (R*N)", size() * n);
            std::tie(packed, passing) = memory.template take<T>(size() * n, size() * n);
        });
        detail::turn_blocks<T>(ex, sent.data_handle(), nodes(), places(), n, packed.data_handle());
        inner([&](const Inner& c) { c.all_to_all(ex, vector_view<const T>(packed), passing); });
        detail::turn_blocks<T>(ex, passing.data_handle(), places(), nodes(), n, packed.data_handle());
        outer([&](const Outer& c) { c.all_to_all(ex, vector_view<const T>(packed), received); });
    }

    /// Rows go by way of the rank of this node that has the place of their receiver. Rows of `received` past the counts stay
    /// as they are.                                                                   // (N,D), (R), (M,D), (R)
    template <executor Executor, class T>
    void all_to_all_v(Executor& ex, type_identity_t<matrix_view<const T>> sent, vector_view<const int64_t> sent_rows,
                      matrix_view<T> received, vector_view<const int64_t> received_rows) const
    {
        const int64_t width = sent.extent(1);
        const auto& table = own_->table;
        agree<T>(
            ex, verb::all_to_all_v, width, 0,
            [&] {
                expects_shape(sent, "sent (N,D)", sent.extent(0), width);
                expects_shape(received, "received (M,D)", received.extent(0), width);
                detail::expects_counts_of_rows(sent_rows, "sent_rows (R)", size(), sent.extent(0), "sent (N,D)");
                detail::expects_counts_of_rows(received_rows, "received_rows (R)", size(), received.extent(0), "received (M,D)");
            },
            sent_rows);
        own_->table.compare(received_rows);
        detail::staging<Executor> memory(ex, *own_->workspace, own_->messages_pending);
        matrix_view<T> packed, passing; // (rows that leave or pass, D), (rows that pass, D)
        own_->confirm([&] {
            const auto [a, b] = memory.template take<T>(table.packed_rows() * width, table.passing_rows() * width);
            packed = matrix_view<T>(a.data_handle(), table.packed_rows(), width);
            passing = matrix_view<T>(b.data_handle(), table.passing_rows(), width);
        });
        detail::turn_rows<T>(ex, sent.data_handle(), nodes(), places(), sent_rows.data_handle(), width, packed.data_handle());
        inner([&](const Inner& c) {
            c.all_to_all_v(ex, matrix_view<const T>(packed), table.to_places(), passing, table.from_places());
        });
        detail::turn_rows<T>(ex, passing.data_handle(), places(), nodes(), table.passing(), width, packed.data_handle());
        outer([&](const Outer& c) {
            c.all_to_all_v(ex, matrix_view<const T>(packed), table.to_nodes(), received, table.from_nodes());
        });
    }

    /// Across from the root alone, then within the nodes.
    template <executor Executor, class T>
    void broadcast(Executor& ex, vector_view<T> values, int root) const // (N)
    {
        agree<T>(ex, verb::broadcast, values.extent(0), root, [&] {
            expects_shape(values, "values (N)", values.extent(0));
            expects(root >= 0 && root < size(), "root", root, "a rank: 0 to ", size() - 1);
        });
        const int node = root / places(), place = root % places();
        if (rank() % places() == place) outer([&](const Outer& c) { c.broadcast(ex, values, node); });
        inner([&](const Inner& c) { c.broadcast(ex, values, place); });
    }

    template <executor Executor>
    void barrier(Executor& ex) const
    {
        agree<std::byte>(ex, verb::barrier, 0, 0, [] {});
    }

    /// The ranks of every color must be the same places of each of their nodes, and key must order them node by node: whole
    /// nodes, one place of several nodes, an even part of a node. Other groups are for the flat communicator to split.
    /// @throws invalid_argument on all ranks if they are not, on this one if color is negative
    hierarchical split(int color, int key) const
    {
        agree<std::byte>(own_->ex, verb::split, color, key, [&] { expects(color >= 0, "color", color, "zero or more"); });
        const detail::split_place at = find_split_place(own_->table);
        expects(at.fits, "split by color", color, "the same places of each node of a color, ordered node by node");
        std::optional<Inner> node;
        std::optional<Outer> across;
        inner([&](const Inner& c) { node.emplace(c.split(color, at.place)); });
        outer([&](const Outer& c) { across.emplace(c.split(color, at.node)); });
        return hierarchical(std::move(*node), std::move(*across), own_->workspace);
    }

    // -- staging, in bytes of the workspace --------------------------------------------------------------------------------

    template <class T>
    int64_t all_reduce_bytes(int64_t n) const // values (N)
    {
        return bytes<T>(share_of(n), 0);
    }
    template <class T>
    int64_t reduce_scatter_bytes(int64_t n) const // received (N)
    {
        return bytes<T>(size() * n, nodes() * n);
    }
    template <class T>
    int64_t all_gather_bytes(int64_t n) const // sent (N)
    {
        return bytes<T>(size() * n, nodes() * n);
    }
    template <class T>
    int64_t all_to_all_bytes(int64_t n) const // sent (R*N)
    {
        return bytes<T>(size() * n, size() * n);
    }
    /// @param sent     rows that this rank sends
    /// @param passing  rows that the ranks of its node send to the ranks with its place, on this node and on others
    template <class T>
    static int64_t all_to_all_v_bytes(int64_t sent, int64_t passing, int64_t width)
    {
        return bytes<T>((sent > passing ? sent : passing) * width, passing * width);
    }

private:
    using verb = detail::collective;

    hierarchical(Inner inner, Outer outer, std::shared_ptr<detail::lent_memory> workspace)
        : own_(std::make_shared<detail::two_levels<Inner, Outer>>(std::move(inner), std::move(outer), std::move(workspace)))
    {
    }

    template <class F>
    void inner(const F& f) const
    {
        own_->inner(f);
    }
    template <class F>
    void outer(const F& f) const
    {
        own_->outer(f);
    }

    /// Checks what is this rank's alone, then returns when all ranks are here and agree.
    template <class T, class Executor, class Check>
    void agree(Executor& ex, verb what, int64_t count, int64_t root, const Check& verify,
               vector_view<const int64_t> sent_rows = {}) const
    {
        static_assert(dtype_name<T> != nullptr || std::is_same_v<T, std::byte>, "an element type of communicator.hpp");
        own_->table.own = {.verb = static_cast<int64_t>(what), .type = detail::element_code<T>, .count = count,
                            .root = root};
        own_->announce(sent_rows, [&] {
            verify();
            ex.synchronize(); // what is sent has been written
        });
    }

    int64_t share_of(int64_t n) const { return places() > 1 ? n / places() : 0; }
    template <class T>
    static int64_t bytes(int64_t first, int64_t second)
    {
        return detail::staging<host_executor>::template bytes<T>(first, second);
    }

    std::shared_ptr<detail::two_levels<Inner, Outer>> own_;
};

/// Nodes of `node_size` consecutive ranks of a communicator that splits. Called by all its ranks.
/// @throws invalid_argument unless node_size divides its size
template <counts_ranks World>
    requires splits<World>
auto make_hierarchical(const World& world, int node_size, vector_view<std::byte> workspace = {})
{
    const int rank = world.rank(), size = world.size();
    expects(node_size >= 1 && size % node_size == 0, "node_size", node_size, "a divisor of ", size, ", the ranks in all");
    auto inner = world.split(rank / node_size, rank);
    auto outer = world.split(rank % node_size, rank);
    return hierarchical<decltype(inner), decltype(outer)>(std::move(inner), std::move(outer), workspace);
}

} // namespace fastmoe::inline FASTMOE_ABI
