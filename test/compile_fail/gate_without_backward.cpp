// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A gate that cannot train infers, but does not enter a training step.
// expect: the gate lacks what training asks
// expect: g\.backward
#include <fastmoe/moe.hpp>

namespace fm = fastmoe;

struct my_gate {
    fm::int64_t experts = 4, k = 1;
    template <class Executor, class T, class Communicator, class State>
    void route(Executor&, const fm::gate_input<T>&, const Communicator&, const State&, fm::arena&) const
    {
    }
#if defined(CORRECT)
    template <class Executor, class T, class Communicator, class State, class Real>
    void backward(Executor&, const fm::gate_input<T>&, const Communicator&, const State&, fm::vector_view<const Real>, Real,
                  fm::matrix_view<Real>, fm::arena&) const
    {
    }
#endif
};

using expert = fm::mlp<fm::gelu>;
void use(fm::host_executor& ex, const fm::moe_layer<my_gate, expert>& layer, fm::moe_weights<float, expert> w,
         fm::matrix_view<float> x)
{
    layer.infer(ex, x, w, x);
    (void)layer.forward(ex, x, w, x);
}
