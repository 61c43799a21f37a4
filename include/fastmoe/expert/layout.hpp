// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Conversions between the weight layouts of checkpoints: transposed or not, one block or separate matrices, gate and up
/// rows concatenated or interleaved, and any element type to any other.
#pragma once

#include <fastmoe/gemm/grouped_gemm.hpp>
#include <fastmoe/ops/activate.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

template <class From, class To>
struct copy_weight {
    weight_view<const From> from; // (E,out,in)
    weight_view<To> to;           // (E,out,in)
    gated_layout from_layout, to_layout;
    bool gated;

    FASTMOE_HOST_DEVICE int64_t source_row(int64_t o) const noexcept
    {
        const int64_t half = to.out / 2;
        if (!gated || from_layout == to_layout) return o;
        return to_layout == gated_layout::interleaved ? o % 2 * half + o / 2 : o % half * 2 + o / half;
    }
    FASTMOE_HOST_DEVICE void operator()(int64_t n) const
    {
        const int64_t matrix = to.out * to.in, e = n / matrix, o = n % matrix / to.in, i = n % to.in;
        to(e, o, i) = To(accumulate_t<From>(from(e, source_row(o), i)));
    }
};

/// Whether no element of one is an element of the other, for two views with one kind of lines: beside each other in the same lines.
template <class From, class To>
bool are_beside(const weight_view<const From>& a, const weight_view<To>& b) noexcept
{
    const bool by_row = a.col_stride == 1;
    const int64_t line = by_row ? a.row_stride : a.col_stride, length = by_row ? a.in : a.out;
    const bool alike = sizeof(From) == sizeof(To) && a.row_stride == b.row_stride && a.col_stride == b.col_stride &&
                       (by_row || a.row_stride == 1) && line >= length && line > 0 &&
                       (a.experts == 1 || (a.expert_stride % line == 0 && b.expert_stride % line == 0));
    if (!alike) return false;
    const auto bytes = static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(b.data) - reinterpret_cast<std::uintptr_t>(a.data));
    const int64_t between = bytes / static_cast<int64_t>(sizeof(To)) % line, after = between < 0 ? between + line : between;
    return after >= length && after + length <= line;
}
/// Throws if an element that is written may be one that is read for another. What pointers lead to is the caller's word.
template <class From, class To>
void expects_no_overlap(const weight_view<const From>& from, const weight_view<To>& to, bool same_rows)
{
    if (from.pointers || to.pointers || to.experts == 0 || to.out == 0 || to.in == 0) return;
    const auto ends = [](const auto& w, std::uintptr_t& begin, std::uintptr_t& end) {
        begin = end = reinterpret_cast<std::uintptr_t>(w.data);
        for (const int64_t step : {(w.experts - 1) * w.expert_stride, (w.out - 1) * w.row_stride, (w.in - 1) * w.col_stride})
            (step < 0 ? begin : end) += static_cast<std::uintptr_t>(step) * sizeof(*w.data);
        end += sizeof(*w.data);
    };
    std::uintptr_t begin[2], end[2];
    ends(from, begin[0], end[0]), ends(to, begin[1], end[1]);
    const bool in_place = same_rows && begin[0] == begin[1] && end[0] == end[1] && sizeof(From) == sizeof(To) &&
                          from.expert_stride == to.expert_stride && from.row_stride == to.row_stride && from.col_stride == to.col_stride;
    expects(end[0] <= begin[1] || end[1] <= begin[0] || in_place || are_beside(from, to), "to (E,out,in)", "memory that is shared",
            "none in common with from, or the same elements at the same places");
}

template <class Executor, class From, class To>
void expects_same_weights(const weight_view<const From>& from, const weight_view<To>& to)
{
    expects(from.experts == to.experts, "from.experts", from.experts, to.experts);
    expects(from.out == to.out, "from.out", from.out, to.out);
    expects(from.in == to.in, "from.in", from.in, to.in);
    expects_memory(from, "from (E,out,in)");
    expects_memory(to, "to (E,out,in)");
    expects_pointers<Executor>(from, "from (E,out,in)");
    expects_pointers<Executor>(to, "to (E,out,in)");
    expects_apart(to, "to (E,out,in)");
}

} // namespace detail

/// to(e,o,i) = from(e,o,i), whatever the strides and types of either.
/// @throws invalid_argument if shapes disagree, memory is missing or misaligned, the matrices of `to` overlap, or `to` and `from`
///         do, unless each element is copied to where it is
template <executor Executor, class From, class To>
void copy_weights(Executor& ex, const weight_view<From>& from, const weight_view<To>& to)
{
    using source = std::remove_const_t<From>;
    const weight_view<const source> read = from;
    detail::expects_same_weights<Executor>(read, to);
    detail::expects_no_overlap(read, to, true);
    fastmoe::for_each(ex, to.experts * to.out * to.in, detail::copy_weight<source, To>{read, to, {}, {}, false});
}

/// The same for the up matrices of a gated expert, (E,2H,D), between two orders of the gate and up rows.
template <executor Executor, class From, class To>
void copy_gated_weights(Executor& ex, const weight_view<From>& from, gated_layout from_layout, const weight_view<To>& to,
                        gated_layout to_layout)
{
    using source = std::remove_const_t<From>;
    const weight_view<const source> read = from;
    detail::expects_same_weights<Executor>(read, to);
    expects(to.out % 2 == 0, "to.out", to.out, "an even number: gate and up rows");
    detail::expects_no_overlap(read, to, from_layout == to_layout);
    fastmoe::for_each(ex, to.experts * to.out * to.in,
                      detail::copy_weight<source, To>{read, to, from_layout, to_layout, true});
}

} // namespace fastmoe::inline FASTMOE_ABI
