// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Verbs that move rows, at every width and place in memory: rows in whole lines of 16 bytes, and rows that are not.
#include <doctest/doctest.h>

#include <fastmoe/transfer/combine.hpp>
#include <fastmoe/transfer/dispatch.hpp>

#include "support/compare.hpp"
#include "support/poison.hpp"
#include "support/scratch.hpp"
#include "support/warps.hpp"

using namespace fastmoe;

namespace {

constexpr int64_t widths[] = {1, 7, 8, 63, 64, 65, 72, 200, 1032, 2056};
constexpr int64_t skews[] = {0, 1};

/// Rows by a few tokens of k choices each, a third of them dropped. Rows that nobody chose are NaN, and so is what lies around.
template <class T>
struct scene {
    int64_t tokens, k, width, slots;
    std::vector<int32_t> slot_of;                   // (C)
    std::vector<accumulate_t<T>> weights;           // (C)
    support::guarded<T> rows;                       // (S,D)

    scene(support::random& r, int64_t t, int64_t choices, int64_t d, int64_t skew)
        : tokens(t), k(choices), width(d), slots(2 * t * choices), rows(slots, d, skew)
    {
        const auto order = r.permutation(slots);
        for (int64_t c = 0; c < tokens * k; ++c) {
            const bool dropped = r.coin(0.3);
            slot_of.push_back(dropped ? -1 : order[c]);
            weights.push_back(dropped ? accumulate_t<T>(NAN) : accumulate_t<T>(static_cast<float>(r.uniform(0.1, 1))));
            for (int64_t j = 0; !dropped && j < width; ++j) rows.view()(order[c], j) = support::narrow<T>(r.normal());
        }
    }
    routing<accumulate_t<T>> route() { return {tokens, 2 * k, k, as_vector(slot_of), as_vector(weights), {}}; }
    double weight(int64_t c) const { return double(weights[c]); }
};

template <class Real>
struct weight_of {
    vector_view<const Real> weights;
    FASTMOE_HOST_DEVICE Real operator()(int64_t c) const { return weights(c); }
};

/// y (+)= the weighted sums of a scene's rows, twice, to the same bits; and held to sums in double.
template <class Y, class Executor, class T>
void check_sums(Executor& ex, scene<T>& in, write_mode mode, int64_t skew)
{
    using real = accumulate_t<T>;
    CAPTURE(in.width);
    CAPTURE(in.k);
    CAPTURE(skew);
    std::vector<double> expected(in.tokens * in.width), magnitude(in.tokens * in.width);
    std::vector<Y> results[2];
    for (auto& result : results) {
        support::guarded<Y> y(in.tokens, in.width, skew);
        for (int64_t i = 0; mode == write_mode::accumulate && i < in.tokens * in.width; ++i) y.data()[i] = Y(real(0.5));
        const routing<real> route = in.route();
        detail::sum_row_lists<real, T, Y, routing<real>, weight_of<real>> f{in.rows.view(), as_vector(in.slot_of), y.view(),
                                                                             mode, route, {as_vector(in.weights)}};
        for_each_row(ex, in.tokens, f, {.width = in.width});
        result = support::download(ex, y.view());
        CHECK(y.damage() == "");
    }
    for (int64_t t = 0; t < in.tokens; ++t)
        for (int64_t d = 0; d < in.width; ++d) {
            double& sum = expected[t * in.width + d];
            double& size = magnitude[t * in.width + d];
            sum = size = mode == write_mode::accumulate ? 0.5 : 0;
            for (int64_t c = t * in.k; c < (t + 1) * in.k; ++c)
                if (in.slot_of[c] >= 0) {
                    const double term = in.weight(c) * double(in.rows.view()(in.slot_of[c], d));
                    sum += term;
                    size += std::fabs(term);
                }
        }
    CHECK(support::close(results[0], expected, {.length = double(2 * in.k + 1), .magnitudes = &magnitude}));
    CHECK(support::same_bits(results[1], results[0]));
}

} // namespace

TEST_CASE_TEMPLATE("a token's rows are summed at every width and place, for every number of choices, those dropped unread", Cell,
                   FASTMOE_CELLS_AND_WARPS)
{
    using T = typename Cell::type;
    FASTMOE_SEEDED(r, 601);
    FASTMOE_EXECUTOR(ex, Cell);
    for (const int64_t width : widths)
        for (const int64_t skew : skews)
            for (int64_t k = 1; k < 10; k += width > 1000 ? 4 : 1) {
                scene<T> in(r, 2, k, width, skew);
                check_sums<T>(ex, in, write_mode::overwrite, skew);
                check_sums<T>(ex, in, write_mode::accumulate, skew);
                if (k == 5) check_sums<T>(ex, in, write_mode::accumulate, 1 - skew); // one is in lines, the other is not
            }
}

TEST_CASE_TEMPLATE("into another type than theirs as well, wider or narrower", Cell, FASTMOE_EXECUTORS_AND_WARPS)
{
    FASTMOE_SEEDED(r, 602);
    FASTMOE_EXECUTOR(ex, Cell);
    for (const int64_t width : widths)
        for (const int64_t skew : skews) {
            scene<bfloat16> narrow(r, 2, 5, width, skew);
            check_sums<float>(ex, narrow, write_mode::accumulate, 0);
            check_sums<double>(ex, narrow, write_mode::accumulate, 0);
            scene<float> wide(r, 2, 6, width, 0);
            check_sums<fastmoe::half>(ex, wide, write_mode::overwrite, skew);
            check_sums<double>(ex, wide, write_mode::accumulate, skew);
        }
}

TEST_CASE_TEMPLATE("whether rows are in lines or not, a sum over a list of them has the same bits", Cell, FASTMOE_CELLS_AND_WARPS)
{
    using T = typename Cell::type;
    using real = accumulate_t<T>;
    FASTMOE_SEEDED(r, 603);
    FASTMOE_EXECUTOR(ex, Cell);
    for (const int64_t width : {64, 72, 1032}) {
        std::vector<T> results[2];
        for (const int64_t skew : skews) {
            support::random again(r.seed() + static_cast<std::uint64_t>(width));
            scene<T> in(again, 3, 7, width, skew);
            support::guarded<T> y(in.tokens, width, skew);
            const routing<real> route = in.route();
            detail::sum_row_lists<real, T, T, routing<real>, weight_of<real>> f{
                in.rows.view(), as_vector(in.slot_of), y.view(), write_mode::overwrite, route, {as_vector(in.weights)}};
            for_each_row(ex, in.tokens, f, {.width = width});
            results[skew] = support::download(ex, y.view());
        }
        CHECK(support::same_bits(results[1], results[0]));
    }
}

TEST_CASE_TEMPLATE("a token's row is multiplied with each of its choices' rows, and dropped ones give 0 unread", Cell,
                   FASTMOE_CELLS_AND_WARPS)
{
    using T = typename Cell::type;
    using real = accumulate_t<T>;
    FASTMOE_SEEDED(r, 604);
    FASTMOE_EXECUTOR(ex, Cell);
    for (const int64_t width : widths)
        for (const int64_t skew : skews)
            for (int64_t k = 1; k < 10; k += width > 1000 ? 4 : 1) {
                CAPTURE(width);
                CAPTURE(skew);
                CAPTURE(k);
                scene<T> in(r, 2, k, width, skew);
                support::guarded<T> a(in.tokens, width, skew);
                support::fill_normal(r, a.view());
                std::vector<real> results[2];
                for (auto& result : results) {
                    support::guarded<real> products(in.tokens * k);
                    const routing<real> route = in.route();
                    detail::dot_row_lists<real, T, routing<real>> f{a.view(), in.rows.view(), as_vector(in.slot_of), products.vector(), route};
                    for_each_row(ex, in.tokens, f, {.width = width});
                    result = support::download(ex, products.vector());
                    CHECK(products.damage() == "");
                }
                std::vector<double> expected(in.tokens * k), magnitude(in.tokens * k);
                for (int64_t c = 0; c < in.tokens * k; ++c)
                    for (int64_t d = 0; in.slot_of[c] >= 0 && d < width; ++d) {
                        const double term = double(a.view()(c / k, d)) * double(in.rows.view()(in.slot_of[c], d));
                        expected[c] += term;
                        magnitude[c] += std::fabs(term);
                    }
                CHECK(support::close(results[0], expected, {.length = double(width), .magnitudes = &magnitude}));
                CHECK(support::same_bits(results[1], results[0]));
            }
}

TEST_CASE_TEMPLATE("rows are copied, scaled and cleared at every width and place", Cell, FASTMOE_CELLS_AND_WARPS)
{
    using T = typename Cell::type;
    using real = accumulate_t<T>;
    FASTMOE_SEEDED(r, 605);
    FASTMOE_EXECUTOR(ex, Cell);
    for (const int64_t width : widths)
        for (const int64_t skew : skews)
            for (const int64_t other : skews) {
                CAPTURE(width);
                CAPTURE(skew);
                CAPTURE(other);
                const std::vector<int32_t> index{2, -1, 0, 2};
                support::guarded<T> x(3, width, skew), copied(4, width, other), scaled(4, width, other);
                support::fill_normal(r, x.view());
                const std::vector<real> weights{real(0.25), real(NAN), real(-2), real(3)};
                const indexed_rows<T> from{x.view(), as_vector(index)};
                for_each_row(ex, 4, detail::gather_rows<real, T, unit_scale<real>>{from, copied.view(), {}}, {.width = width});
                for_each_row(ex, 4, detail::gather_rows<real, T, weight_of<real>>{from, scaled.view(), {as_vector(weights)}}, {.width = width});
                ex.synchronize();
                int64_t wrong = 0;
                for (int64_t s = 0; s < 4; ++s)
                    for (int64_t d = 0; d < width; ++d) {
                        const T value = index[s] < 0 ? T(real(0)) : x.view()(index[s], d);
                        wrong += !(double(copied.view()(s, d)) == double(value));
                        const double product = index[s] < 0 ? 0.0 : double(weights[s]) * double(value);
                        wrong += !(double(scaled.view()(s, d)) == double(support::narrow<T>(product))); // 3x alone is rounded
                    }
                CHECK(wrong == 0);
                CHECK(copied.damage() == "");
                CHECK(scaled.damage() == "");
            }
}

TEST_CASE_TEMPLATE("columns of groups are summed at every width and place, for any number of rows, those of nobody left out", Cell,
                   FASTMOE_CELLS_AND_WARPS)
{
    using T = typename Cell::type;
    using real = accumulate_t<T>;
    FASTMOE_SEEDED(r, 606);
    FASTMOE_EXECUTOR(ex, Cell);
    for (const int64_t width : widths)
        for (const int64_t skew : skews)
            for (const bool many : {false, true}) {
                if (many && width > 1000) continue;
                CAPTURE(width);
                CAPTURE(skew);
                CAPTURE(many);
                const std::vector<int32_t> counts{0, 1, many ? 211 : 9, 3};
                std::vector<int64_t> offsets{0};
                for (const int32_t n : counts) offsets.push_back(offsets.back() + n + 2); // padding that is NaN
                const int64_t slots = offsets.back();
                support::guarded<T> x(slots, width, skew);
                std::vector<int32_t> index(slots, -1);
                std::vector<real> scale(slots, real(NAN));
                std::vector<double> expected(4 * width), magnitude(4 * width);
                for (int64_t e = 0; e < 4; ++e)
                    for (int64_t s = offsets[e]; s < offsets[e] + counts[e]; ++s) {
                        if (r.coin(0.2)) continue; // of no row: x is NaN there
                        index[s] = static_cast<int32_t>(s);
                        scale[s] = real(static_cast<float>(r.normal()));
                        for (int64_t d = 0; d < width; ++d) {
                            x.view()(s, d) = support::narrow<T>(r.normal());
                            const double term = double(scale[s]) * double(x.view()(s, d));
                            expected[e * width + d] += term;
                            magnitude[e * width + d] += std::fabs(term);
                        }
                    }
                const indexed_rows<T> rows{x.view(), as_vector(index)};
                std::vector<real> results[2];
                for (auto& result : results) {
                    support::guarded<real> out(4, width, skew);
                    sum_groups(ex, rows, as_vector(counts), as_vector(offsets), weight_of<real>{as_vector(scale)}, out.view(),
                               write_mode::overwrite);
                    result = support::download(ex, out.view());
                    CHECK(out.damage() == "");
                }
                CHECK(support::close(results[0], expected, {.length = 220, .magnitudes = &magnitude}));
                CHECK(support::same_bits(results[1], results[0]));
            }
}
