// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A communicator that cannot sum over ranks is refused by the layer's first call, which names the missing expression.
// expect: the communicator lacks what gates ask
// expect: c\.all_reduce
#include <fastmoe/moe.hpp>

namespace fm = fastmoe;

struct my_communicator {
    int rank() const { return 0; }
    int size() const { return 1; }
#if defined(CORRECT)
    template <class Executor, class T>
    void all_reduce(Executor&, fm::vector_view<T>) const
    {
    }
#endif
};

using expert = fm::mlp<fm::gelu>;
void use(fm::host_executor& ex, const fm::moe_layer<fm::top_k_gate<>, expert, my_communicator>& layer,
         fm::moe_weights<float, expert> w, fm::matrix_view<float> x)
{
    layer.infer(ex, x, w, x);
}
