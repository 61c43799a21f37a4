// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Gradients of logits as bfloat16, without loss: a float is the sum of three. So the router's backward products run in tensor
/// cores where tokens or gate are bfloat16, and are sums in float as before. Part of project.hpp.
///
///     dgate  [high; middle; low] = pieces^T x        three matrices, which are added        // (3E,D)
///     dx     pieces [gate; gate; gate]                                                       // (T,D)
#pragma once

#include <cuda/std/bit>

#include <fastmoe/exec/block.hpp>
#include <fastmoe/gemm/portable.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// Whether a product of Real and T is made of pieces: of float and bfloat16, whose exponents have one range. half has not.
template <class Real, class T>
inline constexpr bool in_pieces = std::is_same_v<Real, float> && std::is_same_v<std::remove_const_t<T>, bfloat16>;

/// Columns of pieces, 3 E and zeros up to whole lines of 16 bytes.
constexpr int64_t piece_columns(int64_t experts) noexcept { return (3 * experts + 7) / 8 * 8; }

struct three_pieces {
    bfloat16 high, middle, low;
};

/// The bfloat16 next to v on the side of zero: 8 bits of its significand.
FASTMOE_HOST_DEVICE constexpr bfloat16 truncated(float v) noexcept
{
    bfloat16 out{};
    out.bits = static_cast<std::uint16_t>(::cuda::std::bit_cast<std::uint32_t>(v) >> 16);
    return out;
}

/// v = high + middle + low: exactly if |v| >= 2^-110 or v = 0, else with an error of at most 2^-134, since the lowest bits of so
/// small a number are below all of bfloat16. Pieces are cut off, not rounded, so that none overflows and all have the sign of
/// v. NaN and infinity are high alone. An infinity on the other side of a product may become NaN: 0 pieces multiply it.
FASTMOE_HOST_DEVICE constexpr three_pieces pieces_of(float v) noexcept
{
    if ((::cuda::std::bit_cast<std::uint32_t>(v) & 0x7f800000u) == 0x7f800000u) return {bfloat16(v), bfloat16{}, bfloat16{}};
    const bfloat16 high = truncated(v);
    const float rest = v - static_cast<float>(high);
    const bfloat16 middle = truncated(rest);
    return {high, middle, bfloat16(rest - static_cast<float>(middle))};
}

/// Cuts a token's row, and numbers it as number_chosen does.
struct cut_row {
    matrix_view<const float> dlogits; // (T,E)
    matrix_view<bfloat16> pieces;     // (T,piece_columns(E))
    int32_t* index;                   // (T)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const int64_t experts = dlogits.extent(1), columns = pieces.extent(1);
        const float* row = dlogits.data_handle() + t * experts;
        bfloat16* to = pieces.data_handle() + t * columns;
        const int32_t any = team.reduce(
            experts, int32_t{0}, [](int32_t a, int32_t b) { return a | b; },
            [=](int64_t e) {
                const three_pieces p = pieces_of(row[e]);
                to[e] = p.high;
                to[experts + e] = p.middle;
                to[2 * experts + e] = p.low;
                return static_cast<int32_t>(row[e] != 0.0f);
            });
        team.for_each(columns - 3 * experts, [=](int64_t j) { to[3 * experts + j] = bfloat16{}; });
        if (team.lane() == 0) index[t] = any != 0 ? static_cast<int32_t>(t) : -1;
    }
};

/// The gate three times over, and lines of zeros. For as many i as the gate or those lines have elements.
struct stack_gate {
    const bfloat16* gate; // (E,D)
    bfloat16* stack;      // (piece_columns(E),D)
    int64_t count;        ///< E D
    int64_t zeros;        ///< after them

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        if (i < count) stack[i] = stack[count + i] = stack[2 * count + i] = gate[i];
        if (i < zeros) stack[3 * count + i] = bfloat16{};
    }
};

/// Takes room for the pieces of dlogits and the numbers of the tokens that chose something, and finds both.
template <class Executor>
indexed_rows<bfloat16> cut_rows(Executor& ex, matrix_view<const float> dlogits, int64_t tokens, int64_t experts, arena& memory)
{
    const auto pieces = memory.matrix<bfloat16>(tokens, piece_columns(experts));
    const auto index = memory.vector<int32_t>(tokens);
    if (!memory.measuring())
        fastmoe::for_each_row(ex, tokens, cut_row{dlogits, pieces, index.data_handle()}, {.width = experts});
    return {pieces, index};
}

/// Takes room for the gate that pieces are multiplied by, and fills it.                                  // (piece_columns(E),D)
template <class Executor, class W>
matrix_view<const bfloat16> stacked_gate(Executor& ex, matrix_view<W> gate, arena& memory)
{
    const int64_t experts = gate.extent(0), width = gate.extent(1), count = experts * width;
    const auto stack = memory.matrix<bfloat16>(piece_columns(experts), width);
    const int64_t zeros = stack.extent(0) * width - 3 * count;
    if (!memory.measuring())
        fastmoe::for_each(ex, count > zeros ? count : zeros,
                          stack_gate{gate.data_handle(), stack.data_handle(), count, zeros});
    return stack;
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
