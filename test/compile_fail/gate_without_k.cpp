// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A gate that does not say how many choices a token has is refused where it enters the layer.
// expect: states_choices
// expect: g\.k
#include <fastmoe/moe.hpp>

struct my_gate {
    fastmoe::int64_t experts = 4;
#if defined(CORRECT)
    fastmoe::int64_t k = 1;
#endif
};

using layer = fastmoe::moe_layer<my_gate, fastmoe::mlp<fastmoe::gelu>>;
layer make() { return {}; }
