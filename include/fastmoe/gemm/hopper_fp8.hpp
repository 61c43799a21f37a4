// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// gemm::hopper_fp8: rows and weights multiplied as eight-bit codes, a scale for each 128 of a row and each 128 by 128 of weights, which
/// are applied to the sums of each 128 of the depth.
#pragma once

#include <fastmoe/exec/scratch.hpp>
#include <fastmoe/gemm/hopper.hpp>
#include <fastmoe/gemm/quantize.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail::scaled {

/// Rows of bfloat16 or half, as what multiplies them wants them: codes in memory of the arena.
/// @param f  f(block_scaled_rows)
template <class Executor, class Rows, class F>
void with_codes(Executor& ex, const row_groups& groups, const Rows& x, arena& memory, const F& f)
{
    if constexpr (hopper::has_scales<Rows>) {
        return f(x);
    } else {
        const int64_t n = x.data.extent(0), k = x.data.extent(1);
        const auto codes = memory.matrix<float8_e4m3>(n, k);
        const auto scales = memory.matrix<float>(n, scale_blocks(k));
        constexpr bool is_gathered = hopper::is_gathered<Rows>;
        if (!memory.measuring()) scaled::quantize_rows(ex, groups, !is_gathered, x.data, codes, scales);
        if constexpr (is_gathered) f(block_scaled_rows<indexed_rows<float8_e4m3>>{{codes, x.index}, scales});
        else f(block_scaled_rows<plain_rows<float8_e4m3>>{{codes}, scales});
    }
}

/// The same of weights, which come out with their columns contiguous.
template <class Executor, class W, class F>
void with_codes(Executor& ex, const weight_view<W>& w, arena& memory, const F& f)
{
    const auto to = reserve_block_scaled(memory, w.experts, w.out, w.in);
    if (!memory.measuring()) quantize_weights(ex, w, to);
    f(block_scaled_weights<const float8_e4m3>(to));
}

/// Rows in float again.
template <class Executor, class Rows, class F>
void with_floats(Executor& ex, const row_groups& groups, const block_scaled_rows<Rows>& x, arena& memory, const F& f)
{
    const int64_t n = x.codes.data.extent(0), k = x.codes.data.extent(1);
    const auto floats = memory.matrix<float>(n, k);
    constexpr bool is_gathered = hopper::is_gathered<Rows>;
    if (!memory.measuring()) scaled::dequantize_rows(ex, groups, !is_gathered, x.codes.data, x.scales, floats);
    if constexpr (is_gathered) f(indexed_rows<float>{floats, x.codes.index});
    else f(plain_rows<float>{floats});
}

} // namespace detail::scaled

namespace gemm {

/// Tunings that the library has chosen for products of codes.
struct hopper_fp8_tunings {
    static constexpr hopper_tuning of(hopper_product product, bool wide) noexcept { return hopper_scaled_default(product, wide); }
};

/// Grouped products in eight bits. forward and dgrad multiply codes (float8_e4m3) on compute capability 9.0: rows get theirs on the way, in
/// the arena's memory, once for each row of x however many experts read it; weights of 16 bits do so in each call, and those that
/// are stored as codes (block_scaled_weights) are read as they are. Sums of 128 of the depth are scaled and added in float,
/// rounded once. wgrad multiplies the rows as they came, by hopper.
///
/// Everywhere else, and where rows of codes are no whole 16 bytes (D and H multiples of 16, and codes that are given), the numbers
/// that codes and scales stand for are multiplied by gemm::portable in float, which takes four bytes of memory for each element.
///
///     fm::mlp<fm::swiglu, fm::gemm::hopper_fp8> expert{.width = 4096, .hidden = 2048, .layout = fm::gated_layout::interleaved};
///
/// @tparam Tunings  as of hopper_with, each of which fits_scaled()
/// @tparam Wide     the policy of wgrad
template <class Tunings, class Wide = hopper>
struct hopper_fp8_with {
    static constexpr bool gathers_rows = true;
    static constexpr bool fuses_epilogue = true;
    static constexpr bool needs_host_counts = false;

    /// As portable::forward, of codes.
    /// @param x  plain_rows or indexed_rows of bfloat16, half or float, or block_scaled_rows     // (S,in)
    /// @throws as portable::forward
    template <executor Executor, class Rows, class W, class B, class Y, class Epilogue>
    void forward(Executor& ex, const row_groups& groups, const Rows& x, const weight_view<W>& w, matrix_view<B> bias,
                 matrix_view<Y> y, const Epilogue& epilogue, arena& memory) const
    {
        detail::with_scratch(memory, [&](arena& mine) {
            if (!mine.measuring()) {
                expects_product(groups, x, w, bias, y);
                detail::expects_pointers<Executor>(w, "W (E,out,in)");
            }
            detail::scaled::with_codes(ex, w, mine, [&](const auto& codes) { multiply<Executor>(ex, groups, x, codes, bias, y, epilogue, mine); });
        });
    }

    /// The same with weights that are stored as codes.
    /// @param w  codes whose columns are contiguous                                        // (E,out,in)
    template <executor Executor, class Rows, class W, class B, class Y, class Epilogue>
    void forward(Executor& ex, const row_groups& groups, const Rows& x, const block_scaled_weights<W>& w, matrix_view<B> bias,
                 matrix_view<Y> y, const Epilogue& epilogue, arena& memory) const
    {
        detail::with_scratch(memory, [&](arena& mine) {
            if (!mine.measuring()) {
                expects_product(groups, x, w.codes, bias, y);
                detail::scaled::expects_scaled_weights<Executor>(w, "W (E,out,in)", groups.experts(), y.extent(1), x.extent(1));
            }
            multiply<Executor>(ex, groups, x, block_scaled_weights<const float8_e4m3>(w), bias, y, epilogue, mine);
        });
    }

    /// As portable::dgrad, of codes.
    template <executor Executor, class Rows, class W, class Y, class Epilogue>
    void dgrad(Executor& ex, const row_groups& groups, const Rows& dy, const weight_view<W>& w, matrix_view<Y> dx,
               const Epilogue& epilogue, arena& memory) const
    {
        forward(ex, groups, dy, detail::portable::transposed(w), matrix_view<const float>{}, dx, epilogue, memory);
    }

    /// Codes that are stored lie as forward reads them.
    template <executor Executor, class Rows, class W, class Y, class Epilogue>
    void dgrad(Executor&, const row_groups&, const Rows&, const block_scaled_weights<W>&, matrix_view<Y>, const Epilogue&, arena&) const
    {
        static_assert(!std::is_same_v<W, W>, "weights that are stored as codes are for inference: dgrad would need them transposed");
    }

    /// As hopper::wgrad.
    template <executor Executor, class DyRows, class XRows, class G>
    void wgrad(Executor& ex, const row_groups& groups, const DyRows& dy, const XRows& x, const weight_view<G>& dw,
               write_mode mode, arena& memory) const
    {
        Wide{}.wgrad(ex, groups, dy, x, dw, mode, memory);
    }

private:
    template <class Rows, class W, class B, class Y>
    static void expects_product(const row_groups& groups, const Rows& x, const weight_view<W>& w, const matrix_view<B>& bias,
                                const matrix_view<Y>& y)
    {
        detail::expects_groups(groups, x.extent(0));
        if constexpr (detail::hopper::has_scales<Rows>) {
            detail::expects_rows(x.codes, "rows (S,.)");
            expects_shape(x.scales, "scales of rows (N,ceil(K/128))", x.codes.data.extent(0), scale_blocks(x.extent(1)));
        } else {
            detail::expects_rows(x, "rows (S,.)");
        }
        detail::expects_weights(w, "W (E,out,in)", groups.experts(), y.extent(1), x.extent(1));
        if (bias.data_handle()) expects_shape(bias, "bias (E,out)", groups.experts(), w.out);
        expects_shape(y, "output rows (S,.)", groups.slots, w.out);
    }

    template <class Executor, class Rows, class B, class Y, class Epilogue>
    static void multiply(Executor& ex, const row_groups& groups, const Rows& x, const block_scaled_weights<const float8_e4m3>& w,
                         const matrix_view<B>& bias, const matrix_view<Y>& y, const Epilogue& epilogue, arena& memory)
    {
        detail::scaled::with_codes(ex, groups, x, memory, [&](const auto& codes) {
            const matrix_view<const std::remove_const_t<B>> added(bias);
            if constexpr (runs_clusters<Executor> && (sizeof(Y) == 2 || std::is_same_v<Y, float>))
                if (by_warpgroups(ex, groups, codes, w, added, y, epilogue, memory)) return;
            detail::scaled::with_floats(ex, groups, codes, memory, [&](const auto& rows) {
                auto* at = memory.matrix<float>(w.codes.experts * w.codes.out, w.codes.in).data_handle();
                const auto floats = stacked(tensor_view<float, 3>(at, w.codes.experts, w.codes.out, w.codes.in));
                if (!memory.measuring()) dequantize_weights(ex, w, floats);
                portable{}.forward(ex, groups, rows, floats, added, y, epilogue, memory);
            });
        });
    }

    /// False where they cannot, which shapes, the device and where codes begin decide: the memory that is measured with the same
    /// views is what a call takes.
    template <class Executor, class Rows, class B, class Y, class Epilogue>
    static bool by_warpgroups(Executor& ex, const row_groups& groups, const Rows& x, const block_scaled_weights<const float8_e4m3>& w,
                              const matrix_view<const B>& bias, const matrix_view<Y>& y, const Epilogue& epilogue, arena& memory)
    {
        using calls = detail::hopper::row_calls<Tunings>;
        using namespace detail::hopper;
        if (w.codes.col_stride != 1 || !fits(w.codes) || !are_lines<Executor>(w.codes) || !is_whole(x)) return false;
        if (!calls::template has_device<Rows, block_scaled_weights<const float8_e4m3>, B, Y>(ex)) return false;
        if (memory.measuring()) {
            calls::template reserve<Epilogue>(groups, w.codes.out, memory);
            return true;
        }
        return calls::run(ex, groups, x, w, bias, y, epilogue, memory);
    }
};

using hopper_fp8 = hopper_fp8_with<hopper_fp8_tunings>;

/// The same for weights that are stored as codes, as checkpoints of inference engines have them: an expert's views of its matrices are
/// block_scaled_weights, a quarter or half of the bytes. For inference: codes have no gradient, and dgrad would need them
/// transposed. Codes whose columns are not contiguous are multiplied by gemm::portable.
///
///     fm::mlp<fm::swiglu, fm::gemm::hopper_fp8_stored> expert{.width = 7168, .hidden = 2048};
///     w.expert.up = fm::block_scaled_weights<const fm::float8_e4m3>{fm::stacked(codes), scales};
struct hopper_fp8_stored : hopper_fp8 {
    template <class T>
    using weights = block_scaled_weights<std::conditional_t<std::is_const_v<T>, const float8_e4m3, float8_e4m3>>;

    template <class T>
    static block_scaled_weights<float8_e4m3> reserve_weights(arena& memory, int64_t experts, int64_t out, int64_t in)
    {
        return reserve_block_scaled(memory, experts, out, in);
    }
};

} // namespace gemm

} // namespace fastmoe::inline FASTMOE_ABI
