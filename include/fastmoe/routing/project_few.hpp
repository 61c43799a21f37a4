// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Logits of few tokens, as in a step of decoding, where blocks multiply: one launch of teams that each sum over the width for
/// a few logits, instead of a few tiles that go through all of it alone. The order of sums is another than that of tiles, the
/// same for one shape on every run. Part of project.hpp.
#pragma once

#include <cstring>

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/exec/executor.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// Where tokens are few: then teams read the gate once for each token_group, and tiles would be nearly empty.
struct few_tokens {
    int64_t tokens = 32;
    int64_t logits = 8192;

    constexpr bool holds(int64_t t, int64_t experts) const noexcept { return t <= tokens && t * experts <= logits; }
};
inline constexpr few_tokens few;

/// Elements [at, at + n) of a row, zeros from `end` on: in accesses of 16 bytes where they lie on them.
template <int n, class T, class Real>
FASTMOE_HOST_DEVICE void read_piece(const T* row, int64_t at, int64_t end, Real (&to)[n])
{
    static_assert(n * sizeof(T) % 16 == 0);
    const T* from = row + at;
    if (at + n <= end && reinterpret_cast<std::uintptr_t>(from) % 16 == 0) {
        alignas(16) T values[n];
        std::memcpy(static_cast<void*>(values), __builtin_assume_aligned(from, 16), sizeof values);
        FASTMOE_UNROLL
        for (int i = 0; i < n; ++i) to[i] = static_cast<Real>(values[i]);
    } else {
        FASTMOE_UNROLL
        for (int i = 0; i < n; ++i) to[i] = at + i < end ? static_cast<Real>(from[i]) : Real(0);
    }
}

/// A team's logits: of `tokens` tokens and `experts` experts, which are neighbours.
template <int tokens, int experts, class Real, class T, class W, class B>
struct few_logits {
    static constexpr int piece = 16 / static_cast<int>(sizeof(T) < sizeof(W) ? sizeof(T) : sizeof(W));
    matrix_view<const T> x;    // (T,D)
    matrix_view<const W> gate; // (E,D)
    const B* bias;             // (E), or null
    matrix_view<Real> logits;  // (T,E)

    struct dots {
        Real of[tokens][experts];
    };

    int64_t teams() const noexcept { return groups() * ((gate.extent(0) + experts - 1) / experts); }

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t number) const
    {
        const int64_t width = gate.extent(1), t0 = number % groups() * tokens, e0 = number / groups() * experts;
        const T* rows[tokens];
        const W* columns[experts];
        FASTMOE_UNROLL
        for (int t = 0; t < tokens; ++t) rows[t] = x.data_handle() + (t0 + t < x.extent(0) ? t0 + t : t0) * width;
        FASTMOE_UNROLL
        for (int e = 0; e < experts; ++e) columns[e] = gate.data_handle() + (e0 + e < gate.extent(0) ? e0 + e : e0) * width;
        const dots sums = team.reduce((width + piece - 1) / piece, dots{}, add, [=](int64_t i) {
            dots out{};
            Real w[experts][piece];
            FASTMOE_UNROLL
            for (int e = 0; e < experts; ++e) read_piece(columns[e], i * piece, width, w[e]);
            FASTMOE_UNROLL
            for (int t = 0; t < tokens; ++t) {
                Real values[piece];
                read_piece(rows[t], i * piece, width, values);
                FASTMOE_UNROLL
                for (int e = 0; e < experts; ++e)
                    FASTMOE_UNROLL
                    for (int j = 0; j < piece; ++j) out.of[t][e] += values[j] * w[e][j];
            }
            return out;
        });
        if (team.lane() != 0) return;
        FASTMOE_UNROLL
        for (int t = 0; t < tokens; ++t)
            FASTMOE_UNROLL
            for (int e = 0; e < experts; ++e)
                if (t0 + t < x.extent(0) && e0 + e < gate.extent(0))
                    logits(t0 + t, e0 + e) = sums.of[t][e] + (bias ? static_cast<Real>(bias[e0 + e]) : Real(0));
    }

private:
    FASTMOE_HOST_DEVICE int64_t groups() const noexcept { return (x.extent(0) + tokens - 1) / tokens; }
    static FASTMOE_HOST_DEVICE dots add(const dots& a, const dots& b)
    {
        dots out;
        FASTMOE_UNROLL
        for (int t = 0; t < tokens; ++t)
            FASTMOE_UNROLL
            for (int e = 0; e < experts; ++e) out.of[t][e] = a.of[t][e] + b.of[t][e];
        return out;
    }
};

/// logits = x gate^T + bias, as project documents it, in one launch.
template <class Executor, class AnyT, class AnyW, class AnyB, class Real>
void project_few(Executor& ex, matrix_view<AnyT> x, matrix_view<AnyW> gate, AnyB* bias, matrix_view<Real> logits)
{
    using T = std::remove_const_t<AnyT>;
    using W = std::remove_const_t<AnyW>;
    using B = std::remove_const_t<AnyB>;
    const auto launch = [&](const auto& f) { fastmoe::for_each_row(ex, f.teams(), f, {.width = gate.extent(1)}); };
    constexpr int together = 16 / static_cast<int>(sizeof(Real)); // a team hands over 32 bytes
    if (x.extent(0) == 1) launch(few_logits<1, 1, Real, T, W, B>{x, gate, bias, logits});
    else launch(few_logits<together, 2, Real, T, W, B>{x, gate, bias, logits});
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
