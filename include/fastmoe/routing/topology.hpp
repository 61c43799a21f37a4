// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Topology-aware choice (FasterMoE, He et al. 2022, sec. 4.3): few choices leave the node, so that the network between
/// nodes takes no longer than the links inside of one.
#pragma once

#include <fastmoe/routing/choose.hpp>
#include <fastmoe/routing/drop_choices.hpp>
#include <fastmoe/routing/swipe.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Which choices the budget of those that leave the node counts.
enum class off_node_choices : std::uint8_t {
    all,   ///< every choice of a token, as the paper's traffic does
    first, ///< first choices alone, as FastMoE's code: see topology_aware
};

namespace detail {

/// A node's experts.
struct local_experts {
    int64_t begin, end;

    FASTMOE_HOST_DEVICE constexpr bool has(int32_t e) const noexcept { return e >= begin && e < end; }
};

/// Orders choices that leave the node by probability, or first choices by logit; no_key for all others.
template <class Real>
struct order_off_node {
    using vectorized = void;
    matrix_view<const Real> logits; // (T,E)
    const int32_t* experts;         // (T,K)
    order_key<Real>* keys;          // (T,K)
    local_experts node;
    int64_t k;
    off_node_choices counts;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const int64_t all = logits.extent(1);
        const int32_t* ids = experts + t * k;
        order_key<Real>* out = keys + t * k;
        if (ids[0] < 0) return team.for_each(k, [=](int64_t j) { out[j] = no_key<order_key<Real>>; });
        const Real* l = logits.data_handle() + t * all;
        const local_experts home = node;
        if (counts == off_node_choices::first) {
            team.for_each(k, [=](int64_t j) {
                out[j] = j == 0 && !home.has(ids[j]) ? ordered(l[ids[j]]) : no_key<order_key<Real>>;
            });
            return;
        }
        const auto row = softmax_score{}.row(team, l, all);
        const Real total = sum_of_values(team, row, l, all);
        team.for_each(k, [=](int64_t j) {
            out[j] = home.has(ids[j]) ? no_key<order_key<Real>> : ordered(row.value(l[ids[j]]) / total);
        });
    }
};

/// Marks the `limit` greatest keys, ties by position. `over` tells whether there are as many as that, or more.
template <class Key>
struct mark_within_budget {
    using vectorized = void;
    const Key* keys; // (N)
    int32_t* marks;  // (N)
    int32_t* over;   // (1)
    int64_t n, limit;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const Key* from = keys;
        const int32_t wanted = count_at_least(team, from, n, static_cast<Key>(no_key<Key> + 1));
        if (team.lane() == 0) *over = wanted >= limit;
        if (limit == 0 || wanted <= limit) {
            int32_t* to = marks;
            const bool none = limit == 0;
            return team.for_each(n, [=](int64_t i) { to[i] = !none && from[i] != no_key<Key>; });
        }
        const Key least = kth_greatest(team, from, n, limit);
        const int32_t above = team.reduce(
            n, int32_t{0}, adds{}, [=](int64_t i) { return static_cast<int32_t>(from[i] > least); });
        mark_kept(team, from, n, least, limit - above, marks);
    }
};

/// Choices that leave the node without a mark become the best experts of the node that the token does not have.
template <class Real>
struct stay_on_node {
    matrix_view<const Real> logits; // (T,E)
    int32_t* experts;               // (T,K)
    const int32_t* marks;           // (T,K)
    local_experts node;
    int64_t k;

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        int32_t* ids = experts + t * k;
        const Real* l = logits.data_handle() + t * logits.extent(1);
        for (int64_t j = 0; j < k; ++j)
            if (ids[j] >= 0 && !node.has(ids[j]) && marks[t * k + j] == 0)
                ids[j] = best_unused(l, node.begin, node.end, ids, k);
    }
};

/// What FastMoE's code does once the budget is spent: the best K of the node, the last of them replaced by a first choice
/// that is marked.
template <class Real>
struct stay_but_first {
    matrix_view<const Real> logits; // (T,E)
    int32_t* experts;               // (T,K)
    const int32_t* marks;           // (T,K)
    const int32_t* over;            // (1)
    local_experts node;
    int64_t k;

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        int32_t* ids = experts + t * k;
        if (*over == 0 || ids[0] < 0) return;
        const int32_t first = ids[0];
        const Real* l = logits.data_handle() + t * logits.extent(1);
        for (int64_t j = 0; j < k; ++j) ids[j] = best_unused(l, node.begin, node.end, ids, j);
        if (marks[t * k] != 0) ids[k - 1] = first;
    }
};

} // namespace detail

/// Workers are the communicator's ranks, E/R experts each in order; `workers_per_node` ranks in order are a node. A rank's
/// tokens choose their top K; of the choices that leave the node, L = floor(W_net / (M W_local) * T) stay, those of the
/// greatest probability, ties by token and place. The others become the token's best experts of its own node. Acts in
/// training and in inference: a rank needs only its own tokens for it.
///
/// FastMoE's code differs from the paper, and is off_node_choices::first: it counts first choices alone, so that second
/// ones leave the node freely while fewer than L first ones do; from L on, no second choice leaves, and the L first choices
/// of the greatest logit, which tokens do not share a scale of, take the last place of their token.
struct topology_aware {
    static constexpr bool reads_logits = true;
    static constexpr bool ragged = false;
    int64_t workers_per_node = 8;   ///< M
    double network_over_local = 1;  ///< W_net / W_local, of bandwidths
    off_node_choices counts = off_node_choices::all;

    /// How many choices of a rank's tokens may leave the node, at most all of them.
    int64_t budget(int64_t tokens, int64_t k) const noexcept
    {
        const double bound = network_over_local / static_cast<double>(workers_per_node) * static_cast<double>(tokens);
        const auto all = static_cast<double>(tokens * k);
        return bound < all ? static_cast<int64_t>(bound) : tokens * k;
    }

    /// @throws invalid_argument that names the member
    void validate(int64_t, int64_t) const
    {
        expects(workers_per_node >= 1 && workers_per_node <= INT32_MAX, "assignment.workers_per_node", workers_per_node,
                "1 to 2^31 - 1");
        expects(network_over_local >= 0 && network_over_local - network_over_local == 0, "assignment.network_over_local",
                network_over_local, "a finite number from 0 on");
    }

    template <class Executor, class T, class Communicator, class Real>
    void assign(Executor& ex, const gate_input<T>& in, const Communicator& c, const assignment<Real>& to,
                arena& scratch) const
    {
        using key = detail::order_key<Real>;
        const int64_t experts = to.total_experts, k = to.k, choices = to.tokens * k, ranks = c.size();
        expects(experts % ranks == 0, "experts", experts, "a multiple of the ", ranks, " ranks");
        detail::expects_team_room(top_k::scratch_bytes<Real>(experts, k), "experts", experts);
        const int64_t first = c.rank() / workers_per_node * workers_per_node, end = first + workers_per_node;
        const int64_t each = experts / ranks;
        const detail::local_experts node{first * each, (end < ranks ? end : ranks) * each};
        expects(node.end - node.begin >= k, "k", k, "at most the ", node.end - node.begin, " experts of a node");
        const auto keys = scratch.vector<key>(choices);
        const auto marks = scratch.vector<int32_t>(choices), over = scratch.vector<int32_t>(1);
        if (scratch.measuring()) return;
        int32_t* ids = to.experts.data_handle();
        detail::choose_rows(ex, in.logits, in.mask.extent(0) ? in.mask : vector_view<const std::uint8_t>{}, k,
                            detail::logit_rows{}, to.experts);
        fastmoe::for_each_row(ex, to.tokens,
                              detail::order_off_node<Real>{in.logits, ids, keys.data_handle(), node, k, counts},
                              {.width = experts});
        fastmoe::for_each_row(ex, 1,
                              detail::mark_within_budget<key>{keys.data_handle(), marks.data_handle(),
                                                              over.data_handle(), choices, budget(to.tokens, k)},
                              {.width = choices});
        if (counts == off_node_choices::all)
            fastmoe::for_each(ex, to.tokens, detail::stay_on_node<Real>{in.logits, ids, marks.data_handle(), node, k});
        else
            fastmoe::for_each(
                ex, to.tokens,
                detail::stay_but_first<Real>{in.logits, ids, marks.data_handle(), over.data_handle(), node, k});
    }
};

/// Softmax over the chosen.
using topology_gate = assigned_gate<topology_aware, softmax_score, renormalize>;

} // namespace fastmoe::inline FASTMOE_ABI
