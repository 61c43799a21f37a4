// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include "support/compare.hpp"
#include "support/poison.hpp"
#include "support/routed.hpp"
#include "support/scratch.hpp"
#include "support/warps.hpp"

#include <fastmoe/ops/bucket.hpp>
#include <fastmoe/ops/reduce.hpp>

using namespace fastmoe;

namespace {

template <class Real>
struct by_slot {
    const Real* values; // (S)
    FASTMOE_HOST_DEVICE Real operator()(int64_t s) const { return values[s]; }
};

} // namespace

TEST_CASE_TEMPLATE("the sum over a group's rows is written or added, scaled, and zero for a group without rows", Cell,
                   FASTMOE_CELLS_AND_WARPS)
{
    using T = typename Cell::type;
    using real = accumulate_t<T>;
    FASTMOE_SEEDED(r, 73);
    FASTMOE_EXECUTOR(ex, Cell);
    for (int round = 0; round < 10; ++round) {
        const int64_t experts = r.integer(1, 9), width = r.integer(1, 200);
        support::routed<typename Cell::executor, T> in(
            ex, r, {.tokens = r.integer(0, 80), .experts = experts, .k = 1, .alignment = r.one_of<int64_t>(1, 8)});
        support::guarded<T> rows(in.plan.slots, width, 1);
        support::guarded<real> out(experts, width, 1);
        support::fill_normal(r, rows.view());
        auto scale = support::upload(ex, support::narrowed<real>(r.normals(in.plan.slots)));
        std::vector<double> expected(experts * width), magnitude(experts * width);
        for (int64_t e = 0; e < experts; ++e)
            for (int64_t s = in.plan.offsets(e); s < in.plan.offsets(e) + in.plan.counts(e); ++s)
                for (int64_t d = 0; d < width; ++d) {
                    const double term = double(scale.data()[s]) * double(rows.view()(s, d));
                    expected[e * width + d] += 2 * term;
                    magnitude[e * width + d] += 2 * std::fabs(term);
                }
        for (const auto mode : {write_mode::overwrite, write_mode::accumulate})
            sum_groups(ex, plain_rows<T>{rows.view()}, in.plan.counts, in.plan.offsets, by_slot<real>{scale.data()}, out.view(), mode);
        ex.synchronize();
        CHECK(support::close(out.view(), expected, {.length = 100, .magnitudes = &magnitude}));
        CHECK(out.damage() == "");
    }
}

TEST_CASE_TEMPLATE("a sum in float keeps every digit when it is added to an output in double, and one of doubles is double",
                   Cell, FASTMOE_EXECUTORS_AND_WARPS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    const std::vector<int32_t> counts{3};
    const std::vector<int64_t> offsets{0, 3};
    const std::vector<float> rows{0x1p-31f, 0x1p-32f, 0x1p-33f};
    std::vector<double> out{1.0};
    sum_groups(ex, plain_rows<float>{as_matrix(rows, 3, 1)}, as_vector(counts), as_vector(offsets), unit_scale<float>{},
               as_matrix(out, 1, 1), write_mode::accumulate);
    ex.synchronize();
    CHECK(out[0] == 1.0 + 0x1p-31 + 0x1p-32 + 0x1p-33);
    const std::vector<double> wide{1.0, 0x1p-40, 0x1p-41};
    sum_groups(ex, plain_rows<double>{as_matrix(wide, 3, 1)}, as_vector(counts), as_vector(offsets), unit_scale<float>{},
               as_matrix(out, 1, 1), write_mode::overwrite);
    ex.synchronize();
    CHECK(out[0] == 1.0 + 0x1p-40 + 0x1p-41);
}

TEST_CASE_TEMPLATE("a sum over rows that are not there is refused by name, and the group's sums are left alone", Cell,
                   FASTMOE_EXECUTORS_AND_WARPS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    const bool host = std::is_same_v<typename Cell::executor, host_executor>;
    std::vector<float> rows(4 * 70, 1.0f);
    const std::vector<int64_t> offsets{0, 2, 4};
    for (const int32_t count : {100000, 3, -1}) {
        const std::vector<int32_t> counts{2, count};
        support::guarded<float> out(2, 70);
        const std::string text = support::message_of<invalid_argument>([&] {
            sum_groups(ex, plain_rows<float>{as_matrix(rows, 4, 70)}, as_vector(counts), as_vector(offsets), unit_scale<float>{},
                       out.view(), write_mode::overwrite);
            ex.synchronize();
        });
        INFO(text);
        CHECK(support::has(text, host ? "expert 1" : "counts(1) is "));
        CHECK(support::poisoned(row(out.view(), 1)) == 70);
        CHECK(support::poisoned(row(out.view(), 0)) == (host ? 70 : 0));
        CHECK_NOTHROW(ex.synchronize());
    }
}

TEST_CASE_TEMPLATE("ranks count the earlier positions of the same id, by position and by column", Cell, FASTMOE_EXECUTORS_AND_WARPS)
{
    FASTMOE_SEEDED(r, 74);
    FASTMOE_EXECUTOR(ex, Cell);
    for (int round = 0; round < 20; ++round) {
        const int64_t rows = r.one_of<int64_t>(0, 1, 50, r.integer(2, 4000)), columns = r.integer(1, 5), ids = r.integer(1, 70);
        std::vector<int32_t> values(rows * columns);
        for (auto& v : values) v = static_cast<int32_t>(r.integer(-1, ids - 1));
        auto input = support::upload(ex, values);
        for (const auto order : {bucket_order::by_position, bucket_order::by_column}) {
            std::vector<int32_t> expected(values.size(), -1), counts(ids, 0);
            for (int64_t i = 0; i < rows * columns; ++i) {
                const int64_t at = order == bucket_order::by_position ? i : (i % rows) * columns + i / rows;
                if (values[at] >= 0) expected[at] = counts[values[at]]++;
            }
            support::guarded<int32_t> found_counts(ids), ranks(rows * columns);
            support::in_workspace(ex, [&](arena& memory) {
                bucket(ex, input.view(), found_counts.vector(), ranks.vector(), memory, order, columns);
            });
            ex.synchronize();
            CHECK(support::download(ex, found_counts.vector()) == counts);
            CHECK(support::download(ex, ranks.vector()) == expected);
            CHECK(ranks.damage() == "");
        }
    }
}
