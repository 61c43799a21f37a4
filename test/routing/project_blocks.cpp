// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The router where blocks multiply, run without a GPU: its ways there against sums in double.
#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include <fastmoe/gemm/block_products.hpp>
#include <fastmoe/routing/project.hpp>

#include "support/compare.hpp"
#include "support/executors.hpp"
#include "support/fiber_blocks.hpp"
#include "support/poison.hpp"
#include "support/warps.hpp"

namespace fm = fastmoe;
using fm::bfloat16, fm::half, fm::int64_t, fm::write_mode;

namespace {

using numbers = std::vector<double>;
using lane_blocks = support::fiber_blocks<support::lanes>; ///< teams are one lane
using warp_blocks = support::fiber_blocks<support::warps>; ///< teams are a GPU's

template <class Executor, class T>
struct on {
    using executor = Executor;
    using type = T;
};

struct shape {
    int64_t tokens, experts, width;
};

/// Where teams are of fibers there are fewer of them: each lane of theirs costs a turn.
template <class Executor>
std::vector<shape> shapes(support::random& r)
{
    std::vector<shape> out;
    for (const int64_t tokens : {0, 1, 31, 32, 33})
        for (const int64_t experts : {1, 8, 60, 64, 130}) out.push_back({tokens, experts, r.one_of(1, 17, 64, 129, 136)});
    if (std::is_same_v<Executor, warp_blocks>) return {{0, 8, 16}, {1, 60, 33}, {33, 130, 17}, {1025, 9, 24}};
    for (const int64_t tokens : {511, 513, 2049})
        for (const int64_t experts : {1, 8, 60}) out.push_back({tokens, experts, r.one_of(8, 17, 130)});
    out.push_back({2049, 130, 33});
    return out;
}

/// A call on a poisoned workspace of exactly what it asks for, and once more on one that is a byte too small.
template <class Executor, class Call>
void with_exact_scratch(Executor& ex, const Call& call)
{
    fm::arena query;
    call(query);
    fm::buffer<std::byte, Executor> lent(ex, query.bytes());
    support::poison(lent.view());
    fm::arena scratch(lent.view());
    call(scratch);
    ex.synchronize();
    CHECK_EQ(scratch.used(), 0);
    if (query.bytes() == 0) return;
    fm::arena little(fm::slice(lent.view(), 0, query.bytes() - 1));
    CHECK_THROWS_AS(call(little), fm::out_of_memory);
}

/// A matrix that may lie anywhere.
template <class T>
struct input {
    support::guarded<T> memory;

    input(support::random& r, int64_t rows, int64_t columns, int64_t skew, double deviation = 1) : memory(rows, columns, skew)
    {
        support::fill_normal(r, memory.view(), deviation);
    }
    double operator()(int64_t i, int64_t j) { return static_cast<double>(memory.view()(i, j)); }
    fm::matrix_view<const T> view() { return memory.view(); }
    void fill_row(int64_t i, double v)
    {
        for (int64_t j = 0; j < memory.view().extent(1); ++j) memory.view()(i, j) = support::narrow<T>(v);
    }
};

/// What a product should be, and the sum of its absolute terms, which its error is relative to.
struct sums {
    numbers value, magnitude;

    explicit sums(numbers start) : value(start), magnitude(std::move(start))
    {
        for (double& v : magnitude) v = std::fabs(v);
    }
    void add(int64_t at, double term)
    {
        value[at] += term;
        magnitude[at] += std::fabs(term);
    }
};

/// Logits' gradients, tokens of all magnitudes, and some that chose nothing, whose x is NaN.
template <class T>
struct scene {
    using real = fm::accumulate_t<T>;
    shape of;
    input<real> dlogits;
    input<T> x, gate;
    std::vector<bool> absent;

    scene(support::random& r, const shape& s, int64_t skew)
        : of(s), dlogits(r, s.tokens, s.experts, skew), x(r, s.tokens, s.width, skew), gate(r, s.experts, s.width, skew), absent(s.tokens)
    {
        for (int64_t t = 0; t < s.tokens; ++t) {
            absent[t] = r.coin(0.2);
            if (!absent[t]) continue;
            dlogits.fill_row(t, t % 2 == 0 ? 0.0 : -0.0);
            x.fill_row(t, std::numeric_limits<double>::quiet_NaN());
        }
    }
};

template <class T, class Executor>
void check_weights(support::random& r, const shape& s, int64_t skew, write_mode mode, bool with_bias, Executor& ex)
{
    using real = fm::accumulate_t<T>;
    CAPTURE(s.tokens);
    CAPTURE(s.experts);
    CAPTURE(s.width);
    CAPTURE(skew);
    const bool adds = mode == write_mode::accumulate;
    scene<T> in(r, s, skew);
    support::guarded<real> dw(s.experts, s.width, skew), db(1, s.experts, skew);
    sums w(numbers(s.experts * s.width)), b(numbers(static_cast<std::size_t>(s.experts)));
    if (adds) w = sums(support::fill_normal(r, dw.view())), b = sums(support::fill_normal(r, db.view()));
    for (int64_t t = 0; t < s.tokens; ++t)
        for (int64_t e = 0; e < s.experts && !in.absent[t]; ++e) {
            b.add(e, in.dlogits(t, e));
            for (int64_t d = 0; d < s.width; ++d) w.add(e * s.width + d, in.dlogits(t, e) * in.x(t, d));
        }
    with_exact_scratch(ex, [&](fm::arena& scratch) {
        fm::project_weights_backward(ex, in.dlogits.view(), in.x.view(), dw.view(), with_bias ? db.vector() : fm::vector_view<real>{}, mode,
                                     scratch);
    });
    CHECK(support::close(dw.view(), w.value, {.length = double(s.tokens) + 3, .magnitudes = &w.magnitude}));
    if (with_bias) CHECK(support::close(db.vector(), b.value, {.length = double(s.tokens) + 3, .magnitudes = &b.magnitude}));
    else if (!adds) CHECK_EQ(support::poisoned(db.vector()), s.experts);
    CHECK_EQ(dw.damage() + db.damage(), "");
}

} // namespace

TEST_CASE_TEMPLATE("the weights' gradient in parts is dlogits^T x over the tokens that chose something, and the bias's its sum", Cell,
                   on<lane_blocks, float>, on<lane_blocks, bfloat16>, on<lane_blocks, half>,
                   on<lane_blocks, double>, on<warp_blocks, float>, on<warp_blocks, bfloat16>)
{
    using T = typename Cell::type;
    FASTMOE_SEEDED(r, 51);
    typename Cell::executor ex;
    for (const shape& s : shapes<typename Cell::executor>(r))
        check_weights<T>(r, s, r.integer(0, 1), r.one_of(write_mode::overwrite, write_mode::accumulate), r.coin(0.7), ex);
    check_weights<T>(r, {0, 9, 16}, 0, write_mode::overwrite, true, ex);
    check_weights<T>(r, {0, 9, 16}, 0, write_mode::accumulate, true, ex);
    CHECK(ex.bank_conflicts == 0);
}

TEST_CASE("a cut in depth has parts of enough tokens, has enough of them, and never fewer for more tokens")
{
    CHECK_EQ(fm::detail::depth_parts(0, 64, 512), 1);
    CHECK_EQ(fm::detail::depth_parts(1023, 1, 1), 1);
    CHECK_EQ(fm::detail::depth_parts(1024, 1, 1), 2);
    CHECK_EQ(fm::detail::depth_parts(32768, 256, 4096), 12); // 2 by 32 tiles
    CHECK_EQ(fm::detail::depth_parts(32768, 768, 4096), 4);
    CHECK_EQ(fm::detail::depth_parts(32768, 0, 4096), 1);
    for (const int64_t rows : {1, 130, 768})
        for (int64_t tokens = 1; tokens < 200000; tokens += 77)
            REQUIRE(fm::detail::depth_parts(tokens, rows, 300) <= fm::detail::depth_parts(tokens + 77, rows, 300));
    for (const int64_t parts : {1, 3, 64}) {
        const int64_t tokens = 64 * 512 + 13;
        std::vector<int32_t> counts(parts);
        std::vector<int64_t> offsets(parts + 1);
        for (int64_t p = 0; p < parts; ++p) fm::detail::cut_tokens{counts.data(), offsets.data(), parts, tokens}(p);
        CHECK_EQ(offsets[0], 0);
        CHECK_EQ(offsets[parts], tokens);
        for (int64_t p = 0; p < parts; ++p) {
            CHECK_EQ(offsets[p] + counts[p], offsets[p + 1]);
            CHECK(counts[p] >= 512);
        }
    }
}

TEST_CASE("the bits of the weights' gradient do not depend on the number of blocks")
{
    FASTMOE_SEEDED(r, 52);
    scene<float> in(r, {1600, 30, 40}, 0);
    const auto bits = [&](int64_t blocks) {
        lane_blocks ex(blocks);
        std::vector<float> out(30 * 40 + 30, 0.0f);
        fm::arena query;
        const auto call = [&](fm::arena& scratch) {
            fm::project_weights_backward(ex, in.dlogits.view(), in.x.view(), fm::matrix_view<float>(out.data(), 30, 40),
                                         fm::vector_view<float>(out.data() + 30 * 40, 30), write_mode::overwrite, scratch);
        };
        call(query);
        fm::buffer<std::byte, lane_blocks> lent(ex, query.bytes());
        fm::arena scratch(lent.view());
        call(scratch);
        return out;
    };
    const auto expected = bits(1);
    CHECK(support::same_bits(bits(1), expected));
    CHECK(support::same_bits(bits(5), expected));
}
