// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Numbers to codes with scales, and back: of rows by blocks of 128 columns, of weights by blocks of 128 by 128.
#pragma once

#include <fastmoe/gemm/portable_plain.hpp>
#include <fastmoe/gemm/scaled.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail::scaled {

/// The larger; NaN if one of them is, which makes all of a block NaN.
struct larger {
    FASTMOE_HOST_DEVICE float operator()(float a, float b) const noexcept { return a < b || b != b ? b : a; }
};
template <class T>
FASTMOE_HOST_DEVICE float magnitude(const T& value) noexcept
{
    const float x = static_cast<float>(value);
    return x < 0 ? -x : x;
}
/// Of a block whose largest element is that: the largest code stands for it. The product of two is never subnormal.
FASTMOE_HOST_DEVICE inline float scale_of(float largest) noexcept
{
    constexpr float least = 1.0842021724855044e-19f; // 2^-63
    const float scale = largest / float8_e4m3::largest;
    return scale < least ? least : scale;
}

template <class T, int n>
struct alignas(n * sizeof(T)) piece {
    T of[n];
};

/// Task t: scale and codes of block t % across of row t / across.
template <class T>
struct quantize_row {
    static constexpr int each = 4;
    matrix_view<const T> from;      // (N,K)
    matrix_view<float8_e4m3> codes; // (N,K)
    matrix_view<float> scales;      // (N,ceil(K/128))
    row_groups groups;              ///< rows outside of them are passed over
    bool is_grouped;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const int64_t across = scales.extent(1), r = t / across, k = t % across, width = from.extent(1);
        if (is_grouped && portable::expert_of_row(groups, r) < 0) return;
        const int64_t n = width - k * scale_block < scale_block ? width - k * scale_block : scale_block;
        const T* const x = from.data_handle() + r * width + k * scale_block;
        float8_e4m3* const to = codes.data_handle() + r * width + k * scale_block;
        const bool whole = n % each == 0 && reinterpret_cast<std::uintptr_t>(x) % (each * sizeof(T)) == 0 &&
                           reinterpret_cast<std::uintptr_t>(to) % each == 0;
        const float scale = whole ? by<each>(team, n, x, to) : by<1>(team, n, x, to);
        if (team.lane() == 0) scales(r, k) = scale;
    }

private:
    template <int at_once, class Team>
    static FASTMOE_HOST_DEVICE float by(Team& team, int64_t n, const T* x, float8_e4m3* to)
    {
        const float scale = scale_of(team.reduce(n / at_once, 0.0f, larger{}, [x](int64_t i) {
            const auto in = *reinterpret_cast<const piece<T, at_once>*>(x + i * at_once);
            float most = 0.0f;
            for (int j = 0; j < at_once; ++j) most = larger{}(most, magnitude(in.of[j]));
            return most;
        }));
        team.for_each(n / at_once, [=](int64_t i) {
            const auto in = *reinterpret_cast<const piece<T, at_once>*>(x + i * at_once);
            piece<float8_e4m3, at_once> out;
            for (int j = 0; j < at_once; ++j) out.of[j] = float8_e4m3(static_cast<float>(in.of[j]) / scale);
            *reinterpret_cast<piece<float8_e4m3, at_once>*>(to + i * at_once) = out;
        });
        return scale;
    }
};

/// Which block of which matrix task t is about.
struct weight_block {
    int64_t expert, row, column, rows, columns;

    static FASTMOE_HOST_DEVICE weight_block of(int64_t t, int64_t out, int64_t in) noexcept
    {
        const int64_t down = scale_blocks(out), across = scale_blocks(in);
        const int64_t row = t / across % down * scale_block, column = t % across * scale_block;
        return {t / (down * across), row, column, out - row < scale_block ? out - row : scale_block,
                in - column < scale_block ? in - column : scale_block};
    }
    FASTMOE_HOST_DEVICE int64_t place(int64_t in) const noexcept
    {
        return row / scale_block * scale_blocks(in) + column / scale_block;
    }
};

/// Each element is read once, along the lines of memory whichever way they run, and kept in the team's scratch if it is of 16 bits.
template <class W>
struct quantize_weight_block {
    static constexpr bool keeps = sizeof(W) == 2;
    static constexpr int64_t kept_line = scale_block + 2; ///< elements: columns of it lie in different banks
    static constexpr int64_t scratch_bytes = keeps ? scale_block * kept_line * static_cast<int64_t>(sizeof(W)) : 0;
    static constexpr int each = 4;
    weight_view<const W> from;               // (E,out,in)
    block_scaled_weights<float8_e4m3> to;    // (E,out,in)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const auto b = weight_block::of(t, from.out, from.in);
        block here{b, from.base(b.expert) + b.row * from.row_stride + b.column * from.col_stride, from.row_stride, from.col_stride, nullptr,
                   to.codes.base(b.expert) + b.row * to.codes.row_stride + b.column * to.codes.col_stride, to.codes.row_stride, to.codes.col_stride};
        if constexpr (keeps) here.kept = team.template scratch<W>(scale_block * kept_line);
        // Lines of memory: rows, or columns where those are contiguous.
        const bool deep = from.col_stride == 1;
        const int64_t stride = deep ? from.row_stride : from.col_stride, length = deep ? b.columns : b.rows;
        const bool reads_whole = stride % each == 0 && length % each == 0 && reinterpret_cast<std::uintptr_t>(here.x) % (each * sizeof(W)) == 0;
        const float largest = deep ? reads_whole ? here.template read<true, each>(team) : here.template read<true, 1>(team)
                                   : reads_whole ? here.template read<false, each>(team) : here.template read<false, 1>(team);
        const float scale = scale_of(largest);
        team.sync();
        const bool writes_whole = here.codes_columns == 1 && here.codes_rows % each == 0 && b.columns % each == 0 &&
                                  reinterpret_cast<std::uintptr_t>(here.codes) % each == 0;
        if (writes_whole) here.template write<each>(team, scale);
        else here.template write<1>(team, scale);
        if (team.lane() == 0) to.scales_of(b.expert)[b.place(from.in)] = scale;
    }

private:
    struct block {
        weight_block at;
        const W* x;
        int64_t rows, columns; ///< strides of x
        W* kept;               // (128,128), if there is one
        float8_e4m3* codes;
        int64_t codes_rows, codes_columns;

        /// The largest magnitude.
        template <bool deep, int at_once, class Team>
        FASTMOE_HOST_DEVICE float read(Team& team) const
        {
            const auto& self = *this;
            constexpr int64_t across = scale_block / at_once;
            return team.reduce((deep ? at.rows : at.columns) * across, 0.0f, larger{}, [&self](int64_t i) {
                const int64_t line = i / across, first = i % across * at_once;
                float most = 0.0f;
                if (first >= (deep ? self.at.columns : self.at.rows)) return most;
                const auto in = *reinterpret_cast<const piece<W, at_once>*>(self.x + line * (deep ? self.rows : self.columns) +
                                                                            first * (deep ? self.columns : self.rows));
                for (int j = 0; j < at_once; ++j) {
                    if constexpr (keeps) self.kept[deep ? line * kept_line + first + j : (first + j) * kept_line + line] = in.of[j];
                    most = larger{}(most, magnitude(in.of[j]));
                }
                return most;
            });
        }
        template <int at_once, class Team>
        FASTMOE_HOST_DEVICE void write(Team& team, float scale) const
        {
            const auto& self = *this;
            constexpr int64_t across = scale_block / at_once;
            team.for_each(at.rows * across, [&self, scale](int64_t i) {
                const int64_t row = i / across, first = i % across * at_once;
                if (first >= self.at.columns) return;
                piece<float8_e4m3, at_once> out;
                for (int j = 0; j < at_once; ++j) {
                    const W value = keeps ? self.kept[row * kept_line + first + j] : self.x[row * self.rows + (first + j) * self.columns];
                    out.of[j] = float8_e4m3(static_cast<float>(value) / scale);
                }
                *reinterpret_cast<piece<float8_e4m3, at_once>*>(self.codes + row * self.codes_rows + first * self.codes_columns) = out;
            });
        }
    };
};

struct dequantize_weight_block {
    block_scaled_weights<const float8_e4m3> from; // (E,out,in)
    weight_view<float> to;                      // (E,out,in)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const auto b = weight_block::of(t, to.out, to.in);
        const float scale = from.scales_of(b.expert)[b.place(to.in)];
        const auto& self = *this;
        team.for_each(b.rows * scale_block, [=, &self](int64_t i) {
            if (i % scale_block >= b.columns) return;
            const int64_t o = b.row + i / scale_block, n = b.column + i % scale_block;
            self.to(b.expert, o, n) = scale * static_cast<float>(self.from.codes(b.expert, o, n));
        });
    }
};

struct dequantize_row {
    matrix_view<const float8_e4m3> from; // (N,K)
    matrix_view<const float> scales;     // (N,ceil(K/128))
    matrix_view<float> to;               // (N,K)
    row_groups groups;
    bool is_grouped;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t r) const
    {
        if (is_grouped && portable::expert_of_row(groups, r) < 0) return;
        const int64_t n = to.extent(1);
        const float8_e4m3* const x = from.data_handle() + r * n;
        const float* const scale = scales.data_handle() + r * scales.extent(1);
        float* const y = to.data_handle() + r * n;
        team.for_each(n, [=](int64_t i) { y[i] = scale[i / scale_block] * static_cast<float>(x[i]); });
    }
};

template <class Executor, class T>
void quantize_rows(Executor& ex, const row_groups& groups, bool is_grouped, matrix_view<const T> from, matrix_view<float8_e4m3> codes,
                   matrix_view<float> scales)
{
    static_assert(scalar<T>, "rows of numbers; codes that have scales already go beside them, in block_scaled_rows");
    expects_shape(from, "rows (N,K)", from.extent(0), from.extent(1));
    expects_shape(codes, "codes (N,K)", from.extent(0), from.extent(1));
    expects_shape(scales, "scales (N,ceil(K/128))", from.extent(0), scale_blocks(from.extent(1)));
    fastmoe::for_each_row(ex, from.extent(0) * scales.extent(1),
                          quantize_row<T>{from, codes, scales, groups, is_grouped}, {.width = scale_block});
}

/// Looks at the pointers of both, too, where that waits for nothing.
template <class Executor, class T>
void expects_scaled_weights(const block_scaled_weights<T>& w, const char* name, int64_t experts, int64_t out, int64_t in)
{
    w.expects_views(name, experts, out, in);
    expects_pointers<Executor>(w.codes, name);
    if constexpr (has_readable_memory<Executor>)
        for (int64_t e = 0; w.scale_pointers && out > 0 && in > 0 && e < experts; ++e)
            expects(w.scale_pointers[e], name, "a null pointer", "scales of expert ", e);
}

template <class Executor>
void dequantize_rows(Executor& ex, const row_groups& groups, bool is_grouped, matrix_view<const float8_e4m3> codes, matrix_view<const float> scales,
                     matrix_view<float> to)
{
    expects_shape(codes, "codes (N,K)", to.extent(0), to.extent(1));
    expects_shape(scales, "scales (N,ceil(K/128))", to.extent(0), scale_blocks(to.extent(1)));
    expects_shape(to, "rows (N,K)", to.extent(0), to.extent(1));
    fastmoe::for_each_row(ex, to.extent(0), dequantize_row{codes, scales, to, groups, is_grouped}, {.width = to.extent(1)});
}

} // namespace detail::scaled

/// codes and scales of rows: a block's scale is its largest magnitude / 448 (2^-63 at least), and codes are the nearest ones. A block with
/// an infinity or a NaN becomes NaN.
/// @param from    bfloat16, half or float                   // (N,K)
/// @param codes   overwritten                               // (N,K)
/// @param scales  overwritten                               // (N,ceil(K/128))
/// @throws invalid_argument if shapes disagree; nothing is written then
template <executor Executor, class T>
void quantize_rows(Executor& ex, matrix_view<T> from, matrix_view<float8_e4m3> codes, matrix_view<float> scales)
{
    detail::scaled::quantize_rows<Executor, std::remove_const_t<T>>(ex, {}, false, from, codes, scales);
}

/// The same for the rows of groups alone: padding is neither read nor written.
template <executor Executor, class T>
void quantize_rows(Executor& ex, const row_groups& groups, matrix_view<T> from, matrix_view<float8_e4m3> codes,
                   matrix_view<float> scales)
{
    detail::expects_groups(groups, from.extent(0));
    detail::scaled::quantize_rows<Executor, std::remove_const_t<T>>(ex, groups, true, from, codes, scales);
}

/// codes and scales of the experts' matrices, by blocks of 128 by 128, as quantize_rows() makes them.
/// @param from  bfloat16, half or float, in any storage     // (E,out,in)
/// @param to    overwritten, in any storage                 // (E,out,in)
/// @throws invalid_argument if shapes disagree, a matrix or its scales are nowhere, or codes would overlap; nothing is written then
template <executor Executor, class W>
void quantize_weights(Executor& ex, const weight_view<W>& from, const block_scaled_weights<float8_e4m3>& to)
{
    static_assert(scalar<std::remove_const_t<W>>, "matrices of numbers; codes that have scales already go beside them, in block_scaled_weights");
    detail::expects_weights(from, "W (E,out,in)", from.experts, from.out, from.in);
    detail::expects_pointers<Executor>(from, "W (E,out,in)");
    detail::scaled::expects_scaled_weights<Executor>(to, "codes (E,out,in)", from.experts, from.out, from.in);
    detail::expects_apart(to.codes, "codes (E,out,in)");
    using value = std::remove_const_t<W>;
    fastmoe::for_each_row(ex, from.experts * scale_blocks(from.out) * scale_blocks(from.in),
                          detail::scaled::quantize_weight_block<value>{from, to},
                          {.width = scale_block * scale_block,
                           .scratch_bytes = detail::scaled::quantize_weight_block<value>::scratch_bytes});
}

/// Numbers that the codes of rows stand for, rounded once to float.
/// @param to  overwritten                                    // (N,K)
/// @throws invalid_argument if shapes disagree; nothing is written then
template <executor Executor>
void dequantize_rows(Executor& ex, matrix_view<const float8_e4m3> codes, matrix_view<const float> scales, matrix_view<float> to)
{
    detail::scaled::dequantize_rows(ex, {}, false, codes, scales, to);
}

/// The same of the experts' matrices.
/// @param to  overwritten, in any storage                    // (E,out,in)
/// @throws invalid_argument if shapes disagree, a matrix or its scales are nowhere, or elements would overlap; nothing is written then
template <executor Executor>
void dequantize_weights(Executor& ex, const block_scaled_weights<const float8_e4m3>& from, const weight_view<float>& to)
{
    detail::scaled::expects_scaled_weights<Executor>(from, "codes (E,out,in)", to.experts, to.out, to.in);
    detail::expects_weights(to, "W (E,out,in)", to.experts, to.out, to.in);
    detail::expects_pointers<Executor>(to, "W (E,out,in)");
    detail::expects_apart(to, "W (E,out,in)");
    fastmoe::for_each_row(ex, to.experts * scale_blocks(to.out) * scale_blocks(to.in),
                          detail::scaled::dequantize_weight_block{from, to}, {.width = scale_block * scale_block});
}

} // namespace fastmoe::inline FASTMOE_ABI
