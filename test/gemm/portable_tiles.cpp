// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Shapes large enough that whole tiles, and the packing of whole blocks, do the work; optimized as users do it.
#include <doctest/doctest.h>

#include <fastmoe/gemm/portable.hpp>

#include "support/compare.hpp"
#include "support/executors.hpp"
#include "support/poison.hpp"
#include "support/scratch.hpp"

using namespace fastmoe;

TEST_CASE_TEMPLATE("whole tiles of every type give the products", T, FASTMOE_DTYPES)
{
    FASTMOE_SEEDED(r, 91);
    for (int level = 0; level <= static_cast<int>(native_instruction_set()); ++level)
        for (const int64_t rows : {16, 64, 130}) {
            CAPTURE(level);
            CAPTURE(rows);
            host_executor ex({.threads = 2, .best = static_cast<instruction_set>(level)});
            const int64_t in = 160, out = 96;
            support::guarded<T> x(rows, in), w(out, in), dy(rows, out), y(rows, out), dx(rows, in), dw(out, in);
            const auto xs = support::fill_normal(r, x.view()), ws = support::fill_normal(r, w.view()), dys = support::fill_normal(r, dy.view());
            support::in_workspace(ex, [&](arena& memory) {
                const auto groups = one_group(ex, rows, memory);
                const gemm::portable product;
                product.forward(ex, groups, plain_rows<T>{x.view()}, single(w.view()), matrix_view<const T>{}, y.view(), no_epilogue{}, memory);
                product.dgrad(ex, groups, plain_rows<T>{dy.view()}, single(w.view()), dx.view(), no_epilogue{}, memory);
                product.wgrad(ex, groups, plain_rows<T>{dy.view()}, plain_rows<T>{x.view()}, single(dw.view()), write_mode::overwrite, memory);
            });
            /// sum over l of a(i,l) b(j,l), with both matrices given by strides.
            const auto multiply = [](int64_t m, int64_t n, int64_t k, const std::vector<double>& a, int64_t ai, int64_t al,
                                     const std::vector<double>& b, int64_t bj, int64_t bl, bool absolute) {
                std::vector<double> c(m * n);
                for (int64_t i = 0; i < m; ++i)
                    for (int64_t j = 0; j < n; ++j)
                        for (int64_t l = 0; l < k; ++l) {
                            const double term = a[i * ai + l * al] * b[j * bj + l * bl];
                            c[i * n + j] += absolute ? std::fabs(term) : term;
                        }
                return c;
            };
            const auto same = [&](auto view, int64_t m, int64_t n, int64_t k, const auto& a, int64_t ai, int64_t al, const auto& b,
                                  int64_t bj, int64_t bl) {
                const auto size = multiply(m, n, k, a, ai, al, b, bj, bl, true);
                return support::close(view, multiply(m, n, k, a, ai, al, b, bj, bl, false),
                                      {.length = double(k) + 2, .magnitudes = &size});
            };
            CHECK(same(y.view(), rows, out, in, xs, in, 1, ws, in, 1));
            CHECK(same(dx.view(), rows, in, out, dys, out, 1, ws, 1, in));
            CHECK(same(dw.view(), out, in, rows, dys, 1, out, xs, 1, in));
            CHECK(y.damage() + dx.damage() + dw.damage() == "");
        }
}
