// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The products of blocks, run an instruction at a time without a GPU, against sums in double.
#include <fastmoe/gemm/block_products.hpp>

#include "block_cases.hpp"
#if !defined(FASTMOE_TEST_CUDA)
#include "support/fiber_blocks.hpp"
#endif

namespace {

#if !defined(FASTMOE_TEST_CUDA)
using lane_blocks = support::fiber_blocks<support::lanes>;
static_assert(fm::executor<lane_blocks> && fm::runs_blocks<lane_blocks>);
#endif

} // namespace

#if defined(FASTMOE_TEST_CUDA) // nvcc takes no fibers: the GPU alone

TEST_CASE_TEMPLATE("forward, dgrad and wgrad of blocks are their sums on the GPU", T, FASTMOE_DTYPES_OF_16_BITS, float)
{
    using Cell = support::cell<fm::cuda_executor, T>;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(r, 41);
    for (const shape& c : block_shapes(r)) check_products<T, T, T>(r, c, ex);
    check_products<T, T, T>(r, {support::random_counts(r, 9, 700), 640, 512}, ex);
}

#else

TEST_CASE_TEMPLATE("forward, dgrad and wgrad of blocks are their sums, for sizes around those of tiles", T, FASTMOE_DTYPES_OF_16_BITS, float)
{
    FASTMOE_SEEDED(r, 41);
    lane_blocks ex;
    for (const shape& c : block_shapes(r)) check_products<T, T, T>(r, c, ex);
    CHECK(ex.lines > 1000); // copied 16 bytes at a time, where memory allows it
    CHECK((ex.products > 0) == (sizeof(T) == 2)); // tensor cores for 16 bits, and for nothing else
    CHECK(ex.bank_conflicts == 0);
}


TEST_CASE("operands of different types meet in float")
{
    FASTMOE_SEEDED(r, 42);
    lane_blocks ex;
    check_products<float, fm::half, bfloat16>(r, {{30, 0, 140}, 72, 48}, ex);
    check_products<float, bfloat16, float>(r, {{30, 0, 140}, 72, 48}, ex);
    CHECK(ex.products == 0);
    check_products<bfloat16, float, float>(r, {{30, 0, 140}, 70, 50}, ex); // its wgrad is of two bfloat16
}

TEST_CASE("a row of zeros adds nothing and is the bias alone, whatever stands on the other side")
{
    FASTMOE_SEEDED(r, 46);
    lane_blocks ex;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const std::vector<int32_t> counts{3};
    const std::vector<int64_t> offsets{0, 3};
    const fm::row_groups groups{fm::as_vector(counts), fm::as_vector(offsets), 3};
    const std::vector<int32_t> absent{-1, 0, -1};
    std::vector<bfloat16> x(3 * 8, bfloat16(1.0f)), dy(3 * 8, bfloat16(nan)), w(8 * 8, bfloat16(nan)), y(3 * 8);
    for (int i = 8; i < 16; ++i) dy[static_cast<std::size_t>(i)] = bfloat16(2.0f); // the row that meets one of x
    const std::vector<float> bias(8, 5.0f);
    std::vector<float> dw(8 * 8, nan);
    const fm::indexed_rows<bfloat16> rows{fm::matrix_view<const bfloat16>(x.data(), 3, 8), fm::as_vector(absent)};
    const fm::plain_rows<bfloat16> gradients{fm::matrix_view<const bfloat16>(dy.data(), 3, 8)};
    support::in_workspace(ex, [&](fm::arena& memory) {
        fm::gemm::portable{}.forward(ex, groups, rows, fm::stacked(fm::tensor_view<const bfloat16, 3>(w.data(), 1, 8, 8)),
                                     fm::matrix_view<const float>(bias.data(), 1, 8), fm::matrix_view<bfloat16>(y.data(), 3, 8),
                                     fm::no_epilogue{}, memory);
    });
    for (int i = 0; i < 24; ++i)
        if (i < 8 || i >= 16) CHECK(static_cast<float>(y[static_cast<std::size_t>(i)]) == 5.0f);
    for (const bool turned : {false, true}) { // absent in X, then in dY
        support::in_workspace(ex, [&](fm::arena& memory) {
            const fm::weight_view<float> to = fm::stacked(fm::tensor_view<float, 3>(dw.data(), 1, 8, 8));
            if (turned) fm::gemm::portable{}.wgrad(ex, groups, rows, gradients, to, fm::write_mode::overwrite, memory);
            else fm::gemm::portable{}.wgrad(ex, groups, gradients, rows, to, fm::write_mode::overwrite, memory);
        });
        for (const float value : dw) CHECK(value == 2.0f);
    }
}

TEST_CASE("double is summed by the plain source")
{
    FASTMOE_SEEDED(r, 43);
    lane_blocks ex;
    const ragged g = ragged::of(r, {5, 9}, 2);
    const test_rows<double> x(r, g, 6);
    test_weights<double> w(weight_storage::stacked, 2, 7, 6);
    w.fill(r);
    const fm::weight_view<const double> weights = w.view();
    const auto got = rows_outcome<double>(ex, g, 7, [&](auto y, const auto& epilogue, fm::arena& memory) {
        fm::gemm::portable{}.forward(ex, g.view(), x.plain(), weights, fm::matrix_view<const double>{}, y, epilogue, memory);
    });
    CHECK(got.complaint == "");
    const auto old = [&](int64_t e, int64_t o, int64_t i) { return w(e, o, i); };
    CHECK(first_wrong<double>(got.values, support::reference_forward(g, x.plain_reference(), old, {}, 7, 6), 7,
                              [&](int64_t i) { return g.expert_of(i / 7) >= 0; }) == "");
}

TEST_CASE("any number of blocks gives the same bits")
{
    FASTMOE_SEEDED(r, 44);
    const ragged g = ragged::of(r, {130, 3, 0, 260, 50}, 3);
    const int64_t in = 72, out = 1100; // more than a band of tiles
    const test_rows<bfloat16> x(r, g, in, support::start::aligned);
    test_weights<bfloat16> w(weight_storage::transposed, g.experts(), out, in, support::start::aligned);
    w.fill(r);
    const fm::weight_view<const bfloat16> weights = w.view();
    const auto values = [&](int64_t blocks) {
        lane_blocks ex(blocks);
        const auto got = rows_outcome<float>(ex, g, out, [&](auto y, const auto& epilogue, fm::arena& memory) {
            fm::gemm::portable{}.forward(ex, g.view(), x.plain(), weights, fm::matrix_view<const float>{}, y, epilogue, memory);
        });
        CHECK(got.complaint == "");
        return got.values;
    };
    const auto one = values(1);
    const auto old = [&](int64_t e, int64_t o, int64_t i) { return w(e, o, i); };
    CHECK(first_wrong<float>(one, support::reference_forward(g, x.plain_reference(), old, {}, out, in), in + 1,
                             [&](int64_t i) { return g.expert_of(i / out) >= 0; }) == "");
    for (const int64_t blocks : {2, 7, 1000}) CHECK(support::same_bits(values(blocks), one));
}

TEST_CASE("a group that lies elsewhere is a fault of wgrad, and forward writes no row outside of S")
{
    FASTMOE_SEEDED(r, 45);
    const ragged inside = ragged::of(r, {20, 30}, 0);
    const test_rows<bfloat16> x(r, inside, 16), dy(r, inside, 24);
    test_weights<bfloat16> w(weight_storage::stacked, 2, 24, 16);
    w.fill(r);
    const fm::weight_view<const bfloat16> weights = w.view();
    std::vector<float> bias(48);
    for (const int64_t wrong : {int64_t{-7}, inside.slots - 5, inside.slots + 5, INT64_MAX - 3, INT64_MIN}) {
        CAPTURE(wrong);
        lane_blocks ex;
        ragged g = inside;
        g.offsets[1] = wrong;
        support::guarded<bfloat16> y(g.slots, 24, 1);
        support::in_workspace(ex, [&](fm::arena& memory) {
            fm::gemm::portable{}.forward(ex, g.view(), x.plain(), weights, fm::matrix_view<const float>(bias.data(), 2, 24), y.view(),
                                         fm::no_epilogue{}, memory);
        });
        CHECK(y.damage() == "");
        std::vector<float> dw(2 * 24 * 16);
        CHECK_THROWS_WITH_AS(support::in_workspace(ex, [&](fm::arena& memory) {
            fm::gemm::portable{}.wgrad(ex, g.view(), dy.plain(), x.plain(), fm::stacked(fm::tensor_view<float, 3>(dw.data(), 2, 24, 16)),
                                       fm::write_mode::overwrite, memory);
            ex.synchronize();
        }), doctest::Contains("1"), fm::invalid_argument);
    }
}

#endif
