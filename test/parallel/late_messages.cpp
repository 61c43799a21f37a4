// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A rank is lost in the middle of a message, and goes on later: memory that the library took for a call, where the message
/// may arrive then, never goes back to the resource.
#include <doctest/doctest.h>

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include <fastmoe/comm/staged.hpp>
#include <fastmoe/comm/threads.hpp>
#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/io/sharded_save.hpp>
#include <fastmoe/moe.hpp>

#include "support/communicator_cases.hpp"
#include "support/losing_communicator.hpp"
#include "support/queued.hpp"
#include "support/temporary_folder.hpp"

using namespace fastmoe;

namespace {

using losing = support::losing_communicator<threads>;

/// What happened when the two ranks lost each other in each of a call's messages.
struct tally {
    int64_t messages = 0, in_own_memory = 0;
};

/// each(communicator, executor) calls the library with `ex`, and only with `ex` on memory of the resource that is watched.
template <class Each>
tally lose_in_every_message(const Each& each)
{
    tally out;
    for (int64_t at = 0;; ++at) {
        support::loss lost[2];
        support::remembering_memory memory[2];
        run_ranks(2, [&](const threads& c) {
            const int r = c.rank();
            host_executor ex({.threads = 1, .memory = &memory[r]});
            try {
                each(losing(c.split(0, r), lost[r]), ex, [&] { lost[r].lose_at = lost[r].calls + at; });
            } catch (const comm_error& e) {
                CHECK(e.messages_pending);
            }
            c.barrier(ex);
            lost[r].arrive(); // in memory of others it would be AddressSanitizer's
        });
        CHECK_EQ(lost[0].happened(), lost[1].happened());
        if (!lost[0].happened()) return out;
        ++out.messages;
        for (int r = 0; r < 2; ++r) {
            CHECK_EQ(memory[r].lost(lost[r]), 0);
            out.in_own_memory += memory[r].within(lost[r]);
        }
    }
}

std::vector<float> numbers(int64_t n)
{
    std::vector<float> out(static_cast<std::size_t>(n));
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(static_cast<int>(i * 7919 % 1009) - 504) / 504.f;
    return out;
}

enum class call { infer, forward, backward };

template <class Exchange>
tally lose_layer(const Exchange& exchange, int chunks, call which)
{
    constexpr int64_t tokens = 30, width = 8;
    std::vector<float> x[2] = {numbers(tokens * width), numbers(tokens * width)}, y[2], dx[2];
    const auto out = lose_in_every_message([&](const losing& c, host_executor& ex, const auto& from_here) {
        const int r = c.rank();
        const top_k_gate<> gate{.experts = 4, .k = 2, .balance = {.coefficient = .1}};
        const moe_layer layer{gate, mlp<swiglu>{.width = width, .hidden = 8},
                              expert_parallel{c, c, block_placement{}, exchange, 1, received_rows::keep, chunks}};
        host_executor other({.threads = 1});
        const auto w = random_weights<float>(other, layer, 1);
        const auto g = zero_weights<float>(other, layer);
        y[r].assign(tokens * width, 0);
        dx[r].assign(tokens * width, 0);
        if (which == call::infer) {
            from_here();
            layer.infer(ex, as_matrix(x[r], tokens, width), w.view(), as_matrix(y[r], tokens, width));
            return;
        }
        if (which == call::forward) from_here();
        const auto saved = layer.forward(ex, as_matrix(x[r], tokens, width), w.view(), as_matrix(y[r], tokens, width));
        if (which == call::backward) from_here();
        layer.backward(ex, saved, as_matrix(x[r], tokens, width), w.view(), as_matrix(dx[r], tokens, width), g.view());
    });
    return out;
}

} // namespace

TEST_CASE("a layer's own memory, for every exchange and in chunks")
{
    const auto look = [](const auto& exchange, const char* name) {
        for (const int chunks : {1, 3})
            for (const call which : {call::infer, call::forward, call::backward}) {
                INFO(name, ", chunks ", chunks, ", call ", static_cast<int>(which));
                const tally t = lose_layer(exchange, chunks, which);
                CHECK(t.messages >= 2);
                CHECK(t.in_own_memory >= 2 * t.messages); // sent from or received into, on two ranks
            }
    };
    look(exact_exchange<>{}, "exact");
    look(padded_exchange<>{.rows_per_rank = 60}, "padded");
    look(gathered_exchange<>{}, "gathered");
}

TEST_CASE("counts that the host reads, where the executor's memory is staged")
{
    constexpr int64_t tokens = 30, width = 8;
    for (int64_t at = 0;; ++at) {
        support::loss lost[2];
        support::remembering_memory memory[2];
        run_ranks(2, [&](const threads& c) {
            const int r = c.rank();
            support::queued ex;
            try {
                const staged<losing> over(losing(c.split(0, r), lost[r]), 1 << 16, memory[r]);
                lost[r].lose_at = at;
                const moe_layer layer{top_k_gate<>{.experts = 4, .k = 2}, mlp<swiglu>{.width = width, .hidden = 8},
                                      expert_parallel{over, over}};
                const auto w = random_weights<float>(ex, layer, 1);
                auto x = support::upload(ex, numbers(tokens * width));
                buffer<float, support::queued> y(ex, tokens * width);
                layer.infer(ex, x.matrix(tokens, width), w.view(), y.matrix(tokens, width));
            } catch (const comm_error& e) {
                CHECK(e.messages_pending);
            }
            c.barrier(ex);
            lost[r].arrive(); // in host memory, none of which may have been given back: AddressSanitizer looks
        });
        CHECK_EQ(lost[0].happened(), lost[1].happened());
        if (!lost[0].happened()) {
            CHECK(at > 4);
            break;
        }
    }
}

TEST_CASE("messages that are pending beside work that fails are told rather than the failure of the work")
{
    support::remembering_memory memory;
    host_executor ex({.threads = 1, .memory = &memory});
    const auto run = [&](bool pending) {
        std::atomic<bool> lost{false};
        buffer<std::byte, host_executor> lent(ex, 64);
        call_on(
            [&] {
                detail::overlap_pieces(
                    ex, 2,
                    [&](auto&, int i) {
                        if (i == 0) return;
                        lost = true;
                        raise<comm_error>("a rank was lost", location::current(), pending);
                    },
                    [&](auto&, int) {
                        while (!lost) std::this_thread::yield();
                        throw std::runtime_error("the work failed");
                    },
                    [&](auto&, int) {});
            },
            lent);
    };
    CHECK_THROWS_WITH_AS(run(true), doctest::Contains("a rank was lost"), comm_error);
    CHECK_EQ(memory.given_back(), 0);
    CHECK_THROWS_WITH_AS(run(false), "the work failed", std::runtime_error);
    CHECK_EQ(memory.given_back(), 1);
}

TEST_CASE("synchronized and clipped gradients, initial values, and a checkpoint's agreement")
{
    std::vector<float> a[2], b[2];
    const support::temporary_folder folder;
    const auto with = [&](const auto& verb) {
        return lose_in_every_message([&](const losing& c, host_executor& ex, const auto& from_here) {
            const int r = c.rank();
            a[r].assign(300, 1.f), b[r].assign(50, 2.f);
            const parameter_view list[] = {as_parameter(as_vector(a[r]), as_vector(a[r]), parameter_tag::world),
                                           as_parameter(as_vector(b[r]), as_vector(b[r]), parameter_tag::data)};
            from_here();
            verb(ex, vector_view<const parameter_view>(list, 2), c);
        });
    };
    const auto synchronized = with([](host_executor& ex, const auto& all, const losing& c) {
        synchronize_gradients(ex, all, c, c, {.bucket_bytes = 400});
    });
    CHECK(synchronized.messages > 2);
    CHECK(synchronized.in_own_memory >= 2);
    const auto clipped = with([](host_executor& ex, const auto& all, const losing& c) { clip_gradients(ex, all, c, c, 0.5); });
    CHECK(clipped.messages > 0);
    CHECK(clipped.in_own_memory >= 2);
    CHECK(with([](host_executor& ex, const auto& all, const losing& c) { all_finite(ex, all, c); }).in_own_memory >= 2);
    CHECK(with([](host_executor& ex, const auto& all, const losing& c) { broadcast_parameters(ex, all, c, c); }).messages > 2);
    CHECK(with([&](host_executor& ex, const auto&, const losing& c) {
              io::save_sharded_checkpoint(ex, folder / "c", {}, c);
          }).in_own_memory >= 2);
}
