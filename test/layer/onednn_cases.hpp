// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What is asked of a layer whose experts multiply by oneDNN, in every dtype; counts oneDNN's calls on the way.
#pragma once

#include "support/onednn_calls.hpp" // first: it stands before the library's symbols

#include "support/allocations.hpp"
#include "support/compare_layer.hpp"
#include "support/layer_step.hpp"

namespace onednn_cases {

using namespace fastmoe;

template <class T>
using cell = support::cell<host_executor, T>;
/// oneDNN's own products at every size: nothing is left to portable.
struct always_onednn : gemm::onednn {
    always_onednn() : gemm::onednn{.limits = {0, 0, 0}} {}
};
using expert_type = mlp<swiglu, always_onednn>;
using layer_type = moe_layer<top_k_gate<softmax_score, top_k, raw_scores>, expert_type, self>;

inline layer_type make_layer(weigh_at weigh = weigh_at::output, int64_t experts = 8)
{
    return {{.experts = experts, .k = 2, .capacity = {.factor = 1.5}, .balance = {0.1}, .z = {0.01}},
            {.width = 48, .hidden = 40, .biases = true, .weigh = weigh}, self{}};
}

/// Every place of the weight, shapes of several blocks and panels, gradients written and added, in T and in fp32.
template <class T>
void matches_oracle()
{
    FASTMOE_SEEDED(r, 81);
    using gate_type = top_k_gate<softmax_score, top_k, raw_scores>;
    const gate_type gate{.experts = 4, .k = 2, .balance = {0.1}};
    int round = 0;
    for (const auto weigh : {weigh_at::output, weigh_at::activation, weigh_at::input})
        for (const bool biases : {false, true}) {
            CAPTURE(round);
            const expert_type expert{.width = r.integer(9, 60), .hidden = r.integer(9, 60), .biases = biases, .weigh = weigh,
                                     .layout = biases ? gated_layout::interleaved : gated_layout::concatenated};
            compare_layer::setting s{.tokens = r.integer(10, 70), .gate_bias = biases, .masked = round % 2 == 1};
                compare_layer::check(compare_layer::run<cell<T>>(r, gate, expert, s));
            s.gradients = write_mode::accumulate;
            compare_layer::check(compare_layer::run<cell<T>>(r, gate, expert, s));
            compare_layer::check(compare_layer::run<cell<T>, accumulate_t<T>>(r, gate, expert, s));
            ++round;
        }
    // Over 640 rows to an expert and 512 columns: more than one block, and more than one panel of each.
    const expert_type large{.width = 33, .hidden = 530, .biases = true};
    compare_layer::check(compare_layer::run<cell<T>>(r, gate_type{.experts = 2, .k = 1}, large, {.tokens = 700, .crowded = true}));
}

template <class T>
void matches_oracle_in_layouts()
{
    FASTMOE_SEEDED(r, 83);
    compare_layer::layouts<cell<T>>(r, top_k_gate<softmax_score, top_k, raw_scores>{.experts = 4, .k = 2},
                                    [](int64_t width, int64_t hidden) {
                                        return expert_type{.width = width, .hidden = hidden, .biases = true,
                                                           .layout = gated_layout::interleaved};
                                    });
}

template <class T>
void linear_matches_oracle()
{
    FASTMOE_SEEDED(r, 84);
    compare_layer::layouts<cell<T>>(r, top_k_gate<softmax_score, top_k, raw_scores>{.experts = 4, .k = 2}, [](int64_t width, int64_t) {
        return linear<always_onednn>{.width = width, .biases = true};
    });
}

template <class T>
void matches_oracle_in_corners()
{
    FASTMOE_SEEDED(r, 82);
    compare_layer::corners<cell<T>>(r, [](int64_t width, int64_t hidden) {
        return expert_type{.width = width, .hidden = hidden, .biases = true};
    });
}

/// Our own code allocates nothing. oneDNN takes at most one block for a product. Its size grows with the rows of the
/// product up to those of one tile, 640, and with T no further.
template <class T>
void counts_allocations()
{
    if (!support::counts_malloc) FASTMOE_SKIP("allocations of libraries cannot be counted under a sanitizer");
    for (const auto weigh : {weigh_at::output, weigh_at::input}) {
        std::vector<std::int64_t> sizes;
        for (const int64_t tokens : {64, 640, 1280, 2560}) {
            const auto layer = make_layer(weigh, 2); // every token chooses both
            host_executor ex({.threads = 2});
            support::layer_step<T, layer_type> m(ex, layer, tokens, 62);
            support::layer_calls<T, layer_type> calls(ex, m);
            calls(); // oneDNN generates its kernels on first use
            const support::onednn_calls<T> products;
            support::malloc_largest = 0;
            const support::allocations before;
            calls();
            const std::int64_t ours = before.since(), theirs = before.mallocs(), largest = support::malloc_largest;
            MESSAGE("T = ", tokens, ": oneDNN allocates ", theirs, " times in ", products.since(), " products, at most ", largest, " bytes");
            CHECK(ours == 0);
            CHECK(products.since() > 0);
            CHECK(theirs <= products.since() + ex.threads()); // a thread's own data, when it first meets oneDNN
            sizes.push_back(largest);
        }
        CHECK(sizes[0] <= sizes[1]);
        CHECK(sizes[2] == sizes[1]);
        CHECK(sizes[3] == sizes[1]);
    }
}

} // namespace onednn_cases
