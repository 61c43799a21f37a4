// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The layer by hand: each primitive stands alone, so an engine can take what it needs. Router, gate, plan, one grouped
/// product and combine, and at the end the proof that this is what the layer does.
#include <fastmoe/moe.hpp>

#include <cmath>
#include <cstdio>
#include <vector>

namespace fm = fastmoe;

int main()
{
    constexpr fm::int64_t tokens = 100, width = 24, experts = 6, k = 2;
    fm::host_executor ex;
    const fm::top_k_gate<fm::softmax_score> gate{.experts = experts, .k = k};
    const fm::moe_layer layer{gate, fm::linear<>{.width = width}, fm::self{}};
    const auto weights = fm::random_weights<float>(ex, layer, /*seed=*/1);
    const fm::weight_view<const float> expert_weights = weights.view().expert.weight;

    std::vector<float> x(tokens * width), y(x.size()), logits(tokens * experts);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i));
    const auto input = fm::as_matrix(x, tokens, width); // (T,D)

    // One arena for all; the same lines on a measuring arena tell its size.
    const fm::gemm::portable gemm;
    const auto step = [&](fm::arena& memory) {
        // Router: logits = x W^T.
        const auto scores = fm::as_matrix(logits, tokens, experts);
        fm::project(ex, input, weights.view().gate, fm::vector_view<float>{}, scores, memory);
        // Gate: logits in, choices out.
        const auto state = gate.reserve<float>(memory, tokens);
        gate.route(ex, fm::gate_input<float>{input, scores, {}, {}}, fm::self{}, state, memory);
        // Plan: where each choice's row stands when rows are sorted by expert.
        const auto plan = fm::reserve_plan(memory, tokens, tokens * k, experts);
        fm::make_plan(ex, state.routing, plan, memory);
        // Grouped GEMM over rows that are gathered while they are read; no dispatch copy.
        const auto rows = memory.matrix<float>(plan.slots, width);
        gemm.forward(ex, plan.groups(), fm::gathered<float>(input, plan), expert_weights, fm::matrix_view<const float>{}, rows,
                     fm::no_epilogue{}, memory);
        // Combine.
        if (!memory.measuring()) fm::combine(ex, rows, state.routing, plan, fm::as_matrix(y, tokens, width));
        return plan;
    };
    fm::arena measure;
    step(measure);
    fm::buffer<std::byte, fm::host_executor> storage(ex, measure.bytes());
    fm::arena memory(storage.view());
    const auto plan = step(memory);
    std::printf("%lld bytes of workspace, %d rows on expert 0, y[0] = %g\n", static_cast<long long>(measure.bytes()),
                plan.counts(0), y[0]);

    // The layer takes the same steps, so it gives the same bits.
    std::vector<float> from_layer(y.size());
    layer.infer(ex, input, weights.view(), fm::as_matrix(from_layer, tokens, width));
    if (y == from_layer) return 0;
    std::fprintf(stderr, "the layer gives other values\n");
    return 1;
}
