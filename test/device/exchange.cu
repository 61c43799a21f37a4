// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The exchanges compiled for a device: a layer whose experts ranks share, forward, backward and inference, by each of
/// them. Nothing here is run.
#include <fastmoe/cuda.cuh>

namespace fm = fastmoe;

namespace {

template <class T, class Exchange>
void instantiate(fm::cuda_executor& ex, fm::int64_t n, const Exchange& exchange)
{
    const fm::moe_layer layer{fm::top_k_gate<>{.experts = 8, .k = 2}, fm::mlp<fm::swiglu>{.width = n, .hidden = n},
                              fm::expert_parallel{fm::self{}, fm::self{}, fm::round_robin_placement{}, exchange}};
    const auto w = fm::random_weights<T>(ex, layer, 1);
    const auto g = fm::zero_weights<T>(ex, layer);
    fm::buffer<T, fm::cuda_executor> x(ex, n * n), y(ex, n * n), dx(ex, n * n);
    const auto saved = layer.forward(ex, x.matrix(n, n), w.view(), y.matrix(n, n));
    layer.backward(ex, saved, x.matrix(n, n), w.view(), dx.matrix(n, n), g.view());
    layer.infer(ex, x.matrix(n, n), w.view(), y.matrix(n, n));
}

} // namespace

void exchange_on_device(fm::cuda_executor& ex, fm::int64_t n)
{
    instantiate<fm::bfloat16>(ex, n, fm::exact_exchange<>{});
    instantiate<fm::bfloat16>(ex, n, fm::padded_exchange<>{.rows_per_rank = n});
    instantiate<fm::bfloat16>(ex, n, fm::gathered_exchange<>{.most_tokens = n});
}
