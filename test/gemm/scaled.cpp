// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Codes and scales of rows and weights against their definition in double.
#include <doctest/doctest.h>

#include <fastmoe/gemm/quantize.hpp>

#include "reference_gemm.hpp"
#include "support/executors.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;

namespace {

using fm::float8_e4m3;
using fm::int64_t;
using support::ragged;
using support::test_weights;
using support::weight_storage;

constexpr int64_t side = 128;
int64_t blocks(int64_t n) { return (n + side - 1) / side; }

/// Whether a block's scale is that of its largest magnitude, and a code the nearest one.
struct block_check {
    double largest = 0;
    bool scale_is(float scale) const
    {
        const double wanted = std::max(largest / 448, 0x1p-63);
        return std::fabs(static_cast<double>(scale) - wanted) <= 0x1p-23 * wanted;
    }
    /// The distance to the value is half a step of the code: 2^-4 of it, or 2^-10 scales where codes are subnormal.
    static bool code_is(double value, float8_e4m3 code, float scale)
    {
        const double s = static_cast<double>(scale), got = s * static_cast<double>(static_cast<float>(code));
        return std::fabs(got - value) <= std::max(std::fabs(value) * 0x1p-4, s * 0x1p-10) * (1 + 1e-6);
    }
};

template <class T>
void check_rows(support::random& r, auto& ex)
{
    for (const int64_t width : {int64_t{128}, int64_t{1}, int64_t{100}, int64_t{384}, r.integer(1, 600)}) {
        CAPTURE(width);
        const ragged g = ragged::of(r, {3, 0, 5}, 2);
        support::guarded<T> x(g.slots, width, r.coin(0.5) ? 1 : 0);
        for (int64_t s = 0; s < g.slots; ++s)
            for (int64_t i = 0; i < width; ++i)
                if (g.expert_of(s) >= 0) x.data()[s * width + i] = support::narrow<T>(i / side == 1 ? 0.0 : r.normal(std::ldexp(1, static_cast<int>(r.integer(-12, 12)))));
        support::guarded<float8_e4m3> codes(g.slots, width);
        support::guarded<float> scales(g.slots, blocks(width));
        fm::quantize_rows(ex, g.view(), x.view(), codes.view(), scales.view());
        ex.synchronize();
        CHECK(codes.damage() == "");
        CHECK(scales.damage() == "");
        support::guarded<float> back(3, width);
        {
            const auto first = [&](auto& of, int64_t columns) { return of.data() + g.offsets[0] * columns; };
            fm::dequantize_rows(ex, fm::matrix_view<const float8_e4m3>(first(codes, width), 3, width),
                                fm::matrix_view<const float>(first(scales, blocks(width)), 3, blocks(width)), back.view());
            ex.synchronize();
            CHECK(back.damage() == "");
        }
        int wrong = 0;
        for (int64_t s = 0; s < 3; ++s)
            for (int64_t i = 0; i < width; ++i)
                wrong += back.data()[s * width + i] != scales.data()[(g.offsets[0] + s) * blocks(width) + i / side] *
                                                           static_cast<float>(codes.data()[(g.offsets[0] + s) * width + i]);
        for (int64_t s = 0; s < g.slots; ++s)
            for (int64_t k = 0; k < blocks(width); ++k) {
                const float scale = scales.data()[s * blocks(width) + k];
                const int64_t end = std::min(width, (k + 1) * side);
                if (g.expert_of(s) < 0) { // padding
                    wrong += support::poisoned(fm::vector_view<float>(scales.data() + s * blocks(width) + k, 1)) != 1;
                    wrong += support::poisoned(fm::vector_view<float8_e4m3>(codes.data() + s * width + k * side, end - k * side)) != end - k * side;
                    continue;
                }
                block_check c;
                const auto value = [&](int64_t i) { return static_cast<double>(x.data()[s * width + i]); };
                for (int64_t i = k * side; i < end; ++i) c.largest = std::max(c.largest, std::fabs(value(i)));
                wrong += !c.scale_is(scale);
                for (int64_t i = k * side; i < end; ++i) wrong += !c.code_is(value(i), codes.data()[s * width + i], scale);
            }
        CHECK(wrong == 0);
    }
}

template <class T>
void check_weights(support::random& r, auto& ex)
{
    for (const auto& size : {std::pair<int64_t, int64_t>{128, 128}, {1, 300}, {130, 20}, {r.integer(1, 300), r.integer(1, 300)}})
        for (const auto storage : {weight_storage::stacked, weight_storage::padded, weight_storage::transposed, weight_storage::pointers}) {
            const int64_t out = size.first, in = size.second; // no binding: clang++ 14 captures none
            CAPTURE(out);
            CAPTURE(in);
            CAPTURE(static_cast<int>(storage));
            test_weights<T> w(storage, 2, out, in);
            w.fill(r, std::ldexp(1, static_cast<int>(r.integer(-10, 10))));
            test_weights<float8_e4m3> codes(support::weight_storage(r.integer(0, 3)), 2, out, in);
            support::guarded<float> scales(2 * blocks(out), blocks(in));
            const fm::block_scaled_weights<float8_e4m3> to{codes.view(), scales.data()};
            const int64_t all = static_cast<int64_t>(codes.memory().size());
            fm::quantize_weights(ex, w.view(), to);
            test_weights<float> back(weight_storage(r.integer(0, 3)), 2, out, in);
            const fm::block_scaled_weights<const float8_e4m3> from = to;
            fm::dequantize_weights(ex, from, back.view());
            ex.synchronize();
            CHECK(scales.damage() == "");
            CHECK(codes.accounted() == all);
            int wrong = 0;
            for (int64_t e = 0; e < 2; ++e)
                for (int64_t b = 0; b < blocks(out) * blocks(in); ++b) {
                    const int64_t o = b / blocks(in) * side, n = b % blocks(in) * side;
                    const float scale = scales.data()[e * blocks(out) * blocks(in) + b];
                    block_check c;
                    const auto each = [&](auto f) {
                        for (int64_t i = o; i < std::min(out, o + side); ++i)
                            for (int64_t j = n; j < std::min(in, n + side); ++j) f(i, j);
                    };
                    each([&](int64_t i, int64_t j) { c.largest = std::max(c.largest, std::fabs(w(e, i, j))); });
                    wrong += !c.scale_is(scale);
                    each([&](int64_t i, int64_t j) {
                        const float8_e4m3 code = codes.view()(e, i, j);
                        wrong += !c.code_is(w(e, i, j), code, scale) || back.view()(e, i, j) != scale * static_cast<float>(code);
                    });
                }
            CHECK(wrong == 0);
        }
}

} // namespace

TEST_CASE_TEMPLATE("codes are the nearest and scales those of the largest, padding untouched", T, float, fm::bfloat16, fm::half)
{
    FASTMOE_SEEDED(r, 81);
    fm::host_executor host({.threads = 2});
    support::lanes lanes;
    check_rows<T>(r, host);
    check_rows<T>(r, lanes);
    check_weights<T>(r, host);
    check_weights<T>(r, lanes);
}

TEST_CASE("a block with an infinity or a NaN is NaN, its neighbours are not; zeros and the smallest numbers have codes")
{
    fm::host_executor ex;
    const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN(),
                least = std::numeric_limits<float>::denorm_min();
    for (const float bad : {inf, -inf, nan}) {
        std::vector<float> x(256, 1.0f);
        x[100] = bad;
        std::vector<float8_e4m3> codes(256);
        std::vector<float> scales(2);
        fm::quantize_rows(ex, fm::matrix_view<const float>(x.data(), 1, 256), fm::matrix_view<float8_e4m3>(codes.data(), 1, 256),
                          fm::matrix_view<float>(scales.data(), 1, 2));
        CHECK(std::isnan(scales[0] * static_cast<float>(codes[0]))); // of a finite number beside it
        CHECK(std::isnan(scales[0] * static_cast<float>(codes[100])));
        CHECK(scales[1] * static_cast<float>(codes[200]) == 1.0f);
    }
    std::vector<float> x(128);
    x[3] = least, x[4] = -2 * least;
    std::vector<float8_e4m3> codes(128);
    float scale = 0;
    fm::quantize_rows(ex, fm::matrix_view<const float>(x.data(), 1, 128), fm::matrix_view<float8_e4m3>(codes.data(), 1, 128),
                      fm::matrix_view<float>(&scale, 1, 1));
    CHECK(scale == 0x1p-63f);
    for (const float8_e4m3 c : codes) CHECK(static_cast<float>(c) == 0.0f);
}

TEST_CASE("what does not fit is refused, and nothing is written")
{
    fm::host_executor ex;
    std::vector<float> x(256), scales(2, 5.0f);
    std::vector<float8_e4m3> codes(256);
    std::memset(static_cast<void*>(codes.data()), 7, codes.size());
    const fm::matrix_view<const float> rows(x.data(), 1, 256);
    CHECK_THROWS_WITH_AS(fm::quantize_rows(ex, rows, fm::matrix_view<float8_e4m3>(codes.data(), 1, 255), fm::matrix_view<float>(scales.data(), 1, 2)),
                         doctest::Contains("codes (N,K)"), fm::invalid_argument);
    CHECK_THROWS_WITH_AS(fm::quantize_rows(ex, rows, fm::matrix_view<float8_e4m3>(codes.data(), 1, 256), fm::matrix_view<float>(scales.data(), 1, 1)),
                         doctest::Contains("ceil(K/128)"), fm::invalid_argument);
    const auto w = fm::single(fm::matrix_view<float>(x.data(), 2, 128));
    const auto to = fm::single(fm::matrix_view<float8_e4m3>(codes.data(), 2, 128));
    CHECK_THROWS_WITH_AS(fm::quantize_weights(ex, w, fm::block_scaled_weights<float8_e4m3>{to}), doctest::Contains("without scales"), fm::invalid_argument);
    auto over = to;
    over.row_stride = 1; // both strides are 1: rows overlap
    CHECK_THROWS_AS(fm::quantize_weights(ex, w, fm::block_scaled_weights<float8_e4m3>{over, scales.data()}), fm::invalid_argument);
    float* one_of_two[] = {scales.data(), nullptr};
    const fm::block_scaled_weights<float8_e4m3> half{fm::stacked(fm::tensor_view<float8_e4m3, 3>(codes.data(), 2, 1, 128)), nullptr, one_of_two};
    const auto two = fm::stacked(fm::tensor_view<float, 3>(x.data(), 2, 1, 128));
    CHECK_THROWS_WITH_AS(fm::quantize_weights(ex, two, half), doctest::Contains("scales of expert 1"), fm::invalid_argument);
    CHECK_THROWS_WITH_AS(fm::dequantize_weights(ex, half, two), doctest::Contains("scales of expert 1"), fm::invalid_argument);
    float* matrices[] = {x.data(), nullptr};
    const auto apart = fm::separate(fm::vector_view<float* const>(matrices, 2), 1, 128);
    const fm::block_scaled_weights<float8_e4m3> whole{half.codes, scales.data()};
    CHECK_THROWS_WITH_AS(fm::quantize_weights(ex, apart, whole), doctest::Contains("memory for expert 1"), fm::invalid_argument);
    CHECK_THROWS_WITH_AS(fm::dequantize_weights(ex, whole, apart), doctest::Contains("memory for expert 1"), fm::invalid_argument);
    for (const float s : scales) CHECK(s == 5.0f);
    for (const float8_e4m3 c : codes) CHECK(c.bits == 7);
    for (const float v : x) CHECK(v == 0.0f);
}
