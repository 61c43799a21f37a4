// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A layer whose ranks share experts, over memory that the host cannot touch and a communicator that moves host memory:
/// the same bits as where the host reaches everything.
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/comm/staged.hpp>
#include <fastmoe/moe.hpp>

#include "support/compare.hpp"
#include "support/executors.hpp"
#include "support/random.hpp"
#if defined(FASTMOE_TEST_CUDA)
#include <fastmoe/cuda/pinned_memory.cuh>
#else
#include "support/queued.hpp"
#endif

using namespace fastmoe;

namespace {

#if !defined(FASTMOE_TEST_CUDA)
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

host_memory heap;
#endif

constexpr int64_t width = 20, experts = 5, most_tokens = 23;

template <class Executor>
std::unique_ptr<Executor> make()
{
    if constexpr (requires { support::column<Executor>::make_for_rank(); })
        return std::unique_ptr<Executor>(new Executor(support::column<Executor>::make_for_rank()));
    else return std::make_unique<Executor>();
}

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
    const auto made = make<Executor>();
    Executor& ex = *made;
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

/// Moved through the host in whole and in parts as where ranks reach each other's memory.
/// @tparam Near, Far  executors of the latter and of the former
template <class Near, class Far, class Exchange>
void has_the_same_bits(memory_resource& memory, const Exchange& exchange, int chunks = 1)
{
    FASTMOE_SEEDED(rng, 81);
    for (const int ranks : {1, 2, 3, 4}) {
        std::vector<int64_t> tokens;
        for (int r = 0; r < ranks; ++r) tokens.push_back(r == 1 ? 0 : rng.integer(1, most_tokens));
        const auto seed = rng.bits();
        std::vector<results> expected(ranks), whole(ranks), parts(ranks);
        run_ranks(ranks, [&](const threads& c) {
            const int r = c.rank();
            expected[r] = step<Near>(c, exchange, chunks, tokens[r], seed);
            whole[r] = step<Far>(staged(c, 1 << 20, memory), exchange, chunks, tokens[r], seed);
            parts[r] = step<Far>(staged(c, 600, memory), exchange, chunks, tokens[r], seed);
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

#if defined(FASTMOE_TEST_CUDA) // nvcc takes no queue: the GPU alone

TEST_CASE_TEMPLATE("staged, every exchange on the GPU has the bits that it has where streams read each other's memory", Executor,
                   cuda_executor)
{
    FASTMOE_NEEDS(support::column<Executor>);
    pinned_memory pinned;
    has_the_same_bits<Executor, Executor>(pinned, exact_exchange<>{});
    has_the_same_bits<Executor, Executor>(pinned, exact_exchange<>{}, 3);
    has_the_same_bits<Executor, Executor>(pinned, padded_exchange<>{.rows_per_rank = 7});
    has_the_same_bits<Executor, Executor>(pinned, gathered_exchange<>{});
}

#else

TEST_CASE("staged, the exact exchange has the bits that it has on the host, at once and in chunks")
{
    has_the_same_bits<immediate, support::queued>(heap, exact_exchange<>{});
    has_the_same_bits<immediate, support::queued>(heap, exact_exchange<>{}, 3);
}

TEST_CASE("staged, the padded exchange has the bits that it has on the host")
{
    has_the_same_bits<immediate, support::queued>(heap, padded_exchange<>{.rows_per_rank = 7});
}

TEST_CASE("staged, the gathered exchange has the bits that it has on the host, whether it is told the most tokens or asks")
{
    has_the_same_bits<immediate, support::queued>(heap, gathered_exchange<>{});
    has_the_same_bits<immediate, support::queued>(heap, gathered_exchange<>{.most_tokens = most_tokens});
}

namespace {

/// Says how many bytes are copied to the host and from it.
struct metered : support::queued {
    int64_t bytes = 0;

    struct copy_bytes {
        void* to;
        const void* from;
        int64_t n;
        void operator()(int64_t) const { std::memcpy(to, from, static_cast<std::size_t>(n)); }
    };
    void copy(void* to, const void* from, int64_t n)
    {
        bytes += n;
        for_each(1, copy_bytes{to, from, n});
    }
    void copy_to_host(void* to, const void* from, int64_t n)
    {
        bytes += n;
        queued::copy_to_host(to, from, n);
    }
};

/// What the exact exchange of T tokens with two of six experts learns in its first half.
template <class Executor, class C>
exchange_sizes announced(Executor& ex, const C& c, int64_t tokens)
{
    support::random own(static_cast<std::uint64_t>(c.rank()) + 5);
    std::vector<int32_t> experts;
    for (int64_t t = 0; t < tokens; ++t) {
        const auto order = own.permutation(6);
        for (int k = 0; k < 2; ++k) experts.push_back(own.coin(0.2) ? -1 : order[k]);
    }
    const auto ids = support::upload(ex, experts);
    const auto weights = support::upload(ex, std::vector<float>(experts.size(), 1.f));
    const routing<float> route{tokens, 6, 2, vector_view<int32_t>(const_cast<int32_t*>(ids.data()), std::ssize(experts)),
                               vector_view<float>(const_cast<float*>(weights.data()), std::ssize(experts)), {}};
    const placed_experts<block_placement> place{{}, 6, c.size(), 1, c.rank()};
    buffer<std::byte, Executor> room(ex, 1 << 16);
    arena memory(room.view());
    const exact_exchange<> exchange;
    auto state = exchange.template reserve<float>(memory, route, place);
    exchange.announce(ex, c, route, place, state, memory);
    ex.synchronize();
    return exchange.sizes(state);
}

} // namespace

TEST_CASE("staged, the counts of the exact exchange come to the host once, and go back once")
{
    run_ranks(3, [](const threads& c) {
        immediate near;
        metered far;
        const exchange_sizes here = announced(near, c, 4 + 3 * c.rank()), there = announced(far, staged(c, 1 << 12, heap), 4 + 3 * c.rank());
        CHECK_GT(here.rows, 0);
        CHECK_EQ(there.rows, here.rows);
        CHECK_EQ(there.choices, here.choices);
        CHECK_EQ(there.sent_rows, here.sent_rows);
        CHECK_EQ(there.sent_choices, here.sent_choices);
        CHECK_EQ(far.bytes, 2 * 16 * 3); // rows and choices for each rank, and from each
    });
}

#endif
