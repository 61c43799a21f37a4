// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The cosine router.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>

#include <fastmoe/routing/cosine_gate.hpp>

#include "support/compare.hpp"
#include "support/finite_difference.hpp"
#include "support/layer_memory.hpp"
#include "support/reference_cosine.hpp"
#include "support/reference_routing.hpp"
#include "support/run_owning_gate.hpp"

namespace fm = fastmoe;
namespace oracle = support::reference;
using fm::int64_t;

namespace {

constexpr double nan_ = std::numeric_limits<double>::quiet_NaN();

using chosen_gate = fm::cosine_gate<>;
using all_gate = fm::cosine_gate<fm::top_k, fm::raw_scores>;

static_assert(fm::gate_policy<chosen_gate, fm::host_executor, fm::bfloat16, fm::self>);
static_assert(fm::gate_policy<all_gate, support::lanes, double, fm::self>);
static_assert(!fm::gate_reads_logits<chosen_gate>);

/// A gate with its input and parameters in Real.
template <class Real, class Gate>
struct cosine_case {
    Gate gate;
    support::owning_input<Real> in;
    std::vector<Real> projection, bias, embeddings, temperature;

    cosine_case(support::random& rng, const Gate& g, int64_t tokens, int64_t width, double tau) : gate(g)
    {
        in.tokens = tokens;
        in.width = width;
        in.x = support::normal_vector<Real>(rng, tokens * width);
        in.dweights = support::normal_vector<Real>(rng, tokens * g.k);
        in.loss_scale = 0.5;
        projection = support::normal_vector<Real>(rng, g.projection_width * width);
        if (g.bias == fm::projection_bias::learned) bias = support::normal_vector<Real>(rng, g.projection_width);
        embeddings = support::normal_vector<Real>(rng, g.experts * g.projection_width, 0.3);
        temperature = {support::narrow<Real>(tau)};
    }

    template <class Buffer>
    fm::cosine_parameters<Real> views(Buffer& p, Buffer& b, Buffer& m, Buffer& tau) const
    {
        const int64_t inner = gate.projection_width;
        return {p.matrix(inner, in.width), b.view(), m.matrix(gate.experts, inner), tau.view()};
    }

    struct gradient {
        std::vector<Real> projection, bias, embeddings, temperature;
    };

    /// @param into  gradients: empty vectors are poisoned and overwritten
    template <class Executor>
    auto run(Executor& ex, gradient& into, fm::write_mode mode = fm::write_mode::overwrite) const
    {
        auto p = support::upload(ex, projection), b = support::upload(ex, bias), m = support::upload(ex, embeddings),
             tau = support::upload(ex, temperature);
        const auto room = [&](const std::vector<Real>& like, const std::vector<Real>& held) {
            if (!held.empty()) return support::upload(ex, held);
            fm::buffer<Real, Executor> out(ex, static_cast<int64_t>(like.size()));
            support::poison(out.view());
            return out;
        };
        auto dp = room(projection, into.projection), db = room(bias, into.bias), dm = room(embeddings, into.embeddings),
             dtau = room(temperature, into.temperature);
        support::owning_gate_run r(ex, gate, in, views(p, b, m, tau), views(dp, db, dm, dtau), mode);
        into = {support::download(ex, dp.view()), support::download(ex, db.view()), support::download(ex, dm.view()),
                support::download(ex, dtau.view())};
        return r;
    }
};

/// Gradients pass through a few sums of `length` terms each, of values up to the largest.
template <class Real>
void near(const std::vector<Real>& actual, const std::vector<double>& expected, double length, double start = 0)
{
    REQUIRE_EQ(actual.size(), expected.size());
    double largest = 1;
    for (double e : expected) largest = std::max(largest, std::fabs(e));
    for (std::size_t i = 0; i < actual.size(); ++i) {
        CAPTURE(i);
        const double bound = (support::roundoff<Real> * 16 * length + 1e-8) * largest;
        REQUIRE(std::fabs(double(actual[i]) - start - expected[i]) <= bound);
    }
}

template <class Real, class Executor, class Gate>
void matches_oracle(Executor& ex, support::random& rng, const Gate& gate, bool renormalize, int64_t tokens, int64_t width,
                    double tau)
{
    CAPTURE(gate.experts);
    CAPTURE(gate.k);
    CAPTURE(tokens);
    CAPTURE(tau);
    const cosine_case<Real, Gate> c(rng, gate, tokens, width, tau);
    typename cosine_case<Real, Gate>::gradient g;
    const auto r = c.run(ex, g);
    oracle::cosine_model m{width, gate.projection_width, support::widened(c.in.x), support::widened(c.projection),
                           support::widened(c.bias), support::widened(c.embeddings), support::widened(c.temperature)};
    const oracle::options o{.k = gate.k, .renormalize = renormalize, .scale = gate.scale,
                            .balance = gate.balance.coefficient, .z = gate.z.coefficient};
    const auto first = oracle::route(o, m.logits(), tokens, gate.experts);
    CHECK_EQ(r.experts, first.expert_ids());
    // A cosine is a sum of N products, off by its length; the exponential makes that relative, times the sharpness.
    const double sharpness = std::exp(std::fmin(tau, std::log(100.0)));
    const double length = 4 * double(gate.experts + gate.projection_width + width) * (1 + sharpness) + 64;
    CHECK(support::close(r.weights, first.weights(), {.length = length, .magnitude = gate.scale}));
    CHECK(support::close(r.losses, {first.balance_loss, first.z_loss}, {.length = length, .magnitude = 1 + first.z_loss}));
    const auto dweights = support::widened(c.in.dweights);
    const auto loss = [&] {
        const auto now = oracle::route(o, m.logits(), tokens, gate.experts, &first.chosen);
        double sum = 0.5 * (now.balance_loss + now.z_loss);
        for (std::size_t i = 0; i < dweights.size(); ++i) sum += dweights[i] * now.choices[i].weight;
        return sum;
    };
    const auto fd = [&](std::vector<double>& what) { return support::finite_difference(loss, what, 1e-4); };
    near(r.dx, fd(m.x), length, r.start);
    near(g.projection, fd(m.projection), length + tokens);
    near(g.bias, fd(m.bias), length + tokens);
    near(g.embeddings, fd(m.embeddings), length + tokens);
    near(g.temperature, fd(m.temperature), length + tokens);
}

} // namespace

TEST_CASE_TEMPLATE("the cosine router agrees with the oracle, and every gradient with finite differences of the oracle", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 81);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int i = 0; i < (small ? 3 : 8); ++i) {
        const int64_t experts = rng.integer(2, small ? 9 : 20), k = rng.integer(2, std::min<int64_t>(experts, 5));
        const int64_t width = rng.integer(1, 9), inner = rng.integer(2, 7);
        const int64_t tokens = rng.integer(i == 0 ? 0 : 1, small ? 4 : 9);
        const auto bias = i % 2 ? fm::projection_bias::learned : fm::projection_bias::none;
        const double tau = i == 2 ? 5.0 : rng.uniform(-1, 2); // above ln 100: clamped, without a gradient
        matches_oracle<Real>(ex, rng,
                             chosen_gate{.experts = experts, .k = k, .projection_width = inner, .bias = bias, .scale = 1.5,
                                         .balance = {0.3}, .z = {0.1}},
                             true, tokens, width, tau);
        matches_oracle<Real>(ex, rng,
                             all_gate{.experts = experts, .k = i % 2 ? 1 : k, .projection_width = inner, .bias = bias,
                                      .scale = 0.75, .balance = {0.3}, .z = {0.1}},
                             false, tokens, width, tau);
    }
}

TEST_CASE("parameters' gradients are added where that is asked for")
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 82);
    const cosine_case<double, chosen_gate> c(
        rng, {.experts = 5, .k = 2, .projection_width = 4, .bias = fm::projection_bias::learned}, 7, 3, 1);
    cosine_case<double, chosen_gate>::gradient once, twice{std::vector<double>(12, 1.5), std::vector<double>(4, 1.5),
                                                           std::vector<double>(20, 1.5), {1.5}};
    c.run(ex, once);
    c.run(ex, twice, fm::write_mode::accumulate);
    const auto added = [](const std::vector<double>& a, const std::vector<double>& b) {
        for (std::size_t i = 0; i < a.size(); ++i) CHECK(std::fabs(b[i] - 1.5 - a[i]) < 1e-14);
    };
    added(once.projection, twice.projection);
    added(once.bias, twice.bias);
    added(once.embeddings, twice.embeddings);
    added(once.temperature, twice.temperature);
}

TEST_CASE_TEMPLATE("rows without a direction or with NaN have the documented result, and gradients stay finite", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 83);
    const int64_t width = 3, inner = 3, experts = 4;
    const chosen_gate gate{.experts = experts, .k = 2, .projection_width = inner, .balance = {1}, .z = {1}};
    cosine_case<Real, chosen_gate> c(rng, gate, 4, width, 1);
    for (int64_t n = 0; n < 9; ++n) c.projection[n] = Real(n % 4 == 0); // x P^T = x
    c.in.x = support::narrowed<Real>({0, 0, 0, 1, 0, 0, nan_, 1, 1, 0, 1, 0});
    c.embeddings = support::narrowed<Real>({1, 0, 0, 0, 0, 0, nan_, 0, 0, -1, 0, 0});
    typename cosine_case<Real, chosen_gate>::gradient g;
    const auto r = c.run(ex, g);
    const auto finite = [](const std::vector<Real>& v) {
        for (Real a : v) CHECK(std::isfinite(a));
    };
    // A token without a direction: the three logits that are not NaN are 0 and tie.
    CHECK_EQ(r.experts, std::vector<int32_t>{0, 1, 0, 1, -1, -1, 0, 1});
    CHECK_EQ(r.weights[0], Real(0.5));
    CHECK_EQ(r.weights[1], Real(0.5));
    CHECK_EQ(r.weights[4], Real(0)); // dropped
    const double e = std::exp(std::exp(1.0)); // cosine 1 against cosine 0 of the embedding without a direction
    CHECK(std::fabs(r.weights[2] - e / (e + 1)) < 1e-6);
    finite(r.losses);
    for (int64_t d = 0; d < width; ++d) {
        CHECK_EQ(r.dx[d], Real(r.start));
        CHECK(std::isfinite(r.dx[3 + d]));
    }
    finite(g.embeddings);
    finite(g.temperature);
    for (int64_t n = 0; n < inner; ++n) {
        CHECK_EQ(g.embeddings[1 * inner + n], Real(0)); // no direction
        CHECK_EQ(g.embeddings[2 * inner + n], Real(0)); // NaN: chosen by nobody
    }
}

TEST_CASE("a token's length and an expert's length change nothing, and a temperature past ln 100 changes nothing more")
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 84);
    cosine_case<double, all_gate> c(rng, {.experts = 6, .k = 2, .projection_width = 5}, 8, 4, std::log(100.0) + 1);
    cosine_case<double, all_gate>::gradient g;
    const auto first = c.run(ex, g);
    CHECK_EQ(g.temperature[0], 0.0);
    for (double& v : c.in.x) v *= 0x1p-10;
    for (double& v : c.embeddings) v *= 0x1p20;
    c.temperature[0] = std::log(100.0) + 30;
    const auto second = c.run(ex, g);
    CHECK_EQ(second.experts, first.experts);
    CHECK(support::close(second.weights, first.weights, {.length = 4096}));
}

TEST_CASE("capacity, a mask and inference act as in any top_k_gate")
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 85);
    all_gate gate{.experts = 5, .k = 2, .projection_width = 4, .capacity = {.factor = 0.6, .weights = fm::after_drop::rescale},
                  .balance = {0.4}, .z = {0.1}};
    cosine_case<double, all_gate> c(rng, gate, 9, 3, 1.5);
    c.in.mask = {1, 0, 1, 1, 1, 1, 0, 1, 1};
    cosine_case<double, all_gate>::gradient g, ignored;
    const auto first = c.run(ex, g);
    const oracle::cosine_model m{3, 4, c.in.x, c.projection, {}, c.embeddings, c.temperature};
    fm::top_k_gate<fm::softmax_score, fm::top_k, fm::raw_scores> same{.experts = 5, .k = 2, .capacity = gate.capacity,
                                                                      .balance = gate.balance, .z = gate.z};
    const support::gate_run plain(ex, same, 9, m.logits(), c.in.dweights, fm::gate_mode::training, c.in.mask, 0.5);
    CHECK_EQ(first.experts, plain.experts);
    CHECK(support::close(first.weights, plain.weights, {.length = 256}));
    CHECK(support::close(first.losses, plain.losses, {.length = 256}));
    const auto dx = support::finite_difference(
        [&] {
            const auto r = c.run(ex, ignored);
            REQUIRE_EQ(r.experts, first.experts);
            double sum = 0.5 * (r.losses[0] + r.losses[1]);
            for (std::size_t i = 0; i < c.in.dweights.size(); ++i) sum += c.in.dweights[i] * r.weights[i];
            return sum;
        },
        c.in.x, 1e-4);
    for (std::size_t i = 0; i < dx.size(); ++i) CHECK(std::fabs(first.dx[i] - first.start - dx[i]) < 1e-8);
    c.in.mode = fm::gate_mode::inference;
    const auto still = c.run(ex, ignored);
    CHECK_EQ(still.experts, first.experts);
    CHECK_EQ(still.losses, std::vector<double>(2, 0.0));
}

TEST_CASE("parameters of a cosine gate start where they should, and depend on the seed alone")
{
    fm::host_executor ex({.threads = 2});
    support::lanes lanes;
    const chosen_gate gate{.experts = 64, .k = 2, .projection_width = 32, .bias = fm::projection_bias::learned};
    const int64_t width = 16;
    const auto fill = [&](auto& on, std::vector<std::vector<float>>& out, std::uint64_t seed) {
        std::vector<float> p(32 * width, NAN), b(32, NAN), m(64 * 32, NAN), tau(1, NAN);
        const fm::cosine_parameters<float> own{fm::as_matrix(p, 32, width), fm::as_vector(b), fm::as_matrix(m, 64, 32),
                                               fm::as_vector(tau)};
        gate.initialize(on, own, seed);
        out = {p, b, m, tau};
    };
    std::vector<std::vector<float>> a, b, other;
    fill(ex, a, 5);
    fill(lanes, b, 5);
    fill(ex, other, 6);
    CHECK_EQ(a, b);
    CHECK(a[0] != other[0]);
    CHECK(a[2] != other[2]);
    for (float v : a[0]) CHECK(std::fabs(v) <= 0.25f);
    for (float v : a[1]) CHECK_EQ(v, 0.f);
    double squares = 0;
    for (float v : a[2]) squares += double(v) * v;
    CHECK(std::fabs(std::sqrt(squares / 2048) - 0.01) < 0.001); // five standard deviations of the estimate are 0.0008
    CHECK_EQ(a[3][0], std::log(2.0f));
}

TEST_CASE("parameters of the wrong shape, and what makes no sense, are refused by name")
{
    fm::host_executor ex({.threads = 1});
    FASTMOE_SEEDED(rng, 86);
    using c_t = cosine_case<float, chosen_gate>;
    const auto says = [&](auto change, const char* part) {
        c_t c(rng, {.experts = 4, .k = 2, .projection_width = 3, .bias = fm::projection_bias::learned}, 3, 5, 1);
        change(c);
        const fm::cosine_parameters<float> own{fm::as_matrix(c.projection, 3, 5), fm::as_vector(c.bias),
                                               fm::as_matrix(c.embeddings, 4, 3), fm::as_vector(c.temperature)};
        const std::string text =
            support::message_of<fm::invalid_argument>([&] { support::owning_gate_run(ex, c.gate, c.in, own, own); });
        INFO(text);
        CHECK(support::has(text, part));
    };
    says([](c_t& c) { c.gate.projection_width = 4; }, "projection (N,D) is of shape (3,5); expected (4,5)");
    says([](c_t& c) { c.gate.experts = 5; }, "embeddings (E,N) is of shape (4,3); expected (5,3)");
    says([](c_t& c) { c.bias.resize(2); }, "projection bias (N) is of shape (2); expected (3)");
    says([](c_t& c) { c.gate.bias = fm::projection_bias::none; }, "projection bias is not empty; expected none");
    says([](c_t& c) { c.temperature.resize(2); }, "temperature (1) is of shape (2); expected (1)");
    says([](c_t& c) { c.gate.projection_width = 0; }, "projection_width is 0; expected 1 or more");
    says([](c_t& c) { c.gate.k = 1; }, "k is 1; expected 2 or more to train with renormalize");
    says([](c_t& c) { c.in.mask = {1, 1}; }, "mask (T) is of shape (2); expected (3)");
}

TEST_CASE("a layer with a cosine gate needs no router and has the gradients of finite differences in its input and parameters")
{
    FASTMOE_SEEDED(rng, 87);
    fm::host_executor ex({.threads = 2});
    const int64_t tokens = 6, width = 4;
    const fm::moe_layer layer{all_gate{.experts = 4, .k = 2, .projection_width = 3, .balance = {0.2}},
                              fm::mlp<fm::gelu>{.width = width, .hidden = 5}};
    auto w = fm::random_weights<double>(ex, layer, 3), g = fm::zero_weights<double>(ex, layer);
    CHECK_EQ(w.view().gate.extent(0), 0);
    std::vector<double> x = rng.normals(tokens * width), y(x.size()), dx(x.size(), nan_);
    const auto dy = rng.normals(tokens * width);
    const auto &own = w.view().own, &grad = g.view().own;
    for (int64_t i = 0; i < 12; ++i) own.embeddings.data_handle()[i] *= 100; // differences need a step below the norm
    const auto saved = layer.forward(ex, fm::as_matrix(x, tokens, width), w.view(), fm::as_matrix(y, tokens, width));
    layer.backward(ex, saved, fm::as_matrix(dy, tokens, width), w.view(), fm::as_matrix(dx, tokens, width), g.view(),
                   {.loss_scale = 0.7});
    const auto check = [&](const double* actual, double* what, int64_t n) {
        std::vector<double> values(what, what + n);
        const auto expected = support::finite_difference(
            [&] {
                std::copy(values.begin(), values.end(), what);
                const auto s = layer.forward(ex, fm::as_matrix(x, tokens, width), w.view(), fm::as_matrix(y, tokens, width));
                double sum = 0.7 * s.losses()(0);
                for (std::size_t i = 0; i < y.size(); ++i) sum += dy[i] * y[i];
                return sum;
            },
            values, 1e-4);
        std::copy(values.begin(), values.end(), what);
        for (int64_t i = 0; i < n; ++i)
            CHECK(std::fabs(actual[i] - expected[i]) < 1e-7 * std::max(1.0, std::fabs(expected[i])));
    };
    check(dx.data(), x.data(), tokens * width);
    check(grad.projection.data_handle(), own.projection.data_handle(), 12);
    check(grad.embeddings.data_handle(), own.embeddings.data_handle(), 12);
    check(grad.temperature.data_handle(), own.temperature.data_handle(), 1);
}
