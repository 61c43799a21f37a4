// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The gradient of the weights on the host: blocks of dW, each summed over the rows of its expert in one order.
#pragma once

#include <fastmoe/gemm/portable_cuts.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::portable {

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

    int64_t tasks() const { return block().tasks(*this); }

    struct scratch {
        vector_view<Unit> panels;  // (panels, depth, lanes)
        matrix_view<Unit> scalars; // (rows of dW, depth)
        matrix_view<Real> total;   // (rows of dW, columns of dW)
    };

    scratch reserve(arena& a) const
    {
        constexpr auto n = blocks_of_host;
        const int64_t depth = least(n.packed_depth, round_up(ceil_div(groups.slots, elements), lanes));
        const block_size size = block();
        const int64_t rows = least(size.rows, round_up(dw.out, 48)), columns = least(size.columns, round_up(dw.in, lanes));
        return {a.vector<Unit>(depth * columns), a.matrix<Unit>(rows, depth + lanes), a.matrix<Real>(rows, columns)};
    }

    void task(int worker, int64_t task, arena& a) const
    {
        const scratch s = reserve(a);
        const block_size size = block();
        const int64_t beside = ceil_div(dw.in, size.columns), each = ceil_div(dw.out, size.rows) * beside;
        const int64_t e = task / each, o = task % each / beside * size.rows, i = task % each % beside * size.columns;
        const int64_t rows = least(size.rows, dw.out - o), columns = least(size.columns, dw.in - i), count = groups.counts(e);
        if (count == 0 && mode == write_mode::accumulate) return;
        G* const to = dw.base(e) + o * dw.row_stride + i;
        if (count == 0) return fill(worker, rows, columns, to, s);
        for (int64_t first = 0; first < count; first += blocks_of_host.packed_depth * elements)
            sum(worker, groups.offsets(e) + first, least(blocks_of_host.packed_depth * elements, count - first), o, rows, i,
                columns, to, first == 0, first + blocks_of_host.packed_depth * elements >= count, s);
        const int64_t sure = direct_columns(columns), whole = direct_rows(rows);
        store(worker, whole, rows, 0, columns, to, s);
        if (sure < columns) store(worker, 0, whole, sure, columns, to, s);
    }

private:
    static constexpr int64_t elements = unit_elements<Unit>, lanes = vector_lanes<Unit>, full = panel_lanes<Unit>;

    /// The part of dW that a task computes: large, to pack little, where a group is summed in one go; small enough to stay
    /// in cache where it is added to again and again; and with enough tasks for some threads.
    struct block_size {
        int64_t rows, columns;

        int64_t tasks(const gradient_product& p) const
        {
            return p.groups.experts() * ceil_div(p.dw.out, rows) * ceil_div(p.dw.in, columns);
        }
    };
    block_size block() const
    {
        constexpr auto n = blocks_of_host;
        const bool once = groups.slots <= n.packed_depth * elements * groups.experts();
        block_size size{once ? n.gradient_rows : n.gradient_rows / 2, once ? n.gradient_columns : n.gradient_columns / 2};
        while (size.columns > 128 && size.tasks(*this) < n.gradient_tasks) size.columns /= 2;
        while (size.rows > 96 && size.tasks(*this) < n.gradient_tasks) size.rows /= 2;
        return size;
    }

    /// Tiles that lie in the block as a whole write dW itself where it is of the sums' type, and add to it from pass to pass.
    static constexpr bool direct = std::is_same_v<G, Real>;
    static int64_t direct_columns(int64_t columns) { return direct ? columns / full * full : 0; }
    static int64_t direct_rows(int64_t rows) { return direct ? rows / tile_rows * tile_rows : 0; }

    /// Whether the tiles of a block write past the caches: whole lines of a large dW that nothing is added to.
    bool streams(const G* to, bool once) const
    {
        const auto bytes = [](int64_t n) { return n * static_cast<int64_t>(sizeof(G)); };
        return once && mode == write_mode::overwrite && bytes(dw.out * dw.in) >= blocks_of_host.streamed_bytes / groups.experts() &&
               bytes(dw.row_stride) % 64 == 0 && reinterpret_cast<std::uintptr_t>(to) % 64 == 0;
    }

    /// A row of dW that is written soon, asked for in two halves over the steps of a tile.
    prefetch_lines next_row(const G* to, int64_t columns, int64_t rows, int64_t row, int64_t depth) const
    {
        const int64_t half = columns * static_cast<int64_t>(sizeof(G)) / 2;
        if (row >= rows || depth < 8) return {};
        return {reinterpret_cast<const char*>(to + row * dw.row_stride), half / depth, half};
    }

    void fill(int worker, int64_t rows, int64_t columns, G* to, const scratch& s) const
    {
        std::memset(s.total.data_handle(), 0, static_cast<std::size_t>(s.total.extent(0) * s.total.extent(1)) * sizeof(Real));
        store(worker, 0, rows, 0, columns, to, s);
    }

    /// Rows [r, end) and columns [c, last) of the totals to their place.
    void store(int worker, int64_t r, int64_t end, int64_t c, int64_t last, G* to, const scratch& s) const
    {
        if (r >= end || c >= last) return;
        const int64_t step = s.total.extent(1);
        ex.run_rows(worker, 0, end - r,
                    store_rows<Real, G>{s.total.data_handle() + r * step + c, step, to + r * dw.row_stride + c, dw.row_stride,
                                        last - c, mode});
    }

    void sum(int worker, int64_t first, int64_t count, int64_t o, int64_t rows, int64_t i, int64_t columns, G* to,
             bool is_first, bool is_last, const scratch& s) const
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
        const bool stream = direct && streams(to, is_first && is_last);
        const prefetch_plan target{reinterpret_cast<const char*>(is_last || (direct && is_first) ? to : nullptr),
                                   dw.row_stride * static_cast<int64_t>(sizeof(G)),
                                   64,
                                   rows,
                                   ceil_div(columns * static_cast<int64_t>(sizeof(G)), 128),
                                   128,
                                   ceil_div(padded, full) * ceil_div(rows, tile_rows)};
        // In place, strips of rows keep few of dW's pages open; totals are close at hand, so there the panels take turns.
        const int64_t strips = ceil_div(rows, tile_rows), panels = ceil_div(padded, full);
        for (int64_t n = 0; n < strips * panels; ++n) {
            const int64_t r = (direct ? n / panels : n % strips) * tile_rows, at = (direct ? n % panels : n / strips) * full;
            const int64_t here = least(full, padded - at);
            tile<Unit> t{s.panels.data_handle() + at * depth, {}, depth, here / lanes, &s.total(r, at), s.total.extent(1),
                         target.part(n, depth), is_first};
            if constexpr (direct)
                if (at + full <= direct_columns(columns) && r + tile_rows <= direct_rows(rows)) {
                    t.total = to + r * dw.row_stride + at;
                    t.total_step = dw.row_stride;
                    t.fresh = is_first && mode == write_mode::overwrite;
                    t.stream = stream;
                    t.ahead = stream ? prefetch_lines{} : next_row(to, columns, rows, r + tile_rows + at / full, depth);
                }
            run_tile(ex.best(), t, &s.scalars(r, 0), s.scalars.extent(1), rows - r);
        }
        if (stream) fence_streams();
    }
};

} // namespace fastmoe::inline FASTMOE_ABI::detail::portable
