// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How the portable GEMM cuts its three products into tasks and tiles on the host. All cuts follow from the shape and
/// the row counts alone, and each sum runs over the reduction in one order, so no bit depends on the threads.
#pragma once

#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/gemm/grouped_gemm.hpp>
#include <fastmoe/gemm/portable_dot.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::portable {

/// Block sizes, chosen for caches of 32 KiB and 1 MiB a core.
struct host_blocks {
    int64_t rows = 128;          ///< rows of X in a task
    int64_t few_rows = 8;        ///< up to here a product is bound by reading W
    int64_t columns = 48;        ///< columns of Y between two transposed stores: 8 tiles, 3 vectors
    int64_t wide_columns = 256;  ///< columns of Y whose part of W is packed at a time
    int64_t depth = 1024;        ///< reduction steps a tile runs over where W is read in place
    int64_t packed_depth = 256;  ///< reduction steps for which both sides are packed at a time
    int64_t gradient_rows = 192; ///< rows of dW in a task
    int64_t tasks = 64;          ///< fewer blocks of rows than this are cut along the columns as well
    int64_t least_columns = 192; ///< but no narrower than this
};
inline constexpr host_blocks blocks_of_host{};

template <class Rows>
using row_element_t = std::remove_cvref_t<decltype(*std::declval<const Rows&>().row(0))>;

/// The products are summed in double if an operand is double, in float otherwise.
template <class A, class B>
using product_total_t = std::conditional_t<std::is_same_v<A, double> || std::is_same_v<B, double>, double, float>;

template <class A, class B>
inline constexpr bool both_bfloat16 = std::is_same_v<A, bfloat16> && std::is_same_v<B, bfloat16>;

/// The same matrices with the roles of their two sides swapped.
template <class T>
constexpr weight_view<T> transposed(weight_view<T> w) noexcept
{
    return {w.data, w.pointers, w.experts, w.in, w.out, w.expert_stride, w.col_stride, w.row_stride};
}

/// An epilogue of the rows of one expert, as a row functor that keeps the epilogue's mark for vectorization.
template <class Epilogue>
struct expert_rows {
    int64_t expert;
    const Epilogue& epilogue;

    template <class Team>
    void operator()(Team& team, int64_t row) const
    {
        epilogue(team, expert, row);
    }
};
template <vectorized_functor Epilogue>
struct expert_rows<Epilogue> {
    using vectorized = void;
    int64_t expert;
    const Epilogue& epilogue;

    template <class Team>
    void operator()(Team& team, int64_t row) const
    {
        epilogue(team, expert, row);
    }
};

/// Rows [first, first + count) of one expert.
struct row_block {
    int64_t expert, first, count;
};

/// Cuts each expert's rows into even blocks.
struct row_cut {
    row_groups groups;
    vector_view<int64_t> before; // (E+1) blocks of the experts before e

    /// @throws invalid_argument if a group does not lie inside of the rows
    void count() const
    {
        before(0) = 0;
        for (int64_t e = 0; e < groups.experts(); ++e) {
            const int64_t n = groups.counts(e), first = groups.offsets(e);
            expects(n >= 0, "counts(e)", n, "0 or more for expert ", e);
            expects(first >= 0 && first <= groups.slots - n, "offsets(e)", first, "a group of ", n, " rows inside of ",
                    groups.slots);
            before(e + 1) = before(e) + ceil_div(n, blocks_of_host.rows);
        }
    }
    int64_t blocks() const noexcept { return before(groups.experts()); }

    row_block operator()(int64_t block) const noexcept
    {
        int64_t low = 0, high = groups.experts(); // before(low) <= block < before(high)
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (before(middle) <= block ? low : high) = middle;
        }
        const int64_t count = groups.counts(low), parts = before(low + 1) - before(low);
        const int64_t size = round_up(ceil_div(count, parts), 16), at = (block - before(low)) * size;
        return {low, groups.offsets(low) + at, least(size, count - at)};
    }
};

/// Runs a tile over `rows` rows (up to tile_rows) of scalars that lie `step` elements apart; the totals of further rows
/// become sums that nobody reads. Elements are units, or halves of pairs: rows of an odd length are half a unit apart.
template <class Unit, class Element>
void run_tile(instruction_set level, tile<Unit> t, const Element* scalars, int64_t step, int64_t rows)
{
    for (int64_t j = 0; j < tile_rows; ++j) t.row[j] = reinterpret_cast<const Unit*>(scalars + least(j, rows - 1) * step);
    best_tile<Unit>(level, t.vectors)(t);
}

/// A block of memory that tiles ask for in parts while they compute: each part is a column of lines, two a row of the
/// block, as long as the tile is deep.
struct prefetch_plan {
    const char* first = nullptr;
    int64_t row_step, second; ///< bytes from a row to the next, from the first line of a row to the second
    int64_t rows, columns;    ///< columns of two lines
    int64_t column_step;      ///< bytes
    int64_t tiles;            ///< over which the parts are spread

    prefetch_lines part(int64_t tile, int64_t depth) const
    {
        if (!first || depth < 1) return {};
        const int64_t parts = ceil_div(rows, depth), all = parts * columns, mine = tile * all / tiles;
        if (mine == (tile + 1) * all / tiles) return {};
        return {first + mine / parts * column_step + mine % parts * depth * row_step, row_step, second};
    }
};

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
        const int64_t mark = a.used(); // shares its memory with the other paths
        // The extra step keeps rows of 4 KiB from falling on the same lines of the cache.
        const int64_t step = round_up(units(), dot_depth<Unit>) + dot_depth<Unit>;
        const auto out = a.matrix<Unit>(least(x.extent(0), blocks_of_host.few_rows), step);
        a.rewind(mark);
        return out;
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

/// dW[o,i] (+)= sum over the rows s of a group of dY[s,o] X[s,i], for a block of dW. Lanes are the side along which dW is
/// contiguous; the other side gives the scalars.
template <class Unit, class Lanes, class Scalars, class G>
class gradient_product {
public:
    using Real = total_t<Unit>;

    host_executor& ex;
    row_groups groups;
    Lanes across;        // (S,I)
    Scalars down;        // (S,O)
    weight_view<G> dw;   // (E,O,I), col_stride 1
    write_mode mode;

    int64_t tasks() const { return groups.experts() * row_blocks() * column_blocks(); }

    struct scratch {
        vector_view<Unit> panels;  // (panels, depth, lanes)
        matrix_view<Unit> scalars; // (rows of dW, depth)
        matrix_view<Real> total;   // (rows of dW, columns of dW)
    };

    scratch reserve(arena& a) const
    {
        constexpr auto n = blocks_of_host;
        const int64_t depth = least(n.packed_depth, round_up(ceil_div(groups.slots, elements), lanes));
        const int64_t rows = least(n.gradient_rows, round_up(dw.out, 48));
        const int64_t columns = least(n.wide_columns, round_up(dw.in, lanes));
        return {a.vector<Unit>(depth * columns), a.matrix<Unit>(rows, depth + lanes), a.matrix<Real>(rows, columns)};
    }

    void task(int worker, int64_t task, arena& a) const
    {
        const scratch s = reserve(a);
        const int64_t e = task / (row_blocks() * column_blocks()), in_matrix = task % (row_blocks() * column_blocks());
        const int64_t o = in_matrix / column_blocks() * blocks_of_host.gradient_rows;
        const int64_t i = in_matrix % column_blocks() * blocks_of_host.wide_columns;
        const int64_t rows = least(blocks_of_host.gradient_rows, dw.out - o);
        const int64_t columns = least(blocks_of_host.wide_columns, dw.in - i), count = groups.counts(e);
        if (count == 0 && mode == write_mode::accumulate) return;
        std::memset(s.total.data_handle(), 0, static_cast<std::size_t>(s.total.extent(0) * s.total.extent(1)) * sizeof(Real));
        for (int64_t first = 0; first < count; first += blocks_of_host.packed_depth * elements)
            sum(worker, groups.offsets(e) + first, least(blocks_of_host.packed_depth * elements, count - first), o, rows, i,
                columns, first + blocks_of_host.packed_depth * elements >= count ? dw.base(e) + o * dw.row_stride + i : nullptr, s);
        ex.run_rows(worker, 0, rows,
                    store_rows<Real, G>{s.total.data_handle(), s.total.extent(1), dw.base(e) + o * dw.row_stride + i,
                                        dw.row_stride, columns, mode});
    }

private:
    static constexpr int64_t elements = unit_elements<Unit>, lanes = vector_lanes<Unit>, full = panel_lanes<Unit>;

    int64_t row_blocks() const { return ceil_div(dw.out, blocks_of_host.gradient_rows); }
    int64_t column_blocks() const { return ceil_div(dw.in, blocks_of_host.wide_columns); }

    void sum(int worker, int64_t first, int64_t count, int64_t o, int64_t rows, int64_t i, int64_t columns, const G* to,
             const scratch& s) const
    {
        const int64_t depth = ceil_div(count, elements), padded = round_up(columns, lanes);
        using across_units = units_across<Unit, row_window<Lanes>>;
        const across_units lane_side{{across, first, count}, dw.in};
        ex.run_rows(worker, 0, depth,
                    pack_panels<Unit, across_units>{lane_side, i, padded, depth, s.panels.data_handle()});
        using down_units = units_across<Unit, row_window<Scalars>>;
        const down_units scalar_side{{down, first, count}, dw.out};
        ex.run_rows(worker, 0, ceil_div(depth, lanes),
                    pack_transposed<Unit, down_units>{scalar_side, o, rows, s.scalars.data_handle(), s.scalars.extent(1)});
        const prefetch_plan target{reinterpret_cast<const char*>(to),
                                   dw.row_stride * static_cast<int64_t>(sizeof(G)),
                                   64,
                                   rows,
                                   ceil_div(columns * static_cast<int64_t>(sizeof(G)), 128),
                                   128,
                                   ceil_div(padded, full) * ceil_div(rows, tile_rows)};
        int64_t done = 0;
        for (int64_t at = 0; at < padded; at += full) {
            const int64_t here = least(full, padded - at);
            for (int64_t r = 0; r < rows; r += tile_rows)
                run_tile(ex.best(),
                         tile<Unit>{s.panels.data_handle() + at * depth, {}, depth, here / lanes, &s.total(r, at),
                                    s.total.extent(1), target.part(done++, depth)},
                         &s.scalars(r, 0), s.scalars.extent(1), rows - r);
        }
    }
};

} // namespace fastmoe::inline FASTMOE_ABI::detail::portable
