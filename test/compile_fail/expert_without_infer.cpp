// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// An expert without infer() is refused by the layer's first call, which names the missing expression.
// expect: the expert lacks what inference asks
// expect: e\.infer
#include <fastmoe/moe.hpp>

namespace fm = fastmoe;

struct my_expert {
    static constexpr bool applies_weights = false;
    static constexpr bool weighs_output() { return true; }
    template <class T>
    using weights = fm::linear_weights<T>;
    template <class T>
    weights<T> reserve_weights(fm::arena&, fm::int64_t) const
    {
        return {};
    }
    template <class T>
    fm::nothing_saved reserve_saved(fm::arena&, fm::int64_t) const
    {
        return {};
    }
    template <class Executor, class T>
    void forward(Executor&, const fm::expert_input<T>&, const weights<const T>&, const fm::nothing_saved&,
                 fm::matrix_view<T>, fm::arena&) const
    {
    }
#if defined(CORRECT)
    template <class Executor, class T>
    void infer(Executor&, const fm::expert_input<T>&, const weights<const T>&, fm::matrix_view<T>, fm::arena&) const
    {
    }
#endif
};

using gate = fm::top_k_gate<fm::softmax_score>;
void use(fm::host_executor& ex, const fm::moe_layer<gate, my_expert>& layer, fm::moe_weights<float, my_expert> w,
         fm::matrix_view<float> x)
{
    layer.infer(ex, x, w, x);
}
