// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A layer on the host as users compile it, with all optimizations: the other tests of this floor are compiled with fewer.
/// Forward, backward and infer against the oracle, at sizes below and above a vector, a tile and a block.
#pragma once

#include "support/compare_layer.hpp"

namespace release_cases {

using namespace fastmoe;

struct size {
    int64_t tokens, experts, k, width, hidden;
};
inline constexpr size sizes[] = {{1, 4, 2, 5, 7}, {50, 5, 3, 33, 40}, {300, 4, 2, 96, 130}, {700, 2, 2, 33, 530}};

/// @param seed  another for each program
template <class T, class Expert, class Weigh>
void match_oracle(std::uint64_t seed)
{
    FASTMOE_SEEDED(r, seed);
    for (const size& s : sizes) {
        CAPTURE(s.tokens);
        const top_k_gate<softmax_score, top_k, Weigh> gate{.experts = s.experts, .k = s.k, .capacity = {.factor = 1.25},
                                                           .balance = {0.1}, .z = {0.02}};
        const Expert expert{.width = s.width, .hidden = s.hidden, .biases = true};
        compare_layer::check(compare_layer::run<support::cell<host_executor, T>>(r, gate, expert, {.tokens = s.tokens}));
    }
}

} // namespace release_cases
