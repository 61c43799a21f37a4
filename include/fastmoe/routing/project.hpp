// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The router's linear map, before the gate: logits = x W^T + b, summed and stored in accumulate_t whatever x is, since
/// near ties decide the routing. Forward, both backward products, and Switch's jitter of x.
#pragma once

#include <fastmoe/exec/random.hpp>
#include <fastmoe/gemm/portable.hpp>
#include <fastmoe/ops/reduce.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace verbs {
struct jitter;
}

namespace detail {

/// Rows of the input's gradient that wait in scratch to be added.
inline constexpr int64_t added_rows = 1024;

/// Adds a finished row to its place in dx, and rounds once.
template <class T>
struct add_row {
    using vectorized = void;
    matrix_view<const accumulate_t<T>> sums; // (n,D)
    matrix_view<T> dx;                       // (n,D)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t, int64_t row) const
    {
        using real = accumulate_t<T>;
        const int64_t width = dx.extent(1);
        const real* from = sums.data_handle() + row * width;
        T* to = dx.data_handle() + row * width;
        team.for_each(width, [=](int64_t d) { to[d] = T(real(to[d]) + from[d]); });
    }
};

template <class T>
struct jitter_element {
    using vectorized = void;
    const T* x; // (T,D)
    T* y;       // (T,D)
    random_source random;
    std::uint64_t first;
    accumulate_t<T> epsilon;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        using real = accumulate_t<T>;
        const real u = random.template uniform<real>(first + static_cast<std::uint64_t>(i));
        y[i] = T(real(x[i]) * (real(1) - epsilon + real(2) * epsilon * u));
    }
};

/// Scratch is asked for before anything is written: body(arena) takes its scratch and, unless measuring, does the work.
template <class Body>
void with_scratch(arena& scratch, const Body& body)
{
    if (!scratch.measuring()) {
        arena needed;
        body(needed);
        scratch.require(needed.bytes());
    }
    const int64_t mark = scratch.used();
    body(scratch);
    scratch.rewind(mark);
}

} // namespace detail

/// logits = x gate^T + bias, in accumulate_t.
/// @param x        the tokens                                                                  // (T,D)
/// @param gate     the router; may be of another type than x                                   // (E,D)
/// @param bias     without memory, or empty: none                                                        // (E)
/// @param logits   overwritten                                                                 // (T,E)
/// @param scratch  taken and given back; on a measuring arena only counted
/// @throws invalid_argument if shapes disagree, out_of_memory; nothing is written then
template <executor Executor, class T, class W, class B>
void project(Executor& ex, matrix_view<T> x, matrix_view<W> gate, vector_view<B> bias,
             type_identity_t<matrix_view<accumulate_t<std::remove_const_t<T>>>> logits, arena& scratch)
{
    const int64_t tokens = x.extent(0), experts = gate.extent(0);
    if (!scratch.measuring()) {
        expects_shape(logits, "logits (T,E)", tokens, experts);
        expects_shape(gate, "gate (E,D)", experts, x.extent(1));
        expects_shape(x, "x (T,D)", tokens, x.extent(1));
        if (pointer_or_null(bias)) expects_shape(bias, "gate bias (E)", experts);
    }
    detail::with_scratch(scratch, [&](arena& memory) {
        gemm::portable{}.forward(ex, one_group(ex, tokens, memory), plain_rows<std::remove_const_t<T>>{x}, single(gate),
                                 matrix_view<B>(pointer_or_null(bias), 1, experts), logits, no_epilogue{}, memory);
    });
}

/// dx (+)= dlogits gate.
/// @param dlogits  the gradient of the logits                                                  // (T,E)
/// @param dx       overwritten, or added to and rounded once                                   // (T,D)
/// @throws as project
template <executor Executor, class T, class W>
void project_input_backward(Executor& ex, type_identity_t<matrix_view<const accumulate_t<T>>> dlogits,
                            matrix_view<W> gate, matrix_view<T> dx, write_mode mode, arena& scratch)
{
    using real = accumulate_t<T>;
    const int64_t tokens = dx.extent(0), experts = gate.extent(0), width = dx.extent(1);
    if (!scratch.measuring()) {
        expects_shape(dx, "dx (T,D)", tokens, width);
        expects_shape(gate, "gate (E,D)", experts, width);
        expects_shape(dlogits, "dlogits (T,E)", tokens, experts);
    }
    const gemm::portable product;
    detail::with_scratch(scratch, [&](arena& memory) {
        if (mode == write_mode::overwrite) {
            product.dgrad(ex, one_group(ex, tokens, memory), plain_rows<real>{dlogits}, single(gate), dx, no_epilogue{},
                          memory);
            return;
        }
        const int64_t most = tokens < detail::added_rows ? tokens : detail::added_rows;
        const auto sums = memory.matrix<real>(most, width);
        const int64_t mark = memory.used();
        for (int64_t t = 0; t < tokens; t += most, memory.rewind(mark)) {
            const int64_t n = tokens - t < most ? tokens - t : most;
            const auto here = slice_rows(sums, 0, n);
            product.dgrad(ex, one_group(ex, n, memory), plain_rows<real>{slice_rows(dlogits, t, n)}, single(gate), here,
                          detail::add_row<T>{here, slice_rows(dx, t, n)}, memory);
        }
    });
}

/// dgate (+)= dlogits^T x,  dbias (+)= the sum of dlogits over tokens. Zeros, or nothing to add, for no tokens.
/// @param dlogits  the gradient of the logits                                                  // (T,E)
/// @param x        the tokens                                                                  // (T,D)
/// @param dgate    overwritten, or added to and rounded once                                   // (E,D)
/// @param dbias    the same; without memory: not wanted                                        // (E)
/// @throws as project
template <executor Executor, class T, class G>
void project_weights_backward(Executor& ex,
                              type_identity_t<matrix_view<const accumulate_t<std::remove_const_t<T>>>> dlogits,
                              matrix_view<T> x, matrix_view<G> dgate, type_identity_t<vector_view<G>> dbias,
                              write_mode mode, arena& scratch)
{
    using element = std::remove_const_t<T>;
    using real = accumulate_t<element>;
    const int64_t tokens = x.extent(0), experts = dgate.extent(0);
    if (!scratch.measuring()) {
        expects_shape(dgate, "dgate (E,D)", experts, x.extent(1));
        expects_shape(x, "x (T,D)", tokens, x.extent(1));
        expects_shape(dlogits, "dlogits (T,E)", tokens, experts);
        if (pointer_or_null(dbias)) expects_shape(dbias, "dbias (E)", experts);
    }
    detail::with_scratch(scratch, [&](arena& memory) {
        const row_groups all = one_group(ex, tokens, memory);
        gemm::portable{}.wgrad(ex, all, plain_rows<real>{dlogits}, plain_rows<element>{x}, single(dgate), mode, memory);
        if (!memory.measuring() && pointer_or_null(dbias))
            sum_groups(ex, plain_rows<real>{dlogits}, all.counts, all.offsets, unit_scale<real>{},
                       matrix_view<G>(dbias.data_handle(), 1, experts), mode);
    });
}

template <class Executor>
struct implementation<verbs::jitter, Executor> {
    template <class T>
    static void run(Executor& ex, int64_t n, const detail::jitter_element<T>& f)
    {
        for_each(ex, n, f);
    }
};

/// y = x * u, with u uniform on [1 - epsilon, 1 + epsilon), drawn anew for every element: what Switch (Fedus et al.
/// 2021) does to the router's input in training. The same call on the gradient of y is its backward.
/// @param random       {seed, step}, memory of the executor                                    // (2)
/// @param y            overwritten; may be x                                                   // (T,D)
/// @param first_token  the number of token 0 among all ranks' tokens: draws depend on it, not on the rank
/// @throws invalid_argument if shapes disagree or epsilon is not in [0, 1)
template <executor Executor, class T>
void jitter(Executor& ex, type_identity_t<matrix_view<const T>> x, const std::uint64_t* random, double epsilon,
            matrix_view<T> y, int64_t first_token = 0)
{
    expects(epsilon >= 0 && epsilon < 1, "epsilon", epsilon, "a number in [0, 1)");
    expects(random != nullptr, "random", "a null pointer", "seed and step");
    expects(first_token >= 0, "first_token", first_token, "zero or more");
    expects_shape(y, "y (T,D)", x.extent(0), x.extent(1));
    expects_shape(x, "x (T,D)", x.extent(0), x.extent(1));
    implementation<verbs::jitter, Executor>::run(
        ex, x.extent(0) * x.extent(1),
        detail::jitter_element<T>{x.data_handle(), y.data_handle(), {random, random_stream::jitter},
                                  static_cast<std::uint64_t>(first_token * x.extent(1)), accumulate_t<T>(epsilon)});
}

} // namespace fastmoe::inline FASTMOE_ABI
