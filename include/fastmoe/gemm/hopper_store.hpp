// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Where the sums of gemm::hopper go: rows in whole lines of 16 bytes, rows of the transpose, gradients of weights.
#pragma once

#include <cstring>

#include <cuda/std/bit>

#include <fastmoe/gemm/grouped_gemm.hpp>
#include <fastmoe/gemm/hopper_tile.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::hopper {

template <class T>
struct alignas(2 * sizeof(T)) pair {
    T values[2];
};
struct alignas(16) line {
    std::uint32_t words[4];
};

/// Lanes of four hold word t of groups 0 to 3; then lane t of them holds all four words of group t.
template <class Block>
FASTMOE_HOST_DEVICE line turn_quad(Block& block, const std::uint32_t (&v)[4])
{
    const bool odd = block.thread() & 1, high = block.thread() & 2;
    std::uint32_t even_lane[2], odd_lane[2]; // of groups 0 or 1, and 2 or 3
    FASTMOE_UNROLL
    for (int p = 0; p < 2; ++p) {
        const std::uint32_t mine = odd ? v[2 * p + 1] : v[2 * p], others = block.exchange(odd ? v[2 * p] : v[2 * p + 1], 1);
        even_lane[p] = odd ? others : mine, odd_lane[p] = odd ? mine : others;
    }
    const std::uint32_t even = block.exchange(high ? even_lane[0] : even_lane[1], 2);
    const std::uint32_t odds = block.exchange(high ? odd_lane[0] : odd_lane[1], 2);
    if (high) return {{even, odds, even_lane[1], odd_lane[1]}};
    return {{even_lane[0], odd_lane[0], even, odds}};
}

FASTMOE_HOST_DEVICE inline std::uint32_t as_word(float x) noexcept { return ::cuda::std::bit_cast<std::uint32_t>(x); }
/// Four neighbours of 16 bits, put together by hand: a compiler that stores an array of them stores each.
template <class T>
FASTMOE_HOST_DEVICE std::uint64_t as_word(const T (&four)[4]) noexcept
{
    static_assert(sizeof(T) == 2);
    std::uint64_t word = 0;
    FASTMOE_UNROLL
    for (int i = 0; i < 4; ++i) word |= std::uint64_t{::cuda::std::bit_cast<std::uint16_t>(four[i])} << (16 * i);
    return word;
}
FASTMOE_HOST_DEVICE inline float as_float(std::uint32_t x) noexcept { return ::cuda::std::bit_cast<float>(x); }

template <class Block, class T>
FASTMOE_HOST_DEVICE line turn_quad(Block& block, const pair<T> (&two)[4])
{
    std::uint32_t words[4];
    FASTMOE_UNROLL
    for (int g = 0; g < 4; ++g) std::memcpy(&words[g], &two[g], sizeof words[g]);
    return turn_quad(block, words);
}
/// Lanes of four hold element t of each group of four; then lane t of them holds groups 2 t and 2 t + 1, for eight groups.
template <class Block, class T>
FASTMOE_HOST_DEVICE line turn_quad(Block& block, const T (&v)[8])
{
    const bool odd = block.thread() & 1;
    std::uint32_t words[4];
    FASTMOE_UNROLL
    for (int q = 0; q < 4; ++q) { // even lanes take what is of group 2 q from their neighbour, odd lanes of the next group
        std::uint16_t bits[2];
        std::memcpy(bits, &v[2 * q], sizeof bits);
        const std::uint32_t others = block.exchange(odd ? bits[0] : bits[1], 1);
        words[q] = odd ? others | static_cast<std::uint32_t>(bits[1]) << 16 : bits[0] | others << 16;
    }
    const line mixed = turn_quad(block, words);
    return {{mixed.words[0], mixed.words[2], mixed.words[1], mixed.words[3]}};
}

/// In place of a bias's type: there is never one.
struct no_bias {};

/// Where a row product goes: y, and what is added to each row.
template <class B, class Y, class End>
struct to_rows {
    matrix_view<const B> bias;    // (E,N), or no memory
    matrix_view<Y> y;             // (S,N)
    End end;                      ///< by pairs; see grouped_gemm.hpp
    matrix_view<float> sums = {}; // (S,tiles across), if the end has sums

    FASTMOE_HOST_DEVICE bool has_bias() const noexcept { return bias.data_handle(); }
    FASTMOE_HOST_DEVICE float plus(int64_t e, int64_t n) const
    {
        if constexpr (std::is_same_v<B, no_bias>) return 0.0f;
        else return has_bias() ? static_cast<float>(bias.data_handle()[e * bias.extent(1) + n]) : 0.0f;
    }
};

/// What a thread has to know of its rows of a tile, read before the products are done.
template <class End, hopper_tuning how>
struct row_starts {
    bool zero[how.blocks()][2];
    decltype(std::declval<const End&>().begin(0)) of_row[how.blocks()][2];
};
/// @param first_row  of the warpgroup, in the tile
FASTMOE_HOST_DEVICE constexpr int row_of(int thread, int first_row, int b, int half) noexcept
{
    return first_row + 64 * b + thread % warpgroup_threads / warp_threads * 16 + thread % warp_threads / 4 + 8 * half;
}
template <hopper_tuning how, class Block, class End, class Place, class IsZero>
FASTMOE_HOST_DEVICE row_starts<End, how> start_rows(Block& block, const End& end, const Place& p, int first_row, const IsZero& is_zero)
{
    row_starts<End, how> out{};
    FASTMOE_UNROLL
    for (int b = 0; b < how.blocks(); ++b)
        FASTMOE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int r = row_of(block.thread(), first_row, b, half);
            if (r >= p.count) continue;
            out.zero[b][half] = is_zero(p.first + r);
            out.of_row[b][half] = end.begin(p.first + r);
        }
    return out;
}

/// Rows of tokens down, features across. Features are whole chunks of 8, and y is aligned to 16 bytes. What an end reads is under
/// way while the pairs before it are ended; outside of the tile nothing is read, and what is made of zeros is not written.
template <bool has_bias, class Block, class B, class Y, class End, class Place, hopper_tuning how>
FASTMOE_HOST_DEVICE void store_rows(Block& block, const to_rows<B, Y, End>& to, const Place& p, int first_row, int64_t out,
                                    const row_starts<End, how>& starts, const sums<how>& c)
{
    constexpr int groups = how.columns / 8, at_once = End::more == 1 ? 8 : 4;
    static_assert(End::more != 1 || groups % 8 == 0, "an end with one result a pair: a hopper_tuning with columns of whole 64");
    using read = decltype(to.end.read(0, 0));
    const int thread = block.thread() % warpgroup_threads, t = thread % 4;
    const int across = static_cast<int>(out - p.feature < how.columns ? out - p.feature : how.columns);
    const bool writes = to.end.writes_y();
    const B* const bias = has_bias ? to.bias.data_handle() + p.expert * to.bias.extent(1) + p.feature + 2 * t : nullptr;
    FASTMOE_UNROLL
    for (int b = 0; b < how.blocks(); ++b)
        FASTMOE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int r = row_of(thread, first_row, b, half);
            const bool inside = r < p.count, zero = starts.zero[b][half];
            const int width = inside ? across : 0; // chunks of 8 are inside as a whole
            const int64_t s = inside ? p.first + r : 0; // p.first may lie beyond all rows
            Y* const row = to.y.data_handle() + s * out + p.feature;
            Y* const more_to = [&]() -> Y* {
                if constexpr (End::more != 0) return to.end.result().data_handle() + (s * out + p.feature) * End::more / 2;
                else return nullptr;
            }();
            read next[at_once] = {};
            FASTMOE_UNROLL
            for (int g = 0; g < at_once; ++g)
                if (8 * g < width) next[g] = to.end.read(s, p.feature + 8 * g + 2 * t);
            float sum = 0;
            FASTMOE_UNROLL
            for (int i = 0; i < groups; i += at_once) {
                pair<Y> two[at_once / 4][4] = {}, second[4] = {};
                Y single[8] = {};
                FASTMOE_UNROLL
                for (int g = 0; g < at_once; ++g) {
                    const int n = 8 * (i + g);
                    const read now = next[g];
                    if (const int later = n + 8 * at_once; later < 8 * groups && later < width)
                        next[g] = to.end.read(s, p.feature + later + 2 * t);
                    float value[2];
                    Y others[End::more == 0 ? 1 : End::more] = {};
                    FASTMOE_UNROLL
                    for (int v = 0; v < 2; ++v) {
                        value[v] = zero ? 0.0f : c.of[b][4 * (i + g) + 2 * half + v];
                        if constexpr (has_bias)
                            if (n < width) value[v] += static_cast<float>(bias[n + v]);
                    }
                    const float part = to.end.pair(starts.of_row[b][half], now, value, two[g / 4][g % 4].values, others);
                    if (End::has_sums && n < width) sum += part;
                    if constexpr (End::more == 1) single[g] = others[0];
                    if constexpr (End::more == 2) second[g] = {{others[0], others[1]}};
                    if constexpr (End::more == 4)
                        if (n < width) *reinterpret_cast<std::uint64_t*>(more_to + 2 * (n + 2 * t)) = as_word(others);
                    if constexpr (sizeof(Y) == 4)
                        if (writes && n < width) *reinterpret_cast<pair<Y>*>(row + n + 2 * t) = two[g / 4][g % 4];
                }
                if constexpr (sizeof(Y) == 2) {
                    FASTMOE_UNROLL
                    for (int q = 0; q < at_once / 4 && writes; ++q) {
                        const line whole = turn_quad(block, two[q]);
                        const int n = 8 * (i + 4 * q);
                        if (n < width - 8 * t) *reinterpret_cast<line*>(row + n + 8 * t) = whole;
                    }
                    if constexpr (End::more == 2) {
                        const line whole = turn_quad(block, second);
                        if (8 * i < width - 8 * t) *reinterpret_cast<line*>(more_to + 8 * (i + t)) = whole;
                    } else if constexpr (End::more == 1) {
                        const line whole = turn_quad(block, single);
                        if (8 * i < width - 16 * t) *reinterpret_cast<line*>(more_to + 4 * i + 8 * t) = whole;
                    }
                }
            }
            if constexpr (End::has_sums) {
                sum += as_float(block.exchange(as_word(sum), 1));
                sum += as_float(block.exchange(as_word(sum), 2));
                if (inside && t == 0) to.sums(s, p.feature / how.columns) = sum;
            }
        }
}

/// Features down, rows of tokens across.
template <class Block, class B, class Y, class End, class Place, class IsZero, hopper_tuning how>
FASTMOE_HOST_DEVICE void store_turned(Block& block, const to_rows<B, Y, End>& to, const Place& p, int first_row, int64_t out,
                                      const IsZero& is_zero, const sums<how>& c)
{
    const int thread = block.thread() % warpgroup_threads;
    FASTMOE_UNROLL
    for (int i = 0; i < how.columns / 8; ++i)
        FASTMOE_UNROLL
        for (int v = 0; v < 2; ++v) {
            const int r = 8 * i + 2 * (thread % 4) + v; // the token
            if (r >= p.count) continue;
            const bool zero = is_zero(p.first + r);
            FASTMOE_UNROLL
            for (int b = 0; b < how.blocks(); ++b)
                FASTMOE_UNROLL
                for (int half = 0; half < 2; ++half) {
                    const int64_t n = p.feature + first_row + 64 * b + thread / warp_threads * 16 + thread % warp_threads / 4 + 8 * half;
                    if (n < out)
                        to.y.data_handle()[(p.first + r) * out + n] =
                            static_cast<Y>((zero ? 0.0f : c.of[b][4 * i + 2 * half + v]) + to.plus(p.expert, n));
                }
        }
}

/// The same with an end by pairs: a lane has one feature of two tokens, its neighbour four lanes on the next feature of both.
/// The even one ends the pair of the first token, the odd one that of the second. y is aligned to pairs.
template <class Block, class B, class Y, class End, class Place, class IsZero, hopper_tuning how>
FASTMOE_HOST_DEVICE void store_turned_pairs(Block& block, const to_rows<B, Y, End>& to, const Place& p, int first_row, int64_t out,
                                            const IsZero& is_zero, const sums<how>& c)
{
    static_assert(!End::has_sums, "a row's pairs lie in many warps here");
    const int thread = block.thread() % warpgroup_threads, down = thread / warp_threads * 16 + thread % warp_threads / 4;
    const bool odd = down % 2 != 0, writes = to.end.writes_y();
    FASTMOE_UNROLL
    for (int i = 0; i < how.columns / 8; ++i) {
        const int r = 8 * i + 2 * (thread % 4), mine = odd ? r + 1 : r; // tokens: of the first sum, and of this lane's pair
        const bool zero[2] = {r < p.count && is_zero(p.first + r), r + 1 < p.count && is_zero(p.first + r + 1)};
        const bool inside = mine < p.count;
        const int64_t s = inside ? p.first + mine : 0;
        const auto of_row = inside ? to.end.begin(s) : decltype(to.end.begin(s)){};
        FASTMOE_UNROLL
        for (int b = 0; b < how.blocks(); ++b)
            FASTMOE_UNROLL
            for (int half = 0; half < 2; ++half) {
                const int64_t n = p.feature + first_row + 64 * b + down + 8 * half, first = odd ? n - 1 : n;
                float value[2];
                FASTMOE_UNROLL
                for (int v = 0; v < 2; ++v)
                    value[v] = (zero[v] ? 0.0f : c.of[b][4 * i + 2 * half + v]) + (n < out ? to.plus(p.expert, n) : 0.0f);
                const float other = as_float(block.exchange(as_word(odd ? value[0] : value[1]), 4));
                if (!inside || first >= out) continue; // features are whole chunks of 8
                const float two[2] = {odd ? other : value[0], odd ? value[1] : other};
                pair<Y> y{};
                Y more[End::more == 0 ? 1 : End::more] = {};
                to.end.pair(of_row, to.end.read(s, first), two, y.values, more);
                if (writes) *reinterpret_cast<pair<Y>*>(to.y.data_handle() + s * out + first) = y;
                if constexpr (End::more == 4) *reinterpret_cast<std::uint64_t*>(to.end.result().data_handle() + 2 * (s * out + first)) = as_word(more);
                else if constexpr (End::more == 2) *reinterpret_cast<pair<Y>*>(to.end.result().data_handle() + s * out + first) = {{more[0], more[1]}};
                else if constexpr (End::more == 1) to.end.result().data_handle()[(s * out + first) / 2] = more[0];
            }
    }
}

/// How many neighbours of a row of dW one access writes.
enum class gradient_access { lines, pairs, singles };

template <gradient_access access, write_mode mode, class Block, class G, hopper_tuning how>
FASTMOE_HOST_DEVICE void store_gradient(Block& block, G* base, int64_t stride, int64_t rows, int64_t columns, const sums<how>& c)
{
    using Sum = wider_t<float, G>;
    constexpr bool adds = mode == write_mode::accumulate;
    const int thread = block.thread() % warpgroup_threads, t = thread % 4;
    const int first = thread / warp_threads * 16 + thread % warp_threads / 4;
    const int down = static_cast<int>(rows < 256 ? rows : 256), across = static_cast<int>(columns < how.columns ? columns : how.columns);
    FASTMOE_UNROLL
    for (int b = 0; b < how.blocks(); ++b)
        FASTMOE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int o = first + 64 * b + 8 * half;
            const bool inside = o < down;
            G* const row = base + o * stride;
            G* const to = row + 2 * t;
            FASTMOE_UNROLL
            for (int i = 0; i < how.columns / 8; i += 4) {
                pair<G> two[4] = {};
                FASTMOE_UNROLL
                for (int g = 0; g < 4 && i + g < how.columns / 8; ++g) {
                    const int n = 8 * (i + g);
                    const float x = c.of[b][4 * (i + g) + 2 * half], y = c.of[b][4 * (i + g) + 2 * half + 1];
                    if constexpr (access == gradient_access::lines) {
                        two[g] = {{static_cast<G>(x), static_cast<G>(y)}};
                    } else if (inside && n < across) { // chunks of 8 are inside as a whole
                        if constexpr (access == gradient_access::pairs) {
                            pair<G>& at = *reinterpret_cast<pair<G>*>(to + n);
                            pair<G> old{};
                            if constexpr (adds) old = at;
                            at = {{static_cast<G>(static_cast<Sum>(old.values[0]) + static_cast<Sum>(x)),
                                   static_cast<G>(static_cast<Sum>(old.values[1]) + static_cast<Sum>(y))}};
                        } else {
                            to[n] = static_cast<G>((adds ? static_cast<Sum>(to[n]) : Sum(0)) + static_cast<Sum>(x));
                            to[n + 1] = static_cast<G>((adds ? static_cast<Sum>(to[n + 1]) : Sum(0)) + static_cast<Sum>(y));
                        }
                    }
                }
                if constexpr (access == gradient_access::lines) {
                    const line whole = turn_quad(block, two);
                    if (inside && 8 * (i + t) < across) *reinterpret_cast<line*>(row + 8 * (i + t)) = whole;
                }
            }
        }
}

/// A tile of dW[e] from (row, column) on. Rows of dW are contiguous; its columns are whole chunks of 8.
template <class Block, class G, hopper_tuning how>
FASTMOE_HOST_DEVICE void store_gradient(Block& block, const weight_view<G>& dw, write_mode mode, int64_t e, int64_t row, int64_t column,
                                        const sums<how>& c)
{
    using enum gradient_access;
    using enum write_mode;
    G* const base = dw.base(e) + row * dw.row_stride + column;
    const int64_t rows = dw.out - row, columns = dw.in - column;
    const auto is_whole = [&](int elements) {
        return reinterpret_cast<std::uintptr_t>(base) % (static_cast<unsigned>(elements) * sizeof(G)) == 0 && dw.row_stride % elements == 0;
    };
    const bool adds = mode == accumulate;
    if (!is_whole(2))
        return adds ? store_gradient<singles, accumulate>(block, base, dw.row_stride, rows, columns, c)
                    : store_gradient<singles, overwrite>(block, base, dw.row_stride, rows, columns, c);
    if constexpr (sizeof(G) == 2)
        if (!adds && is_whole(8)) return store_gradient<lines, overwrite>(block, base, dw.row_stride, rows, columns, c);
    adds ? store_gradient<pairs, accumulate>(block, base, dw.row_stride, rows, columns, c)
         : store_gradient<pairs, overwrite>(block, base, dw.row_stride, rows, columns, c);
}

} // namespace fastmoe::inline FASTMOE_ABI::detail::hopper
