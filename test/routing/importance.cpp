// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The importance loss beside any routing. Inside of a noisy gate it is tested there.
#include <doctest/doctest.h>

#include <cmath>
#include <string>

#include <fastmoe/routing/importance.hpp>

#include "support/compare.hpp"
#include "support/finite_difference.hpp"
#include "support/reference_noisy.hpp"
#include "support/run_gate.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
namespace oracle = support::reference;
using fm::int64_t;

namespace {

/// Choices of tokens without a fixed number each.
template <class Real>
struct choices {
    int64_t total;
    std::vector<int32_t> experts;
    std::vector<Real> weights;

    double loss(double coefficient, bool sample) const
    {
        std::vector<double> sums(static_cast<std::size_t>(total), 0.0);
        for (std::size_t c = 0; c < experts.size(); ++c)
            if (experts[c] >= 0) sums[experts[c]] += double(weights[c]);
        return coefficient * oracle::cv_squared(sums, sample);
    }
};

template <class Real>
struct outcome {
    Real loss;
    std::vector<Real> dweights;
};

template <class Executor, class Real, class Communicator = fm::self>
outcome<Real> run(Executor& ex, const choices<Real>& given, fm::importance_loss loss, double scale, const Communicator& c = {})
{
    auto ids = support::upload(ex, given.experts);
    auto weights = support::upload(ex, given.weights);
    auto dweights = support::upload(ex, std::vector<Real>(given.weights.size(), Real(0.5)));
    const std::vector<int32_t> ends{0, static_cast<int32_t>(given.experts.size())}; // ragged: one token has them all
    const auto first = support::upload(ex, ends);
    const fm::routing<Real> route{1, given.total, 0, ids.view(), weights.view(), first.view()};
    fm::buffer<std::byte, Executor> memory(ex, 1 << 16);
    support::poison(memory.view());
    fm::arena kept(memory.view());
    const auto out = fm::reserve_evenness<Real>(kept, given.total);
    support::in_workspace(ex, [&](fm::arena& scratch) { fm::importance_loss_forward(ex, route, loss, c, out, scratch); });
    fm::importance_loss_backward(ex, ids.view(), out.slopes, Real(scale), dweights.view());
    return {out.loss(0), support::download(ex, dweights.view())};
}

} // namespace

TEST_CASE_TEMPLATE("the importance loss of any routing agrees with the oracle, and its gradient with finite differences", Cell,
                   FASTMOE_LOGIT_CELLS)
{
    using Real = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 71);
    for (int i = 0; i < 8; ++i) {
        choices<Real> given{i == 0 ? 1 : rng.integer(2, 40), {}, {}};
        for (int64_t c = i == 1 ? 0 : rng.integer(1, 300); c > 0; --c) {
            given.experts.push_back(static_cast<int32_t>(rng.integer(-1, given.total - 1)));
            given.weights.push_back(support::narrow<Real>(rng.uniform(0, 1)));
        }
        CAPTURE(given.total);
        const bool sample = i % 2;
        const fm::importance_loss loss{0.3, sample ? fm::variance::sample : fm::variance::population};
        const auto r = run(ex, given, loss, 0.7);
        const double expected = given.loss(0.3, sample), length = 16 + 2 * double(given.experts.size());
        CHECK(std::fabs(r.loss - expected) <= support::roundoff<Real> * length * (expected + 0.3));
        choices<double> exact{given.total, given.experts, support::widened(given.weights)};
        auto gradient = support::finite_difference([&] { return 0.7 * exact.loss(0.3, sample); }, exact.weights);
        double largest = 1;
        for (double& g : gradient) largest = std::max(largest, std::fabs(g)), g += 0.5;
        for (std::size_t c = 0; c < gradient.size(); ++c)
            REQUIRE(std::fabs(double(r.dweights[c]) - gradient[c]) <= (support::roundoff<Real> * length + 1e-9) * largest);
    }
}

TEST_CASE("the importance loss refuses wrong shapes and coefficients by name")
{
    fm::host_executor ex({.threads = 1});
    const auto says = [&](double coefficient, int64_t slopes, const char* part) {
        std::vector<float> weights(4), out(5);
        std::vector<int32_t> ids(4);
        const fm::routing<float> route{2, 4, 2, fm::as_vector(ids), fm::as_vector(weights), {}};
        const fm::evenness<float> result{fm::vector_view<float>(out.data(), 1), fm::vector_view<float>(out.data() + 1, slopes)};
        fm::buffer<std::byte, fm::host_executor> memory(ex, 1 << 12);
        fm::arena scratch(memory.view());
        const auto text = support::message_of<fm::invalid_argument>(
            [&] { fm::importance_loss_forward(ex, route, {coefficient}, fm::self{}, result, scratch); });
        INFO(text);
        CHECK(support::has(text, part));
    };
    says(-1, 4, "importance.coefficient is -1; expected a finite number from 0 on");
    says(1, 3, "slopes (E) is of shape (3); expected (4)");
}
