// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What a token may hold that takes no part, NaN and infinities: the layer computes what it does on the batch without it.
#include <doctest/doctest.h>

#include <limits>

#include "support/compare_layer.hpp"

using namespace fastmoe;
namespace oracle = support::reference;

namespace {

using expert_type = mlp<swiglu>;
constexpr int64_t tokens = 12, width = 10, hidden = 7, experts = 4, bad = 5; // token `bad` is the one

const expert_type expert{.width = width, .hidden = hidden, .biases = true};

/// A layer whose token `bad` may be changed before it runs; the others are judged by the oracle on the batch without it.
template <class Cell>
struct batch : compare_layer::run_of_layer<Cell, top_k_gate<>, expert_type, typename Cell::type> {
    using T = typename Cell::type;
    using base = compare_layer::run_of_layer<Cell, top_k_gate<>, expert_type, T>;
    std::vector<int64_t> others;
    oracle::numbers x, dy; // of the others

    batch(support::random& r, const top_k_gate<>& gate) : base(r, gate, expert, width, {.tokens = tokens, .gate_bias = true})
    {
        for (int64_t t = 0; t < tokens; ++t)
            if (t != bad) others.push_back(t);
        x = compare_layer::rows_of(this->x_values, others, width);
        dy = compare_layer::rows_of(this->dy_values, others, width);
    }
    /// Runs, and gives what came out and should have for the others, and the zeros of `bad`.
    compare_layer::outcome<T, T> run(const std::vector<int32_t>& bad_choices)
    {
        compare_layer::outcome<T, T> out;
        this->model.gate = support::widened(this->w.views.gate);
        (*this)([&](const auto& saved) {
            const auto ids = support::download(this->ex, saved.routing().experts);
            CHECK_EQ(std::vector<int32_t>(ids.begin() + 2 * bad, ids.begin() + 2 * bad + 2), bad_choices);
            const auto chosen = compare_layer::rows_of(std::vector<int>(ids.begin(), ids.end()), others, 2);
            const support::expected_routing<T> route(compare_layer::options_of(this->layer.gate, tokens),
                                                     support::expected_logits<T>(this->model, x, tokens - 1), tokens - 1, experts,
                                                     chosen, std::vector<bool>(chosen.size(), true));
            out = this->results(support::expect_layer<T>(this->model, x, route, dy, this->s.loss_scale), others);
            out.complaints = {route.complaint()};
            out.scalars = {{"losses", support::download(this->ex, saved.losses()), {route.balance_loss, route.z_loss}}};
        });
        return out;
    }
};

enum class left_out { by_mask, by_logits };

/// A step with a token that holds `value`, in one column or in all, compared with the oracle on the other tokens.
template <class Cell>
void compare(support::random& r, double value, bool all_columns, left_out how)
{
    using T = typename Cell::type;
    const bool masked = how == left_out::by_mask;
    // Without a mask the token counts in the means of the losses, so there are none.
    batch<Cell> b(r, {.experts = experts, .k = 2, .balance = {masked ? 0.1 : 0}, .z = {masked ? 0.02 : 0}});
    const int64_t column = r.integer(0, width - 1);
    if (!masked && !std::isnan(value)) // every logit of the token becomes -Inf
        for (int64_t e = 0; e < experts; ++e) {
            T& at = b.w.views.gate(e, column);
            at = T((value > 0 ? -1 : 1) * std::fabs(float(at)));
        }
    for (int64_t d = 0; d < width; ++d) {
        if (all_columns || d == column) b.base::x.view()(bad, d) = support::narrow<T>(value);
        b.base::dy.view()(bad, d) = support::narrow<T>(value);
    }
    if (masked) b.mask.assign(tokens, 1), b.mask[bad] = 0;
    check(b.run({-1, -1}));
}

constexpr double infinite = std::numeric_limits<double>::infinity(), no_number = std::numeric_limits<double>::quiet_NaN();

} // namespace

TEST_CASE_TEMPLATE("a padding token may hold NaN and infinities: all else is that of the batch without it", Cell, FASTMOE_CELLS)
{
    FASTMOE_NEEDS(Cell);
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
    FASTMOE_NEEDS(Cell);
    FASTMOE_SEEDED(r, 82);
    for (const double value : {no_number, infinite, -infinite}) {
        CAPTURE(value);
        compare<Cell>(r, value, false, left_out::by_logits);
    }
    compare<Cell>(r, no_number, true, left_out::by_logits);
}

TEST_CASE_TEMPLATE("a token that is routed by a logit of +Inf spoils its own experts' gradients and no other token's values", Cell, FASTMOE_CELLS)
{
    FASTMOE_NEEDS(Cell);
    using T = typename Cell::type;
    FASTMOE_SEEDED(r, 83);
    batch<Cell> b(r, {.experts = experts, .k = 2});
    for (int64_t e = 0; e < experts; ++e) b.w.views.gate(e, 0) = T(e == 1 || e == 3 ? 1.0f : -1.0f);
    b.base::x.view()(bad, 0) = support::narrow<T>(infinite);
    auto out = b.run({1, 3});
    for (auto& result : out.tensors) // what the token itself gets is not asked
        for (int64_t d = 0; d < width; ++d) result.found[bad * width + d] = support::narrow<T>(0);
    for (auto& result : out.gradients) {
        const auto elements = int64_t(result.found.size()), each = elements / experts;
        const bool of_experts = std::string(result.name).find("router") == std::string::npos;
        for (int64_t i = 0; i < elements; ++i) // those of experts 1 and 3 and of the router see the token
            if (!of_experts || i / each % 2 == 1) result.expected[i] = double(result.found[i] = support::narrow<T>(0));
    }
    check(out);
}
