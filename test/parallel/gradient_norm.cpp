// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The norm over all ranks, clipping, and the agreed skip of a step.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <fastmoe/parallel/gradient_norm.hpp>

#include "scene.hpp"
#include "support/executors.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
using fm::int64_t;
using fm::parameter_tag;

namespace {

using views = std::vector<fm::parameter_view>;

fm::vector_view<const fm::parameter_view> listed(const views& v) { return fm::as_vector(v); }

template <class G>
fm::parameter_view view_of(std::vector<G>& g, parameter_tag tag)
{
    return fm::as_parameter(fm::as_vector(g), fm::as_vector(g), tag);
}

constexpr double infinity = std::numeric_limits<double>::infinity();
constexpr double not_a_number = std::numeric_limits<double>::quiet_NaN();

} // namespace

TEST_CASE_TEMPLATE("the norm counts every parameter of the model once, on every grid, and is the same on all ranks to the bit",
                   Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_NEEDS(Cell);
    FASTMOE_SEEDED(rng, 511);
    for (int ranks : {1, 2, 3, 4, 8})
        for (const scene::grid g : scene::grids(ranks)) {
            if (std::is_same_v<typename Cell::executor, support::lanes> && ranks > 4) continue;
            const std::uint64_t seed = rng.bits();
            const scene::tokens all(rng, ranks);
            INFO("ranks ", ranks, ", columns ", g.columns);
            std::vector<double> norms(ranks);
            std::vector<std::vector<double>> squares(ranks); // of each rank's gradients, after synchronization
            std::vector<std::vector<scene::member>> lists(ranks);
            fm::run_ranks(ranks, [&](const fm::threads& world) {
                auto ex = Cell::make();
                const fm::threads data = g.data_of(world);
                const int r = world.rank();
                lists[r] = scene::members_of(seed, g, r);
                scene::gradients own(seed, g, all, r, lists[r]);
                const views list = own.views();
                fm::synchronize_gradients(ex, listed(list), world, data);
                support::in_workspace(ex, [&](fm::arena& scratch) {
                    norms[r] = fm::gradient_norm(ex, listed(list), world, data, scratch);
                });
                for (std::size_t p = 0; p < lists[r].size(); ++p) {
                    double sum = 0;
                    for (double v : own.widened(p)) sum += v * v;
                    squares[r].push_back(sum);
                }
            });
            // Dense ones from rank 0, experts from the first row.
            double expected = 0;
            for (int r = 0; r < g.columns; ++r)
                for (std::size_t p = 0; p < lists[r].size(); ++p)
                    if (r == 0 || lists[r][p].tag != parameter_tag::world) expected += squares[r][p];
            expected = std::sqrt(expected);
            CHECK(expected > 1);
            CHECK(support::close(norms, std::vector<double>(ranks, expected), {.length = 2000}));
            CHECK(support::same_bits(norms, std::vector<double>(ranks, norms[0])));
        }
}

TEST_CASE("threads do not change a bit of the norm, blocks of any number of elements count, and so do slices of an expert")
{
    FASTMOE_SEEDED(rng, 512);
    // An expert whose hidden width is cut over three ranks: what they have together has one norm.
    for (int64_t count : {int64_t{1}, fm::detail::norm_block - 1, fm::detail::norm_block, 5 * fm::detail::norm_block + 3}) {
        const std::vector<float> whole = support::normal_vector<float>(rng, count * 3);
        const std::vector<fm::bfloat16> dense = support::normal_vector<fm::bfloat16>(rng, count);
        double expected = 0;
        for (float v : whole) expected += double(v) * double(v);
        for (fm::bfloat16 v : dense) expected += double(v) * double(v);
        std::vector<double> first;
        for (int threads : {1, 2, 5}) {
            std::vector<double> norms(3);
            fm::run_ranks(3, [&](const fm::threads& c) {
                fm::host_executor ex({.threads = threads});
                std::vector<float> slice(whole.begin() + c.rank() * count, whole.begin() + (c.rank() + 1) * count);
                std::vector<fm::bfloat16> own = dense;
                const views list{view_of(slice, parameter_tag::none), view_of(own, parameter_tag::world)};
                norms[c.rank()] = fm::gradient_norm(ex, listed(list), c, fm::self{});
            });
            CHECK(support::close(norms, std::vector<double>(3, std::sqrt(expected)), {.length = double(4 * count)}));
            if (first.empty()) first = norms;
            CHECK(support::same_bits(norms, first));
            CHECK(support::same_bits(norms, std::vector<double>(3, norms[0])));
        }
    }
}

TEST_CASE("clipping scales by max_norm / (norm + 1e-6) what is above max_norm, and not a bit of what is not")
{
    FASTMOE_SEEDED(rng, 513);
    const std::vector<double> values = rng.normals(100);
    double norm = 0;
    for (double v : values) norm += 2 * v * v; // both ranks have their own
    norm = std::sqrt(norm);
    for (double most : {norm * 0.5, norm * 0.999, norm * 1.001, 1e30, infinity}) {
        fm::run_ranks(2, [&](const fm::threads& c) {
            fm::host_executor ex({.threads = 2});
            std::vector<double> g = values;
            std::vector<fm::half> small(7, fm::half(0.f));
            const views list{view_of(g, parameter_tag::none), view_of(small, parameter_tag::world)};
            double was = 0;
            support::in_workspace(ex, [&](fm::arena& scratch) {
                was = fm::clip_gradients(ex, listed(list), c, fm::self{}, most, scratch);
            });
            CHECK(support::close(std::vector<double>{was}, {norm}, {.length = 300}));
            if (norm <= most) {
                CHECK(support::same_bits(g, values));
                return;
            }
            std::vector<double> expected;
            for (double v : values) expected.push_back(v * (most / (norm + 1e-6)));
            CHECK(support::close(g, expected, {.length = 300}));
            CHECK(fm::gradient_norm(ex, listed(list), c, fm::self{}) <= most);
        });
    }
}

TEST_CASE("a norm that is not finite scales nothing, on no rank, and is returned as it is on all of them")
{
    for (const double bad : {infinity, -infinity, not_a_number}) {
        fm::run_ranks(3, [&](const fm::threads& c) {
            fm::host_executor ex({.threads = 1});
            std::vector<float> g(20, 5.f);
            if (c.rank() == 1) g[13] = static_cast<float>(bad);
            const std::vector<float> before = g;
            const views list{view_of(g, parameter_tag::none)};
            const double norm = fm::clip_gradients(ex, listed(list), c, fm::self{}, 1.0);
            CHECK(std::isnan(norm) == std::isnan(bad));
            CHECK(!std::isfinite(norm));
            CHECK(support::same_bits(g, before));
        });
    }
}

TEST_CASE("ranks that clip differently, or by different lists, are an error on all of them")
{
    for (int fault : {0, 1}) {
        std::vector<std::string> said(3);
        fm::run_ranks(3, [&](const fm::threads& c) {
            fm::host_executor ex({.threads = 1});
            std::vector<float> g(fault == 0 && c.rank() == 2 ? 6 : 5, 1.f);
            const views list{view_of(g, parameter_tag::world)};
            const double most = fault == 1 && c.rank() == 2 ? 0.5 : 0.25;
            said[c.rank()] = support::message_of<fm::comm_error>(
                [&] { fm::clip_gradients(ex, listed(list), c, fm::self{}, most); });
            CHECK_EQ(g[0], 1.f);
        });
        for (const std::string& text : said) CHECK_MESSAGE(support::has(text, "of rank 2 is"), text);
    }
    fm::host_executor ex({.threads = 1});
    for (double most : {0.0, -1.0, not_a_number}) {
        const std::string text = support::message_of<fm::invalid_argument>(
            [&] { fm::clip_gradients(ex, fm::vector_view<const fm::parameter_view>(), fm::self{}, fm::self{}, most); });
        CHECK_MESSAGE(support::has(text, "max_norm is"), text);
    }
}

TEST_CASE_TEMPLATE("one number that is not finite, anywhere, is what all ranks hear of", Cell, FASTMOE_CELLS)
{
    FASTMOE_NEEDS(Cell);
    using G = typename Cell::type;
    FASTMOE_SEEDED(rng, 514);
    const double largest = std::is_same_v<G, fm::half> ? 65504 : 3e38;
    for (const double bad : {0.0, infinity, -infinity, not_a_number, largest, -largest}) {
        const int ranks = 3;
        const auto where = static_cast<int>(rng.integer(0, ranks - 1));
        const bool large = std::is_same_v<typename Cell::executor, fm::host_executor>;
        const int64_t count = large ? 2 * fm::detail::norm_block + 17 : 40, at = rng.integer(0, count - 1);
        std::vector<int> answers(ranks, -1);
        fm::run_ranks(ranks, [&](const fm::threads& c) {
            auto ex = Cell::make();
            // Lists may differ: a rank of a pipeline has other parameters.
            std::vector<std::vector<G>> own(static_cast<std::size_t>(c.rank() + 1), std::vector<G>(count, support::narrow<G>(0.5)));
            if (c.rank() == where) own.back()[at] = support::narrow<G>(bad);
            views list;
            for (auto& g : own) list.push_back(view_of(g, parameter_tag::world));
            support::in_workspace(ex, [&](fm::arena& scratch) { answers[c.rank()] = fm::all_finite(ex, listed(list), c, scratch); });
        });
        CHECK(answers == std::vector<int>(ranks, std::isfinite(bad)));
    }
    auto ex = Cell::make();
    CHECK(fm::all_finite(ex, fm::vector_view<const fm::parameter_view>(), fm::self{}));
}

TEST_CASE("a scaler of fp16 gradients skips a step on all ranks or on none, and finds a scale that fits")
{
    // What a training loop does: multiply the loss, look before the step, halve and skip where it was too much.
    const int ranks = 4;
    std::vector<std::vector<float>> weights(ranks);
    std::vector<std::vector<double>> scales(ranks);
    fm::run_ranks(ranks, [&](const fm::threads& c) {
        fm::host_executor ex({.threads = 1});
        const int64_t n = 64;
        std::vector<float> w(n, 1.f);
        double scale = 1 << 20;
        for (int step = 0; step < 12; ++step) {
            std::vector<fm::half> g(n);
            // Rank 2 alone has gradients that overflow at first.
            for (int64_t i = 0; i < n; ++i)
                g[i] = support::narrow<fm::half>(scale * (c.rank() == 2 ? 0.9 : 0.001) * (i % 7 == 3));
            const views list{view_of(g, parameter_tag::world)};
            scales[c.rank()].push_back(scale);
            if (!fm::all_finite(ex, listed(list), c)) {
                scale /= 2;
                continue;
            }
            fm::synchronize_gradients(ex, listed(list), c, fm::self{}, {.accumulate = fm::gradient_accumulation::float32});
            if (!fm::all_finite(ex, listed(list), c)) { // the sum may overflow where no part of it did
                scale /= 2;
                continue;
            }
            for (int64_t i = 0; i < n; ++i) w[i] -= static_cast<float>(0.1 / scale) * static_cast<float>(g[i]);
        }
        weights[c.rank()] = w;
    });
    for (int r = 1; r < ranks; ++r) {
        CHECK(scales[r] == scales[0]);
        CHECK(weights[r] == weights[0]);
    }
    CHECK_EQ(scales[0].back(), double(1 << 16)); // 2^16 * 0.9 is below 65504, 2^17 * 0.9 is not; so are the sums
    CHECK(weights[0][3] < 0.5f);                 // eight steps of 0.1 * 0.903
    CHECK(std::isfinite(weights[0][3]));
}
