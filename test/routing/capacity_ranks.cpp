// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A capacity over all ranks drops what one rank drops of the joined batch.
#include <doctest/doctest.h>

#include <limits>

#include <fastmoe/comm/threads.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

#include "support/choices.hpp"
#include "support/compare.hpp"
#include "support/reference_routing.hpp"
#include "support/run_gate.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
using fm::int64_t;

namespace {

constexpr fm::drop_order orders[] = {fm::drop_order::token_major, fm::drop_order::choice_major, fm::drop_order::by_weight};
constexpr fm::capacity_scope all_ranks = fm::capacity_scope::all_ranks;

/// Where each rank's tokens begin; some ranks have none.
std::vector<int64_t> cuts(support::random& rng, int ranks, int64_t tokens)
{
    std::vector<int64_t> out{0};
    for (int r = 1; r < ranks; ++r) out.push_back(rng.coin(0.2) ? out.back() : rng.integer(out.back(), tokens));
    out.push_back(tokens);
    return out;
}

/// Tokens [begin, end).
template <class Real>
support::choices<Real> part_of(const support::choices<Real>& all, int64_t begin, int64_t end)
{
    support::choices<Real> out{end - begin, all.experts_total, all.k, {}, {}, {}};
    const int64_t from = all.first[begin], to = all.first[end];
    out.experts.assign(all.experts.begin() + from, all.experts.begin() + to);
    out.weights.assign(all.weights.begin() + from, all.weights.begin() + to);
    for (int64_t t = begin; t <= end; ++t) out.first.push_back(static_cast<int32_t>(all.first[t] - from));
    return out;
}

template <class Executor, class Real>
void apply(Executor& ex, const fm::capacity& bound, support::choices<Real>& c, const fm::threads& ranks)
{
    fm::arena query;
    fm::apply_capacity(ex, bound, c.view(), ranks, query);
    support::workspace scratch(ex, query.bytes());
    fm::apply_capacity(ex, bound, c.view(), ranks, scratch);
    CHECK_EQ(scratch.arena().used(), 0);
}

} // namespace

TEST_CASE_TEMPLATE("1 to 4 ranks drop what one rank drops of the joined batch, in every order", Cell, FASTMOE_LOGIT_CELLS)
{
    FASTMOE_NEEDS(Cell);
    using Real = typename Cell::type;
    using executor = typename Cell::executor;
    FASTMOE_SEEDED(rng, 71);
    const bool small = support::takes_turns<executor>;
    for (int i = 0; i < (small ? 4 : 40); ++i)
        for (auto order : orders)
            for (int ranks = 1; ranks <= (small ? 2 : 4); ++ranks) {
                const int64_t experts = rng.integer(1, 20), tokens = rng.integer(0, small ? 30 : 400);
                const bool ragged = order != fm::drop_order::choice_major && rng.coin(0.3);
                const int64_t k = ragged ? 0 : rng.integer(1, std::min<int64_t>(experts, 4));
                const auto before = support::random_choices<Real>(rng, tokens, experts, k);
                const auto from = cuts(rng, ranks, tokens);
                const double factor = rng.one_of(0.0, 0.1, 0.5, 0.8, 1.0, 1.3, 50.0);
                const fm::capacity bound{.factor = factor, .order = order, .over = all_ranks};
                CAPTURE(ranks);
                CAPTURE(experts);
                CAPTURE(k);
                const auto choices = static_cast<int64_t>(before.experts.size());
                const int64_t limit = bound.of(choices, experts);
                CHECK_EQ(limit, std::min(support::reference::capacity_of(bound.factor, 1, choices, experts), choices));
                const auto stays = support::kept(before, order, limit);
                std::vector<support::choices<Real>> after(ranks);
                for (int r = 0; r < ranks; ++r) after[r] = part_of(before, from[r], from[r + 1]);
                fm::run_ranks(ranks, [&](const fm::threads& c) {
                    auto ex = support::executor_of_thread<executor>(1 + c.rank() % 2);
                    apply(ex, bound, after[c.rank()], c);
                });
                std::size_t at = 0, wrong = 0;
                for (const auto& part : after)
                    for (std::size_t c = 0; c < part.experts.size(); ++c, ++at) {
                        wrong += part.experts[c] != (stays[at] ? before.experts[at] : -1);
                        wrong += part.weights[c] != (stays[at] ? before.weights[at] : Real(0));
                    }
                REQUIRE_EQ(at, stays.size());
                REQUIRE_EQ(wrong, 0);
            }
}

TEST_CASE("a capacity of each rank counts its own tokens, whatever the others have")
{
    FASTMOE_SEEDED(rng, 72);
    const auto all = support::random_choices<float>(rng, 90, 5, 2);
    fm::run_ranks(3, [&](const fm::threads& c) {
        fm::host_executor ex({.threads = 1});
        auto joint = part_of(all, 30 * c.rank(), 30 * c.rank() + 30 - c.rank());
        auto alone = joint;
        for (auto order : orders) {
            const fm::capacity bound{.factor = 0.7, .order = order};
            apply(ex, bound, joint, c);
            fm::arena query;
            fm::apply_capacity(ex, bound, alone.view(), query);
            support::workspace scratch(ex, query.bytes());
            fm::apply_capacity(ex, bound, alone.view(), scratch);
            CHECK_EQ(joint.experts, alone.experts);
        }
    });
}

TEST_CASE("by weight the least that stays is exact over ranks: neighbours, negative weights, zeros and infinities")
{
    const auto check = [](auto real, std::vector<double> weights, double factor, std::vector<int> stays) {
        using Real = decltype(real);
        std::vector<int> got;
        std::vector<support::choices<Real>> parts(3);
        const auto tokens = static_cast<int64_t>(weights.size());
        for (int64_t t = 0; t < tokens; ++t) {
            auto& part = parts[t * 3 / tokens];
            part.experts.push_back(0);
            part.weights.push_back(Real(weights[t]));
        }
        for (auto& part : parts) {
            part.tokens = static_cast<int64_t>(part.experts.size());
            part.experts_total = part.k = 1;
        }
        fm::run_ranks(3, [&](const fm::threads& c) {
            fm::host_executor ex({.threads = 1});
            apply(ex, {.factor = factor, .order = fm::drop_order::by_weight, .over = all_ranks}, parts[c.rank()], c);
        });
        for (const auto& part : parts)
            for (int32_t e : part.experts) got.push_back(e >= 0);
        CHECK_EQ(got, stays);
    };
    const double inf = std::numeric_limits<double>::infinity(), nan_ = std::numeric_limits<double>::quiet_NaN();
    const double up = std::nextafter(1.0, 2.0), down = std::nextafter(1.0, 0.0), upf = std::nextafter(1.f, 2.f);
    check(0.0, {1, up, 1, down, 1, up}, 0.5, {1, 1, 0, 0, 0, 1});
    check(0.f, {1, upf, 1, 1, 1, upf}, 0.5, {1, 1, 0, 0, 0, 1});
    check(0.0, {-3, -1, -2, -1, -2, -4}, 0.5, {0, 1, 1, 1, 0, 0});
    check(0.f, {0, -0.0, -1, 0, 1e-45, -0.0}, 0.5, {1, 1, 0, 0, 1, 0}); // 0 and -0 are equal
    check(0.0, {inf, -inf, nan_, 1e308, inf, -1e308}, 0.5, {1, 0, 0, 1, 1, 0});
    check(0.0, {nan_, -inf, nan_, nan_, nan_, -inf}, 0.5, {1, 1, 0, 0, 0, 1});
    check(0.f, {3, 3, 3, 3, 3, 3}, 4, {1, 1, 1, 1, 1, 1});
}

TEST_CASE("gates with a capacity over all ranks give, together, the experts, weights and gradients of the joined batch")
{
    FASTMOE_SEEDED(rng, 73);
    for (auto order : orders)
        for (auto weights : {fm::after_drop::keep, fm::after_drop::rescale})
            for (int ranks : {2, 3, 4}) {
                const int64_t experts = 6, k = 3, tokens = 50;
                const fm::capacity bound{.factor = 0.8, .order = order, .weights = weights, .over = all_ranks};
                const fm::top_k_gate<> gate{.experts = experts, .k = k, .scale = 1.5, .capacity = bound};
                const auto logits = support::normal_vector<double>(rng, tokens * experts);
                const auto dweights = support::normal_vector<double>(rng, tokens * k);
                std::vector<std::uint8_t> mask(tokens, 1);
                for (auto& m : mask) m = rng.coin(0.8);
                fm::host_executor one({.threads = 1});
                const support::gate_run joined(one, gate, tokens, logits, dweights, fm::gate_mode::training, mask);
                REQUIRE(std::count(joined.experts.begin(), joined.experts.end(), -1) > 10);
                const auto from = cuts(rng, ranks, tokens);
                std::vector<std::vector<int32_t>> ids(ranks);
                std::vector<std::vector<double>> got(ranks), gradient(ranks);
                const auto slice_of = [&](const auto& all, int r, int64_t width) {
                    const auto begin = all.begin() + from[r] * width, end = all.begin() + from[r + 1] * width;
                    return std::remove_cvref_t<decltype(all)>(begin, end);
                };
                fm::run_ranks(ranks, [&](const fm::threads& c) {
                    fm::host_executor ex({.threads = 1});
                    const int r = c.rank();
                    const support::gate_run part(ex, gate, from[r + 1] - from[r], slice_of(logits, r, experts),
                                                 slice_of(dweights, r, k), fm::gate_mode::training, slice_of(mask, r, 1), 1,
                                                 support::gate_extras{}, c);
                    ids[r] = part.experts;
                    got[r] = part.weights;
                    gradient[r] = part.dlogits;
                });
                for (int r = 0; r < ranks; ++r) {
                    CHECK_EQ(ids[r], slice_of(joined.experts, r, k));
                    CHECK(support::same_bits(got[r], slice_of(joined.weights, r, k)));
                    CHECK(support::same_bits(gradient[r], slice_of(joined.dlogits, r, experts)));
                }
            }
}

TEST_CASE("masked tokens count in the capacity and take no place")
{
    fm::host_executor ex({.threads = 1});
    const fm::switch_gate gate{.experts = 2, .capacity = {.factor = 1}};
    const std::vector<float> logits{1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0}; // six tokens want expert 0, which keeps three
    const std::vector<std::uint8_t> mask{0, 1, 0, 1, 1, 1};
    const support::gate_run r(ex, gate, 6, logits, std::vector<float>(6), fm::gate_mode::training, mask);
    CHECK_EQ(r.experts, std::vector<int32_t>{-1, 0, -1, 0, 0, -1});
}

TEST_CASE("an id out of range on one rank is named there, and the other learns of it")
{
    std::vector<std::string> told(2);
    fm::run_ranks(2, [&](const fm::threads& c) {
        fm::host_executor ex({.threads = 1});
        support::choices<float> part{3, 2, 1, {0, c.rank() == 0 ? 9 : 1, 0}, {}, {1, 1, 1}};
        try {
            apply(ex, {.factor = 1, .over = all_ranks}, part, c);
        } catch (const fm::error& e) {
            told[c.rank()] = e.what();
        }
    });
    CHECK(support::has(told[0], "routing.experts(1) is 9; expected -1 or an id below E"));
    CHECK(support::has(told[1], "rank 0 of 2 failed"));
}

TEST_CASE("a capacity over all ranks needs a communicator")
{
    fm::host_executor ex({.threads = 1});
    support::choices<float> c{1, 2, 1, {0}, {}, {1}};
    fm::arena none;
    const std::string text = support::message_of<fm::invalid_argument>(
        [&] { fm::apply_capacity(ex, {.factor = 1, .over = all_ranks}, c.view(), none); });
    CHECK(support::has(text, "capacity.over is all_ranks; expected one_rank where no communicator is given"));
}
