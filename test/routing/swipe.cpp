// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <algorithm>
#include <limits>
#include <set>
#include <string>

#include <fastmoe/comm/threads.hpp>
#include <fastmoe/routing/swipe.hpp>

#include "support/compare.hpp"
#include "support/finite_difference.hpp"
#include "support/reference_routing.hpp"
#include "support/run_gate.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
namespace oracle = support::reference;
using fm::int64_t;

namespace {

static_assert(fm::gate_policy<fm::swipe_gate, fm::host_executor, float, fm::threads>);
static_assert(fm::gate_policy<fm::swipe_gate, support::lanes, double, fm::self>);

struct setup {
    int ranks;
    int64_t experts, k;
    std::vector<int64_t> tokens;                  // of each rank
    std::vector<std::vector<double>> logits;      // of each rank (T,E)
    std::vector<std::vector<std::uint8_t>> masks; // of each rank (T)
};

/// Tokens like the first workers better.
setup random_setup(support::random& rng, int ranks, int64_t each, int64_t k, bool equal, double skew)
{
    setup s{ranks, ranks * each, k, {}, {}, {}};
    const int64_t all = rng.integer(1, 30);
    for (int r = 0; r < ranks; ++r) {
        s.tokens.push_back(equal ? all : rng.integer(0, 30));
        s.logits.push_back(rng.normals(s.tokens[r] * s.experts));
        for (std::size_t i = 0; i < s.logits[r].size(); ++i)
            s.logits[r][i] -= skew * double(static_cast<int64_t>(i) % s.experts / each);
        s.masks.push_back(std::vector<std::uint8_t>(s.tokens[r], 1));
        for (auto& m : s.masks[r]) m = equal || rng.coin(0.9);
    }
    return s;
}

/// The best expert in [begin, end) without those of a list; -1 if there is none.
int best_without(const double* l, int64_t begin, int64_t end, const std::vector<int>& used)
{
    int best = -1;
    for (int64_t e = begin; e < end; ++e)
        if (std::find(used.begin(), used.end(), e) == used.end() && (best < 0 || oracle::goes_before(l, int(e), best)))
            best = static_cast<int>(e);
    return best;
}

/// Every token's experts, one choice at a time: first those that stay, then those that move.
std::vector<std::vector<std::vector<int>>> swiped(const setup& s)
{
    const int64_t each = s.experts / s.ranks;
    std::vector<int64_t> left;
    std::vector<std::vector<std::vector<int>>> wanted(s.ranks), got(s.ranks);
    for (int r = 0; r < s.ranks; ++r) {
        left.push_back(s.tokens[r] * s.k);
        const auto routed = oracle::route({.k = s.k}, s.logits[r], s.tokens[r], s.experts);
        for (int64_t t = 0; t < s.tokens[r]; ++t) {
            wanted[r].emplace_back(routed.chosen.begin() + t * s.k, routed.chosen.begin() + (t + 1) * s.k);
            if (!s.masks[r][t]) wanted[r].back().assign(s.k, -1);
        }
        got[r].resize(s.tokens[r]);
    }
    for (int64_t j = 0; j < s.k; ++j) {
        struct open_choice {
            int rank;
            int64_t token, worker;
            bool moves;
        };
        std::vector<open_choice> open;
        for (int r = 0; r < s.ranks; ++r)
            for (int64_t t = 0; t < s.tokens[r]; ++t) {
                const int e = wanted[r][t][j];
                if (e < 0) continue;
                const bool stays = left[e / each] > 0;
                left[e / each] -= stays;
                open.push_back({r, t, e / each, !stays});
            }
        for (auto& o : open)
            if (o.moves) {
                o.worker = 0;
                while (left[o.worker] == 0) ++o.worker;
                --left[o.worker];
            }
        for (const auto& o : open) {
            const double* l = s.logits[o.rank].data() + o.token * s.experts;
            auto& ids = got[o.rank][o.token];
            int e = wanted[o.rank][o.token][j];
            if (o.moves || std::find(ids.begin(), ids.end(), e) != ids.end()) {
                e = best_without(l, o.worker * each, (o.worker + 1) * each, ids);
                if (e < 0) e = best_without(l, 0, s.experts, ids);
            }
            ids.push_back(e);
        }
    }
    for (auto& rank : got)
        for (auto& ids : rank)
            if (ids.empty()) ids.assign(s.k, -1);
    return got;
}

template <class Real, class Executor>
std::vector<std::vector<int32_t>> run(const setup& s, fm::gate_mode mode = fm::gate_mode::training)
{
    std::vector<std::vector<int32_t>> out(s.ranks);
    fm::run_ranks(s.ranks, [&](const fm::threads& c) {
        auto ex = support::executor_of_thread<Executor>();
        const int r = c.rank();
        const fm::swipe_gate gate{.experts = s.experts, .k = s.k};
        const support::gate_run got(ex, gate, s.tokens[r], support::narrowed<Real>(s.logits[r]),
                                    std::vector<Real>(s.tokens[r] * s.k, Real(1)), mode, s.masks[r], 1.0,
                                    support::gate_extras{}, c);
        out[r] = got.experts;
    });
    return out;
}

/// How many choices each worker got.
std::vector<int64_t> loads(const setup& s, const std::vector<std::vector<int32_t>>& ids)
{
    std::vector<int64_t> out(s.ranks);
    for (const auto& rank : ids)
        for (int32_t e : rank)
            if (e >= 0) ++out[e / (s.experts / s.ranks)];
    return out;
}

void no_expert_twice(const setup& s, const std::vector<std::vector<int32_t>>& ids)
{
    for (int r = 0; r < s.ranks; ++r)
        for (int64_t t = 0; t < s.tokens[r]; ++t) {
            const std::set<int32_t> once(ids[r].begin() + t * s.k, ids[r].begin() + (t + 1) * s.k);
            if (s.masks[r][t]) REQUIRE((once.size() == std::size_t(s.k) && *once.begin() >= 0));
            else REQUIRE_EQ(*once.rbegin(), -1);
        }
}

} // namespace

TEST_CASE_TEMPLATE("choices stay and move as one count after the other says, for 1 to 4 ranks, equal or not", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    FASTMOE_NEEDS(Cell);
    using Real = typename Cell::type;
    FASTMOE_SEEDED(rng, 101);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int i = 0; i < (small ? 4 : 60); ++i) {
        const int ranks = small ? 2 : static_cast<int>(rng.integer(1, 4));
        const int64_t each = rng.integer(1, 5), k = rng.integer(1, std::min<int64_t>(4, ranks * each));
        auto s = random_setup(rng, ranks, each, k, rng.coin(), rng.one_of(0.0, 0.5, 3.0));
        for (auto& l : s.logits) l = support::widened(support::narrowed<Real>(l));
        CAPTURE(ranks);
        CAPTURE(each);
        CAPTURE(k);
        const auto expected = swiped(s);
        const auto got = run<Real, typename Cell::executor>(s);
        for (int r = 0; r < ranks; ++r) {
            std::vector<int32_t> flat;
            for (const auto& ids : expected[r]) flat.insert(flat.end(), ids.begin(), ids.end());
            REQUIRE_EQ(got[r], flat);
        }
        no_expert_twice(s, got);
    }
}

TEST_CASE("with as many tokens on every rank, every worker gets T*K choices exactly, and nothing is dropped")
{
    FASTMOE_SEEDED(rng, 102);
    for (int ranks : {1, 2, 4})
        for (int64_t k : {1, 2, 3}) {
            const auto s = random_setup(rng, ranks, 3, k, true, 4);
            const auto got = run<float, fm::host_executor>(s);
            no_expert_twice(s, got);
            CHECK_EQ(loads(s, got), std::vector<int64_t>(ranks, s.tokens[0] * k));
            if (ranks > 1) CHECK(got != run<float, fm::host_executor>(s, fm::gate_mode::inference)); // something moved
        }
}

TEST_CASE("with unequal ranks no worker gets more than its budget, if it has K experts")
{
    FASTMOE_SEEDED(rng, 103);
    for (int i = 0; i < 10; ++i) {
        const auto s = random_setup(rng, 4, 3, 3, false, 2);
        const auto got = run<double, fm::host_executor>(s);
        no_expert_twice(s, got);
        const auto load = loads(s, got);
        for (int r = 0; r < 4; ++r) CHECK(load[r] <= s.tokens[r] * 3);
    }
}

TEST_CASE("fewer experts on a worker than K: still no expert twice and nothing dropped")
{
    FASTMOE_SEEDED(rng, 104);
    for (int i = 0; i < 10; ++i) {
        const auto s = random_setup(rng, 4, 1, 3, true, 3);
        const auto got = run<double, fm::host_executor>(s);
        no_expert_twice(s, got);
        int64_t all = 0;
        for (int64_t n : loads(s, got)) all += n;
        CHECK_EQ(all, 4 * s.tokens[0] * 3);
    }
}

TEST_CASE("by hand: two workers of two experts, where three of four tokens want worker 0")
{
    setup s{2, 4, 1, {2, 2}, {{9, 1, 3, 2, 8, 1, 0, 5}, {7, 1, 2, 4, 0, 0, 6, 1}}, {{1, 1}, {1, 1}}};
    const auto got = run<float, fm::host_executor>(s);
    CHECK_EQ(got[0], std::vector<int32_t>{0, 0});
    CHECK_EQ(got[1], std::vector<int32_t>{3, 2}); // the third moves to the better of worker 1's
    CHECK_EQ(run<float, fm::host_executor>(s, fm::gate_mode::inference)[1], std::vector<int32_t>{0, 2});
}

TEST_CASE("weights are a softmax over what was chosen in the end, with its gradient")
{
    FASTMOE_SEEDED(rng, 105);
    const auto s = random_setup(rng, 2, 4, 3, true, 3);
    fm::run_ranks(2, [&](const fm::threads& c) {
        fm::host_executor ex({.threads = 1});
        const int r = c.rank();
        support::random own(200 + static_cast<std::uint64_t>(r));
        const auto dweights = own.normals(s.tokens[r] * s.k);
        const fm::swipe_gate gate{.experts = s.experts, .k = s.k, .scale = 1.5};
        const support::gate_run got(ex, gate, s.tokens[r], s.logits[r], dweights, fm::gate_mode::training, {}, 1.0,
                                    support::gate_extras{}, c);
        for (int64_t t = 0; t < s.tokens[r]; ++t) {
            std::vector<double> l(s.logits[r].begin() + t * s.experts, s.logits[r].begin() + (t + 1) * s.experts);
            const std::vector<int> ids(got.experts.begin() + t * s.k, got.experts.begin() + (t + 1) * s.k);
            const auto weights = oracle::softmax(l.data(), ids);
            for (int64_t j = 0; j < s.k; ++j) CHECK(std::fabs(got.weights[t * s.k + j] - 1.5 * weights[j]) < 1e-13);
            const auto gradient = support::finite_difference(
                [&] {
                    const auto w = oracle::softmax(l.data(), ids);
                    double sum = 0;
                    for (int64_t j = 0; j < s.k; ++j) sum += 1.5 * w[j] * dweights[t * s.k + j];
                    return sum;
                },
                l);
            for (int64_t e = 0; e < s.experts; ++e) CHECK(std::fabs(got.dlogits[t * s.experts + e] - gradient[e]) < 1e-10);
        }
    });
}

TEST_CASE("tokens without a finite logit choose nothing; NaN and -Inf are chosen last")
{
    const double inf = std::numeric_limits<double>::infinity(), nan_ = std::numeric_limits<double>::quiet_NaN();
    setup s{2, 4, 2, {3, 1}, {{nan_, -inf, nan_, -inf, inf, 1, 0, 0, 3, 2, nan_, -inf}, {5, 4, 1, 0}}, {{1, 1, 1}, {1}}};
    const auto got = run<float, fm::host_executor>(s); // budgets: 6 and 2
    CHECK_EQ(got[0], std::vector<int32_t>{-1, -1, 0, 1, 0, 1});
    CHECK_EQ(got[1], std::vector<int32_t>{0, 1});
}

TEST_CASE("experts that ranks do not divide are refused by name, on every rank")
{
    fm::run_ranks(3, [&](const fm::threads& c) {
        fm::host_executor ex({.threads = 1});
        const fm::swipe_gate gate{.experts = 7, .k = 2};
        const std::string text = support::message_of<fm::invalid_argument>([&] {
            support::gate_run(ex, gate, 1, std::vector<float>(7), std::vector<float>(2), fm::gate_mode::training, {}, 1.0,
                              support::gate_extras{}, c);
        });
        CHECK(support::has(text, "experts is 7; expected a multiple of the 3 ranks"));
    });
}
