// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What a consumer's program might be: one layer, one call, and a look at what came out.
#include <cstdio>
#include <vector>

#include <fastmoe/moe.hpp>
#if defined(USE_ONEDNN)
#include <fastmoe/gemm/onednn.hpp>
using gemm = fastmoe::gemm::onednn;
#else
using gemm = fastmoe::gemm::portable;
#endif
#if defined(USE_MPI)
#include <fastmoe/comm/mpi.hpp>
#endif

int main()
{
    namespace fm = fastmoe;
    fm::host_executor ex({.threads = 2});
#if defined(USE_MPI) // without mpirun there is one rank
    const fm::mpi_session session;
    const fm::mpi& communicator = session.world();
#else
    const fm::self communicator;
#endif
    fm::moe_layer layer{fm::top_k_gate<fm::softmax_score>{.experts = 4, .k = 2},
                        fm::mlp<fm::swiglu, gemm>{.width = 16, .hidden = 32}, communicator};
    auto weights = fm::random_weights<float>(ex, layer, /*seed=*/1);
    std::vector<float> x(8 * 16, 0.5f), y(8 * 16, -1.0f);
    layer.infer(ex, fm::as_matrix(x, 8, 16), weights.view(), fm::as_matrix(y, 8, 16));

    // Equal tokens have equal outputs, and not those that were there before.
    for (std::size_t i = 0; i < y.size(); ++i)
        if (y[i] != y[i % 16] || y[i] == -1.0f) return 1;
    std::printf("version %d.%d.%d, y[0] = %g\n", fm::version_major, fm::version_minor, fm::version_patch, y[0]);
    return 0;
}
