// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// An activation that serves float alone is refused by a layer in double, which sums in double.
// expect: the activation serves float, and not the sums
// expect: plain_activation
#include <fastmoe/moe.hpp>

struct my_activation {
    static constexpr bool gated = false;
    float value(float x) const { return x; }
    float derivative(float) const { return 1; }
#if defined(CORRECT)
    double value(double x) const { return x; }
    double derivative(double) const { return 1; }
#endif
};

void run(fastmoe::host_executor& ex, fastmoe::matrix_view<const double> x, fastmoe::matrix_view<double> y)
{
    const fastmoe::moe_layer layer{fastmoe::top_k_gate<>{.experts = 4, .k = 2},
                                   fastmoe::mlp<my_activation>{.width = 8, .hidden = 4}};
    const auto w = fastmoe::random_weights<double>(ex, layer, 1);
    layer.infer(ex, x, w.view(), y);
}
