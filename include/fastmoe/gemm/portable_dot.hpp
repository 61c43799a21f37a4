// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The portable GEMM's products of a few rows on the host, as in decoding: dot products that read W once, at the speed of
/// memory.
#pragma once

#include <cstring>

#include <fastmoe/gemm/portable_pack.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::portable {

inline constexpr int64_t dot_rows = 4;    ///< most rows of X that share a pass over columns
inline constexpr int64_t dot_columns = 4; ///< most columns of Y in a pass

/// out(r, c) = sum over k of x[r][k] * w[c][k], the lanes along k.
template <class Unit>
struct dots {
    const Unit* x[dot_rows];      ///< contiguous                                       // (depth) each
    const Unit* w[dot_columns];   ///< contiguous, anywhere                             // (depth) each
    int64_t depth;                ///< a multiple of dot_depth<Unit>
    total_t<Unit>* out;           ///< overwritten                                      // (rows, columns)
};

/// What the depth of dots is a multiple of: four vectors of the widest instruction set.
template <class Unit>
inline constexpr int64_t dot_depth = panel_lanes<Unit>;

template <class Unit>
using dots_function = void (*)(const dots<Unit>&);

