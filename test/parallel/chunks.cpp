// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Exchanges in chunks, whose transfers run beside the experts: the oracle's values, the same bits every time, and failures
/// that reach both threads.
#include <doctest/doctest.h>

#include <algorithm>
#include <condition_variable>

#include "support/ranked_layer.hpp"

using namespace fastmoe;

namespace {

using gate_type = top_k_gate<>;
constexpr gate_type small_gate{.experts = 5, .k = 2, .balance = {0.1}, .z = {0.05}};
constexpr mlp<swiglu> small_expert{.width = 12, .hidden = 8, .biases = true};

template <class Exchange>
auto in_chunks(int chunks, const Exchange& exchange, int slices = 1, received_rows rows = received_rows::keep)
{
    return [=](const threads& c) { return expert_parallel{c, c, block_placement{}, exchange, slices, rows, chunks}; };
}

} // namespace

TEST_CASE_TEMPLATE("chunks give the joined batch's outputs and gradients, more of them than tokens too", Cell,
                   FASTMOE_WIDEST_AND_NARROW(host_executor))
{
    FASTMOE_SEEDED(rng, 541);
    const auto batch = ranked::join<Cell>(rng, small_gate, small_expert, 40);
    for (const int ranks : {1, 2, 3})
        for (const int chunks : {2, 3, 8}) {
            INFO("ranks ", ranks, ", chunks ", chunks);
            const ranked::division d{.cuts = ranked::random_cuts(rng, ranks, 40), .two_calls = chunks == 3};
            batch.check(d, in_chunks(chunks, exact_exchange<>{}));
            if (ranks != 2) continue;
            batch.check(d, in_chunks(chunks, padded_exchange<>{.rows_per_rank = 40}, 1, received_rows::fetch_again));
            auto sliced = d;
            sliced.slices = 2;
            if constexpr (std::is_same_v<typename Cell::type, double>) batch.check(sliced, in_chunks(chunks, gathered_exchange<>{}, 2));
        }
}

TEST_CASE_TEMPLATE("with the caller's workspaces, and without an executor beside", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_NEEDS(Cell);
    FASTMOE_SEEDED(rng, 542);
    const auto batch = ranked::join<Cell>(rng, small_gate, small_expert, 14);
    const bool host = std::is_same_v<typename Cell::executor, host_executor>;
    batch.check({.cuts = {0, 8, 14}, .workspaces = host, .two_calls = true}, in_chunks(3, exact_exchange<>{}));
}

TEST_CASE("a piece comes in while the one before is worked on, and goes back while the next is")
{
    host_executor ex({.threads = 1});
    std::mutex mutex;
    std::condition_variable changed;
    std::vector<std::string> log;
    const auto note = [&](const std::string& what) {
        const std::lock_guard lock(mutex);
        log.push_back(what);
        changed.notify_all();
    };
    const auto await = [&](const std::string& what) {
        std::unique_lock lock(mutex);
        return changed.wait_for(lock, std::chrono::seconds(20), [&] { return std::find(log.begin(), log.end(), what) != log.end(); });
    };
    std::atomic<int> met{0};
    detail::overlap_pieces(
        ex, 3,
        [&](host_executor& other, int i) {
            CHECK_NE(&other, &ex);
            note("in " + std::to_string(i));
            if (i > 0) met += await("work " + std::to_string(i - 1)); // would wait in vain if work came later
        },
        [&](host_executor& own, int i) {
            CHECK_EQ(&own, &ex);
            note("work " + std::to_string(i));
            if (i < 2) met += await("in " + std::to_string(i + 1));
            if (i > 0) met += await("out " + std::to_string(i - 1));
        },
        [&](host_executor&, int i) { note("out " + std::to_string(i)); });
    CHECK_EQ(met, 6);
    std::vector<std::string> transfers;
    for (const auto& what : log)
        if (what[0] != 'w') transfers.push_back(what);
    CHECK_EQ(transfers, std::vector<std::string>{"in 0", "in 1", "out 0", "in 2", "out 1", "out 2"});
}

TEST_CASE("chunks give the same bits on every run")
{
    FASTMOE_SEEDED(rng, 543);
    using Cell = support::cell<host_executor, float>;
    const auto batch = ranked::join<Cell>(rng, small_gate, small_expert, 60);
    const ranked::division d{.cuts = {0, 25, 60}};
    const auto first = batch.run(d, in_chunks(4, exact_exchange<>{}));
    for (int run = 0; run < 10; ++run) {
        const auto again = batch.run(d, in_chunks(4, exact_exchange<>{}));
        for (std::size_t r = 0; r < 2; ++r) {
            CHECK(support::same_bits(again[r].y, first[r].y));
            CHECK(support::same_bits(again[r].dx, first[r].dx));
            for (std::size_t l = 0; l < first[r].gradients.size(); ++l)
                CHECK_EQ(again[r].gradients[l].up, first[r].gradients[l].up);
        }
    }
}

TEST_CASE("a number of chunks that makes no sense, or that ranks do not agree on, is an exception")
{
    const auto texts = [](const auto& chunks_of) {
        std::vector<std::string> out(2);
        run_ranks(2, [&](const threads& c) {
            host_executor ex({.threads = 1});
            const moe_layer layer{small_gate, small_expert,
                                  expert_parallel{c, c, block_placement{}, exact_exchange<>{}, 1, received_rows::keep, chunks_of(c.rank())}};
            const auto w = random_weights<float>(ex, layer, 1);
            std::vector<float> x(5 * 12), y(5 * 12);
            out[c.rank()] = support::message_of<error>([&] { layer.infer(ex, as_matrix(x, 5, 12), w.view(), as_matrix(y, 5, 12)); });
        }, {.deadline = std::chrono::seconds(3)});
        return out;
    };
    CHECK(support::has(texts([](int) { return 0; })[0], "chunks is 0; expected 1 to 1024"));
    const auto differ = texts([](int rank) { return 1 + rank; });
    CHECK_NE(differ[0], "nothing was thrown");
    CHECK_NE(differ[1], "nothing was thrown");
}

namespace {
/// An expert that throws where it works on the second chunk.
struct throwing : mlp<swiglu> {
    int* calls;
    template <class Executor, class T>
    void infer(Executor& ex, const expert_input<T>& in, const mlp_weights<const T>& w, matrix_view<T> y, arena& scratch) const
    {
        if (!scratch.measuring() && ++*calls == 2) throw std::runtime_error("the second chunk");
        mlp<swiglu>::infer(ex, in, w, y, scratch);
    }
};
} // namespace

TEST_CASE("an expert that throws between transfers ends the call with its exception, and the others with a comm_error")
{
    std::vector<std::string> out(2);
    CHECK_THROWS_WITH(run_ranks(2, [&](const threads& c) {
        host_executor ex({.threads = 1});
        int calls = c.rank() == 0 ? 0 : 100;
        const throwing expert{small_expert, &calls};
        const moe_layer layer{small_gate, expert,
                              expert_parallel{c, c, block_placement{}, exact_exchange<>{}, 1, received_rows::keep, 4}};
        const auto w = random_weights<float>(ex, layer, 1);
        std::vector<float> x(9 * 12), y(9 * 12);
        try {
            layer.infer(ex, as_matrix(x, 9, 12), w.view(), as_matrix(y, 9, 12));
        } catch (const comm_error& e) {
            out[c.rank()] = e.what();
            throw;
        }
    }, {.deadline = std::chrono::seconds(3)}), "the second chunk");
    CHECK(support::has(out[1], "rank 0 of 2 has left"));
}
