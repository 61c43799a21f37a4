// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// From a description to the library's composition of the model.
#pragma once

#include <fastmoe/models/deepseek.hpp>
#include <fastmoe/models/ernie4_5.hpp>
#include <fastmoe/models/gpt_oss.hpp>
#include <fastmoe/models/llama4.hpp>
#include <fastmoe/models/phimoe.hpp>
#include <fastmoe/models/softmax_models.hpp>

#include "run_block/description.hpp"

namespace run_block {

/// f(block of fastmoe/models).
/// @tparam Gemm  the policy of the products
template <class Gemm, class F>
void with_model(const description& d, const F& f)
{
    using namespace fm::models;
    const auto& n = d.numbers;
    const bool divides = d.division == division::sum;
    switch (d.model) {
    case model::softmax:
        if (d.sharing == sharing::gated) {
            if (divides) return f(qwen2_moe<fm::renormalize, Gemm>(n));
            return f(qwen2_moe<fm::raw_scores, Gemm>(n));
        }
        if (d.division == division::norm) return f(dbrx<fm::divide_by_norm, Gemm>(n));
        if (divides) return f(qwen3_moe<fm::renormalize, Gemm>(n));
        return f(olmoe<fm::raw_scores, Gemm>(n));
    case model::deepseek_v2: return f(deepseek_v2<Gemm>(n));
    case model::deepseek_v3:
        if (divides) return f(deepseek_v3<fm::renormalize, Gemm>(n));
        return f(deepseek_v3<fm::raw_scores, Gemm>(n));
    case model::minimax_m2: return f(minimax_m2<Gemm>(n));
    case model::gpt_oss: return f(gpt_oss<Gemm>(n));
    case model::llama4: return f(llama4<Gemm>(n));
    case model::ernie4_5: return f(ernie4_5_moe<Gemm>(n));
    case model::phimoe: return f(phimoe<Gemm>(n));
    }
}

} // namespace run_block
