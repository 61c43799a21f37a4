// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A layer over gemm::cublaslt, and over gemm::cublaslt_grouped where the toolkit has what that needs: forward, backward and
/// inference in each dtype. Compiled and linked; nothing here is run.
#include <fastmoe/cuda.cuh>
#include <fastmoe/cuda/cublaslt.cuh>
#include <fastmoe/cuda/cublaslt_grouped.cuh>

namespace {

namespace fm = fastmoe;

template <class T, class Gemm = fm::gemm::cublaslt>
void instantiate(fm::cuda_executor& ex, fm::cublaslt_context& context)
{
    using expert = fm::mlp<fm::swiglu, Gemm>;
    const fm::moe_layer layer{fm::top_k_gate<fm::softmax_score>{.experts = 8, .k = 2},
                              expert{.width = 64, .hidden = 128, .biases = true, .gemm = {&context}}, fm::self{}};
    fm::arena measure;
    const fm::matrix_view<T> x(nullptr, 0, 64); // (T,D)
    const auto w = layer.template reserve_weights<T>(measure, 64);
    auto saved = layer.forward(ex, x, w, x);
    layer.backward(ex, saved, x, w, x, w);
    layer.infer(ex, x, w, x);
}

} // namespace

void instantiate_cublaslt()
{
    fm::cuda_executor ex;
    fm::cublaslt_context context;
    instantiate<double>(ex, context);
    instantiate<float>(ex, context);
    instantiate<fm::bfloat16>(ex, context);
    instantiate<fm::half>(ex, context);
#if CUBLAS_VERSION >= 130400
    instantiate<fm::bfloat16, fm::gemm::cublaslt_grouped>(ex, context);
    instantiate<fm::half, fm::gemm::cublaslt_grouped>(ex, context);
#endif
}
