// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The kernels of gemm::hopper in a layer: rows and gradients, with activations in registers, in bfloat16 and half, and those of
/// codes. Nothing here is run.
#include <fastmoe/cuda.cuh>

namespace {

namespace fm = fastmoe;

template <class T, class G, class Gemm, class Activation>
void layer(const Activation&)
{
    using expert = fm::mlp<Activation, Gemm>;
    const fm::moe_layer l{fm::top_k_gate<fm::softmax_score>{.experts = 8, .k = 2},
                          expert{.width = 64, .hidden = 128, .layout = fm::gated_layout::interleaved}, fm::self{}};
    fm::arena measure;
    const fm::matrix_view<T> x(nullptr, 0, 64);
    const auto w = l.template reserve_weights<T>(measure, 64);
    const auto g = l.template reserve_weights<G>(measure, 64);
    fm::cuda_executor ex;
    const auto saved = l.forward(ex, x, w, x);
    l.backward(ex, saved, x, w, x, g);
}

} // namespace

void instantiate_hopper()
{
    layer<fm::bfloat16, fm::bfloat16, fm::gemm::hopper>(fm::swiglu{});
    layer<fm::half, float, fm::gemm::hopper>(fm::gelu{});
    layer<fm::bfloat16, float, fm::gemm::hopper_fp8>(fm::swiglu{});
}
