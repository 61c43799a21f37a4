// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The three products on every executor, the GPU's among them; portable.cpp has the host's levels and threads.
#include "portable_cases.hpp"

namespace {

/// A product of rows on the cell's executor, against its sums in double.
template <class T, class Executor, class Multiply>
void check_on(Executor& ex, const ragged& g, int64_t width, int64_t depth, const product& expected, const Multiply& multiply)
{
    const auto got = rows_outcome<T>(ex, g, width, [&](auto y, const auto& epilogue, fm::arena& memory) { multiply(y, epilogue, memory); });
    CHECK(got.complaint == "");
    CHECK(first_wrong<fm::accumulate_t<T>>(got.values, expected, depth + 1, [&](int64_t i) { return g.expert_of(i / width) >= 0; }) == "");
}

} // namespace

TEST_CASE_TEMPLATE("forward, dgrad and wgrad are their sums on every executor, in place and through an index", Cell, FASTMOE_CELLS)
{
    using T = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(r, 17);
    const fm::gemm::portable gemm;
    for (const shape& c : shapes(r)) {
        if (!c.lanes) continue;
        const ragged g = ragged::of(r, c.counts, 3);
        const weight_storage storage = any_storage(r);
        INFO(text_of(g, c, storage));
        const test_rows<T> x(r, g, c.in), dy(r, g, c.out);
        test_weights<T> w(storage, g.experts(), c.out, c.in);
        w.fill(r);
        const fm::weight_view<const T> weights = w.view();
        const auto old = [&](int64_t e, int64_t o, int64_t i) { return w(e, o, i); };
        const std::vector<T> bias = support::normal_vector<T>(r, g.experts() * c.out);
        check_on<T>(ex, g, c.out, c.in, support::reference_forward(g, x.indexed_reference(), old, support::widened(bias), c.out, c.in),
                    [&](auto y, const auto& epilogue, fm::arena& memory) {
                        gemm.forward(ex, g.view(), x.indexed(), weights, fm::matrix_view<const T>(bias.data(), g.experts(), c.out), y, epilogue, memory);
                    });
        check_on<T>(ex, g, c.in, c.out, support::reference_dgrad(g, dy.plain_reference(), old, c.out, c.in),
                    [&](auto dx, const auto& epilogue, fm::arena& memory) { gemm.dgrad(ex, g.view(), dy.plain(), weights, dx, epilogue, memory); });
        const auto got = gradient_outcome<T>(ex, g, std::vector<T>{}, storage, c, [&](auto& e, const fm::weight_view<T>& dw, fm::arena& memory) {
            gemm.wgrad(e, g.view(), dy.indexed(), x.plain(), dw, fm::write_mode::overwrite, memory);
        });
        const product expected = support::reference_wgrad(g, dy.indexed_reference(), x.plain_reference(),
                                                          [](int64_t, int64_t, int64_t) { return 0.0; }, c.out, c.in);
        CHECK(first_wrong<fm::accumulate_t<T>>(got, expected, 32, [](int64_t) { return true; }) == "");
    }
}

TEST_CASE_TEMPLATE("an epilogue by itself is called once for every row of a group, and for no padding", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(r, 18);
    for (int i = 0; i < 5; ++i) {
        const ragged g = ragged::of(r, support::random_counts(r, r.integer(1, 6), 30), 3);
        const auto got = rows_outcome<float>(ex, g, 3, [&](fm::matrix_view<float> y, const auto& epilogue, fm::arena& memory) {
            if (memory.measuring()) return;
            for (int64_t s = 0; s < g.slots; ++s)
                for (int64_t j = 0; j < 3 && g.expert_of(s) >= 0; ++j) y(s, j) = static_cast<float>(s + j);
            using Epilogue = std::remove_cvref_t<decltype(epilogue)>;
            fm::for_each_row(ex, g.slots, fm::detail::portable::end_row<Epilogue>{g.view(), epilogue}, {.width = 3});
        });
        CHECK(got.complaint == "");
    }
}
