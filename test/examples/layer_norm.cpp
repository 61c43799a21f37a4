// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Layer norm with its residual sum against scalar loops, and its gradient against finite differences.
#include <cmath>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/exec/host_executor.hpp>

#include "support/finite_difference.hpp"
#include "support/lanes.hpp"
#include "support/random.hpp"
#include "train_gpt/layer_norm.hpp"

namespace {

using namespace train_gpt;

struct sizes {
    std::int64_t tokens, width;
};

std::vector<double> oracle(sizes s, const std::vector<double>& x, const std::vector<double>& branch,
                           const std::vector<double>& norm)
{
    std::vector<double> h(x.size());
    for (std::int64_t t = 0; t < s.tokens; ++t) {
        const auto at = [&](std::int64_t d) { return static_cast<std::size_t>(t * s.width + d); };
        double mean = 0, variance = 0;
        for (std::int64_t d = 0; d < s.width; ++d) mean += (x[at(d)] + branch[at(d)]) / double(s.width);
        for (std::int64_t d = 0; d < s.width; ++d)
            variance += std::pow(x[at(d)] + branch[at(d)] - mean, 2) / double(s.width);
        for (std::int64_t d = 0; d < s.width; ++d)
            h[at(d)] =
                (x[at(d)] + branch[at(d)] - mean) / std::sqrt(variance + 1e-5) * norm[static_cast<std::size_t>(d)] +
                norm[static_cast<std::size_t>(s.width + d)];
    }
    return h;
}

template <class T>
struct run {
    std::vector<accumulate_t<T>> x, dx, dnorm;
    std::vector<T> h, rounded;
};

/// Forward, then backward with dx = through (what reaches x_out on other ways).
template <class T, class Executor>
run<T> go(Executor& ex, sizes s, const std::vector<double>& x, const std::vector<double>& branch,
          const std::vector<double>& norm, const std::vector<double>& dh, const std::vector<double>& through)
{
    using Real = accumulate_t<T>;
    const auto as = [&](auto& v) { return fm::as_matrix(v, s.tokens, s.width); };
    const std::vector<Real> in(x.begin(), x.end()), scales(norm.begin(), norm.end());
    std::vector<T> other, back;
    for (const double v : branch) other.push_back(T(static_cast<Real>(v)));
    for (const double v : dh) back.push_back(T(static_cast<Real>(v)));
    run<T> out;
    out.x.assign(x.size(), Real(NAN));
    out.h.assign(x.size(), T(Real(NAN)));
    out.rounded = out.h;
    out.dx.assign(through.begin(), through.end());
    out.dnorm.assign(norm.size(), Real(NAN));
    std::vector<Real> mean(static_cast<std::size_t>(s.tokens)), rstd(mean);
    const norm_saved<Real> saved{fm::as_vector(mean), fm::as_vector(rstd)};
    const auto gains = fm::as_matrix(scales, 2, s.width);
    add_norm<T>(ex, as(in), as(other), gains, as(out.x), as(out.h), saved);
    const auto backward = [&](fm::arena& memory) {
        norm_backward<T>(ex, as(out.x), saved, gains, as(back), as(out.dx), as(out.rounded),
                         fm::as_matrix(out.dnorm, 2, s.width), memory);
    };
    fm::arena measure;
    backward(measure);
    fm::buffer<std::byte, Executor> storage(ex, measure.bytes());
    fm::arena memory(storage.view());
    backward(memory);
    return out;
}

} // namespace

TEST_CASE_TEMPLATE("layer norm and its gradient in double agree with scalar loops and finite differences", Executor,
                   fm::host_executor, support::lanes)
{
    FASTMOE_SEEDED(draw, 101);
    Executor ex;
    for (const sizes s : {sizes{1, 2}, sizes{7, 5}, sizes{70, 4}, sizes{3, 33}}) {
        CAPTURE(s.tokens);
        CAPTURE(s.width);
        auto x = draw.normals(s.tokens * s.width), branch = draw.normals(s.tokens * s.width),
             norm = draw.normals(2 * s.width);
        const auto dh = draw.normals(s.tokens * s.width), through = draw.normals(s.tokens * s.width);
        const auto got = go<double>(ex, s, x, branch, norm, dh, through);
        const auto h = oracle(s, x, branch, norm);
        for (std::size_t i = 0; i < h.size(); ++i) {
            CHECK(got.x[i] == x[i] + branch[i]);
            CHECK(std::abs(got.h[i] - h[i]) < 1e-12);
        }
        const auto loss = [&] {
            const auto y = oracle(s, x, branch, norm);
            double total = 0;
            for (std::size_t i = 0; i < y.size(); ++i) total += y[i] * dh[i] + through[i] * (x[i] + branch[i]);
            return total;
        };
        const auto dx = support::finite_difference(loss, x), dnorm = support::finite_difference(loss, norm);
        const double bound = s.width == 2 ? 1e-6 : 1e-7; // two columns: a variance near 0 bends the function sharply
        for (std::size_t i = 0; i < dx.size(); ++i) CHECK(std::abs(got.dx[i] - dx[i]) < bound);
        for (std::size_t i = 0; i < dnorm.size(); ++i) CHECK(std::abs(got.dnorm[i] - dnorm[i]) < 1e-8);
    }
}

TEST_CASE("layer norm in bfloat16 keeps the residual stream and the gradient in float")
{
    FASTMOE_SEEDED(draw, 102);
    fm::host_executor ex;
    const sizes s{40, 48};
    const auto x = draw.normals(s.tokens * s.width), norm = draw.normals(2 * s.width),
               dh = draw.normals(s.tokens * s.width), through = draw.normals(s.tokens * s.width);
    auto branch = draw.normals(s.tokens * s.width);
    for (auto& v : branch) v = double(fm::bfloat16(float(v)));
    const auto got = go<fm::bfloat16>(ex, s, x, branch, norm, dh, through);
    const auto wide = go<double>(ex, s, x, branch, norm, dh, through);
    for (std::size_t i = 0; i < x.size(); ++i) {
        CHECK(std::abs(got.x[i] - wide.x[i]) < 1e-6);
        CHECK(std::abs(float(got.h[i]) - wide.h[i]) < 4e-3 * (1 + std::abs(wide.h[i])));
        CHECK(float(got.rounded[i]) == float(fm::bfloat16(got.dx[i])));
        CHECK(std::abs(got.dx[i] - wide.dx[i]) < 3e-2);
    }
}

TEST_CASE("the gradients of gain and bias have the same bits for any number of threads")
{
    FASTMOE_SEEDED(draw, 103);
    const sizes s{333, 65};
    const auto x = draw.normals(s.tokens * s.width), branch = draw.normals(s.tokens * s.width),
               norm = draw.normals(2 * s.width), dh = draw.normals(s.tokens * s.width);
    fm::host_executor one({.threads = 1}), three({.threads = 3});
    const auto a = go<float>(one, s, x, branch, norm, dh, dh), b = go<float>(three, s, x, branch, norm, dh, dh);
    CHECK(a.dnorm == b.dnorm);
    CHECK(a.dx == b.dx);
    CHECK(a.h == b.h);
}
