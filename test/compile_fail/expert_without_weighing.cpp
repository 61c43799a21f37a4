// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// An expert that does not say whether it applies the routing weights is refused where it enters the layer.
// expect: states_weighing
// expect: applies_weights
#include <fastmoe/moe.hpp>

namespace fm = fastmoe;

struct my_expert {
#if defined(CORRECT)
    static constexpr bool applies_weights = false;
#endif
    static constexpr bool weighs_output() { return true; }
};

using layer = fm::moe_layer<fm::top_k_gate<fm::softmax_score>, my_expert>;
fm::int64_t experts(const layer& l) { return l.gate.experts; }
