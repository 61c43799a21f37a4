// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Rows, outputs and weights whose elements 32 bits cannot count: each product touches the far end of one of them.
#include <doctest/doctest.h>

#include <vector>

#include <fastmoe/gemm/portable.hpp>

#include "support/executors.hpp"
#include "support/scratch.hpp"
#include "support/sparse.hpp"

using namespace fastmoe;
using support::huge_cols;
using support::huge_rows;

namespace {

constexpr int64_t last = huge_rows - 1;

/// One expert whose only row is the last one.
struct last_row {
    std::vector<int32_t> counts{1};
    std::vector<int64_t> offsets{last, huge_rows};
    row_groups view() const { return {as_vector(counts), as_vector(offsets), huge_rows}; }
};

/// The verb on the host. On lanes its functor for the last row: a loop over all of them would take minutes.
template <class Rows>
void forward(host_executor& ex, const row_groups& groups, const Rows& x, const weight_view<const float>& w, matrix_view<float> y)
{
    support::in_workspace(ex, [&](arena& memory) {
        gemm::portable{}.forward(ex, groups, x, w, matrix_view<const float>{}, y, no_epilogue{}, memory);
    });
}
template <class Executor, class Rows>
void forward(Executor& ex, const row_groups& groups, const Rows& x, const weight_view<const float>& w, matrix_view<float> y)
{
    support::run_row(ex, detail::portable::multiply_row<Rows, float, float, float, no_epilogue>{groups, x, w, {}, y, {}}, last);
}

} // namespace

TEST_CASE_TEMPLATE("forward and wgrad read the last of rows that are huge, in place and through an index", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_HUGE(Cell, float, x);
    x(last, 0) = 2, x(last, huge_cols - 1) = 3;
    std::vector<float> w(huge_cols, 0.0f), y(huge_rows, -1.0f), dw(huge_cols, -1.0f), dy(huge_rows, 0.0f);
    w[0] = 10, w[huge_cols - 1] = 100, dy[last] = 5;
    const last_row groups;
    const auto check = [&](const auto& rows) {
        forward(ex, groups.view(), rows, single(matrix_view<const float>(w.data(), 1, huge_cols)), as_matrix(y, huge_rows, 1));
        CHECK(y[last] == 320);
        support::in_workspace(ex, [&](arena& memory) {
            gemm::portable{}.wgrad(ex, groups.view(), plain_rows<float>{as_matrix(dy, huge_rows, 1)}, rows,
                                   single(as_matrix(dw, 1, huge_cols)), write_mode::overwrite, memory);
        });
        ex.synchronize();
        CHECK(dw[0] == 10);
        CHECK(dw[1] == 0);
        CHECK(dw[huge_cols - 1] == 15);
        y[last] = dw[0] = dw[huge_cols - 1] = -1;
    };
    check(plain_rows<float>{x.view()});
    std::vector<int32_t> index(huge_rows, -1);
    index[last] = static_cast<int32_t>(last);
    check(indexed_rows<float>{x.view(), as_vector(index)});

    // As the left side of a weight gradient as well, of which each element is a row of its own on lanes.
    if (!std::is_same_v<typename Cell::executor, host_executor>) return;
    support::in_workspace(ex, [&](arena& memory) {
        gemm::portable{}.wgrad(ex, groups.view(), plain_rows<float>{x.view()}, plain_rows<float>{as_matrix(dy, huge_rows, 1)},
                               single(as_matrix(dw, huge_cols, 1)), write_mode::overwrite, memory);
    });
    CHECK(dw[0] == 10);
    CHECK(dw[huge_cols - 1] == 15);
}

TEST_CASE_TEMPLATE("forward and dgrad write the last of outputs that are huge", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_HUGE(Cell, float, y);
    std::vector<float> x(huge_rows, 0.0f), w(huge_cols, 0.0f);
    x[last] = 3, w[0] = 1, w[huge_cols - 1] = 2;
    const last_row groups;
    const plain_rows<float> rows{as_matrix(x, huge_rows, 1)};
    forward(ex, groups.view(), rows, single(matrix_view<const float>(w.data(), huge_cols, 1)), y.view());
    CHECK(y(last, 0) == 3);
    CHECK(y(last, huge_cols - 1) == 6);
    if (!std::is_same_v<typename Cell::executor, host_executor>) return; // one functor for both
    y(last, 0) = y(last, huge_cols - 1) = -1;
    support::in_workspace(ex, [&](arena& memory) {
        gemm::portable{}.dgrad(ex, groups.view(), rows, single(as_matrix(w, 1, huge_cols)), y.view(), no_epilogue{}, memory);
    });
    CHECK(y(last, 0) == 3);
    CHECK(y(last, huge_cols - 1) == 6);
}

TEST_CASE_TEMPLATE("the matrices of experts may lie further apart than 32 bits count, and so may their rows", Cell,
                   FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_HUGE(Cell, float, far);
    const std::vector<int32_t> counts{1, 1, 1};
    const std::vector<int64_t> offsets{0, 1, 2, 3};
    const row_groups groups{as_vector(counts), as_vector(offsets), 3};
    const std::vector<float> x{1, 1, 1}, dy{1, 0, 0, 2, 0, 4};
    // (3,2,1): experts, or the two rows of each, at both ends of the memory; and the same through pointers.
    const int64_t half = last * huge_cols / 2, whole = last * huge_cols;
    const std::vector<float*> pointers{far.data(), far.data() + half, far.data() + whole};
    for (const weight_view<float>& w :
         {weight_view<float>{far.data(), nullptr, 3, 2, 1, half, 1, 1}, weight_view<float>{far.data(), nullptr, 3, 2, 1, 1, whole, 1},
          weight_view<float>{far.data(), pointers.data(), 3, 2, 1, 0, 5, 1},
          weight_view<float>{far.data() + whole, nullptr, 3, 2, 1, -half, 1, 1}}) {
        support::in_workspace(ex, [&](arena& memory) {
            gemm::portable{}.wgrad(ex, groups, plain_rows<float>{as_matrix(dy, 3, 2)}, plain_rows<float>{as_matrix(x, 3, 1)}, w,
                                   write_mode::overwrite, memory);
        });
        ex.synchronize();
        for (int64_t e = 0; e < 3; ++e)
            for (int64_t o = 0; o < 2; ++o) CHECK(w(e, o, 0) == dy[2 * e + o]);
        std::vector<float> y(6, -1.0f);
        support::in_workspace(ex, [&](arena& memory) {
            gemm::portable{}.forward(ex, groups, plain_rows<float>{as_matrix(x, 3, 1)}, w, matrix_view<const float>{},
                                     as_matrix(y, 3, 2), no_epilogue{}, memory);
        });
        ex.synchronize();
        CHECK(y == dy);
    }
}
