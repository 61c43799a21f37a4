// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The grouped GEMM concept: three products over the experts' row ranges, and the policy that decides their speed.
///
///     forward   Y[s] = X[s] W[e(s)]^T          rows vary per expert
///     dgrad     dX[s] = dY[s] W[e(s)]
///     wgrad     dW[e] (+)= dY_e^T X_e           depth varies per expert; an expert with no rows gets exact zeros
#pragma once

#include <concepts>
#include <cstddef>
#include <utility>

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/core/indexed_rows.hpp>
#include <fastmoe/exec/memory.hpp>
#include <fastmoe/ops/reduce.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Which rows belong to which expert: expert e has rows [offset(e), offset(e) + count(e)). Rows between the end of one
/// expert and the start of the next are padding: never read, never written.
struct row_groups {
    vector_view<const int32_t> counts;  // (E)
    vector_view<const int64_t> offsets; // (E+1)
    int64_t slots = 0;                  ///< S, the rows that the buffers have room for

    FASTMOE_HOST_DEVICE constexpr int64_t experts() const noexcept { return counts.extent(0); }
};

/// The experts' matrices W[e], (out, in) each: E of them at a fixed distance, or anywhere through an array of pointers.
/// Element (o, i) of expert e is base(e)[o * row_stride + i * col_stride]; one of the two strides is 1, so that row_stride
/// = 1 is the transposed layout of checkpoints that store (E,in,out). Matrices that are read may overlap; those that are
/// written may not, of which verbs see what strides can show.
template <class T>
struct weight_view {
    T* data = nullptr;            ///< expert 0, unless `pointers` is set
    T* const* pointers = nullptr; // (E)
    int64_t experts = 0;          ///< E
    int64_t out = 0;              ///< rows of a matrix
    int64_t in = 0;               ///< columns of a matrix
    int64_t expert_stride = 0;    ///< elements from an expert to the next
    int64_t row_stride = 0;
    int64_t col_stride = 1;

    FASTMOE_HOST_DEVICE constexpr T* base(int64_t e) const noexcept
    {
        return pointers ? pointers[e] : data + e * expert_stride;
    }
    FASTMOE_HOST_DEVICE constexpr T& operator()(int64_t e, int64_t o, int64_t i) const noexcept
    {
        return base(e)[o * row_stride + i * col_stride];
    }
    template <std::same_as<const T> U>
    FASTMOE_HOST_DEVICE constexpr operator weight_view<U>() const noexcept
    {
        return {data, pointers, experts, out, in, expert_stride, row_stride, col_stride};
    }
};

/// (E,out,in), contiguous.
template <class T>
constexpr weight_view<T> stacked(tensor_view<T, 3> w) noexcept
{
    return {w.data_handle(), nullptr, w.extent(0), w.extent(1), w.extent(2), w.extent(1) * w.extent(2), w.extent(2), 1};
}

/// (E,in,out), contiguous: each matrix transposed.
template <class T>
constexpr weight_view<T> stacked_transposed(tensor_view<T, 3> w) noexcept
{
    return {w.data_handle(), nullptr, w.extent(0), w.extent(2), w.extent(1), w.extent(1) * w.extent(2), 1, w.extent(2)};
}

/// E matrices (out,in) held apart, as inference engines do.
template <class T>
constexpr weight_view<T> separate(vector_view<T* const> matrices, int64_t out, int64_t in) noexcept
{
    return {nullptr, matrices.data_handle(), matrices.extent(0), out, in, 0, in, 1};
}

/// One matrix as the weights of one expert.
template <class T>
constexpr weight_view<T> single(matrix_view<T> w) noexcept
{
    return {w.data_handle(), nullptr, 1, w.extent(0), w.extent(1), 0, w.extent(1), 1};
}

namespace detail {
template <class Gemm, class T>
struct weights_of_gemm {
    using type = weight_view<T>;
};
template <class Gemm, class T>
    requires requires { typename Gemm::template weights<T>; }
struct weights_of_gemm<Gemm, T> {
    using type = typename Gemm::template weights<T>;
};

/// The matrices of a view, whatever belongs to them besides.
template <class Weights>
FASTMOE_HOST_DEVICE constexpr const auto& matrices_of(const Weights& w) noexcept
{
    if constexpr (requires { w.codes; }) return w.codes;
    else return w;
}
} // namespace detail

/// The view through which a policy reads an expert's matrices where rows are of T: weight_view<T>, or what the policy names,
/// Gemm::weights<T>. Such a view has the matrices in .codes and may have expects_views(name, experts, out, in), which throws
/// unless it is of that shape; Gemm::reserve_weights<T>(arena&, experts, out, in) makes one.
template <class Gemm, class T>
using weights_of_gemm = typename detail::weights_of_gemm<Gemm, T>::type;

/// An epilogue that does nothing. An epilogue is called once for every row of a group, as f(team, expert, row), after
/// all columns of that row are stored and by the team that owns them; it may read and write the row, and whatever else
/// belongs to the row alone. Whether it runs while the row is still in cache is the policy's business.
struct no_epilogue {
    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team&, int64_t, int64_t) const noexcept
    {
    }
};

/// An epilogue may have another form, in_pairs(), for policies that have sums in registers: two neighbouring columns of a
/// row at a time, the first of them even. Such a policy calls it in place of the row form if takes_pairs() says on the host that
/// it can; y is the output of the product, in 16 bits.
///
///     e.takes_pairs()                         for the layouts and memory that e was made with; rows of result() are then
///                                             whole lines of 16 bytes
///     P::more                                 results beside y, in columns n / 2 (1), n and n + 1 (2), or 2 n to 2 n + 3 (4) of
///                                             result(); or 0
///     P::has_sums                             whether e.finish(team, expert, s, sum of all that pair() returned for row s) follows
///     p.writes_y()                            whether y is to be written: the same for all of it. A policy that calls the row
///                                             form writes it in any case, so it has to have memory
///     p.begin(s)                              what is the same for all of a row
///     p.read(s, n)                            what the pair needs of memory, besides: several are read ahead of their pairs
///     p.pair(row, read, sums, y, more)        rounds or replaces y[2], sets more[P::more], returns what is to be summed. It has no
///                                             other effect: it may be called, for what is outside, with a row or read of zeros
///
/// Pairs of one row may be given by different threads; their order in the sum is fixed by the product's shape.
template <class Epilogue>
concept pairs_epilogue = requires(const Epilogue& e) {
    { e.takes_pairs() } -> std::same_as<bool>;
    { decltype(e.in_pairs())::more } -> std::convertible_to<int>;
    { decltype(e.in_pairs())::has_sums } -> std::convertible_to<bool>;
    { e.in_pairs().writes_y() } -> std::same_as<bool>;
};

/// Pairs that are rounded and nothing else.
struct rounded_pairs {
    static constexpr int more = 0;
    static constexpr bool has_sums = false;
    struct nothing {};

    FASTMOE_HOST_DEVICE static constexpr bool writes_y() noexcept { return true; }
    FASTMOE_HOST_DEVICE nothing begin(int64_t) const noexcept { return {}; }
    FASTMOE_HOST_DEVICE nothing read(int64_t, int64_t) const noexcept { return {}; }
    template <class Y, int n>
    FASTMOE_HOST_DEVICE float pair(nothing, nothing, const float (&sums)[2], Y (&y)[2], Y (&)[n]) const
    {
        y[0] = static_cast<Y>(sums[0]), y[1] = static_cast<Y>(sums[1]);
        return 0;
    }
};

/// Checks that every verb of every policy makes at its door.
namespace detail {

struct fill_one_group {
    int32_t* counts;
    int64_t* offsets;
    int64_t rows;

    FASTMOE_HOST_DEVICE void operator()(int64_t) const
    {
        counts[0] = static_cast<int32_t>(rows);
        offsets[0] = 0;
        offsets[1] = rows;
    }
};

template <class T>
void expects_memory(const weight_view<T>& w, const char* name)
{
    const bool empty = w.experts == 0 || w.out == 0 || w.in == 0;
    expects(empty || w.data || w.pointers, name, "a null pointer", "memory");
    expects(reinterpret_cast<std::uintptr_t>(w.data) % alignof(T) == 0, name, static_cast<const void*>(w.data),
            "a pointer aligned to ", alignof(T), " bytes");
    expects(reinterpret_cast<std::uintptr_t>(w.pointers) % alignof(T*) == 0, name, static_cast<const void*>(w.pointers),
            "an array of pointers, aligned as such");
}

template <class T>
void expects_weights(const weight_view<T>& w, const char* name, int64_t experts, int64_t out, int64_t in)
{
    expects(w.experts == experts, name, w.experts, experts, " experts");
    expects(w.out == out, name, w.out, out, " output features (rows of a matrix)");
    expects(w.in == in, name, w.in, in, " input features (columns of a matrix)");
    expects(w.row_stride == 1 || w.col_stride == 1, name, w.row_stride, "a row or a column stride of 1");
    expects_memory(w, name);
}

/// The same of any view that a policy reads its matrices through.
template <class Weights>
void expects_views(const Weights& w, const char* name, int64_t experts, int64_t out, int64_t in)
{
    if constexpr (requires { w.expects_views(name, experts, out, in); }) w.expects_views(name, experts, out, in);
    else expects_weights(matrices_of(w), name, experts, out, in);
}

/// Looks at the matrices' own pointers where that waits for nothing; elsewhere they are the caller's word.
template <class Executor, class T>
void expects_pointers(const weight_view<T>& w, const char* name)
{
    if constexpr (has_readable_memory<Executor>)
        for (int64_t e = 0; w.pointers && w.out > 0 && w.in > 0 && e < w.experts; ++e) {
            const auto* p = static_cast<const void*>(w.pointers[e]);
            expects(p && reinterpret_cast<std::uintptr_t>(p) % alignof(T) == 0, name, p, "memory for expert ", e,
                    ", aligned to ", alignof(T), " bytes");
        }
}

/// Throws invalid_argument if two elements of the matrices are one by their strides: for matrices that are written. Each
/// dimension has to step over all that the dimensions of smaller strides span, which any layout of nested blocks does.
template <class T>
void expects_apart(const weight_view<T>& w, const char* name)
{
    struct dimension {
        int64_t extent, stride;
    } d[] = {{w.pointers ? 1 : w.experts, w.expert_stride}, {w.out, w.row_stride}, {w.in, w.col_stride}};
    for (const dimension& each : d)
        if (each.extent == 0) return;
    for (dimension& each : d) each.stride = each.stride < 0 ? -each.stride : each.stride;
    const auto sort = [](dimension& a, dimension& b) {
        if (a.stride > b.stride) std::swap(a, b);
    };
    sort(d[0], d[1]), sort(d[1], d[2]), sort(d[0], d[1]);
    int64_t span = 1; // elements from the first to the last
    for (const dimension& each : d) {
        if (each.extent == 1) continue;
        expects(each.stride >= span, name, each.stride, "strides of matrices that do not overlap: ", span, " or more here");
        span += (each.extent - 1) * each.stride;
    }
}

template <class Executor, class T>
void expects_gradient(const weight_view<T>& dw, int64_t experts, int64_t out, int64_t in)
{
    expects_weights(dw, "dW (E,out,in)", experts, out, in);
    expects_pointers<Executor>(dw, "dW (E,out,in)");
    expects_apart(dw, "dW (E,out,in)");
}

inline void expects_groups(const row_groups& g, int64_t rows)
{
    expects_shape(g.counts, "counts (E)", g.experts());
    expects_shape(g.offsets, "offsets (E+1)", g.experts() + 1);
    expects(rows == g.slots, "rows (S,.)", rows, "S = ", g.slots, " rows");
}

/// @param rows  plain_rows or indexed_rows
template <class Rows>
void expects_rows(const Rows& rows, const char* name)
{
    expects_shape(rows.data, name, rows.data.extent(0), rows.data.extent(1));
    if constexpr (requires { rows.index; }) expects_shape(rows.index, "index of rows (S)", rows.index.extent(0));
}

/// What forward and dgrad of every policy ask; w as it multiplies.                      // x (S,in), w (E,out,in), y (S,out)
template <class Executor, class Rows, class W, class Y>
void expects_row_product(const row_groups& groups, const Rows& x, const weight_view<W>& w, const matrix_view<Y>& y)
{
    expects_groups(groups, x.extent(0));
    expects_rows(x, "rows (S,.)");
    expects_weights(w, "W (E,out,in)", groups.experts(), y.extent(1), x.extent(1));
    expects_pointers<Executor>(w, "W (E,out,in)");
    expects_shape(y, "output rows (S,.)", groups.slots, w.out);
}

/// What wgrad asks.                                                                      // dy (S,out), x (S,in), dw (E,out,in)
template <class Executor, class DyRows, class XRows, class G>
void expects_gradient_product(const row_groups& groups, const DyRows& dy, const XRows& x, const weight_view<G>& dw)
{
    expects_groups(groups, x.extent(0));
    expects(dy.extent(0) == x.extent(0), "rows of dY", dy.extent(0), "S = ", x.extent(0));
    expects_rows(dy, "rows of dY");
    expects_rows(x, "rows of X");
    expects_gradient<Executor>(dw, groups.experts(), dy.extent(1), x.extent(1));
}

} // namespace detail

/// All rows as one group: a dense product through the same verbs. Takes the two small arrays from the arena.
template <executor Executor>
row_groups one_group(Executor& ex, int64_t rows, arena& memory)
{
    expects(rows >= 0 && rows <= INT32_MAX, "rows", rows, "0 to 2^31 - 1");
    const auto counts = memory.vector<int32_t>(1);
    const auto offsets = memory.vector<int64_t>(2);
    if (!memory.measuring())
        fastmoe::for_each(ex, 1, detail::fill_one_group{counts.data_handle(), offsets.data_handle(), rows});
    return {counts, offsets, rows};
}

/// What a policy must offer for an executor: the three verbs, a workspace query for each, and what it can fuse.
///
///     g.forward(ex, groups, rows, weights, bias, y, epilogue, arena);   rows: plain_rows or indexed_rows   // (S,in)
///                                                                       bias: without memory means none    // (E,out)
///     g.dgrad(ex, groups, rows, weights, dx, epilogue, arena);       rows of dY                            // (S,out)
///     g.wgrad(ex, groups, dy_rows, x_rows, dw, mode, arena);         dw: weight_view<G>                    // (E,out,in)
///
/// Each takes its scratch from the arena and gives it back before it returns or throws (arena::scope); on a measuring
/// arena it only counts. Accumulates in accumulate_t and rounds once.
template <class G, class Executor, class T>
concept multiplies_rows = requires(const G& g, Executor& ex, row_groups groups, plain_rows<T> rows,
                                   weight_view<const T> w, matrix_view<const T> bias, matrix_view<T> y, arena& a) {
    g.forward(ex, groups, rows, w, bias, y, no_epilogue{}, a);
    g.dgrad(ex, groups, rows, w, y, no_epilogue{}, a);
};

template <class G, class Executor, class T>
concept multiplies_weight_gradients = requires(const G& g, Executor& ex, row_groups groups, plain_rows<T> rows,
                                               weight_view<accumulate_t<T>> dw, arena& a) {
    g.wgrad(ex, groups, rows, rows, dw, write_mode::overwrite, a);
};

/// gathers_rows: reads indexed_rows without a copy. fuses_epilogue: runs epilogues, or those that have pairs,
/// while what they are about is in cache or in registers.
/// needs_host_counts: reads counts and offsets on the host even where that has to wait for the executor, so it cannot be
/// captured in a graph.
template <class G>
concept states_abilities = requires {
    { G::gathers_rows } -> std::convertible_to<bool>;
    { G::fuses_epilogue } -> std::convertible_to<bool>;
    { G::needs_host_counts } -> std::convertible_to<bool>;
};

template <class G, class Executor, class T>
concept grouped_gemm = states_abilities<G> && multiplies_rows<G, Executor, T> && multiplies_weight_gradients<G, Executor, T>;

} // namespace fastmoe::inline FASTMOE_ABI
