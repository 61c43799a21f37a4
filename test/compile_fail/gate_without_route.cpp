// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A gate without route() is refused by the layer's first call, which names the missing expression.
// expect: the gate lacks what inference asks
// expect: g\.route
#include <fastmoe/moe.hpp>

namespace fm = fastmoe;

struct my_gate {
    fm::int64_t experts = 4, k = 1;
#if defined(CORRECT)
    template <class Executor, class T, class Communicator, class State>
    void route(Executor&, const fm::gate_input<T>&, const Communicator&, const State&, fm::arena&) const
    {
    }
#endif
};

using expert = fm::mlp<fm::gelu>;
void use(fm::host_executor& ex, const fm::moe_layer<my_gate, expert>& layer, fm::moe_weights<float, expert> w,
         fm::matrix_view<float> x)
{
    layer.infer(ex, x, w, x);
}
