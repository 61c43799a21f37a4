// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A weighing over the chosen that has no epsilon is refused where a gate with it enters a layer.
// expect: weighs_choices
// expect: epsilon
#include <fastmoe/moe.hpp>

struct my_weighing {
    static constexpr bool over_chosen = true;
#if defined(CORRECT)
    double epsilon = 0;
#endif
};

void run(fastmoe::host_executor& ex, fastmoe::matrix_view<const float> x, fastmoe::matrix_view<float> y)
{
    const fastmoe::moe_layer layer{fastmoe::top_k_gate<fastmoe::softmax_score, fastmoe::top_k, my_weighing>{.experts = 4, .k = 2}, fastmoe::mlp<>{.width = 8, .hidden = 4}};
    const auto w = fastmoe::random_weights<float>(ex, layer, 1);
    layer.infer(ex, x, w.view(), y);
}
