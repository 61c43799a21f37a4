// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// An expert that cannot train infers, but does not enter a training step.
// expect: the expert lacks what training asks
// expect: e\.backward
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
    template <class T>
    fm::nothing_saved reserve_pending(fm::arena&, fm::int64_t) const
    {
        return {};
    }
    template <class Executor, class T>
    void forward(Executor&, const fm::expert_input<T>&, const weights<const T>&, const fm::nothing_saved&,
                 fm::matrix_view<T>, fm::arena&) const
    {
    }
    template <class Executor, class T>
    void infer(Executor&, const fm::expert_input<T>&, const weights<const T>&, fm::matrix_view<T>, fm::arena&) const
    {
    }
#if defined(CORRECT)
    template <class Executor, class T>
    void backward(Executor&, const fm::expert_input<T>&, const weights<const T>&, const fm::nothing_saved&,
                  const fm::indexed_rows<T>&, const fm::nothing_saved&, fm::matrix_view<T>,
                  fm::vector_view<fm::accumulate_t<T>>, fm::arena&) const
    {
    }
#endif
    template <class Executor, class T, class G>
    void weight_gradients(Executor&, const fm::expert_input<T>&, const fm::nothing_saved&, const fm::indexed_rows<T>&,
                          const fm::nothing_saved&, const weights<G>&, fm::write_mode, fm::arena&) const
    {
    }
};

using expert = my_expert;
void use(fm::host_executor& ex, const fm::moe_layer<fm::top_k_gate<>, expert>& layer, fm::moe_weights<float, expert> w,
         fm::matrix_view<float> x, fm::matrix_view<float> y)
{
    layer.infer(ex, x, w, y);
    (void)layer.forward(ex, x, w, y);
}
