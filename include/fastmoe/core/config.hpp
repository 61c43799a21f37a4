// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The few macros of the library: where a function may run, and which versioned namespace it lives in.
#pragma once

#if defined(FASTMOE_VERSION) && FASTMOE_VERSION != 100
#error "fastmoe: one file includes the headers of two versions. A program may hold two, in files of their own."
#endif
/// 10000 major + 100 minor + patch, of the headers that this file includes.
#define FASTMOE_VERSION 100

// These flags allow what would make exp() and every look at a NaN wrong, without a word. clang shows the last of them by
// no macro; math::exp forbids it there.
#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__ == 1) || defined(__ASSOCIATIVE_MATH__)
#error "fastmoe needs IEEE arithmetic: compile without -ffast-math, -Ofast, -ffinite-math-only and -fassociative-math. \
-fno-math-errno and -fno-trapping-math keep every value."
#endif

#if defined(__CUDACC__)
#define FASTMOE_HOST_DEVICE __host__ __device__
#else
/// Marks a function that every executor may call; empty for a plain C++ compiler.
#define FASTMOE_HOST_DEVICE
#endif

#if defined(__CUDA_ARCH__)
#define FASTMOE_UNROLL _Pragma("unroll")
#define FASTMOE_UNROLL_4 _Pragma("unroll 4")
#define FASTMOE_KEEP_LOOP _Pragma("unroll 1")
#else
/// Before a loop whose arrays are to live in registers of a GPU's thread, and before one whose steps are not to meet there;
/// empty elsewhere.
#define FASTMOE_UNROLL
#define FASTMOE_UNROLL_4
#define FASTMOE_KEEP_LOOP
#endif

#if !defined(FASTMOE_ABI)
/// The versioned inline namespace, so that two versions of the library can live in one program; as can files that are compiled
/// without exceptions beside those with them, whose errors are another thing.
#if defined(__cpp_exceptions)
#define FASTMOE_ABI v0_1
#else
#define FASTMOE_ABI v0_1_without_exceptions
#endif
#endif

#if !defined(FASTMOE_X86_DISPATCH)
#if defined(__GNUC__) && (defined(__x86_64__) || defined(__i386__)) && !defined(__CUDA_ARCH__)
/// 1 where x86 instruction sets beyond the consumer's flags can be chosen at run time. Defined as 0 from outside, in all
/// files of a program, it leaves nothing but what the consumer's flags allow.
#define FASTMOE_X86_DISPATCH 1
#else
#define FASTMOE_X86_DISPATCH 0
#endif
#endif
