// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A shared expert behind a sigmoid gate, against the oracle's expert and finite differences of it.
#include <doctest/doctest.h>

#include <cmath>

#include <fastmoe/layer/gated_shared_expert.hpp>

#include "support/expected_expert.hpp"
#include "support/expert_weights.hpp"
#include "support/finite_difference.hpp"
#include "support/poison.hpp"
#include "support/scratch.hpp"

using namespace fastmoe;
namespace oracle = support::reference;

namespace {

/// sigmoid(x . g) expert(x) for every token, in double.
oracle::numbers gated(const oracle::expert& e, oracle::weight_at where, const oracle::numbers& gate, const oracle::numbers& x)
{
    oracle::numbers y;
    for (std::size_t t = 0; t * gate.size() < x.size(); ++t) {
        const auto row = oracle::row_of(x, static_cast<int64_t>(t), e.width);
        double dot = 0;
        for (std::size_t d = 0; d < gate.size(); ++d) dot += row[d] * gate[d];
        const auto result = oracle::run_expert(e, where, row, 1 / (1 + std::exp(-dot))).result;
        y.insert(y.end(), result.begin(), result.end());
    }
    return y;
}

/// The same with every rounding that the class documents, forward and backward, added to what y and dx held.
template <class T>
struct expected_gated {
    using real = accumulate_t<T>;
    using number = support::bounded<real>;
    std::vector<number> y, dx;
    std::vector<support::bounded_sum<real>> gate;
    support::expected_gradients<T> gradients;

    expected_gated(const oracle::expert& e, oracle::weight_at where, const oracle::numbers& g, const oracle::numbers& x,
                   const oracle::numbers& dy, const oracle::numbers& before, const oracle::numbers& dx_before)
        : gate(g.size()), gradients(e)
    {
        for (int64_t t = 0; t * e.width < int64_t(x.size()); ++t) {
            const auto row = oracle::row_of(x, t, e.width);
            support::bounded_sum<real> dot;
            for (int64_t d = 0; d < e.width; ++d) dot.add(row[d], g[d]);
            const number weight = number(1) / (number(1) + exponential(number(0) - dot.total()));
            support::expected_row<T> one(e, where, row, weight);
            one.backward(oracle::row_of(dy, t, e.width), gradients);
            const number dlogit = one.dweight * (weight * (number(1) - weight));
            for (int64_t d = 0; d < e.width; ++d) {
                const int64_t at = t * e.width + d;
                y.push_back(number(before[at]) + (where == oracle::weight_at::output ? weight * one.result[d] : one.result[d]));
                dx.push_back(support::stored<T>(number(dx_before[at]) + one.dx[d]) + dlogit * number(g[d]));
                gate[d].add(dlogit, row[d]);
            }
        }
    }
};

} // namespace

TEST_CASE_TEMPLATE("a gated shared expert adds sigmoid(x g) times the expert, and the gradients of finite differences", Cell,
                   FASTMOE_CELLS)
{
    using T = typename Cell::type;
    using Executor = typename Cell::executor;
    FASTMOE_SEEDED(r, 61);
    FASTMOE_EXECUTOR(ex, Cell);
    for (const weigh_at weigh : {weigh_at::output, weigh_at::activation, weigh_at::input}) {
        CAPTURE(int(weigh));
        const int64_t tokens = 7, width = 6, hidden = 5;
        const gated_shared_expert shared{mlp<swiglu>{.width = width, .hidden = hidden, .biases = true, .weigh = weigh}};
        using memory_type = support::expert_memory<T, mlp<swiglu>, Executor>;
        auto model = memory_type::draw(r, shared.expert, 1);
        const memory_type w(ex, shared.expert, model), g(ex, shared.expert, support::poisoned(model));
        auto gate_values = support::widened(support::narrowed<T>(r.normals(width)));
        auto gate = support::upload(ex, support::narrowed<T>(gate_values));
        support::guarded<T> x(tokens, width), y(tokens, width), again(tokens, width), dy(tokens, width), dx(tokens, width);
        support::guarded<T> dgate(1, width);
        auto xs = support::fill_normal(r, x.view());
        const auto dys = support::fill_normal(r, dy.view());
        const auto before = support::fill_normal(r, y.view()), dx_before = support::fill_normal(r, dx.view());
        std::copy_n(y.data(), tokens * width, again.data());
        using weights = gated_shared_weights<const T, mlp<swiglu>>;
        const weights views{matrix_view<const T>(gate.data(), 1, width), w.views()};
        const gated_shared_weights<T, mlp<swiglu>> gradients{dgate.view(), g.views()};
        support::in_workspace(ex, [&](arena& memory) {
            const auto kept = shared.forward(ex, x.view(), views, y.view(), memory);
            shared.infer(ex, x.view(), views, again.view(), memory);
            shared.backward(ex, kept, dy.view(), views, dx.view(), gradients, write_mode::overwrite, memory);
            ex.synchronize();
        });

        const auto where = support::where_of(weigh);
        const auto plus = [](oracle::numbers a, const oracle::numbers& b) {
            for (std::size_t i = 0; i < a.size(); ++i) a[i] += b[i];
            return a;
        };
        const auto value = [&] {
            const auto out = gated(model[0], where, gate_values, xs);
            double sum = 0;
            for (std::size_t i = 0; i < out.size(); ++i) sum += out[i] * dys[i];
            return sum;
        };
        const expected_gated<T> expected(model[0], where, gate_values, xs, dys, before, dx_before);
        using sums = support::expected_gradients<T>;
        using members = std::pair<oracle::numbers oracle::expert::*, typename sums::sums sums::*>;
        const members all[] = {{&oracle::expert::up, &sums::up}, {&oracle::expert::down, &sums::down},
                               {&oracle::expert::up_bias, &sums::up_bias}, {&oracle::expert::down_bias, &sums::down_bias}};
        CHECK(support::within(y.view(), expected.y));
        CHECK(support::same_bits(support::download(ex, again.view()), support::download(ex, y.view())));
        CHECK(support::within(dx.view(), expected.dx));
        CHECK(support::within(dgate.view(), totals(expected.gate)));
        for (const auto& [member, of] : all)
            CHECK(support::within(support::narrowed<T>(g.read(member)), totals(expected.gradients.*of)));

        if (!std::is_same_v<T, double>) continue; // the expectation itself, by differences that are good to 1e-10 or so
        const support::tolerance bound{.length = 5e4, .magnitude = 20};
        const auto slope = [&](oracle::numbers& at) { return support::finite_difference(value, at); };
        const auto values = [](const auto& numbers) {
            std::vector<double> out;
            for (const auto& n : numbers) out.push_back(n.value);
            return out;
        };
        CHECK(support::close(values(expected.y), plus(gated(model[0], where, gate_values, xs), before), bound));
        CHECK(support::close(values(expected.dx), plus(slope(xs), dx_before), bound));
        CHECK(support::close(values(totals(expected.gate)), slope(gate_values), bound));
        for (const auto& [member, of] : all)
            CHECK(support::close(values(totals(expected.gradients.*of)), slope(model[0].*member), bound));
    }
}

TEST_CASE("a gated shared expert refuses a gate of another shape, a gradient over what it reads and a short workspace, and touches nothing")
{
    host_executor ex({.threads = 1});
    const gated_shared_expert shared{mlp<swiglu>{.width = 4, .hidden = 3}};
    FASTMOE_SEEDED(r, 62);
    using memory_type = support::expert_memory<float, mlp<swiglu>, host_executor>;
    const auto model = memory_type::draw(r, shared.expert, 1);
    const memory_type w(ex, shared.expert, model), g(ex, shared.expert, model);
    const std::vector<float> before(8, 7.0f);
    std::vector<float> gate(5), dgate(4), x(8, 1.0f), y = before, dy(8, 1.0f), dx = before;
    using views = gated_shared_weights<float, mlp<swiglu>>;
    const views good{as_matrix(gate, 1, 5), w.views()};
    views one = good, gradients{as_matrix(dgate, 1, 4), g.views()};
    one.gate = matrix_view<float>(gate.data(), 1, 4);
    const auto matrix = [](auto& v) { return as_matrix(v, 2, 4); };
    support::workspace room(ex, 1 << 16);
    const auto kept = shared.forward(ex, matrix(x), one, matrix(y), room);
    y = before;

    const auto refused = [&](const auto& call, const char* part) {
        const std::string text = support::message_of<error>(call);
        INFO(text);
        CHECK(support::has(text, part));
        CHECK_EQ(y, before);
        CHECK_EQ(dx, before);
    };
    const char* wrong = "weights.gate (1,D) is of shape (1,5); expected (1,4)";
    refused([&] { shared.infer(ex, matrix(x), good, matrix(y), room); }, wrong);
    refused([&] { (void)shared.forward(ex, matrix(x), good, matrix(y), room); }, wrong);
    const auto back = [&](const views& with, const views& to, std::vector<float>& out, arena& memory) {
        shared.backward(ex, kept, matrix(dy), with, matrix(out), to, write_mode::overwrite, memory);
    };
    refused([&] { back(good, gradients, dx, room); }, wrong);
    refused([&] { back(one, good, dx, room); }, "gradients.gate (1,D) is of shape (1,5); expected (1,4)");
    refused([&] { back(one, gradients, dy, room); }, "dx (T,D) is memory that is shared; expected none in common with dy");
    refused([&] { back(one, gradients, x, room); }, "dx (T,D) is memory that is shared; expected none in common with x");
    refused([&] { (void)shared.forward(ex, matrix(x), one, matrix(x), room); }, "y (T,D) is memory that is shared");
    const auto short_of = [&](const auto& call) {
        arena measure;
        call(measure);
        support::workspace little(ex, measure.bytes() - 1);
        refused([&] { call(little.arena()); }, "workspace is ");
    };
    short_of([&](arena& m) { shared.infer(ex, matrix(x), one, matrix(y), m); });
    short_of([&](arena& m) { (void)shared.forward(ex, matrix(x), one, matrix(y), m); });
    short_of([&](arena& m) { back(one, gradients, dx, m); });
}
