// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A GEMM that does not say what it can fuse is refused where it enters an expert.
// expect: states_abilities
// expect: gathers_rows
#include <fastmoe/moe.hpp>

struct my_gemm {
#if defined(CORRECT)
    static constexpr bool gathers_rows = true;
#endif
    static constexpr bool fuses_epilogue = true;
    static constexpr bool needs_host_counts = true;
};

fastmoe::mlp<fastmoe::gelu, my_gemm> make() { return {}; }
