// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A layer of an engine that has loops of its own by the names of ours: its executor, score and activation live in a namespace
/// whose for_each would match every call of the library's better.
#include <doctest/doctest.h>

#include <utility>
#include <vector>

#include <fastmoe/moe.hpp>

#include "support/compare.hpp"

namespace engine {

int taken = 0;

template <class Executor, class F>
void for_each(Executor&, std::int64_t, F&&)
{
    ++taken;
}
template <class Executor, class F, class Hint>
void for_each_row(Executor&, std::int64_t, F&&, Hint&&)
{
    ++taken;
}

struct executor : fastmoe::host_executor {
    using host_executor::host_executor;
};
struct score : fastmoe::softmax_score {};
struct weigh : fastmoe::renormalize {};
struct activation {
    static constexpr bool gated = false;
    template <class Real>
    Real value(Real x) const
    {
        return x > Real(0) ? x : Real(0);
    }
    template <class Real>
    Real derivative(Real x) const
    {
        return x > Real(0) ? Real(1) : Real(0);
    }
};

} // namespace engine

using namespace fastmoe;

namespace {

struct result {
    std::vector<float> y, dx;
};

template <class Score, class Weigh, class Activation, class Executor>
result step(Executor& ex)
{
    constexpr int64_t tokens = 9, width = 8;
    const moe_layer layer{top_k_gate<Score, top_k, Weigh>{.experts = 4, .k = 2, .capacity = {.factor = 1, .order = drop_order::by_weight},
                                                          .balance = {.coefficient = 0.1}},
                          mlp<Activation>{.width = width, .hidden = 8, .biases = true, .weigh = weigh_at::input}};
    const auto w = random_weights<float>(ex, layer, 1);
    const auto g = zero_weights<float>(ex, layer);
    std::vector<float> x(tokens * width);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i * 7919 % 1009) / 504.5f - 1.f;
    result out{std::vector<float>(x.size()), std::vector<float>(x.size())};
    const auto saved = layer.forward(ex, as_matrix(x, tokens, width), w.view(), as_matrix(out.y, tokens, width));
    layer.backward(ex, saved, as_matrix(x, tokens, width), w.view(), as_matrix(out.dx, tokens, width), g.view());
    return out;
}

} // namespace

TEST_CASE("a user's executor and policies with loops of the same name beside them give the bits of the library's own")
{
    host_executor ours({.threads = 2});
    engine::executor theirs({.threads = 2});
    const auto expected = step<softmax_score, renormalize, relu>(ours);
    const auto mixed = step<engine::score, engine::weigh, engine::activation>(ours);
    const auto all = step<engine::score, engine::weigh, engine::activation>(theirs);
    for (const auto* r : {&mixed, &all}) {
        CHECK(support::same_bits(r->y, expected.y)); // what is made for the host's executor serves those that derive from it
        CHECK(support::same_bits(r->dx, expected.dx));
    }
    CHECK_EQ(engine::taken, 0);
}
