// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The products of gemm::portable on executors with blocks: tensor cores for bfloat16 and half, multiply-adds for float.
/// Sizes are read where the work runs: nothing waits, and a captured step multiplies whatever is routed when it is replayed.
#pragma once

#include <fastmoe/gemm/block_tile.hpp>
#include <fastmoe/gemm/portable_plain.hpp>
#include <fastmoe/gemm/row_tiles.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail::block {

/// What operands are in shared memory: 16-bit elements of one type as they are, all else as float.
template <class A, class B>
using staged_t = std::conditional_t<std::is_same_v<A, B> && sizeof(A) == 2, A, float>;

using tiles::banded, tiles::ceil_div, tiles::count_row_tiles, tiles::row_range, tiles::row_tiles;

/// Stores two neighbouring sums, in one access where they allow it.
template <class T>
FASTMOE_HOST_DEVICE void store_pair(T* to, T first, T second)
{
    struct alignas(2 * sizeof(T)) pair {
        T values[2];
    };
    if (reinterpret_cast<std::uintptr_t>(to) % sizeof(pair) == 0) {
        *reinterpret_cast<pair*>(to) = {{first, second}};
    } else {
        to[0] = first;
        to[1] = second;
    }
}

/// Y[s] = X[s] W[e(s)]^T + bias[e(s)]: blocks take tiles of 128 rows of one expert by 128 columns.
template <lie how_w, class Rows, class W, class B, class Y>
struct multiply_row_tiles {
    using X = portable::row_element_t<Rows>;
    using Element = staged_t<X, W>;
    static constexpr int resident = arithmetic<Element>::resident;
    row_tiles rows_of;
    Rows x;                    // (S,K)
    weight_view<const W> w;    // (E,N,K)
    matrix_view<const B> bias; // (E,N), or no memory
    matrix_view<Y> y;          // (S,N)

    template <thread_block Block>
    FASTMOE_HOST_DEVICE void operator()(Block& block) const
    {
        const int64_t across = ceil_div(w.out, tile_columns), down = rows_of.count();
        for (int64_t t = block.index(); t < across * down; t += block.count()) {
            const banded at = banded::of(t, down, across, int64_t{8});
            tile(block, at.row, at.column * tile_columns);
        }
    }

private:
    template <thread_block Block>
    FASTMOE_HOST_DEVICE void tile(Block& block, int64_t number, int64_t column) const
    {
        const auto [e, in_expert] = rows_of.find(number);
        const row_range group = row_range::of(rows_of.groups, e);
        const int64_t above = in_expert * tile_rows;
        const int64_t first = group.first + above, count = group.count - above, columns = w.out - column;
        const deep_operand<Element, X> a(block.thread(), w.in,
                                         [&](int r) { return r < count ? x.row(first + r) : nullptr; });
        sums c;
        const W* matrix = w.base(e);
        if constexpr (how_w == lie::deep) {
            const deep_operand<Element, W> b(block.thread(), w.in, [&](int n) {
                return n < columns ? matrix + (column + n) * w.row_stride : nullptr;
            });
            sum_tile<Element>(block, a, b, w.in, c);
        } else {
            const auto line = [from = matrix + column, step = w.col_stride](int64_t k) { return from + k * step; };
            sum_tile<Element>(block, a, wide_operand<Element, W, decltype(line)>{line, w.in, columns}, w.in, c);
        }
        store(block.thread(), e, first, count, column, columns, c);
    }

    FASTMOE_HOST_DEVICE void store(int thread, int64_t e, int64_t first, int64_t count, int64_t column, int64_t columns,
                                   const sums& c) const
    {
        const B* plus = bias.data_handle() ? bias.data_handle() + e * w.out + column : nullptr;
        FASTMOE_UNROLL
        for (int i = 0; i < 4; ++i)
            FASTMOE_UNROLL
            for (int v = 0; v < 4; v += 2) {
                const int r = sum_row(thread, i, v);
                if (r >= count) continue;
                const bool zeros = !x.row(first + r); // whatever W holds
                Y* to = y.data_handle() + (first + r) * w.out + column;
                FASTMOE_UNROLL
                for (int j = 0; j < 4; ++j) {
                    const int n0 = arithmetic<Element>::sum_column(thread, j, v), n1 = arithmetic<Element>::sum_column(thread, j, v + 1);
                    const auto value = [&](int n, int u) {
                        return static_cast<Y>((zeros ? 0.0f : c.of[i][j][u]) + (plus ? static_cast<float>(plus[n]) : 0.0f));
                    };
                    if (arithmetic<Element>::pairs && n1 < columns) {
                        store_pair(to + n0, value(n0, v), value(n1, v + 1));
                    } else {
                        if (n0 < columns) to[n0] = value(n0, v);
                        if (n1 < columns) to[n1] = value(n1, v + 1);
                    }
                }
            }
    }
};

/// dW[e] (+)= dY_e^T X_e: blocks take tiles of 128 by 128 of one expert, over all of its rows.
template <class DyRows, class XRows, class G>
struct multiply_gradient_tiles {
    using Dy = portable::row_element_t<DyRows>;
    using X = portable::row_element_t<XRows>;
    using Element = staged_t<Dy, X>;
    static constexpr int resident = arithmetic<Element>::resident;
    row_groups groups;
    DyRows dy;         // (S,O)
    XRows x;           // (S,I)
    weight_view<G> dw; // (E,O,I)
    write_mode mode;
    fault_recorder faults;

    FASTMOE_HOST_DEVICE int64_t tasks() const noexcept
    {
        return groups.experts() * ceil_div(dw.out, tile_rows) * ceil_div(dw.in, tile_columns);
    }
    template <thread_block Block>
    FASTMOE_HOST_DEVICE void operator()(Block& block) const
    {
        const int64_t across = ceil_div(dw.in, tile_columns), down = ceil_div(dw.out, tile_rows);
        for (int64_t t = block.index(); t < tasks(); t += block.count())
            tile(block, t / (across * down), t / across % down * tile_rows, t % across * tile_columns);
    }

private:
    template <thread_block Block>
    FASTMOE_HOST_DEVICE void tile(Block& block, int64_t e, int64_t o, int64_t i) const
    {
        if (!is_group_inside(groups.counts, groups.offsets, e, groups.slots)) {
            if (block.thread() == 0) faults.record(fault_kind::group_out_of_range, e, groups.counts(e));
            return;
        }
        const int64_t first = groups.offsets(e), count = groups.counts(e);
        if (count == 0 && mode == write_mode::accumulate) return;
        const auto down = [&](int64_t s) {
            const Dy* row = dy.row(first + s); // a row of zeros on either side adds nothing, whatever the other holds
            return row && x.row(first + s) ? row + o : nullptr;
        };
        const auto across = [&](int64_t s) {
            const X* row = x.row(first + s);
            return row && dy.row(first + s) ? row + i : nullptr;
        };
        sums c;
        sum_tile<Element>(block, wide_operand<Element, Dy, decltype(down)>{down, count, dw.out - o},
                    wide_operand<Element, X, decltype(across)>{across, count, dw.in - i}, count, c);
        store(block.thread(), dw.base(e) + o * dw.row_stride + i * dw.col_stride, dw.out - o, dw.in - i, c);
    }

    FASTMOE_HOST_DEVICE void store(int thread, G* to, int64_t rows, int64_t columns, const sums& c) const
    {
        FASTMOE_UNROLL
        for (int i = 0; i < 4; ++i)
            FASTMOE_UNROLL
            for (int j = 0; j < 4; ++j)
                FASTMOE_UNROLL
                for (int v = 0; v < 4; ++v) {
                    const int r = sum_row(thread, i, v), n = arithmetic<Element>::sum_column(thread, j, v);
                    if (r >= rows || n >= columns) continue;
                    G& at = to[r * dw.row_stride + n * dw.col_stride];
                    using Sum = wider_t<float, G>;
                    at = static_cast<G>(mode == write_mode::accumulate ? static_cast<Sum>(at) + c.of[i][j][v] : static_cast<Sum>(c.of[i][j][v]));
                }
    }
};

} // namespace detail::block

/// In float, on a device with blocks; in double and elsewhere the plain source.
template <runs_blocks Executor>
struct implementation<verbs::multiply_rows, Executor> {
    template <class Rows, class W, class B, class Y, class Epilogue>
    static void run(Executor& ex, const row_groups& groups, const Rows& x, const weight_view<const W>& w,
                    matrix_view<const B> bias, matrix_view<Y> y, const Epilogue& epilogue, arena& memory)
    {
        using namespace detail::block;
        constexpr bool in_float = std::is_same_v<detail::portable::product_total_t<detail::portable::row_element_t<Rows>, W>, float>;
        if constexpr (in_float) {
            if (always_runs_blocks<Executor> || ex.has_blocks()) {
                const auto before = memory.vector<int64_t>(groups.experts() + 1);
                if (memory.measuring() || groups.experts() == 0) return;
                fastmoe::for_each_row(ex, 1, count_row_tiles{groups, before, tile_rows}, {.width = groups.experts()});
                const auto multiply = [&]<detail::lie how>() {
                    ex.for_each_block((groups.slots / tile_rows + groups.experts()) * ceil_div(w.out, tile_columns),
                                      multiply_row_tiles<how, Rows, W, B, Y>{{groups, before}, x, w, bias, y}, shared_bytes);
                };
                if (w.col_stride == 1) multiply.template operator()<detail::lie::deep>();
                else multiply.template operator()<detail::lie::wide>();
                if constexpr (!std::is_same_v<Epilogue, no_epilogue>)
                    fastmoe::for_each_row(ex, groups.slots, detail::portable::end_row<Epilogue>{groups, epilogue},
                                          {.width = w.out});
                return;
            }
        }
        if constexpr (!in_float || !always_runs_blocks<Executor>)
            detail::portable::multiply_rows_plainly(ex, groups, x, w, bias, y, epilogue, memory);
    }
};

template <runs_blocks Executor>
struct implementation<verbs::multiply_weight_gradients, Executor> {
    template <class DyRows, class XRows, class G>
    static void run(Executor& ex, const row_groups& groups, const DyRows& dy, const XRows& x, const weight_view<G>& dw,
                    write_mode mode, arena& memory)
    {
        using namespace detail::block;
        using Sum = detail::portable::product_total_t<detail::portable::row_element_t<DyRows>, detail::portable::row_element_t<XRows>>;
        constexpr bool in_float = std::is_same_v<Sum, float>;
        if constexpr (in_float) {
            if (always_runs_blocks<Executor> || ex.has_blocks()) {
                if (memory.measuring()) return;
                const multiply_gradient_tiles<DyRows, XRows, G> multiply{groups, dy, x, dw, mode, ex.faults()};
                ex.for_each_block(multiply.tasks(), multiply, shared_bytes);
                ex.deliver_faults();
                return;
            }
        }
        if constexpr (!in_float || !always_runs_blocks<Executor>)
            detail::portable::multiply_weight_gradients_plainly(ex, groups, dy, x, dw, mode, memory);
    }
};

} // namespace fastmoe::inline FASTMOE_ABI
