// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <algorithm>

#include <fastmoe/comm/self.hpp>

#include "run_block/models.hpp"
#include "run_block/program.hpp"

namespace {

namespace fm = fastmoe;

/// Runs any gate that looks at logits alone.
template <class Gate>
void run_gate(fm::host_executor& ex, const Gate& gate, fm::matrix_view<const float> logits, const fm::routing<float>& to)
{
    const fm::gate_input<float> in{{}, logits, {}, {}, fm::gate_mode::inference, nullptr, 0};
    const auto run = [&](fm::arena& memory) {
        const auto state = fm::reserve_gate<float>(gate, memory, logits.extent(0));
        gate.route(ex, in, fm::self{}, state, memory);
        return state.routing;
    };
    fm::arena measure;
    run(measure);
    fm::buffer<std::byte, fm::host_executor> storage(ex, measure.bytes());
    fm::arena memory(storage.view());
    const auto made = run(memory);
    std::copy_n(made.experts.data_handle(), to.choices(), to.experts.data_handle());
    std::copy_n(made.weights.data_handle(), to.choices(), to.weights.data_handle());
}

} // namespace

void run_block::route(fm::host_executor& ex, const description& d, fm::matrix_view<const float> logits,
                      const fm::routing<float>& to)
{
    with_model<fm::gemm::portable>(d, [&](const auto& m) { run_gate(ex, m.gate, logits, to); });
    // The library does not divide a single score by itself, which would keep the router from learning. The models' code
    // does; what is left is the scale.
    const bool sigmoid = d.model == model::deepseek_v3 || d.model == model::minimax_m2;
    if (sigmoid && d.division == division::sum && d.numbers.k == 1)
        for (int64_t t = 0; t < logits.extent(0); ++t)
            if (to.experts(t) >= 0) to.weights(t) = static_cast<float>(d.numbers.scale);
}
