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

TEST_CASE_TEMPLATE("an expert that keeps nothing does not write its pre-activation", T, bfloat16, fastmoe::half)
{
    FASTMOE_SEEDED(r, 73);
    for (const int64_t slots : {int64_t{20}, int64_t{90}}) { // few rows, which are taken with the features down, and many
        CAPTURE(slots);
        constexpr int64_t width = 24, hidden = 32, up = 2 * hidden;
        const mlp<swiglu, gemm::hopper> expert{.width = width, .hidden = hidden, .layout = gated_layout::interleaved};
        const auto x = support::normal_vector<T>(r, slots * width), w1 = support::normal_vector<T>(r, 2 * up * width),
                   w2 = support::normal_vector<T>(r, 2 * width * hidden);
        const std::vector<float> weights(static_cast<std::size_t>(slots), 1.0f);
        std::vector<int32_t> index(static_cast<std::size_t>(slots));
        for (int64_t s = 0; s < slots; ++s) index[static_cast<std::size_t>(s)] = static_cast<int32_t>(s);
        const std::vector<int32_t> counts{static_cast<int32_t>(slots / 3), static_cast<int32_t>(slots - slots / 3)};
        const std::vector<int64_t> offsets{0, slots / 3, slots};
        const expert_input<T> input{{as_matrix(x, slots, width), as_vector(index)},
                                    {as_vector(counts), as_vector(offsets), slots}, as_vector(weights), as_vector(index)};
        const mlp_weights<const T> w{stacked(tensor_view<const T, 3>(w1.data(), 2, up, width)),
                                     stacked(tensor_view<const T, 3>(w2.data(), 2, width, hidden)), {}, {}};
        clusters ex(2, 7);
        std::vector<T> kept(static_cast<std::size_t>(slots * width)), inferred = kept;
        const auto written = [&](auto run) { // of the pre-activation, the first thing in the workspace
            arena needed;
            run(needed);
            support::workspace memory(ex, needed.bytes());
            const auto first = [&] {
                const arena::scope lent(memory.arena());
                return memory.arena().template vector<std::byte>(1).data_handle();
            }();
            run(memory.arena());
            ex.synchronize();
            int64_t n = 0;
            for (int64_t i = 0; i < slots * up * static_cast<int64_t>(sizeof(T)); ++i) n += first[i] != std::byte{0xff};
            return n;
        };
        CHECK(written([&](arena& a) {
                  const arena::scope lent(a);
                  const auto saved = expert.template reserve_saved<T>(a, slots);
                  expert.forward(ex, input, w, saved, matrix_view<T>(kept.data(), slots, width), a);
              }) > slots * up);
        CHECK(written([&](arena& a) { expert.infer(ex, input, w, matrix_view<T>(inferred.data(), slots, width), a); }) == 0);
        CHECK(support::same_bits(kept, inferred));
    }
}
