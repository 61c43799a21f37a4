// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Token rounding: every expert gets a whole number of the tiles that its products are computed in, close to what top-K
/// would give it, so that no tile is computed for padding.
#pragma once

#include <fastmoe/routing/choose.hpp>
#include <fastmoe/routing/columns.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Which multiple of the tile.
enum class tile_rounding : std::uint8_t {
    nearest, ///< halves go up
    up,
    down,
};

namespace detail {

/// An expert's own choices rank before all others: probabilities are at most 1, so that keys of logarithms are at most 0,
/// and those that are raised are not. None is lost: the order within each part stays.
template <class Key>
struct raise_own {
    matrix_view<Key> columns; // (E,T)
    const int32_t* own;       // (T*K)
    int64_t k;

    static constexpr Key raise = ~no_key<Key>;

    FASTMOE_HOST_DEVICE void operator()(int64_t c) const
    {
        if (own[c] >= 0) columns(own[c], c / k) += raise;
    }
};

/// The number of an expert's own choices, rounded.
struct rounded_count {
    int64_t tile;
    tile_rounding rounding;

    FASTMOE_HOST_DEVICE constexpr int64_t of(int64_t count) const noexcept
    {
        const int64_t before = count / tile, rest = count % tile;
        const bool more = rounding == tile_rounding::up ? rest > 0 : rounding == tile_rounding::nearest && 2 * rest >= tile;
        return (before + more) * tile;
    }

    template <class Team, class Key>
    FASTMOE_HOST_DEVICE int64_t operator()(Team& team, const Key* keys, int64_t tokens) const
    {
        return of(count_at_least(team, keys, tokens, Key(0)));
    }
};

/// The K choices of every token as a ragged routing.
struct equal_ranges {
    int32_t* first; // (T+1)
    int64_t k;

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const { first[t] = static_cast<int32_t>(t * k); }
};

} // namespace detail

/// In training (Guo et al. 2025, "SonicMoE"): every token chooses its top K of p = softmax(l);
/// c_e, how often expert e was chosen, is rounded to a multiple of the tile; e takes that many tokens, those that chose it
/// first, by p, then others, by p. Ties go to the lower token. So no expert differs from top-K by a tile or more. An
/// expert that would need more tokens than there are takes them all. A token may end with more than K experts, with fewer,
/// or with none.
///
/// In inference, where a token's experts must not depend on others: its top K, best first.
///
/// A masked token, and one without a finite or +Inf logit, chooses nothing, and nobody takes it. Logits of -Inf and NaN are
/// chosen, and taken, only when nothing better is left; they weigh 0.
struct token_rounding {
    static constexpr bool reads_logits = true;
    static constexpr bool ragged = true;
    int64_t tile = 128; ///< rows that a product computes together
    tile_rounding rounding = tile_rounding::nearest;

    /// The most that inference (T * K) or training can need. In training, the first tile of an expert takes 1 choice when
    /// rounding up, half a tile when to the nearest and a whole one when down, and every further tile a whole one: with as
    /// many experts as T * K choices can serve, that is the most tiles. No expert gets more than T tokens.
    int64_t choices(int64_t tokens, int64_t experts, int64_t k) const
    {
        expects(k == 0 || tokens <= INT32_MAX / k, "tokens * k", tokens, "at most 2^31 - 1 choices");
        const int64_t all = tokens * k;
        const int64_t start = rounding == tile_rounding::up     ? 1
                              : rounding == tile_rounding::down ? tile
                                                                : tile - tile / 2;
        const int64_t served = all / start < experts ? all / start : experts;
        const int64_t tiles = served + (all - served * start) / tile;
        const int64_t each = detail::rounded_count{tile, rounding}.of(tokens), reach = each < tokens ? each : tokens;
        int64_t most = tiles <= INT32_MAX / tile ? tiles * tile : INT64_MAX;
        if (reach == 0 || most / reach >= experts) most = reach * experts;
        expects(most <= INT32_MAX, "tokens * k", tokens, "at most 2^31 - 1 choices, rounded");
        return most > all ? most : all;
    }

    /// @throws invalid_argument if K is over E, or the tile is not a number of tokens
    void validate(int64_t experts, int64_t k) const
    {
        expects(k <= experts, "k", k, "at most the number of experts, ", experts);
        expects(tile >= 1 && tile <= INT32_MAX, "assignment.tile", tile, "1 to 2^31 - 1");
    }

    template <class Executor, class T, class Communicator, class Real>
    void assign(Executor& ex, const gate_input<T>& in, const Communicator&, const assignment<Real>& to, arena& scratch) const
    {
        if (in.mode == gate_mode::inference) {
            if (!scratch.measuring()) choose(ex, in, to);
            return;
        }
        using key = detail::order_key<Real>;
        const auto own = scratch.vector<int32_t>(to.tokens * to.k);
        const auto columns =
            detail::probability_columns(ex, in.logits, in.mask, to.tokens, to.total_experts, scratch);
        if (!scratch.measuring()) {
            detail::choose_rows(ex, in.logits, in.mask, to.k, detail::logit_rows{}, own);
            fastmoe::for_each(ex, to.tokens * to.k, detail::raise_own<key>{columns, own.data_handle(), to.k});
        }
        detail::take_greatest(ex, columns, detail::rounded_count{tile, rounding}, to, scratch);
    }

private:
    template <class Executor, class T, class Real>
    static void choose(Executor& ex, const gate_input<T>& in, const assignment<Real>& to)
    {
        const int64_t all = to.tokens * to.k;
        detail::choose_rows(ex, in.logits, in.mask, to.k, detail::logit_rows{}, slice(to.experts, 0, all));
        fastmoe::for_each(ex, to.tokens + 1, detail::equal_ranges{to.first.data_handle(), to.k});
        fastmoe::for_each(ex, to.experts.extent(0),
                          detail::clear_rest{to.first.data_handle() + to.tokens, to.experts.data_handle()});
    }
};

/// Weights are the softmax over what a token ends with: `token_rounding_gate{.experts = 64, .k = 8}`.
using token_rounding_gate = assigned_gate<token_rounding, softmax_score, renormalize>;

} // namespace fastmoe::inline FASTMOE_ABI
