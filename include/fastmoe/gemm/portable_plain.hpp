// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The plain source of gemm::portable: an element of the output a lane, one row a team. Part of portable.hpp.
#pragma once

#include <fastmoe/gemm/grouped_gemm.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace verbs {
struct multiply_rows;
struct multiply_weight_gradients;
} // namespace verbs

namespace detail::portable {

template <class Rows>
using row_element_t = std::remove_cvref_t<decltype(*std::declval<const Rows&>().row(0))>;

/// The products are summed in double if an operand is double, in float otherwise.
template <class A, class B>
using product_total_t = wider_t<A, B>;

/// The same matrices with the roles of their two sides swapped.
template <class T>
constexpr weight_view<T> transposed(weight_view<T> w) noexcept
{
    return {w.data, w.pointers, w.experts, w.in, w.out, w.expert_stride, w.col_stride, w.row_stride};
}

/// Calls the epilogue for the rows of groups and passes over padding.
FASTMOE_HOST_DEVICE constexpr int64_t expert_of_row(const row_groups& groups, int64_t row) noexcept
{
    int64_t low = 0, high = groups.experts(); // offsets(low) <= row, if any group holds the row
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (groups.offsets(middle) <= row ? low : high) = middle;
    }
    const bool inside = high > 0 && row >= groups.offsets(low) && row - groups.offsets(low) < groups.counts(low);
    return inside ? low : -1;
}

/// The epilogue alone, of products that are complete.
template <class Epilogue>
struct end_row {
    row_groups groups;
    Epilogue epilogue;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t row) const
    {
        const int64_t e = expert_of_row(groups, row);
        if (e >= 0) epilogue(team, e, row);
    }
};

template <class Rows, class W, class B, class Y, class Epilogue>
struct multiply_row {
    using Real = product_total_t<row_element_t<Rows>, W>;
    row_groups groups;
    Rows x;                    // (S,K)
    weight_view<const W> w;    // (E,N,K)
    matrix_view<const B> bias; // (E,N), or no memory
    matrix_view<Y> y;          // (S,N)
    Epilogue epilogue;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t row) const
    {
        const int64_t e = expert_of_row(groups, row);
        if (e < 0) return;
        const auto* from = x.row(row);
        const auto& self = *this;
        team.for_each(y.extent(1), [&self, from, e, row](int64_t n) {
            Real sum = self.bias.data_handle() ? static_cast<Real>(self.bias(e, n)) : Real(0);
            for (int64_t k = 0; from && k < self.w.in; ++k)
                sum += static_cast<Real>(from[k]) * static_cast<Real>(self.w(e, n, k));
            self.y(row, n) = static_cast<Y>(sum);
        });
        team.sync();
        epilogue(team, e, row);
    }
};

template <class DyRows, class XRows, class G>
struct multiply_weight_row {
    using Real = product_total_t<row_element_t<DyRows>, row_element_t<XRows>>;
    row_groups groups;
    DyRows dy;         // (S,O)
    XRows x;           // (S,I)
    weight_view<G> dw; // (E,O,I)
    write_mode mode;
    fault_recorder faults;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t task) const
    {
        const int64_t e = task / dw.out, o = task % dw.out;
        if (!is_group_inside(groups.counts, groups.offsets, e, groups.slots)) {
            if (team.lane() == 0) faults.record(fault_kind::group_out_of_range, e, groups.counts(e));
            return;
        }
        const int64_t begin = groups.offsets(e), end = begin + groups.counts(e);
        if (begin == end && mode == write_mode::accumulate) return;
        const auto& self = *this;
        team.for_each(dw.in, [&self, e, o, begin, end](int64_t i) {
            Real sum = 0;
            for (int64_t s = begin; s < end; ++s) {
                const auto* dy_row = self.dy.row(s);
                const auto* x_row = self.x.row(s);
                if (dy_row && x_row) sum += static_cast<Real>(dy_row[o]) * static_cast<Real>(x_row[i]);
            }
            G& to = self.dw(e, o, i);
            to = static_cast<G>(self.mode == write_mode::accumulate ? static_cast<wider_t<Real, G>>(to) + sum : sum);
        });
    }
};

template <class Executor, class Rows, class W, class B, class Y, class Epilogue>
void multiply_rows_plainly(Executor& ex, const row_groups& groups, const Rows& x, const weight_view<const W>& w,
                           matrix_view<const B> bias, matrix_view<Y> y, const Epilogue& epilogue, arena& memory)
{
    if (memory.measuring()) return;
    fastmoe::for_each_row(ex, groups.slots, multiply_row<Rows, W, B, Y, Epilogue>{groups, x, w, bias, y, epilogue},
                          {.width = w.out});
}

template <class Executor, class DyRows, class XRows, class G>
void multiply_weight_gradients_plainly(Executor& ex, const row_groups& groups, const DyRows& dy, const XRows& x,
                                       const weight_view<G>& dw, write_mode mode, arena& memory)
{
    if (memory.measuring()) return;
    fastmoe::for_each_row(ex, groups.experts() * dw.out,
                          multiply_weight_row<DyRows, XRows, G>{groups, dy, x, dw, mode, ex.faults()},
                          {.width = dw.in});
    ex.deliver_faults();
}

} // namespace detail::portable

template <class Executor>
struct implementation<verbs::multiply_rows, Executor> {
    template <class Rows, class W, class B, class Y, class Epilogue>
    static void run(Executor& ex, const row_groups& groups, const Rows& x, const weight_view<const W>& w,
                    matrix_view<const B> bias, matrix_view<Y> y, const Epilogue& epilogue, arena& memory)
    {
        detail::portable::multiply_rows_plainly(ex, groups, x, w, bias, y, epilogue, memory);
    }
};

template <class Executor>
struct implementation<verbs::multiply_weight_gradients, Executor> {
    template <class DyRows, class XRows, class G>
    static void run(Executor& ex, const row_groups& groups, const DyRows& dy, const XRows& x, const weight_view<G>& dw,
                    write_mode mode, arena& memory)
    {
        detail::portable::multiply_weight_gradients_plainly(ex, groups, dy, x, dw, mode, memory);
    }
};

} // namespace fastmoe::inline FASTMOE_ABI
