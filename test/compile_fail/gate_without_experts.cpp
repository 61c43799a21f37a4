// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A gate that does not say how many experts there are is refused where it enters the layer.
// expect: states_experts
// expect: g\.experts
#include <fastmoe/moe.hpp>

struct my_gate {
#if defined(CORRECT)
    fastmoe::int64_t experts = 4;
#endif
    fastmoe::int64_t k = 1;
};

using layer = fastmoe::moe_layer<my_gate, fastmoe::mlp<fastmoe::gelu>>;
layer make() { return {}; }
