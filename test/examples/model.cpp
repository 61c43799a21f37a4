// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The whole GPT: its gradient against finite differences of its loss, in double, and what must not change its numbers.
#include <cmath>
#include <cstring>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/gemm/portable.hpp>

#include "support/finite_difference.hpp"
#include "support/random.hpp"
#include "train_gpt/model.hpp"

namespace {

using namespace train_gpt;

template <class T>
using model = gpt<T, fm::host_executor, fm::gemm::portable>;

gpt_config tiny()
{
    return {.vocabulary = 11, .context = 6, .width = 8, .layers = 2, .heads = 2, .experts = 3, .k = 2, .hidden = 5,
            .balance = 0.3};
}

std::vector<std::int32_t> random_ids(support::random& draw, std::int64_t n, std::int64_t below)
{
    std::vector<std::int32_t> out(static_cast<std::size_t>(n));
    for (auto& v : out) v = static_cast<std::int32_t>(draw.integer(0, below - 1));
    return out;
}

struct batch {
    std::vector<std::int32_t> ids, targets;
    std::int64_t length;

    batch(support::random& draw, const gpt_config& c, std::int64_t sequences, std::int64_t positions)
        : ids(random_ids(draw, sequences * positions, c.vocabulary)),
          targets(random_ids(draw, sequences * positions, c.vocabulary)),
          length(positions)
    {}
    std::int64_t sequences() const { return static_cast<std::int64_t>(ids.size()) / length; }
};

/// Loss (cross entropy, gates) and gradient in a workspace of exactly the size asked for, filled with NaN.
template <class T>
std::vector<accumulate_t<T>> gradient(fm::host_executor& ex, model<T>& m, const batch& b,
                                      std::vector<std::int32_t>* counts = nullptr)
{
    fm::buffer<std::byte, fm::host_executor> memory(ex, m.training_bytes(b.sequences(), b.length));
    std::memset(memory.data(), 0xff, static_cast<std::size_t>(memory.size()));
    std::vector<accumulate_t<T>> loss(2);
    matrix_view<std::int32_t> counted;
    if (counts) counted = fm::as_matrix(*counts, m.config().layers, m.config().experts);
    m.gradient(fm::as_vector(b.ids), fm::as_vector(b.targets), b.length, fm::as_vector(loss), counted,
               fm::arena(memory.view()));
    return loss;
}

template <class T>
std::vector<accumulate_t<T>> loss_of(fm::host_executor& ex, model<T>& m, const batch& b)
{
    fm::buffer<std::byte, fm::host_executor> memory(ex, m.training_bytes(b.sequences(), b.length));
    std::vector<accumulate_t<T>> loss(2);
    m.loss(fm::as_vector(b.ids), fm::as_vector(b.targets), b.length, fm::as_vector(loss), {}, fm::arena(memory.view()));
    return loss;
}

template <class T>
std::vector<accumulate_t<T>> copy(vector_view<T> v)
{
    return {v.data_handle(), v.data_handle() + v.extent(0)};
}

/// Parameters away from the start, where gates hardly differ and biases are zero.
template <class T>
void disturb(support::random& draw, model<T>& m)
{
    const auto p = m.parameters();
    for (std::int64_t i = 0; i < p.extent(0); ++i) p(i) += static_cast<accumulate_t<T>>(draw.normal(0.3));
    m.parameters_changed();
}

/// Tensor by tensor: an arena leaves other gaps between tensors of other types.
template <class To>
void copy_parameters(model<double>& from, To& to)
{
    const auto a = from.named_tensors();
    const auto b = to.named_tensors();
    for (std::size_t i = 0; i < a.size(); ++i)
        for (std::int64_t j = 0; j < a[i].size(); ++j) b[i].data[j] = static_cast<float>(a[i].data[j]);
    to.parameters_changed();
}

/// Of the gradient, in the norm of all parameters.
template <class Narrow>
double relative_error(Narrow& narrow, model<double>& wide)
{
    double error = 0, norm = 0;
    const auto a = wide.named_tensors();
    const auto b = narrow.named_tensors();
    for (std::size_t i = 0; i < a.size(); ++i)
        for (std::int64_t j = 0; j < a[i].size(); ++j) {
            const double expected = wide.gradients()(a[i].data - wide.parameters().data_handle() + j);
            const double got = narrow.gradients()(b[i].data - narrow.parameters().data_handle() + j);
            error += std::pow(got - expected, 2);
            norm += std::pow(expected, 2);
        }
    return std::sqrt(error / norm);
}

} // namespace

TEST_CASE("the gradient of every parameter is what finite differences of the loss and the gates' losses give")
{
    FASTMOE_SEEDED(draw, 501);
    fm::host_executor ex;
    for (const bool dense : {false, true}) {
        CAPTURE(dense);
        const auto config = dense ? tiny().dense() : tiny();
        model<double> m(ex, config, 7);
        disturb(draw, m);
        const batch b(draw, config, 2, 5); // shorter than the context: the last position gets no gradient
        gradient(ex, m, b);
        const auto got = copy(m.gradients());
        auto x = copy(m.parameters());
        const auto expected = support::finite_difference(
            [&] {
                std::copy(x.begin(), x.end(), m.parameters().data_handle());
                const auto loss = loss_of(ex, m, b);
                return loss[0] + loss[1];
            },
            x, 1e-4);
        REQUIRE(got.size() == expected.size());
        double largest = 0;
        for (std::size_t i = 0; i < got.size(); ++i) {
            CHECK(std::abs(got[i] - expected[i]) < 1e-8);
            largest = std::max(largest, std::abs(got[i]));
        }
        CHECK(largest > 0.1);
    }
}

TEST_CASE("every parameter has one name, and all of them together are the parameters")
{
    fm::host_executor ex;
    model<float> m(ex, tiny(), 7);
    std::vector<int> seen(static_cast<std::size_t>(m.parameters().extent(0)));
    std::int64_t total = 0;
    for (const auto& e : m.named_tensors()) {
        total += e.size();
        for (std::int64_t i = 0; i < e.size(); ++i)
            ++seen[static_cast<std::size_t>(e.data - m.parameters().data_handle() + i)];
    }
    for (const int times : seen) CHECK(times <= 1);
    CHECK(total == m.total_params());
    const auto c = tiny();
    const std::int64_t block = 4 * c.width * c.width + 4 * c.width + c.experts * c.width +
                               c.experts * 2 * c.width * c.hidden;
    CHECK(total == c.vocabulary * c.width + c.context * c.width + 2 * c.width + c.layers * block);
}

TEST_CASE("the dense twin has the active parameters of the mixture but for its routers")
{
    fm::host_executor ex;
    gpt_config c = tiny();
    c.experts = 8;
    model<float> moe(ex, c, 7), dense(ex, c.dense(), 7);
    CHECK(dense.active_params() == dense.total_params());
    CHECK(moe.active_params() - dense.active_params() == c.layers * c.width * (c.experts - 1));
    CHECK(moe.total_params() > moe.active_params());
}

TEST_CASE("the loss is the cross entropy of the logits that inference gives")
{
    FASTMOE_SEEDED(draw, 502);
    fm::host_executor ex;
    model<double> m(ex, tiny(), 3);
    disturb(draw, m);
    const batch b(draw, tiny(), 3, 6);
    fm::buffer<std::byte, fm::host_executor> memory(ex, m.inference_bytes(3, 6));
    const auto logits = m.logits(fm::as_vector(b.ids), 6, fm::arena(memory.view()));
    double expected = 0;
    for (std::int64_t t = 0; t < 18; ++t) {
        double total = 0;
        for (std::int64_t v = 0; v < 11; ++v) total += std::exp(logits(t, v));
        expected += (std::log(total) - logits(t, b.targets[static_cast<std::size_t>(t)])) / 18;
    }
    CHECK(loss_of(ex, m, b)[0] == doctest::Approx(expected).epsilon(1e-12));
    CHECK(gradient(ex, m, b)[0] == loss_of(ex, m, b)[0]);
}

TEST_CASE("counts tell how many of a layer's choices fell on each expert")
{
    FASTMOE_SEEDED(draw, 503);
    fm::host_executor ex;
    model<float> m(ex, tiny(), 3);
    const batch b(draw, tiny(), 4, 6);
    std::vector<std::int32_t> counts(6, -1);
    gradient(ex, m, b, &counts);
    for (std::size_t layer = 0; layer < 2; ++layer) {
        std::int64_t total = 0;
        for (std::size_t e = 0; e < 3; ++e) {
            CHECK(counts[3 * layer + e] >= 0);
            CHECK(counts[3 * layer + e] <= 24);
            total += counts[3 * layer + e];
        }
        CHECK(total == 24 * 2);
    }
}

TEST_CASE("no logit depends on a later token")
{
    FASTMOE_SEEDED(draw, 504);
    fm::host_executor ex;
    model<double> m(ex, tiny(), 3);
    disturb(draw, m);
    batch b(draw, tiny(), 1, 6);
    fm::buffer<std::byte, fm::host_executor> memory(ex, m.inference_bytes(1, 6));
    const auto all = [&] {
        const auto z = m.logits(fm::as_vector(b.ids), 6, fm::arena(memory.view()));
        return std::vector<double>(z.data_handle(), z.data_handle() + 6 * 11);
    };
    const auto before = all();
    b.ids[4] = (b.ids[4] + 1) % 11;
    const auto after = all();
    for (std::size_t i = 0; i < 4 * 11; ++i) CHECK(before[i] == after[i]);
    CHECK(before != after);
}

TEST_CASE("loss and gradient have the same bits for 1, 2 and 4 threads")
{
    FASTMOE_SEEDED(draw, 505);
    const gpt_config c{.vocabulary = 256, .context = 40, .width = 48, .layers = 2, .heads = 3, .experts = 4, .k = 2,
                       .hidden = 56};
    const batch b(draw, c, 5, 40);
    std::vector<std::vector<float>> all;
    for (const int threads : {1, 2, 4}) {
        fm::host_executor ex({.threads = threads});
        model<float> m(ex, c, 9);
        auto values = gradient(ex, m, b);
        const auto g = copy(m.gradients());
        values.insert(values.end(), g.begin(), g.end());
        all.push_back(values);
    }
    CHECK(std::memcmp(all[0].data(), all[1].data(), all[0].size() * sizeof(float)) == 0);
    CHECK(std::memcmp(all[0].data(), all[2].data(), all[0].size() * sizeof(float)) == 0);
}

TEST_CASE("float and bfloat16 give the loss and the gradient of double within their rounding")
{
    FASTMOE_SEEDED(draw, 506);
    fm::host_executor ex;
    gpt_config c = tiny();
    c.experts = c.k = 3; // no choice that rounding could turn
    const batch b(draw, c, 4, 6);
    model<double> wide(ex, c, 5);
    disturb(draw, wide);
    model<float> narrow(ex, c, 5);
    model<fm::bfloat16> brief(ex, c, 5);
    copy_parameters(wide, narrow);
    copy_parameters(wide, brief);
    const double expected = gradient(ex, wide, b)[0];
    CHECK(std::abs(gradient(ex, narrow, b)[0] - expected) < 1e-5);
    CHECK(std::abs(gradient(ex, brief, b)[0] - expected) < 0.05);
    CHECK(relative_error(narrow, wide) < 1e-5);
    CHECK(relative_error(brief, wide) < 0.05);
}

TEST_CASE("a workspace one byte too small is refused before anything is computed")
{
    FASTMOE_SEEDED(draw, 507);
    fm::host_executor ex;
    model<float> m(ex, tiny(), 3);
    const batch b(draw, tiny(), 2, 6);
    fm::buffer<std::byte, fm::host_executor> memory(ex, m.training_bytes(2, 6) - 1);
    std::vector<float> loss(2, 5.0f);
    CHECK_THROWS_AS(m.gradient(fm::as_vector(b.ids), fm::as_vector(b.targets), 6, fm::as_vector(loss), {},
                               fm::arena(memory.view())),
                    fm::out_of_memory);
    CHECK(loss[0] == 5.0f);
}

TEST_CASE("sizes that do not fit each other are refused by name")
{
    fm::host_executor ex;
    gpt_config c = tiny();
    c.heads = 3;
    CHECK_THROWS_WITH_AS(model<float>(ex, c, 1), doctest::Contains("width is 8; expected a multiple of heads = 3"),
                         fm::invalid_argument);
    c = tiny();
    c.k = 4;
    CHECK_THROWS_WITH_AS(model<float>(ex, c, 1), doctest::Contains("k is 4; expected at most experts = 3"),
                         fm::invalid_argument);
    c = tiny();
    c.hidden = 0;
    CHECK_THROWS_WITH_AS(model<float>(ex, c, 1), doctest::Contains("hidden is 0; expected 1 or more"),
                         fm::invalid_argument);
}
