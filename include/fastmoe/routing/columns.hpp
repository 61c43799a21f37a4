// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Choices the other way around: the best tokens of every expert. Scores by expert, the greatest of each column, and the
/// ragged routing that they make. What expert choice and token rounding are built on.
///
/// Scores of different tokens are compared here, so they must not depend on how a row was summed: equal probabilities
/// shall be equal bits, on any executor. Powers are taken in double and added as integers, which no order changes.
#pragma once

#include <limits>

#include <fastmoe/routing/assigned_gate.hpp>
#include <fastmoe/routing/select.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// Tokens that are moved or packed together: the bits of a word.
inline constexpr int64_t column_block = 64;

FASTMOE_HOST_DEVICE constexpr int64_t column_blocks(int64_t tokens) noexcept
{
    return (tokens + column_block - 1) / column_block;
}

/// columns(e, t) = value(t, e), a block of tokens at a time, so that both sides stay in cache.
template <class Value, class F>
struct write_columns {
    using vectorized = void;
    matrix_view<Value> columns; // (E,T)
    F value;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t b) const
    {
        const int64_t tokens = columns.extent(1), begin = b * column_block;
        const int64_t n = tokens - begin < column_block ? tokens - begin : column_block;
        Value* out = columns.data_handle() + begin;
        const F of = value;
        team.for_each(columns.extent(0), [=](int64_t e) {
            for (int64_t i = 0; i < n; ++i) out[e * tokens + i] = of(begin + i, e);
        });
    }
};

template <class Executor, class Value, class F>
void fill_columns(Executor& ex, matrix_view<Value> columns, const F& value)
{
    fastmoe::for_each_row(ex, column_blocks(columns.extent(1)), write_columns<Value, F>{columns, value},
                          {.width = column_block * columns.extent(0)});
}

/// Peak and log sum_e exp(l_e - peak) of every token; a peak of -Inf if the token takes no part.
template <class Real>
struct sum_powers {
    matrix_view<const Real> logits; // (T,E)
    const std::uint8_t* mask;       // (T), or null
    Real* peaks;                    // (T)
    double* log_sums;               // (T)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const int64_t experts = logits.extent(1);
        const Real* l = logits.data_handle() + t * experts;
        const Real peak = mask && mask[t] == 0 ? -infinity<Real> : greatest(team, l, experts);
        double total = 1;
        if (peak > -infinity<Real>) {
            int digits = 62; // of a power of 1; the sum of all stays below 2^63
            for (int64_t e = 1; e < experts; e *= 2) --digits;
            const double unit = static_cast<double>(std::uint64_t{1} << digits);
            const std::uint64_t sum = team.reduce(experts, std::uint64_t{0}, adds{}, [=](int64_t e) {
                const double distance = static_cast<double>(l[e]) - static_cast<double>(peak);
                const double power = l[e] == peak ? 1.0 : (distance < 0 ? math::exp(distance) : 0.0);
                return static_cast<std::uint64_t>(power * unit + 0.5);
            });
            total = static_cast<double>(sum) / unit;
        }
        if (team.lane() != 0) return;
        peaks[t] = peak;
        log_sums[t] = math::log(total);
    }
};

/// A constant, as infinity is.
template <class Real>
inline constexpr double least_finite = static_cast<double>(std::numeric_limits<Real>::lowest());

/// The order of log softmax(l)_te, at most 0; no_key for a token that takes no part.
template <class Real>
struct log_probability {
    matrix_view<const Real> logits; // (T,E)
    const Real* peaks;              // (T)
    const double* log_sums;         // (T)

    FASTMOE_HOST_DEVICE order_key<Real> operator()(int64_t t, int64_t e) const
    {
        const Real l = logits(t, e), peak = peaks[t];
        if (!(peak > -infinity<Real>)) return no_key<order_key<Real>>;
        const double distance = l == peak ? 0.0 : static_cast<double>(l) - static_cast<double>(peak);
        const double p = distance - log_sums[t];
        const bool finite = math::is_finite(l) && math::is_finite(peak); // and so stays above -Inf
        return ordered(static_cast<Real>(finite && p < least_finite<Real> ? least_finite<Real> : p));
    }
};

/// Marks the greatest keys of a column; of those equal to the least of them, the first.
template <class Key, class Quota>
struct mark_greatest {
    using vectorized = void;
    matrix_view<const Key> columns;    // (E,T)
    matrix_view<std::uint64_t> marks;  // (ceil(T/64),E)
    Quota quota;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t e) const
    {
        const int64_t tokens = columns.extent(1), experts = columns.extent(0);
        if (tokens == 0) return; // and there is no word
        const Key* keys = columns.data_handle() + e * tokens;
        std::uint64_t* words = marks.data_handle() + e;
        const int64_t there = count_at_least(team, keys, tokens, Key(no_key<Key> + 1)); // tokens that take part
        const int64_t asked = quota(team, keys, tokens), n = asked < there ? asked : there;
        if (n <= 0) {
            team.for_each(column_blocks(tokens), [=](int64_t b) { words[b * experts] = 0; });
            return;
        }
        const Key least = kth_greatest(team, keys, tokens, n);
        const int64_t above = team.reduce(
            tokens, int32_t{0}, adds{}, [=](int64_t t) { return static_cast<int32_t>(keys[t] > least); });
        const int64_t room = n - above;
        team.scan(
            column_blocks(tokens), int64_t{0}, adds{},
            [=](int64_t b) {
                return static_cast<int64_t>(::cuda::std::popcount(word<equal>(keys, b, tokens, least)));
            },
            [=](int64_t b, int64_t before) {
                std::uint64_t taken = word<more>(keys, b, tokens, least), ties = word<equal>(keys, b, tokens, least);
                for (int64_t left = room - before; left > 0 && ties != 0; --left, ties &= ties - 1)
                    taken |= ties & (~ties + 1);
                words[b * experts] = taken;
            });
    }

private:
    struct more {
        FASTMOE_HOST_DEVICE static constexpr bool holds(Key key, Key bound) noexcept { return key > bound; }
    };
    struct equal {
        FASTMOE_HOST_DEVICE static constexpr bool holds(Key key, Key bound) noexcept { return key == bound; }
    };

    /// Bit i says whether it holds of key i of the block.
    template <class Compare>
    FASTMOE_HOST_DEVICE static std::uint64_t word(const Key* keys, int64_t block, int64_t tokens, Key bound)
    {
        const int64_t begin = block * column_block;
        const Key* first = keys + begin;
        std::uint32_t half[2] = {0, 0};
        if (tokens - begin >= column_block) {
            for (int h = 0; h < 2; ++h)
                for (int i = 0; i < 32; ++i)
                    half[h] |= static_cast<std::uint32_t>(Compare::holds(first[32 * h + i], bound)) << i;
        } else {
            for (int64_t i = 0; i < tokens - begin; ++i)
                half[i / 32] |= static_cast<std::uint32_t>(Compare::holds(first[i], bound)) << (i % 32);
        }
        return std::uint64_t{half[1]} << 32 | half[0];
    }
};

/// first(t) = the number of experts that take token t.
struct count_marks {
    using vectorized = void;
    matrix_view<const std::uint64_t> marks; // (ceil(T/64),E)
    int32_t* first;                         // (T+1)

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        const std::uint64_t* words = marks.data_handle() + t / column_block * marks.extent(1);
        const int shift = static_cast<int>(t % column_block);
        std::uint64_t n = 0;
        for (int64_t e = 0; e < marks.extent(1); ++e) n += words[e] >> shift & 1u;
        first[t] = static_cast<int32_t>(n);
    }
};

/// Counts become the places where they begin.
struct start_choices {
    int32_t* first; // (T+1)
    int64_t tokens;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        int32_t* at = first;
        const int32_t total = team.scan(
            tokens, int32_t{0}, adds{}, [at](int64_t t) { return at[t]; },
            [at](int64_t t, int32_t start) { at[t] = start; });
        if (team.lane() == 0) at[tokens] = total;
    }
};

/// A token's experts, in order of id.
struct list_marks {
    matrix_view<const std::uint64_t> marks; // (ceil(T/64),E)
    const int32_t* first;                   // (T+1)
    int32_t* experts;                       // (C)

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        const std::uint64_t* words = marks.data_handle() + t / column_block * marks.extent(1);
        const int shift = static_cast<int>(t % column_block);
        int32_t* to = experts + first[t];
        for (int64_t e = 0; e < marks.extent(1); ++e)
            if (words[e] >> shift & 1u) *to++ = static_cast<int32_t>(e);
    }
};

/// Choices that no expert has filled.
struct clear_rest {
    const int32_t* filled; // (1)
    int32_t* experts;      // (C)

    FASTMOE_HOST_DEVICE void operator()(int64_t c) const
    {
        if (c >= *filled) experts[c] = -1;
    }
};

/// Keys of all probabilities, by expert. Takes scratch that must stay.
template <class Executor, class Real>
matrix_view<order_key<Real>> probability_columns(Executor& ex, matrix_view<const Real> logits,
                                                 vector_view<const std::uint8_t> mask, int64_t tokens, int64_t experts,
                                                 arena& scratch)
{
    const auto columns = scratch.matrix<order_key<Real>>(experts, tokens);
    const auto peaks = scratch.vector<Real>(tokens);
    const auto log_sums = scratch.vector<double>(tokens);
    if (scratch.measuring()) return columns;
    fastmoe::for_each_row(ex, tokens,
                          sum_powers<Real>{logits, pointer_or_null(mask), peaks.data_handle(), log_sums.data_handle()},
                          {.width = 8 * experts});
    fill_columns(ex, columns, log_probability<Real>{logits, peaks.data_handle(), log_sums.data_handle()});
    return columns;
}

/// Every expert takes the greatest of its keys, as many as quota(team, column, T) says or as take part; the first of
/// equal ones. Fills a ragged assignment whose room is enough.
/// @param columns  no_key for a token that takes no part                                                 // (E,T)
template <class Executor, class Key, class Quota, class Real>
void take_greatest(Executor& ex, matrix_view<Key> columns, const Quota& quota, const assignment<Real>& to, arena& scratch)
{
    const int64_t tokens = columns.extent(1), experts = columns.extent(0);
    const auto marks = scratch.matrix<std::uint64_t>(column_blocks(tokens), experts);
    if (scratch.measuring()) return;
    int32_t* first = to.first.data_handle();
    fastmoe::for_each_row(ex, experts, mark_greatest<Key, Quota>{columns, marks, quota}, {.width = 64 * tokens});
    fastmoe::for_each(ex, tokens, count_marks{marks, first});
    fastmoe::for_each_row(ex, 1, start_choices{first, tokens}, {.width = tokens});
    fastmoe::for_each(ex, tokens, list_marks{marks, first, to.experts.data_handle()});
    fastmoe::for_each(ex, to.experts.extent(0), clear_rest{first + tokens, to.experts.data_handle()});
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
