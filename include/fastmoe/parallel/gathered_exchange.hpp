// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The gathered exchange: every rank gets all tokens, and the sums of partial rows are scattered. Better than lists while
/// there are no more ranks than choices a token, since nearly all tokens then go nearly everywhere anyway.
///
/// With N the most tokens of a rank, each rank sends to each other one N * D elements and, for each of N * K choices, 4 bytes
/// and the weight; back come N * D partial elements from each. Ragged choices add 4 (N + 1) bytes.
#pragma once

#include <vector>

#include <fastmoe/parallel/sent_choices.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

struct gathered_state {
    int64_t tokens = 0;   ///< N: of every rank, padded
    int64_t choices = 0;  ///< of every rank, padded
    int64_t k = 0;        ///< 0: ragged
    exchange_sizes sizes;
    vector_view<int64_t> counts; // (2 + 2R)  own tokens and choices, and those of all
    int64_t own_tokens = 0, own_choices = 0;

    int64_t first_words() const noexcept { return k == 0 ? tokens + 1 : 0; }
    /// Experts, weights, and where tokens' choices begin if they are ragged.
    int64_t words(int64_t words_each) const noexcept { return choices * (1 + words_each) + first_words(); }
    void set(int64_t n, int64_t c, int64_t ranks)
    {
        tokens = n;
        choices = c;
        expects(n <= INT32_MAX / ranks && c <= INT32_MAX / ranks, "tokens and choices of all ranks", ranks * (c > n ? c : n),
                "at most 2^31 - 1");
        sizes = {n, c, ranks * n, ranks * c};
    }
};

struct note_counts {
    int64_t tokens, choices;
    vector_view<int64_t> counts; // (2)

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { counts(i) = i == 0 ? tokens : choices; }
};

template <class Real>
struct pack_own_choices {
    routing<Real> safe;
    vector_view<const int32_t> ids; // (C)
    int64_t choices;                ///< padded
    vector_view<int32_t> words;

    FASTMOE_HOST_DEVICE void operator()(int64_t c) const
    {
        const bool mine = c < ids.extent(0);
        words(c) = mine ? ids(c) : -1;
        put_weight(words.data_handle() + choices + c * weight_words<Real>, mine && ids(c) >= 0 ? safe.weights(c) : Real(0));
    }
};

template <class Real>
struct pack_own_first {
    routing<Real> safe;
    int32_t* to; // (N+1)

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        to[t] = static_cast<int32_t>(t == 0 ? 0 : t < safe.tokens ? safe.begin(t) : safe.choices());
    }
};

/// All ranks' choices, with local numbers for the experts that are here.
template <class Real, class Rule>
struct unpack_gathered_choices {
    placed_experts<Rule> place;
    vector_view<const int32_t> words;
    int64_t choices, block; ///< of a rank; words of a rank
    routing<Real> received;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        const int32_t* from = words.data_handle() + i / choices * block;
        const int32_t e = from[i % choices];
        const expert_place p = e < 0 ? expert_place{-1, -1} : place.of(e);
        const bool here = p.group == place.rank / place.slices;
        received.experts(i) = here ? p.local : -1;
        received.weights(i) = here ? get_weight<Real>(from + choices + i % choices * weight_words<Real>) : Real(0);
    }
};

struct unpack_gathered_first {
    vector_view<const int32_t> words;
    int64_t tokens, choices, block, skip;
    vector_view<int32_t> first; // (M+1)

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        const int64_t r = i / tokens;
        first(i) = i + 1 == first.extent(0) ? static_cast<int32_t>(r * choices)
                                            : static_cast<int32_t>(r * choices + words(r * block + skip + i % tokens));
    }
};

/// to = the first rows of from, and zeros.
template <class T>
struct pad_elements {
    using vectorized = void;
    const T* from;
    T* to;
    int64_t count;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { to[i] = i < count ? from[i] : T(accumulate_t<T>(0)); }
};

} // namespace detail

/// Every rank computes its experts for all ranks' tokens. Without most_tokens, announce() waits until the host knows how
/// many the others have.
template <class Partials = accumulated_partials>
struct gathered_exchange {
    int64_t most_tokens = 0; ///< of a rank; the same on all ranks. 0: agreed in every step

    using partials = Partials;
    template <class Real>
    using state = detail::gathered_state;

    gathered_exchange of_chunk(int chunks) const noexcept { return {(most_tokens + chunks - 1) / chunks}; }

    /// @throws invalid_argument if there are more tokens than most_tokens, or it is given and choices are ragged
    template <class Real, class Rule>
    detail::gathered_state reserve(arena& memory, const routing<Real>& route, const placed_experts<Rule>& place) const
    {
        expects(most_tokens >= 0, "exchange.most_tokens", most_tokens, "0 or more");
        expects(most_tokens == 0 || route.tokens <= most_tokens, "x (T,D)", route.tokens, "exchange.most_tokens = ",
                most_tokens, " tokens or fewer");
        expects(most_tokens == 0 || !route.ragged(), "exchange.most_tokens", most_tokens, "0 for ragged choices");
        detail::gathered_state s;
        s.k = route.ragged() ? 0 : route.k;
        s.own_tokens = route.tokens;
        s.own_choices = route.choices();
        s.counts = memory.vector<int64_t>(2 + 2 * place.ranks());
        const int64_t tokens = most_tokens > 0 ? most_tokens : route.tokens;
        s.set(tokens, route.ragged() ? route.choices() : tokens * route.k, place.ranks());
        return s;
    }
    exchange_sizes sizes(const detail::gathered_state& s) const noexcept { return s.sizes; }

    /// @throws invalid_argument for a fault of the gate, comm_error; both before anything of the caller's is written
    template <class Executor, class C, class Real, class Rule>
    void announce(Executor& ex, const C& c, const routing<Real>& route, const placed_experts<Rule>& place,
                  detail::gathered_state& s, arena& scratch) const
    {
        const arena::scope lent(scratch);
        // Here, where the caller's thread is, and before anything is sent: chunks may travel on another's.
        detail::with_checked_choices(ex, route, scratch, [](const routing<Real>&, vector_view<int32_t>) {});
        if (!scratch.measuring()) ex.deliver_faults();
        if (most_tokens > 0 || scratch.measuring()) return;
        const int64_t ranks = place.ranks();
        const vector_view<int64_t> own(s.counts.data_handle(), 2), all(s.counts.data_handle() + 2, 2 * ranks);
        fastmoe::for_each(ex, 2, detail::note_counts{route.tokens, route.choices(), own});
        c.all_gather(ex, vector_view<const int64_t>(own), all);
        std::vector<int64_t> known(static_cast<std::size_t>(2 * ranks));
        detail::read_back(ex, vector_view<const int64_t>(all), known.data());
        int64_t tokens = 0, choices = 0;
        for (std::size_t i = 0; i < known.size(); i += 2) {
            tokens = known[i] > tokens ? known[i] : tokens;
            choices = known[i + 1] > choices ? known[i + 1] : choices;
        }
        s.set(tokens, choices, ranks);
    }

    template <class Real, class Rule>
    routing<Real> reserve_received(arena& memory, const detail::gathered_state& s, const placed_experts<Rule>& place) const
    {
        routing<Real> r{s.sizes.rows, place.local_experts(), s.k, {}, {}, {}};
        r.experts = memory.vector<int32_t>(s.sizes.choices);
        r.weights = memory.vector<Real>(s.sizes.choices);
        if (s.k == 0) r.first = memory.vector<int32_t>(s.sizes.rows + 1);
        return r;
    }

    template <class Executor, class C, class Real, class Rule>
    void send_choices(Executor& ex, const C& c, const routing<Real>& route, const placed_experts<Rule>& place,
                      const detail::gathered_state& s, const routing<Real>& received, arena& scratch) const
    {
        constexpr int64_t each = detail::weight_words<Real>;
        const arena::scope lent(scratch);
        const int64_t block = s.words(each), skip = s.choices * (1 + each);
        const auto out = scratch.vector<int32_t>(block), in = scratch.vector<int32_t>(place.ranks() * block);
        detail::with_checked_choices(ex, route, scratch, [&](const routing<Real>& safe, vector_view<int32_t> ids) {
            if (scratch.measuring()) return;
            fastmoe::for_each(ex, s.choices, detail::pack_own_choices<Real>{safe, ids, s.choices, out});
            if (s.k == 0) fastmoe::for_each(ex, s.tokens + 1, detail::pack_own_first<Real>{safe, out.data_handle() + skip});
        });
        if (scratch.measuring()) return;
        c.all_gather(ex, vector_view<const int32_t>(out), in);
        fastmoe::for_each(ex, s.sizes.choices,
                          detail::unpack_gathered_choices<Real, Rule>{place, in, s.choices, block, received});
        if (s.k != 0) return;
        const vector_view<int32_t> first(const_cast<int32_t*>(received.first.data_handle()), received.first.extent(0));
        fastmoe::for_each(
            ex, first.extent(0),
            detail::unpack_gathered_first{in, s.tokens > 0 ? s.tokens : 1, s.choices, block, skip, first});
    }

    /// @param x     tokens                       // (T,D)
    /// @param rows  overwritten                   // (M,D)
    template <class Executor, class C, class T>
    void send_rows(Executor& ex, const C& c, const detail::gathered_state& s, matrix_view<const T> x, matrix_view<T> rows,
                   arena& scratch) const
    {
        const arena::scope lent(scratch);
        const int64_t width = x.extent(1), all = s.tokens * width, own = x.extent(0) * width;
        const auto padded = scratch.vector<T>(x.extent(0) == s.tokens ? 0 : all);
        if (scratch.measuring()) return;
        vector_view<const T> sent(x.data_handle(), own);
        if (x.extent(0) != s.tokens) {
            fastmoe::for_each(ex, all, detail::pad_elements<T>{x.data_handle(), padded.data_handle(), own});
            sent = padded;
        }
        c.all_gather(ex, sent, detail::flat(rows));
    }

    template <class Real, class Executor, class C, class P>
    returned_rows<P, Real> bring_rows_back(Executor& ex, const C& c, const routing<Real>& route,
                                           const detail::gathered_state& s, matrix_view<P> partial, arena& memory) const
    {
        const auto back = memory.matrix<P>(s.tokens, partial.extent(1));
        const auto numbers = memory.vector<int32_t>(route.tokens);
        if (!memory.measuring()) {
            c.reduce_scatter(ex, vector_view<const P>(detail::flat(partial)), detail::flat(back));
            fastmoe::for_each(ex, route.tokens, detail::count_up{numbers.data_handle()});
        }
        return {back, numbers, {route, 0}};
    }

    template <class Executor, class C, class Real>
    void bring_back(Executor& ex, const C& c, const detail::gathered_state& s, vector_view<Real> values,
                    vector_view<Real> out, arena& scratch) const
    {
        const arena::scope lent(scratch);
        const auto back = scratch.vector<Real>(s.choices);
        if (scratch.measuring()) return;
        c.reduce_scatter(ex, vector_view<const Real>(values), back);
        fastmoe::for_each(ex, out.extent(0),
                          detail::pad_elements<Real>{back.data_handle(), out.data_handle(), out.extent(0)});
    }
};

} // namespace fastmoe::inline FASTMOE_ABI
