// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What a gate can ask of the layer besides logits: parameters of its own, a jittered input, random numbers by token.
#include <doctest/doctest.h>

#include <cmath>

#include <fastmoe/routing/lookup.hpp>

#include "support/compare.hpp"
#include "support/finite_difference.hpp"
#include "support/layer_memory.hpp"

using namespace fastmoe;

namespace {

/// logits = x W^T and, for its own part, w_t = sigmoid(x . v) of a single choice: token t to expert t mod E.
template <class T>
struct vector_parameters {
    vector_view<T> v; // (D)
    template <std::same_as<const T> U>
    operator vector_parameters<U>() const
    {
        return {v};
    }
};

template <class Real>
struct gate_memory {
    fastmoe::routing<Real> routing;
    vector_view<Real> slope; // (T)  d loss / d (x . v)
};

struct dot_gate {
    int64_t experts = 0, k = 1;
    static constexpr bool reads_logits = false;
    template <class T>
    using parameters = vector_parameters<T>;

    template <class T>
    parameters<T> reserve_parameters(arena& memory, int64_t width) const
    {
        return {memory.vector<T>(width)};
    }
    template <class Executor, class T>
    void initialize(Executor&, const parameters<T>& p, std::uint64_t seed) const
    {
        for (int64_t d = 0; d < p.v.extent(0); ++d) p.v(d) = T(float(seed % 1000) + float(d));
    }
    template <class Real>
    gate_memory<Real> reserve(arena& memory, int64_t tokens) const
    {
        auto r = reserve_routing<Real>(memory, tokens, experts, 1);
        return {r, memory.vector<Real>(tokens)};
    }
    template <class Executor, class T, class C, class Real>
    void route(Executor&, const gate_input<T>& in, const parameters<const T>& own, const C&, const gate_memory<Real>& s, arena& a) const
    {
        if (a.measuring()) return;
        for (int64_t t = 0; t < in.x.extent(0); ++t) {
            Real dot = 0;
            for (int64_t d = 0; d < in.x.extent(1); ++d) dot += Real(in.x(t, d)) * Real(own.v(d));
            s.routing.experts(t) = static_cast<int32_t>(t % experts);
            s.routing.weights(t) = math::sigmoid(dot);
        }
    }
    template <class Executor, class T, class C, class Real>
    void backward(Executor&, const gate_input<T>& in, const parameters<const T>& own, const C&, const gate_memory<Real>& s,
                  vector_view<const Real> dweights, Real, matrix_view<Real> dlogits, matrix_view<T> dx, arena& a) const
    {
        if (a.measuring()) return;
        CHECK_EQ(dlogits.extent(0), 0);
        for (int64_t t = 0; t < in.x.extent(0); ++t) {
            const Real w = s.routing.weights(t);
            s.slope(t) = dweights(t) * w * (1 - w);
            for (int64_t d = 0; d < in.x.extent(1); ++d) dx(t, d) = T(Real(dx(t, d)) + s.slope(t) * Real(own.v(d)));
        }
    }
    template <class Executor, class T, class Real, class G>
    void parameter_gradients(Executor&, const gate_input<T>& in, const gate_memory<Real>& s, const parameters<G>& g,
                             write_mode mode, arena& a) const
    {
        if (a.measuring()) return;
        for (int64_t d = 0; d < in.x.extent(1); ++d) {
            Real sum = mode == write_mode::accumulate ? Real(g.v(d)) : 0;
            for (int64_t t = 0; t < in.x.extent(0); ++t) sum += s.slope(t) * Real(in.x(t, d));
            g.v(d) = G(sum);
        }
    }
};

static_assert(owns_parameters<dot_gate> && !owns_parameters<top_k_gate<>>);
static_assert(gate_policy<dot_gate, host_executor, double, self>);
static_assert(std::is_same_v<moe_layer<top_k_gate<>, mlp<>>::weights<float>, moe_weights<float, mlp<>>>);

/// <y, direction> as a function of whatever a test changes, and the gradients of the layer.
template <class Layer>
struct probe {
    host_executor ex{{.threads = 2}};
    Layer layer;
    int64_t tokens, width;
    std::vector<double> x, direction;
    gate_options options;

    double value(const typename Layer::template weights<double>& w)
    {
        std::vector<double> y(x.size());
        layer.forward(ex, as_matrix(x, tokens, width), w, as_matrix(y, tokens, width), options);
        double sum = 0;
        for (std::size_t i = 0; i < y.size(); ++i) sum += y[i] * direction[i];
        return sum;
    }
    std::vector<double> gradient(const typename Layer::template weights<double>& w, const typename Layer::template weights<double>& g,
                                 backward_options how = {})
    {
        std::vector<double> y(x.size()), dx(x.size(), NAN);
        auto saved = layer.forward(ex, as_matrix(x, tokens, width), w, as_matrix(y, tokens, width), options);
        layer.backward(ex, saved, as_matrix(direction, tokens, width), w, as_matrix(dx, tokens, width), g, how);
        return dx;
    }
};

void near(const std::vector<double>& actual, const std::vector<double>& expected)
{
    REQUIRE_EQ(actual.size(), expected.size());
    for (std::size_t i = 0; i < actual.size(); ++i) {
        CAPTURE(i);
        CHECK(std::fabs(actual[i] - expected[i]) < 1e-8);
    }
}

std::vector<double> copy(vector_view<double> v) { return {v.data_handle(), v.data_handle() + v.extent(0)}; }

} // namespace

TEST_CASE("a gate's own parameters and the input through them get the gradients of finite differences, added or overwritten")
{
    FASTMOE_SEEDED(rng, 51);
    using layer_type = moe_layer<dot_gate, mlp<gelu>>;
    const int64_t tokens = 5, width = 4;
    probe<layer_type> p{.layer = {dot_gate{.experts = 3}, mlp<gelu>{.width = width, .hidden = 6}, self{}}, .tokens = tokens,
                        .width = width, .x = rng.normals(tokens * width), .direction = rng.normals(tokens * width), .options = {}};
    auto w = random_weights<double>(p.ex, p.layer, 3), g = zero_weights<double>(p.ex, p.layer);
    const auto other = random_weights<double>(p.ex, p.layer, 4);
    CHECK_EQ(w.view().own.v(1), w.view().own.v(0) + 1); // by the gate's own initialize
    CHECK_NE(other.view().own.v(0), w.view().own.v(0));
    for (int64_t d = 0; d < width; ++d) w.view().own.v(d) = rng.normal();
    const auto dx = p.gradient(w.view(), g.view());
    near(dx, support::finite_difference([&] { return p.value(w.view()); }, p.x));
    std::vector<double> v = copy(w.view().own.v);
    const auto dv = support::finite_difference(
        [&] {
            std::copy(v.begin(), v.end(), w.view().own.v.data_handle());
            return p.value(w.view());
        },
        v);
    std::copy(v.begin(), v.end(), w.view().own.v.data_handle());
    near(copy(g.view().own.v), dv);
    p.gradient(w.view(), g.view(), {.gradients = write_mode::accumulate});
    for (int64_t d = 0; d < width; ++d) CHECK(std::fabs(g.view().own.v(d) - 2 * dv[d]) < 1e-8);
}

TEST_CASE("jitter multiplies the router's input by its draw, in training alone, and its gradients are those of finite differences")
{
    FASTMOE_SEEDED(rng, 52);
    using gate_type = top_k_gate<softmax_score, top_k, raw_scores>;
    using layer_type = moe_layer<gate_type, mlp<gelu>>;
    const int64_t tokens = 6, width = 4, experts = 3;
    std::vector<std::uint64_t> random{7, 11};
    probe<layer_type> p{.layer = {gate_type{.experts = experts, .k = 2, .jitter = {0.3}}, mlp<gelu>{.width = width, .hidden = 5}, self{}},
                        .tokens = tokens, .width = width, .x = rng.normals(tokens * width),
                        .direction = rng.normals(tokens * width), .options = {.random = random.data(), .first_token = 40}};
    auto w = random_weights<double>(p.ex, p.layer, 3), g = zero_weights<double>(p.ex, p.layer);

    std::vector<double> y(p.x.size());
    auto saved = p.layer.forward(p.ex, as_matrix(p.x, tokens, width), w.view(), as_matrix(y, tokens, width), p.options);
    const random_source source{random.data(), random_stream::jitter};
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t e = 0; e < experts; ++e) {
            double logit = 0;
            for (int64_t d = 0; d < width; ++d) {
                const double u = source.uniform<double>(static_cast<std::uint64_t>((40 + t) * width + d));
                logit += w.view().gate(e, d) * p.x[t * width + d] * (0.7 + 0.6 * u); // multiplied, not added
            }
            CHECK(std::fabs(saved.logits()(t, e) - logit) < 1e-13);
        }
    near(p.gradient(w.view(), g.view()), support::finite_difference([&] { return p.value(w.view()); }, p.x, 1e-4));
    std::vector<double> gate(w.view().gate.data_handle(), w.view().gate.data_handle() + experts * width);
    const auto dgate = support::finite_difference(
        [&] {
            std::copy(gate.begin(), gate.end(), w.view().gate.data_handle());
            return p.value(w.view());
        },
        gate, 1e-4);
    near(std::vector<double>(g.view().gate.data_handle(), g.view().gate.data_handle() + experts * width), dgate);

    layer_type plain = p.layer;
    plain.gate.jitter = {};
    std::vector<double> still(y.size()), same(y.size());
    p.layer.infer(p.ex, as_matrix(p.x, tokens, width), w.view(), as_matrix(still, tokens, width)); // no numbers needed
    plain.infer(p.ex, as_matrix(p.x, tokens, width), w.view(), as_matrix(same, tokens, width));
    CHECK(support::same_bits(still, same));
    CHECK_THROWS_WITH_AS(p.layer.forward(p.ex, as_matrix(p.x, tokens, width), w.view(), as_matrix(y, tokens, width)),
                         doctest::Contains("random is a null pointer; expected seed and step"), invalid_argument);
}

TEST_CASE("a layer behind a hash table computes no logits, needs no router and trains its experts")
{
    FASTMOE_SEEDED(rng, 53);
    using layer_type = moe_layer<hash_gate, mlp<gelu>>;
    const int64_t tokens = 5, width = 4;
    const std::vector<int32_t> table{1, 0, 2, 1}, ids{3, 0, 0, 2, 1}; // (4,1)
    hash_gate gate{.experts = 3, .k = 1};
    gate.assignment = {matrix_view<const int32_t>(table.data(), 4, 1)};
    probe<layer_type> p{.layer = {gate, mlp<gelu>{.width = width, .hidden = 5}, self{}}, .tokens = tokens, .width = width,
                        .x = rng.normals(tokens * width), .direction = rng.normals(tokens * width),
                        .options = {.token_ids = as_vector(ids)}};
    auto w = random_weights<double>(p.ex, p.layer, 3), g = zero_weights<double>(p.ex, p.layer);
    CHECK_EQ(w.view().gate.extent(0), 0);
    std::vector<double> y(p.x.size());
    const auto saved = p.layer.forward(p.ex, as_matrix(p.x, tokens, width), w.view(), as_matrix(y, tokens, width), p.options);
    CHECK_EQ(saved.logits().extent(0), 0);
    for (int64_t t = 0; t < tokens; ++t) CHECK_EQ(saved.routing().experts(t), table[ids[t]]);
    near(p.gradient(w.view(), g.view()), support::finite_difference([&] { return p.value(w.view()); }, p.x));
}
