// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How the portable GEMM cuts its three products into tasks and tiles on the host. All cuts follow from the shape and
/// the row counts alone, and each sum runs over the reduction in one order, so no bit depends on the threads.
#pragma once

#include <fastmoe/gemm/portable_cuts.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::portable {

/// Y[s,n] = bias[n] + sum over k of X[s,k] W[n,k] for blocks of rows; forward, and dgrad with W transposed.
template <class Unit, class Rows, class W, class B, class Y>
class row_product {
public:
    using Real = total_t<Unit>;

    host_executor& ex;
    Rows x;                 // (S,K)
    weight_view<const W> w; // (E,N,K)
    matrix_view<const B> bias; // (E,N), or no memory
    matrix_view<Y> y;       // (S,N)

    /// Takes a worker's scratch.
    void reserve(arena& a) const { along() ? (reserve_few(a), void(reserve_along(a))) : void(reserve_across(a)); }

    void block(int worker, row_block b, int64_t begin, int64_t end, arena& a) const
    {
        if (begin >= end) return;
        if (!along()) across_reduction(worker, b, begin, end, reserve_across(a));
        else if (b.count <= blocks_of_host.few_rows) few_rows(worker, b, begin, end, reserve_few(a));
        else along_reduction(worker, b, begin, end, reserve_along(a));
    }

private:
    static constexpr int64_t elements = unit_elements<Unit>, lanes = vector_lanes<Unit>, full = panel_lanes<Unit>;
    using Element = std::conditional_t<elements == 2, bfloat16, Unit>;
    /// W is read where it lies.
    static constexpr bool in_place = std::is_same_v<W, Element>;

    int64_t rows_at_most() const { return round_up(least(x.extent(0), blocks_of_host.rows), lanes); }
    int64_t width() const { return w.in; }
    int64_t units() const { return ceil_div(w.in, elements); }
    /// Whether W's rows lie along the reduction.
    bool along() const { return w.col_stride == 1; }
    const B* bias_of(int64_t e) const { return bias.data_handle() ? &bias(e, 0) : nullptr; }

    // 1. A few rows: dot products, the lanes along the reduction.

    /// Pairs need W in place, which they always have; other types of W are converted as they are read.
    matrix_view<Unit> reserve_few(arena& a) const
    {
        const arena::scope shared(a); // with the other paths: a block takes one of them
        // The extra step keeps rows of 4 KiB from falling on the same lines of the cache.
        const int64_t step = round_up(units(), dot_depth<Unit>) + dot_depth<Unit>;
        return a.matrix<Unit>(least(x.extent(0), blocks_of_host.few_rows), step);
    }

    void few_rows(int worker, row_block b, int64_t begin, int64_t end, matrix_view<Unit> packed) const
    {
        using units_of_x = units_along<Unit, row_window<Rows>>;
        const int64_t step = packed.extent(1);
        Unit* const to = packed.data_handle();
        ex.run_rows(worker, 0, b.count, pack_rows<Unit, units_of_x>{{{x, b.first, b.count}, width()}, 0, step, to, step});
        const B* from = bias_of(b.expert);
        ex.run_rows(worker, 0, ceil_div(end - begin, dot_columns),
                    multiply_few_rows<Unit, W, B, Y>{ex.best(), to, step, b.count, w.base(b.expert) + begin * w.row_stride,
                                                     w.row_stride, width(), from ? from + begin : nullptr,
                                                     &y(b.first, begin), y.extent(1), end - begin});
    }

    // 2. W's rows lie along the reduction: they are the scalars, and rows of X the lanes, so W is not packed at all.

    struct along_scratch {
        vector_view<Unit> panels;  // (panels, K, lanes)
        matrix_view<Real> total;   // (columns, rows)
        matrix_view<Unit> scalars; // (columns, depth) where W is not read in place
        vector_view<Unit> last;    // (columns) the last unit where it is half a pair
    };

    along_scratch reserve_along(arena& a) const
    {
        constexpr auto n = blocks_of_host;
        return {a.vector<Unit>(rows_at_most() * units()), a.matrix<Real>(n.columns, rows_at_most()),
                a.matrix<Unit>(in_place ? 0 : n.columns, least(units(), n.depth) + lanes),
                a.vector<Unit>(in_place && elements == 2 ? n.columns : 0)};
    }

    void along_reduction(int worker, row_block b, int64_t begin, int64_t end, const along_scratch& s) const
    {
        const int64_t padded = round_up(b.count, lanes);
        for (int64_t at = 0; at < padded; at += full) {
            const int64_t here = least(full, padded - at);
            using units_of_x = units_along<Unit, row_window<Rows>>;
            const units_of_x from{{x, b.first + at, b.count - at}, width()};
            ex.run_rows(worker, 0, here / lanes,
                        pack_transposed<Unit, units_of_x>{from, 0, units(), s.panels.data_handle() + at * units(), here});
        }
        for (int64_t n = begin; n < end; n += blocks_of_host.columns) {
            const int64_t columns = least(blocks_of_host.columns, end - n);
            start_columns(s.total, padded, b.expert, n, columns);
            sum_columns(worker, b.expert, n, columns, padded, s);
            ex.run_rows(worker, 0, padded / lanes,
                        store_transposed<Real, Y>{s.total.data_handle(), s.total.extent(1), &y(b.first, n), y.extent(1),
                                                  b.count, columns});
        }
    }

    void start_columns(matrix_view<Real> total, int64_t padded, int64_t e, int64_t n, int64_t columns) const
    {
        const B* from = bias_of(e);
        for (int64_t j = 0; j < blocks_of_host.columns; ++j) {
            const Real start = from && j < columns ? static_cast<Real>(from[n + j]) : Real(0);
            Real* to = &total(j, 0);
            for (int64_t i = 0; i < padded; ++i) to[i] = start;
        }
    }

    void sum_columns(int worker, int64_t e, int64_t n, int64_t columns, int64_t padded, const along_scratch& s) const
    {
        const W* const from = w.base(e) + n * w.row_stride;
        const int64_t whole = in_place ? width() / elements : units();
        for (int64_t k = 0; k < whole; k += blocks_of_host.depth) {
            const int64_t depth = least(blocks_of_host.depth, whole - k);
            if constexpr (in_place) {
                tiles(from + k * elements, w.row_stride, columns, padded, k, depth, s);
            } else {
                using units_of_w = units_along<Unit, strided_rows<W>>;
                const units_of_w rows{{from, w.row_stride, columns}, width()};
                Unit* const to = s.scalars.data_handle();
                ex.run_rows(worker, 0, columns, pack_rows<Unit, units_of_w>{rows, k, depth, to, s.scalars.extent(1)});
                tiles(to, s.scalars.extent(1), columns, padded, k, depth, s);
            }
        }
        if constexpr (in_place && elements == 2)
            if (whole < units()) {
                for (int64_t j = 0; j < columns; ++j)
                    s.last(j) = {from[j * w.row_stride + width() - 1], bfloat16(0.0f)};
                tiles(s.last.data_handle(), 1, columns, padded, whole, 1, s);
            }
    }

    template <class T>
    void tiles(const T* scalars, int64_t step, int64_t columns, int64_t padded, int64_t k, int64_t depth,
               const along_scratch& s) const
    {
        for (int64_t at = 0; at < padded; at += full) {
            const int64_t here = least(full, padded - at);
            const Unit* panel = s.panels.data_handle() + at * units() + k * here;
            for (int64_t j = 0; j < columns; j += tile_rows) {
                prefetch_lines next;
                if (in_place && at == 0) {
                    const int64_t bytes = tile_rows * step * static_cast<int64_t>(sizeof(T));
                    next = {reinterpret_cast<const char*>(scalars + j * step) + bytes, bytes / depth, 64};
                }
                run_tile(ex.best(), tile<Unit>{panel, {}, depth, here / lanes, &s.total(j, at), s.total.extent(1), next},
                         scalars + j * step, step, columns - j);
            }
        }
    }

    // 3. W's rows lie across the reduction: blocks of them are packed as the lanes, and rows of X are the scalars.

    struct across_scratch {
        matrix_view<Unit> rows;   // (rows, K)
        vector_view<Unit> panels; // (panels, depth, lanes)
        matrix_view<Real> total;  // (rows, columns)
    };

    across_scratch reserve_across(arena& a) const
    {
        constexpr auto n = blocks_of_host;
        const int64_t columns = least(n.wide_columns, round_up(w.out, lanes));
        const int64_t rows = round_up(rows_at_most(), tile_rows);
        // The extra lanes keep rows of 4 KiB from falling on the same lines of the cache.
        return {a.matrix<Unit>(rows, round_up(units(), lanes) + lanes),
                a.vector<Unit>(least(n.packed_depth, units()) * columns), a.matrix<Real>(rows, columns)};
    }

    void across_reduction(int worker, row_block b, int64_t begin, int64_t end, const across_scratch& s) const
    {
        using units_of_x = units_along<Unit, row_window<Rows>>;
        const int64_t step = s.rows.extent(1);
        ex.run_rows(worker, 0, b.count,
                    pack_rows<Unit, units_of_x>{{{x, b.first, b.count}, width()}, 0, units(), s.rows.data_handle(), step});
        for (int64_t n = begin; n < end; n += s.total.extent(1)) {
            const int64_t columns = least(s.total.extent(1), end - n);
            start_rows(s.total, b, n, columns);
            for (int64_t k = 0; k < units(); k += blocks_of_host.packed_depth)
                sum_rows(worker, b, n, columns, k, least(blocks_of_host.packed_depth, units() - k), s);
            ex.run_rows(worker, 0, b.count,
                        store_rows<Real, Y>{s.total.data_handle(), s.total.extent(1), &y(b.first, n), y.extent(1), columns});
        }
    }

    void start_rows(matrix_view<Real> total, row_block b, int64_t n, int64_t columns) const
    {
        const B* from = bias_of(b.expert);
        for (int64_t i = 0; i < round_up(b.count, tile_rows); ++i) {
            Real* to = &total(i, 0);
            for (int64_t j = 0; j < total.extent(1); ++j)
                to[j] = from && j < columns ? static_cast<Real>(from[n + j]) : Real(0);
        }
    }

    void sum_rows(int worker, row_block b, int64_t n, int64_t columns, int64_t k, int64_t depth, const across_scratch& s) const
    {
        using units_of_w = units_across<Unit, strided_rows<W>>;
        const units_of_w from{{w.base(b.expert) + k * elements * w.col_stride, w.col_stride, width() - k * elements}, w.out};
        const int64_t padded = round_up(columns, lanes), groups = ceil_div(b.count, tile_rows);
        ex.run_rows(worker, 0, depth,
                    pack_panels<Unit, units_of_w>{from, n, padded, depth, s.panels.data_handle()});
        const prefetch_plan next = next_block(b, n, k, depth, ceil_div(padded, full) * groups);
        int64_t done = 0;
        for (int64_t at = 0; at < padded; at += full) {
            const int64_t here = least(full, padded - at);
            for (int64_t i = 0; i < b.count; i += tile_rows)
                run_tile(ex.best(),
                         tile<Unit>{s.panels.data_handle() + at * depth, {}, depth, here / lanes, &s.total(i, at),
                                    s.total.extent(1), next.part(done++, depth)},
                         &s.rows(i, k), s.rows.extent(1), b.count - i);
        }
    }

    /// The part of W that is packed after the one that begins at (n, k).
    prefetch_plan next_block(row_block b, int64_t n, int64_t k, int64_t depth, int64_t tiles) const
    {
        k += depth;
        if (k >= units()) k = 0, n += blocks_of_host.wide_columns;
        if (n >= w.out) return {};
        const int64_t row = w.col_stride * static_cast<int64_t>(sizeof(W)), rows = least(blocks_of_host.packed_depth, units() - k);
        const int64_t bytes = least(blocks_of_host.wide_columns, w.out - n) * static_cast<int64_t>(sizeof(W));
        const auto* first = reinterpret_cast<const char*>(w.base(b.expert) + k * elements * w.col_stride + n);
        if constexpr (elements == 2) return {first, 2 * row, row, rows, ceil_div(bytes, 64), 64, tiles};
        else return {first, row, 64, rows, ceil_div(bytes, 128), 128, tiles};
    }
};

} // namespace fastmoe::inline FASTMOE_ABI::detail::portable
