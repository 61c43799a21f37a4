// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The sizes of a GPT.
#pragma once

#include <cstdint>
#include <utility>

#include <fastmoe/core/error.hpp>

namespace train_gpt {

namespace fm = fastmoe;
using fm::int32_t;
using fm::int64_t;

/// Everything that decides the shapes of the model.
struct gpt_config {
    int64_t vocabulary = 256;   ///< V  bytes
    int64_t context = 128;      ///< most positions of a sequence
    int64_t width = 128;        ///< D
    int64_t layers = 4;
    int64_t heads = 4;
    int64_t experts = 8;        ///< E  1: a plain MLP
    int64_t k = 2;              ///< K
    int64_t hidden = 256;       ///< H  of one expert
    double balance = 0.01;      ///< coefficient of the balance loss

    /// The dense model that computes as much for a token: one MLP as wide as the K experts that a token meets.
    gpt_config dense() const
    {
        gpt_config c = *this;
        c.hidden = k * hidden;
        c.experts = c.k = 1;
        c.balance = 0;
        return c;
    }
    void check() const
    {
        for (const auto& [value, name] : {std::pair{vocabulary, "vocabulary"}, {context, "context"}, {width, "width"},
                                          {layers, "layers"}, {heads, "heads"}, {experts, "experts"}, {k, "k"},
                                          {hidden, "hidden"}})
            fm::expects(value >= 1, name, value, "1 or more");
        fm::expects(width % heads == 0, "width", width, "a multiple of heads = ", heads);
        fm::expects(k <= experts, "k", k, "at most experts = ", experts);
    }
};

} // namespace train_gpt
