// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How gemm::hopper cuts a product into tiles: data, chosen by a constexpr function of the product's shape.
#pragma once

#include <fastmoe/core/config.hpp>

namespace fastmoe::inline FASTMOE_ABI::gemm {

/// Who computes a tile: both multiplying warpgroups half of its rows, or each a tile of its own while the other stores.
enum class hopper_schedule { cooperative, ping_pong };

/// A tile is rows x columns of the result, summed in stages of 64 of the depth, or 128 of bytes. With rows of tokens on the other side
/// (turned), `rows` counts features and `columns` tokens.
struct hopper_tuning {
    int rows = 128;    ///< 128, or with ping_pong 64 or 128
    int columns = 256; ///< 64, 128, 192 or 256, of whole 64 for each block of a cluster; of gradients not 192; turned also 16 or 32
    int stages = 4;    ///< in shared memory
    int cluster = 1;   ///< blocks that share a tile of weights, or of gradients of the operand whose rows lie in order: 1 or 2
    hopper_schedule schedule = hopper_schedule::cooperative;
    int band = 8;      ///< tiles of columns that run beside each other
    bool turned = false;
    bool fences_lines = true; ///< before their products, as PTX's memory model asks for; false is for those who have measured
                              ///< what it costs and seen that it is not needed on their device

    static constexpr int line_bytes = 128; ///< of the depth, a stage: 64 elements of 16 bits, or 128 bytes
    static constexpr int most_shared_bytes = 227 * 1024 - 1024; ///< of a block, less what aligns it

    /// Rows of 64 that a warpgroup sums at a time.
    FASTMOE_HOST_DEVICE constexpr int blocks() const noexcept { return schedule == hopper_schedule::cooperative ? rows / 128 : rows / 64; }
    FASTMOE_HOST_DEVICE constexpr int row_bytes() const noexcept { return rows * line_bytes; }
    FASTMOE_HOST_DEVICE constexpr int column_bytes() const noexcept { return columns * line_bytes; }
    FASTMOE_HOST_DEVICE constexpr int stage_bytes() const noexcept { return row_bytes() + column_bytes(); }
    FASTMOE_HOST_DEVICE constexpr int shared_bytes() const noexcept { return stages * stage_bytes() + (2 * stages + 2) * 8; }
    /// Tokens of a tile of one block.
    FASTMOE_HOST_DEVICE constexpr int tokens() const noexcept { return turned ? columns : rows; }

    /// Whether registers and shared memory of sm_90 hold it, and the instructions of its columns exist.
    constexpr bool fits() const noexcept
    {
        const bool whole = columns == 64 || columns == 128 || columns == 192 || columns == 256;
        const bool has_instruction = whole || (turned && (columns == 16 || columns == 32));
        const bool is_cut = turned ? cluster == 1 : (cluster == 1 || cluster == 2) && columns % (64 * cluster) == 0;
        const bool has_sums = (rows == 64 || rows == 128) && blocks() >= 1 && blocks() * columns <= 256;
        return has_instruction && is_cut && has_sums && stages >= 2 && band >= 1 && shared_bytes() <= most_shared_bytes;
    }
    /// Whether the products of scaled codes, which have sums of a stage besides, hold it: 128 columns or fewer, as many as have
    /// one scale.
    constexpr bool fits_scaled() const noexcept { return fits() && columns <= 128 && (blocks() + 1) * columns <= 384; }
};

/// The products that are tuned apart.
enum class hopper_product { rows, few_rows, gradients };

/// What a product is cut into where the user does not say.
/// @param wide  whether the result has more than 128 columns
constexpr hopper_tuning hopper_default(hopper_product product, bool wide) noexcept
{
    switch (product) {
    case hopper_product::few_rows: return {.rows = 128, .columns = 16, .stages = 10, .band = 1, .turned = true};
    case hopper_product::gradients: return {.rows = 128, .columns = wide ? 256 : 128, .stages = 4};
    default: break;
    }
    if (wide) return {.rows = 128, .columns = 256, .stages = 4, .cluster = 2};
    return {.rows = 128, .columns = 128, .stages = 6, .cluster = 2, .schedule = hopper_schedule::ping_pong};
}

/// The same for products of scaled codes. Both warpgroups work on one tile: while one adds what it has multiplied, the other
/// multiplies.
constexpr hopper_tuning hopper_scaled_default(hopper_product product, bool wide) noexcept
{
    if (product == hopper_product::few_rows) return hopper_default(product, wide);
    return {.rows = 128, .columns = 128, .stages = 6, .cluster = 2};
}

} // namespace fastmoe::inline FASTMOE_ABI::gemm
