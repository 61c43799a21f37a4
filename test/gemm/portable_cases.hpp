// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The products of gemm::portable against sums in double: shapes, storages, instruction sets, threads and lanes.
#pragma once

#include <doctest/doctest.h>

#include <cuda/std/atomic>

#include <fastmoe/gemm/portable.hpp>

#include "reference_gemm.hpp"
#include "support/executors.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;

namespace {

using fm::bfloat16;
using fm::int32_t;
using fm::int64_t;
using support::product;
using support::ragged;
using support::test_rows;
using support::test_weights;
using support::weight_storage;

template <class A, class B>
using total_t = std::conditional_t<std::is_same_v<A, double> || std::is_same_v<B, double>, double, float>;

/// Counts the calls of a row and remembers its expert and what stood at both ends of the row.
template <class Y>
struct record_row {
    fm::matrix_view<Y> y;
    int* calls;
    int64_t* experts;
    Y* ends; // (S,2)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t expert, int64_t row) const
    {
        if (team.lane() != 0) return;
        ::cuda::std::atomic_ref<int>(calls[row]).fetch_add(1);
        experts[row] = expert;
        if (y.extent(1) == 0) return;
        ends[2 * row] = y(row, 0);
        ends[2 * row + 1] = y(row, y.extent(1) - 1);
    }
};

/// All instruction sets of this machine.
[[maybe_unused]] std::vector<fm::instruction_set> levels()
{
    std::vector<fm::instruction_set> out;
    for (int i = 0; i <= static_cast<int>(fm::native_instruction_set()); ++i) out.push_back(static_cast<fm::instruction_set>(i));
    return out;
}

/// One output, in memory that a verb has written.
template <class T>
struct outcome {
    std::vector<T> values;
    std::string complaint;
};

/// Runs a product of rows into a guarded, poisoned y and looks at everything but the numbers.
template <class Y, class Executor, class Multiply>
outcome<Y> rows_outcome(Executor& ex, const ragged& g, int64_t width, const Multiply& multiply, support::start begin = support::start::odd)
{
    support::guarded<Y> y(g.slots, width, begin == support::start::odd ? 1 : 0);
    std::vector<int> calls(g.slots);
    std::vector<int64_t> experts(g.slots, -1);
    std::vector<Y> ends(2 * g.slots);
    const record_row<Y> record{y.view(), calls.data(), experts.data(), ends.data()};
    support::in_workspace(ex, [&](fm::arena& memory) {
        multiply(y.view(), record, memory);
        CHECK(memory.used() == 0);
        ex.synchronize();
    });
    outcome<Y> out{std::vector<Y>(y.data(), y.data() + g.slots * width), y.damage()};
    for (int64_t s = 0; s < g.slots; ++s) {
        const int64_t e = g.expert_of(s);
        const std::string where = "row " + std::to_string(s) + ": ";
        if (calls[s] != (e >= 0)) out.complaint = where + std::to_string(calls[s]) + " calls of the epilogue";
        if (experts[s] != e) out.complaint = where + "the epilogue got expert " + std::to_string(experts[s]);
        const Y* here = y.data() + s * width;
        if (e < 0 && support::poisoned(fm::vector_view<Y>(const_cast<Y*>(here), width)) != width)
            out.complaint = where + "padding was written";
        if (e >= 0 && width > 0 && std::memcmp(&ends[2 * s], here, sizeof(Y)) != 0) out.complaint = where + "an early epilogue";
        if (e >= 0 && width > 0 && std::memcmp(&ends[2 * s + 1], here + width - 1, sizeof(Y)) != 0)
            out.complaint = where + "an early epilogue";
    }
    return out;
}

/// The first element that is further from the oracle than its sum explains.
template <class Real, class T, class Inside>
std::string first_wrong(const std::vector<T>& actual, const product& expected, int64_t length, const Inside& inside)
{
    for (std::size_t i = 0; i < actual.size(); ++i)
        if (inside(static_cast<int64_t>(i)) && !support::near<Real>(actual[i], expected.value[i], expected.magnitude[i], length))
            return "element " + std::to_string(i) + " is " + std::to_string(static_cast<double>(actual[i])) + ", expected " +
                   std::to_string(expected.value[i]);
    return "";
}

/// On every level, with 1, 2 and 4 threads, and on lanes if the product is small: right, and the same bits a level.
template <class Real, class Y, class Multiply>
void check_rows(const ragged& g, int64_t width, int64_t depth, const product& expected, bool lanes, const Multiply& multiply)
{
    const auto inside = [&](int64_t i) { return g.expert_of(i / width) >= 0; };
    for (const fm::instruction_set level : levels()) {
        CAPTURE(static_cast<int>(level));
        std::vector<Y> first;
        for (const int threads : {1, 2, 4}) {
            CAPTURE(threads);
            fm::host_executor ex({.threads = threads, .best = level});
            const auto got = rows_outcome<Y>(ex, g, width, [&](auto y, const auto& epilogue, fm::arena& memory) {
                multiply(ex, y, epilogue, memory);
            });
            CHECK(got.complaint == "");
            if (threads == 1) {
                first = got.values;
                CHECK(first_wrong<Real>(first, expected, depth + 1, inside) == "");
            } else {
                CHECK(support::same_bits(got.values, first));
            }
        }
    }
    if (!lanes) return;
    support::lanes ex;
    const auto got = rows_outcome<Y>(ex, g, width, [&](auto y, const auto& epilogue, fm::arena& memory) {
        multiply(ex, y, epilogue, memory);
    });
    CHECK(got.complaint == "");
    CHECK(first_wrong<Real>(got.values, expected, depth + 1, inside) == "");
}

struct shape {
    std::vector<int32_t> counts;
    int64_t out, in;
    bool lanes = false; ///< small enough for four real threads a row
};

std::string text_of(const ragged& g, const shape& c, weight_storage storage)
{
    return std::to_string(g.experts()) + " experts, " + std::to_string(g.slots) + " rows, out " + std::to_string(c.out) + ", in " +
           std::to_string(c.in) + ", storage " + std::to_string(static_cast<int>(storage));
}

/// X, W, bias and Y.
template <class X_, class W_, class B_, class Y_>
struct types {
    using X = X_;
    using W = W_;
    using B = B_;
    using Y = Y_;
    using Real = total_t<X, W>;
};

template <class Types>
void check_forward(support::random& r, const shape& c, weight_storage storage)
{
    using W = typename Types::W;
    using B = typename Types::B;
    using Y = typename Types::Y;
    const ragged g = ragged::of(r, c.counts, 3);
    INFO(text_of(g, c, storage));
    const test_rows<typename Types::X> x(r, g, c.in);
    test_weights<W> w(storage, g.experts(), c.out, c.in);
    w.fill(r);
    const fm::weight_view<const W> weights = w.view();
    std::vector<B> bias = support::normal_vector<B>(r, g.experts() * c.out);
    const auto bias_view = fm::matrix_view<const B>(bias.data(), g.experts(), c.out);
    const auto old = [&](int64_t e, int64_t o, int64_t i) { return w(e, o, i); };
    const fm::gemm::portable gemm;
    {
        const product expected = support::reference_forward(g, x.plain_reference(), old, support::widened(bias), c.out, c.in);
        check_rows<typename Types::Real, Y>(g, c.out, c.in, expected, c.lanes, [&](auto& ex, auto y, auto& epilogue, auto& memory) {
            gemm.forward(ex, g.view(), x.plain(), weights, bias_view, y, epilogue, memory);
        });
    }
    const product expected = support::reference_forward(g, x.indexed_reference(), old, {}, c.out, c.in);
    check_rows<typename Types::Real, Y>(g, c.out, c.in, expected, c.lanes, [&](auto& ex, auto y, auto& epilogue, auto& memory) {
        gemm.forward(ex, g.view(), x.indexed(), weights, fm::matrix_view<const B>{}, y, epilogue, memory);
    });
}

template <class Types>
void check_dgrad(support::random& r, const shape& c, weight_storage storage)
{
    using W = typename Types::W;
    using Y = typename Types::Y;
    const ragged g = ragged::of(r, c.counts, 3);
    INFO(text_of(g, c, storage));
    const test_rows<typename Types::X> dy(r, g, c.out);
    test_weights<W> w(storage, g.experts(), c.out, c.in);
    w.fill(r);
    const fm::weight_view<const W> weights = w.view();
    const auto old = [&](int64_t e, int64_t o, int64_t i) { return w(e, o, i); };
    const fm::gemm::portable gemm;
    {
        const product expected = support::reference_dgrad(g, dy.plain_reference(), old, c.out, c.in);
        check_rows<typename Types::Real, Y>(g, c.in, c.out, expected, c.lanes, [&](auto& ex, auto dx, auto& epilogue, auto& memory) {
            gemm.dgrad(ex, g.view(), dy.plain(), weights, dx, epilogue, memory);
        });
    }
    const product expected = support::reference_dgrad(g, dy.indexed_reference(), old, c.out, c.in);
    check_rows<typename Types::Real, Y>(g, c.in, c.out, expected, c.lanes, [&](auto& ex, auto dx, auto& epilogue, auto& memory) {
        gemm.dgrad(ex, g.view(), dy.indexed(), weights, dx, epilogue, memory);
    });
}

template <class Real, class G, class Executor, class Multiply>
std::vector<G> gradient_outcome(Executor& ex, const ragged& g, const std::vector<G>& before, weight_storage storage,
                                const shape& c, const Multiply& multiply, support::start begin = support::start::odd)
{
    test_weights<G> dw(storage, g.experts(), c.out, c.in, begin);
    for (int64_t e = 0, at = 0; e < g.experts() && !before.empty(); ++e)
        for (int64_t o = 0; o < c.out; ++o)
            for (int64_t i = 0; i < c.in; ++i) dw.view()(e, o, i) = before[at++];
    support::in_workspace(ex, [&](fm::arena& memory) {
        multiply(ex, dw.view(), memory);
        ex.synchronize();
    });
    CHECK(dw.accounted() == static_cast<int64_t>(dw.memory().size()));
    std::vector<G> out;
    for (int64_t e = 0; e < g.experts(); ++e)
        for (int64_t o = 0; o < c.out; ++o)
            for (int64_t i = 0; i < c.in; ++i) out.push_back(dw.view()(e, o, i));
    return out;
}

template <class Dy, class X, class G, class DyRows, class XRows>
void check_gradient(const shape& c, const ragged& g, weight_storage storage, fm::write_mode mode, const std::vector<G>& before,
                    const DyRows& dy, const XRows& x, const product& expected)
{
    using Real = total_t<Dy, X>;
    const fm::gemm::portable gemm;
    const auto multiply = [&](auto& ex, const fm::weight_view<G>& dw, fm::arena& memory) {
        gemm.wgrad(ex, g.view(), dy, x, dw, mode, memory);
    };
    int64_t depth = 1;
    for (int32_t n : c.counts) depth = std::max<int64_t>(depth, n + 1);
    const auto all = [](int64_t) { return true; };
    const auto check_empty = [&](const std::vector<G>& got) { // exact zeros, or exactly what was there
        for (int64_t e = 0; e < g.experts(); ++e) {
            if (c.counts[e] > 0) continue;
            const auto begin = e * c.out * c.in, end = begin + c.out * c.in;
            const std::vector<G> had(before.begin() + begin, before.begin() + end), zeros(end - begin, G(0.0f));
            CHECK(support::same_bits(std::vector<G>(got.begin() + begin, got.begin() + end),
                                     mode == fm::write_mode::accumulate ? had : zeros));
        }
    };
    const auto start = mode == fm::write_mode::accumulate ? before : std::vector<G>{};
    for (const fm::instruction_set level : levels()) {
        CAPTURE(static_cast<int>(level));
        std::vector<G> first;
        for (const int threads : {1, 2, 4}) {
            CAPTURE(threads);
            fm::host_executor ex({.threads = threads, .best = level});
            const auto got = gradient_outcome<Real>(ex, g, start, storage, c, multiply);
            if (threads == 1) {
                first = got;
                CHECK(first_wrong<Real>(first, expected, depth, all) == "");
                check_empty(first);
            } else {
                CHECK(support::same_bits(got, first));
            }
        }
    }
    if (!c.lanes) return;
    support::lanes ex;
    const auto got = gradient_outcome<Real>(ex, g, start, storage, c, multiply);
    CHECK(first_wrong<Real>(got, expected, depth, all) == "");
    check_empty(got);
}

template <class Dy, class X, class G>
void check_wgrad(support::random& r, const shape& c, weight_storage storage)
{
    const ragged g = ragged::of(r, c.counts, 3);
    INFO(text_of(g, c, storage));
    const test_rows<Dy> dy(r, g, c.out);
    const test_rows<X> x(r, g, c.in);
    const std::vector<G> before = support::normal_vector<G>(r, g.experts() * c.out * c.in);
    const std::vector<double> wide = support::widened(before);
    {
        const product expected = support::reference_wgrad(g, dy.plain_reference(), x.indexed_reference(),
                                                          [](int64_t, int64_t, int64_t) { return 0.0; }, c.out, c.in);
        check_gradient<Dy, X>(c, g, storage, fm::write_mode::overwrite, before, dy.plain(), x.indexed(), expected);
    }
    const product expected = support::reference_wgrad(
        g, dy.indexed_reference(), x.plain_reference(),
        [&](int64_t e, int64_t o, int64_t i) { return wide[(e * c.out + o) * c.in + i]; }, c.out, c.in);
    check_gradient<Dy, X>(c, g, storage, fm::write_mode::accumulate, before, dy.indexed(), x.plain(), expected);
}

/// Shapes around the sizes at which something is cut: lanes, tiles, panels, blocks of rows, columns and depth.
[[maybe_unused]] std::vector<shape> shapes(support::random& r)
{
    std::vector<shape> out;
    for (int i = 0; i < 3; ++i)
        out.push_back({support::random_counts(r, r.integer(1, 6), 30), r.integer(1, 40), r.integer(1, 40), true});
    out.push_back({{3, 0, 17}, 1, 1, true});
    out.push_back({{0, 5}, 9, 0, true});
    out.push_back({{4, 12}, 0, 9, true});
    out.push_back({{0, 0, 0}, 7, 5, true});
    out.push_back({{}, 7, 5, true});
    out.push_back({support::random_counts(r, 3, 300), r.integer(49, 70), r.integer(49, 70)});
    out.push_back({{9, 0, 1, 66}, r.integer(385, 420), r.integer(20, 40)});
    out.push_back({{8, 3, 21}, r.integer(20, 40), r.integer(520, 560)});
    out.push_back({{2, 16}, r.integer(5, 12), r.integer(2060, 2100)});
    out.push_back({{2, 16}, r.integer(530, 560), r.integer(5, 12)});
    std::vector<int32_t> many(300);
    many[7] = 2, many[123] = 1, many[299] = 18;
    out.push_back({many, 5, 6});
    return out;
}

[[maybe_unused]] weight_storage any_storage(support::random& r)
{
    return r.one_of(weight_storage::stacked, weight_storage::padded, weight_storage::transposed, weight_storage::pointers);
}

} // namespace
