// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The oracle judged by what stands outside of it: finite differences, closed forms and counts by hand.
#include <cmath>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include "support/finite_difference.hpp"
#include "support/random.hpp"
#include "support/reference.hpp"

namespace ref = support::reference;

namespace {

ref::expert random_expert(support::random& r, ref::expert_kind kind, ref::activation act, int64_t width, int64_t hidden,
                          bool biases)
{
    ref::expert e = ref::make_expert(kind, act, width, hidden, biases);
    for (auto* part : {&e.up, &e.up_bias, &e.down, &e.down_bias})
        for (double& v : *part) v = r.normal(0.7);
    return e;
}

/// How near a pre-activation is to the kink of relu, where differences do not tell the derivative.
double nearest_kink(const ref::model& m, const ref::numbers& x, const ref::routing& routing)
{
    double nearest = 1;
    for (const ref::choice& c : routing.choices)
        if (c.expert >= 0 && m.experts[c.expert].kind == ref::expert_kind::mlp)
            for (double v :
                 ref::run_expert(m.experts[c.expert], m.where, ref::row_of(x, c.token, m.width), c.weight).pre)
                nearest = std::min(nearest, std::fabs(v));
    return nearest;
}

void check_gradient(const char* name, const ref::numbers& expected, const ref::numbers& actual)
{
    REQUIRE(expected.size() == actual.size());
    for (std::size_t i = 0; i < expected.size(); ++i) {
        INFO(name, " ", i, ": ", actual[i], " where differences give ", expected[i]);
        CHECK(std::fabs(actual[i] - expected[i]) <= 1e-8 * (1 + std::fabs(expected[i])));
    }
}

} // namespace

TEST_CASE("the oracle's gradients of every parameter and input agree with finite differences")
{
    FASTMOE_SEEDED(r, 20240601);
    const ref::activation acts[] = {ref::activation::relu,     ref::activation::gelu,   ref::activation::gelu_tanh,
                                    ref::activation::silu,     ref::activation::swiglu, ref::activation::geglu};
    const int64_t T = 5, D = 3, H = 4, E = 4;
    for (int trial = 0; trial < 72; ++trial) {
        INFO("trial ", trial);
        ref::options o;
        o.k = 1 + trial % 4;
        o.renormalize = trial % 3 != 0;
        o.scale = r.uniform(0.5, 2);
        o.capacity = r.one_of(-1, 1, 2, 3);
        o.drop = r.one_of(ref::drop_order::token_major, ref::drop_order::choice_major, ref::drop_order::by_weight);
        o.rescale = r.coin();
        o.balance = r.coin() ? 0.3 : 0.0;
        o.z = r.coin() ? 0.2 : 0.0;
        const double loss_scale = r.uniform(0.5, 3);
        ref::model m;
        m.width = D;
        m.where = r.one_of(ref::weight_at::input, ref::weight_at::activation, ref::weight_at::output);
        m.gate = r.normals(E * D);
        if (r.coin()) m.gate_bias = r.normals(E);
        const bool biases = r.coin();
        const bool tuple = r.coin(0.3) && m.where != ref::weight_at::activation;
        for (int e = 0; e < E; ++e) {
            const auto kind = tuple && e % 2 ? ref::expert_kind::linear : ref::expert_kind::mlp;
            m.experts.push_back(
                random_expert(r, kind, acts[(trial + (tuple ? e : 0)) % 6], D, H + (tuple ? e : 0), biases));
        }
        if (r.coin())
            m.shared.push_back(random_expert(r, ref::expert_kind::mlp, ref::activation::swiglu, D, 2, biases));
        ref::numbers x = r.normals(T * D), dy = r.normals(T * D);
        ref::outputs out = ref::forward(m, o, x, T);
        while (nearest_kink(m, x, out.routing) < 1e-2) {
            x = r.normals(T * D);
            out = ref::forward(m, o, x, T);
        }
        std::vector<bool> kept;
        for (const ref::choice& c : out.routing.choices) kept.push_back(c.expert >= 0);
        const std::vector<int> chosen = out.routing.chosen;

        const auto loss = [&] {
            const ref::outputs at = ref::forward(m, o, x, T, &chosen, &kept);
            double sum = loss_scale * (at.routing.balance_loss + at.routing.z_loss);
            for (std::size_t i = 0; i < dy.size(); ++i) sum += dy[i] * at.y[i];
            return sum;
        };
        const auto differences = [&](ref::numbers& v) { return support::finite_difference(loss, v, 5e-4); };
        const ref::gradients g = ref::backward(m, o, x, T, out, dy, loss_scale);
        check_gradient("x", differences(x), g.x);
        check_gradient("gate", differences(m.gate), g.gate);
        check_gradient("gate bias", differences(m.gate_bias), g.gate_bias);
        for (int e = 0; e < E; ++e)
            for (auto part : {&ref::expert::up, &ref::expert::up_bias, &ref::expert::down, &ref::expert::down_bias})
                check_gradient("expert", differences(m.experts[e].*part), g.experts[e].*part);
        for (std::size_t s = 0; s < m.shared.size(); ++s)
            for (auto part : {&ref::expert::up, &ref::expert::up_bias, &ref::expert::down, &ref::expert::down_bias})
                check_gradient("shared", differences(m.shared[s].*part), g.shared[s].*part);
    }
}

TEST_CASE("the oracle's gradient of a routing weight agrees with finite differences in the weight itself")
{
    FASTMOE_SEEDED(r, 11);
    for (const auto where : {ref::weight_at::input, ref::weight_at::activation, ref::weight_at::output}) {
        const ref::expert e = random_expert(r, ref::expert_kind::mlp, ref::activation::geglu, 3, 5, true);
        const ref::numbers x = r.normals(3), dy = r.normals(3);
        ref::numbers weight{0.7};
        const auto loss = [&] {
            const ref::numbers y = ref::run_expert(e, where, x, weight[0]).result;
            return dy[0] * y[0] + dy[1] * y[1] + dy[2] * y[2];
        };
        ref::expert grads = ref::zeros_like(e);
        const double dweight = ref::run_expert_backward(e, where, x, weight[0], dy, grads).second;
        check_gradient("weight", support::finite_difference(loss, weight), {dweight});
    }
}

TEST_CASE("the oracle orders +Inf before finite before -Inf before NaN, and ties by the lower id")
{
    const ref::numbers l{NAN, 1, -INFINITY, INFINITY, 1, INFINITY};
    ref::options o;
    o.k = 6;
    const ref::routing r = ref::route(o, l, 1, 6);
    CHECK(r.chosen == std::vector<int>{3, 5, 1, 4, 2, 0});
    CHECK(r.weights() == ref::numbers{0.5, 0.5, 0, 0, 0, 0});
    o.k = 2;
    CHECK(ref::route(o, {2, 7, 7, 7}, 1, 4).chosen == std::vector<int>{1, 2});
    const ref::routing lost = ref::route(o, {NAN, -INFINITY, NAN, 0, 0, 0}, 2, 3);
    CHECK(lost.expert_ids() == std::vector<int>{-1, -1, 0, 1});
    CHECK(lost.weights() == ref::numbers{0, 0, 0.5, 0.5});
    CHECK(lost.counts == std::vector<int64_t>{1, 1, 0});
}

TEST_CASE("the oracle's weights are a softmax over the chosen, or the probabilities as they are, times the scale")
{
    const ref::numbers l{std::log(1.0), std::log(2.0), std::log(5.0)};
    ref::options o;
    o.scale = 3;
    ref::numbers w = ref::route(o, l, 1, 3).weights();
    CHECK(w[0] == doctest::Approx(3 * 5.0 / 7));
    CHECK(w[1] == doctest::Approx(3 * 2.0 / 7));
    o.renormalize = false;
    w = ref::route(o, l, 1, 3).weights();
    CHECK(w[0] == doctest::Approx(3 * 5.0 / 8));
    CHECK(w[1] == doctest::Approx(3 * 2.0 / 8));
}

TEST_CASE("the oracle drops by token, by choice or by weight, and what stays keeps its weight")
{
    // Tokens 0 and 1 have expert 1 first, 0 second; token 2 the other way round, with the largest weight.
    const ref::numbers l{0, 1, -9, 0, 2, -9, 3, 0, -9};
    ref::options o;
    o.capacity = 1;
    CHECK(ref::route(o, l, 3, 3).expert_ids() == std::vector<int>{1, 0, -1, -1, -1, -1});
    o.drop = ref::drop_order::choice_major;
    CHECK(ref::route(o, l, 3, 3).expert_ids() == std::vector<int>{1, -1, -1, -1, 0, -1});
    o.drop = ref::drop_order::by_weight;
    const ref::routing r = ref::route(o, l, 3, 3);
    CHECK(r.expert_ids() == std::vector<int>{-1, -1, 1, -1, 0, -1});
    CHECK(r.choices[2].weight == doctest::Approx(1 / (1 + std::exp(-2.0))));
    CHECK(r.choices[0].weight == 0);
    o.capacity = 0;
    CHECK(ref::route(o, l, 3, 3).expert_ids() == std::vector<int>(6, -1));
    CHECK(ref::capacity_of(1.25, 2, 10, 8) == 4);
    CHECK(ref::capacity_of(1, 1, 10, 5) == 2);
    CHECK(ref::capacity_of(0, 1, 10, 5) == 0);
}

TEST_CASE("the oracle's rescaled weights keep their proportion and the token's sum")
{
    ref::options o;
    o.k = 3;
    o.renormalize = false;
    o.scale = 2;
    o.rescale = true;
    const ref::numbers l{std::log(1.0), std::log(2.0), std::log(5.0)};
    const std::vector<bool> kept{true, false, true}, none(3, false);
    const ref::routing r = ref::route(o, l, 1, 3, nullptr, &kept); // 5, 2 and 1 eighths; the 2 is dropped
    CHECK(r.choices[0].weight == doctest::Approx(2 * 5.0 / 6));
    CHECK(r.choices[1].weight == 0);
    CHECK(r.choices[2].weight == doctest::Approx(2 * 1.0 / 6));
    CHECK(ref::route(o, l, 1, 3, nullptr, &none).weights() == ref::numbers(3, 0.0));
}

TEST_CASE("the oracle's losses have their closed forms")
{
    ref::options o;
    o.balance = 0.5;
    o.z = 0.25;
    o.k = 1;
    // Uniform logits: P_e = 1/E and the frequencies sum to 1, so the balance loss is its coefficient; lse = log E.
    ref::routing r = ref::route(o, ref::numbers(12, 0.0), 3, 4);
    CHECK(r.balance_loss == doctest::Approx(0.5));
    CHECK(r.z_loss == doctest::Approx(0.25 * std::log(4.0) * std::log(4.0)));
    // All tokens sure of one expert: E times the coefficient.
    r = ref::route(o, {100, 0, 100, 0}, 2, 2);
    CHECK(r.balance_loss == doctest::Approx(1.0));
    CHECK(r.z_loss == doctest::Approx(0.25 * 100 * 100));
    // Capacity drops choices, not losses.
    o.capacity = 0;
    CHECK(ref::route(o, {100, 0, 100, 0}, 2, 2).balance_loss == doctest::Approx(1.0));
    CHECK(ref::route(o, {}, 0, 2).balance_loss == 0);
}

TEST_CASE("the oracle's layer of equal experts is the expert itself, wherever the weight is")
{
    FASTMOE_SEEDED(r, 5);
    const ref::expert one = random_expert(r, ref::expert_kind::linear, ref::activation::relu, 3, 0, false);
    ref::model m;
    m.width = 3;
    m.gate = r.normals(9);
    m.experts = {one, one, one};
    const ref::numbers x = r.normals(12);
    for (const auto where : {ref::weight_at::input, ref::weight_at::output}) {
        m.where = where;
        const ref::outputs out = ref::forward(m, {}, x, 4);
        for (int t = 0; t < 4; ++t)
            for (int d = 0; d < 3; ++d) {
                double y = 0;
                for (int i = 0; i < 3; ++i) y += one.down[d * 3 + i] * x[t * 3 + i];
                CHECK(out.y[t * 3 + d] == doctest::Approx(y));
            }
    }
}
