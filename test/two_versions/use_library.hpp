// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A small use of the library that touches threads, templates and inline functions. Each file gets its own copy.
#pragma once

#include <vector>

#include <fastmoe/moe.hpp>

#include "witness.hpp"

static witness use_library()
{
    namespace fm = fastmoe;
    fm::host_executor ex({.threads = 2});
    fm::moe_layer layer{fm::top_k_gate<fm::softmax_score>{.experts = 4, .k = 2},
                        fm::mlp<fm::swiglu>{.width = 8, .hidden = 16}, fm::self{}};
    auto weights = fm::random_weights<float>(ex, layer, 1);
    std::vector<float> x(5 * 8, 0.5f), y(5 * 8);
    layer.infer(ex, fm::as_matrix(x, 5, 8), weights.view(), fm::as_matrix(y, 5, 8));
    return {y[0], &typeid(fm::host_executor), &fm::version_major};
}
