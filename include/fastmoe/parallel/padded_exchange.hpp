// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The padded exchange: room for a fixed number of rows for each rank, sent whole. The host learns no count and waits for
/// none, so a step can be captured; tokens beyond the budget lose their choices on that rank, and are counted.
///
/// To each other rank go rows_per_rank * (D elements, and for each of K choices 4 bytes and the weight), whatever the load;
/// back come rows_per_rank * D partial elements.
#pragma once

#include <fastmoe/parallel/sent_choices.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

struct padded_state {
    sent_choices lists;
    vector_view<int64_t> overflow; // (1)  rows that did not fit, over all ranks that this one sends to
    exchange_sizes sizes;
    int64_t k = 0;
};

/// As list_choices, but rank r's rows begin at r * budget, and a row's choices at row * k.
template <class Real>
struct list_padded_choices {
    routing<Real> route;
    grouped_choices grouped;
    sent_choices lists;
    int64_t budget, k;

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        const int64_t begin = route.begin(t), end = route.end(t), slices = lists.slices;
        for (int64_t lead = begin; lead < end; ++lead) {
            const int64_t rank = grouped.row_rank(lead);
            if (rank < 0 || rank >= budget) continue;
            const int32_t g = grouped.group(lead);
            for (int64_t s = 0; s < slices; ++s) {
                const int64_t row = (g * slices + s) * budget + rank;
                lists.row_of(lead * slices + s) = static_cast<int32_t>(row);
                lists.token_of(row) = static_cast<int32_t>(t);
                int64_t at = row * k;
                for (int64_t c = lead; c < end; ++c)
                    if (grouped.group(c) == g) lists.at(c * slices + s) = static_cast<int32_t>(at++);
            }
        }
    }
};

struct count_overflow {
    vector_view<const int32_t> rows; // (P)
    int64_t budget, slices;
    vector_view<int64_t> overflow;   // (1)

    FASTMOE_HOST_DEVICE void operator()(int64_t) const
    {
        int64_t n = 0;
        for (int64_t g = 0; g < rows.extent(0); ++g) n += rows(g) > budget ? (rows(g) - budget) * slices : 0;
        overflow(0) = n;
    }
};

/// For each rank: experts of all its rows' choices, then weights.
template <class Real, class Rule>
struct pack_padded_choices {
    routing<Real> route;
    placed_experts<Rule> place;
    sent_choices lists;
    int64_t block; ///< choices for a rank: budget * k
    vector_view<int32_t> words;

    FASTMOE_HOST_DEVICE void operator()(int64_t c) const
    {
        constexpr int64_t each = weight_words<Real>;
        for (int64_t s = 0; s < lists.slices; ++s) {
            const int64_t at = lists.at(c * lists.slices + s);
            if (at < 0) continue;
            int32_t* to = words.data_handle() + at / block * block * (1 + each);
            to[at % block] = place.of(route.experts(c)).local;
            put_weight(to + block + at % block * each, route.weights(c));
        }
    }
};

template <class Real>
struct unpack_padded_choices {
    vector_view<const int32_t> words;
    int64_t block;
    routing<Real> received;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        constexpr int64_t each = weight_words<Real>;
        const int32_t* from = words.data_handle() + i / block * block * (1 + each);
        const int32_t e = from[i % block];
        received.experts(i) = e;
        received.weights(i) = e < 0 ? Real(0) : get_weight<Real>(from + block + i % block * each);
    }
};

} // namespace detail

/// For gates whose tokens all have K choices. What did not fit stands in saved.exchange(chunk).overflow.
template <class Partials = accumulated_partials>
struct padded_exchange {
    /// The budget: tokens that a rank sends to another; the same on all ranks. Chunks have equal shares of it, rounded up.
    int64_t rows_per_rank = 0;

    using partials = Partials;
    template <class Real>
    using state = detail::padded_state;

    padded_exchange of_chunk(int chunks) const noexcept { return {(rows_per_rank + chunks - 1) / chunks}; }

    /// @throws invalid_argument if choices are ragged, or the budget is negative, or zero though there are tokens
    template <class Real, class Rule>
    detail::padded_state reserve(arena& memory, const routing<Real>& route, const placed_experts<Rule>& place) const
    {
        expects(!route.ragged(), "routing", "ragged", "K choices for every token, which the padded exchange has room for");
        expects(rows_per_rank > 0 || route.tokens == 0, "exchange.rows_per_rank", rows_per_rank, "1 or more");
        expects(rows_per_rank >= 0 && rows_per_rank <= INT32_MAX / place.ranks() / (route.k > 0 ? route.k : 1),
                "exchange.rows_per_rank", rows_per_rank, "0 or more, and fewer than 2^31 choices in all");
        const int64_t rows = place.ranks() * rows_per_rank;
        detail::padded_state s;
        s.lists = detail::reserve_sent_choices(memory, route.choices(), rows, place.slices);
        s.overflow = memory.vector<int64_t>(1);
        s.k = route.k;
        s.sizes = {rows, rows * s.k, rows, rows * s.k};
        return s;
    }
    exchange_sizes sizes(const detail::padded_state& s) const noexcept { return s.sizes; }

    /// @throws invalid_argument for a fault of the gate
    template <class Executor, class C, class Real, class Rule>
    void announce(Executor& ex, const C&, const routing<Real>& route, const placed_experts<Rule>& place,
                  detail::padded_state& s, arena& scratch) const
    {
        const arena::scope lent(scratch);
        detail::with_grouped_choices(ex, route, place, scratch, [&](const routing<Real>& safe, auto, const auto& grouped) {
            if (scratch.measuring()) return;
            const auto& l = s.lists;
            fastmoe::for_each(ex, l.at.extent(0), detail::clear_ids{l.at.data_handle()});
            fastmoe::for_each(ex, l.row_of.extent(0), detail::clear_ids{l.row_of.data_handle()});
            fastmoe::for_each(ex, l.token_of.extent(0), detail::clear_ids{l.token_of.data_handle()});
            fastmoe::for_each(ex, route.tokens, detail::list_padded_choices<Real>{safe, grouped, l, rows_per_rank, s.k});
            fastmoe::for_each(ex, 1, detail::count_overflow{grouped.rows, rows_per_rank, l.slices, s.overflow});
        });
        if (!scratch.measuring()) ex.deliver_faults();
    }

    template <class Real, class Rule>
    routing<Real> reserve_received(arena& memory, const detail::padded_state& s, const placed_experts<Rule>& place) const
    {
        return reserve_routing<Real>(memory, s.sizes.rows, place.local_experts(), s.k);
    }

    template <class Executor, class C, class Real, class Rule>
    void send_choices(Executor& ex, const C& c, const routing<Real>& route, const placed_experts<Rule>& place,
                      const detail::padded_state& s, const routing<Real>& received, arena& scratch) const
    {
        const arena::scope lent(scratch);
        const int64_t words = s.sizes.choices * (1 + detail::weight_words<Real>), block = rows_per_rank * s.k;
        const auto out = scratch.vector<int32_t>(words), in = scratch.vector<int32_t>(words);
        if (scratch.measuring()) return;
        fastmoe::for_each(ex, words, detail::clear_ids{out.data_handle()});
        if (block > 0)
            fastmoe::for_each(ex, route.choices(),
                              detail::pack_padded_choices<Real, Rule>{route, place, s.lists, block, out});
        c.all_to_all(ex, vector_view<const int32_t>(out), in);
        fastmoe::for_each(ex, s.sizes.choices, detail::unpack_padded_choices<Real>{in, block, received});
    }

    /// @param x     tokens                                                  // (T,D)
    /// @param rows  overwritten; zeros where nothing was sent                // (M,D)
    template <class Executor, class C, class T>
    void send_rows(Executor& ex, const C& c, const detail::padded_state& s, matrix_view<const T> x, matrix_view<T> rows,
                   arena& scratch) const
    {
        const arena::scope lent(scratch);
        const auto out = scratch.matrix<T>(s.sizes.sent_rows, x.extent(1));
        if (scratch.measuring()) return;
        detail::gather_sent(ex, x, s.lists, out);
        c.all_to_all(ex, vector_view<const T>(detail::flat(out)), detail::flat(rows));
    }

    template <class Real, class Executor, class C, class P>
    returned_rows<P, Real> bring_rows_back(Executor& ex, const C& c, const routing<Real>& route,
                                           const detail::padded_state& s, matrix_view<P> partial, arena& memory) const
    {
        const auto back = memory.matrix<P>(s.sizes.sent_rows, partial.extent(1));
        if (!memory.measuring()) c.all_to_all(ex, vector_view<const P>(detail::flat(partial)), detail::flat(back));
        return {back, s.lists.row_of, {route, s.lists.slices}};
    }

    template <class Executor, class C, class Real>
    void bring_back(Executor& ex, const C& c, const detail::padded_state& s, vector_view<Real> values, vector_view<Real> out,
                    arena& scratch) const
    {
        const arena::scope lent(scratch);
        const auto back = scratch.vector<Real>(s.sizes.sent_choices);
        if (scratch.measuring()) return;
        c.all_to_all(ex, vector_view<const Real>(values), back);
        fastmoe::for_each(ex, out.extent(0), detail::sum_returned_choices<Real>{back, s.lists.at, s.lists.slices, out});
    }
};

} // namespace fastmoe::inline FASTMOE_ABI
