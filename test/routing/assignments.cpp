// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What holds of every assignment that reads all tokens at once, for shapes of any size: bounds, no expert twice in a token,
/// the same result for any number of threads, any instruction set and on lanes.
#include <doctest/doctest.h>

#include <limits>
#include <memory>

#include <fastmoe/moe.hpp>

#include "support/assigned.hpp"

namespace fm = fastmoe;
using fm::int64_t;

namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan_ = std::numeric_limits<double>::quiet_NaN();

/// The executors that must agree to the bit: one thread, two, and four.
struct several_hosts {
    std::vector<std::unique_ptr<fm::host_executor>> all;

    several_hosts()
    {
        for (int threads : {1, 2, 4})
            all.push_back(std::make_unique<fm::host_executor>(fm::host_options{.threads = threads}));
    }
};

/// Random logits of one of several kinds; all may be masked or not finite.
support::random_batch<float> any_batch(support::random& rng, int64_t tokens, int64_t experts)
{
    const int kind = static_cast<int>(rng.integer(0, 4));
    support::random_batch<float> b(rng, tokens, experts, kind == 4 ? 1000 : 1.5, rng.coin() ? 0.2 : 0.0);
    for (float& l : b.stored) {
        if (kind == 1) l = static_cast<float>(rng.integer(-1, 1));
        if (kind == 2 && rng.coin(0.3)) l = static_cast<float>(rng.one_of(inf, -inf, nan_, 0.0));
        if (kind == 3) l += static_cast<float>(30 * ((&l - b.stored.data()) % experts) / experts);
    }
    b.widen();
    return b;
}

template <class Executor, class Gate>
auto run(Executor& ex, const Gate& gate, const support::random_batch<float>& b, fm::gate_mode mode)
{
    fm::arena measure;
    const auto choices = fm::reserve_gate<float>(gate, measure, b.tokens).routing.choices();
    return support::gate_run(ex, gate, b.tokens, b.stored, std::vector<float>(choices, 0.5f), mode, b.mask);
}

/// @param on_lanes  whether the shape is small enough for four threads to take turns
template <class Gate>
void holds(several_hosts& hosts, const Gate& gate, const support::random_batch<float>& b, bool on_lanes)
{
    CAPTURE(gate.experts);
    CAPTURE(gate.k);
    CAPTURE(b.tokens);
    for (auto mode : {fm::gate_mode::training, fm::gate_mode::inference}) {
        const auto first = run(*hosts.all[0], gate, b, mode);
        support::holds_together(first, b, gate.k);
        for (std::size_t i = 1; i < hosts.all.size(); ++i) {
            const auto other = run(*hosts.all[i], gate, b, mode);
            REQUIRE_EQ(other.experts, first.experts);
            REQUIRE_EQ(other.first, first.first);
            REQUIRE(support::same_bits(other.weights, first.weights));
            REQUIRE(support::same_bits(other.dlogits, first.dlogits));
        }
        for (auto best : {fm::instruction_set::baseline, fm::instruction_set::avx2}) {
            if (best > fm::native_instruction_set()) continue;
            fm::host_executor plain({.threads = 1, .best = best});
            const auto other = run(plain, gate, b, mode);
            REQUIRE_EQ(other.experts, first.experts);
            REQUIRE_EQ(other.first, first.first);
        }
        if (!on_lanes) continue;
        support::lanes lanes;
        const auto other = run(lanes, gate, b, mode);
        REQUIRE_EQ(other.experts, first.experts);
        REQUIRE_EQ(other.first, first.first);
    }
}

/// How many tokens each expert serves.
template <class Run>
std::vector<int64_t> loads(const Run& r, int64_t experts)
{
    std::vector<int64_t> out(experts);
    for (auto e : r.experts)
        if (e >= 0) ++out[e];
    return out;
}

struct shape {
    int64_t tokens, experts, k;
    bool small;
};

/// E from 1 to 2048, T from 0, K from 1 to E.
std::vector<shape> shapes(support::random& rng)
{
    std::vector<shape> out{{0, 1, 1, true}, {1, 1, 1, true}, {0, 2048, 1, false}, {3, 2048, 2048, false},
                           {65, 2048, 2, false}, {64, 5, 5, false}, {65, 3, 2, true}, {300, 1, 1, false}};
    for (int i = 0; i < 10; ++i) {
        const int64_t experts = rng.integer(1, 12);
        out.push_back({rng.integer(0, 24), experts, rng.integer(1, experts), i % 2 == 0});
    }
    for (int i = 0; i < 6; ++i) {
        const int64_t experts = rng.one_of(20, 64, 100, 129, 300), tokens = rng.integer(1, 30000 / experts);
        out.push_back({tokens, experts, rng.integer(1, rng.coin() ? experts : 8), false});
    }
    return out;
}

} // namespace

TEST_CASE("expert choice keeps its bounds, and is the same with any threads, lanes and instruction set")
{
    FASTMOE_SEEDED(rng, 101);
    several_hosts hosts;
    for (const shape& s : shapes(rng)) {
        const auto b = any_batch(rng, s.tokens, s.experts);
        const fm::expert_choice_gate gate{.experts = s.experts, .k = s.k};
        holds(hosts, gate, b, s.small);
        const int64_t each = std::min((s.tokens * s.k + s.experts - 1) / s.experts, b.open_tokens());
        for (int64_t n : loads(run(*hosts.all[0], gate, b, fm::gate_mode::training), s.experts)) REQUIRE_EQ(n, each);
    }
}

TEST_CASE("token rounding keeps its bounds, and is the same with any threads, lanes and instruction set")
{
    FASTMOE_SEEDED(rng, 102);
    several_hosts hosts;
    for (const shape& s : shapes(rng)) {
        const auto b = any_batch(rng, s.tokens, s.experts);
        fm::token_rounding_gate gate{.experts = s.experts, .k = s.k};
        gate.assignment.tile = rng.integer(1, 16);
        gate.assignment.rounding = rng.one_of(fm::tile_rounding::nearest, fm::tile_rounding::up, fm::tile_rounding::down);
        holds(hosts, gate, b, s.small);
        const auto plain = loads(run(*hosts.all[0], gate, b, fm::gate_mode::inference), s.experts);
        const auto whole = loads(run(*hosts.all[0], gate, b, fm::gate_mode::training), s.experts);
        for (int64_t e = 0; e < s.experts; ++e) {
            REQUIRE((whole[e] % gate.assignment.tile == 0 || whole[e] == b.open_tokens()));
            REQUIRE(std::abs(whole[e] - plain[e]) < gate.assignment.tile);
        }
    }
}

TEST_CASE("Sinkhorn keeps its bounds, and is the same with any threads, lanes and instruction set")
{
    FASTMOE_SEEDED(rng, 103);
    several_hosts hosts;
    for (const shape& s : shapes(rng)) {
        const auto b = any_batch(rng, s.tokens, s.experts);
        fm::sinkhorn_gate gate{.experts = s.experts, .k = s.k};
        gate.assignment.rounds = s.small ? 3 : 8;
        holds(hosts, gate, b, s.small);
        const auto r = run(*hosts.all[0], gate, b, fm::gate_mode::training);
        for (int64_t t = 0; t < s.tokens; ++t) {
            const auto row = r.experts.begin() + t * s.k;
            REQUIRE_EQ(std::count(row, row + s.k, -1), b.open(t) ? 0 : s.k);
        }
    }
}

TEST_CASE("the balanced assignment keeps its bounds, and is the same with any threads, lanes and instruction set")
{
    FASTMOE_SEEDED(rng, 104);
    several_hosts hosts;
    for (const shape& s : shapes(rng)) {
        const auto b = any_batch(rng, s.tokens, s.experts);
        const fm::base_gate gate{.experts = s.experts};
        holds(hosts, gate, b, s.small);
        const auto r = run(*hosts.all[0], gate, b, fm::gate_mode::training);
        const int64_t most = (b.open_tokens() + s.experts - 1) / s.experts;
        for (int64_t n : loads(r, s.experts)) REQUIRE(n <= most);
        for (int64_t t = 0; t < s.tokens; ++t) REQUIRE_EQ(r.experts[t] >= 0, b.open(t));
    }
}
