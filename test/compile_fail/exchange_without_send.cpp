// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// An exchange that cannot send rows is refused by the layer's first call, which names the missing expression.
// expect: the exchange lacks a verb
// expect: x\.send_rows
#include <fastmoe/moe.hpp>

namespace fm = fastmoe;

struct my_exchange : fm::exact_exchange<> {
#if !defined(CORRECT)
    void send_rows() const; // hides the right one
#endif
};

using expert = fm::mlp<fm::gelu>;
using ranks = fm::expert_parallel<fm::threads, fm::threads, fm::block_placement, my_exchange>;
void use(fm::host_executor& ex, const fm::moe_layer<fm::top_k_gate<>, expert, ranks>& layer, fm::moe_weights<float, expert> w,
         fm::matrix_view<float> x)
{
    layer.infer(ex, x, w, x);
}
