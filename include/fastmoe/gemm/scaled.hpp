// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Matrices of eight-bit codes with scales, as DeepSeek-V3 cuts them (2024, section 3.3.2): rows of tokens have a scale for each 128
/// columns, weights one for each 128 by 128. An element is its code times its scale.
#pragma once

#include <type_traits>

#include <fastmoe/core/float8.hpp>
#include <fastmoe/gemm/grouped_gemm.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Columns, or rows and columns, that share a scale.
inline constexpr int64_t scale_block = 128;
FASTMOE_HOST_DEVICE constexpr int64_t scale_blocks(int64_t n) noexcept { return (n + scale_block - 1) / scale_block; }

/// Rows of codes.
/// @tparam Rows  plain_rows or indexed_rows of float8_e4m3
template <class Rows>
struct block_scaled_rows {
    Rows codes;                       // (S,K)
    matrix_view<const float> scales;  // (N,ceil(K/128))  N: rows of codes.data

    FASTMOE_HOST_DEVICE constexpr int64_t extent(int dimension) const noexcept { return codes.extent(dimension); }
    FASTMOE_HOST_DEVICE constexpr const float8_e4m3* row(int64_t s) const noexcept { return codes.row(s); }
    /// Null for a row of zeros.
    FASTMOE_HOST_DEVICE constexpr const float* scales_of(int64_t s) const noexcept
    {
        int64_t i = s;
        if constexpr (requires { codes.index; }) i = codes.index(s);
        return i < 0 ? nullptr : scales.data_handle() + i * scales.extent(1);
    }
};

/// The experts' matrices in codes, with their scales in one array or, as the matrices may be, held apart.
/// @tparam T  float8_e4m3, const if they are only read
template <class T>
struct block_scaled_weights {
    static_assert(std::is_same_v<std::remove_const_t<T>, float8_e4m3>);
    using scale = std::conditional_t<std::is_const_v<T>, const float, float>;

    weight_view<T> codes;                  // (E,out,in)
    scale* scales = nullptr;               // (E,ceil(out/128),ceil(in/128)), contiguous
    scale* const* scale_pointers = nullptr; // (E)  of (ceil(out/128),ceil(in/128)) each, in place of scales

    FASTMOE_HOST_DEVICE constexpr scale* scales_of(int64_t e) const noexcept
    {
        return scale_pointers ? scale_pointers[e] : scales + e * scale_blocks(codes.out) * scale_blocks(codes.in);
    }
    /// @throws invalid_argument unless the views are of that shape
    void expects_views(const char* name, int64_t experts, int64_t out, int64_t in) const
    {
        detail::expects_weights(codes, name, experts, out, in);
        expects(experts == 0 || out == 0 || in == 0 || scales || scale_pointers, name, "codes without scales",
                "scales (E,ceil(out/128),ceil(in/128))");
    }
    template <std::same_as<const T> U>
    FASTMOE_HOST_DEVICE constexpr operator block_scaled_weights<U>() const noexcept
    {
        return {codes, scales, scale_pointers};
    }
};

/// Codes (E,out,in) and their scales, contiguous, in memory of the arena.
inline block_scaled_weights<float8_e4m3> reserve_block_scaled(arena& memory, int64_t experts, int64_t out, int64_t in)
{
    auto* codes = memory.matrix<float8_e4m3>(experts * out, in).data_handle();
    auto* scales = memory.matrix<float>(experts * scale_blocks(out), scale_blocks(in)).data_handle();
    return {stacked(tensor_view<float8_e4m3, 3>(codes, experts, out, in)), scales};
}

} // namespace fastmoe::inline FASTMOE_ABI
