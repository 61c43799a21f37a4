// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <map>
#include <string>

#include <fastmoe/expert/expert_tuple.hpp>
#include <fastmoe/expert/linear.hpp>
#include <fastmoe/layer/owned_weights.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

#include "support/executors.hpp"

using namespace fastmoe;

namespace {

/// The matrices of a layer, by name.
using matrices = std::map<std::string, std::vector<double>>;

constexpr int64_t width = 8;

std::vector<double> values(const double* from, int64_t count) { return {from, from + count}; }

/// Three types of experts whose matrices all have the same shape, and a router of it too.
template <class Executor>
matrices draw(Executor& ex, std::uint64_t seed)
{
    const linear<> one{.width = width};
    const moe_layer layer{top_k_gate<>{.experts = width, .k = 2}, expert_tuple(several{one, 3}, several{one, 3}, several{one, 2}), self{}};
    const auto w = random_weights<double>(ex, layer, seed);
    ex.synchronize();
    const auto& e = w.view().expert;
    const int64_t matrix = width * width;
    return {{"gate", values(w.view().gate.data_handle(), matrix)},
            {"first", values(e.first.weight.data, 3 * matrix)},
            {"second", values(e.second.first.weight.data, 3 * matrix)},
            {"third", values(e.second.second.weight.data, 2 * matrix)}};
}

} // namespace

TEST_CASE("no two parts of a layer and no two seeds share a draw, consecutive seeds neither")
{
    host_executor ex({.threads = 2});
    std::map<double, std::string> where; // a value was drawn
    for (std::uint64_t seed = 0; seed < 8; ++seed)
        for (const auto& one : draw(ex, seed)) { // clang++ 14 has no lambdas, as INFO's, that take structured bindings
            const std::string& name = one.first;
            const std::vector<double>& drawn = one.second;
            int repeated = 0;
            std::string first;
            for (const double v : drawn) {
                const auto [at, fresh] = where.emplace(v, name + " of seed " + std::to_string(seed));
                if (!fresh) ++repeated, first = at->second;
            }
            INFO(name, " of seed ", seed, " repeats ", repeated, " of ", drawn.size(), " values, e.g. of ", first);
            // 24-bit draws: among 4600 values in all, 0.6 pairs are expected to be equal by chance.
            CHECK(repeated < 4);
        }
}

TEST_CASE_TEMPLATE("weights lie within 1/sqrt(fan in), are spread over all of it, and depend on the seed alone", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    host_executor other({.threads = 1});
    const auto drawn = draw(ex, 5), again = draw(other, 5);
    for (const auto& one : drawn) {
        const std::string& name = one.first;
        const std::vector<double>& v = one.second;
        CAPTURE(name);
        CHECK(v == again.at(name));
        double sum = 0, squares = 0;
        const double bound = 1 / std::sqrt(double(width)), n = double(v.size());
        for (const double x : v) {
            REQUIRE(std::fabs(x) <= bound);
            sum += x;
            squares += x * x;
        }
        // Uniform on +-b: mean 0, variance b^2/3, and the square's variance 4 b^4 / 45.
        CHECK(std::fabs(sum / n) < 5 * bound / std::sqrt(3 * n));
        CHECK(std::fabs(squares / n - bound * bound / 3) < 5 * bound * bound * std::sqrt(4.0 / 45 / n));
    }
}
