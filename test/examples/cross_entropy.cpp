// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Cross entropy and the embeddings against scalar loops, and their gradients against finite differences.
#include <cmath>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/exec/host_executor.hpp>

#include "support/finite_difference.hpp"
#include "support/lanes.hpp"
#include "support/random.hpp"
#include "train_gpt/cross_entropy.hpp"
#include "train_gpt/embedding.hpp"

namespace {

using namespace train_gpt;

std::vector<std::int32_t> random_ids(support::random& draw, std::int64_t n, std::int64_t below)
{
    std::vector<std::int32_t> out(static_cast<std::size_t>(n));
    for (auto& v : out) v = static_cast<std::int32_t>(draw.integer(0, below - 1));
    return out;
}

double oracle(std::int64_t vocabulary, const std::vector<double>& logits, const std::vector<std::int32_t>& targets)
{
    double loss = 0;
    for (std::size_t t = 0; t < targets.size(); ++t) {
        double total = 0;
        const double* z = logits.data() + static_cast<std::int64_t>(t) * vocabulary;
        for (std::int64_t v = 0; v < vocabulary; ++v) total += std::exp(z[v]);
        loss += std::log(total) - z[targets[t]];
    }
    return loss / double(targets.size());
}

} // namespace

TEST_CASE_TEMPLATE("cross entropy and its gradient agree with the formula in double", Executor,
                   fm::host_executor, support::lanes)
{
    FASTMOE_SEEDED(draw, 101);
    Executor ex;
    for (const std::int64_t vocabulary : {1, 7, 256}) {
        const std::int64_t tokens = vocabulary == 256 ? 3 : 37;
        auto logits = draw.normals(tokens * vocabulary);
        const auto targets = random_ids(draw, tokens, vocabulary);
        std::vector<double> losses(targets.size(), NAN), loss(1, NAN), gradient(logits.size(), NAN);
        cross_entropy<double>(ex, fm::as_matrix(logits, tokens, vocabulary), fm::as_vector(targets),
                              fm::as_vector(losses), fm::as_vector(loss), fm::as_matrix(gradient, tokens, vocabulary));
        CHECK(loss[0] == doctest::Approx(oracle(vocabulary, logits, targets)).epsilon(1e-13));
        const auto expected = support::finite_difference([&] { return oracle(vocabulary, logits, targets); }, logits);
        for (std::size_t i = 0; i < expected.size(); ++i) CHECK(std::abs(gradient[i] - expected[i]) < 1e-10);
    }
}

TEST_CASE("cross entropy does not overflow for logits of a thousand")
{
    fm::host_executor ex;
    const std::vector<float> logits{1000.f, 0.f, -1000.f, -1000.f, 1000.f, 999.f};
    const std::vector<std::int32_t> targets{0, 2};
    std::vector<float> losses(2), loss(1), gradient(6, NAN);
    cross_entropy<float>(ex, fm::as_matrix(logits, 2, 3), fm::as_vector(targets), fm::as_vector(losses),
                         fm::as_vector(loss), fm::as_matrix(gradient, 2, 3));
    CHECK(losses[0] == 0.f);
    CHECK(losses[1] == doctest::Approx(1.3132617).epsilon(1e-4));
    CHECK(gradient[0] == 0.f);
    CHECK(gradient[5] == doctest::Approx(0.5 * (1 / (1 + std::exp(1.0)) - 1)).epsilon(1e-4));
}

TEST_CASE_TEMPLATE("an embedding sums token and position, and its gradient sums over every use of either", Executor,
                   fm::host_executor, support::lanes)
{
    FASTMOE_SEEDED(draw, 102);
    Executor ex;
    const std::int64_t batch = 5, length = 6, context = 8, vocabulary = 9, width = 19, tokens = batch * length;
    const auto ids = random_ids(draw, tokens, 7); // ids 7 and 8 are never used
    const auto table = draw.normals(vocabulary * width), positions = draw.normals(context * width);
    std::vector<double> x(static_cast<std::size_t>(tokens * width), NAN);
    embed<double>(ex, fm::as_vector(ids), length, fm::as_matrix(table, vocabulary, width),
                  fm::as_matrix(positions, context, width), fm::as_matrix(x, tokens, width));
    const auto dx = draw.normals(tokens * width), before = draw.normals(vocabulary * width);
    auto expected_table = before;
    std::vector<double> expected_positions(positions.size(), 0.0);
    for (std::int64_t t = 0; t < tokens; ++t)
        for (std::int64_t d = 0; d < width; ++d) {
            const auto id = static_cast<std::size_t>(ids[static_cast<std::size_t>(t)] * width + d);
            const auto at = static_cast<std::size_t>(t % length * width + d),
                       i = static_cast<std::size_t>(t * width + d);
            CHECK(x[i] == table[id] + positions[at]);
            expected_table[id] += dx[i];
            expected_positions[at] += dx[i];
        }
    auto dtable = before;
    std::vector<double> dpositions(positions.size(), NAN);
    const auto backward = [&](fm::arena& memory) {
        embed_backward<double>(ex, fm::as_vector(ids), length, fm::as_matrix(dx, tokens, width),
                               fm::as_matrix(dtable, vocabulary, width), fm::as_matrix(dpositions, context, width),
                               memory);
    };
    fm::arena measure;
    backward(measure);
    fm::buffer<std::byte, Executor> storage(ex, measure.bytes());
    fm::arena memory(storage.view());
    backward(memory);
    for (std::size_t i = 0; i < dtable.size(); ++i) CHECK(std::abs(dtable[i] - expected_table[i]) < 1e-12);
    for (std::size_t i = 0; i < dpositions.size(); ++i) CHECK(std::abs(dpositions[i] - expected_positions[i]) < 1e-12);
}

TEST_CASE("a sequence longer than the table of positions is refused")
{
    fm::host_executor ex;
    const std::vector<std::int32_t> ids(4);
    const std::vector<float> table(8), positions(6);
    std::vector<float> x(8);
    CHECK_THROWS_WITH_AS(embed<float>(ex, fm::as_vector(ids), 4, fm::as_matrix(table, 4, 2),
                                      fm::as_matrix(positions, 3, 2), fm::as_matrix(x, 4, 2)),
                         doctest::Contains("length is 4; expected at most 3 positions"), fm::invalid_argument);
}
