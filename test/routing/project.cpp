// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include <fastmoe/routing/project.hpp>

#include "support/exact_scratch.hpp"
#include "support/compare.hpp"
#include "support/executors.hpp"
#include "support/poison.hpp"

namespace fm = fastmoe;
using fm::int64_t;

namespace {

using numbers = std::vector<double>;

/// What a product should be, and the sum of its absolute terms, which its error is relative to.
struct sums {
    numbers value, magnitude;
};

/// c (m,n) = start + sum_k a(i,k) b(k,j), with a and b as functions.
template <class A, class B>
sums product(int64_t m, int64_t n, int64_t depth, const A& a, const B& b, const numbers& start)
{
    sums out{start, start};
    for (double& v : out.magnitude) v = std::fabs(v);
    for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j)
            for (int64_t k = 0; k < depth; ++k) {
                out.value[i * n + j] += a(i, k) * b(k, j);
                out.magnitude[i * n + j] += std::fabs(a(i, k) * b(k, j));
            }
    return out;
}

} // namespace

TEST_CASE_TEMPLATE("logits are x W^T + b in the accumulator's precision, whatever the type of x", Cell, FASTMOE_CELLS)
{
    using T = typename Cell::type;
    using real = fm::accumulate_t<T>;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 41);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int i = 0; i < (small ? 4 : 12); ++i) {
        const int64_t tokens = rng.integer(0, small ? 12 : 130), width = rng.integer(1, 70), experts = rng.integer(1, 40);
        CAPTURE(tokens);
        CAPTURE(width);
        CAPTURE(experts);
        const bool with_bias = rng.coin();
        const auto x = support::normal_vector<T>(rng, tokens * width), w = support::normal_vector<T>(rng, experts * width),
                   b = support::normal_vector<T>(rng, experts);
        const auto in_x = support::upload(ex, x), in_w = support::upload(ex, w), in_b = support::upload(ex, b);
        support::guarded<real> logits(tokens, experts);
        support::with_exact_scratch(ex, [&](fm::arena& scratch) {
            fm::project(ex, fm::matrix_view<const T>(in_x.data(), tokens, width),
                        fm::matrix_view<const T>(in_w.data(), experts, width),
                        fm::vector_view<const T>(with_bias ? in_b.data() : nullptr, with_bias ? experts : 0), logits.view(), scratch);
        });
        numbers start(tokens * experts, 0.0);
        for (std::size_t c = 0; with_bias && c < start.size(); ++c) start[c] = double(b[c % experts]);
        const auto expected = product(
            tokens, experts, width, [&](int64_t t, int64_t d) { return double(x[t * width + d]); },
            [&](int64_t d, int64_t e) { return double(w[e * width + d]); }, start);
        CHECK(support::close(logits.view(), expected.value, {.length = double(width) + 2, .magnitudes = &expected.magnitude}));
        CHECK_EQ(logits.damage(), "");
    }
}

TEST_CASE_TEMPLATE("the input's gradient is dlogits W, written or added", Cell, FASTMOE_CELLS)
{
    using T = typename Cell::type;
    using real = fm::accumulate_t<T>;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 42);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int64_t tokens : {0, 1, 9, small ? 5 : 1024, small ? 6 : 2500}) // over one block of rows and its edge
        for (auto mode : {fm::write_mode::overwrite, fm::write_mode::accumulate}) {
            const int64_t width = rng.integer(1, 40), experts = rng.integer(1, 12);
            CAPTURE(tokens);
            const auto w = support::normal_vector<T>(rng, experts * width);
            const auto dlogits = support::normal_vector<real>(rng, tokens * experts);
            const auto in_w = support::upload(ex, w);
            const auto in_d = support::upload(ex, dlogits);
            const auto before = support::normal_vector<T>(rng, tokens * width);
            support::guarded<T> dx(tokens, width);
            if (mode == fm::write_mode::accumulate) support::fill(dx.view(), support::widened(before));
            support::with_exact_scratch(ex, [&](fm::arena& scratch) { // ends with a refused call, which must write nothing
                fm::project_input_backward(ex, fm::matrix_view<const real>(in_d.data(), tokens, experts),
                                           fm::matrix_view<const T>(in_w.data(), experts, width), dx.view(), mode, scratch);
            });
            const auto start = mode == fm::write_mode::accumulate ? support::widened(before) : numbers(tokens * width, 0.0);
            const auto expected = product(
                tokens, width, experts, [&](int64_t t, int64_t e) { return double(dlogits[t * experts + e]); },
                [&](int64_t e, int64_t d) { return double(w[e * width + d]); }, start);
            CHECK(support::close(dx.view(), expected.value, {.length = double(experts) + 3, .magnitudes = &expected.magnitude}));
            CHECK_EQ(dx.damage(), "");
        }
}

TEST_CASE_TEMPLATE("the weights' gradient is dlogits^T x, the bias's its sum; no token gives exact zeros", Cell, FASTMOE_CELLS)
{
    using T = typename Cell::type;
    using real = fm::accumulate_t<T>;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 43);
    const bool small = support::takes_turns<typename Cell::executor>;
    for (int64_t tokens : {0, 1, 17, small ? 20 : 700})
        for (auto mode : {fm::write_mode::overwrite, fm::write_mode::accumulate})
            for (bool with_bias : {true, false}) {
                const int64_t width = rng.integer(1, 40), experts = rng.integer(1, 30);
                CAPTURE(tokens);
                const auto x = support::normal_vector<T>(rng, tokens * width);
                const auto dlogits = support::normal_vector<real>(rng, tokens * experts);
                const auto in_x = support::upload(ex, x);
                const auto in_d = support::upload(ex, dlogits);
                support::guarded<real> dw(experts, width), db(experts);
                const bool adds = mode == fm::write_mode::accumulate;
                const auto start_w = rng.normals(experts * width), start_b = rng.normals(experts);
                numbers from_w(experts * width, 0.0), from_b(experts, 0.0);
                if (adds) from_w = support::fill(dw.view(), start_w), from_b = support::fill(db.vector(), start_b);
                support::with_exact_scratch(ex, [&](fm::arena& scratch) {
                    fm::project_weights_backward(ex, fm::matrix_view<const real>(in_d.data(), tokens, experts),
                                                 fm::matrix_view<const T>(in_x.data(), tokens, width), dw.view(),
                                                 with_bias ? db.vector() : fm::vector_view<real>{}, mode, scratch);
                });
                const auto d = [&](int64_t e, int64_t t) { return double(dlogits[t * experts + e]); };
                const auto w = product(
                    experts, width, tokens, d, [&](int64_t t, int64_t i) { return double(x[t * width + i]); }, from_w);
                const auto b = product(
                    experts, 1, tokens, d, [](int64_t, int64_t) { return 1.0; }, from_b);
                CHECK(support::close(dw.view(), w.value, {.length = double(tokens) + 2, .magnitudes = &w.magnitude}));
                if (with_bias)
                    CHECK(support::close(db.vector(), b.value, {.length = double(tokens) + 2, .magnitudes = &b.magnitude}));
                else if (!adds) CHECK_EQ(support::poisoned(db.vector()), experts);
                CHECK_EQ(dw.damage() + db.damage(), "");
            }
}

TEST_CASE("a float router serves bfloat16 tokens, and bfloat16 gradients accumulate in float")
{
    fm::host_executor ex({.threads = 2});
    FASTMOE_SEEDED(rng, 44);
    const int64_t tokens = 33, width = 48, experts = 9;
    const auto x = support::normal_vector<fm::bfloat16>(rng, tokens * width);
    const auto w = support::normal_vector<float>(rng, experts * width);
    std::vector<float> logits(tokens * experts);
    fm::buffer<std::byte, fm::host_executor> lent(ex, 1 << 20);
    fm::arena scratch(lent.view());
    fm::project(ex, fm::as_matrix(x, tokens, width), fm::as_matrix(w, experts, width), fm::vector_view<const float>{},
                fm::as_matrix(logits, tokens, experts), scratch);
    const auto expected = product(
        tokens, experts, width, [&](int64_t t, int64_t d) { return double(x[t * width + d]); },
        [&](int64_t d, int64_t e) { return double(w[e * width + d]); }, numbers(tokens * experts, 0.0));
    CHECK(support::close(logits, expected.value, {.length = double(width), .magnitudes = &expected.magnitude}));
}

TEST_CASE("the projection has the same bits for any number of threads")
{
    FASTMOE_SEEDED(rng, 45);
    const int64_t tokens = 700, width = 96, experts = 20;
    const auto x = support::normal_vector<float>(rng, tokens * width), w = support::normal_vector<float>(rng, experts * width),
               d = support::normal_vector<float>(rng, tokens * experts);
    const auto all = [&](int threads) {
        fm::host_executor ex({.threads = threads});
        fm::buffer<std::byte, fm::host_executor> lent(ex, 8 << 20);
        fm::arena scratch(lent.view());
        std::vector<float> out(tokens * experts + tokens * width + experts * width + experts);
        const fm::matrix_view<float> logits(out.data(), tokens, experts), dx(out.data() + tokens * experts, tokens, width),
            dw(dx.data_handle() + tokens * width, experts, width);
        const fm::vector_view<float> db(dw.data_handle() + experts * width, experts);
        const auto in_x = fm::as_matrix(x, tokens, width), in_w = fm::as_matrix(w, experts, width),
                   in_d = fm::as_matrix(d, tokens, experts);
        fm::project(ex, in_x, in_w, fm::vector_view<const float>{}, logits, scratch);
        fm::project_input_backward(ex, in_d, in_w, dx, fm::write_mode::accumulate, scratch);
        fm::project_weights_backward(ex, in_d, in_x, dw, db, fm::write_mode::overwrite, scratch);
        return out;
    };
    const auto expected = all(1);
    CHECK(support::same_bits(all(2), expected));
    CHECK(support::same_bits(all(4), expected));
}

TEST_CASE("the projection refuses shapes that disagree, by name")
{
    fm::host_executor ex({.threads = 1});
    std::vector<float> x(6), w(6), b(2), logits(6);
    fm::buffer<std::byte, fm::host_executor> lent(ex, 1 << 20);
    fm::arena scratch(lent.view());
    const auto refused = [&](const auto& call, const char* text) {
        try {
            call();
        } catch (const fm::invalid_argument& e) {
            INFO(e.what());
            CHECK(std::string(e.what()).find(text) != std::string::npos);
            return;
        }
        FAIL("was accepted");
    };
    const auto tokens = fm::as_matrix(x, 3, 2), gate = fm::as_matrix(w, 2, 3), square = fm::as_matrix(w, 3, 2);
    const auto out = fm::as_matrix(logits, 3, 2);
    const fm::vector_view<float> none;
    refused([&] { fm::project(ex, tokens, gate, none, out, scratch); }, "gate (E,D) is of shape (2,3); expected (2,2)");
    refused([&] { fm::project(ex, tokens, square, none, out, scratch); }, "logits (T,E) is of shape (3,2); expected (3,3)");
    refused([&] { fm::project(ex, tokens, fm::matrix_view<float>(w.data(), 2, 2), fm::vector_view<float>(b.data(), 1), out, scratch); },
            "gate bias (E) is of shape (1); expected (2)");
    refused([&] { fm::project_input_backward(ex, out, square, tokens, fm::write_mode::overwrite, scratch); },
            "dlogits (T,E) is of shape (3,2); expected (3,3)");
    refused([&] { fm::project_weights_backward(ex, out, tokens, square, none, fm::write_mode::overwrite, scratch); },
            "dlogits (T,E) is of shape (3,2); expected (3,3)");
}

TEST_CASE_TEMPLATE("jitter multiplies: zero stays zero, and the factor lies in [1 - eps, 1 + eps) with mean 1", Cell, FASTMOE_CELLS)
{
    using T = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    const bool small = support::takes_turns<typename Cell::executor>;
    const int64_t tokens = small ? 50 : 500, width = 64, n = tokens * width;
    const std::vector<std::uint64_t> random{5, 9}, next_step{5, 10}; // a GPU does not reach the stack
    std::vector<T> x, y(n), again(n), later(n), tail(n / 2);
    for (int64_t i = 0; i < n; ++i) x.push_back(support::narrow<T>(i % 3 == 0 ? 0.0 : i % 3 == 1 ? 1.0 : -256.0));
    const double eps = 0.25;
    const auto jitter = [&](const std::vector<T>& from, const std::vector<std::uint64_t>& r, std::vector<T>& to, int64_t first) {
        const int64_t rows = static_cast<int64_t>(to.size()) / width;
        fm::jitter(ex, fm::matrix_view<const T>(from.data(), rows, width), r.data(), eps, fm::as_matrix(to, rows, width), first);
        ex.synchronize();
    };
    jitter(x, random, y, 0);
    double sum = 0, count = 0;
    for (int64_t i = 0; i < n; ++i) {
        const double from = double(x[i]), factor = from == 0 ? 1 : double(y[i]) / from;
        if (from == 0) REQUIRE_EQ(double(y[i]), 0.0);
        REQUIRE(factor >= 1 - eps);
        REQUIRE(factor <= 1 + eps); // rounding may reach the end
        if (from != 0) sum += factor, ++count;
    }
    CHECK(std::fabs(sum / count - 1) < 5 * eps / std::sqrt(3 * count));
    // The same step draws the same: on another executor, in place, and on a rank that holds the second half.
    again = x;
    fm::host_executor host({.threads = 2});
    fm::jitter(host, fm::as_matrix(again, tokens, width), random.data(), eps, fm::as_matrix(again, tokens, width));
    CHECK(support::same_bits(again, y));
    jitter(std::vector<T>(x.begin() + n / 2, x.end()), random, tail, tokens / 2);
    CHECK(support::same_bits(tail, std::vector<T>(y.begin() + n / 2, y.end())));
    jitter(x, next_step, later, 0);
    CHECK_FALSE(support::same_bits(later, y));
    CHECK_THROWS_AS(fm::jitter(host, fm::as_matrix(x, tokens, width), random.data(), 1.0, fm::as_matrix(y, tokens, width)),
                    fm::invalid_argument);
    CHECK_THROWS_AS(fm::jitter(host, fm::as_matrix(x, tokens, width), nullptr, 0.1, fm::as_matrix(y, tokens, width)),
                    fm::invalid_argument);
}
