// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Assignments that no logit decides, and the gate that weighs and bounds what an assignment gives.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <string>

#include <fastmoe/routing/biased_score.hpp>
#include <fastmoe/routing/lookup.hpp>

#include "support/compare.hpp"
#include "support/finite_difference.hpp"
#include "support/reference_scores.hpp"
#include "support/run_gate.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
namespace oracle = support::reference;
using fm::int64_t;

namespace {

static_assert(fm::gate_policy<fm::hash_gate, fm::host_executor, float, fm::self>);
static_assert(fm::gate_policy<fm::random_gate, support::lanes, double, fm::self>);
static_assert(!fm::gate_reads_logits<fm::hash_gate> && !fm::gate_reads_logits<fm::random_gate>);

/// Writes what a test hands it: fixed or ragged.
template <bool Ragged>
struct given {
    static constexpr bool reads_logits = true, ragged = Ragged;
    const std::vector<int32_t>*ids = nullptr, *first = nullptr;

    int64_t choices(int64_t, int64_t, int64_t) const { return static_cast<int64_t>(ids->size()); }

    template <class Executor, class T, class Communicator, class Real>
    void assign(Executor&, const fm::gate_input<T>&, const Communicator&, const fm::assignment<Real>& to, fm::arena& scratch) const
    {
        if (scratch.measuring()) return;
        std::copy(ids->begin(), ids->end(), to.experts.data_handle());
        if (Ragged) std::copy(first->begin(), first->end(), to.first.data_handle());
    }
};

template <bool Ragged, class Score, class Weigh, class Executor>
void weighs_given(Executor& ex, support::random& rng)
{
    const int64_t tokens = 12, experts = 9, k = 3;
    std::vector<int32_t> ids, first{0};
    for (int64_t t = 0; t < tokens; ++t) {
        const auto order = rng.permutation(experts);
        const int64_t n = Ragged ? rng.integer(0, experts) : k;
        for (int64_t j = 0; j < n; ++j) ids.push_back(rng.coin(0.2) ? -1 : static_cast<int32_t>(order[j]));
        first.push_back(static_cast<int32_t>(ids.size()));
    }
    const auto logits = rng.normals(tokens * experts), dweights = rng.normals(static_cast<int64_t>(ids.size()));
    using gate_type = fm::assigned_gate<given<Ragged>, Score, Weigh>;
    gate_type gate{.experts = experts, .k = k, .scale = 1.5};
    gate.assignment = {&ids, &first};
    const support::gate_run r(ex, gate, tokens, logits, dweights);
    CHECK_EQ(r.experts, ids);
    oracle::score_rule rule;
    if (std::is_same_v<Score, fm::sigmoid_score>) rule.score = oracle::score_kind::sigmoid;
    rule.renormalize = Weigh::over_chosen;
    rule.scale = 1.5;
    for (int64_t t = 0; t < tokens; ++t) {
        std::vector<double> l(logits.begin() + t * experts, logits.begin() + (t + 1) * experts);
        std::vector<int> chosen;
        std::vector<int64_t> at;
        for (int64_t c = first[t]; c < first[t + 1]; ++c)
            if (ids[c] >= 0) chosen.push_back(ids[c]), at.push_back(c);
            else CHECK_EQ(r.weights[c], 0.0);
        // Whether a single value is divided depends on the choices the token has, dropped ones included.
        rule.k = first[t + 1] - first[t];
        const auto weights = [&] { return oracle::score_token(rule, l, &chosen).weights; };
        const auto expected = weights();
        for (std::size_t i = 0; i < at.size(); ++i) CHECK(std::fabs(r.weights[at[i]] - expected[i]) < 1e-13);
        const auto gradient = support::finite_difference(
            [&] {
                const auto w = weights();
                double sum = 0;
                for (std::size_t i = 0; i < at.size(); ++i) sum += w[i] * dweights[at[i]];
                return sum;
            },
            l);
        for (int64_t e = 0; e < experts; ++e) CHECK(std::fabs(r.dlogits[t * experts + e] - gradient[e]) < 1e-9);
    }
}

/// How often each expert is drawn, and that a token never has one twice.
std::vector<double> frequencies(const std::vector<int32_t>& ids, int64_t experts, int64_t k)
{
    std::vector<double> out(experts);
    for (std::size_t t = 0; t < ids.size() / k; ++t) {
        const std::set<int32_t> once(ids.begin() + t * k, ids.begin() + (t + 1) * k);
        REQUIRE_EQ(once.size(), static_cast<std::size_t>(k));
        for (int32_t e : once) ++out.at(e);
    }
    return out;
}

} // namespace

TEST_CASE_TEMPLATE("given choices, fixed or ragged, are weighed as the oracle weighs them, with its gradient by finite differences", Cell,
                   FASTMOE_EXECUTORS)
{
    FASTMOE_SEEDED(rng, 41);
    FASTMOE_EXECUTOR(ex, Cell);
    for (int i = 0; i < 5; ++i) {
        weighs_given<false, fm::softmax_score, fm::raw_scores>(ex, rng);
        weighs_given<false, fm::softmax_score, fm::renormalize>(ex, rng);
        weighs_given<false, fm::sigmoid_score, fm::renormalize>(ex, rng);
        weighs_given<true, fm::softmax_score, fm::raw_scores>(ex, rng);
        weighs_given<true, fm::softmax_score, fm::renormalize>(ex, rng);
        weighs_given<true, fm::sigmoid_score, fm::raw_scores>(ex, rng);
    }
}

TEST_CASE("an assignment that writes an id out of range is a fault that names the place, and reads nothing outside")
{
    fm::host_executor ex({.threads = 1});
    std::vector<int32_t> ids{0, 1, 2, 7}, first;
    fm::assigned_gate<given<false>> gate{.experts = 3, .k = 2};
    gate.assignment = {&ids, &first};
    const auto text = support::message_of<fm::invalid_argument>(
        [&] { support::gate_run(ex, gate, 2, std::vector<float>(6), std::vector<float>(4)); });
    CHECK(support::has(text, "routing.experts(3) is 7; expected -1 or an id below E"));
}

TEST_CASE_TEMPLATE("a hash gate sends every token where the table says, with weight 1", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    const std::vector<int32_t> table{3, 1, 0, -1, 2, 3}; // (3,2)
    const auto memory = support::upload(ex, table);
    const fm::hash_gate gate{.experts = 4, .k = 2, .assignment = {fm::matrix_view<const int32_t>(memory.data(), 3, 2)}};
    const support::gate_run r(ex, gate, 4, std::vector<Real>(16), std::vector<Real>(8), fm::gate_mode::inference,
                              {1, 1, 0, 1}, 1.0, support::gate_extras{.token_ids = {2, 0, 0, 1}});
    CHECK_EQ(r.experts, std::vector<int32_t>{2, 3, 3, 1, -1, -1, 0, -1});
    CHECK_EQ(r.weights, std::vector<Real>{1, 1, 1, 1, 0, 0, 1, 0});
}

TEST_CASE("a hash table that is wrong, and ids outside of it, are refused by name")
{
    fm::host_executor ex({.threads = 1});
    const auto says = [&](std::vector<int32_t> table, int64_t width, std::vector<int32_t> ids, const char* part) {
        const fm::hash_gate gate{
            .experts = 4, .k = 2,
            .assignment = {fm::matrix_view<const int32_t>(table.data(), static_cast<int64_t>(table.size()) / width, width)}};
        const std::string text = support::message_of<fm::invalid_argument>([&] {
            support::gate_run(ex, gate, 2, std::vector<float>(8), std::vector<float>(4), fm::gate_mode::inference, {}, 1.0,
                              support::gate_extras{.token_ids = ids});
        });
        INFO(text);
        CHECK(support::has(text, part));
    };
    says({0, 1, 2, 3}, 2, {0, 2}, "token_ids(1) is 2; expected an id inside of the table");
    says({0, 1, 2, 3}, 2, {-1, 0}, "token_ids(0) is -1; expected an id inside of the table");
    says({0, 1, 2, 9}, 2, {1, 0}, "table(3) is 9; expected -1 or an id below E");
    says({0, 1, 2, -2}, 2, {1, 0}, "table(3) is -2; expected -1 or an id below E");
    says({0, 1, 2, 3}, 4, {0, 0}, "assignment.table (V,K) is of shape (1,4); expected (1,2)");
    says({0, 1, 2, 3}, 2, {0}, "token_ids (T) is of shape (1); expected (2)");
}

TEST_CASE("random experts are uniform, without repeats, and a function of seed, step and the token's number alone")
{
    fm::host_executor ex({.threads = 2});
    const int64_t tokens = 20000, experts = 7, k = 3;
    const fm::random_gate gate{.experts = experts, .k = k};
    const auto draw = [&](auto& on, int64_t n, std::uint64_t seed, std::uint64_t step, int64_t first) {
        return support::gate_run(on, gate, n, std::vector<float>(n * experts), std::vector<float>(n * k), fm::gate_mode::training,
                                 {}, 1.0, support::gate_extras{.seed_and_step = {seed, step}, .first_token = first});
    };
    const auto all = draw(ex, tokens, 5, 9, 0);
    for (float w : all.weights) REQUIRE_EQ(w, 1.0f / 3);
    const double expected = double(tokens * k) / experts;
    for (double n : frequencies(all.experts, experts, k)) // five standard deviations
        CHECK(std::fabs(n - expected) < 5 * std::sqrt(expected * (1 - double(k) / experts)));
    // Every set of three is as likely: chi squared with 34 degrees of freedom is below 75 but once in 10^4.
    std::vector<double> sets(128);
    for (int64_t t = 0; t < tokens; ++t) ++sets[(1 << all.experts[3 * t]) | (1 << all.experts[3 * t + 1]) | (1 << all.experts[3 * t + 2])];
    double chi = 0;
    for (double n : sets)
        if (n > 0) chi += (n - tokens / 35.0) * (n - tokens / 35.0) / (tokens / 35.0);
    CHECK(chi < 75);

    support::lanes lanes;
    const auto part = draw(lanes, 50, 5, 9, 1000); // another executor, another rank's tokens
    CHECK(std::equal(part.experts.begin(), part.experts.end(), all.experts.begin() + 3000));
    CHECK(draw(ex, 50, 5, 10, 0).experts != draw(ex, 50, 5, 9, 0).experts);
    CHECK(draw(ex, 50, 6, 9, 0).experts != draw(ex, 50, 5, 9, 0).experts);
    const auto every = draw(ex, 40, 1, 1, 0);
    const fm::random_gate whole{.experts = 5, .k = 5};
    frequencies(support::gate_run(ex, whole, 3, std::vector<float>(15), std::vector<float>(15), fm::gate_mode::training, {}, 1.0,
                                  support::gate_extras{.seed_and_step = {1, 1}}).experts, 5, 5);
    CHECK(support::has(support::message_of<fm::invalid_argument>([&] {
              support::gate_run(ex, gate, 2, std::vector<float>(2 * experts), std::vector<float>(2 * k));
          }),
          "random is a null pointer; expected seed and step"));
}

TEST_CASE("capacity bounds what an assignment gives, and rescales what is left")
{
    fm::host_executor ex({.threads = 1});
    std::vector<int32_t> ids{0, 1, 0, 2, 0, 1}, first; // three tokens; expert 0 is asked for three times
    fm::assigned_gate<given<false>, fm::constant_score, fm::raw_scores> gate{
        .experts = 3, .k = 2, .capacity = {.factor = 0.5, .weights = fm::after_drop::rescale}};
    gate.assignment = {&ids, &first};
    const support::gate_run r(ex, gate, 3, std::vector<double>(9), std::vector<double>(6, 1.0));
    CHECK_EQ(r.experts, std::vector<int32_t>{0, 1, -1, 2, -1, -1});
    CHECK_EQ(r.weights, std::vector<double>{1, 1, 0, 2, 0, 0});
    CHECK_EQ(r.dlogits, std::vector<double>(9, 0.0));
}

namespace {

/// Gives every token one expert.
struct one_for_all {
    static constexpr bool reads_logits = false, ragged = false;
    int32_t id = 0;

    template <class Executor, class T, class Communicator, class Real>
    void assign(Executor& ex, const fm::gate_input<T>&, const Communicator&, const fm::assignment<Real>& to, fm::arena& scratch) const
    {
        if (!scratch.measuring()) fastmoe::for_each(ex, to.tokens, fm::detail::fill<int32_t>{to.experts.data_handle(), id});
    }
};
/// Sums nothing.
struct lost : fm::self {
    template <class Executor, class T>
    void all_reduce(Executor&, fm::vector_view<T>) const
    {
        throw fm::comm_error("nobody answers");
    }
};

} // namespace

TEST_CASE("an id out of range is a fault of its own call, though the communicator fails in it, and of no later one")
{
    fm::host_executor ex({.threads = 1});
    fm::assigned_gate<one_for_all> gate{.experts = 4, .k = 1, .balance = {.coefficient = 0.1}};
    const auto route = [&](int32_t id, const auto& communicator) {
        gate.assignment.id = id;
        const std::vector<float> logits(12, 1.0f);
        fm::buffer<std::byte, fm::host_executor> memory(ex, 1 << 16);
        fm::arena lent(memory.view());
        const auto state = gate.reserve<float>(lent, 3);
        fm::gate_input<float> in;
        in.logits = fm::matrix_view<const float>(logits.data(), 3, 4);
        gate.route(ex, in, communicator, state, lent);
    };
    CHECK_THROWS_WITH_AS(route(99, lost()), doctest::Contains("routing.experts(0) is 99"), fm::invalid_argument);
    CHECK_NOTHROW(route(2, fm::self()));
    CHECK_THROWS_AS(route(2, lost()), fm::comm_error);
    CHECK_NOTHROW(route(2, fm::self()));
}

TEST_CASE("experts at random are refused for tokens with numbers below zero")
{
    fm::host_executor ex({.threads = 1});
    const fm::random_gate gate{.experts = 4, .k = 2};
    const std::uint64_t numbers[] = {1, 2};
    fm::buffer<std::byte, fm::host_executor> memory(ex, 1 << 16);
    fm::arena arena(memory.view());
    const auto state = gate.reserve<float>(arena, 3);
    fm::gate_input<float> in;
    in.random = numbers, in.first_token = -1;
    CHECK_THROWS_WITH_AS(gate.route(ex, in, fm::self(), state, arena), doctest::Contains("first_token is -1; expected zero or more"), fm::invalid_argument);
    in.first_token = 0;
    CHECK_NOTHROW(gate.route(ex, in, fm::self(), state, arena));
}
