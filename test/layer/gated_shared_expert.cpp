// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A shared expert behind a sigmoid gate, against the oracle's expert and finite differences of it.
#include <doctest/doctest.h>

#include <cmath>

#include <fastmoe/layer/gated_shared_expert.hpp>

#include "support/compare.hpp"
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
        auto model = support::random_experts<T>(r, 1, oracle::expert_kind::mlp, oracle::activation::swiglu, width, hidden, true);
        support::mlp_memory<T, Executor> w(ex, model, {}, false), g(ex, model, {}, true);
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

        const auto where = weigh == weigh_at::output       ? oracle::weight_at::output
                           : weigh == weigh_at::activation ? oracle::weight_at::activation
                                                           : oracle::weight_at::input;
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
        // The differences themselves are good to 1e-10 or so.
        const support::tolerance bound{.length = std::is_same_v<T, double> ? 5e4 : 200, .roundings = 8, .magnitude = 20};
        CHECK(support::close(y.view(), plus(gated(model[0], where, gate_values, xs), before), bound));
        CHECK(support::same_bits(support::download(ex, again.view()), support::download(ex, y.view())));
        const auto slope = [&](oracle::numbers& at) { return support::finite_difference(value, at); };
        CHECK(support::close(dx.view(), plus(slope(xs), dx_before), bound));
        CHECK(support::close(dgate.view(), slope(gate_values), bound));
        CHECK(support::close(support::narrowed<T>(g.up()), slope(model[0].up), bound));
        CHECK(support::close(support::narrowed<T>(g.down()), slope(model[0].down), bound));
        CHECK(support::close(support::narrowed<T>(g.up_bias()), slope(model[0].up_bias), bound));
        CHECK(support::close(support::narrowed<T>(g.down_bias()), slope(model[0].down_bias), bound));
    }
}

TEST_CASE("a gate of another shape is refused by name before y is written")
{
    host_executor ex({.threads = 1});
    const gated_shared_expert shared{mlp<swiglu>{.width = 4, .hidden = 3}};
    FASTMOE_SEEDED(r, 62);
    const auto model =
        support::random_experts<float>(r, 1, oracle::expert_kind::mlp, oracle::activation::swiglu, 4, 3, false);
    support::mlp_memory<float, host_executor> w(ex, model, {}, false);
    std::vector<float> gate(5), x(8), y(8, 7.0f);
    support::workspace memory(ex, 1 << 16);
    const gated_shared_weights<const float, mlp<swiglu>> views{matrix_view<const float>(gate.data(), 1, 5), w.views()};
    CHECK_THROWS_WITH_AS(shared.infer(ex, as_matrix(x, 2, 4), views, as_matrix(y, 2, 4), memory),
                         doctest::Contains("weights.gate (1,D) is of shape (1,5); expected (1,4)"), invalid_argument);
    CHECK_EQ(y, std::vector<float>(8, 7.0f));
}
