// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Dispatch, combine and sums over rows whose elements 32 bits cannot count: they find the last row.
#include <doctest/doctest.h>

#include <vector>

#include <fastmoe/transfer/combine.hpp>
#include <fastmoe/transfer/dispatch.hpp>

#include "support/executors.hpp"
#include "support/sparse.hpp"

using namespace fastmoe;
using support::huge_cols;
using support::huge_rows;
using support::run_row;

namespace {

constexpr int64_t last = huge_rows - 1;

} // namespace

TEST_CASE_TEMPLATE("combine and its weights' gradient read the last of huge rows", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_HUGE(Cell, float, rows);
    rows(last, 0) = 2, rows(last, huge_cols - 1) = 3, rows(0, 0) = 100;
    // One token, two choices: the last slot, and the first.
    std::vector<int32_t> experts{1, 0}, slot_of{static_cast<int32_t>(last), 0};
    std::vector<float> weights{0.5f, 1}, y(huge_cols, -1.0f), dy(huge_cols, 0.0f), dweights(2, -1.0f);
    dy[huge_cols - 1] = 10;
    const routing<float> route{1, 2, 2, as_vector(experts), as_vector(weights), {}};
    plan p;
    p.slot_of = as_vector(slot_of);
    p.tokens = 1;
    p.slots = huge_rows;
    combine(ex, rows.view(), route, p, as_matrix(y, 1, huge_cols));
    combine_weights_backward<typename Cell::executor, float>(ex, as_matrix(dy, 1, huge_cols), rows.view(), route, p, as_vector(dweights));
    ex.synchronize();
    CHECK(y[0] == 101);
    CHECK(y[1] == 0);
    CHECK(y[huge_cols - 1] == 1.5f);
    CHECK(dweights == std::vector<float>{30, 0});
}

TEST_CASE_TEMPLATE("dispatch and combine write the last of huge rows and outputs", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_HUGE(Cell, float, from);
    FASTMOE_HUGE(Cell, float, to);
    from(last, 0) = 2, from(last, huge_cols - 1) = 3;
    std::vector<int32_t> token_of(huge_rows, 0), slot_of(huge_rows, 0);
    token_of[last] = slot_of[last] = static_cast<int32_t>(last);
    const auto view = from.view();
    run_row(ex, detail::gather_rows<float, float, unit_scale<float>>{{view, as_vector(token_of)}, to.view(), {}}, last);
    CHECK(to(last, 0) == 2);
    CHECK(to(last, huge_cols - 1) == 3);
    to(last, 0) = to(last, huge_cols - 1) = -1;
    // Every token has one choice; the last one's stands in the last slot.
    std::vector<int32_t> experts(huge_rows, 0);
    std::vector<float> weights(huge_rows, 1.0f), products(huge_rows, -1.0f);
    const routing<float> route{huge_rows, 1, 1, as_vector(experts), as_vector(weights), {}};
    run_row(ex, detail::sum_row_lists<float, float, float, routing<float>, unit_scale<float>>{view, as_vector(slot_of), to.view(),
                                                                                             write_mode::overwrite, route, {}}, last);
    CHECK(to(last, 0) == 2);
    CHECK(to(last, huge_cols - 1) == 3);
    run_row(ex, detail::dot_row_lists<float, float, routing<float>>{view, view, as_vector(slot_of), as_vector(products), route}, last);
    CHECK(products[last] == 13);
}

TEST_CASE_TEMPLATE("a sum over the rows of a group reads the last of huge rows, and views of parts begin where they should", Cell,
                   FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_HUGE(Cell, float, rows);
    rows(last, 0) = 2, rows(last, huge_cols - 1) = 3, rows(last - 1, 0) = 5;
    const std::vector<int32_t> counts{2};
    const std::vector<int64_t> offsets{last - 1, huge_rows};
    std::vector<float> out(huge_cols, -1.0f);
    sum_groups(ex, plain_rows<float>{rows.view()}, as_vector(counts), as_vector(offsets), unit_scale<float>{},
               as_matrix(out, 1, huge_cols), write_mode::overwrite);
    ex.synchronize();
    CHECK(out[0] == 7);
    CHECK(out[huge_cols - 1] == 3);
    CHECK(row(rows.view(), last).data_handle() == &rows(last, 0));
    CHECK(slice_rows(rows.view(), last, 1).data_handle() == &rows(last, 0));
}
