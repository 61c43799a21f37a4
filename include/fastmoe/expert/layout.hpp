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
/// @throws invalid_argument if shapes disagree, memory is missing or misaligned, or the matrices of `to` overlap
template <executor Executor, class From, class To>
void copy_weights(Executor& ex, const weight_view<From>& from, const weight_view<To>& to)
{
    using source = std::remove_const_t<From>;
    const weight_view<const source> read = from;
    detail::expects_same_weights<Executor>(read, to);
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
    fastmoe::for_each(ex, to.experts * to.out * to.in,
                      detail::copy_weight<source, To>{read, to, from_layout, to_layout, true});
}

} // namespace fastmoe::inline FASTMOE_ABI
