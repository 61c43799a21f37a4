// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// wgmma of elements of 16 and of 8 bits: one instruction a size, as the registers of its sums have to be named one by one. Part of
/// cuda_cluster.cuh.
#pragma once

#include <cstdint>

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/core/float8.hpp>
#include <fastmoe/exec/cluster.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI {

/// C (64,n) += A (64,k) B (n,k)^T, or = if it does not add; k is 32 bytes of elements. transposed: 1 where an operand lies wide.
template <class T, int n, int transposed_a, int transposed_b>
struct warpgroup_product;

// Registers %0 to %7, and so on; sums from c[at] on.
#define FASTMOE_NAMES_0 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define FASTMOE_NAMES_1 "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define FASTMOE_NAMES_2 "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define FASTMOE_NAMES_3 "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define FASTMOE_NAMES_4 "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"
#define FASTMOE_NAMES_5 "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define FASTMOE_NAMES_6 "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111"
#define FASTMOE_NAMES_7 "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define FASTMOE_SUMS_8(at) \
    "+f"(c[at]), "+f"(c[at + 1]), "+f"(c[at + 2]), "+f"(c[at + 3]), "+f"(c[at + 4]), "+f"(c[at + 5]), "+f"(c[at + 6]), "+f"(c[at + 7])
#define FASTMOE_SUMS_16(at) FASTMOE_SUMS_8(at), FASTMOE_SUMS_8(at + 8)
#define FASTMOE_SUMS_32(at) FASTMOE_SUMS_16(at), FASTMOE_SUMS_16(at + 16)
#define FASTMOE_SUMS_64(at) FASTMOE_SUMS_32(at), FASTMOE_SUMS_32(at + 32)
#define FASTMOE_SUMS_96(at) FASTMOE_SUMS_64(at), FASTMOE_SUMS_32(at + 64)
#define FASTMOE_SUMS_128(at) FASTMOE_SUMS_64(at), FASTMOE_SUMS_64(at + 64)
#define FASTMOE_PRODUCT(element, type, n, k, names, registers, operands, turned, ...)                                                 \
    template <int transposed_a, int transposed_b>                                                                                     \
    struct warpgroup_product<element, n, transposed_a, transposed_b> {                                                                \
        template <bool adds>                                                                                                          \
        static __device__ void run(float (&c)[n / 2], std::uint64_t a, std::uint64_t b)                                               \
        {                                                                                                                             \
            if constexpr (adds)                                                                                                       \
                asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k" #k ".f32." type "." type " {" names "}, " operands ", 1, 1, 1" turned ";" \
                             : registers(0)                                                                                           \
                             : "l"(a), "l"(b) __VA_OPT__(, ) __VA_ARGS__);                                                            \
            else                                                                                                                      \
                asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k" #k ".f32." type "." type " {" names "}, " operands ", 0, 1, 1" turned ";" \
                             : registers(0)                                                                                           \
                             : "l"(a), "l"(b) __VA_OPT__(, ) __VA_ARGS__);                                                            \
        }                                                                                                                             \
    };
#define FASTMOE_PRODUCTS(n, names, registers, from_a, from_b, turned_a, turned_b)                                                     \
    FASTMOE_PRODUCT(bfloat16, "bf16", n, 16, names, registers, from_a ", " from_b, ", " turned_a ", " turned_b, "n"(transposed_a), "n"(transposed_b)) \
    FASTMOE_PRODUCT(half, "f16", n, 16, names, registers, from_a ", " from_b, ", " turned_a ", " turned_b, "n"(transposed_a), "n"(transposed_b))      \
    FASTMOE_PRODUCT(float8_e4m3, "e4m3", n, 32, names, registers, from_a ", " from_b, "")

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
FASTMOE_PRODUCTS(16, "%0, %1, %2, %3, %4, %5, %6, %7", FASTMOE_SUMS_8, "%8", "%9", "%10", "%11")
FASTMOE_PRODUCTS(32, FASTMOE_NAMES_0, FASTMOE_SUMS_16, "%16", "%17", "%18", "%19")
FASTMOE_PRODUCTS(64, FASTMOE_NAMES_0 ", " FASTMOE_NAMES_1, FASTMOE_SUMS_32, "%32", "%33", "%34", "%35")
FASTMOE_PRODUCTS(128, FASTMOE_NAMES_0 ", " FASTMOE_NAMES_1 ", " FASTMOE_NAMES_2 ", " FASTMOE_NAMES_3, FASTMOE_SUMS_64, "%64", "%65", "%66", "%67")
FASTMOE_PRODUCTS(192, FASTMOE_NAMES_0 ", " FASTMOE_NAMES_1 ", " FASTMOE_NAMES_2 ", " FASTMOE_NAMES_3 ", " FASTMOE_NAMES_4 ", " FASTMOE_NAMES_5, FASTMOE_SUMS_96, "%96", "%97", "%98", "%99")
FASTMOE_PRODUCTS(256, FASTMOE_NAMES_0 ", " FASTMOE_NAMES_1 ", " FASTMOE_NAMES_2 ", " FASTMOE_NAMES_3 ", " FASTMOE_NAMES_4 ", " FASTMOE_NAMES_5 ", " FASTMOE_NAMES_6 ", " FASTMOE_NAMES_7, FASTMOE_SUMS_128, "%128", "%129", "%130", "%131")
#endif

#undef FASTMOE_PRODUCTS
#undef FASTMOE_PRODUCT
#undef FASTMOE_SUMS_128
#undef FASTMOE_SUMS_96
#undef FASTMOE_SUMS_64
#undef FASTMOE_SUMS_32
#undef FASTMOE_SUMS_16
#undef FASTMOE_SUMS_8
#undef FASTMOE_NAMES_0
#undef FASTMOE_NAMES_1
#undef FASTMOE_NAMES_2
#undef FASTMOE_NAMES_3
#undef FASTMOE_NAMES_4
#undef FASTMOE_NAMES_5
#undef FASTMOE_NAMES_6
#undef FASTMOE_NAMES_7

} // namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI
