// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A layer as a GPU runs it, its experts by gemm::hopper, an instruction at a time without one, against the oracle: all else on
/// teams of a GPU's shape; activations in the products' registers, and row by row where a layout does not allow that.
#include <fastmoe/gemm/hopper.hpp>

#include "support/compare_layer.hpp"
#include "support/fiber_blocks.hpp"
#include "support/fiber_clusters.hpp"
#include "support/warps.hpp"

using namespace fastmoe;

namespace {

using clusters = support::fiber_clusters<support::fiber_blocks<support::warps>>;

template <class T>
struct cell {
    using executor = clusters;
    using type = T;
    static clusters make() { return clusters(2, 7); }
};

/// Narrow and wide tiles for shapes of a test.
struct small_tiles {
    static constexpr gemm::hopper_tuning of(gemm::hopper_product product, bool wide) noexcept
    {
        using enum gemm::hopper_schedule;
        if (product == gemm::hopper_product::few_rows) return gemm::hopper_default(product, wide);
        if (product == gemm::hopper_product::gradients) return {.columns = 128, .stages = 3};
        if (wide) return {.columns = 128, .stages = 2, .cluster = 2};
        return {.columns = 64, .stages = 3, .schedule = ping_pong};
    }
};

template <class Activation, class T>
void matches_oracle(unsigned seed)
{
    FASTMOE_SEEDED(r, seed);
    using gate_type = top_k_gate<softmax_score, top_k, raw_scores>;
    const gate_type gate{.experts = 3, .k = 2, .balance = {0.1}};
    for (const auto weigh : {weigh_at::output, weigh_at::activation, weigh_at::input})
        for (const auto layout : {gated_layout::interleaved, gated_layout::concatenated}) {
            const bool biases = layout == gated_layout::interleaved;
            const mlp<Activation, gemm::hopper_with<small_tiles>> expert{.width = 8 * r.integer(1, 20), .hidden = 8 * r.integer(1, 20), .biases = biases,
                                                                         .weigh = weigh, .layout = layout};
            CAPTURE(expert.width);
            CAPTURE(expert.hidden);
            compare_layer::setting s{.tokens = r.integer(40, 90), .masked = biases, .aligned = true};
            compare_layer::check(compare_layer::run<cell<T>>(r, gate, expert, s));
            s.gradients = write_mode::accumulate;
            compare_layer::check(compare_layer::run<cell<T>, accumulate_t<T>>(r, gate, expert, s));
        }
}

} // namespace

TEST_CASE_TEMPLATE("a layer of warpgroups' products is what the oracle says", T, bfloat16, fastmoe::half)
{
    matches_oracle<swiglu, T>(71);
    matches_oracle<gelu, T>(72);
}
