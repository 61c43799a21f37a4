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

/// The best level of this machine.
inline instruction_set native_instruction_set() noexcept
{
#if FASTMOE_X86_DISPATCH
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx512 && __builtin_cpu_supports("avx512bf16")) return instruction_set::avx512_bf16;
    if (avx512) return instruction_set::avx512;
    if (avx2) return instruction_set::avx2;
#endif
    return instruction_set::baseline;
}

} // namespace fastmoe::inline FASTMOE_ABI
