// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A file with exceptions in a program whose other file has none: what it calls is its own.
#include <vector>

#include <fastmoe/moe.hpp>

namespace fm = fastmoe;

bool throws_and_catches()
{
    fm::host_executor ex({.threads = 1});
    const fm::moe_layer layer{fm::top_k_gate<fm::softmax_score>{.experts = 4, .k = 2}, fm::mlp<fm::swiglu>{.width = 16, .hidden = 32}, fm::self{}};
    const auto weights = fm::random_weights<float>(ex, layer, 1);
    std::vector<float> x(8 * 16), y(8 * 16);
    try {
        layer.infer(ex, fm::as_matrix(x, 8, 16), weights.view(), fm::as_matrix(y, 16, 8)); // a wrong shape
    } catch (const fm::invalid_argument&) {
        return true;
    }
    return false;
}
