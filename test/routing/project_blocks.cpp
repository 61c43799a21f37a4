// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The router where blocks multiply, run without a GPU: its ways there against sums in double.
#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include <fastmoe/gemm/block_products.hpp>
#include <fastmoe/routing/project.hpp>

#include "support/compare.hpp"
#include "support/executors.hpp"
#include "support/fiber_blocks.hpp"
#include "support/poison.hpp"
#include "support/exact_scratch.hpp"
#include "support/warps.hpp"

namespace fm = fastmoe;
using fm::bfloat16, fm::int64_t, fm::write_mode;

namespace {

using numbers = std::vector<double>;
using lane_blocks = support::fiber_blocks<support::lanes>; ///< teams are one lane
using warp_blocks = support::fiber_blocks<support::warps>; ///< teams are a GPU's


/// An executor for a device that turns out to have none.
struct without_blocks : lane_blocks {
    bool has_blocks() const { return false; }
};
static_assert(fm::runs_blocks<without_blocks> && !fm::always_runs_blocks<without_blocks>);

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
    support::with_exact_scratch(ex, [&](fm::arena& scratch) {
        fm::project_weights_backward(ex, in.dlogits.view(), in.x.view(), dw.view(), with_bias ? db.vector() : fm::vector_view<real>{}, mode,
                                     scratch);
    });
    CHECK(support::close(dw.view(), w.value, {.length = double(s.tokens) + 3, .magnitudes = &w.magnitude}));
    if (with_bias) CHECK(support::close(db.vector(), b.value, {.length = double(s.tokens) + 3, .magnitudes = &b.magnitude}));
    else if (!adds) CHECK_EQ(support::poisoned(db.vector()), s.experts);
    CHECK_EQ(dw.damage() + db.damage(), "");
}

/// Keeps a token's sums in float, and 7 where there are none.
template <class Real>
struct keep_sums {
    fm::matrix_view<Real> to;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t t, const Real* sums) const
    {
        const auto& self = *this;
        team.for_each(to.extent(1), [&self, t, sums](int64_t d) { self.to(t, d) = sums ? sums[d] : Real(7); });
    }
};

/// How the gradient of the input is taken: as one of two modes, or row by row.
enum class way { overwrite, accumulate, rows };

template <class T, class W, class Executor>
void check_input(support::random& r, const shape& s, int64_t skew, way how, Executor& ex)
{
    using real = fm::accumulate_t<T>;
    CAPTURE(s.tokens);
    CAPTURE(s.experts);
    CAPTURE(s.width);
    CAPTURE(skew);
    scene<W> in(r, s, skew);
    support::guarded<T> dx(s.tokens, s.width, skew);
    support::guarded<real> kept(s.tokens, s.width, skew);
    sums expected(how == way::accumulate ? support::fill_normal(r, dx.view()) : numbers(s.tokens * s.width));
    const auto before = std::vector<T>(dx.data(), dx.data() + s.tokens * s.width);
    for (int64_t t = 0; t < s.tokens; ++t)
        for (int64_t d = 0; d < s.width; ++d) {
            const int64_t at = t * s.width + d;
            if (in.absent[t] && how == way::rows) expected.add(at, 7);
            for (int64_t e = 0; e < s.experts && !in.absent[t]; ++e) expected.add(at, in.dlogits(t, e) * in.gate(e, d));
        }
    support::with_exact_scratch(ex, [&](fm::arena& scratch) {
        if (how != way::rows)
            return fm::project_input_backward(ex, in.dlogits.view(), in.gate.view(), dx.view(),
                                              how == way::overwrite ? write_mode::overwrite : write_mode::accumulate, scratch);
        fm::detail::with_scratch(scratch, [&](fm::arena& memory) {
            fm::detail::project_rows_backward(ex, in.dlogits.view(), in.gate.view(), keep_sums<real>{kept.view()}, memory);
        });
    });
    const support::tolerance bound{.length = double(s.experts) + 3, .magnitudes = &expected.magnitude};
    if (how == way::rows) CHECK(support::close(kept.view(), expected.value, bound));
    else CHECK(support::close(dx.view(), expected.value, bound));
    for (int64_t t = 0; t < s.tokens && how == way::accumulate; ++t)
        for (int64_t d = 0; d < s.width && in.absent[t]; ++d) REQUIRE_EQ(dx.view()(t, d), before[t * s.width + d]);
    CHECK_EQ(dx.damage() + kept.damage(), "");
}

float piece_sum(const fm::detail::three_pieces& p) { return static_cast<float>(p.low) + static_cast<float>(p.middle) + static_cast<float>(p.high); }

template <class T, class W, class B, class Executor>
void check_logits(support::random& r, const shape& s, int64_t skew, bool with_bias, Executor& ex)
{
    using real = fm::accumulate_t<T>;
    CAPTURE(s.tokens);
    CAPTURE(s.experts);
    CAPTURE(s.width);
    CAPTURE(skew);
    input<T> x(r, s.tokens, s.width, skew);
    input<W> gate(r, s.experts, s.width, skew);
    input<B> bias(r, 1, s.experts, skew);
    support::guarded<real> logits(s.tokens, s.experts, skew), again(s.tokens, s.experts, skew);
    sums expected(numbers(static_cast<std::size_t>(s.tokens * s.experts)));
    for (int64_t t = 0; t < s.tokens; ++t)
        for (int64_t e = 0; e < s.experts; ++e) {
            if (with_bias) expected.add(t * s.experts + e, bias(0, e));
            for (int64_t d = 0; d < s.width; ++d) expected.add(t * s.experts + e, x(t, d) * gate(e, d));
        }
    for (auto* each : {&logits, &again})
        support::with_exact_scratch(ex, [&](fm::arena& scratch) {
            fm::project(ex, x.view(), gate.view(), with_bias ? fm::vector_view<const B>(bias.memory.vector()) : fm::vector_view<const B>{},
                        each->view(), scratch);
        });
    CHECK(support::close(logits.view(), expected.value, {.length = double(s.width) + 2, .magnitudes = &expected.magnitude}));
    CHECK(std::memcmp(logits.data(), again.data(), sizeof(real) * static_cast<std::size_t>(s.tokens * s.experts)) == 0);
    CHECK_EQ(logits.damage(), "");
}

} // namespace

TEST_CASE_TEMPLATE("logits of few tokens are x W^T + b, by teams and without scratch, those of more by tiles", Cell, on<lane_blocks, float>,
                   on<lane_blocks, bfloat16>, on<lane_blocks, fm::half>, on<lane_blocks, double>, on<warp_blocks, float>,
                   on<warp_blocks, bfloat16>, on<warp_blocks, double>)
{
    using T = typename Cell::type;
    FASTMOE_SEEDED(r, 57);
    typename Cell::executor ex;
    const bool slow = std::is_same_v<typename Cell::executor, warp_blocks>;
    for (const int64_t tokens : {0, 1, 2, 3, 4, 5, 31, 32})
        for (const int64_t experts : {1, 8, 60, 64, 130}) {
            if (slow && tokens * experts > 300) continue;
            const int64_t width = r.one_of(1, 7, 8, 65, 256, 1024);
            check_logits<T, T, T>(r, {tokens, experts, width}, r.integer(0, 1), r.coin(), ex);
        }
    for (const int64_t width : {1025, 2080, 4096}) check_logits<T, T, T>(r, {r.integer(1, 6), 5, width}, 0, true, ex); // a block a team
    check_logits<T, T, T>(r, {3, 4, 0}, 0, true, ex);
    if constexpr (!std::is_same_v<T, double>) {
        check_logits<T, float, float>(r, {5, 7, 100}, 0, true, ex);
        check_logits<float, T, bfloat16>(r, {1, 7, 96}, 0, true, ex);
    }
    CHECK_EQ(ex.products + ex.lines, 0);
    if (slow) return;
    fm::arena query;
    const auto ask = [&](int64_t tokens, int64_t experts) {
        fm::project(ex, fm::matrix_view<const T>(nullptr, tokens, 64), fm::matrix_view<const T>(nullptr, experts, 64), fm::vector_view<const T>{},
                    fm::matrix_view<fm::accumulate_t<T>>(nullptr, tokens, experts), query);
        return query.bytes();
    };
    CHECK_EQ(ask(32, 256), 0);
    CHECK(ask(32, 257) > 0);
    check_logits<T, T, T>(r, {33, 130, 72}, 0, true, ex);
    check_logits<T, T, T>(r, {32, 257, 16}, 0, true, ex);
    CHECK((ex.lines > 0) == !std::is_same_v<T, double>);
}

TEST_CASE("a float from 2^-110 on is exactly the sum of its three pieces, and none of them overflows or changes sign")
{
    FASTMOE_SEEDED(r, 53);
    const auto check_exact = [](float v) {
        CAPTURE(v);
        const auto p = fm::detail::pieces_of(v);
        const double all = static_cast<double>(p.high) + static_cast<double>(p.middle) + static_cast<double>(p.low);
        REQUIRE_EQ(all, static_cast<double>(v));
        REQUIRE_EQ(piece_sum(p), v);
        for (const bfloat16 each : {p.high, p.middle, p.low}) REQUIRE(static_cast<double>(each) * static_cast<double>(v) >= 0);
    };
    const auto from_bits = [](std::uint32_t u) {
        float v;
        std::memcpy(&v, &u, sizeof v);
        return v;
    };
    for (const float v : {0.0f, -0.0f, 1.0f, -1.0f, 0x1.fffffep0f, 0x1.fffffep127f, -0x1.fffffep127f, 0x1.ff0002p127f, 0x1p-110f, -0x1.fffffep-110f, 0x1.000002p-110f})
        check_exact(v);
    for (int i = 0; i < 200000; ++i) {
        const float v = from_bits(static_cast<std::uint32_t>(r.bits()));
        if (std::isfinite(v) && std::fabs(v) >= 0x1p-110f) check_exact(v);
    }
    for (int i = 0; i < 20000; ++i) { // below: bfloat16 ends at 2^-133
        const float v = from_bits(static_cast<std::uint32_t>(r.bits()) & 0x88ffffffu);
        const auto p = fm::detail::pieces_of(v);
        const double all = static_cast<double>(p.high) + static_cast<double>(p.middle) + static_cast<double>(p.low);
        REQUIRE(std::fabs(all - static_cast<double>(v)) <= 0x1p-134);
    }
    const float infinity = std::numeric_limits<float>::infinity();
    CHECK_EQ(piece_sum(fm::detail::pieces_of(infinity)), infinity);
    CHECK_EQ(piece_sum(fm::detail::pieces_of(-infinity)), -infinity);
    for (const std::uint32_t nan : {0x7fc00000u, 0xffc00000u, 0x7f800001u, 0xff80ffffu}) // some have all of it in the low half
        CHECK(std::isnan(piece_sum(fm::detail::pieces_of(from_bits(nan)))));
}

TEST_CASE_TEMPLATE("the input's gradient where blocks multiply is dlogits W: written, added, or handed over row by row", Cell,
                   on<lane_blocks, float>, on<lane_blocks, bfloat16>, on<lane_blocks, fm::half>, on<lane_blocks, double>,
                   on<warp_blocks, float>, on<warp_blocks, bfloat16>)
{
    using T = typename Cell::type;
    FASTMOE_SEEDED(r, 54);
    typename Cell::executor ex;
    for (const shape& s : shapes<typename Cell::executor>(r))
        check_input<T, T>(r, s, r.integer(0, 1), r.one_of(way::overwrite, way::accumulate, way::rows), ex);
    check_input<T, T>(r, {130, 9, 24}, 1, way::overwrite, ex);
    check_input<T, T>(r, {130, 9, 24}, 0, way::accumulate, ex);
    check_input<T, T>(r, {130, 9, 24}, 1, way::rows, ex);
    CHECK((ex.products > 0) == (std::is_same_v<T, bfloat16>)); // tensor cores
    if constexpr (std::is_same_v<T, bfloat16>) check_input<T, float>(r, {40, 9, 24}, 0, way::accumulate, ex);
}

TEST_CASE("the input's gradient comes in as many rounds as its rows need, with one sum for each")
{
    FASTMOE_SEEDED(r, 55);
    lane_blocks ex;
    CHECK_EQ(fm::detail::waiting_rows_on_blocks<float>(4096), 2048);
    CHECK_EQ(fm::detail::waiting_rows_on_blocks<float>(1 << 20), 1024);
    CHECK_EQ(fm::detail::waiting_rows_on_blocks<float>(0) % 128, 0);
    const shape s{300, 5, 40};
    scene<bfloat16> in(r, s, 0);
    std::vector<float> whole, cut;
    for (const int64_t most : {1024, 128}) {
        support::guarded<float> kept(s.tokens, s.width);
        support::with_exact_scratch(ex, [&](fm::arena& scratch) {
            fm::detail::with_scratch(scratch, [&](fm::arena& memory) {
                const auto pieces = fm::detail::cut_rows(ex, in.dlogits.view(), s.tokens, s.experts, memory);
                fm::detail::finish_products<float>(ex, pieces, fm::detail::stacked_gate(ex, in.gate.view(), memory), most,
                                                   keep_sums<float>{kept.view()}, memory);
            });
        });
        (most == 1024 ? whole : cut).assign(kept.data(), kept.data() + s.tokens * s.width);
    }
    CHECK(support::same_bits(cut, whole));
}

TEST_CASE("what is not finite in pieces gives what it gives in float")
{
    FASTMOE_SEEDED(r, 56);
    lane_blocks ex;
    const shape s{9, 6, 16};
    const float infinity = std::numeric_limits<float>::infinity();
    for (const float v : {infinity, -infinity, std::numeric_limits<float>::quiet_NaN(), 0x1.fffffep127f, -0x1.fffffep127f, 1e-30f}) {
        CAPTURE(v);
        scene<bfloat16> in(r, s, 0);
        in.absent.assign(s.tokens, false);
        for (int64_t t = 0; t < s.tokens; ++t) {
            in.dlogits.fill_row(t, 0.0); // so that v alone decides
            in.x.fill_row(t, t == 4 ? 1.0 : 0.5);
        }
        in.dlogits.memory.view()(4, 2) = v;
        in.dlogits.memory.view()(5, 3) = 1;
        in.x.memory.view()(4, 7) = bfloat16(0.0f);
        for (int64_t e = 0; e < s.experts; ++e) in.gate.fill_row(e, 1.0);
        in.gate.memory.view()(2, 7) = bfloat16(0.0f);
        std::vector<float> dw(s.experts * s.width), dx(s.tokens * s.width);
        numbers to_w(dw.size()), to_x(dx.size());
        for (int64_t t : {4, 5})
            for (int64_t e = 0; e < s.experts; ++e)
                for (int64_t d = 0; d < s.width; ++d) {
                    to_w[e * s.width + d] += in.dlogits(t, e) * in.x(t, d);
                    to_x[t * s.width + d] += in.dlogits(t, e) * in.gate(e, d);
                }
        support::with_exact_scratch(ex, [&](fm::arena& scratch) {
            fm::project_weights_backward(ex, in.dlogits.view(), in.x.view(), fm::as_matrix(dw, s.experts, s.width), {}, write_mode::overwrite,
                                         scratch);
        });
        support::guarded<float> kept(s.tokens, s.width);
        support::with_exact_scratch(ex, [&](fm::arena& scratch) {
            fm::detail::with_scratch(scratch, [&](fm::arena& memory) {
                fm::detail::project_rows_backward(ex, in.dlogits.view(), in.gate.view(), keep_sums<float>{kept.view()}, memory);
            });
        });
        for (int64_t t = 0; t < s.tokens; ++t)
            for (int64_t d = 0; d < s.width && t != 4 && t != 5; ++d) to_x[t * s.width + d] = 7;
        CHECK(support::close(dw, to_w, {.length = 3, .magnitude = 1e-30}));
        CHECK(support::close(kept.view(), to_x, {.length = 3, .magnitude = 1e-30}));
        // An infinity on the other side stays visible.
        in.gate.memory.view()(3, 1) = bfloat16(infinity);
        in.x.memory.view()(5, 1) = bfloat16(-infinity);
        support::guarded<float> again(s.tokens, s.width);
        support::with_exact_scratch(ex, [&](fm::arena& scratch) {
            fm::project_weights_backward(ex, in.dlogits.view(), in.x.view(), fm::as_matrix(dw, s.experts, s.width), {}, write_mode::overwrite,
                                         scratch);
        });
        support::with_exact_scratch(ex, [&](fm::arena& scratch) {
            fm::detail::with_scratch(scratch, [&](fm::arena& memory) {
                fm::detail::project_rows_backward(ex, in.dlogits.view(), in.gate.view(), keep_sums<float>{again.view()}, memory);
            });
        });
        CHECK_FALSE(std::isfinite(dw[3 * s.width + 1]));
        CHECK_FALSE(std::isfinite(again.view()(5, 1)));
    }
}

TEST_CASE_TEMPLATE("the weights' gradient in parts is dlogits^T x over the tokens that chose something, and the bias's its sum", Cell,
                   on<lane_blocks, float>, on<lane_blocks, bfloat16>, on<lane_blocks, fm::half>,
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
    CHECK((ex.products > 0) == (std::is_same_v<T, bfloat16>)); // tensor cores
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

TEST_CASE_TEMPLATE("the bits of the router's gradients do not depend on the number of blocks", T, float, bfloat16)
{
    FASTMOE_SEEDED(r, 52);
    const shape s{1600, 30, 40};
    scene<T> in(r, s, 0);
    const auto bits = [&](int64_t blocks) {
        lane_blocks ex(blocks);
        std::vector<float> dw(s.experts * s.width, 0.0f), db(s.experts, 0.0f);
        std::vector<T> dx(s.tokens * s.width, T(0.0f));
        const auto call = [&](fm::arena& scratch) {
            fm::project_weights_backward(ex, in.dlogits.view(), in.x.view(), fm::as_matrix(dw, s.experts, s.width),
                                         fm::vector_view<float>(db.data(), s.experts), write_mode::overwrite, scratch);
            fm::project_input_backward(ex, in.dlogits.view(), in.gate.view(), fm::as_matrix(dx, s.tokens, s.width), write_mode::accumulate,
                                       scratch);
        };
        fm::arena query;
        call(query);
        fm::buffer<std::byte, lane_blocks> lent(ex, query.bytes());
        fm::arena scratch(lent.view());
        call(scratch);
        dw.insert(dw.end(), db.begin(), db.end());
        for (const T v : dx) dw.push_back(static_cast<float>(v));
        return dw;
    };
    const auto expected = bits(1);
    CHECK(support::same_bits(bits(1), expected));
    CHECK(support::same_bits(bits(5), expected));
}

TEST_CASE("a device without blocks takes the ways of the host")
{
    FASTMOE_SEEDED(r, 58);
    without_blocks ex;
    for (const write_mode mode : {write_mode::overwrite, write_mode::accumulate}) check_weights<bfloat16>(r, {70, 9, 24}, 1, mode, true, ex);
    for (const way how : {way::accumulate, way::rows}) check_input<bfloat16, bfloat16>(r, {70, 9, 24}, 1, how, ex);
    check_logits<bfloat16, bfloat16, bfloat16>(r, {5, 9, 24}, 1, true, ex);
    CHECK_EQ(ex.products + ex.lines, 0);
}
