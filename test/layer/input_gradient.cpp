// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The input's gradient at every width and place in memory: rows in whole lines of 16 bytes, and rows that are not.
#include <doctest/doctest.h>

#include <fastmoe/layer/moe_layer.hpp>

#include "support/compare.hpp"
#include "support/poison.hpp"
#include "support/scratch.hpp"
#include "support/warps.hpp"

using namespace fastmoe;

namespace {

/// A row functor of the parts that finish() adds.
template <class Finish, class Real>
struct finish_all {
    Finish finish;
    matrix_view<const Real> sums; // (T,D), or without memory

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t) const
    {
        finish(team, t, sums.data_handle() ? sums.data_handle() + t * sums.extent(1) : nullptr);
    }
};

struct options {
    int64_t width, k, skew;
    bool router;
    double epsilon;
    write_mode mode;
};

template <class T, class Row, class Executor>
void check(Executor& ex, support::random& r, const options& o)
{
    using real = accumulate_t<T>;
    constexpr int64_t tokens = 2;
    const int64_t width = o.width, slots = 2 * tokens * o.k;
    INFO("width ", width, ", k ", o.k, ", skew ", o.skew, ", router ", o.router, ", epsilon ", o.epsilon, ", mode ", int(o.mode));
    support::guarded<Row> rows(slots, width, o.skew); // NaN where nobody chose
    support::guarded<real> sums(tokens, width, o.skew);
    support::fill_normal(r, sums.view());
    std::vector<int32_t> slot_of;
    std::vector<real> weights(tokens * o.k, real(NAN)); // which play no part
    const auto order = r.permutation(slots);
    for (int64_t c = 0; c < tokens * o.k; ++c) {
        slot_of.push_back(r.coin(0.3) ? -1 : order[c]);
        for (int64_t d = 0; slot_of[c] >= 0 && d < width; ++d) rows.view()(slot_of[c], d) = support::narrow<Row>(r.normal());
    }
    std::vector<std::uint64_t> random{3, 8};
    const random_source source{random.data(), random_stream::jitter};
    const routing<real> route{tokens, slots, o.k, as_vector(slot_of), as_vector(weights), {}};
    std::vector<T> results[2];
    for (auto& result : results) {
        support::guarded<T> dx(tokens, width, o.skew);
        for (int64_t i = 0; o.mode == write_mode::accumulate && i < tokens * width; ++i) dx.data()[i] = T(real(0.5));
        using finish = detail::finish_input_gradient<T, Row, routing<real>>;
        const finish f{rows.view(), as_vector(slot_of), route, dx.view(), o.mode, source, 9, real(o.epsilon)};
        for_each_row(ex, tokens, finish_all<finish, real>{f, matrix_view<const real>(o.router ? sums.data() : nullptr, tokens, width)},
                     {.width = width});
        result = support::download(ex, dx.view());
        CHECK(dx.damage() == "");
    }
    std::vector<double> expected, magnitude;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t d = 0; d < width; ++d) {
            double sum = o.mode == write_mode::accumulate ? 0.5 : 0, size = sum;
            for (int64_t c = t * o.k; c < (t + 1) * o.k; ++c)
                if (slot_of[c] >= 0) {
                    sum += double(rows.view()(slot_of[c], d));
                    size += std::fabs(double(rows.view()(slot_of[c], d)));
                }
            if (o.router) {
                const double u = double(source.uniform<real>(static_cast<std::uint64_t>(9 + t * width + d)));
                const double part = double(sums.view()(t, d)) * (o.epsilon == 0 ? 1.0 : 1 - o.epsilon + 2 * o.epsilon * u);
                sum += part;
                size += std::fabs(part);
            }
            expected.push_back(sum);
            magnitude.push_back(size);
        }
    CHECK(support::close(results[0], expected, {.length = double(o.k + 8), .magnitudes = &magnitude}));
    CHECK(support::same_bits(results[1], results[0]));
}

} // namespace

TEST_CASE_TEMPLATE("the input's gradient is the sum of a token's rows and the router's part, dropped choices unread", Cell,
                   FASTMOE_CELLS_AND_WARPS)
{
    using T = typename Cell::type;
    FASTMOE_SEEDED(r, 611);
    FASTMOE_EXECUTOR(ex, Cell);
    for (const int64_t width : {1, 7, 8, 63, 64, 65, 72, 200, 1032, 2056})
        for (const int64_t skew : {0, 1})
            for (int64_t k = 1; k < 10; k += width > 1000 ? 4 : 1) {
                const auto mode = k % 2 ? write_mode::overwrite : write_mode::accumulate;
                check<T, T>(ex, r, {width, k, skew, k % 3 != 0, k % 3 == 1 ? 0.25 : 0.0, mode});
            }
}

TEST_CASE_TEMPLATE("so it is of rows in another type", Cell, FASTMOE_EXECUTORS_AND_WARPS)
{
    FASTMOE_SEEDED(r, 612);
    FASTMOE_EXECUTOR(ex, Cell);
    for (const int64_t width : {7, 64, 200, 1032})
        for (const int64_t skew : {0, 1}) {
            check<bfloat16, float>(ex, r, {width, 3, skew, true, 0.25, write_mode::overwrite});
            check<float, bfloat16>(ex, r, {width, 5, skew, true, 0.0, write_mode::accumulate});
        }
}
