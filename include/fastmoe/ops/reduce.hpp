// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Sums over the rows of each group: gradients of biases.
#pragma once

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/exec/executor.hpp>
#include <fastmoe/exec/memory.hpp>
#include <fastmoe/ops/lines.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Whether a gradient replaces what its memory holds or is added to it.
enum class write_mode : std::uint8_t { overwrite, accumulate };

namespace verbs {
struct sum_groups;
}

namespace detail {

/// Whether the rows of group e lie inside of `rows` rows.
FASTMOE_HOST_DEVICE constexpr bool is_group_inside(vector_view<const int32_t> counts, vector_view<const int64_t> offsets,
                                                   int64_t e, int64_t rows) noexcept
{
    return counts(e) >= 0 && offsets(e) >= 0 && offsets(e) <= rows - counts(e);
}

/// Throws invalid_argument unless all groups lie inside of the rows. Reads the arrays.
inline void expects_groups_inside(vector_view<const int32_t> counts, vector_view<const int64_t> offsets, int64_t rows)
{
    for (int64_t e = 0; e < counts.extent(0); ++e) {
        expects(counts(e) >= 0, "counts(e)", counts(e), "0 or more for expert ", e);
        expects(is_group_inside(counts, offsets, e, rows), "offsets(e)", offsets(e), "a group of ", counts(e),
                " rows inside of ", rows, " for expert ", e);
    }
}

/// Columns that one team sums at a time.
inline constexpr int64_t sum_columns = 64;

/// Rows that lanes side by side sum apart from each other at most, each in sum_columns of scratch: no more than a group has on
/// the average, but a few.
constexpr int64_t rows_apart(int64_t mean) noexcept { return mean < 4 ? 4 : (mean < 32 ? mean : 32); }

/// Whether the first of these rows says where all begin.
template <class Rows>
concept rows_of_matrix = requires(const Rows& rows) { rows.data.data_handle(); };

template <class Real, class Rows, class G, class Scale>
struct sum_group_columns {
    using vectorized = void;
    using Sum = wider_t<Real, std::remove_cvref_t<decltype(*std::declval<const Rows&>().row(0))>>;
    Rows rows;                            // (S,N)
    vector_view<const int32_t> counts;    // (E)
    vector_view<const int64_t> offsets;   // (E+1)
    matrix_view<G> out;                   // (E,N)
    write_mode mode;
    Scale scale;
    int64_t apart;                        // rows_apart()
    fault_recorder faults;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t task) const
    {
        const int64_t n = out.extent(1), tiles = (n + sum_columns - 1) / sum_columns;
        const int64_t e = task / tiles, first = task % tiles * sum_columns;
        const int64_t width = n - first < sum_columns ? n - first : sum_columns;
        if (!is_group_inside(counts, offsets, e, rows.extent(0))) {
            if (team.lane() == 0) faults.record(fault_kind::group_out_of_range, e, counts(e));
            return;
        }
        if constexpr (!is_single_lane<Team>) in_lines_of(team, e, first, width);
        else in_pieces(team, e, first, width);
    }

    /// Of scratch, for lanes that sum rows apart.
    static constexpr int64_t scratch_bytes(int64_t apart) noexcept { return apart * sum_columns * static_cast<int64_t>(sizeof(Sum)); }

private:
    using element = std::remove_cvref_t<decltype(*std::declval<const Rows&>().row(0))>;

    /// One lane adds all rows in their order.
    template <class Team>
    FASTMOE_HOST_DEVICE void in_pieces(Team& team, int64_t e, int64_t first, int64_t width) const
    {
        const int64_t n = out.extent(1), begin = offsets(e), end = begin + counts(e);
        const auto& self = *this;
        G* to = out.data_handle() + e * n + first;
        constexpr int64_t lane_columns = 16;
        team.for_each((width + lane_columns - 1) / lane_columns, [=, &self](int64_t part) {
            const int64_t at = part * lane_columns, here = width - at < lane_columns ? width - at : lane_columns;
            Sum total[lane_columns] = {};
            for (int64_t s = begin; s < end; ++s) {
                const auto* from = self.rows.row(s);
                if (!from) continue;
                const Sum w = self.scale(s);
                from += first + at;
                if (here == lane_columns)
                    for (int64_t j = 0; j < lane_columns; ++j) total[j] += w * Sum(from[j]);
                else
                    for (int64_t j = 0; j < here; ++j) total[j] += w * Sum(from[j]);
            }
            for (int64_t j = 0; j < here; ++j)
                to[at + j] = G(self.mode == write_mode::accumulate ? wider_t<Sum, G>(to[at + j]) + total[j] : total[j]);
        });
    }

    /// Each lane adds every so many-th row in a line of columns; what they have is then added in the order of their first rows.
    template <class Team>
    FASTMOE_HOST_DEVICE void in_lines_of(Team& team, int64_t e, int64_t first, int64_t width) const
    {
        if constexpr (rows_of_matrix<Rows>)
            if (in_lines<line_elements<element>>(out.extent(1), rows.data.data_handle()))
                return by_lines<line_elements<element>>(team, e, first, static_cast<int32_t>(width));
        by_lines<1>(team, e, first, static_cast<int32_t>(width));
    }

    template <int64_t N, class Team>
    FASTMOE_HOST_DEVICE void by_lines(Team& team, int64_t e, int64_t first, int32_t width) const
    {
        const int64_t begin = offsets(e), target = e * out.extent(1) + first;
        const int32_t lanes = static_cast<int32_t>(team.lanes()), lane = static_cast<int32_t>(team.lane());
        const auto count = static_cast<std::uint32_t>(counts(e)); // unsigned: a few steps beyond it are a number still
        const int32_t across = width / static_cast<int32_t>(N), room = static_cast<int32_t>(apart * sum_columns) / width;
        const int32_t fit = lanes / across, step = fit < 1 ? 1 : (fit < room ? fit : room);
        const auto& self = *this;
        Sum* parts = team.template scratch<Sum>(apart * sum_columns); // (step,width)
        const int32_t part = fit < 1 ? 0 : lane / across;
        for (int32_t i = lane - part * across; part < step && i < across; i += lanes) {
            const int32_t at = i * static_cast<int32_t>(N);
            line<Sum, N> total{};
            const auto row = [&self, begin, column = first + at](std::uint32_t r) -> const element* {
                const element* from = self.rows.row(begin + r);
                return from ? from + column : nullptr;
            };
            const auto scaled = [&self, begin](std::uint32_t r) { return self.scale(begin + r); };
            // A scale is a chain of loads by itself: two of them at a time would not stay in registers.
            if constexpr (std::is_same_v<Scale, unit_scale<Real>>) add_lines<2>(total, static_cast<std::uint32_t>(part), count, step, row, self.scale);
            else add_lines<1>(total, static_cast<std::uint32_t>(part), count, step, row, scaled);
            write_line<false>(total, parts + part * width + at);
        }
        team.sync();
        G* to = out.data_handle() + target;
        team.for_each(width, [=, &self](int64_t j) {
            Sum total = parts[j];
            FASTMOE_UNROLL_4
            for (int32_t r = 1; r < step; ++r) total += parts[r * width + j];
            to[j] = G(self.mode == write_mode::accumulate ? wider_t<Sum, G>(to[j]) + total : total);
        });
    }
};

} // namespace detail

template <class Executor>
struct implementation<verbs::sum_groups, Executor> {
    template <class Functor>
    static void run(Executor& ex, int64_t tasks, const Functor& f, int64_t rows)
    {
        fastmoe::for_each_row(ex, tasks, f,
                              {.width = rows * detail::sum_columns, .scratch_bytes = f.scratch_bytes(f.apart)});
    }
};

/// out(e) (+)= the sum of scale(s) * rows(s) over the rows of group e, in row order on the host and elsewhere in an order that
/// shapes alone decide; zeros for a group without rows. Sums in
/// the wider type of scale and rows, adds to out in that or in out's if that is wider, and rounds once.
/// @param rows     plain_rows or indexed_rows                                       // (S,N)
/// @param counts   rows of each group                                               // (E)
/// @param offsets  first row of each group                                          // (E+1)
/// @param scale    a functor of the slot
/// @param out      overwritten or added to; padding rows do not count               // (E,N)
/// @throws invalid_argument if shapes disagree; if a group does not lie inside of the rows: before anything is written on
///         the host, elsewhere as a fault, and that group's sums are left alone
template <executor Executor, class Rows, class G, class Scale>
void sum_groups(Executor& ex, const Rows& rows, vector_view<const int32_t> counts, vector_view<const int64_t> offsets,
                const Scale& scale, matrix_view<G> out, write_mode mode)
{
    expects_shape(out, "out (E,N)", counts.extent(0), rows.extent(1));
    expects_shape(offsets, "offsets (E+1)", counts.extent(0) + 1);
    if constexpr (has_readable_memory<Executor>) detail::expects_groups_inside(counts, offsets, rows.extent(0));
    using Real = decltype(scale(0));
    const int64_t tiles = (out.extent(1) + detail::sum_columns - 1) / detail::sum_columns;
    const int64_t mean = counts.extent(0) > 0 ? rows.extent(0) / counts.extent(0) + 1 : 1;
    const detail::sum_group_columns<Real, Rows, G, Scale> f{rows, counts, offsets, out, mode, scale, detail::rows_apart(mean), ex.faults()};
    implementation<verbs::sum_groups, Executor>::run(ex, counts.extent(0) * tiles, f, mean);
    if constexpr (!has_readable_memory<Executor>) ex.deliver_faults();
}

} // namespace fastmoe::inline FASTMOE_ABI
