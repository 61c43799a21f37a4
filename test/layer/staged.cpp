// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A layer whose ranks share experts, over memory that the host cannot touch and a communicator that moves host memory:
/// the same bits as where the host reaches everything.
#include <cmath>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/comm/staged.hpp>
#include <fastmoe/moe.hpp>

#include "support/compare.hpp"
#include "support/executors.hpp"
#include "support/queued.hpp"
#include "support/random.hpp"

using namespace fastmoe;

namespace {

/// The loops of `queued` over the host's memory, at once.
class immediate {
public:
    static constexpr bool readable_memory = true;

    immediate() : scratch_(static_cast<std::byte*>(heap_.allocate(team_scratch_bytes))) { detail::clear(words_); }
    immediate(const immediate&) = delete;
    immediate& operator=(const immediate&) = delete;
    ~immediate() { heap_.deallocate(scratch_, team_scratch_bytes); }

    void* allocate(int64_t bytes) { return heap_.allocate(bytes); }
    void deallocate(void* memory, int64_t bytes) noexcept { heap_.deallocate(memory, bytes); }
    template <class F>
    void for_each(int64_t n, const F& f)
    {
        for (int64_t i = 0; i < n; ++i) f(i);
    }
    template <class F>
    void for_each_row(int64_t n, const F& f, row_hint)
    {
        for (int64_t row = 0; row < n; ++row) {
            single_lane_team team(scratch_);
            f(team, row);
        }
    }
    fault_recorder faults() noexcept { return {&words_}; }
    void deliver_faults()
    {
        fault found;
        const bool any = detail::first_fault(words_, found);
        detail::clear(words_);
        if (any) detail::raise_fault(found);
    }
    void synchronize() { deliver_faults(); }

private:
    host_memory heap_;
    std::byte* scratch_;
    fault_words words_;
};
static_assert(executor<immediate> && has_readable_memory<immediate>);

constexpr int64_t width = 20, experts = 5, most_tokens = 23;

host_memory heap;

/// What a rank of a training step and of inference has written.
using results = std::vector<float>;

template <class Executor, class C, class Exchange>
results step(const C& ranks, const Exchange& exchange, int chunks, int64_t tokens, std::uint64_t seed)
{
    using gate_type = top_k_gate<softmax_score>;
    const gate_type gate{.experts = experts, .k = 2, .capacity = {.factor = 1.25, .over = capacity_scope::all_ranks},
                         .balance = {.coefficient = 0.01}, .z = {.coefficient = 0.001}};
    const moe_layer layer{gate, mlp<swiglu>{.width = width, .hidden = 12, .biases = true},
                          expert_parallel{ranks, ranks, round_robin_placement{}, exchange, 1, received_rows::keep, chunks}};
    Executor ex;
    support::random rng(seed + static_cast<std::uint64_t>(ranks.rank()));
    auto x = support::upload(ex, support::normal_vector<float>(rng, tokens * width, 1));
    auto dy = support::upload(ex, support::normal_vector<float>(rng, tokens * width, 1));
    buffer<float, Executor> y(ex, tokens * width), inferred(ex, tokens * width), dx(ex, tokens * width);
    const auto weights = random_weights<float>(ex, layer, 1);
    auto gradients = zero_weights<float>(ex, layer);
    const auto matrix = [&](auto& m) { return m.matrix(tokens, width); };
    {
        const auto saved = layer.forward(ex, matrix(x), weights.view(), matrix(y));
        layer.backward(ex, saved, matrix(dy), weights.view(), matrix(dx), gradients.view());
    }
    layer.infer(ex, matrix(x), weights.view(), matrix(inferred));
    ranks.all_reduce(ex, vector_view<float>(gradients.view().gate.data_handle(), experts * width));
    results out;
    const auto add = [&](const auto& view) {
        for (const float v : support::download(ex, view)) out.push_back(v);
    };
    add(y.view()), add(inferred.view()), add(dx.view());
    add(vector_view<const float>(gradients.view().gate.data_handle(), experts * width));
    const auto up = gradients.view().expert.up, down = gradients.view().expert.down;
    add(vector_view<const float>(up.data, up.experts * up.out * up.in));
    add(vector_view<const float>(down.data, down.experts * down.out * down.in));
    return out;
}

template <class Exchange>
void same_bits_as_on_the_host(const Exchange& exchange, int chunks = 1)
{
    FASTMOE_SEEDED(rng, 81);
    for (const int ranks : {1, 2, 3, 4}) {
        std::vector<int64_t> tokens;
        for (int r = 0; r < ranks; ++r) tokens.push_back(r == 1 ? 0 : rng.integer(1, most_tokens));
        const auto seed = rng.bits();
        std::vector<results> expected(ranks), whole(ranks), parts(ranks);
        run_ranks(ranks, [&](const threads& c) {
            const int r = c.rank();
            expected[r] = step<immediate>(c, exchange, chunks, tokens[r], seed);
            whole[r] = step<support::queued>(staged(c, 1 << 20, heap), exchange, chunks, tokens[r], seed);
            parts[r] = step<support::queued>(staged(c, 600, heap), exchange, chunks, tokens[r], seed);
        });
        for (int r = 0; r < ranks; ++r) {
            INFO("rank ", r, " of ", ranks, ", ", tokens[r], " tokens");
            double size = 0;
            for (const float v : expected[r]) size += std::fabs(double(v));
            if (tokens[r] > 0) CHECK(size > 1);
            CHECK(support::same_bits(whole[r], expected[r]));
            CHECK(support::same_bits(parts[r], expected[r]));
        }
    }
}

} // namespace

TEST_CASE("staged, the exact exchange has the bits that it has on the host, at once and in chunks")
{
    same_bits_as_on_the_host(exact_exchange<>{});
    same_bits_as_on_the_host(exact_exchange<>{}, 3);
}

TEST_CASE("staged, the padded exchange has the bits that it has on the host")
{
    same_bits_as_on_the_host(padded_exchange<>{.rows_per_rank = 7});
}

TEST_CASE("staged, the gathered exchange has the bits that it has on the host, whether it is told the most tokens or asks")
{
    same_bits_as_on_the_host(gathered_exchange<>{});
    same_bits_as_on_the_host(gathered_exchange<>{.most_tokens = most_tokens});
}
