// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "support/compare_mlp.hpp"

namespace {

/// An activation with constants at run time; here with a limit that small numbers reach.
struct tightly_clamped : fastmoe::clamped_swiglu {
    tightly_clamped() : clamped_swiglu{.limit = 1} {}
};

} // namespace

FASTMOE_MLP_TEST("a clamped SwiGLU", tightly_clamped, clamped_swiglu)
