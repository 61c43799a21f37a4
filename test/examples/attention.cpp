// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Attention against the (L,L) matrix written out in double, and its gradient against finite differences.
#include <cmath>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/exec/host_executor.hpp>

#include "support/finite_difference.hpp"
#include "support/lanes.hpp"
#include "support/random.hpp"
#include "train_gpt/attention.hpp"

namespace {

using namespace train_gpt;

/// softmax(q k^T / sqrt(h)) v with loops, for qkv (T,3D).
std::vector<double> oracle(attention_shape s, const std::vector<double>& qkv)
{
    const auto at = [&](std::int64_t b, std::int64_t i, std::int64_t which, std::int64_t n, std::int64_t d) {
        return qkv[static_cast<std::size_t>(((b * s.length + i) * 3 + which) * s.width() + n * s.head + d)];
    };
    std::vector<double> y(static_cast<std::size_t>(s.tokens() * s.width()));
    for (std::int64_t b = 0; b < s.batch; ++b)
        for (std::int64_t n = 0; n < s.heads; ++n)
            for (std::int64_t i = 0; i < s.length; ++i) {
                std::vector<double> p;
                double total = 0;
                for (std::int64_t j = 0; j <= i; ++j) {
                    double score = 0;
                    for (std::int64_t d = 0; d < s.head; ++d) score += at(b, i, 0, n, d) * at(b, j, 1, n, d);
                    p.push_back(std::exp(score / std::sqrt(double(s.head))));
                    total += p.back();
                }
                for (std::int64_t d = 0; d < s.head; ++d) {
                    double sum = 0;
                    for (std::int64_t j = 0; j <= i; ++j)
                        sum += p[static_cast<std::size_t>(j)] / total * at(b, j, 2, n, d);
                    y[static_cast<std::size_t>((b * s.length + i) * s.width() + n * s.head + d)] = sum;
                }
            }
    return y;
}

template <class T>
struct run {
    std::vector<T> y, dqkv;
};

/// Forward and backward with poisoned outputs and scratch of exactly the size that was measured.
template <class T, class Executor>
run<T> attend(Executor& ex, attention_shape s, const std::vector<T>& qkv, const std::vector<T>& dy)
{
    using Real = accumulate_t<T>;
    run<T> out{std::vector<T>(dy.size(), T(NAN)), std::vector<T>(qkv.size(), T(NAN))};
    const auto in = fm::as_matrix(qkv, s.tokens(), 3 * s.width());
    const auto y = fm::as_matrix(out.y, s.tokens(), s.width());
    const auto body = [&](fm::arena& memory) {
        const auto saved = reserve_attention<Real>(memory, s);
        if (!memory.measuring()) attention<T>(ex, s, in, y, saved);
        attention_backward<T>(ex, s, in, y, fm::as_matrix(dy, s.tokens(), s.width()), saved,
                              fm::as_matrix(out.dqkv, s.tokens(), 3 * s.width()), memory);
    };
    fm::arena measure;
    body(measure);
    fm::buffer<std::byte, Executor> storage(ex, measure.bytes());
    for (std::int64_t i = 0; i < storage.size(); ++i) storage.data()[i] = std::byte{0xff};
    fm::arena memory(storage.view());
    body(memory);
    return out;
}

template <class T>
std::vector<T> rounded(const std::vector<double>& x)
{
    std::vector<T> out;
    for (const double v : x) out.push_back(T(static_cast<accumulate_t<T>>(v)));
    return out;
}

} // namespace

TEST_CASE_TEMPLATE("attention in double is softmax(q k^T / sqrt(h)) v over the keys up to the query", Executor,
                   fm::host_executor, support::lanes)
{
    FASTMOE_SEEDED(draw, 101);
    Executor ex;
    for (const attention_shape s : {attention_shape{1, 1, 1, 1}, attention_shape{2, 5, 3, 7},
                                    attention_shape{3, 33, 2, 16}, attention_shape{1, 70, 1, 40}}) {
        CAPTURE(s.length);
        CAPTURE(s.head);
        const auto qkv = draw.normals(s.tokens() * 3 * s.width());
        const auto dy = draw.normals(s.tokens() * s.width());
        const auto expected = oracle(s, qkv);
        const auto got = attend<double>(ex, s, qkv, dy);
        for (std::size_t i = 0; i < expected.size(); ++i) CHECK(std::abs(got.y[i] - expected[i]) < 1e-13);
    }
}

TEST_CASE_TEMPLATE("the gradient of attention is what finite differences of the oracle give", Executor,
                   fm::host_executor, support::lanes)
{
    FASTMOE_SEEDED(draw, 102);
    Executor ex;
    for (const attention_shape s :
         {attention_shape{1, 1, 1, 1}, attention_shape{2, 11, 2, 5}, attention_shape{1, 18, 1, 9}}) {
        CAPTURE(s.length);
        auto qkv = draw.normals(s.tokens() * 3 * s.width());
        const auto dy = draw.normals(s.tokens() * s.width());
        const auto got = attend<double>(ex, s, qkv, dy);
        const auto expected = support::finite_difference(
            [&] {
                const auto y = oracle(s, qkv);
                double loss = 0;
                for (std::size_t i = 0; i < y.size(); ++i) loss += y[i] * dy[i];
                return loss;
            },
            qkv);
        for (std::size_t i = 0; i < expected.size(); ++i) CHECK(std::abs(got.dqkv[i] - expected[i]) < 1e-9);
    }
}

TEST_CASE_TEMPLATE("attention in a short type stays within its rounding of double", T, float, fm::bfloat16)
{
    FASTMOE_SEEDED(draw, 103);
    fm::host_executor ex;
    const attention_shape s{2, 65, 2, 32};
    const auto qkv = rounded<T>(draw.normals(s.tokens() * 3 * s.width()));
    const auto dy = rounded<T>(draw.normals(s.tokens() * s.width()));
    const auto got = attend<T>(ex, s, qkv, dy);
    const auto wide = attend<double>(ex, s, {qkv.begin(), qkv.end()}, {dy.begin(), dy.end()});
    const double unit = std::is_same_v<T, float> ? 1e-6 : 4e-3;
    for (std::size_t i = 0; i < wide.y.size(); ++i) CHECK(std::abs(double(got.y[i]) - wide.y[i]) < 2 * unit);
    double largest = 0;
    for (const double v : wide.dqkv) largest = std::max(largest, std::abs(v));
    for (std::size_t i = 0; i < wide.dqkv.size(); ++i)
        CHECK(std::abs(double(got.dqkv[i]) - wide.dqkv[i]) < 2 * unit * largest);
}

TEST_CASE("attention gives the same bits for 1, 2 and 4 threads")
{
    FASTMOE_SEEDED(draw, 104);
    const attention_shape s{3, 37, 2, 24};
    const auto qkv = rounded<float>(draw.normals(s.tokens() * 3 * s.width()));
    const auto dy = rounded<float>(draw.normals(s.tokens() * s.width()));
    fm::host_executor one({.threads = 1}), two({.threads = 2}), four({.threads = 4});
    const auto a = attend<float>(one, s, qkv, dy), b = attend<float>(two, s, qkv, dy),
               c = attend<float>(four, s, qkv, dy);
    CHECK(a.y == b.y);
    CHECK(a.y == c.y);
    CHECK(a.dqkv == b.dqkv);
    CHECK(a.dqkv == c.dqkv);
}

TEST_CASE("a later token does not change an earlier output")
{
    FASTMOE_SEEDED(draw, 105);
    fm::host_executor ex;
    const attention_shape s{1, 20, 2, 8};
    auto qkv = draw.normals(s.tokens() * 3 * s.width());
    const auto dy = draw.normals(s.tokens() * s.width());
    const auto before = attend<double>(ex, s, qkv, dy);
    for (std::int64_t c = 0; c < 3 * s.width(); ++c) qkv[static_cast<std::size_t>(13 * 3 * s.width() + c)] += 1;
    const auto after = attend<double>(ex, s, qkv, dy);
    for (std::int64_t i = 0; i < s.tokens() * s.width(); ++i) {
        const auto at = static_cast<std::size_t>(i);
        if (i < 13 * s.width()) CHECK(before.y[at] == after.y[at]);
        else CHECK(before.y[at] != after.y[at]);
    }
}

TEST_CASE("attention refuses a qkv of another shape by name")
{
    fm::host_executor ex;
    const attention_shape s{1, 4, 1, 8};
    std::vector<float> qkv(4 * 16), y(4 * 8);
    CHECK_THROWS_WITH_AS(attention<float>(ex, s, fm::as_matrix(qkv, 4, 16), fm::as_matrix(y, 4, 8), {}),
                         doctest::Contains("qkv (T,3D) is of shape (4,16); expected (4,24)"), fm::invalid_argument);
}
