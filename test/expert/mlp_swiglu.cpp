// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "support/compare_mlp.hpp"

using namespace fastmoe;

FASTMOE_MLP_TEST("SwiGLU", swiglu)
