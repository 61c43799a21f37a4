// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The exact exchange: counts first, then what there is and not a byte more. No token is lost, whatever the load; the host
/// learns the counts, and waits for them.
///
/// To each other rank that holds one of a token's experts go D elements, 4 bytes, and for each choice there 4 bytes and the
/// weight (4 bytes; 8 in double); 16 bytes a pair of ranks are counts. Back come D partial elements.
#pragma once

#include <vector>

#include <fastmoe/parallel/sent_choices.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

/// How much goes to and comes from each rank: in the executor's memory for its loops, on the host's heap for collectives.
struct exact_counts {
    vector_view<int64_t> sent;     // (2R)  rows and choices for each rank
    vector_view<int64_t> received; // (2R)  from each
    std::vector<int64_t> sent_rows, sent_choices, rows, choices; // (R)  empty until announced
};

struct exact_state {
    sent_choices lists;
    exact_counts counts;
    exchange_sizes sizes; ///< the most, or what was announced
};

inline vector_view<const int64_t> view_of(const std::vector<int64_t>& v)
{
    return vector_view<const int64_t>(v.data(), static_cast<int64_t>(v.size()));
}

/// counts(2r), counts(2r+1) = rows and choices for rank r.
struct count_for_ranks {
    grouped_choices grouped;
    int64_t slices;
    vector_view<int64_t> counts; // (2R)

    FASTMOE_HOST_DEVICE void operator()(int64_t r) const
    {
        counts(2 * r) = grouped.rows(r / slices);
        counts(2 * r + 1) = grouped.choices(r / slices);
    }
};

/// Where each rank's rows and choices begin; word(r) is where its choices begin in what send_choices sends.
struct rank_begin {
    int64_t row = 0, choice = 0;

    /// @param counts  rows and choices of each rank          // (2R)
    FASTMOE_HOST_DEVICE static rank_begin of(vector_view<const int64_t> counts, int64_t rank) noexcept
    {
        rank_begin b;
        for (int64_t r = 0; r < rank; ++r) {
            b.row += counts(2 * r);
            b.choice += counts(2 * r + 1);
        }
        return b;
    }
    FASTMOE_HOST_DEVICE int64_t word(int64_t words_each) const noexcept { return row + choice * (1 + words_each); }
};

struct begin_ranks {
    vector_view<const int64_t> counts; // (2R)
    vector_view<rank_begin> begins;    // (R)

    FASTMOE_HOST_DEVICE void operator()(int64_t r) const { begins(r) = rank_begin::of(counts, r); }
};

/// Fills the lists: rows and choices of a rank are packed, in choice order.
template <class Real>
struct list_choices {
    routing<Real> route;
    grouped_choices grouped;
    vector_view<const rank_begin> begins; // (R)
    sent_choices lists;

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        for (int64_t c = route.begin(t); c < route.end(t); ++c) {
            const int32_t g = grouped.group(c);
            if (g < 0) continue;
            for (int64_t s = 0; s < lists.slices; ++s) {
                const rank_begin b = begins(g * lists.slices + s);
                lists.at(c * lists.slices + s) = static_cast<int32_t>(b.choice + grouped.choice_rank(c));
                if (grouped.row_rank(c) < 0) continue;
                const int64_t row = b.row + grouped.row_rank(c);
                lists.row_of(c * lists.slices + s) = static_cast<int32_t>(row);
                lists.token_of(row) = static_cast<int32_t>(t);
            }
        }
    }
};

/// For each rank: how many choices each of its rows has, then the experts' local numbers, then the weights.
template <class Real, class Rule>
struct pack_choices {
    routing<Real> route;
    placed_experts<Rule> place;
    sent_choices lists;
    vector_view<const int64_t> counts;    // (2R)
    vector_view<const rank_begin> begins; // (R)
    vector_view<int32_t> words;

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        constexpr int64_t each = weight_words<Real>;
        const int64_t begin = route.begin(t), end = route.end(t), slices = lists.slices;
        for (int64_t c = begin; c < end; ++c) {
            if (lists.at(c * slices) < 0) continue;
            const expert_place p = place.of(route.experts(c));
            for (int64_t s = 0; s < slices; ++s) {
                const int64_t r = p.group * slices + s;
                const rank_begin b = begins(r);
                int32_t* block = words.data_handle() + b.word(each);
                const int64_t rows = counts(2 * r), choices = counts(2 * r + 1), at = lists.at(c * slices + s) - b.choice;
                block[rows + at] = p.local;
                put_weight(block + rows + choices + at * each, route.weights(c));
                const int32_t row = lists.row_of(c * slices + s);
                if (row < 0) continue;
                int32_t n = 1;
                for (int64_t later = c + 1; later < end; ++later)
                    n += lists.at(later * slices) >= 0 && place.of(route.experts(later)).group == p.group;
                block[row - b.row] = n;
            }
        }
    }
};

/// What came from one rank, as a part of the received routing.
template <class Real>
struct unpack_choices {
    vector_view<const int32_t> words;
    vector_view<const int64_t> counts; // (2R)
    routing<Real> received;
    vector_view<int32_t> first; // (M+1)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t r) const
    {
        constexpr int64_t each = weight_words<Real>;
        const rank_begin b = rank_begin::of(counts, r);
        const int64_t rows = counts(2 * r), choices = counts(2 * r + 1);
        const int32_t* block = words.data_handle() + b.word(each);
        const auto& self = *this;
        team.scan(
            rows, int64_t{0}, [](int64_t x, int64_t y) { return x + y; }, [=](int64_t i) { return int64_t{block[i]}; },
            [=, &self](int64_t i, int64_t before) { self.first(b.row + i) = static_cast<int32_t>(b.choice + before); });
        team.for_each(choices, [=, &self](int64_t i) {
            self.received.experts(b.choice + i) = block[rows + i];
            self.received.weights(b.choice + i) = get_weight<Real>(block + rows + choices + i * each);
        });
        if (team.lane() == 0 && 2 * (r + 1) == counts.extent(0)) first(b.row + rows) = static_cast<int32_t>(b.choice + choices);
    }
};

} // namespace detail

/// Each token goes once to each rank that holds one of its experts, and one partial row comes back from there.
/// announce() waits until the host knows the counts, and keeps 32 R bytes of them on the host's heap.
/// @tparam Partials  what partial rows travel in: accumulated_partials or rounded_partials
template <class Partials = accumulated_partials>
struct exact_exchange {
    using partials = Partials;
    template <class Real>
    using state = detail::exact_state;

    /// Room for the lists of a routing; sizes are the most that can be while no rank has more tokens or choices.
    template <class Real, class Rule>
    detail::exact_state reserve(arena& memory, const routing<Real>& route, const placed_experts<Rule>& place) const
    {
        const int64_t choices = route.choices(), ranks = place.ranks(), slices = place.slices;
        const int64_t rows = choices < route.tokens * place.groups ? choices : route.tokens * place.groups;
        detail::exact_state s;
        s.lists = detail::reserve_sent_choices(memory, choices, rows * slices, slices);
        s.counts.sent = memory.vector<int64_t>(2 * ranks);
        s.counts.received = memory.vector<int64_t>(2 * ranks);
        s.sizes = {rows * slices, choices * slices, ranks * route.tokens, ranks * choices};
        return s;
    }
    exchange_sizes sizes(const detail::exact_state& s) const noexcept { return s.sizes; }

    /// @throws invalid_argument for a fault of the gate, comm_error; both before anything of the caller's is written
    template <class Executor, class C, class Real, class Rule>
    void announce(Executor& ex, const C& c, const routing<Real>& route, const placed_experts<Rule>& place,
                  detail::exact_state& s, arena& scratch) const
    {
        const arena::scope lent(scratch);
        const int64_t ranks = place.ranks();
        const auto begins = scratch.vector<detail::rank_begin>(ranks);
        detail::with_grouped_choices(ex, route, place, scratch, [&](const routing<Real>& safe, auto, const auto& grouped) {
            if (scratch.measuring()) return;
            const auto& l = s.lists;
            fastmoe::for_each(ex, ranks, detail::count_for_ranks{grouped, l.slices, s.counts.sent});
            fastmoe::for_each(ex, ranks, detail::begin_ranks{s.counts.sent, begins});
            fastmoe::for_each(ex, l.at.extent(0), detail::clear_ids{l.at.data_handle()});
            fastmoe::for_each(ex, l.row_of.extent(0), detail::clear_ids{l.row_of.data_handle()});
            fastmoe::for_each(ex, route.tokens, detail::list_choices<Real>{safe, grouped, begins, l});
        });
        if (scratch.measuring()) return;
        ex.deliver_faults();
        learn(ex, c, s, ranks);
    }

    template <class Real, class Rule>
    routing<Real> reserve_received(arena& memory, const detail::exact_state& s, const placed_experts<Rule>& place) const
    {
        routing<Real> r{s.sizes.rows, place.local_experts(), 0, {}, {}, {}};
        r.experts = memory.vector<int32_t>(s.sizes.choices);
        r.weights = memory.vector<Real>(s.sizes.choices);
        r.first = memory.vector<int32_t>(s.sizes.rows + 1);
        return r;
    }

    template <class Executor, class C, class Real, class Rule>
    void send_choices(Executor& ex, const C& c, const routing<Real>& route, const placed_experts<Rule>& place,
                      const detail::exact_state& s, const routing<Real>& received, arena& scratch) const
    {
        constexpr int64_t each = 1 + detail::weight_words<Real>;
        const arena::scope lent(scratch);
        const auto begins = scratch.vector<detail::rank_begin>(place.ranks());
        const auto out = scratch.matrix<int32_t>(s.sizes.sent_rows + s.sizes.sent_choices * each, 1);
        const auto in = scratch.matrix<int32_t>(s.sizes.rows + s.sizes.choices * each, 1);
        if (scratch.measuring()) return;
        const auto& n = s.counts;
        fastmoe::for_each(ex, place.ranks(), detail::begin_ranks{n.sent, begins});
        fastmoe::for_each(ex, route.tokens,
                          detail::pack_choices<Real, Rule>{route, place, s.lists, n.sent, begins, detail::flat(out)});
        std::vector<int64_t> sent(n.rows.size()), came(n.rows.size());
        for (std::size_t r = 0; r < sent.size(); ++r) {
            sent[r] = n.sent_rows[r] + n.sent_choices[r] * each;
            came[r] = n.rows[r] + n.choices[r] * each;
        }
        c.all_to_all_v(ex, matrix_view<const int32_t>(out), detail::view_of(sent), in, detail::view_of(came));
        const vector_view<int32_t> first(const_cast<int32_t*>(received.first.data_handle()), received.first.extent(0));
        fastmoe::for_each_row(ex, place.ranks(),
                              detail::unpack_choices<Real>{detail::flat(in), n.received, received, first},
                              {.width = s.sizes.choices});
    }

    /// @param x     tokens             // (T,D)
    /// @param rows  overwritten         // (M,D)
    template <class Executor, class C, class T>
    void send_rows(Executor& ex, const C& c, const detail::exact_state& s, matrix_view<const T> x, matrix_view<T> rows,
                   arena& scratch) const
    {
        const arena::scope lent(scratch);
        const auto out = scratch.matrix<T>(s.sizes.sent_rows, x.extent(1));
        if (scratch.measuring()) return;
        detail::gather_sent(ex, x, s.lists, out);
        c.all_to_all_v(ex, matrix_view<const T>(out), detail::view_of(s.counts.sent_rows), rows,
                       detail::view_of(s.counts.rows));
    }

    /// The result's rows are taken from `memory` and stay taken.
    /// @param partial  a row for each received token        // (M,D)
    template <class Real, class Executor, class C, class P>
    returned_rows<P, Real> bring_rows_back(Executor& ex, const C& c, const routing<Real>& route, const detail::exact_state& s,
                                           matrix_view<P> partial, arena& memory) const
    {
        const auto back = memory.matrix<P>(s.sizes.sent_rows, partial.extent(1));
        if (!memory.measuring())
            c.all_to_all_v(ex, matrix_view<const P>(partial), detail::view_of(s.counts.rows), back,
                           detail::view_of(s.counts.sent_rows));
        return {back, s.lists.row_of, {route, s.lists.slices}};
    }

    /// @param values  of the received choices                       // (Cr)
    /// @param out     overwritten; 0 for a choice that was not sent  // (C)
    template <class Executor, class C, class Real>
    void bring_back(Executor& ex, const C& c, const detail::exact_state& s, vector_view<Real> values, vector_view<Real> out,
                    arena& scratch) const
    {
        const arena::scope lent(scratch);
        const auto back = scratch.matrix<Real>(s.sizes.sent_choices, 1);
        if (scratch.measuring()) return;
        c.all_to_all_v(ex, matrix_view<const Real>(values.data_handle(), values.extent(0), 1),
                       detail::view_of(s.counts.choices), back, detail::view_of(s.counts.sent_choices));
        fastmoe::for_each(ex, out.extent(0),
                          detail::sum_returned_choices<Real>{detail::flat(back), s.lists.at, s.lists.slices, out});
    }

private:
    /// Exchanges the counts and brings all of them to the host.
    template <class Executor, class C>
    static void learn(Executor& ex, const C& c, detail::exact_state& s, int64_t ranks)
    {
        auto& n = s.counts;
        host_memory heap;
        buffer<int64_t, host_memory> sent(heap, 2 * ranks), came(heap, 2 * ranks);
        if constexpr (exchanges_known_blocks<C, Executor, int64_t>) {
            const auto known = [&] {
                c.all_to_all_known(ex, vector_view<const int64_t>(n.sent), n.received, sent.view(), came.view());
            };
            call_on(known, sent, came);
        } else {
            c.all_to_all(ex, vector_view<const int64_t>(n.sent), n.received);
            detail::read_back(ex, vector_view<const int64_t>(n.sent), sent.data());
            detail::read_back(ex, vector_view<const int64_t>(n.received), came.data());
        }
        const auto split = [&](vector_view<const int64_t> both, std::vector<int64_t>& rows, std::vector<int64_t>& choices) {
            rows.resize(static_cast<std::size_t>(ranks));
            choices.resize(static_cast<std::size_t>(ranks));
            int64_t row_sum = 0, choice_sum = 0;
            for (std::size_t r = 0; r < rows.size(); ++r) {
                const auto at = static_cast<int64_t>(2 * r);
                row_sum += rows[r] = both(at);
                choice_sum += choices[r] = both(at + 1);
            }
            expects(row_sum <= INT32_MAX && choice_sum <= INT32_MAX, "choices that this rank receives", choice_sum,
                    "at most 2^31 - 1");
            return std::pair{row_sum, choice_sum};
        };
        const auto out = split(sent.view(), n.sent_rows, n.sent_choices);
        const auto in = split(came.view(), n.rows, n.choices);
        s.sizes = {out.first, out.second, in.first, in.second};
    }
};

} // namespace fastmoe::inline FASTMOE_ABI
