// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Where the sums of gemm::hopper go: rows in whole lines of 16 bytes, rows of the transpose, gradients of weights.
#pragma once

#include <cstring>

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

/// Where a row product goes: y, and what is added to each row.
template <class B, class Y>
struct to_rows {
    matrix_view<const B> bias; // (E,N), or no memory
    matrix_view<Y> y;          // (S,N)

    FASTMOE_HOST_DEVICE float plus(int64_t e, int64_t n) const
    {
        return bias.data_handle() ? static_cast<float>(bias.data_handle()[e * bias.extent(1) + n]) : 0.0f;
    }
};

/// Rows of tokens down, features across. Features are whole chunks of 8, and y is aligned to 16 bytes.
template <class Block, class B, class Y, class Place, class IsZero, hopper_tuning how>
FASTMOE_HOST_DEVICE void store_rows(Block& block, const to_rows<B, Y>& to, const Place& p, int first_row, int64_t out,
                                    const IsZero& is_zero, const sums<how>& c)
{
    const int thread = block.thread() % warpgroup_threads, t = thread % 4;
    FASTMOE_UNROLL
    for (int b = 0; b < how.blocks(); ++b)
        FASTMOE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int r = first_row + 64 * b + thread / warp_threads * 16 + thread % warp_threads / 4 + 8 * half;
            const bool inside = r < p.count;
            const bool zero = inside && is_zero(p.first + r);
            Y* const row = to.y.data_handle() + (p.first + r) * out;
            FASTMOE_UNROLL
            for (int i = 0; i < how.columns / 8; i += 4) {
                std::uint32_t words[4] = {};
                FASTMOE_UNROLL
                for (int g = 0; g < 4 && i + g < how.columns / 8; ++g) {
                    const int64_t n = p.feature + 8 * (i + g) + 2 * t;
                    pair<Y> two{};
                    if (n < out)
                        FASTMOE_UNROLL
                        for (int v = 0; v < 2; ++v)
                            two.values[v] = static_cast<Y>((zero ? 0.0f : c.of[b][4 * (i + g) + 2 * half + v]) + to.plus(p.expert, n + v));
                    if constexpr (sizeof(Y) == 2) std::memcpy(&words[g], &two, 4);
                    else if (inside && n < out) *reinterpret_cast<pair<Y>*>(row + n) = two;
                }
                if constexpr (sizeof(Y) == 2) {
                    const line whole = turn_quad(block, words);
                    const int64_t n = p.feature + 8 * (i + t);
                    if (inside && n < out && i + t < how.columns / 8) *reinterpret_cast<line*>(row + n) = whole;
                }
            }
        }
}

/// Features down, rows of tokens across.
template <class Block, class B, class Y, class Place, class IsZero, hopper_tuning how>
FASTMOE_HOST_DEVICE void store_turned(Block& block, const to_rows<B, Y>& to, const Place& p, int first_row, int64_t out,
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

/// How many neighbours of a row of dW one access writes.
enum class gradient_access { lines, pairs, singles };

template <gradient_access access, class Block, class G, hopper_tuning how>
FASTMOE_HOST_DEVICE void store_gradient(Block& block, const weight_view<G>& dw, write_mode mode, G* base, int64_t row, int64_t column,
                                        const sums<how>& c)
{
    const int thread = block.thread() % warpgroup_threads, t = thread % 4;
    const bool adds = mode == write_mode::accumulate;
    const auto total = [adds](const G& to, float sum) {
        using Sum = wider_t<float, G>;
        return static_cast<G>(adds ? static_cast<Sum>(to) + static_cast<Sum>(sum) : static_cast<Sum>(sum));
    };
    FASTMOE_UNROLL
    for (int b = 0; b < how.blocks(); ++b)
        FASTMOE_UNROLL
        for (int half = 0; half < 2; ++half) {
            const int64_t o = row + 64 * b + thread / warp_threads * 16 + thread % warp_threads / 4 + 8 * half;
            const bool inside = o < dw.out;
            G* const to = base + o * dw.row_stride;
            FASTMOE_UNROLL
            for (int i = 0; i < how.columns / 8; i += 4) {
                std::uint32_t words[4] = {};
                FASTMOE_UNROLL
                for (int g = 0; g < 4 && i + g < how.columns / 8; ++g) {
                    const int64_t n = column + 8 * (i + g) + 2 * t;
                    const float first = c.of[b][4 * (i + g) + 2 * half], second = c.of[b][4 * (i + g) + 2 * half + 1];
                    if constexpr (access == gradient_access::lines) {
                        const pair<G> two{{static_cast<G>(first), static_cast<G>(second)}};
                        std::memcpy(&words[g], &two, sizeof words[g]);
                    } else if (inside && n < dw.in) {
                        if constexpr (access == gradient_access::pairs) {
                            pair<G>& at = *reinterpret_cast<pair<G>*>(to + n);
                            pair<G> old{};
                            if (adds) old = at;
                            at = {{total(old.values[0], first), total(old.values[1], second)}};
                        } else {
                            to[n] = total(to[n], first), to[n + 1] = total(to[n + 1], second);
                        }
                    }
                }
                if constexpr (access == gradient_access::lines) {
                    const line whole = turn_quad(block, words);
                    const int64_t n = column + 8 * (i + t);
                    if (inside && n < dw.in && i + t < how.columns / 8) *reinterpret_cast<line*>(to + n) = whole;
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
    G* const base = dw.base(e);
    const auto is_whole = [&](int elements) {
        return reinterpret_cast<std::uintptr_t>(base) % (static_cast<unsigned>(elements) * sizeof(G)) == 0 && dw.row_stride % elements == 0;
    };
    if constexpr (sizeof(G) == 2)
        if (mode == write_mode::overwrite && is_whole(8)) return store_gradient<lines>(block, dw, mode, base, row, column, c);
    if (is_whole(2)) return store_gradient<pairs>(block, dw, mode, base, row, column, c);
    store_gradient<singles>(block, dw, mode, base, row, column, c);
}

} // namespace fastmoe::inline FASTMOE_ABI::detail::hopper
