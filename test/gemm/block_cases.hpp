// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Products of tiles against sums in double: what the tests of every GEMM that multiplies tiles of blocks share.
#pragma once

#include "portable_cases.hpp"

namespace {

/// Sizes around those of tiles, stages and chunks.
std::vector<shape> block_shapes(support::random& r)
{
    std::vector<shape> out;
    out.push_back({{3, 0, 17}, 1, 1});
    out.push_back({{0, 5}, 9, 0});
    out.push_back({{4, 12}, 0, 9});
    out.push_back({{0, 0, 0}, 7, 5});
    out.push_back({{}, 7, 5});
    out.push_back({{127, 128, 129, 0, 1}, r.integer(120, 140), r.integer(20, 50)});
    out.push_back({{20, 0, 8}, 128, 96});
    out.push_back({{16, 1, 40}, 264, 64});
    out.push_back({{300}, 24, 40});
    out.push_back({support::random_counts(r, 5, 150), r.integer(1, 150), r.integer(1, 150)});
    out.push_back({support::random_counts(r, 12, 20), 8 * r.integer(1, 20), 8 * r.integer(1, 20)});
    return out;
}

/// Forward, dgrad and wgrad of one shape. X, dY and W have types of their own.
template <class X, class W, class Y, class Executor, class Gemm>
void check_products(support::random& r, const shape& c, Executor& ex, const Gemm& gemm, weight_storage storage, support::start begin)
{
    const ragged g = ragged::of(r, c.counts, 3);
    INFO(text_of(g, c, storage), begin == support::start::odd ? ", odd" : ", aligned");
    const test_rows<X> x(r, g, c.in, begin), dy(r, g, c.out, begin);
    test_weights<W> w(storage, g.experts(), c.out, c.in, begin);
    w.fill(r);
    const fm::weight_view<const W> weights = w.view();
    const auto old = [&](int64_t e, int64_t o, int64_t i) { return w(e, o, i); };
    const std::vector<float> bias = support::normal_vector<float>(r, g.experts() * c.out);
    const auto inside = [&](int64_t width) { return [&g, width](int64_t i) { return g.expert_of(i / width) >= 0; }; };
    {
        const auto got = rows_outcome<Y>(ex, g, c.out, [&](auto y, const auto& epilogue, fm::arena& memory) {
            gemm.forward(ex, g.view(), x.indexed(), weights, fm::matrix_view<const float>(bias.data(), g.experts(), c.out), y, epilogue, memory);
        }, begin);
        CHECK(got.complaint == "");
        CHECK(first_wrong<float>(got.values, support::reference_forward(g, x.indexed_reference(), old, support::widened(bias), c.out, c.in),
                                 c.in + 1, inside(c.out)) == "");
    }
    {
        const auto got = rows_outcome<Y>(ex, g, c.in, [&](auto dx, const auto& epilogue, fm::arena& memory) {
            gemm.dgrad(ex, g.view(), dy.plain(), weights, dx, epilogue, memory);
        }, begin);
        CHECK(got.complaint == "");
        CHECK(first_wrong<float>(got.values, support::reference_dgrad(g, dy.plain_reference(), old, c.out, c.in), c.out + 1, inside(c.in)) == "");
    }
    const std::vector<float> before = support::normal_vector<float>(r, g.experts() * c.out * c.in);
    for (const fm::write_mode mode : {fm::write_mode::overwrite, fm::write_mode::accumulate}) {
        const bool adds = mode == fm::write_mode::accumulate;
        const auto got = gradient_outcome<float>(ex, g, adds ? before : std::vector<float>{}, storage, c,
                                                 [&](auto& e, const fm::weight_view<float>& dw, fm::arena& memory) {
                                                     gemm.wgrad(e, g.view(), dy.indexed(), x.plain(), dw, mode, memory);
                                                 }, begin);
        const product expected = support::reference_wgrad(
            g, dy.indexed_reference(), x.plain_reference(),
            [&](int64_t e, int64_t o, int64_t i) { return adds ? static_cast<double>(before[(e * c.out + o) * c.in + i]) : 0.0; }, c.out, c.in);
        int64_t depth = 2;
        for (const int32_t n : c.counts) depth = std::max<int64_t>(depth, n + 2);
        CHECK(first_wrong<float>(got, expected, depth, [](int64_t) { return true; }) == "");
    }
}

template <class X, class W, class Y, class Executor, class Gemm = fm::gemm::portable>
void check_products(support::random& r, const shape& c, Executor& ex, const Gemm& gemm = {})
{
    const weight_storage storage = any_storage(r);
    check_products<X, W, Y>(r, c, ex, gemm, storage, r.one_of(support::start::odd, support::start::aligned));
}

} // namespace
