// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Flags that give up IEEE arithmetic are refused by every header: with them exp(1) was 2.
// flags: -Ofast
// flags: -ffast-math
// flags: -ffinite-math-only
// expect: fastmoe needs IEEE arithmetic
// expect: -fno-math-errno
#include <fastmoe/core/math.hpp>

#if defined(CORRECT)
// What is right is the same text without those flags.
static_assert(fastmoe::math::exp(0.0f) == 1.0f);
#endif
