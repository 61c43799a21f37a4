// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include "support/compare_layer.hpp"

using namespace fastmoe;
namespace oracle = support::reference;
using compare_layer::check;
using compare_layer::run;
using compare_layer::setting;

namespace {

using renormalizing = top_k_gate<softmax_score, top_k, renormalize>;
using raw = top_k_gate<softmax_score, top_k, raw_scores>;

struct drawn {
    setting s;
    int64_t experts, k, width, hidden;
    bool biases;
    weigh_at weigh;

    explicit drawn(support::random& r)
        : s{.tokens = r.one_of<int64_t>(1, 9, r.integer(2, 60))}, experts(r.integer(2, 9)), k(r.integer(2, experts)),
          width(r.integer(1, 33)), hidden(r.integer(1, 40)), biases(r.coin()),
          weigh(r.one_of(weigh_at::output, weigh_at::activation, weigh_at::input))
    {
        s.gate_bias = r.coin();
        s.masked = r.coin(0.3);
    }
    template <class Expert>
    Expert expert() const
    {
        return {.width = width, .hidden = hidden, .biases = biases, .weigh = weigh};
    }
};

fastmoe::capacity random_capacity(support::random& r)
{
    return {r.one_of(0.0, 0.4, 0.9, 1.5), r.one_of(drop_order::token_major, drop_order::choice_major, drop_order::by_weight),
            r.one_of(after_drop::keep, after_drop::rescale)};
}

} // namespace

TEST_CASE_TEMPLATE("a layer with softmax over the chosen gives the oracle's values and gradients", Cell, FASTMOE_CELLS)
{
    FASTMOE_NEEDS(Cell);
    FASTMOE_SEEDED(r, 41);
    for (int round = 0; round < 16; ++round) {
        CAPTURE(round);
        const drawn d(r);
        renormalizing gate{.experts = d.experts, .k = d.k, .scale = r.one_of(1.0, 2.5)};
        if (round % 2) gate.balance = {0.1}, gate.z = {0.02};
        if (round % 4 > 1) gate.capacity = random_capacity(r);
        check(run<Cell>(r, gate, d.expert<mlp<swiglu>>(), d.s));
    }
}

TEST_CASE_TEMPLATE("a layer with softmax before the choice gives the oracle's values and gradients", Cell, FASTMOE_CELLS)
{
    FASTMOE_NEEDS(Cell);
    FASTMOE_SEEDED(r, 42);
    for (int round = 0; round < 16; ++round) {
        CAPTURE(round);
        const drawn d(r);
        raw gate{.experts = d.experts, .k = round < 3 ? 1 : d.k, .scale = r.one_of(1.0, 2.5)}; // 1: Switch
        if (round % 2) gate.balance = {0.1}, gate.z = {0.02};
        if (round % 3 == 0) gate.capacity = random_capacity(r);
        check(run<Cell>(r, gate, d.expert<mlp<gelu>>(), d.s));
    }
}

TEST_CASE_TEMPLATE("the corners of the shape give the oracle's values and gradients", Cell, FASTMOE_CELLS)
{
    FASTMOE_NEEDS(Cell);
    FASTMOE_SEEDED(r, 44);
    compare_layer::corners<Cell>(r, [](int64_t width, int64_t hidden) {
        return mlp<gelu>{.width = width, .hidden = hidden, .biases = true};
    });
}

// What the comparison would say of mistakes. Each is made in the library's own results, to which the exact difference that
// the mistake makes is added before they are rounded again.

namespace {

/// The exact contribution of one choice to y.
oracle::numbers contribution(const oracle::model& m, const oracle::numbers& x, int64_t token, int expert, double weight)
{
    oracle::numbers y(x.size());
    oracle::apply(m.experts, m.where, x, {{token, expert, weight}}, y);
    return y;
}

template <class T>
std::vector<T> plus(const std::vector<T>& y, const oracle::numbers& d, double times)
{
    std::vector<T> out;
    for (std::size_t i = 0; i < y.size(); ++i) out.push_back(support::narrow<T>(double(y[i]) + times * d[i]));
    return out;
}

template <class E>
std::vector<E> scaled(std::vector<E> v, double by)
{
    for (E& e : v) e = support::narrow<E>(by * double(e));
    return v;
}

template <class E>
std::vector<E> rows_swapped(std::vector<E> v, int64_t a, int64_t b, int64_t width)
{
    std::swap_ranges(v.begin() + a * width, v.begin() + (a + 1) * width, v.begin() + b * width);
    return v;
}

} // namespace

TEST_CASE_TEMPLATE("the comparison rejects results that are zero, a tenth too large, or have one thing wrong", T, FASTMOE_DTYPES)
{
    using Cell = support::cell<host_executor, T>;
    FASTMOE_SEEDED(r, 43);
    const int64_t width = 24, tokens = 40;
    for (const auto weigh : {weigh_at::output, weigh_at::activation, weigh_at::input}) {
        CAPTURE(int(weigh));
        const mlp<swiglu> expert{.width = width, .hidden = 32, .biases = true, .weigh = weigh};
        const auto out = run<Cell>(r, renormalizing{.experts = 5, .k = 2, .balance = {0.1}, .z = {0.02}}, expert, {.tokens = tokens});
        REQUIRE(out.accepted());
        const auto rejects = [](auto result, auto wrong) {
            INFO(std::string(result.name), " of ", result.found.size(), " elements");
            result.found = std::move(wrong);
            CHECK_FALSE(result.judged());
        };
        const auto each = [&](const auto& results) {
            for (const auto& res : results) {
                if (res.found.empty()) continue; // no bias of the router
                rejects(res, scaled(res.found, 0));
                rejects(res, scaled(res.found, 1.1));
                rejects(res, scaled(res.found, 0.9));
                rejects(res, scaled(res.found, -1));
            }
        };
        each(out.tensors);
        each(out.gradients);
        each(out.scalars);

        const auto& y = out.tensors[0];
        for (int e = 0; e < 5; ++e) { // one expert is missing
            oracle::numbers lost(y.found.size());
            for (const auto& c : out.choices)
                if (c.expert == e) {
                    const auto part = contribution(out.model, out.x, c.token, e, c.weight.value);
                    for (std::size_t i = 0; i < lost.size(); ++i) lost[i] += part[i];
                }
            rejects(y, plus(y.found, lost, -1));
        }
        for (const auto& c : out.choices) { // one weight of one token is a tenth off
            if (c.weight.value < 0.02) continue;
            const auto is = contribution(out.model, out.x, c.token, c.expert, c.weight.value);
            auto wrong = contribution(out.model, out.x, c.token, c.expert, 1.1 * c.weight.value);
            for (std::size_t i = 0; i < is.size(); ++i) wrong[i] -= is[i];
            rejects(y, plus(y.found, wrong, 1));
        }
        for (int64_t t = 1; t < tokens; ++t) // two rows have changed places
            for (const auto& res : out.tensors) rejects(res, rows_swapped(res.found, t - 1, t, width));
        for (const auto& res : out.gradients)
            if (!res.found.empty()) rejects(res, rows_swapped(res.found, 0, 1, int64_t(res.found.size()) / 10));
        std::size_t passed = 0;
        for (std::size_t i = 0; i < y.found.size(); ++i) { // one element is not written, or off by units in the last place
            auto off = y, missing = y;
            missing.found[i] = support::narrow<T>(NAN);
            CHECK_FALSE(missing.judged());
            off.found[i] = support::narrow<T>(double(off.found[i]) * (1 + 4 * support::roundoff<T>));
            passed += bool(off.judged());
        }
        if (!std::is_same_v<T, accumulate_t<T>>) CHECK(passed < y.found.size() / 2); // few roundings are in doubt
    }
}
