// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The layer by hand: each primitive stands alone, so an engine can take what it needs. Gate, plan and combine are the
/// library's; the expert here is a product that the caller owns.
#include <fastmoe/moe.hpp>

#include <cmath>
#include <cstdio>
#include <vector>

namespace fm = fastmoe;

int main()
{
    constexpr fm::int64_t tokens = 100, width = 24, experts = 6, k = 2;
    fm::host_executor ex;

    // One arena for all; run the same lines on a measuring arena to learn its size.
    std::vector<float> x(tokens * width), y(x.size()), logits(tokens * experts), w(experts * width * width);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = std::sin(static_cast<float>(i));
    for (std::size_t i = 0; i < logits.size(); ++i) logits[i] = std::cos(static_cast<float>(3 * i));
    for (std::size_t i = 0; i < w.size(); ++i) w[i] = std::sin(static_cast<float>(i) * 0.01f);

    const fm::top_k_gate<fm::softmax_score> gate{.experts = experts, .k = k};
    const fm::gemm::portable gemm;
    const auto step = [&](fm::arena& memory) {
        // Gate: logits in, choices out.
        const auto state = gate.reserve<float>(memory, tokens);
        gate.route(ex, fm::gate_input<float>{fm::as_matrix(x, tokens, width), fm::as_matrix(logits, tokens, experts), {}, {}},
                   fm::self{}, state, memory);
        // Plan: where each choice's row stands when rows are sorted by expert.
        const auto plan = fm::reserve_plan(memory, tokens, tokens * k, experts);
        fm::make_plan(ex, state.routing, plan, memory);
        // Expert GEMM over rows that are gathered while they are read; no dispatch copy.
        const auto rows = memory.matrix<float>(plan.slots, width);
        const auto weights = fm::stacked(fm::tensor_view<float, 3>(w.data(), experts, width, width));
        gemm.forward(ex, plan.groups(), fm::gathered<float>(fm::as_matrix(x, tokens, width), plan),
                     fm::weight_view<const float>(weights), fm::matrix_view<const float>{}, rows, fm::no_epilogue{}, memory);
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
}
