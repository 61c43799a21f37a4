// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Choices rounded to whole tiles.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include <fastmoe/routing/token_rounding.hpp>

#include "support/assigned.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
namespace oracle = support::reference;
using fm::int64_t;
using rounding = fm::tile_rounding;

namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan_ = std::numeric_limits<double>::quiet_NaN();
constexpr rounding ways[] = {rounding::nearest, rounding::up, rounding::down};

static_assert(fm::gate_policy<fm::token_rounding_gate, fm::host_executor, fm::bfloat16, fm::self>);
static_assert(fm::gate_policy<fm::token_rounding_gate, support::lanes, double, fm::self>);

fm::token_rounding_gate gate_of(int64_t experts, int64_t k, int64_t tile, rounding way = rounding::nearest)
{
    return {.experts = experts, .k = k, .assignment = {.tile = tile, .rounding = way}};
}

/// The multiple of the tile, found by trying: of two that are equally near, the greater.
int64_t rounded(int64_t count, int64_t tile, rounding way)
{
    int64_t best = 0;
    for (int64_t n = 0; n <= count + tile; n += tile) {
        if (way == rounding::down && n <= count) best = n;
        if (way == rounding::up && best < count) best = n;
        if (way == rounding::nearest && std::abs(n - count) <= std::abs(best - count)) best = n;
    }
    return best;
}

template <class Real, class Executor>
auto run(Executor& ex, const fm::token_rounding_gate& gate, const support::random_batch<Real>& b,
         const std::vector<Real>& dweights, fm::gate_mode mode = fm::gate_mode::training)
{
    return support::gate_run(ex, gate, b.tokens, b.stored, dweights, mode, b.mask);
}

std::vector<double> over_chosen(const std::vector<double>& l, const std::vector<int>& ids)
{
    return oracle::softmax(l.data(), ids);
}

} // namespace

TEST_CASE_TEMPLATE("every expert takes its own best tokens first, then the best others, up to the rounded count", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 91);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int i = 0; i < (small ? 6 : 40); ++i) {
        const int64_t experts = rng.integer(1, small ? 9 : 50), tokens = rng.integer(0, small ? 40 : 200);
        const int64_t k = rng.integer(1, std::min<int64_t>(experts, 8)), tile = rng.integer(1, 20);
        const auto way = ways[i % 3];
        CAPTURE(experts);
        CAPTURE(tokens);
        CAPTURE(k);
        CAPTURE(tile);
        const support::random_batch<Real> b(rng, tokens, experts, 2, i % 4 == 0 ? 0.2 : 0.0);
        const auto gate = gate_of(experts, k, tile, way);
        const auto dweights = support::normal_vector<Real>(rng, gate.assignment.choices(tokens, experts, k));
        const auto r = run(ex, gate, b, dweights);
        support::holds_together(r, b, k);
        std::vector<std::vector<char>> own(experts, std::vector<char>(tokens, 0));
        for (int64_t t = 0; t < tokens; ++t)
            for (int e : oracle::best_experts(b, t, k)) own[e][t] = 1;
        const auto lists = support::lists_of(r, tokens, k);
        const auto scores = oracle::probability_scores(b);
        for (int64_t e = 0; e < experts; ++e) {
            long double least = inf, best = -inf; // own choices lie above all others by more than a score spans
            int64_t n = 0;
            for (int64_t t = 0; t < tokens; ++t) {
                if (!b.open(t)) continue;
                const bool has = std::find(lists[t].begin(), lists[t].end(), e) != lists[t].end();
                const long double score = scores[e][t] + (own[e][t] ? 1e6L : 0.0L);
                n += has;
                if (has) least = std::min(least, score);
                else best = std::max(best, score);
            }
            REQUIRE_EQ(n, std::min(rounded(std::count(own[e].begin(), own[e].end(), 1), tile, way), b.open_tokens()));
            if (n > 0 && n < b.open_tokens()) REQUIRE(best - least <= 2 * support::roundoff<Real> * 50);
        }
        support::weighs_as(r, b, k, dweights, 2, over_chosen);
    }
}

TEST_CASE_TEMPLATE("ties go to the lower token, among own choices and among others", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 92);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int i = 0; i < (small ? 6 : 30); ++i) {
        const int64_t experts = rng.integer(1, small ? 7 : 20), tokens = rng.integer(1, small ? 40 : 140);
        const int64_t k = rng.integer(1, experts), tile = rng.integer(1, 9);
        const auto way = ways[i % 3];
        support::random_batch<Real> b(rng, tokens, experts, 1, 0.1);
        std::vector<int> values;
        for (int64_t e = 0; e < experts; ++e) values.push_back(static_cast<int>(rng.integer(0, 2)));
        for (int64_t t = 0; t < tokens; ++t) {
            const auto order = rng.permutation(experts);
            for (int64_t e = 0; e < experts; ++e) b.stored[t * experts + e] = Real(values[order[e]]);
        }
        b.widen();
        const auto gate = gate_of(experts, k, tile, way);
        const auto r = run(ex, gate, b, std::vector<Real>(gate.assignment.choices(tokens, experts, k)));
        REQUIRE_EQ(support::lists_of(r, tokens, k),
                   oracle::token_rounding(b, k, [&](int64_t n) { return rounded(n, tile, way); }));
    }
}

TEST_CASE("the room for choices is the least that is enough for any logits, or for inference")
{
    // The most that the experts' rounded counts can sum to, over all counts that T tokens of K choices can give.
    for (int64_t experts = 1; experts <= 5; ++experts)
        for (int64_t tokens = 0; tokens <= 9; ++tokens)
            for (int64_t k = 1; k <= experts; ++k)
                for (int64_t tile = 1; tile <= 11; ++tile)
                    for (auto way : ways) {
                        std::vector<int64_t> most(tokens * k + 1, -1); // by choices spent
                        most[0] = 0;
                        for (int64_t e = 0; e < experts; ++e) {
                            std::vector<int64_t> next(most.size(), -1);
                            for (int64_t spent = 0; spent < int64_t(most.size()); ++spent)
                                for (int64_t c = 0; most[spent] >= 0 && c <= tokens && spent + c < int64_t(most.size()); ++c)
                                    next[spent + c] = std::max(next[spent + c],
                                                               most[spent] + std::min(rounded(c, tile, way), tokens));
                            most = next;
                        }
                        CAPTURE(experts);
                        CAPTURE(tokens);
                        CAPTURE(k);
                        CAPTURE(tile);
                        CAPTURE(int(way));
                        const int64_t room = fm::token_rounding{tile, way}.choices(tokens, experts, k);
                        REQUIRE(room >= std::max(most.back(), tokens * k));
                        // Whole tiles are counted: where T cuts an expert's last tile off, a few places more.
                        if (tokens % tile == 0) REQUIRE_EQ(room, std::max(most.back(), tokens * k));
                        else REQUIRE(room <= std::max(most.back(), tokens * k) + experts * (tile - tokens % tile));
                    }
}

TEST_CASE("half a tile rounds up, and a tile of 1 changes nothing")
{
    FASTMOE_SEEDED(rng, 93);
    fm::host_executor ex({.threads = 2});
    // Four tokens choose expert 0: of a tile of 8 that is a half.
    const std::vector<double> logits{1, 0, 2, 0, 3, 0, 4, 0, 0, 9, 0, 9, 0, 9, 0, 9};
    const auto lists = [&](int64_t tile, rounding way) {
        const auto gate = gate_of(2, 1, tile, way);
        const std::vector<double> dweights(gate.assignment.choices(8, 2, 1));
        return support::lists_of(support::gate_run(ex, gate, 8, logits, dweights), 8, 1);
    };
    for (const auto& list : lists(8, rounding::nearest)) CHECK_EQ(list, std::vector<int32_t>{0, 1});
    for (const auto& list : lists(9, rounding::nearest)) CHECK(list.empty());
    for (const auto& list : lists(5, rounding::down)) CHECK(list.empty());
    CHECK_EQ(lists(3, rounding::nearest)[0], std::vector<int32_t>{}); // the least of its own is left out
    CHECK_EQ(lists(3, rounding::nearest)[1], std::vector<int32_t>{0});
    for (auto way : ways) {
        const support::random_batch<double> b(rng, 60, 9, 1, 0.2);
        const auto gate = gate_of(9, 3, 1, way);
        const auto r = run(ex, gate, b, std::vector<double>(gate.assignment.choices(60, 9, 3)));
        const auto ids = support::lists_of(r, 60, 3);
        for (int64_t t = 0; t < 60; ++t) {
            auto own = oracle::best_experts(b, t, 3);
            std::sort(own.begin(), own.end());
            CHECK_EQ(ids[t], own);
        }
    }
}

TEST_CASE_TEMPLATE("inference is top-K, best first, renormalized", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 94);
    for (auto way : ways) {
        const int64_t tokens = 13, experts = 6, k = 2;
        const support::random_batch<Real> b(rng, tokens, experts, 1, 0.3);
        const auto r = run(ex, gate_of(experts, k, 5, way), b, std::vector<Real>(), fm::gate_mode::inference);
        support::holds_together(r, b, k);
        const auto lists = support::lists_of(r, tokens, k);
        for (int64_t t = 0; t < tokens; ++t) {
            CHECK_EQ(lists[t], b.open(t) ? oracle::best_experts(b, t, k) : std::vector<int32_t>(k, -1));
            const std::vector<double> l(b.logits.begin() + t * experts, b.logits.begin() + (t + 1) * experts);
            const std::vector<Real> w(r.weights.begin() + r.first[t], r.weights.begin() + r.first[t + 1]);
            if (b.open(t)) CHECK(support::close(w, over_chosen(l, lists[t]), {.length = 32, .magnitude = 1}));
        }
    }
}

TEST_CASE_TEMPLATE("rows that are not finite keep the order of choice", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    // Own choices of expert 0: tokens 1 and 4, whose +Inf is certain. Then others: finite, -Inf, NaN; never token 3.
    const auto logits = support::narrowed<Real>({0, 1, inf, 1, -inf, 1, nan_, -inf, inf, 1, nan_, 1});
    const auto taken = [&](int64_t tile) {
        const auto gate = gate_of(2, 1, tile, rounding::up);
        const auto r = support::gate_run(ex, gate, 6, logits, std::vector<Real>(gate.assignment.choices(6, 2, 1), Real(1)));
        for (Real w : r.weights) CHECK((w >= 0 && w <= 1));
        for (Real d : r.dlogits) CHECK(std::isfinite(d));
        std::vector<int64_t> out;
        const auto lists = support::lists_of(r, 6, 1);
        for (int64_t t = 0; t < 6; ++t)
            if (std::count(lists[t].begin(), lists[t].end(), 0)) out.push_back(t);
        return out;
    };
    CHECK_EQ(taken(2), std::vector<int64_t>{1, 4});
    CHECK_EQ(taken(3), std::vector<int64_t>{0, 1, 4});
    CHECK_EQ(taken(4), std::vector<int64_t>{0, 1, 2, 4});
    CHECK_EQ(taken(5), std::vector<int64_t>{0, 1, 2, 4, 5});
    CHECK_EQ(taken(6), std::vector<int64_t>{0, 1, 2, 4, 5});
    // Chosen for want of better, a NaN still is an own choice: it ranks before what others would give.
    const auto gate = gate_of(2, 2, 2, rounding::down);
    const auto r = support::gate_run(ex, gate, 3, support::narrowed<Real>({nan_, 1, 0, 0, 5, 0}),
                                     std::vector<Real>(gate.assignment.choices(3, 2, 2)));
    CHECK_EQ(support::lists_of(r, 3, 2), std::vector<std::vector<int32_t>>{{1}, {0, 1}, {0}});
}

TEST_CASE("what makes no sense is refused by name")
{
    const auto says = [&](const fm::token_rounding_gate& gate, int64_t tokens, const char* part) {
        fm::arena measure;
        const std::string text = support::message_of<fm::invalid_argument>([&] { gate.reserve<float>(measure, tokens); });
        INFO(text);
        CHECK(support::has(text, part));
    };
    says(gate_of(4, 5, 8), 2, "k is 5; expected at most the number of experts, 4");
    says(gate_of(4, 0, 8), 2, "k is 0; expected 1 or more");
    says(gate_of(4, 2, 0), 2, "assignment.tile is 0; expected 1 to 2^31 - 1");
    says(gate_of(4, 2, -8), 2, "assignment.tile is -8; expected 1 to 2^31 - 1");
    says(gate_of(4, 2, int64_t{1} << 31), 2, "assignment.tile is 2147483648; expected 1 to 2^31 - 1");
    says(gate_of(4, 2, 8), int64_t{1} << 31, "tokens * k is 2147483648; expected at most 2^31 - 1 choices");
    says(gate_of(4000, 1, 1 << 20, rounding::up), 2000000000,
         "tokens * k is 2000000000; expected at most 2^31 - 1 choices, rounded");
    fm::arena measure;
    CHECK_NOTHROW(gate_of(4, 2, INT32_MAX, rounding::up).reserve<float>(measure, 10));
}
