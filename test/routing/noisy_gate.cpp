// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Noisy top-K with its importance and load losses, and the importance loss beside any routing.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>

#include <fastmoe/routing/noisy_gate.hpp>

#include "support/compare.hpp"
#include "support/finite_difference.hpp"
#include "support/layer_memory.hpp"
#include "support/reference_noisy.hpp"
#include "support/reference_routing.hpp"
#include "support/run_owning_gate.hpp"

namespace fm = fastmoe;
namespace oracle = support::reference;
using fm::int64_t;

namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan_ = std::numeric_limits<double>::quiet_NaN();

static_assert(fm::gate_policy<fm::noisy_gate, fm::host_executor, fm::bfloat16, fm::self>);
static_assert(fm::gate_policy<fm::noisy_gate, support::lanes, double, fm::self>);

/// The draws that a gate makes, in double.
template <class Real>
std::vector<double> draws_of(const support::gate_extras& extras, int64_t tokens, int64_t experts)
{
    const fm::random_source source{extras.seed_and_step.data(), fm::random_stream::noise};
    std::vector<double> out;
    for (int64_t i = 0; i < tokens * experts; ++i)
        out.push_back(source.normal<Real>(static_cast<std::uint64_t>(extras.first_token * experts + i)));
    return out;
}

/// x w^T                                                                              // (T,D), (E,D) -> (T,E)
std::vector<double> product(const std::vector<double>& x, const std::vector<double>& w, int64_t width)
{
    std::vector<double> out;
    for (std::size_t t = 0; t < x.size() / width; ++t)
        for (std::size_t e = 0; e < w.size() / width; ++e) {
            double sum = 0;
            for (int64_t d = 0; d < width; ++d) sum += x[t * width + d] * w[e * width + d];
            out.push_back(sum);
        }
    return out;
}

oracle::noisy_rule rule_of(const fm::noisy_gate& gate)
{
    return {gate.experts, gate.k, gate.scale, gate.importance.coefficient, gate.load.coefficient,
            gate.load.variance == fm::variance::sample};
}

/// A gate with its input and noise matrix, in Real and in double.
template <class Real>
struct noisy_case {
    fm::noisy_gate gate;
    support::owning_input<Real> in;
    std::vector<Real> noise;

    noisy_case(support::random& rng, const fm::noisy_gate& g, int64_t tokens, int64_t width, bool masks = false) : gate(g)
    {
        in.tokens = tokens;
        in.width = width;
        in.x = support::normal_vector<Real>(rng, tokens * width);
        in.logits = support::normal_vector<Real>(rng, tokens * g.experts, 1.5);
        in.dweights = support::normal_vector<Real>(rng, tokens * g.k);
        in.loss_scale = 0.5;
        in.extras = support::gate_extras{.seed_and_step = {rng.bits(), 7}, .first_token = rng.integer(0, 1000)};
        noise = support::normal_vector<Real>(rng, g.experts * width, 0.5);
        for (int64_t t = 0; masks && t < tokens; ++t) in.mask.push_back(rng.coin(0.8));
    }

    template <class Executor, class Communicator = fm::self>
    auto run(Executor& ex, std::vector<Real>& dnoise, fm::write_mode mode = fm::write_mode::overwrite,
             const Communicator& c = {}) const
    {
        auto own = support::upload(ex, noise);
        fm::buffer<Real, Executor> out(ex, own.size());
        if (dnoise.empty()) support::poison(out.view());
        else out = support::upload(ex, dnoise);
        const int64_t experts = gate.experts, width = in.width;
        support::owning_gate_run r(ex, gate, in, fm::noisy_parameters<Real>{own.matrix(experts, width)},
                                   fm::noisy_parameters<Real>{out.matrix(experts, width)}, mode, c);
        dnoise = support::download(ex, out.view());
        return r;
    }

    /// <dweights, weights> + loss_scale * losses of the oracle, as a function of its inputs.
    struct model {
        const noisy_case& of;
        std::vector<double> logits, x, noise, draws, dweights;
        oracle::noisy_result first = {};

        explicit model(const noisy_case& c)
            : of(c), logits(support::widened(c.in.logits)), x(support::widened(c.in.x)), noise(support::widened(c.noise)),
              draws(draws_of<Real>(c.in.extras, c.in.tokens, c.gate.experts)), dweights(support::widened(c.in.dweights))
        {
            first = now();
        }
        oracle::noisy_result now() const
        {
            return oracle::noisy_top_k(rule_of(of.gate), logits, product(x, noise, of.in.width), draws, of.in.mask,
                                       first.order.empty() ? nullptr : &first.order);
        }
        /// Balance and z of the noisy logits; masked rows are left out.
        std::pair<double, double> others(const oracle::noisy_result& r) const
        {
            const int64_t all = of.gate.experts;
            std::vector<double> open;
            std::vector<int> fixed;
            for (int64_t t = 0; t < of.in.tokens; ++t) {
                if (r.order[t].empty()) continue;
                open.insert(open.end(), r.noisy.begin() + t * all, r.noisy.begin() + (t + 1) * all);
                fixed.insert(fixed.end(), r.order[t].begin(), r.order[t].begin() + of.gate.k);
            }
            const oracle::options o{.k = of.gate.k, .balance = of.gate.balance.coefficient, .z = of.gate.z.coefficient};
            const auto routed = oracle::route(o, open, static_cast<int64_t>(open.size()) / all, all, &fixed);
            return {routed.balance_loss, routed.z_loss};
        }
        double value() const
        {
            const auto r = now();
            const auto [balance, z] = others(r);
            double sum = of.in.loss_scale * (r.importance + r.load + balance + z);
            for (std::size_t c = 0; c < dweights.size(); ++c) sum += dweights[c] * r.weights[c];
            return sum;
        }
        std::vector<double> gradient(std::vector<double>& of_what)
        {
            return support::finite_difference([&] { return value(); }, of_what, 1e-4);
        }
    };
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
        REQUIRE(std::fabs(double(actual[i]) - start - expected[i]) <=
                (support::roundoff<Real> * 16 * length + 2e-9) * largest);
    }
}

} // namespace

TEST_CASE_TEMPLATE("noisy top-K agrees with the oracle, and its gradients with finite differences of the oracle", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 61);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int i = 0; i < (small ? 4 : 10); ++i) {
        const int64_t experts = rng.integer(2, small ? 12 : 24);
        const int64_t k = i % 4 == 3 ? experts : rng.integer(2, std::max<int64_t>(2, experts / 2));
        const int64_t tokens = rng.integer(i == 0 ? 0 : 1, small ? 5 : 12), width = rng.integer(1, 9);
        fm::noisy_gate gate{.experts = experts, .k = k, .scale = 1.25, .balance = {0.2}, .z = {0.05}, .importance = {0.3},
                            .load = {0.4}};
        if (i % 2) gate.importance.variance = gate.load.variance = fm::variance::sample;
        if (i == 4) gate.importance.coefficient = 0;
        if (i == 5) gate.load.coefficient = 0;
        CAPTURE(experts);
        CAPTURE(k);
        CAPTURE(tokens);
        const noisy_case<Real> c(rng, gate, tokens, width, i % 3 == 1);
        std::vector<Real> dnoise;
        const auto r = c.run(ex, dnoise);
        typename noisy_case<Real>::model m(c);
        const double length = 8 * double(experts) + double(width) + double(tokens) + 64;
        CHECK_EQ(r.experts, m.first.experts);
        CHECK(support::close(r.weights, m.first.weights, {.length = length, .magnitude = gate.scale}));
        const auto [balance, z] = m.others(m.first);
        CHECK(support::close(r.losses, {balance, z, m.first.importance, m.first.load}, {.length = length, .magnitude = 1}));
        near(r.dlogits, m.gradient(m.logits), length);
        near(r.dx, m.gradient(m.x), length * width, r.start);
        near(dnoise, m.gradient(m.noise), length * tokens);
    }
}

TEST_CASE("the noise matrix's gradient is added where that is asked for")
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 62);
    const noisy_case<double> c(rng, {.experts = 6, .k = 2, .importance = {0.1}, .load = {0.1}}, 9, 5);
    std::vector<double> once, twice(30, 1.5);
    c.run(ex, once);
    c.run(ex, twice, fm::write_mode::accumulate);
    for (std::size_t i = 0; i < once.size(); ++i) CHECK(std::fabs(twice[i] - 1.5 - once[i]) < 1e-14);
}

TEST_CASE("with capacity the losses still see all choices, and gradients are those of finite differences")
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 63);
    for (auto weights : {fm::after_drop::keep, fm::after_drop::rescale})
        for (double factor : {0.0, 0.5, 0.9}) {
            CAPTURE(factor);
            const fm::noisy_gate gate{.experts = 5, .k = 3, .capacity = {.factor = factor, .weights = weights},
                                      .importance = {0.3}, .load = {0.2}};
            noisy_case<double> c(rng, gate, 8, 4);
            std::vector<double> dnoise;
            const auto first = c.run(ex, dnoise);
            auto open = c;
            open.gate.capacity = {};
            std::vector<double> other;
            CHECK(support::same_bits(open.run(ex, other).losses, first.losses));
            const auto loss = [&] {
                std::vector<double> ignored;
                const auto r = c.run(ex, ignored);
                REQUIRE_EQ(r.experts, first.experts);
                double sum = c.in.loss_scale * (r.losses[2] + r.losses[3]);
                for (std::size_t i = 0; i < c.in.dweights.size(); ++i) sum += c.in.dweights[i] * r.weights[i];
                return sum;
            };
            const auto check = [&](const std::vector<double>& actual, std::vector<double>& what, double start) {
                const auto expected = support::finite_difference(loss, what, 1e-5);
                for (std::size_t i = 0; i < expected.size(); ++i) CHECK(std::fabs(actual[i] - start - expected[i]) < 1e-8);
            };
            check(first.dlogits, c.in.logits, 0);
            check(first.dx, c.in.x, first.start);
            check(dnoise, c.noise, 0);
        }
}

TEST_CASE_TEMPLATE("inference is a softmax gate without noise, without numbers and without losses", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 64);
    noisy_case<Real> c(rng, {.experts = 9, .k = 3, .balance = {1}, .z = {1}, .importance = {1}, .load = {1}}, 6, 4);
    c.in.mode = fm::gate_mode::inference;
    c.in.extras = {};
    c.in.mask = {1, 1, 0, 1, 1, 1};
    std::vector<Real> ignored;
    const auto r = c.run(ex, ignored);
    const support::gate_run plain(ex, fm::top_k_gate<>{.experts = 9, .k = 3}, 6, c.in.logits, c.in.dweights,
                                  fm::gate_mode::inference, c.in.mask);
    CHECK_EQ(r.experts, plain.experts);
    CHECK(support::same_bits(r.weights, plain.weights));
    CHECK_EQ(r.losses, std::vector<Real>(4, Real(0)));
}

TEST_CASE_TEMPLATE("importance and load have their closed forms", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 65);
    const int64_t experts = 6, tokens = 12, width = 2;
    const auto near_to = [](Real actual, double expected) {
        CAPTURE(actual);
        CHECK(std::fabs(actual - expected) <= 64 * support::roundoff<Real> * std::max(1.0, expected));
    };
    noisy_case<Real> c(rng, {.experts = experts, .k = 2, .importance = {0.5}, .load = {0.25}}, tokens, width);
    std::vector<Real> ignored;
    // Far apart: the choice, its weights (1, 0) and loads (1 or 0) are certain, whatever the noise.
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t e = 0; e < experts; ++e) c.in.logits[t * experts + e] = Real(e == 0 ? 2000 : e == 1 ? 1000 : 0);
    const auto one = c.run(ex, ignored);
    const double means[] = {4 / (4 + 1e-10), 16 / (16 + 1e-10)};   // of squares, against what is added to them
    near_to(one.losses[2], 0.5 * (experts - 1) * means[0]);        // all weight on one of E: cv^2 = E - 1
    near_to(one.losses[3], 0.25 * (experts / 2.0 - 1) * means[1]); // load T on two of E: cv^2 = E / 2 - 1
    c.gate.importance.variance = c.gate.load.variance = fm::variance::sample;
    near_to(c.run(ex, ignored).losses[2], 0.5 * experts * means[0]);
    // In turns: even.
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t e = 0; e < experts; ++e)
            c.in.logits[t * experts + e] = Real(e == t % experts ? 2000 : e == (t + 1) % experts ? 1000 : 0);
    const auto even = c.run(ex, ignored);
    CHECK_EQ(even.losses[2], Real(0));
    CHECK_EQ(even.losses[3], Real(0));
    // K = E: every load is T, even where a weight underflows.
    c.gate.k = experts;
    c.in.dweights.assign(tokens * experts, Real(1));
    CHECK_EQ(c.run(ex, ignored).losses[3], Real(0));
    // No token, and none that counts.
    c.in.mask.assign(tokens, 0);
    CHECK_EQ(c.run(ex, ignored).losses, std::vector<Real>(4, Real(0)));
    noisy_case<Real> none(rng, {.experts = 3, .k = 2, .importance = {1}, .load = {1}}, 0, width);
    CHECK_EQ(none.run(ex, ignored).losses, std::vector<Real>(4, Real(0)));
}

namespace {

/// One of two ranks: its own sums are recorded, one call after the other, and those of the other are added.
struct one_of_two {
    std::vector<std::vector<double>>* mine;
    const std::vector<std::vector<double>>* other;

    int rank() const { return 0; }
    int size() const { return 2; }

    template <class Executor, class T>
    void all_reduce(Executor&, fm::vector_view<T>) const // of what a capacity would count: there is none here
    {
    }
    template <class Executor>
    void all_reduce(Executor& ex, fm::vector_view<double> values) const
    {
        const std::size_t call = mine->size();
        mine->push_back(support::download(ex, values));
        for (std::size_t i = 0; other && i < other->at(call).size(); ++i) values(i) += (*other)[call][i];
    }
};

} // namespace

TEST_CASE("two ranks have the losses and gradients of the joined batch, for unequal token counts")
{
    fm::host_executor ex({.threads = 1});
    FASTMOE_SEEDED(rng, 66);
    const int64_t experts = 5, k = 2, width = 3;
    for (auto [left, right] : {std::pair{20, 3}, std::pair{1, 9}, std::pair{6, 0}}) {
        noisy_case<double> joined(rng, {.experts = experts, .k = k, .importance = {0.3}, .load = {0.2}}, left + right,
                                  width);
        std::vector<double> all;
        const auto whole = joined.run(ex, all);
        noisy_case<double> part[] = {joined, joined};
        part[0].in.tokens = left;
        part[1].in.tokens = right;
        part[1].in.extras.first_token += left;
        const auto cut = [&, l = left](std::vector<double>& a, std::vector<double>& b, int64_t n) {
            b.erase(b.begin(), b.begin() + l * n);
            a.resize(l * n);
        };
        cut(part[0].in.x, part[1].in.x, width);
        cut(part[0].in.logits, part[1].in.logits, experts);
        cut(part[0].in.dweights, part[1].in.dweights, k);
        std::vector<std::vector<double>> sums[2], seen[2];
        std::vector<double> ignored, dlogits, dx, dnoise(all.size(), 0.0);
        for (int r : {0, 1}) part[r].run(ex, ignored, fm::write_mode::overwrite, one_of_two{&sums[r], nullptr});
        for (int r : {0, 1}) {
            const auto here = part[r].run(ex, dnoise, fm::write_mode::accumulate, one_of_two{&seen[r], &sums[1 - r]});
            for (int i : {2, 3}) CHECK(std::fabs(here.losses[i] - whole.losses[i]) < 1e-13);
            dlogits.insert(dlogits.end(), here.dlogits.begin(), here.dlogits.end());
            dx.insert(dx.end(), here.dx.begin(), here.dx.end());
        }
        CHECK(support::close(dlogits, whole.dlogits, {.length = 256, .magnitude = 1}));
        CHECK(support::close(dx, whole.dx, {.length = 256, .magnitude = 1}));
        CHECK(support::close(dnoise, all, {.length = 512, .magnitude = 1}));
    }
}

TEST_CASE_TEMPLATE("rows that are not finite leave the losses and every gradient finite", Cell, FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 67);
    noisy_case<Real> c(rng, {.experts = 4, .k = 2, .balance = {1}, .z = {1}, .importance = {1}, .load = {1}}, 7, 1);
    c.in.logits = support::narrowed<Real>({nan_, -inf, nan_, -inf, // dropped
                                           inf, 1, inf, inf,       // three share, two are taken
                                           nan_, 1, -inf, nan_,    // one that counts: the other weighs 0
                                           1, inf, 0, 0,           //
                                           1, 2, 3, 4,             //
                                           4, 3, 2, 1,             //
                                           0, 0, 0, 0});
    c.in.x.assign(7, Real(1));
    c.in.x[4] = Real(nan_); // sigma is NaN: so are all noisy logits
    c.in.x[5] = Real(3e4);  // sigma up to 3e4
    c.noise = support::narrowed<Real>({1, -1, 0, 0.5});
    std::vector<Real> dnoise;
    const auto r = c.run(ex, dnoise);
    for (int t : {0, 4}) {
        CHECK_EQ(r.experts[2 * t], -1);
        CHECK_EQ(r.weights[2 * t + 1], Real(0));
        for (int e = 0; e < 4; ++e) CHECK_EQ(r.dlogits[4 * t + e], Real(0));
    }
    CHECK_EQ(r.experts[2], 0);
    CHECK_EQ(r.experts[3], 2);
    CHECK_EQ(r.weights[2], Real(0.5));
    CHECK_EQ(r.experts[4], 1);
    CHECK_EQ(r.weights[4], Real(1));
    for (Real v : r.losses) CHECK(std::isfinite(v));
    for (Real v : r.dlogits) CHECK(std::isfinite(v));
    for (int64_t t = 0; t < 7; ++t) CHECK(std::isfinite(r.dx[t]));
    // A noise matrix with a NaN: that expert has no noisy logit, and is left alone.
    noisy_case<Real> hole(rng, {.experts = 4, .k = 2, .importance = {1}, .load = {1}}, 5, 1);
    hole.noise[3] = Real(nan_);
    const auto others = hole.run(ex, dnoise = {});
    for (int32_t e : others.experts) CHECK(e < 3);
    for (Real v : others.losses) CHECK(std::isfinite(v));
    for (Real v : others.dlogits) CHECK(std::isfinite(v));
    for (Real v : dnoise) CHECK(std::isfinite(v));
    CHECK_EQ(dnoise[3], Real(0));
}

TEST_CASE("noise is drawn by seed, step and the token's number, so that any split, executor or thread count gives the same ids")
{
    FASTMOE_SEEDED(rng, 68);
    fm::host_executor one({.threads = 1});
    const int64_t tokens = 300, experts = 40, k = 4, width = 5;
    noisy_case<float> c(rng, {.experts = experts, .k = k, .importance = {0.1}, .load = {0.1}}, tokens, width);
    std::vector<float> gradient;
    const auto expected = c.run(one, gradient);
    for (int threads : {2, 4}) {
        fm::host_executor ex({.threads = threads});
        std::vector<float> again;
        const auto r = c.run(ex, again);
        CHECK_EQ(r.experts, expected.experts);
        CHECK(support::same_bits(r.weights, expected.weights));
        CHECK(support::same_bits(r.losses, expected.losses));
        CHECK(support::same_bits(r.dlogits, expected.dlogits));
        CHECK(support::same_bits(r.dx, expected.dx));
        CHECK(support::same_bits(again, gradient));
    }
    const auto tail = [&](auto& ex, int64_t from, int64_t n) {
        auto part = c;
        part.in.tokens = n;
        part.in.x.assign(c.in.x.begin() + from * width, c.in.x.begin() + (from + n) * width);
        part.in.logits.assign(c.in.logits.begin() + from * experts, c.in.logits.begin() + (from + n) * experts);
        part.in.dweights.assign(n * k, 1.f);
        part.in.extras.first_token += from;
        std::vector<float> ignored;
        return part.run(ex, ignored).experts;
    };
    support::lanes lanes;
    const auto same = [&](const std::vector<int32_t>& ids, int64_t from) {
        return std::equal(ids.begin(), ids.end(), expected.experts.begin() + from * k);
    };
    CHECK(same(tail(one, 100, 200), 100));
    CHECK(same(tail(lanes, 250, 20), 250));
    c.in.extras.seed_and_step[1] += 1;
    CHECK(c.run(one, gradient).experts != expected.experts);
}

TEST_CASE("a noise matrix of the wrong shape, and whatever else makes no sense, is refused by name")
{
    fm::host_executor ex({.threads = 1});
    FASTMOE_SEEDED(rng, 69);
    const auto says = [&](auto change, const char* part) {
        noisy_case<float> c(rng, {.experts = 4, .k = 2}, 3, 5);
        int64_t rows = 4, columns = 5;
        change(c, rows, columns);
        std::vector<float> matrix(40), gradient(40);
        const std::string text = support::message_of<fm::invalid_argument>([&] {
            support::owning_gate_run(ex, c.gate, c.in,
                                     fm::noisy_parameters<float>{fm::matrix_view<float>(matrix.data(), rows, columns)},
                                     fm::noisy_parameters<float>{fm::matrix_view<float>(gradient.data(), 4, 5)});
        });
        INFO(text);
        CHECK(support::has(text, part));
    };
    using c_t = noisy_case<float>;
    says([](c_t&, int64_t& rows, int64_t&) { rows = 5; }, "noise matrix (E,D) is of shape (5,5); expected (4,5)");
    says([](c_t&, int64_t&, int64_t& columns) { columns = 4; }, "noise matrix (E,D) is of shape (4,4); expected (4,5)");
    says([](c_t& c, int64_t&, int64_t&) { c.in.extras = {}; }, "random is a null pointer; expected seed and step");
    says([](c_t& c, int64_t&, int64_t&) { c.in.extras.first_token = -1; }, "first_token is -1; expected zero or more");
    says([](c_t& c, int64_t&, int64_t&) { c.gate.k = 1; }, "k is 1; expected 2 or more to train with renormalize");
    says([](c_t& c, int64_t&, int64_t&) { c.gate.k = 5; }, "k is 5; expected at most the number of experts, 4");
    says([](c_t& c, int64_t&, int64_t&) { c.gate.importance = {-1}; }, "importance.coefficient is -1");
    says([](c_t& c, int64_t&, int64_t&) { c.gate.load = {nan_}; }, "load.coefficient is");
}

TEST_CASE("a layer with a noisy gate has the gradients of finite differences in its input, router, noise matrix and experts")
{
    FASTMOE_SEEDED(rng, 70);
    fm::host_executor ex({.threads = 2});
    const int64_t tokens = 6, width = 4;
    const fm::moe_layer layer{fm::noisy_gate{.experts = 4, .k = 2, .importance = {0.2}, .load = {0.3}},
                              fm::mlp<fm::gelu>{.width = width, .hidden = 5}};
    auto w = fm::random_weights<double>(ex, layer, 3), g = fm::zero_weights<double>(ex, layer);
    for (int64_t i = 0; i < 16; ++i) CHECK_EQ(w.view().own.noise.data_handle()[i], 0.0); // as the paper starts
    support::fill_normal(rng, w.view().own.noise, 0.5);
    std::vector<double> x = rng.normals(tokens * width), y(x.size()), dx(x.size(), nan_);
    const auto dy = rng.normals(tokens * width);
    const std::vector<std::uint64_t> random{3, 4};
    const fm::gate_options options{.random = random.data()};
    const auto forward = [&] {
        return layer.forward(ex, fm::as_matrix(x, tokens, width), w.view(), fm::as_matrix(y, tokens, width), options);
    };
    const auto saved = forward();
    layer.backward(ex, saved, fm::as_matrix(dy, tokens, width), w.view(), fm::as_matrix(dx, tokens, width), g.view(),
                   {.loss_scale = 0.7});
    const auto loss = [&] {
        const auto s = forward();
        double sum = 0.7 * (s.losses()(2) + s.losses()(3));
        for (std::size_t i = 0; i < y.size(); ++i) sum += dy[i] * y[i];
        return sum;
    };
    const auto check = [&](const double* actual, double* what, int64_t n) {
        std::vector<double> values(what, what + n);
        const auto expected = support::finite_difference(
            [&] {
                std::copy(values.begin(), values.end(), what);
                return loss();
            },
            values, 1e-4);
        std::copy(values.begin(), values.end(), what);
        for (int64_t i = 0; i < n; ++i) CHECK(std::fabs(actual[i] - expected[i]) < 1e-8);
    };
    check(dx.data(), x.data(), tokens * width);
    check(g.view().own.noise.data_handle(), w.view().own.noise.data_handle(), 16);
    check(g.view().gate.data_handle(), w.view().gate.data_handle(), 16);
}
