// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The router's weight gradient where blocks multiply. It has few tiles, each as deep as there are tokens, so the tokens are
/// cut into parts that blocks sum side by side, and the parts are added in their order. Part of project.hpp.
#pragma once

#include <fastmoe/routing/project_pieces.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// What is wanted of a cut in depth. By reckoning, not measured: parts of the size below fill a large GPU about three times
/// with blocks, and one takes far longer to sum than to add.
struct depth_cut {
    int64_t tiles = 768;       ///< of all parts, where there are tokens enough
    int64_t tile_side = 128;   ///< of gemm::portable, in rows and columns
    int64_t part_tokens = 512; ///< or more in a part
    int64_t bias_tokens = 64;  ///< in a part of the bias's sum
};
inline constexpr depth_cut depth_cuts;

/// P: from the shape of dgate (rows,width) and the number of tokens alone, so that bits are no matter of the device, and no
/// fewer for more tokens.
constexpr int64_t depth_parts(int64_t tokens, int64_t rows, int64_t width) noexcept
{
    constexpr depth_cut cut = depth_cuts;
    const int64_t tiles = (rows + cut.tile_side - 1) / cut.tile_side * ((width + cut.tile_side - 1) / cut.tile_side);
    const int64_t wanted = tiles > 0 ? (cut.tiles + tiles - 1) / tiles : 1, most = tokens / cut.part_tokens;
    return most < 1 ? 1 : wanted < most ? wanted : most;
}

/// Cuts all tokens into parts of nearly one size.
struct cut_tokens {
    int32_t* counts;  // (P)
    int64_t* offsets; // (P+1)
    int64_t parts, tokens;

    FASTMOE_HOST_DEVICE void operator()(int64_t p) const
    {
        const int64_t first = tokens * p / parts, end = tokens * (p + 1) / parts;
        counts[p] = static_cast<int32_t>(end - first);
        offsets[p] = first;
        if (p == parts - 1) offsets[parts] = end;
    }
};

/// to (+)= the parts in their order, rounded once. A part is the sum of matrices that follow each other, the last first.
/// Neighbouring lanes read neighbouring elements.
template <int matrices, class Real, class G>
struct add_parts {
    const Real* parts; // (P,stride)
    int64_t count;     ///< P
    int64_t stride;    ///< elements from a part to the next
    G* to;             // (n)
    int64_t n;
    write_mode mode;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        Real total = 0;
        FASTMOE_UNROLL_4
        for (int64_t p = 0; p < count; ++p) {
            Real part = 0;
            FASTMOE_UNROLL
            for (int m = matrices - 1; m >= 0; --m) part += parts[p * stride + m * n + i];
            total += part;
        }
        to[i] = G(mode == write_mode::accumulate ? wider_t<Real, G>(to[i]) + total : total);
    }
};

/// Sums of dlogits over a few tokens each: element b E + e is that of expert e over part b.
template <class Real>
struct sum_tokens {
    const Real* dlogits; // (T,E)
    int64_t tokens, experts;
    Real* parts; // (B,E)

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        constexpr int64_t step = depth_cuts.bias_tokens;
        const int64_t e = i % experts, first = i / experts * step, end = first + step < tokens ? first + step : tokens;
        Real total = 0;
        FASTMOE_UNROLL_4
        for (int64_t t = first; t < end; ++t) total += dlogits[t * experts + e];
        parts[i] = total;
    }
};

/// The bias of one expert (+)= the sum of its parts.
template <class Real, class G>
struct add_bias_parts {
    matrix_view<const Real> parts; // (B,E)
    G* to;                         // (E)
    write_mode mode;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t e) const
    {
        const auto& all = parts;
        const Real total = team.reduce(
            parts.extent(0), Real(0), [](Real a, Real b) { return a + b; }, [&all, e](int64_t b) { return all(b, e); });
        if (team.lane() == 0) to[e] = G(mode == write_mode::accumulate ? wider_t<Real, G>(to[e]) + total : total);
    }
};

/// dbias (+)= the sum of dlogits over tokens. Its scratch is counted whether or not it is wanted.
template <class Executor, class Real, class G>
void project_bias_in_parts(Executor& ex, matrix_view<const Real> dlogits, int64_t tokens, int64_t experts, vector_view<G> dbias,
                           write_mode mode, arena& memory)
{
    const arena::scope lent(memory);
    const auto parts = memory.matrix<Real>((tokens + depth_cuts.bias_tokens - 1) / depth_cuts.bias_tokens, experts);
    if (memory.measuring() || !pointer_or_null(dbias)) return;
    fastmoe::for_each(ex, parts.extent(0) * experts,
                      sum_tokens<Real>{dlogits.data_handle(), tokens, experts, parts.data_handle()});
    fastmoe::for_each_row(ex, experts, add_bias_parts<Real, G>{parts, dbias.data_handle(), mode},
                          {.width = parts.extent(0)});
}

/// dgate (+)= d^T x, over indexed rows of both; d may be in pieces.
template <class Executor, class Dy, class T, class G>
void project_weights_in_parts(Executor& ex, const indexed_rows<Dy>& d, const indexed_rows<T>& x, matrix_view<G> dgate,
                              write_mode mode, arena& memory)
{
    using real = accumulate_t<Dy>;
    constexpr bool pieces = std::is_same_v<Dy, bfloat16>;
    const arena::scope lent(memory);
    const int64_t tokens = x.extent(0), experts = dgate.extent(0), width = dgate.extent(1);
    const int64_t rows = pieces ? piece_columns(experts) : experts, parts = depth_parts(tokens, rows, width);
    expects(tokens <= INT32_MAX, "rows", tokens, "0 to 2^31 - 1");
    const auto counts = memory.vector<int32_t>(parts);
    const auto offsets = memory.vector<int64_t>(parts + 1);
    const auto sums = memory.matrix<real>(parts * rows, width);
    if (!memory.measuring())
        fastmoe::for_each(ex, parts, cut_tokens{counts.data_handle(), offsets.data_handle(), parts, tokens});
    gemm::portable{}.wgrad(ex, row_groups{counts, offsets, tokens}, d, x,
                           stacked(tensor_view<real, 3>(sums.data_handle(), parts, rows, width)), write_mode::overwrite, memory);
    using add = add_parts<pieces ? 3 : 1, real, G>;
    const int64_t n = experts * width;
    if (!memory.measuring())
        fastmoe::for_each(ex, n, add{sums.data_handle(), parts, rows * width, dgate.data_handle(), n, mode});
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
