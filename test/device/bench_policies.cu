// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The same layer over each policy: cuBLASLt a group at a time, cuBLAS for all groups, and cuBLASLt for all on the device.
#include <fastmoe/cuda/cublaslt.cuh>
#include <fastmoe/cuda/cublaslt_grouped.cuh>

#include "bench_parts.cuh"

namespace timing {

void bench_policies(fm::cuda_executor& ex, figures& out)
{
    fm::cublaslt_context each, all({.calls = fm::group_calls::one_for_all});
    for (const shape& s : {shape{4096, 1024, 1024, 16, 2, 10}, published[0], published[3]}) {
        layer(ex, out, s, "portable", fm::gemm::portable{});
        layer(ex, out, s, "cublaslt", fm::gemm::cublaslt{&each});
        layer(ex, out, s, "cublas, one call", fm::gemm::cublaslt{&all});
#if CUBLAS_VERSION >= 130400
        layer(ex, out, s, "cublaslt_grouped", fm::gemm::cublaslt_grouped{&each});
#endif
    }
}

} // namespace timing
