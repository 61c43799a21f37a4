// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Exchanges: how tokens get to the ranks that hold their experts, and back. What all of them share, and the concept.
///
/// A rank sends each token once to each rank that holds one or more of its experts, with its choices there. It runs plan,
/// experts and combine on what it receives, and returns one partial row a received token; the token's own rank adds
/// them up. Backward moves the gradients along the same lists. All ranks call the same verbs in the same order.
///
///     announce         lists of what goes where; how much comes
///     send_choices     received routing: experts by local number, and weights
///     send_rows        (T,D) -> (M,D)      x, and the gradient of y
///     bring_rows_back  (M,D) -> lists of rows for each token: outputs, and the gradients of x
///     bring_back       (Cr)  -> (C)        the gradients of the routing weights
#pragma once

#include <concepts>
#include <cstdint>
#include <cstring>

#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/exec/scratch.hpp>
#include <fastmoe/parallel/placement.hpp>
#include <fastmoe/routing/routing.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Partial rows travel in the type that sums are kept in, so that R ranks round once like one: 4 bytes an element.
struct accumulated_partials {
    template <class T>
    using type = accumulate_t<T>;
};
/// Partial rows travel rounded to the tokens' type: half the bytes for bf16 and fp16, one more rounding a rank.
struct rounded_partials {
    template <class T>
    using type = T;
};

/// What an exchange moves on this rank. Received rows are the M tokens of the local path, whose choices are Cr.
struct exchange_sizes {
    int64_t sent_rows = 0, sent_choices = 0;
    int64_t rows = 0;    ///< M
    int64_t choices = 0; ///< Cr
};

/// For each token the entries of a list: `each` for every choice of it, or exactly one a token.
template <class Real>
struct token_lists {
    routing<Real> route;
    int64_t each = 0; ///< 0: one entry a token

    FASTMOE_HOST_DEVICE int64_t begin(int64_t t) const noexcept { return each == 0 ? t : each * route.begin(t); }
    FASTMOE_HOST_DEVICE int64_t end(int64_t t) const noexcept { return each == 0 ? t + 1 : each * route.end(t); }
};

/// What came back: token t's sum is that of rows(row_of(i)) over its list's entries i, those of -1 left out, in order.
template <class P, class Real>
struct returned_rows {
    matrix_view<P> rows;               // (N,D)
    vector_view<const int32_t> row_of; // (I)
    token_lists<Real> lists;
};

/// Names its state and what partial rows travel in, reserves both that and the received routing, and knows the sizes: of an
/// announced exchange as they are, before that the most that they can be while no rank has more tokens than this one.
/// Optional: of_chunk(n), the exchange of one of n chunks, where something is said of a rank's tokens.
template <class X, class Real, class Rule = block_placement>
concept reserves_exchange = requires(const X& x, arena& memory, const routing<Real>& route, const placed_experts<Rule>& place,
                                     typename X::template state<Real>& state) {
    typename X::partials::template type<float>;
    { x.template reserve<Real>(memory, route, place) } -> std::same_as<typename X::template state<Real>>;
    { x.sizes(state) } -> std::same_as<exchange_sizes>;
    { x.template reserve_received<Real>(memory, state, place) } -> std::same_as<routing<Real>>;
};

/// Decides what goes where and tells the other ranks.
template <class X, class Executor, class C, class Real, class Rule = block_placement>
concept announces = requires(const X& x, Executor& ex, const C& c, arena& memory, const routing<Real>& route,
                             const placed_experts<Rule>& place, typename X::template state<Real>& state) {
    x.announce(ex, c, route, place, state, memory);
};

/// Moves choices and tokens to the ranks of their experts.
template <class X, class Executor, class C, class T, class Rule = block_placement>
concept sends_tokens = requires(const X& x, Executor& ex, const C& c, arena& memory, const routing<accumulate_t<T>>& route,
                                const placed_experts<Rule>& place, const typename X::template state<accumulate_t<T>>& state,
                                matrix_view<const T> tokens, matrix_view<T> rows) {
    x.send_choices(ex, c, route, place, state, route, memory);
    x.send_rows(ex, c, state, tokens, rows, memory);
};

/// Moves partial rows and gradients of weights home.
template <class X, class Executor, class C, class T>
concept brings_back = requires(const X& x, Executor& ex, const C& c, arena& memory, const routing<accumulate_t<T>>& route,
                               const typename X::template state<accumulate_t<T>>& state,
                               matrix_view<typename X::partials::template type<T>> partial, vector_view<accumulate_t<T>> values) {
    x.template bring_rows_back<accumulate_t<T>>(ex, c, route, state, partial, memory);
    x.bring_back(ex, c, state, values, values, memory);
};

/// All of it.
template <class X, class Executor, class C, class T, class Rule = block_placement>
concept exchange_policy = reserves_exchange<X, accumulate_t<T>, Rule> && announces<X, Executor, C, accumulate_t<T>, Rule> &&
                          sends_tokens<X, Executor, C, T, Rule> && brings_back<X, Executor, C, T>;

namespace detail {

/// Words of 4 bytes that a routing weight travels in.
template <class Real>
inline constexpr int64_t weight_words = static_cast<int64_t>(sizeof(Real) / sizeof(int32_t));

template <class Real>
FASTMOE_HOST_DEVICE void put_weight(int32_t* to, Real w) noexcept
{
    const auto* words = reinterpret_cast<const unsigned char*>(&w);
    auto* out = reinterpret_cast<unsigned char*>(to);
    for (std::size_t i = 0; i < sizeof(Real); ++i) out[i] = words[i];
}
template <class Real>
FASTMOE_HOST_DEVICE Real get_weight(const int32_t* from) noexcept
{
    Real w;
    auto* out = reinterpret_cast<unsigned char*>(&w);
    const auto* words = reinterpret_cast<const unsigned char*>(from);
    for (std::size_t i = 0; i < sizeof(Real); ++i) out[i] = words[i];
    return w;
}

/// A matrix as one row of elements, for collectives over equal blocks.
template <class T>
vector_view<T> flat(matrix_view<T> m)
{
    return vector_view<T>(m.data_handle(), m.extent(0) * m.extent(1));
}

/// sum(c) = what came back for choice c, over the slices in order; 0 for a choice that was not sent.
template <class Real>
struct sum_returned_choices {
    vector_view<const Real> back; // (Cs)
    vector_view<const int32_t> at; // (C*slices)
    int64_t slices;
    vector_view<Real> sum; // (C)

    FASTMOE_HOST_DEVICE void operator()(int64_t c) const
    {
        Real total = 0;
        for (int64_t s = 0; s < slices; ++s) {
            const int32_t i = at(c * slices + s);
            if (i >= 0) total += back(i);
        }
        sum(c) = total;
    }
};

} // namespace detail

} // namespace fastmoe::inline FASTMOE_ABI
