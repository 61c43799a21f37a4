// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Which vector instructions the host has, found at run time: the consumer gives no -march flag.
#pragma once

#include <cstdint>

#include <fastmoe/core/config.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Levels that the host code is compiled for; each contains the one before.
enum class instruction_set : std::uint8_t {
    baseline,    ///< what the consumer's flags allow
    avx2,        ///< AVX2, FMA, F16C
    avx512,      ///< AVX-512 F, BW, DQ, VL
    avx512_bf16, ///< and its bfloat16 dot product
};

/// The name of a level, for messages.
constexpr const char* name_of(instruction_set level) noexcept
{
    switch (level) {
    case instruction_set::baseline: return "baseline";
    case instruction_set::avx2: return "avx2";
    case instruction_set::avx512: return "avx512";
    default: return "avx512_bf16";
    }
}

#if FASTMOE_X86_DISPATCH
namespace detail {
/// CPUID leaf 1, bit 29 of ecx: clang 14 does not know F16C by name.
inline bool has_f16c() noexcept
{
    unsigned a = 1, b, c = 0, d;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return (c >> 29 & 1u) != 0;
}
} // namespace detail
#endif

/// The best level of this machine.
inline instruction_set native_instruction_set() noexcept
{
#if FASTMOE_X86_DISPATCH
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && detail::has_f16c();
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return instruction_set::avx512_bf16;
    if (avx512) return instruction_set::avx512;
    if (avx2) return instruction_set::avx2;
#endif
    return instruction_set::baseline;
}

} // namespace fastmoe::inline FASTMOE_ABI
