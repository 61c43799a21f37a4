// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <fastmoe/routing/plan.hpp>

#include <algorithm>
#include <numeric>

#include "support/executors.hpp"
#include "support/scratch.hpp"
#include "support/warps.hpp"

using namespace fastmoe;

namespace {

struct host_plan {
    std::vector<int32_t> counts, slot_of, choice_of, token_of;
    std::vector<int64_t> offsets;
    bool operator==(const host_plan&) const = default;
};

/// The definition, by sorting (expert, choice) pairs.
host_plan expected_plan(const std::vector<int32_t>& experts, const std::vector<int32_t>& first, int64_t total,
                        int64_t alignment)
{
    host_plan p;
    p.counts.assign(total, 0);
    std::vector<std::pair<int32_t, int32_t>> sorted;
    for (std::size_t c = 0; c < experts.size(); ++c)
        if (experts[c] >= 0) {
            sorted.push_back({experts[c], static_cast<int32_t>(c)});
            ++p.counts[experts[c]];
        }
    std::sort(sorted.begin(), sorted.end());
    p.offsets.assign(total + 1, 0);
    for (int64_t e = 0; e < total; ++e)
        p.offsets[e + 1] = p.offsets[e] + (p.counts[e] + alignment - 1) / alignment * alignment;
    const auto held = std::min(experts.size(), (first.size() - 1) * static_cast<std::size_t>(total)); // a token has an expert once
    const auto slots = held + total * (alignment - 1);
    p.slot_of.assign(experts.size(), -1);
    p.choice_of.assign(slots, -1);
    p.token_of.assign(slots, -1);
    std::vector<int64_t> next(p.offsets.begin(), p.offsets.end() - 1);
    for (const auto& [e, c] : sorted) {
        const auto s = next[e]++;
        p.slot_of[c] = static_cast<int32_t>(s);
        p.choice_of[s] = c;
        p.token_of[s] = static_cast<int32_t>(std::upper_bound(first.begin(), first.end(), c) - first.begin() - 1);
    }
    return p;
}

struct choices {
    std::vector<int32_t> experts, first;
    int64_t tokens = 0, k = 0;
};

/// Different experts in a token, some dropped. K < 0: ragged, up to -K choices.
choices random_choices(support::random& r, int64_t tokens, int64_t experts, int64_t k)
{
    choices out{{}, {0}, tokens, k > 0 ? k : 0};
    for (int64_t t = 0; t < tokens; ++t) {
        const auto order = r.permutation(experts);
        const int64_t n = k >= 0 ? k : r.integer(0, -k);
        for (int64_t j = 0; j < n; ++j) out.experts.push_back(r.coin(0.1) ? -1 : order[j]);
        out.first.push_back(static_cast<int32_t>(out.experts.size()));
    }
    return out;
}

template <class Executor>
host_plan run_plan(Executor& ex, const choices& c, int64_t total, int64_t alignment)
{
    auto experts = support::upload(ex, c.experts);
    auto first = support::upload(ex, c.first);
    buffer<float, Executor> weights(ex, experts.size());
    const routing<float> route{c.tokens, total, c.k, experts.view(), weights.view(),
                               c.k ? vector_view<const int32_t>{} : first.view()};
    host_plan out;
    support::in_workspace(ex, [&](arena& memory) {
        const plan p = reserve_plan(memory, c.tokens, route.choices(), total, alignment);
        make_plan(ex, route, p, memory);
        if (memory.measuring()) return;
        out.counts = support::download(ex, p.counts);
        out.slot_of = support::download(ex, p.slot_of);
        out.choice_of = support::download(ex, p.choice_of);
        out.token_of = support::download(ex, p.token_of);
        out.offsets = support::download(ex, p.offsets);
    });
    return out;
}

} // namespace

TEST_CASE_TEMPLATE("where tokens list more choices than there are experts here, slots are those that can be taken, and all may be", Cell,
                   FASTMOE_EXECUTORS_AND_WARPS)
{
    FASTMOE_SEEDED(r, 12);
    FASTMOE_EXECUTOR(ex, Cell);
    for (int round = 0; round < 30; ++round) {
        const int64_t listed = r.integer(2, 12), here = r.integer(0, listed - 1), tokens = r.integer(0, 200);
        const int64_t k = r.coin(0.3) ? -listed : listed, alignment = r.one_of<int64_t>(1, 4);
        CAPTURE(listed);
        CAPTURE(here);
        CAPTURE(tokens);
        CAPTURE(alignment);
        choices c = random_choices(r, tokens, listed, k);
        if (round % 2 == 0 && k > 0) // every token has all experts of this rank
            for (int64_t t = 0; t < tokens; ++t)
                for (int64_t j = 0; j < k; ++j) c.experts[t * k + j] = static_cast<int32_t>((t + j) % listed);
        for (int32_t& e : c.experts)
            if (e >= here) e = -1; // of other ranks
        CHECK(run_plan(ex, c, here, alignment) == expected_plan(c.experts, c.first, here, alignment));
    }
    arena all, few;
    reserve_plan(all, 1024, 8192, 8);
    reserve_plan(few, 1024, 8192, 2);
    CHECK_EQ(all.bytes() - few.bytes(), 6 * 1024 * 8); // slots that it does without, each of two int32
}

TEST_CASE_TEMPLATE("a plan is the stable sort of choices by expert", Cell, FASTMOE_EXECUTORS_AND_WARPS)
{
    FASTMOE_SEEDED(r, 11);
    FASTMOE_EXECUTOR(ex, Cell);
    for (int round = 0; round < 40; ++round) {
        const int64_t total = r.integer(1, round % 5 == 0 ? 1000 : 40);
        const bool host = std::is_same_v<typename Cell::executor, host_executor>;
        const int64_t tokens = r.one_of<int64_t>(0, 1, 3, 100, r.integer(1, host ? 3000 : 700));
        const int64_t most = std::min<int64_t>(total, host ? 40 : 20);
        const int64_t k = r.coin(0.3) ? -most : r.integer(1, most);
        const int64_t alignment = r.one_of<int64_t>(1, 1, 8, 128);
        CAPTURE(tokens);
        CAPTURE(total);
        CAPTURE(k);
        CAPTURE(alignment);
        const auto c = random_choices(r, tokens, total, k);
        CHECK(run_plan(ex, c, total, alignment) == expected_plan(c.experts, c.first, total, alignment));
    }
}

TEST_CASE_TEMPLATE("a padded plan gives every expert exactly its slots, the first choices in them, and drops the rest", Cell,
                   FASTMOE_EXECUTORS_AND_WARPS)
{
    FASTMOE_SEEDED(r, 13);
    FASTMOE_EXECUTOR(ex, Cell);
    for (int round = 0; round < 20; ++round) {
        const int64_t total = r.integer(1, 20), tokens = r.one_of<int64_t>(0, 1, 7, 60), k = r.integer(1, total);
        const int64_t each = r.one_of<int64_t>(0, 1, 5, tokens * k, r.integer(0, 40));
        CAPTURE(each);
        const auto c = random_choices(r, tokens, total, k);
        auto experts = support::upload(ex, c.experts);
        buffer<float, typename Cell::executor> weights(ex, experts.size());
        const routing<float> route{tokens, total, k, experts.view(), weights.view(), {}};
        std::vector<int32_t> counts(total), slot_of, choice_of(total * each, -1), token_of(total * each, -1);
        for (std::size_t i = 0; i < c.experts.size(); ++i) {
            const int32_t e = c.experts[i];
            slot_of.push_back(e >= 0 && counts[e] < each ? static_cast<int32_t>(e * each) + counts[e]++ : -1);
            if (slot_of.back() < 0) continue;
            choice_of[slot_of.back()] = static_cast<int32_t>(i);
            token_of[slot_of.back()] = static_cast<int32_t>(static_cast<int64_t>(i) / k);
        }
        support::in_workspace(ex, [&](arena& memory) {
            const plan p = reserve_padded_plan(memory, tokens, route.choices(), total, each);
            make_plan(ex, route, p, memory);
            if (memory.measuring()) return;
            CHECK_EQ(p.slots, total * each);
            CHECK_EQ(support::download(ex, p.counts), counts);
            CHECK_EQ(support::download(ex, p.slot_of), slot_of);
            CHECK_EQ(support::download(ex, p.choice_of), choice_of);
            CHECK_EQ(support::download(ex, p.token_of), token_of);
            for (int64_t e = 0; e <= total; ++e) CHECK_EQ(p.offsets(e), e * each);
        });
    }
    arena none;
    CHECK(support::has(support::message_of<invalid_argument>([&] { reserve_padded_plan(none, 1, 1, 2, -3); }),
                       "slots_each is -3; expected zero or more"));
    CHECK(support::has(support::message_of<invalid_argument>([&] { reserve_padded_plan(none, 1, 1, 1 << 20, 1 << 20); }),
                       "slots_each is 1048576; expected at most 2^31 - 1 slots in all"));
}

TEST_CASE("a plan is the same for any number of threads")
{
    FASTMOE_SEEDED(r, 12);
    const auto c = random_choices(r, 20000, 64, 4);
    host_executor one({.threads = 1}), two({.threads = 2}), four({.threads = 4});
    const auto expected = expected_plan(c.experts, c.first, 64, 1);
    CHECK(run_plan(one, c, 64, 1) == expected);
    CHECK(run_plan(two, c, 64, 1) == expected);
    CHECK(run_plan(four, c, 64, 1) == expected);
}

TEST_CASE_TEMPLATE("all tokens on one expert, and every choice dropped, are plans like any other", Cell, FASTMOE_EXECUTORS_AND_WARPS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    for (const int32_t id : {3, -1}) {
        choices c{std::vector<int32_t>(500, id), {}, 500, 1};
        for (int32_t t = 0; t <= 500; ++t) c.first.push_back(t);
        CHECK(run_plan(ex, c, 7, 1) == expected_plan(c.experts, c.first, 7, 1));
    }
}

TEST_CASE_TEMPLATE("K = E = 1000 is planned without quadratic time", Cell, FASTMOE_EXECUTORS_AND_WARPS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    const int tokens = std::is_same_v<typename Cell::executor, host_executor> ? 20 : 2;
    choices c{{}, {0}, tokens, 1000};
    for (int t = 0; t < tokens; ++t) {
        for (int32_t e = 0; e < 1000; ++e) c.experts.push_back((e + t) % 1000);
        c.first.push_back(static_cast<int32_t>(c.experts.size()));
    }
    CHECK(run_plan(ex, c, 1000, 1) == expected_plan(c.experts, c.first, 1000, 1));
}

TEST_CASE_TEMPLATE("an id out of range is dropped and reported with its position", Cell, FASTMOE_EXECUTORS_AND_WARPS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    for (const auto& [tokens, k] : {std::pair<int64_t, int64_t>{50, 2}, {50, 20}, {1500, 2}, {200, 20}}) {
        choices c{{}, {}, tokens, k};
        for (int64_t t = 0; t < tokens; ++t)
            for (int32_t j = 0; j < k; ++j) c.experts.push_back(j);
        c.experts[31] = 40;
        c.experts[35] = -2;
        auto experts = support::upload(ex, c.experts);
        buffer<float, typename Cell::executor> weights(ex, experts.size());
        const routing<float> route{tokens, 40, k, experts.view(), weights.view(), {}};
        arena measure;
        make_plan(ex, route, reserve_plan(measure, tokens, route.choices(), 40), measure);
        support::workspace memory(ex, measure.bytes());
        const plan p = reserve_plan(memory, tokens, route.choices(), 40);
        const auto text = support::message_of<invalid_argument>([&] {
            make_plan(ex, route, p, memory);
            ex.synchronize();
        });
        CHECK_MESSAGE(support::has(text, "routing.experts(31) is 40"), text);
        CHECK(p.slot_of(31) == -1);
        CHECK(p.slot_of(35) == -1);
        CHECK(p.offsets(40) == tokens * k - 2);
        ex.synchronize(); // the fault is gone once it was thrown
    }
}

TEST_CASE_TEMPLATE("an id twice in one token keeps its first choice and is reported", Cell, FASTMOE_EXECUTORS_AND_WARPS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    for (const auto& [tokens, k] : {std::pair<int64_t, int64_t>{4, 3}, {4, 24}, {1000, 3}, {100, 24}}) {
        std::vector<int32_t> ids(tokens * k);
        for (int64_t t = 0; t < tokens; ++t)
            for (int32_t j = 0; j < k; ++j) ids[t * k + j] = j;
        ids[k + 2] = 0; // token 1: experts 0, 1, 0
        auto experts = support::upload(ex, ids);
        buffer<float, typename Cell::executor> weights(ex, experts.size());
        const routing<float> route{tokens, 30, k, experts.view(), weights.view(), {}};
        arena measure;
        make_plan(ex, route, reserve_plan(measure, tokens, route.choices(), 30), measure);
        support::workspace memory(ex, measure.bytes());
        const plan p = reserve_plan(memory, tokens, route.choices(), 30);
        const auto text = support::message_of<invalid_argument>([&] {
            make_plan(ex, route, p, memory);
            ex.synchronize();
        });
        const auto part = "routing.experts(" + std::to_string(k + 2) + ") is 0; expected each expert once";
        CHECK_MESSAGE(support::has(text, part.c_str()), text);
        CHECK(p.slot_of(k) >= 0);
        CHECK(p.slot_of(k + 2) == -1);
        CHECK(p.counts(0) == tokens);
    }
}

TEST_CASE_TEMPLATE("ragged offsets that decrease or leave the array are reported and lead nowhere", Cell, FASTMOE_EXECUTORS_AND_WARPS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    for (const auto& wrong : {std::vector<int32_t>{0, 2, 1, 3}, {0, 1, 2, 9}, {1, 1, 2, 3}, {0, -5, 2, 3}}) {
        auto experts = support::upload(ex, std::vector<int32_t>{0, 1, 2});
        auto first = support::upload(ex, wrong);
        buffer<float, typename Cell::executor> weights(ex, 3);
        const routing<float> route{3, 4, 0, experts.view(), weights.view(), first.view()};
        arena measure;
        make_plan(ex, route, reserve_plan(measure, 3, 3, 4), measure);
        support::workspace memory(ex, measure.bytes());
        const plan p = reserve_plan(memory, 3, 3, 4);
        const auto text = support::message_of<invalid_argument>([&] {
            make_plan(ex, route, p, memory);
            ex.synchronize();
        });
        CHECK_MESSAGE(support::has(text, "routing.first("), text);
    }
}

TEST_CASE("a workspace one byte too small is refused before the plan is touched")
{
    host_executor ex({.threads = 2});
    constexpr int64_t tokens = 4000; // fewer take no workspace
    auto experts = support::upload(ex, std::vector<int32_t>(tokens, 1));
    buffer<float, host_executor> weights(ex, tokens);
    const routing<float> route{tokens, 3, 1, experts.view(), weights.view(), {}};
    arena plans, scratch;
    make_plan(ex, route, reserve_plan(plans, tokens, tokens, 3), scratch);
    support::workspace kept(ex, plans.bytes()), lent(ex, scratch.bytes() - 1);
    const plan p = reserve_plan(kept, tokens, tokens, 3);
    CHECK_THROWS_AS(make_plan(ex, route, p, lent), out_of_memory);
    CHECK(p.counts(0) == -1); // still poison
    CHECK(p.slot_of(0) == -1);
}

TEST_CASE("a plan of the wrong shape is refused by name")
{
    host_executor ex({.threads = 1});
    auto experts = support::upload(ex, std::vector<int32_t>(10, 0));
    buffer<float, host_executor> weights(ex, 10);
    const routing<float> route{10, 3, 1, experts.view(), weights.view(), {}};
    support::workspace memory(ex, 1 << 20);
    const plan p = reserve_plan(memory, 10, 10, 4);
    const auto text = support::message_of<invalid_argument>([&] { make_plan(ex, route, p, memory); });
    CHECK_MESSAGE(support::has(text, "plan.counts (E) is of shape (4); expected (3)"), text);
    routing<float> uneven = route;
    uneven.k = 3;
    CHECK_THROWS_AS(make_plan(ex, uneven, reserve_plan(memory, 10, 10, 3), memory), invalid_argument);
    CHECK_THROWS_AS(reserve_plan(memory, 10, 10, 3, 0), invalid_argument);
}
