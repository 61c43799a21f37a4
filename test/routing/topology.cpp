// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <string>

#include <fastmoe/comm/threads.hpp>
#include <fastmoe/routing/topology.hpp>

#include "support/compare.hpp"
#include "support/reference_routing.hpp"
#include "support/run_gate.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
namespace oracle = support::reference;
using fm::int64_t;

namespace {

static_assert(fm::gate_policy<fm::topology_gate, fm::host_executor, float, fm::threads>);

/// One rank's problem.
struct setup {
    int64_t experts, k, tokens, begin, end, budget; // experts of its node, choices that may leave it
    std::vector<double> logits;
    std::vector<std::uint8_t> mask;

    bool home(int e) const { return e >= begin && e < end; }
    const double* row(int64_t t) const { return logits.data() + t * experts; }
};

std::vector<int> ranked(const double* l, int64_t begin, int64_t end)
{
    std::vector<int> out;
    for (int64_t e = begin; e < end; ++e) out.push_back(static_cast<int>(e));
    std::stable_sort(out.begin(), out.end(), [l](int a, int b) { return oracle::goes_before(l, a, b); });
    return out;
}

struct leaving {
    int64_t choice;
    double key;
};

/// The first `budget` of those that leave, by key, then by position.
std::set<int64_t> allowed(std::vector<leaving> all, int64_t budget)
{
    std::stable_sort(all.begin(), all.end(), [](const leaving& a, const leaving& b) { return a.key > b.key; });
    std::set<int64_t> out;
    for (int64_t i = 0; i < std::min<int64_t>(budget, int64_t(all.size())); ++i) out.insert(all[i].choice);
    return out;
}

std::vector<int32_t> expected(const setup& s, fm::off_node_choices counts)
{
    const bool first = counts == fm::off_node_choices::first;
    std::vector<int32_t> ids;
    std::vector<leaving> all;
    for (int64_t t = 0; t < s.tokens; ++t) {
        auto top = ranked(s.row(t), 0, s.experts);
        const auto p = oracle::softmax(s.row(t), top);
        for (int64_t j = 0; j < s.k; ++j) {
            const bool open = s.mask[t] != 0;
            ids.push_back(open ? top[j] : -1);
            if (open && !s.home(top[j]) && (!first || j == 0)) all.push_back({t * s.k + j, first ? s.row(t)[top[j]] : p[j]});
        }
    }
    const auto stay = allowed(all, s.budget);
    if (first && int64_t(all.size()) < s.budget) return ids;
    for (int64_t t = 0; t < s.tokens; ++t) {
        if (!s.mask[t]) continue;
        const auto near = ranked(s.row(t), s.begin, s.end);
        int32_t* own = ids.data() + t * s.k;
        if (first) {
            const int32_t best = own[0];
            for (int64_t j = 0; j < s.k; ++j) own[j] = near[j];
            if (stay.count(t * s.k)) own[s.k - 1] = best;
            continue;
        }
        for (int64_t j = 0; j < s.k; ++j) {
            if (s.home(own[j]) || stay.count(t * s.k + j)) continue;
            for (int e : near)
                if (std::find(own, own + s.k, e) == own + s.k) {
                    own[j] = e;
                    break;
                }
        }
    }
    return ids;
}

} // namespace

TEST_CASE_TEMPLATE("of the choices that leave a node the most probable stay within the budget, for 1, 2 and 4 ranks", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    FASTMOE_NEEDS(Cell);
    using Real = typename Cell::type;
    using executor = typename Cell::executor;
    FASTMOE_SEEDED(rng, 111);
    const bool small = support::takes_turns<executor>;
    for (int i = 0; i < (small ? 2 : 25); ++i)
        for (int ranks : {1, 2, 4})
            for (auto counts : {fm::off_node_choices::all, fm::off_node_choices::first}) {
                const int64_t each = rng.integer(2, 5), per_node = rng.integer(1, 3), k = rng.integer(1, each);
                const double ratio = rng.one_of(0.0, 0.05, 0.3, 1.12, 10.0);
                const auto seed = rng.bits();
                fm::run_ranks(ranks, [&](const fm::threads& c) {
                    auto ex = support::executor_of_thread<executor>();
                    support::random own(seed + static_cast<std::uint64_t>(c.rank()));
                    setup s{ranks * each, k, own.integer(0, small ? 8 : 60), 0, 0, 0, {}, {}};
                    const int64_t node = c.rank() / per_node;
                    s.begin = node * per_node * each;
                    s.end = std::min<int64_t>((node + 1) * per_node, ranks) * each;
                    const double bound = std::floor(ratio / double(per_node) * double(s.tokens));
                    s.budget = std::min(static_cast<int64_t>(bound), s.tokens * k);
                    s.logits = support::widened(support::narrowed<Real>(own.normals(s.tokens * s.experts, 2)));
                    for (int64_t t = 0; t < s.tokens; ++t) s.mask.push_back(own.coin(0.9));
                    fm::topology_gate gate{.experts = s.experts, .k = k};
                    gate.assignment = {.workers_per_node = per_node, .network_over_local = ratio, .counts = counts};
                    for (auto mode : {fm::gate_mode::training, fm::gate_mode::inference}) {
                        const support::gate_run got(ex, gate, s.tokens, support::narrowed<Real>(s.logits),
                                                    std::vector<Real>(s.tokens * k, Real(1)), mode, s.mask, 1.0,
                                                    support::gate_extras{}, c);
                        REQUIRE_EQ(got.experts, expected(s, counts));
                        int64_t left = 0;
                        for (int64_t t = 0; t < s.tokens; ++t) {
                            const auto begin = got.experts.begin() + t * k;
                            const std::set<int32_t> once(begin, begin + k);
                            REQUIRE_EQ(once.size(), s.mask[t] ? std::size_t(k) : std::size_t(1));
                            for (int32_t e : once) left += e >= 0 && !s.home(e);
                        }
                        if (counts == fm::off_node_choices::all) REQUIRE(left <= s.budget);
                    }
                });
            }
}

TEST_CASE("by hand: the budget goes to the most probable choice, first or second, and the others stay on the node")
{
    // Two ranks, each a node of two experts. On rank 0 experts 2 and 3 are away; L = floor(1 * 2 / 1 * ...) = 1 of 2 tokens.
    const std::vector<float> logits{0, 1, 5, -9,   // wants 2 with probability .98, then 1
                                    2, 0, 2.5f, 3}; // wants 3, then 2
    const auto run = [&](double ratio, fm::off_node_choices counts) {
        std::vector<int32_t> out;
        fm::run_ranks(2, [&](const fm::threads& c) {
            if (c.rank() == 1) return;
            fm::host_executor ex({.threads = 1});
            fm::topology_gate gate{.experts = 4, .k = 2};
            gate.assignment = {.workers_per_node = 1, .network_over_local = ratio, .counts = counts};
            out = support::gate_run(ex, gate, 2, logits, std::vector<float>(4), fm::gate_mode::inference, {}, 1.0,
                                    support::gate_extras{}, c).experts;
        });
        return out;
    };
    using ids = std::vector<int32_t>;
    const auto all = fm::off_node_choices::all, first = fm::off_node_choices::first;
    CHECK_EQ(run(0, all), ids{0, 1, 0, 1});
    CHECK_EQ(run(0.5, all), ids{2, 1, 0, 1});
    CHECK_EQ(run(1, all), ids{2, 1, 3, 0});   // two of the three that would leave
    CHECK_EQ(run(1.5, all), ids{2, 1, 3, 2}); // all three
    // FastMoE's code: two first choices leave. Below two nothing changes; from two on second choices stay.
    CHECK_EQ(run(1.5, first), ids{2, 1, 3, 2});
    CHECK_EQ(run(1, first), ids{1, 2, 0, 3});
    CHECK_EQ(run(0.5, first), ids{1, 2, 0, 1});
}

TEST_CASE("a node with fewer experts than K, and members that make no sense, are refused by name")
{
    const auto says = [](int ranks, int64_t experts, int64_t k, fm::topology_aware assignment, const char* text) {
        fm::run_ranks(ranks, [&](const fm::threads& c) {
            fm::host_executor ex({.threads = 1});
            fm::topology_gate gate{.experts = experts, .k = k};
            gate.assignment = assignment;
            const std::string got = support::message_of<fm::invalid_argument>([&] {
                support::gate_run(ex, gate, 1, std::vector<float>(experts), std::vector<float>(k), fm::gate_mode::training,
                                  {}, 1.0, support::gate_extras{}, c);
            });
            INFO(got);
            CHECK(support::has(got, text));
        });
    };
    says(2, 4, 3, {.workers_per_node = 1}, "k is 3; expected at most the 2 experts of a node");
    says(2, 5, 2, {}, "experts is 5; expected a multiple of the 2 ranks");
    says(1, 4, 2, {.workers_per_node = 0}, "assignment.workers_per_node is 0; expected 1 to 2^31 - 1");
    says(1, 4, 2, {.network_over_local = -1}, "assignment.network_over_local is -1; expected a finite number from 0 on");
    says(1, 4, 2, {.network_over_local = NAN}, "assignment.network_over_local is");
}
