// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A small use of the library that touches threads, templates, inline functions and each header that is included by name.
/// Each file gets its own copy.
#pragma once

#include <vector>

#include <fastmoe/io/safetensors.hpp>
#include <fastmoe/moe.hpp>
#if defined(USE_ONEDNN)
#include <fastmoe/gemm/onednn.hpp>
#endif

#include "witness.hpp"

/// The first output of a layer whose experts multiply with Gemm.
template <class Gemm>
static float first_output(fastmoe::host_executor& ex)
{
    namespace fm = fastmoe;
    fm::moe_layer layer{fm::top_k_gate<fm::softmax_score>{.experts = 4, .k = 2},
                        fm::mlp<fm::swiglu, Gemm>{.width = 8, .hidden = 16}, fm::self{}};
    auto weights = fm::random_weights<float>(ex, layer, 1);
    std::vector<float> x(5 * 8, 0.5f), y(5 * 8);
    layer.infer(ex, fm::as_matrix(x, 5, 8), weights.view(), fm::as_matrix(y, 5, 8));
    return y[0];
}

static witness use_library()
{
    namespace fm = fastmoe;
    fm::host_executor ex({.threads = 2});
    const float portable = first_output<fm::gemm::portable>(ex);
#if defined(USE_ONEDNN)
    const float other = first_output<fm::gemm::onednn>(ex);
#else
    const float other = portable;
#endif
    const std::string header = fm::io::detail::header_text({{}, {{"format", "none"}}});
    return {portable, other, header, &typeid(fm::host_executor), &typeid(fm::io::safetensors_file), &fm::version_major};
}
