// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A communicator that does not know how many ranks there are is refused where it enters the layer.
// expect: counts_ranks
// expect: c\.size
#include <fastmoe/moe.hpp>

struct my_communicator {
    int rank() const { return 0; }
#if defined(CORRECT)
    int size() const { return 1; }
#endif
};

using layer = fastmoe::moe_layer<fastmoe::top_k_gate<>, fastmoe::mlp<fastmoe::gelu>, my_communicator>;
layer make() { return {}; }
