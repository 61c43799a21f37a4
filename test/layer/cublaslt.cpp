// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A whole layer on cuda_executor over gemm::cublaslt and gemm::cublaslt_grouped against the oracle, with a CUDA runtime, cuBLAS
/// and cuBLASLt of the host's.
#include "support/fake_cuda.hpp"

#include "support/cublaslt_13_4.hpp"

#include <fastmoe/cuda/cublaslt.cuh>
#include <fastmoe/cuda/cublaslt_grouped.cuh>

#include "support/executors.hpp"

namespace support {

template <>
struct column<fastmoe::cuda_executor> {
    static constexpr const char* name = "cuda, of the host";
    static bool available() { return true; }
    static fastmoe::cuda_executor make() { return fastmoe::cuda_executor(); }
};

} // namespace support

#include "support/compare_layer.hpp"

using namespace fastmoe;
using compare_layer::check;
using compare_layer::run;
using support::fake_cuda;

namespace {

/// Forward, backward and inference with these products: all is the oracle's, and the libraries have nothing to complain of.
template <class T, class Gemm>
void check_layer(const Gemm& gemm, std::uint64_t seed)
{
    fake_cuda& cuda = fake_cuda::of_program();
    cuda.start();
    support::random r(seed);
    const top_k_gate<softmax_score, top_k, renormalize> gate{.experts = 5, .k = 2};
    for (const int64_t tokens : {1, 40})
        check(run<support::cell<cuda_executor, T>>(r, gate, mlp<swiglu, Gemm>{.width = 24, .hidden = 16, .biases = true, .gemm = gemm}, {.tokens = tokens}));
    CHECK(cuda.complaints == std::vector<std::string>{});
    CHECK((cuda.calls["cublasLtMatmul"] > 0 || cuda.calls["cublasGemmGroupedBatchedEx"] > 0));
}

} // namespace

TEST_CASE_TEMPLATE("a layer by a call a group gives the oracle's values and gradients", T, FASTMOE_DTYPES)
{
    cublaslt_context context({.workspace_bytes = 1024});
    check_layer<T>(gemm::cublaslt{&context}, 61);
}

TEST_CASE_TEMPLATE("a layer by one call for all groups gives the oracle's values and gradients", T, FASTMOE_DTYPES)
{
    cublaslt_context context({.workspace_bytes = 1024, .calls = group_calls::one_for_all});
    check_layer<T>(gemm::cublaslt{&context}, 62);
}

TEST_CASE_TEMPLATE("a layer by one grouped product gives the oracle's values and gradients", T, fastmoe::bfloat16, fastmoe::half)
{
    cublaslt_context context({.workspace_bytes = 1024});
    check_layer<T>(gemm::cublaslt_grouped{&context}, 63);
}
