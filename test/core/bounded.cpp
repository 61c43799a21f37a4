// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The oracle with roundings and bounds, judged by the plain one: in double they agree, and what a bound leaves open is
/// small beside what a mistake would do.
#include <doctest/doctest.h>

#include "support/executors.hpp"
#include "support/expected_layer.hpp"

using namespace support;

namespace {

reference::expert draw(support::random& r, reference::expert_kind kind, reference::activation act, int64_t width, bool biases)
{
    auto e = reference::make_expert(kind, act, width, r.integer(1, 9), biases);
    for (auto* part : {&e.up, &e.up_bias, &e.down, &e.down_bias})
        for (double& v : *part) v = r.normal(0.7);
    return e;
}

/// Whether the values are those of the plain oracle, and the bounds hold but are not much wider than roundings in double.
void agree(const char* what, const std::vector<bounded<double>>& found, const reference::numbers& expected)
{
    REQUIRE(found.size() == expected.size());
    for (std::size_t i = 0; i < found.size(); ++i) {
        INFO(what, " ", i, ": ", found[i].value, " +- ", found[i].error, ", expected ", expected[i]);
        CHECK(std::fabs(found[i].value - expected[i]) <= found[i].error);
        CHECK(found[i].error <= 1e-10 * (1 + std::fabs(expected[i])));
    }
}

} // namespace

TEST_CASE("in double, the oracle with bounds is the plain one, forward and backward")
{
    FASTMOE_SEEDED(r, 20250301);
    const reference::activation acts[] = {reference::activation::relu, reference::activation::gelu, reference::activation::gelu_tanh, reference::activation::clamped_swiglu,
                                          reference::activation::silu, reference::activation::swiglu, reference::activation::geglu};
    for (int trial = 0; trial < 70; ++trial) {
        INFO("trial ", trial);
        const int64_t tokens = r.integer(0, 9), width = r.integer(1, 6), count = r.integer(2, 6);
        const bool biases = r.coin();
        reference::model m;
        m.width = width;
        m.gate = r.normals(count * width);
        if (biases) m.gate_bias = r.normals(count);
        for (int64_t e = 0; e < count; ++e)
            m.experts.push_back(draw(r, reference::expert_kind::mlp, acts[trial % 7], width, biases));
        m.where = r.one_of(reference::weight_at::input, reference::weight_at::activation, reference::weight_at::output);
        if (r.coin()) m.shared = {draw(r, reference::expert_kind::mlp, reference::activation::geglu, width, true)};
        if (r.coin(0.3) && m.where == reference::weight_at::output)
            m.experts[0] = draw(r, reference::expert_kind::linear, reference::activation::relu, width, true);
        reference::options o{.k = r.integer(1, count), .renormalize = r.coin(), .scale = r.uniform(0.5, 2)};
        o.capacity = r.one_of(-1, 0, 1, 3);
        o.drop = r.one_of(reference::drop_order::token_major, reference::drop_order::choice_major, reference::drop_order::by_weight);
        o.rescale = r.coin();
        o.balance = r.one_of(0.0, 0.3);
        o.z = r.one_of(0.0, 0.2);
        const auto x = r.normals(tokens * width), dy = r.normals(tokens * width);
        const auto out = reference::forward(m, o, x, tokens);
        const auto back = reference::backward(m, o, x, tokens, out, dy, 0.7);

        std::vector<bool> kept;
        for (const int e : out.routing.expert_ids()) kept.push_back(e >= 0);
        const expected_routing<double> route(o, expected_logits<double>(m, x, tokens), tokens, count, out.routing.chosen, kept);
        CHECK(route.complaint() == "");
        CHECK(capacity_complaint(route) == "");
        const auto expected = expect_layer<double>(m, x, route, dy, 0.7);
        std::vector<bounded<double>> weights;
        for (const auto& c : route.choices) weights.push_back(c.weight);
        agree("weight", weights, out.routing.weights());
        agree("loss", {route.balance_loss, route.z_loss}, {out.routing.balance_loss, out.routing.z_loss});
        agree("y", expected.y, out.y);
        agree("dx", expected.dx, back.x);
        agree("gate", totals(expected.gate), back.gate);
        agree("gate bias", totals(expected.gate_bias), back.gate_bias);
        using g = expected_gradients<double>;
        for (const auto& [member, plain] : {std::pair{&g::up, &reference::expert::up}, {&g::up_bias, &reference::expert::up_bias},
                                            {&g::down, &reference::expert::down}, {&g::down_bias, &reference::expert::down_bias}}) {
            agree("experts", gathered(expected.experts, member), stacked(back.experts, plain));
            agree("shared", gathered(expected.shared, member), stacked(back.shared, plain));
        }
    }
}

TEST_CASE("a wrong choice, a wrong order and a wrong drop are complaints, near ties are not")
{
    const reference::options o{.k = 2};
    const auto complaint = [&](std::vector<bounded<float>> logits, std::vector<int> chosen) {
        return expected_routing<float>(o, logits, 1, 3, chosen, {true, true}).complaint();
    };
    CHECK(complaint({1, 2, 3}, {2, 1}) == "");
    CHECK(complaint({1, 2, 3}, {1, 2}) == "token 0 is not sorted");
    CHECK(complaint({1, 2, 3}, {2, 0}) == "token 0 passed over 1");
    CHECK(complaint({1, 2, 3}, {2, 2}) == "token 0 chose amiss");
    CHECK(complaint({1, 2, 3}, {2, 3}) == "token 0 chose amiss");
    CHECK(complaint({{1.0, 1e-6}, {1 + 1e-6, 1e-6}, 3}, {2, 0}) == "");
    for (const auto drop : {reference::drop_order::token_major, reference::drop_order::choice_major, reference::drop_order::by_weight}) {
        // Expert 0 may keep one choice; token 1 has the greater weight there.
        const reference::options limited{.k = 2, .capacity = 1, .drop = drop};
        const auto drops = [&](std::vector<bool> kept) {
            return capacity_complaint(expected_routing<float>(limited, {1, 0, 0, 5, 0, 0}, 2, 3, {0, 1, 0, 2}, kept)) == "";
        };
        const bool by_weight = drop == reference::drop_order::by_weight;
        CHECK(drops({true, true, false, true}) == !by_weight);
        CHECK(drops({false, true, true, true}) == by_weight);
        CHECK_FALSE(drops({true, true, true, true}));
        CHECK_FALSE(drops({false, true, false, true}));
    }
}

TEST_CASE_TEMPLATE("rounding by exponents is the conversion to the dtype", T, FASTMOE_DTYPES)
{
    FASTMOE_SEEDED(r, 3);
    const auto check = [](double v) {
        if constexpr (!std::is_same_v<T, double>) v = static_cast<double>(static_cast<float>(v)); // so that it is rounded once
        CAPTURE(v);
        CHECK(rounded<T>(v) == static_cast<double>(narrow<T>(v)));
    };
    for (int i = 0; i < 20000; ++i) check(std::ldexp(r.uniform(-1, 1), static_cast<int>(r.integer(-140, 20))));
    for (const double v : {0.0, 1.0, 1.00390625, 1.01171875, 1.00048828125, 65504.0, 65519.99, 65520.0, 0x1p-24, 0x1p-25, 0x1.8p-25,
                           0x1p-133, 0x1p-134, 3e38, 3.4e38})
        check(v), check(-v);
}

TEST_CASE_TEMPLATE("a stored number is in doubt only near the middle of two neighbours", T, fastmoe::bfloat16, fastmoe::half)
{
    const double step = 2 * roundoff<T>; // from 1 to the next number
    const auto error = [](double v, double e) { return stored<T>(bounded<float>(v, e)).error; };
    CHECK(error(1 + 0.4 * step, 0.05 * step) == 0);
    CHECK(error(1 + 0.4 * step, 0.15 * step) == step);
    CHECK(error(1 + 0.6 * step, 0.15 * step) == step);
    CHECK(stored<T>(bounded<float>(1 + 0.6 * step, 0)).value == 1 + step);
    const std::vector<T> next{narrow<T>(1 + step)};
    using expected = std::vector<bounded<float>>;
    CHECK(within(next, expected{{1 + 0.6 * step, 0}}));
    CHECK_FALSE(within(next, expected{{1 + 0.4 * step, 0}}));
    CHECK(within(next, expected{{1 + 0.4 * step, 0.15 * step}}));
    CHECK_FALSE(within(std::vector<T>{narrow<T>(NAN)}, expected{{1, 1}}));
    CHECK_FALSE(within(std::vector<T>{}, expected{{0, 0}}));
}

TEST_CASE("operations and sums keep within their bounds whatever the order, and single precision stays close to them")
{
    FASTMOE_SEEDED(r, 4);
    for (int trial = 0; trial < 300; ++trial) {
        const int64_t n = r.integer(1, 300);
        std::vector<float> a, b;
        bounded_sum<float> sum;
        double magnitude = 0;
        for (int64_t i = 0; i < n; ++i) {
            a.push_back(static_cast<float>(r.normal()));
            b.push_back(static_cast<float>(r.normal()));
            sum.add(double(a.back()), double(b.back()));
            magnitude += std::fabs(double(a.back()) * double(b.back()));
        }
        const auto total = sum.total();
        CHECK(total.error <= double(n + 2) * 0x1p-24 * 1.001 * magnitude);
        for (int order = 0; order < 3; ++order) {
            float s = 0;
            for (const int i : r.permutation(n)) s += a[i] * b[i];
            CHECK(std::fabs(double(s) - total.value) <= total.error);
        }
        const bounded<float> u(r.normal(), r.uniform(0, 1e-3)), v(r.uniform(1, 2), r.uniform(0, 1e-3));
        const auto near = [&](const bounded<float>& x) { return static_cast<float>(x.value + r.uniform(-1, 1) * x.error); };
        const float p = near(u), q = near(v);
        const auto inside = [](float found, const bounded<float>& e) { return std::fabs(double(found) - e.value) <= e.error + 1e-7; };
        CHECK(inside(p + q, u + v));
        CHECK(inside(p - q, u - v));
        CHECK(inside(p * q, u * v));
        CHECK(inside(p / q, u / v));
        CHECK(inside(std::exp(q), exponential(v)));
        CHECK(inside(std::log(q), logarithm(v)));
    }
}
