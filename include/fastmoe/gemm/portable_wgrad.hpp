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
