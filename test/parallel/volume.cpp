// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What each exchange moves, to the byte: the volume formulas of the cost model, and the metadata that the headers document.
#include <doctest/doctest.h>

#include "support/compare.hpp"
#include "support/counting_communicator.hpp"

#include <fastmoe/moe.hpp>

using namespace fastmoe;

namespace {

constexpr int64_t experts = 12, k = 3, width = 16;

/// What one rank sent in a forward and a backward pass, and what its routing asks for.
struct sent {
    int64_t forward_bytes = 0, backward_bytes = 0;
    int64_t pairs = 0;   ///< (token, other rank that holds one of its experts)
    int64_t choices = 0; ///< of experts on other ranks
    int64_t tokens = 0;
    int64_t asked = 0;   ///< pairs of other ranks' tokens with this rank: rows that go back
    int64_t asked_choices = 0;
};

/// A step without losses, whose only collectives are the exchange's.
template <class T, class Exchange>
std::vector<sent> step(int ranks, const std::vector<int64_t>& tokens, const Exchange& exchange, received_rows rows = received_rows::keep)
{
    std::vector<sent> out(static_cast<std::size_t>(ranks));
    std::vector<std::vector<int64_t>> pairs_to(out.size(), std::vector<int64_t>(out.size())), choices_to = pairs_to;
    run_ranks(ranks, [&](const threads& plain) {
        const support::counting_communicator<threads> c(plain);
        const int r = c.rank();
        host_executor ex({.threads = 1});
        const moe_layer layer{top_k_gate<>{.experts = experts, .k = k}, mlp<swiglu>{.width = width, .hidden = 8},
                              expert_parallel{c, c, round_robin_placement{}, exchange, 1, rows}};
        const auto w = random_weights<T>(ex, layer, 5);
        const auto g = zero_weights<T>(ex, layer);
        support::random rng(static_cast<std::uint64_t>(600 + r));
        const int64_t n = tokens[r];
        const auto x = support::normal_vector<T>(rng, n * width);
        std::vector<T> y(x.size()), dx(x.size());
        const matrix_view<const T> in(x.data(), n, width);
        auto& s = out[r];
        s.tokens = n;
        c.log().reset();
        const auto saved = layer.forward(ex, in, w.view(), as_matrix(y, n, width));
        s.forward_bytes = c.log().of().bytes;
        c.log().reset();
        layer.backward(ex, saved, in, w.view(), as_matrix(dx, n, width), g.view());
        s.backward_bytes = c.log().of().bytes;
        for (int64_t t = 0; t < n; ++t)
            for (int other = 0; other < ranks; ++other) {
                int64_t here = 0;
                for (int64_t i = 0; i < k; ++i) here += saved.routing().experts(t * k + i) % ranks == other;
                pairs_to[r][other] += here > 0;
                choices_to[r][other] += here;
            }
    });
    for (std::size_t a = 0; a < out.size(); ++a)
        for (std::size_t b = 0; b < out.size(); ++b) {
            if (a == b) continue;
            out[a].pairs += pairs_to[a][b];
            out[a].choices += choices_to[a][b];
            out[b].asked += pairs_to[a][b];
            out[b].asked_choices += choices_to[a][b];
        }
    return out;
}

template <class T>
void exact(int ranks, const std::vector<int64_t>& tokens)
{
    using real = accumulate_t<T>;
    constexpr int64_t element = sizeof(T), partial = sizeof(real);
    for (const auto& s : step<T>(ranks, tokens, exact_exchange<>{})) {
        const int64_t others = ranks - 1;
        CHECK_EQ(s.forward_bytes, s.pairs * width * element      // each token once to each other rank that holds an expert of it
                                      + s.asked * width * partial // one partial row back
                                      + 16 * others               // counts
                                      + 4 * s.pairs + s.choices * (4 + partial));
        CHECK_EQ(s.backward_bytes, s.pairs * width * element + s.asked * width * partial + s.asked_choices * partial);
        CHECK_LE(s.pairs, s.tokens * std::min<int64_t>(k, others));
    }
    for (const auto& s : step<T>(ranks, tokens, exact_exchange<rounded_partials>{}, received_rows::fetch_again)) {
        CHECK_EQ(s.forward_bytes, (s.pairs + s.asked) * width * element + 16 * (ranks - 1) + 4 * s.pairs + s.choices * (4 + partial));
        CHECK_EQ(s.backward_bytes, (2 * s.pairs + s.asked) * width * element + s.asked_choices * partial);
    }
}

} // namespace

TEST_CASE("the exact exchange moves each token once to each other rank that holds one of its experts, and documented metadata")
{
    for (const int ranks : {1, 2, 3, 4, 8}) {
        std::vector<int64_t> tokens;
        for (int r = 0; r < ranks; ++r) tokens.push_back(7 * r % 23);
        exact<float>(ranks, tokens);
        exact<bfloat16>(ranks, tokens);
        exact<double>(ranks, tokens);
    }
}

TEST_CASE("the padded exchange moves its budget, whatever the load")
{
    const int64_t budget = 11, ranks = 3;
    for (const auto& s : step<bfloat16>(3, {4, 0, 11}, padded_exchange<>{.rows_per_rank = budget})) {
        const int64_t rows = budget * (ranks - 1);
        CHECK_EQ(s.forward_bytes, rows * (width * 2 + width * 4 + k * 8));
        CHECK_EQ(s.backward_bytes, rows * (width * 2 + width * 4 + k * 4));
    }
}

TEST_CASE("the gathered exchange moves all tokens to all ranks")
{
    const int64_t most = 11, ranks = 3;
    for (const auto& s : step<bfloat16>(3, {4, 0, 11}, gathered_exchange<>{})) {
        const int64_t rows = most * (ranks - 1);
        CHECK_EQ(s.forward_bytes, rows * (width * 2 + width * 4 + k * 8) + 16 * (ranks - 1)); // token counts are agreed
        CHECK_EQ(s.backward_bytes, rows * (width * 2 + width * 4 + k * 4));
    }
    for (const auto& s : step<bfloat16>(3, {4, 0, 11}, gathered_exchange<>{.most_tokens = most}))
        CHECK_EQ(s.forward_bytes, most * (ranks - 1) * (width * 2 + width * 4 + k * 8));
}
