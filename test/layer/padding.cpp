// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What a token may hold that takes no part, NaN and infinities: the layer computes what it does on the batch without it.
#include <doctest/doctest.h>

#include <limits>

#include "support/compare.hpp"
#include "support/mlp_memory.hpp"

using namespace fastmoe;
namespace oracle = support::reference;

namespace {

using expert_type = mlp<swiglu>;
constexpr int64_t tokens = 12, width = 10, hidden = 7, experts = 4, bad = 5; // token `bad` is the one

/// The numbers of all rows but one.
oracle::numbers without_row(const oracle::numbers& v, int64_t row, int64_t columns)
{
    oracle::numbers out(v.begin(), v.begin() + row * columns);
    out.insert(out.end(), v.begin() + (row + 1) * columns, v.end());
    return out;
}

enum class left_out { by_mask, by_logits };

/// A step with a token that holds `value`, in one column or in all, compared with the oracle on the other tokens.
template <class Cell>
void compare(support::random& r, double value, bool all_columns, left_out how)
{
    using T = typename Cell::type;
    using Executor = typename Cell::executor;
    auto ex = Cell::make();
    const bool masked = how == left_out::by_mask;
    const expert_type expert{.width = width, .hidden = hidden, .biases = true};
    // Without a mask the token counts in the means of the losses, so there are none.
    const oracle::options o{.k = 2, .balance = masked ? 0.1 : 0, .z = masked ? 0.02 : 0};
    const moe_layer layer{top_k_gate<>{.experts = experts, .k = 2, .balance = {o.balance}, .z = {o.z}}, expert, self{}};
    support::layer_memory<T, expert_type, Executor> w(ex, r, expert, experts, oracle::activation::swiglu, true);
    support::gradient_memory<T, expert_type, Executor> g(ex, w.model);
    const int64_t column = r.integer(0, width - 1);
    if (!masked && !std::isnan(value)) // every logit of the token becomes -Inf
        for (int64_t e = 0; e < experts; ++e) {
            T& at = w.views.gate(e, column);
            at = T((value > 0 ? -1 : 1) * std::fabs(float(at)));
        }
    w.model.gate = support::widened(w.views.gate);

    support::guarded<T> x(tokens, width), y(tokens, width), again(tokens, width), dy(tokens, width), dx(tokens, width);
    const auto xs = without_row(support::fill_normal(r, x.view()), bad, width);
    const auto dys = without_row(support::fill_normal(r, dy.view()), bad, width);
    for (int64_t d = 0; d < width; ++d) {
        if (all_columns || d == column) x.view()(bad, d) = support::narrow<T>(value);
        dy.view()(bad, d) = support::narrow<T>(value);
    }
    auto mask = support::upload(ex, std::vector<std::uint8_t>(tokens, 1));
    mask.data()[bad] = 0;
    const gate_options options{.mask = masked ? mask.view() : vector_view<std::uint8_t>{}};
    const auto saved = layer.forward(ex, x.view(), w.views, y.view(), options);
    layer.infer(ex, x.view(), w.views, again.view(), options);
    layer.backward(ex, saved, dy.view(), w.views, dx.view(), g.views, {.loss_scale = 0.5});
    ex.synchronize();

    auto ids = support::download(ex, saved.routing().experts);
    CHECK_EQ(ids[2 * bad], -1);
    CHECK_EQ(ids[2 * bad + 1], -1);
    ids.erase(ids.begin() + 2 * bad, ids.begin() + 2 * bad + 2);
    const std::vector<int> fixed(ids.begin(), ids.end());
    const auto out = oracle::forward(w.model, o, xs, tokens - 1, &fixed);
    const auto back = oracle::backward(w.model, o, xs, tokens - 1, out, dys, 0.5);
    const support::tolerance bound{.length = 300, .roundings = 8, .magnitude = 60};
    const auto near = [&](const oracle::numbers& found, const oracle::numbers& expected) {
        return support::close(support::narrowed<T>(found), expected, bound);
    };
    const auto others = [](auto& m) { return without_row(support::widened(m.view()), bad, width); };
    CHECK(near(others(y), out.y));
    CHECK(near(others(again), out.y));
    CHECK(near(others(dx), back.x));
    for (int64_t d = 0; d < width; ++d) {
        REQUIRE_EQ(double(y.view()(bad, d)), 0.0);
        REQUIRE_EQ(double(again.view()(bad, d)), 0.0);
        REQUIRE_EQ(double(dx.view()(bad, d)), 0.0);
    }
    CHECK(near(support::widened(g.gate.view()), back.gate));
    CHECK(near(support::widened(g.gate_bias.view()), back.gate_bias));
    CHECK(near(g.experts.up(), oracle::stacked(back.experts, &oracle::expert::up)));
    CHECK(near(g.experts.down(), oracle::stacked(back.experts, &oracle::expert::down)));
    CHECK(near(g.experts.up_bias(), oracle::stacked(back.experts, &oracle::expert::up_bias)));
    CHECK(near(g.experts.down_bias(), oracle::stacked(back.experts, &oracle::expert::down_bias)));
    const auto losses = support::download(ex, saved.losses());
    CHECK(std::fabs(double(losses[0]) - out.routing.balance_loss) < 1e-4);
    CHECK(std::fabs(double(losses[1]) - out.routing.z_loss) < 1e-4);
}

constexpr double infinite = std::numeric_limits<double>::infinity(), no_number = std::numeric_limits<double>::quiet_NaN();

} // namespace

TEST_CASE_TEMPLATE("a padding token may hold NaN and infinities: all else is that of the batch without it", Cell, FASTMOE_CELLS)
{
    FASTMOE_SEEDED(r, 81);
    for (const double value : {no_number, infinite, -infinite})
        for (const bool all_columns : {false, true}) {
            CAPTURE(value);
            CAPTURE(all_columns);
            compare<Cell>(r, value, all_columns, left_out::by_mask);
        }
}

TEST_CASE_TEMPLATE("a token without a finite or +Inf logit is left out of everything, without a mask too", Cell, FASTMOE_CELLS)
{
    FASTMOE_SEEDED(r, 82);
    for (const double value : {no_number, infinite, -infinite}) {
        CAPTURE(value);
        compare<Cell>(r, value, false, left_out::by_logits);
    }
    compare<Cell>(r, no_number, true, left_out::by_logits);
}

TEST_CASE_TEMPLATE("a token that is routed by a logit of +Inf spoils its own experts' gradients and no other token's values", Cell, FASTMOE_CELLS)
{
    using T = typename Cell::type;
    using Executor = typename Cell::executor;
    FASTMOE_SEEDED(r, 83);
    FASTMOE_EXECUTOR(ex, Cell);
    const expert_type expert{.width = width, .hidden = hidden, .biases = true};
    const moe_layer layer{top_k_gate<>{.experts = experts, .k = 2}, expert, self{}};
    support::layer_memory<T, expert_type, Executor> w(ex, r, expert, experts, oracle::activation::swiglu, true);
    support::gradient_memory<T, expert_type, Executor> g(ex, w.model);
    for (int64_t e = 0; e < experts; ++e) w.views.gate(e, 0) = T(e == 1 || e == 3 ? 1.0f : -1.0f);
    w.model.gate = support::widened(w.views.gate);
    support::guarded<T> x(tokens, width), y(tokens, width), dy(tokens, width), dx(tokens, width);
    const auto xs = without_row(support::fill_normal(r, x.view()), bad, width);
    const auto dys = without_row(support::fill_normal(r, dy.view()), bad, width);
    x.view()(bad, 0) = support::narrow<T>(infinite);
    const auto saved = layer.forward(ex, x.view(), w.views, y.view());
    layer.backward(ex, saved, dy.view(), w.views, dx.view(), g.views);
    ex.synchronize();
    auto ids = support::download(ex, saved.routing().experts);
    CHECK_EQ(ids[2 * bad], 1);
    CHECK_EQ(ids[2 * bad + 1], 3);
    ids.erase(ids.begin() + 2 * bad, ids.begin() + 2 * bad + 2);
    const std::vector<int> fixed(ids.begin(), ids.end());
    const oracle::options o{.k = 2};
    const auto out = oracle::forward(w.model, o, xs, tokens - 1, &fixed);
    const auto back = oracle::backward(w.model, o, xs, tokens - 1, out, dys);
    const support::tolerance bound{.length = 300, .roundings = 8, .magnitude = 60};
    CHECK(support::close(support::narrowed<T>(without_row(support::widened(y.view()), bad, width)), out.y, bound));
    CHECK(support::close(support::narrowed<T>(without_row(support::widened(dx.view()), bad, width)), back.x, bound));
    const auto up = g.experts.up(), down = g.experts.down();
    const int64_t matrix = 2 * hidden * width;
    for (const int64_t e : {0, 2}) { // not chosen by it
        const oracle::numbers here(up.begin() + e * matrix, up.begin() + (e + 1) * matrix);
        CHECK(support::close(support::narrowed<T>(here), back.experts[e].up, bound));
        const oracle::numbers there(down.begin() + e * matrix / 2, down.begin() + (e + 1) * matrix / 2);
        CHECK(support::close(support::narrowed<T>(there), back.experts[e].down, bound));
    }
}
