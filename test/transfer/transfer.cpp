// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <fastmoe/transfer/combine.hpp>
#include <fastmoe/transfer/dispatch.hpp>

#include "support/bounded.hpp"
#include "support/poison.hpp"
#include "support/routed.hpp"
#include "support/warps.hpp"

using namespace fastmoe;
using support::widened;

namespace {

template <class Cell>
typename support::routed<typename Cell::executor, typename Cell::type>::shape random_shape(support::random& r)
{
    const int64_t experts = r.integer(1, 20);
    return {r.one_of<int64_t>(0, 1, 5, r.integer(2, 300)), experts, r.integer(1, experts), r.coin(),
            r.one_of<int64_t>(1, 1, 16)};
}

double inner(const std::vector<double>& a, const std::vector<double>& b)
{
    double sum = 0;
    for (std::size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
    return sum;
}

} // namespace

TEST_CASE_TEMPLATE("dispatch copies each token to its slots, exactly, and zeros the padding", Cell, FASTMOE_CELLS_AND_WARPS)
{
    using T = typename Cell::type;
    FASTMOE_SEEDED(r, 21);
    FASTMOE_EXECUTOR(ex, Cell);
    for (int round = 0; round < 15; ++round) {
        const auto shape = random_shape<Cell>(r);
        const int64_t width = r.integer(1, 150);
        support::routed<typename Cell::executor, T> in(ex, r, shape);
        support::guarded<T> x(shape.tokens, width, 1), rows(in.plan.slots, width, 1);
        support::fill_normal(r, x.view());
        dispatch(ex, x.view(), in.plan, rows.view());
        ex.synchronize();
        bool same = true;
        for (int64_t s = 0; s < in.plan.slots; ++s)
            for (int64_t d = 0; d < width; ++d) {
                const int64_t t = in.plan.token_of(s);
                same = same && double(rows.view()(s, d)) == (t < 0 ? 0.0 : double(x.view()(t, d)));
            }
        CHECK(same);
        CHECK(rows.damage() == "");
    }
}

TEST_CASE_TEMPLATE("combine sums the weighted rows of each token", Cell, FASTMOE_CELLS_AND_WARPS)
{
    using T = typename Cell::type;
    FASTMOE_SEEDED(r, 22);
    FASTMOE_EXECUTOR(ex, Cell);
    for (int round = 0; round < 15; ++round) {
        const auto shape = random_shape<Cell>(r);
        const int64_t width = r.integer(1, 150);
        support::routed<typename Cell::executor, T> in(ex, r, shape);
        support::guarded<T> rows(in.plan.slots, width, 1), y(shape.tokens, width, 1);
        support::fill_normal(r, rows.view());
        std::vector<double> expected(shape.tokens * width), magnitude(shape.tokens * width);
        for (int64_t t = 0; t < shape.tokens; ++t)
            for (int64_t c = in.first()[t]; c < in.first()[t + 1]; ++c) {
                const int64_t s = in.plan.slot_of(c);
                for (int64_t d = 0; s >= 0 && d < width; ++d) {
                    const double term = double(in.weights()[c]) * double(rows.view()(s, d));
                    expected[t * width + d] += term;
                    magnitude[t * width + d] += std::fabs(term);
                }
            }
        // Padding rows may hold anything.
        for (int64_t s = 0; s < in.plan.slots; ++s)
            for (int64_t d = 0; d < width; ++d)
                if (in.plan.choice_of(s) < 0) rows.view()(s, d) = T(NAN);
        combine(ex, rows.view(), in.route, in.plan, y.view());
        ex.synchronize();
        const support::tolerance bound{.length = 2.0 * double(shape.k), .magnitudes = &magnitude};
        CHECK(support::close(y.view(), expected, bound));
        CHECK(y.damage() == "");

        // Adding to what is there; into fp32, as partial sums of ranks are kept.
        using real = accumulate_t<T>;
        support::guarded<real> wide(shape.tokens, width);
        for (int64_t i = 0; i < shape.tokens * width; ++i) wide.data()[i] = real(0.5), expected[i] += 0.5, magnitude[i] += 0.5;
        combine(ex, rows.view(), in.route, in.plan, wide.view(), write_mode::accumulate);
        ex.synchronize();
        CHECK(support::close(wide.view(), expected, bound));
    }
}

TEST_CASE_TEMPLATE("dispatch with weights multiplies each row by its weight and rounds once", Cell, FASTMOE_CELLS_AND_WARPS)
{
    using T = typename Cell::type;
    using real = accumulate_t<T>;
    FASTMOE_SEEDED(r, 27);
    FASTMOE_EXECUTOR(ex, Cell);
    for (int round = 0; round < 8; ++round) {
        const auto shape = random_shape<Cell>(r);
        const int64_t width = r.integer(1, 100);
        support::routed<typename Cell::executor, T> in(ex, r, shape);
        support::guarded<T> x(shape.tokens, width, 1), rows(in.plan.slots, width, 1);
        support::fill_normal(r, x.view());
        dispatch(ex, x.view(), in.route.weights, in.plan, rows.view());
        ex.synchronize();
        std::vector<support::bounded<real>> expected;
        for (int64_t s = 0; s < in.plan.slots; ++s)
            for (int64_t d = 0; d < width; ++d) {
                const int64_t c = in.plan.choice_of(s);
                using number = support::bounded<real>;
                expected.push_back(c < 0 ? number(0) : number(double(in.weights()[c])) * number(double(x.view()(in.plan.token_of(s), d))));
            }
        CHECK(support::within(rows.view(), expected));
        CHECK(rows.damage() == "");
    }
}

TEST_CASE_TEMPLATE("dispatch and combine are each other's adjoint, with weights and without", Cell, FASTMOE_CELLS_AND_WARPS)
{
    using T = typename Cell::type;
    using real = accumulate_t<T>;
    FASTMOE_SEEDED(r, 23);
    FASTMOE_EXECUTOR(ex, Cell);
    // Small integers, and quarters for weights: no operation rounds in any dtype, so that both sides are the same number.
    const auto integers = [&](auto view) {
        for (int64_t i = 0; i < support::size_of(view); ++i) view.data_handle()[i] = support::narrow<T>(double(r.integer(-4, 4)));
    };
    for (int round = 0; round < 8; ++round) {
        const auto shape = random_shape<Cell>(r);
        const int64_t width = r.integer(1, 100);
        support::routed<typename Cell::executor, T> in(ex, r, shape);
        for (int64_t c = 0; c < in.route.choices(); ++c)
            if (in.ids()[c] >= 0) in.route.weights(c) = real(0.25 * double(r.integer(1, 4)));
        support::guarded<T> x(shape.tokens, width), dispatched(in.plan.slots, width), rows(in.plan.slots, width);
        support::guarded<real> combined(shape.tokens, width);
        integers(x.view());
        integers(rows.view());
        // <combine(rows), x> = <rows, dispatch(x)>
        const auto sides = [&] {
            ex.synchronize();
            return std::pair(inner(widened(combined.view()), widened(x.view())), inner(widened(rows.view()), widened(dispatched.view())));
        };
        combine_unweighted(ex, rows.view(), in.route, in.plan, combined.view());
        dispatch(ex, x.view(), in.plan, dispatched.view());
        const auto [left, right] = sides();
        CHECK(left == right);
        combine(ex, rows.view(), in.route, in.plan, combined.view());
        dispatch(ex, x.view(), in.route.weights, in.plan, dispatched.view());
        const auto [weighted_left, weighted_right] = sides();
        CHECK(weighted_left == weighted_right);
    }
}

TEST_CASE_TEMPLATE("the gradient of a weight is the product of its row with the token's gradient", Cell, FASTMOE_CELLS_AND_WARPS)
{
    using T = typename Cell::type;
    using real = accumulate_t<T>;
    FASTMOE_SEEDED(r, 24);
    FASTMOE_EXECUTOR(ex, Cell);
    for (int round = 0; round < 10; ++round) {
        const auto shape = random_shape<Cell>(r);
        const int64_t width = r.integer(1, 200);
        support::routed<typename Cell::executor, T> in(ex, r, shape);
        support::guarded<T> dy(shape.tokens, width), rows(in.plan.slots, width);
        support::guarded<real> dweights(in.route.choices());
        support::fill_normal(r, dy.view());
        support::fill_normal(r, rows.view());
        combine_weights_backward(ex, dy.view(), rows.view(), in.route, in.plan, dweights.vector());
        ex.synchronize();
        std::vector<double> expected(in.route.choices()), magnitude(in.route.choices());
        for (int64_t s = 0; s < in.plan.slots; ++s)
            for (int64_t d = 0; in.plan.choice_of(s) >= 0 && d < width; ++d) {
                const double term = double(dy.view()(in.plan.token_of(s), d)) * double(rows.view()(s, d));
                expected[in.plan.choice_of(s)] += term;
                magnitude[in.plan.choice_of(s)] += std::fabs(term);
            }
        CHECK(support::close(dweights.vector(), expected, {.length = double(width), .magnitudes = &magnitude}));
        CHECK(dweights.damage() == "");
    }
}

TEST_CASE("dispatch and combine give the same bits for 1, 2 and 4 threads")
{
    std::vector<float> results[3];
    int at = 0;
    for (const int threads : {1, 2, 4}) {
        host_executor ex({.threads = threads});
        FASTMOE_SEEDED(r, 25);
        support::routed<host_executor, float> in(ex, r, {.tokens = 3000, .experts = 16, .k = 4});
        support::guarded<float> x(3000, 96), rows(in.plan.slots, 96), y(3000, 96);
        support::fill_normal(r, x.view());
        dispatch(ex, x.view(), in.plan, rows.view());
        combine(ex, rows.view(), in.route, in.plan, y.view());
        results[at++] = support::download(ex, y.view());
    }
    CHECK(support::same_bits(results[1], results[0]));
    CHECK(support::same_bits(results[2], results[0]));
}

TEST_CASE("views that do not fit the plan are refused by name")
{
    host_executor ex({.threads = 1});
    FASTMOE_SEEDED(r, 26);
    support::routed<host_executor, float> in(ex, r, {.tokens = 8, .experts = 4, .k = 2});
    support::guarded<float> x(8, 6), rows(in.plan.slots, 6), narrow(8, 5), few(7, 6);
    const auto text = [&](auto f) { return support::message_of<invalid_argument>(f); };
    CHECK(support::has(text([&] { dispatch(ex, few.view(), in.plan, rows.view()); }), "x (T,D) is of shape (7,6); expected (8,6)"));
    CHECK(support::has(text([&] { dispatch(ex, x.view(), in.plan, x.view()); }), "rows (S,D) is of shape (8,6); expected (16,6)"));
    CHECK(support::has(text([&] { combine(ex, rows.view(), in.route, in.plan, narrow.view()); }), "(S,D)"));
    CHECK(support::has(text([&] { combine(ex, rows.view(), in.route, in.plan, few.view()); }), "y (T,D) is of shape (7,6); expected (8,6)"));
    auto wrong = in.route;
    wrong.tokens = 9;
    CHECK_THROWS_AS(combine(ex, rows.view(), wrong, in.plan, x.view()), invalid_argument);
    const matrix_view<float> skewed(reinterpret_cast<float*>(reinterpret_cast<char*>(x.data()) + 1), 8, 6);
    CHECK(support::has(text([&] { dispatch(ex, skewed, in.plan, rows.view()); }), "aligned to 4 bytes"));
    CHECK(support::has(text([&] { (void)gathered(few.view(), in.plan); }), "x (T,D) is 7; expected the plan's T = 8"));
    // A plan whose arrays are shorter than it says would be read out of bounds.
    plan cut = in.plan;
    cut.token_of = slice(cut.token_of, 0, 15);
    CHECK(support::has(text([&] { dispatch(ex, x.view(), cut, rows.view()); }), "plan.token_of (S) is of shape (15); expected (16)"));
    CHECK(support::has(text([&] { dispatch(ex, x.view(), in.route.weights, cut, rows.view()); }), "plan.token_of (S) is of shape (15)"));
    CHECK(support::has(text([&] { (void)gathered(x.view(), cut); }), "plan.token_of (S) is 15; expected S = 16"));
    cut = in.plan;
    cut.choice_of = slice(cut.choice_of, 0, 15);
    CHECK(support::has(text([&] { dispatch(ex, x.view(), in.route.weights, cut, rows.view()); }), "plan.choice_of (S) is of shape (15)"));
    // Rows that lie over the tokens would be read after they were written.
    support::guarded<float> both(24, 6);
    const matrix_view<float> of_tokens(both.data(), 8, 6), of_rows(both.data() + 6 * 7, 16, 6), behind(both.data() + 6 * 8, 16, 6);
    CHECK(support::has(text([&] { dispatch(ex, of_tokens, in.plan, of_rows); }), "rows (S,D) is memory that is shared; expected none in common with x"));
    CHECK(support::has(text([&] { dispatch(ex, of_tokens, in.route.weights, in.plan, of_rows); }), "rows (S,D) is memory that is shared"));
    CHECK(support::has(text([&] { combine(ex, of_rows, in.route, in.plan, of_tokens); }), "y (T,D) is memory that is shared; expected none in common with rows"));
    CHECK(support::has(text([&] { combine_unweighted(ex, of_rows, in.route, in.plan, of_tokens); }), "y (T,D) is memory that is shared"));
    CHECK(support::poisoned(both.view()) == 24 * 6);
    for (int64_t i = 0; i < 8 * 6; ++i) both.data()[i] = 1;
    CHECK_NOTHROW(dispatch(ex, of_tokens, in.plan, behind));
    CHECK(support::poisoned(rows.view()) == 16 * 6);
    CHECK(gathered(matrix_view<const float>(x.view()), in.plan).row(0) == x.data() + 6 * in.plan.token_of(0));
}
