// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The router's linear map, before the gate: logits = x W^T + b, summed and stored in accumulate_t whatever x is, since
/// near ties decide the routing. Forward, both backward products, and Switch's jitter of x.
#pragma once

#include <fastmoe/exec/random.hpp>
#include <fastmoe/exec/scratch.hpp>
#include <fastmoe/gemm/portable.hpp>
#include <fastmoe/ops/reduce.hpp>
#include <fastmoe/routing/project_few.hpp>
#include <fastmoe/routing/project_parts.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace verbs {
struct jitter;
}

namespace detail {

/// Rows of the input's gradient that wait in scratch to be rounded. Each time costs a few launches where blocks multiply: there
/// they are whole tiles of as many as stay in the cache of a large GPU.
inline constexpr int64_t waiting_rows = 1024, waiting_bytes = int64_t{32} << 20;

template <class Real>
constexpr int64_t waiting_rows_on_blocks(int64_t width) noexcept
{
    const int64_t rows = waiting_bytes / static_cast<int64_t>(sizeof(Real)) / (width > 0 ? width : 1) / 128 * 128;
    return rows > waiting_rows ? rows : waiting_rows;
}

/// index[t] = t, or -1 where a row of dlogits is all zero: of a token that chose nothing. So products leave its x out,
/// which may hold anything: 0 * NaN is NaN.
template <class Real>
struct number_chosen {
    using vectorized = void;
    matrix_view<const Real> dlogits; // (T,E)
    int32_t* index;                  // (T)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        const int64_t experts = dlogits.extent(1);
        const Real* row = dlogits.data_handle() + t * experts;
        const int32_t any = team.reduce(
            experts, int32_t{0}, [](int32_t a, int32_t b) { return a | b; },
            [=](int64_t e) { return static_cast<int32_t>(row[e] != Real(0)); });
        if (team.lane() == 0) index[t] = any != 0 ? static_cast<int32_t>(t) : -1;
    }
};

/// Hands each token its row of sums, or null if it chose nothing.
template <class Real, class Finish>
struct finish_rows {
    using vectorized = void;
    matrix_view<const Real> sums;     // (n,D)
    vector_view<const int32_t> index; // (n)
    int64_t first;                    // token
    Finish finish;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t row) const
    {
        finish(team, first + row, index(row) < 0 ? nullptr : sums.data_handle() + row * sums.extent(1));
    }
};

/// dx += sums, rounded once.
template <class T>
struct add_sums {
    matrix_view<T> dx; // (T,D)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t, const accumulate_t<T>* sums) const
    {
        using real = accumulate_t<T>;
        if (!sums) return;
        T* to = dx.data_handle() + t * dx.extent(1);
        team.for_each(dx.extent(1), [=](int64_t d) { to[d] = T(real(to[d]) + sums[d]); });
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

/// Takes room for the numbers of the tokens that chose something, and finds them.                          // (T)
template <class Executor, class Real>
vector_view<const int32_t> chosen_rows(Executor& ex, matrix_view<const Real> dlogits, arena& memory)
{
    const auto index = memory.vector<int32_t>(dlogits.extent(0));
    if (!memory.measuring())
        fastmoe::for_each_row(ex, dlogits.extent(0), number_chosen<Real>{dlogits, index.data_handle()},
                              {.width = dlogits.extent(1)});
    return index;
}

/// project_rows_backward for rows of dlogits, or of their pieces, and the gate that belongs to them.
template <class Real, class Executor, class Dy, class W, class Finish>
void finish_products(Executor& ex, const indexed_rows<Dy>& d, matrix_view<W> gate, int64_t most, const Finish& finish,
                     arena& memory)
{
    const int64_t tokens = d.index.extent(0), width = gate.extent(1);
    if (tokens < most) most = tokens;
    const auto waiting = memory.matrix<Real>(most, width);
    const row_groups whole = one_group(ex, most, memory), last = one_group(ex, most > 0 ? tokens % most : 0, memory);
    for (int64_t t = 0; t < tokens; t += most) {
        const int64_t n = tokens - t < most ? tokens - t : most;
        const auto sums = slice_rows(waiting, 0, n);
        const auto here = slice(d.index, t, n);
        gemm::portable{}.dgrad(ex, n == most ? whole : last, indexed_rows<Dy>{d.data, here}, single(gate), sums,
                               no_epilogue{}, memory);
        if (memory.measuring()) return; // no later block takes more
        fastmoe::for_each_row(ex, n, finish_rows<Real, Finish>{sums, here, t, finish}, {.width = width});
    }
}

/// finish(team, t, sums) for every token: sums is row t of dlogits gate, not rounded, or null if that row of dlogits is all
/// zero. So what else belongs to the row can be added before it is rounded, without a matrix of sums.
template <class Executor, class Real, class W, class Finish>
void project_rows_backward(Executor& ex, matrix_view<const Real> dlogits, matrix_view<W> gate, const Finish& finish,
                           arena& memory)
{
    const int64_t tokens = dlogits.extent(0);
    if constexpr (runs_blocks<Executor>)
        if (always_runs_blocks<Executor> || ex.has_blocks()) {
            const int64_t most = waiting_rows_on_blocks<Real>(gate.extent(1));
            if constexpr (in_pieces<Real, W>) {
                const auto pieces = cut_rows(ex, dlogits, tokens, gate.extent(0), memory);
                return finish_products<Real>(ex, pieces, stacked_gate(ex, gate, memory), most, finish, memory);
            } else {
                const indexed_rows<Real> rows{dlogits, chosen_rows(ex, dlogits, memory)};
                return finish_products<Real>(ex, rows, gate, most, finish, memory);
            }
        }
    if constexpr (!always_runs_blocks<Executor>) {
        const indexed_rows<Real> rows{dlogits, chosen_rows(ex, dlogits, memory)};
        finish_products<Real>(ex, rows, gate, waiting_rows, finish, memory);
    }
}

/// dx = dlogits gate, rounded where it is stored.
template <class Executor, class Real, class W, class T>
void project_input(Executor& ex, matrix_view<const Real> dlogits, matrix_view<W> gate, matrix_view<T> dx, arena& memory)
{
    const row_groups all = one_group(ex, dx.extent(0), memory);
    if constexpr (runs_blocks<Executor> && in_pieces<Real, W>)
        if (always_runs_blocks<Executor> || ex.has_blocks()) {
            const auto pieces = cut_rows(ex, dlogits, dx.extent(0), gate.extent(0), memory);
            return gemm::portable{}.dgrad(ex, all, pieces, single(stacked_gate(ex, gate, memory)), dx, no_epilogue{}, memory);
        }
    if constexpr (!in_pieces<Real, W> || !always_runs_blocks<Executor>)
        gemm::portable{}.dgrad(ex, all, plain_rows<Real>{dlogits}, single(gate), dx, no_epilogue{}, memory);
}

/// project_weights_backward where blocks multiply. Its scratch does not depend on the mode.
template <class Executor, class Real, class T, class G>
void project_weights_on_blocks(Executor& ex, matrix_view<const Real> dlogits, matrix_view<T> x, matrix_view<G> dgate,
                               vector_view<G> dbias, write_mode mode, arena& memory)
{
    using element = std::remove_const_t<T>;
    const int64_t tokens = x.extent(0), experts = dgate.extent(0);
    if (!memory.measuring() && tokens == 0 && mode == write_mode::accumulate) return;
    if constexpr (in_pieces<Real, T>) {
        const auto pieces = cut_rows(ex, dlogits, tokens, experts, memory);
        project_weights_in_parts(ex, pieces, indexed_rows<element>{x, pieces.index}, dgate, mode, memory);
    } else {
        const auto index = chosen_rows(ex, dlogits, memory);
        project_weights_in_parts(ex, indexed_rows<Real>{dlogits, index}, indexed_rows<element>{x, index}, dgate, mode, memory);
    }
    project_bias_in_parts(ex, dlogits, tokens, experts, dbias, mode, memory);
}

} // namespace detail

/// logits = x gate^T + bias, in accumulate_t.
/// @param x        the tokens                                                                  // (T,D)
/// @param gate     the router; may be of another type than x                                   // (E,D)
/// @param bias     without memory, or empty: none                                                        // (E)
/// @param logits   overwritten                                                                 // (T,E)
/// @param scratch  taken and given back; on a measuring arena only counted. Where blocks multiply, few tokens need none, and
///                 the order of their sums, so their last bits, is another than that of more tokens
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
    if constexpr (runs_blocks<Executor>)
        if (detail::few.holds(tokens, experts) && (always_runs_blocks<Executor> || ex.has_blocks())) {
            if (!scratch.measuring()) detail::project_few(ex, x, gate, pointer_or_null(bias), logits);
            return;
        }
    detail::with_scratch(scratch, [&](arena& memory) {
        gemm::portable{}.forward(ex, one_group(ex, tokens, memory), plain_rows<std::remove_const_t<T>>{x}, single(gate),
                                 matrix_view<B>(pointer_or_null(bias), 1, experts), logits, no_epilogue{}, memory);
    });
}

/// dx (+)= dlogits gate. Nothing is added for a token whose row of dlogits is all zero, whatever stands in the gate.
/// Where blocks multiply, a bfloat16 gate meets dlogits in tensor cores, in pieces that lose nothing (project_pieces.hpp).
/// @param dlogits  the gradient of the logits                                                  // (T,E)
/// @param dx       overwritten, or added to and rounded once                                   // (T,D)
/// @throws as project
template <executor Executor, class T, class W>
void project_input_backward(Executor& ex, type_identity_t<matrix_view<const accumulate_t<T>>> dlogits,
                            matrix_view<W> gate, matrix_view<T> dx, write_mode mode, arena& scratch)
{
    const int64_t tokens = dx.extent(0), experts = gate.extent(0), width = dx.extent(1);
    if (!scratch.measuring()) {
        expects_shape(dx, "dx (T,D)", tokens, width);
        expects_shape(gate, "gate (E,D)", experts, width);
        expects_shape(dlogits, "dlogits (T,E)", tokens, experts);
    }
    detail::with_scratch(scratch, [&](arena& memory) {
        if (mode == write_mode::overwrite) detail::project_input(ex, dlogits, gate, dx, memory);
        else detail::project_rows_backward(ex, dlogits, gate, detail::add_sums<T>{dx}, memory);
    });
}

/// dgate (+)= dlogits^T x,  dbias (+)= the sum of dlogits over tokens. Zeros, or nothing to add, for no tokens. Where a row
/// of dlogits is all zero, as it is for a padding token, its x is not read: it may hold NaN. Where blocks multiply, tokens are
/// summed in parts (project_parts.hpp), and bfloat16 tokens as project_input_backward says of the gate.
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
        if constexpr (runs_blocks<Executor>)
            if (always_runs_blocks<Executor> || ex.has_blocks())
                return detail::project_weights_on_blocks(ex, dlogits, x, dgate, dbias, mode, memory);
        if constexpr (!always_runs_blocks<Executor>) {
            const row_groups all = one_group(ex, tokens, memory);
            const auto index = detail::chosen_rows(ex, dlogits, memory);
            gemm::portable{}.wgrad(ex, all, indexed_rows<real>{dlogits, index}, indexed_rows<element>{x, index}, single(dgate),
                                   mode, memory);
            if (!memory.measuring() && pointer_or_null(dbias))
                sum_groups(ex, plain_rows<real>{dlogits}, all.counts, all.offsets, unit_scale<real>{},
                           matrix_view<G>(dbias.data_handle(), 1, experts), mode);
        }
    });
}

template <class Executor>
struct implementation<verbs::jitter, Executor> {
    template <class T>
    static void run(Executor& ex, int64_t n, const detail::jitter_element<T>& f)
    {
        fastmoe::for_each(ex, n, f);
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
