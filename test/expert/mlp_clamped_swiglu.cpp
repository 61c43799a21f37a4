// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "support/compare_mlp.hpp"

namespace {

/// An activation with constants at run time; here with a limit that small numbers reach.
struct tightly_clamped : fastmoe::clamped_swiglu {
    tightly_clamped() : clamped_swiglu{.limit = 1} {}
};

} // namespace

template <>
inline constexpr auto support::activation_kind<tightly_clamped> = support::reference::activation::clamped_swiglu;

FASTMOE_MLP_TEST("a clamped SwiGLU", tightly_clamped)
