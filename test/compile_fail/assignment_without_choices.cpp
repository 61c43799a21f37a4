// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A ragged assignment that does not say how many choices there are is refused where a gate with it enters a layer.
// expect: states_assignment
// expect: choices
#include <fastmoe/moe.hpp>

struct my_assignment {
    static constexpr bool reads_logits = true;
    static constexpr bool ragged = true;
#if defined(CORRECT)
    fastmoe::int64_t choices(fastmoe::int64_t tokens, fastmoe::int64_t, fastmoe::int64_t k) const { return tokens * k; }
#endif
    template <class... Anything>
    void assign(Anything&&...) const
    {
    }
};

void run(fastmoe::host_executor& ex, fastmoe::matrix_view<const float> x, fastmoe::matrix_view<float> y)
{
    const fastmoe::moe_layer layer{fastmoe::assigned_gate<my_assignment>{.experts = 4, .k = 2}, fastmoe::mlp<>{.width = 8, .hidden = 4}};
    const auto w = fastmoe::random_weights<float>(ex, layer, 1);
    layer.infer(ex, x, w.view(), y);
}
