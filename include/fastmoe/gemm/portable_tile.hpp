// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The innermost loop of the portable GEMM on the host: six rows times up to four vectors of lanes, all sums in
/// registers, for each instruction set.
#pragma once

#include <type_traits>
#include <utility>

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/exec/instruction_set.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::portable {

constexpr int64_t ceil_div(int64_t a, int64_t b) noexcept { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) noexcept { return ceil_div(a, b) * b; }
constexpr int64_t least(int64_t a, int64_t b) noexcept { return a < b ? a : b; }

/// Two neighbours along the reduction, as the bfloat16 dot product takes them.
struct bfloat16_pair {
    bfloat16 first, second;
};

/// What a product is made of: a float, a double, or a pair of bfloat16 (32 bits). Sums are kept in total_t.
template <class Unit>
using total_t = std::conditional_t<std::is_same_v<Unit, double>, double, float>;

/// Elements along the reduction in a unit.
template <class Unit>
inline constexpr int64_t unit_elements = std::is_same_v<Unit, bfloat16_pair> ? 2 : 1;

inline constexpr int64_t tile_rows = 6;    ///< scalars that a tile multiplies each vector with
inline constexpr int64_t tile_vectors = 4; ///< vectors of 64 bytes in a full tile
template <class Unit>
inline constexpr int64_t vector_lanes = 64 / static_cast<int64_t>(sizeof(Unit));
/// Lanes of a full panel.
template <class Unit>
inline constexpr int64_t panel_lanes = tile_vectors * vector_lanes<Unit>;

/// Memory that a tile asks for while it computes: two lines each step of its depth.
struct prefetch_lines {
    const char* first = nullptr; ///< where the lines of step 0 lie; null: nothing is asked for
    int64_t step = 0;            ///< bytes from a step to the next
    int64_t second = 0;          ///< bytes from the first line of a step to the second
};

/// total(j, l) += sum over k of row(j)[k] * panel[k * vectors * lanes + l], k in order; or = where it is fresh.
template <class Unit>
struct tile {
    const Unit* panel = nullptr;           ///< 64-byte aligned                              // (depth, vectors * lanes)
    const Unit* row[tile_rows] = {};       ///< anywhere; contiguous along the reduction     // (depth) each
    int64_t depth = 0;                     ///< units to sum over
    int64_t vectors = 0;                   ///< 1 to 4
    total_t<Unit>* total = nullptr;        ///< anywhere                                     // (tile_rows, vectors * lanes)
    int64_t total_step = 0;                ///< elements from a row of totals to the next
    prefetch_lines ahead;                  ///< asked for meanwhile
    bool fresh = false;                    ///< totals are not read
    bool stream = false;                   ///< totals are fresh, aligned to 64 bytes, and better not kept in caches
};

template <class Unit>
using tile_function = void (*)(const tile<Unit>&);

template <int Count>
using indices = std::make_integer_sequence<int, Count>;

/// The sums of `Bytes` wide vectors v in [0, Count / tile_rows), starting `at` elements into the panel. Accumulator number
/// I is row I / (Count / tile_rows), vector I % (Count / tile_rows); the packs keep each in a register of its own.
template <class Real, int... Index>
inline void tile_baseline(const tile<Real>& t, int64_t at, std::integer_sequence<int, Index...>)
{
    typedef Real vector __attribute__((vector_size(16), may_alias));
    typedef Real loose __attribute__((vector_size(16), may_alias, aligned(sizeof(Real))));
    constexpr int wide = static_cast<int>(sizeof...(Index) / tile_rows), lanes = 16 / sizeof(Real);
    Real* const total = t.total + at;
    const int64_t step = t.total_step, width = t.vectors * vector_lanes<Real>;
    vector sum[] = {vector{} + Real(0 * Index)...};
    if (!t.fresh) ((sum[Index] = *reinterpret_cast<const loose*>(total + Index / wide * step + Index % wide * lanes)), ...);
    const Real* panel = t.panel + at;
    const Real *r0 = t.row[0], *r1 = t.row[1], *r2 = t.row[2], *r3 = t.row[3], *r4 = t.row[4], *r5 = t.row[5];
    for (int64_t k = 0; k < t.depth; ++k, panel += width) {
        const Real scalar[] = {r0[k], r1[k], r2[k], r3[k], r4[k], r5[k]};
        ((sum[Index] += *reinterpret_cast<const vector*>(panel + Index % wide * lanes) * scalar[Index / wide]), ...);
    }
    ((*reinterpret_cast<loose*>(total + Index / wide * step + Index % wide * lanes) = sum[Index]), ...);
}

template <class Real>
void run_tile_baseline(const tile<Real>& t)
{
    constexpr int64_t part = 32 / sizeof(Real);
    for (int64_t at = 0; at < t.vectors * vector_lanes<Real>; at += part) tile_baseline<Real>(t, at, indices<2 * tile_rows>{});
}

#if FASTMOE_X86_DISPATCH
// The same text again: a vector type wider than the target of the function that names it would be taken apart before
// inlining, so the bodies cannot be shared.
template <class Real, int... Index>
[[gnu::target("avx2,fma")]] inline void tile_avx2(const tile<Real>& t, int64_t at, std::integer_sequence<int, Index...>)
{
    typedef Real vector __attribute__((vector_size(32), may_alias));
    typedef Real loose __attribute__((vector_size(32), may_alias, aligned(sizeof(Real))));
    constexpr int wide = static_cast<int>(sizeof...(Index) / tile_rows), lanes = 32 / sizeof(Real);
    Real* const total = t.total + at;
    const int64_t step = t.total_step, width = t.vectors * vector_lanes<Real>;
    vector sum[] = {vector{} + Real(0 * Index)...};
    if (!t.fresh) ((sum[Index] = *reinterpret_cast<const loose*>(total + Index / wide * step + Index % wide * lanes)), ...);
    const Real* panel = t.panel + at;
    const Real *r0 = t.row[0], *r1 = t.row[1], *r2 = t.row[2], *r3 = t.row[3], *r4 = t.row[4], *r5 = t.row[5];
    for (int64_t k = 0; k < t.depth; ++k, panel += width) {
        const Real scalar[] = {r0[k], r1[k], r2[k], r3[k], r4[k], r5[k]};
        ((sum[Index] += *reinterpret_cast<const vector*>(panel + Index % wide * lanes) * scalar[Index / wide]), ...);
    }
    ((*reinterpret_cast<loose*>(total + Index / wide * step + Index % wide * lanes) = sum[Index]), ...);
}

template <class Real>
void run_tile_avx2(const tile<Real>& t)
{
    constexpr int64_t part = 64 / sizeof(Real);
    for (int64_t at = 0; at < t.vectors * vector_lanes<Real>; at += part) tile_avx2<Real>(t, at, indices<2 * tile_rows>{});
}

/// A whole line to memory, which is not read first. Other threads see it after an sfence.
template <class Vector>
[[gnu::target("avx512f"), gnu::always_inline]] inline void stream_line(void* to, const Vector& line)
{
    __asm__("vmovntps %1, %0" : "=m"(*static_cast<Vector*>(to)) : "v"(line));
}

template <class Real, int... Index>
[[gnu::target("avx512f")]] inline void tile_avx512(const tile<Real>& t, std::integer_sequence<int, Index...>)
{
    typedef Real vector __attribute__((vector_size(64), may_alias));
    typedef Real loose __attribute__((vector_size(64), may_alias, aligned(sizeof(Real))));
    constexpr int wide = static_cast<int>(sizeof...(Index) / tile_rows), lanes = 64 / sizeof(Real);
    Real* const total = t.total;
    const int64_t step = t.total_step;
    vector sum[] = {vector{} + Real(0 * Index)...};
    if (!t.fresh) ((sum[Index] = *reinterpret_cast<const loose*>(total + Index / wide * step + Index % wide * lanes)), ...);
    const Real* panel = t.panel;
    const Real *r0 = t.row[0], *r1 = t.row[1], *r2 = t.row[2], *r3 = t.row[3], *r4 = t.row[4], *r5 = t.row[5];
    const char* ahead = t.ahead.first ? t.ahead.first : reinterpret_cast<const char*>(panel);
    for (int64_t k = 0; k < t.depth; ++k, panel += wide * lanes, ahead += t.ahead.step) {
        __builtin_prefetch(ahead, 0, 2);
        __builtin_prefetch(ahead + t.ahead.second, 0, 2);
        const Real scalar[] = {r0[k], r1[k], r2[k], r3[k], r4[k], r5[k]};
        ((sum[Index] += *reinterpret_cast<const vector*>(panel + Index % wide * lanes) * scalar[Index / wide]), ...);
    }
    if (t.stream) (stream_line(total + Index / wide * step + Index % wide * lanes, sum[Index]), ...);
    else ((*reinterpret_cast<loose*>(total + Index / wide * step + Index % wide * lanes) = sum[Index]), ...);
}

template <class Real, int Vectors>
void run_tile_avx512(const tile<Real>& t)
{
    tile_avx512<Real>(t, indices<Vectors * tile_rows>{});
}

// The dot product has no portable spelling: the compilers' builtins differ in their types.
#define FASTMOE_AVX512_BF16 "avx512f,avx512bf16"
typedef float float_x16 __attribute__((vector_size(64), may_alias));

[[gnu::target(FASTMOE_AVX512_BF16), gnu::always_inline]] inline void add_dots(float_x16& sum, const float_x16& pairs,
                                                                              const float_x16& scalar)
{
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(pairs), "v"(scalar));
}

[[gnu::target(FASTMOE_AVX512_BF16), gnu::always_inline]] inline void add_dots(float_x16& sum, const float_x16& pairs,
                                                                              const bfloat16_pair& scalar)
{
    __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(pairs), "m"(scalar));
}

[[gnu::target(FASTMOE_AVX512_BF16), gnu::always_inline]] inline void broadcast(float_x16& out, const bfloat16_pair& scalar)
{
    __asm__("vbroadcastss %1, %0" : "=v"(out) : "m"(scalar));
}

template <int... Index>
[[gnu::target(FASTMOE_AVX512_BF16)]] inline void tile_dots(const tile<bfloat16_pair>& t, std::integer_sequence<int, Index...>)
{
    constexpr int wide = static_cast<int>(sizeof...(Index) / tile_rows), lanes = 16;
    float* const total = t.total;
    const int64_t step = t.total_step;
    typedef float loose __attribute__((vector_size(64), may_alias, aligned(sizeof(float))));
    float_x16 sum[] = {float_x16{} + float(0 * Index)...};
    if (!t.fresh) ((sum[Index] = *reinterpret_cast<const loose*>(total + Index / wide * step + Index % wide * lanes)), ...);
    const bfloat16_pair* panel = t.panel;
    const bfloat16_pair *r0 = t.row[0], *r1 = t.row[1], *r2 = t.row[2], *r3 = t.row[3], *r4 = t.row[4], *r5 = t.row[5];
    const char* ahead = t.ahead.first ? t.ahead.first : reinterpret_cast<const char*>(panel);
    for (int64_t k = 0; k < t.depth; ++k, panel += wide * lanes, ahead += t.ahead.step) {
        __builtin_prefetch(ahead, 0, 2);
        __builtin_prefetch(ahead + t.ahead.second, 0, 2);
        const bfloat16_pair* const scalar[] = {r0 + k, r1 + k, r2 + k, r3 + k, r4 + k, r5 + k};
        const auto pairs = [panel](int v) { return reinterpret_cast<const float_x16*>(panel + v * lanes); };
        if constexpr (wide == 1) {
            (add_dots(sum[Index], *pairs(0), *scalar[Index]), ...);
        } else {
            float_x16 all = {};
            (((Index % wide == 0 ? broadcast(all, *scalar[Index / wide]) : void()), add_dots(sum[Index], *pairs(Index % wide), all)), ...);
        }
    }
    if (t.stream) (stream_line(total + Index / wide * step + Index % wide * lanes, sum[Index]), ...);
    else ((*reinterpret_cast<loose*>(total + Index / wide * step + Index % wide * lanes) = sum[Index]), ...);
}
#undef FASTMOE_AVX512_BF16

template <int Vectors>
void run_tile_dots(const tile<bfloat16_pair>& t)
{
    tile_dots(t, indices<Vectors * tile_rows>{});
}
#endif

/// Makes what streamed tiles wrote visible to threads that this one tells of it.
inline void fence_streams() noexcept
{
#if FASTMOE_X86_DISPATCH
    __asm__ volatile("sfence" ::: "memory");
#endif
}

/// The function for a level and a number of vectors. Pairs need avx512_bf16, and so a build that dispatches.
template <class Unit>
tile_function<Unit> best_tile([[maybe_unused]] instruction_set level, [[maybe_unused]] int64_t vectors) noexcept
{
#if FASTMOE_X86_DISPATCH
    if constexpr (std::is_same_v<Unit, bfloat16_pair>) {
        constexpr tile_function<Unit> all[] = {run_tile_dots<1>, run_tile_dots<2>, run_tile_dots<3>, run_tile_dots<4>};
        return all[vectors - 1];
    } else {
        constexpr tile_function<Unit> all[] = {run_tile_avx512<Unit, 1>, run_tile_avx512<Unit, 2>, run_tile_avx512<Unit, 3>,
                                               run_tile_avx512<Unit, 4>};
        if (level >= instruction_set::avx512) return all[vectors - 1];
        return level >= instruction_set::avx2 ? run_tile_avx2<Unit> : run_tile_baseline<Unit>;
    }
#else
    return run_tile_baseline<Unit>;
#endif
}

} // namespace fastmoe::inline FASTMOE_ABI::detail::portable
