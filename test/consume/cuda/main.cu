// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A layer of bfloat16 on the host executor, used from a file that nvcc compiles. Needs no GPU to run.
#include <cmath>
#include <vector>

#include <fastmoe/moe.hpp>

namespace fm = fastmoe;

struct twice {
    fm::vector_view<fm::bfloat16> v; // (N)

    FASTMOE_HOST_DEVICE void operator()(fm::int64_t i) const { v(i) = fm::bfloat16(2.0f * v(i)); }
};

int main()
{
    fm::host_executor ex({.threads = 2});
    fm::moe_layer layer{fm::top_k_gate<fm::softmax_score>{.experts = 4, .k = 2},
                        fm::mlp<fm::swiglu>{.width = 16, .hidden = 32}, fm::self{}};
    auto weights = fm::random_weights<fm::bfloat16>(ex, layer, /*seed=*/1);
    std::vector<fm::bfloat16> x(64 * 16, fm::bfloat16(0.25f)), y(x.size(), fm::bfloat16(NAN));
    fm::for_each(ex, 64 * 16, twice{fm::as_vector(x)});
    layer.infer(ex, fm::as_matrix(x, 64, 16), weights.view(), fm::as_matrix(y, 64, 16));

    // Equal tokens have equal outputs.
    for (std::size_t i = 0; i < y.size(); ++i)
        if (x[i] != 0.5f || !(y[i] == y[i % 16]) || y[i % 16] == 0.0f) return 1;
    return 0;
}
