// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include <fastmoe/gemm/onednn.hpp>

#include "support/allocations.hpp"
#include "support/executors.hpp"
#include "support/scratch.hpp"

extern "C" int omp_get_max_threads();
extern "C" void omp_set_num_threads(int);

namespace {

/// oneDNN's own products at every size: nothing is left to portable.
constexpr fastmoe::gemm::onednn itself{.limits = {0, 0, 0}};


namespace fm = fastmoe;
using std::int32_t;
using std::int64_t;

/// Half a unit in the last place of a number near 1.
template <class T>
double rounding()
{
    if constexpr (std::is_same_v<T, double>) return std::ldexp(1.0, -53);
    else if constexpr (std::is_same_v<T, float>) return std::ldexp(1.0, -24);
    else if constexpr (std::is_same_v<T, fm::half>) return std::ldexp(1.0, -11);
    else return std::ldexp(1.0, -8);
}

template <class T>
T poison()
{
    return T(std::numeric_limits<fm::accumulate_t<T>>::quiet_NaN());
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b)
{
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class T>
bool same_row(const std::vector<T>& a, const std::vector<T>& b, int64_t row, int64_t width)
{
    return width == 0 || std::memcmp(&a[row * width], &b[row * width], width * sizeof(T)) == 0;
}

/// Of a large product only every n-th element is compared, and all others must be finite.
int64_t sampling(int64_t elements, int64_t depth)
{
    const int64_t n = elements * depth / 4'000'000;
    return n < 2 ? 1 : n | 1;
}

/// What a product must be, and how far a sum in accumulate_t of `terms` terms, rounded once, may be from it.
struct expectation {
    double value = 0, magnitude = 0;
    int64_t terms = 1;

    void add(double term)
    {
        value += term;
        magnitude += std::abs(term);
        ++terms;
    }
    template <class Y>
    bool admits(Y y) const
    {
        const double sum = rounding<fm::accumulate_t<Y>>() * static_cast<double>(terms) * magnitude;
        const double tiny = std::is_same_v<Y, fm::half> ? std::ldexp(1.0, -25) : 0;
        return std::abs(static_cast<double>(y) - value) <= sum + rounding<Y>() * (std::abs(value) + sum) + tiny;
    }
};

enum class layout { stacked, transposed, separate };

/// Ragged groups with padding between them, over random matrices whose padding is poisoned.
template <class X, class Y>
struct problem {
    int64_t experts, in, out, slots = 0;
    std::vector<int32_t> counts;
    std::vector<int64_t> offsets;
    std::mt19937 random;

    problem(std::vector<int32_t> rows, int64_t in_, int64_t out_, unsigned seed)
        : experts(static_cast<int64_t>(rows.size())), in(in_), out(out_), counts(std::move(rows)), random(seed)
    {
        for (int64_t e = 0; e < experts; ++e) {
            offsets.push_back(slots);
            slots += counts[e] + static_cast<int64_t>(random() % 3);
        }
        offsets.push_back(slots);
        slots += 1;
    }

    fm::row_groups groups() const
    {
        return {fm::as_vector(counts), fm::as_vector(offsets), slots};
    }
    int64_t expert_of(int64_t s) const // -1: padding
    {
        for (int64_t e = 0; e < experts; ++e)
            if (s >= offsets[e] && s < offsets[e] + counts[e]) return e;
        return -1;
    }
    template <class T>
    std::vector<T> numbers(int64_t n)
    {
        std::vector<T> v(static_cast<std::size_t>(n));
        std::uniform_real_distribution<float> between(-1, 1);
        for (T& x : v) x = T(between(random));
        return v;
    }
    /// (slots, width) with poisoned padding.
    std::vector<X> rows(int64_t width)
    {
        auto v = numbers<X>(slots * width);
        for (int64_t s = 0; s < slots; ++s)
            if (expert_of(s) < 0)
                for (int64_t i = 0; i < width; ++i) v[s * width + i] = poison<X>();
        return v;
    }
    /// Row numbers of a table with `table` rows, some -1; padding points at the poisoned last row of the table.
    std::vector<int32_t> index(int64_t table)
    {
        std::vector<int32_t> v(static_cast<std::size_t>(slots));
        for (int64_t s = 0; s < slots; ++s)
            v[s] = expert_of(s) < 0 ? static_cast<int32_t>(table - 1)
                                    : static_cast<int32_t>(random() % static_cast<unsigned>(table)) - 1;
        return v;
    }
};

/// Runs a verb with a poisoned workspace of exactly the bytes that a measuring arena asks for.
template <class Verb>
void with_workspace(fm::host_executor& ex, const Verb& verb)
{
    support::in_workspace(ex, [&](fm::arena& memory) {
        verb(memory);
        CHECK(memory.used() == 0);
    });
}

/// Copies the finished row, so that a test sees what the epilogue saw and how often.
template <class Y>
struct witness {
    fm::matrix_view<Y> y, seen;
    int32_t *times, *experts;

    template <class Team>
    void operator()(Team& team, int64_t expert, int64_t row) const
    {
        team.for_each(y.extent(1), [&](int64_t i) { seen(row, i) = y(row, i); });
        ++times[row];
        experts[row] = static_cast<int32_t>(expert);
    }
};

/// Weights of each layout with the same numbers: element (e, o, i) is w[(e * out + o) * in + i].
template <class T>
struct weights {
    std::vector<T> numbers, stored;
    std::vector<T*> pointers;
    fm::weight_view<T> view;

    weights(std::vector<T> w, int64_t experts, int64_t out, int64_t in, layout how) : numbers(std::move(w)), stored(numbers)
    {
        if (how == layout::transposed) {
            for (int64_t e = 0; e < experts; ++e)
                for (int64_t o = 0; o < out; ++o)
                    for (int64_t i = 0; i < in; ++i)
                        stored[(e * in + i) * out + o] = numbers[(e * out + o) * in + i];
            view = fm::stacked_transposed(fm::tensor_view<T, 3>(stored.data(), experts, in, out));
        } else if (how == layout::separate) {
            for (int64_t e = experts - 1; e >= 0; --e) pointers.insert(pointers.begin(), stored.data() + e * out * in);
            view = fm::separate(fm::vector_view<T* const>(pointers.data(), experts), out, in);
        } else view = fm::stacked(fm::tensor_view<T, 3>(stored.data(), experts, out, in));
    }
};

enum class verb { forward, dgrad };

/// One run of forward or dgrad with everything checked; returns y.
template <class X, class Y>
std::vector<Y> check_rows(fm::host_executor& ex, verb v, std::vector<int32_t> counts, int64_t in, int64_t out, layout how,
                          bool gather, bool biased, unsigned seed)
{
    INFO("seed " << seed << " in " << in << " out " << out << " experts " << counts.size() << " layout "
                 << static_cast<int>(how) << " gather " << gather << " bias " << biased << " verb " << static_cast<int>(v));
    problem<X, Y> p(std::move(counts), in, out, seed);
    const bool forward = v == verb::forward;
    const int64_t depth = forward ? in : out, columns = forward ? out : in, table = p.slots / 2 + 2;

    auto x = gather ? p.template numbers<X>(table * depth) : p.rows(depth);
    if (gather)
        for (int64_t i = 0; i < depth; ++i) x[(table - 1) * depth + i] = poison<X>();
    // Row numbers stay below the poisoned row, which only padding names.
    auto index = p.index(table);
    const weights<X> w(p.template numbers<X>(p.experts * out * in), p.experts, out, in, how);
    const auto bias = p.template numbers<X>(biased ? p.experts * out : 0);
    const std::vector<Y> blank(static_cast<std::size_t>(p.slots * columns), poison<Y>());
    std::vector<Y> y = blank, seen = blank;
    std::vector<int32_t> times(static_cast<std::size_t>(p.slots)), owner(static_cast<std::size_t>(p.slots), -1);
    const fm::matrix_view<Y> out_view(y.data(), p.slots, columns);
    const witness<Y> epilogue{out_view, fm::as_matrix(seen, p.slots, columns), times.data(), owner.data()};
    const fm::matrix_view<const X> bias_view(biased ? bias.data() : nullptr, biased ? p.experts : 0, biased ? out : 0);
    const fm::weight_view<const X> view = w.view;

    const auto run = [&](const auto& rows) {
        with_workspace(ex, [&](fm::arena& memory) {
            if (forward) itself.forward(ex, p.groups(), rows, view, bias_view, out_view, epilogue, memory);
            else itself.dgrad(ex, p.groups(), rows, view, out_view, epilogue, memory);
        });
    };
    const fm::matrix_view<const X> data(x.data(), gather ? table : p.slots, depth);
    if (gather) run(fm::indexed_rows<X>{data, fm::as_vector(std::as_const(index))});
    else run(fm::plain_rows<X>{data});

    int64_t wrong = 0, touched = 0, epilogues = 0;
    const int64_t sample = sampling(p.slots * columns, depth);
    for (int64_t s = 0; s < p.slots; ++s) {
        const int64_t e = p.expert_of(s);
        if (e < 0) {
            touched += !same_row(y, blank, s, columns) || times[s] != 0;
            continue;
        }
        epilogues += times[s] != 1 || owner[s] != e || !same_row(seen, y, s, columns);
        const int64_t from = gather ? index[s] : s;
        for (int64_t n = 0; n < columns; ++n) {
            if ((s * columns + n) % sample != 0) {
                wrong += !std::isfinite(static_cast<double>(y[s * columns + n]));
                continue;
            }
            expectation wanted;
            if (biased) wanted.add(static_cast<double>(bias[e * out + n]));
            for (int64_t k = 0; k < depth && from >= 0; ++k)
                wanted.add(static_cast<double>(x[from * depth + k]) *
                           static_cast<double>(w.numbers[(e * out + (forward ? n : k)) * in + (forward ? k : n)]));
            wrong += !wanted.admits(y[s * columns + n]);
        }
    }
    CHECK_MESSAGE(wrong == 0, wrong, " elements are wrong");
    CHECK_MESSAGE(touched == 0, touched, " padding rows were written");
    CHECK_MESSAGE(epilogues == 0, epilogues, " rows had no or a wrong epilogue");
    return y;
}

/// One run of wgrad with everything checked; returns dw as it lies in memory.
template <class X, class G>
std::vector<G> check_wgrad(fm::host_executor& ex, std::vector<int32_t> counts, int64_t in, int64_t out, layout how,
                           bool gather_dy, bool gather_x, fm::write_mode mode, unsigned seed)
{
    INFO("seed " << seed << " in " << in << " out " << out << " experts " << counts.size() << " layout "
                 << static_cast<int>(how) << " gather " << gather_dy << gather_x << " mode " << static_cast<int>(mode));
    problem<X, G> p(std::move(counts), in, out, seed);
    const bool add = mode == fm::write_mode::accumulate;
    const int64_t table = p.slots / 2 + 2;
    const auto operand = [&](bool gather, int64_t width) {
        auto v = gather ? p.template numbers<X>(table * width) : p.rows(width);
        if (gather)
            for (int64_t i = 0; i < width; ++i) v[(table - 1) * width + i] = poison<X>();
        return v;
    };
    const auto dy = operand(gather_dy, out), x = operand(gather_x, in);
    const auto dy_index = p.index(table), x_index = p.index(table);
    const auto before = add ? p.template numbers<G>(p.experts * out * in)
                            : std::vector<G>(static_cast<std::size_t>(p.experts * out * in), poison<G>());
    weights<G> dw(before, p.experts, out, in, how);

    const auto run = [&](const auto& dy_rows, const auto& x_rows) {
        with_workspace(ex, [&](fm::arena& m) { itself.wgrad(ex, p.groups(), dy_rows, x_rows, dw.view, mode, m); });
    };
    const fm::matrix_view<const X> dy_data(dy.data(), gather_dy ? table : p.slots, out);
    const fm::matrix_view<const X> x_data(x.data(), gather_x ? table : p.slots, in);
    const fm::plain_rows<X> dy_plain{dy_data}, x_plain{x_data};
    const fm::indexed_rows<X> dy_indexed{dy_data, fm::as_vector(dy_index)}, x_indexed{x_data, fm::as_vector(x_index)};
    if (gather_dy && gather_x) run(dy_indexed, x_indexed);
    else if (gather_dy) run(dy_indexed, x_plain);
    else if (gather_x) run(dy_plain, x_indexed);
    else run(dy_plain, x_plain);

    int64_t wrong = 0;
    const int64_t sample = sampling(out * in, p.slots);
    for (int64_t e = 0; e < p.experts; ++e)
        for (int64_t o = 0; o < out; ++o)
            for (int64_t i = 0; i < in; ++i) {
                const G got = std::as_const(dw.view)(e, o, i), was = before[(e * out + o) * in + i];
                if (p.counts[e] == 0) {
                    const G wanted = add ? was : G(0.0f);
                    wrong += std::memcmp(&got, &wanted, sizeof(G)) != 0;
                    continue;
                }
                if ((o * in + i) % sample != 0) {
                    wrong += !std::isfinite(static_cast<double>(got));
                    continue;
                }
                expectation wanted;
                if (add) wanted.add(static_cast<double>(was));
                for (int64_t s = p.offsets[e]; s < p.offsets[e] + p.counts[e]; ++s) {
                    const int64_t a = gather_dy ? dy_index[s] : s, b = gather_x ? x_index[s] : s;
                    if (a >= 0 && b >= 0)
                        wanted.add(static_cast<double>(dy[a * out + o]) * static_cast<double>(x[b * in + i]));
                }
                wrong += !wanted.admits(got);
            }
    CHECK_MESSAGE(wrong == 0, wrong, " elements are wrong");
    return dw.stored;
}

template <class X, class Y>
struct types {
    using in = X;
    using out = Y;
};
#define ALL_TYPES                                                                                                       \
    types<float, float>, types<fm::bfloat16, fm::bfloat16>, types<fm::bfloat16, float>, types<fm::half, fm::half>,      \
        types<fm::half, float>, types<double, double>

std::vector<int32_t> ragged(std::mt19937& random, int experts, unsigned largest)
{
    std::vector<int32_t> counts(static_cast<std::size_t>(experts));
    for (auto& c : counts) c = random() % 4 == 0 ? 0 : static_cast<int32_t>(random() % (largest + 1));
    return counts;
}

} // namespace

static_assert(fm::grouped_gemm<fm::gemm::onednn, fm::host_executor, float>);
static_assert(fm::grouped_gemm<fm::gemm::onednn, fm::host_executor, fm::bfloat16>);
static_assert(fm::grouped_gemm<fm::gemm::onednn, fm::host_executor, fm::half>);
static_assert(fm::grouped_gemm<fm::gemm::onednn, fm::host_executor, double>);
static_assert(fm::grouped_gemm<fm::gemm::onednn, support::lanes, float>, "other executors run portable's source");
static_assert(std::is_trivially_copyable_v<fm::gemm::onednn>);

TEST_CASE_TEMPLATE("forward and dgrad equal the sum in double for every layout, gather and bias", P, ALL_TYPES)
{
    fm::host_executor ex({.threads = 3});
    std::mt19937 random(7);
    for (unsigned seed = 1; seed <= 24; ++seed) {
        const int64_t in = 1 + random() % 70, out = 1 + random() % 90;
        const auto how = static_cast<layout>(seed % 3);
        const auto counts = ragged(random, 1 + static_cast<int>(random() % 7), seed % 2 ? 12 : 60);
        check_rows<typename P::in, typename P::out>(ex, verb::forward, counts, in, out, how, seed / 3 % 2, seed / 6 % 2, seed);
        check_rows<typename P::in, typename P::out>(ex, verb::dgrad, counts, in, out, how, seed / 3 % 2, false, seed);
    }
}

TEST_CASE_TEMPLATE("wgrad equals the sum in double for every layout, gather and mode", P, ALL_TYPES)
{
    fm::host_executor ex({.threads = 3});
    std::mt19937 random(8);
    for (unsigned seed = 1; seed <= 24; ++seed) {
        const int64_t in = 1 + random() % 70, out = 1 + random() % 90;
        const auto counts = ragged(random, 1 + static_cast<int>(random() % 7), 40);
        const auto mode = seed / 3 % 2 ? fm::write_mode::accumulate : fm::write_mode::overwrite;
        check_wgrad<typename P::in, typename P::out>(ex, counts, in, out, static_cast<layout>(seed % 3), seed / 6 % 2,
                                                     seed / 12 % 2, mode, seed);
    }
}

TEST_CASE_TEMPLATE("products that span several row blocks, panels and depths are as exact as small ones", P,
                   types<float, float>, types<fm::bfloat16, fm::bfloat16>, types<fm::bfloat16, float>)
{
    using X = typename P::in;
    using Y = typename P::out;
    fm::host_executor ex({.threads = 2});
    const std::vector<int32_t> counts{1300, 0, 1, 5, 641, 3, 8, 9};
    for (const bool gather : {false, true}) {
        check_rows<X, Y>(ex, verb::forward, counts, 67, 1101, layout::stacked, gather, true, 31);
        check_rows<X, Y>(ex, verb::dgrad, counts, 1101, 67, layout::transposed, gather, false, 32);
        check_wgrad<X, Y>(ex, counts, 67, 1101, layout::stacked, gather, !gather, fm::write_mode::overwrite, 33);
        check_wgrad<X, Y>(ex, counts, 1101, 67, layout::transposed, !gather, gather, fm::write_mode::accumulate, 34);
    }
}

TEST_CASE_TEMPLATE("a matrix with one row, one column or none is a matrix", P, ALL_TYPES)
{
    fm::host_executor ex({.threads = 2});
    for (const auto how : {layout::stacked, layout::transposed})
        for (const auto& [in, out] : {std::pair<int, int>{1, 1}, {1, 9}, {9, 1}, {0, 5}, {5, 0}}) {
            const std::vector<int32_t> counts{3, 0, 17};
            check_rows<typename P::in, typename P::out>(ex, verb::forward, counts, in, out, how, false, true, 41);
            check_rows<typename P::in, typename P::out>(ex, verb::dgrad, counts, in, out, how, true, false, 42);
            check_wgrad<typename P::in, typename P::out>(ex, counts, in, out, how, true, false, fm::write_mode::overwrite, 43);
        }
}

TEST_CASE_TEMPLATE("no rows, one expert with all of them, and a thousand experts with few are ordinary", P,
                   types<float, float>, types<fm::bfloat16, fm::bfloat16>)
{
    using X = typename P::in;
    using Y = typename P::out;
    fm::host_executor ex({.threads = 2});
    std::vector<int32_t> none(5), skewed(64), many(1000);
    skewed[17] = 300;
    std::mt19937 random(9);
    for (auto& c : many) c = static_cast<int32_t>(random() % 3);
    for (const auto& counts : {none, skewed, many}) {
        check_rows<X, Y>(ex, verb::forward, counts, 16, 24, layout::stacked, true, true, 51);
        check_rows<X, Y>(ex, verb::dgrad, counts, 16, 24, layout::stacked, false, false, 52);
        check_wgrad<X, Y>(ex, counts, 16, 24, layout::stacked, false, true, fm::write_mode::overwrite, 53);
        check_wgrad<X, Y>(ex, counts, 16, 24, layout::stacked, false, true, fm::write_mode::accumulate, 54);
    }
}

TEST_CASE_TEMPLATE("the bits are the same for 1, 2 and 4 threads and on every run", P, ALL_TYPES)
{
    using X = typename P::in;
    using Y = typename P::out;
    const std::vector<int32_t> counts{130, 0, 7, 1, 64, 2, 33};
    const bool fast = std::is_same_v<X, float> || std::is_same_v<X, fm::bfloat16>;
    const int64_t in = fast ? 150 : 40, out = fast ? 620 : 60;
    std::vector<Y> y, dx, dw;
    for (const int threads : {1, 2, 4, 4, 2}) {
        INFO("threads " << threads);
        fm::host_executor ex({.threads = threads});
        auto a = check_rows<X, Y>(ex, verb::forward, counts, in, out, layout::stacked, true, true, 61);
        auto b = check_rows<X, Y>(ex, verb::dgrad, counts, in, out, layout::stacked, false, false, 62);
        auto c = check_wgrad<X, Y>(ex, counts, in, out, layout::stacked, true, false, fm::write_mode::accumulate, 63);
        if (y.empty()) y = a, dx = b, dw = c;
        CHECK(same_bits(a, y));
        CHECK(same_bits(b, dx));
        CHECK(same_bits(c, dw));
    }
}

TEST_CASE_TEMPLATE("a gradient with gaps between its lines leaves the gaps alone", P, types<float, float>,
                   types<fm::bfloat16, fm::bfloat16>, types<fm::bfloat16, float>)
{
    using X = typename P::in;
    using G = typename P::out;
    fm::host_executor ex({.threads = 2});
    problem<X, G> p({6, 0, 11}, 20, 30, 71);
    const auto dy = p.rows(30), x = p.rows(20);
    const int64_t stride = 23, matrix = 31 * stride;
    std::vector<G> dw(static_cast<std::size_t>(3 * matrix), G(7.0f));
    const fm::weight_view<G> view{dw.data(), nullptr, 3, 30, 20, matrix, stride, 1};
    with_workspace(ex, [&](fm::arena& memory) {
        itself.wgrad(ex, p.groups(), fm::plain_rows<X>{fm::as_matrix(dy, p.slots, 30)},
                                 fm::plain_rows<X>{fm::as_matrix(x, p.slots, 20)}, view, fm::write_mode::overwrite, memory);
    });
    int64_t gaps = 0, written = 0;
    for (int64_t e = 0; e < 3; ++e)
        for (int64_t o = 0; o < 31; ++o)
            for (int64_t i = 0; i < stride; ++i) {
                const bool seven = static_cast<float>(dw[e * matrix + o * stride + i]) == 7.0f;
                (o < 30 && i < 20 ? written : gaps) += o < 30 && i < 20 ? !seven : !seven;
            }
    CHECK(gaps == 0);
    CHECK(written == 3 * 30 * 20);
}

TEST_CASE_TEMPLATE("a workspace one byte short throws and writes nothing", P, types<fm::bfloat16, fm::bfloat16>,
                   types<float, float>, types<double, double>)
{
    using X = typename P::in;
    using Y = typename P::out;
    fm::host_executor ex({.threads = 2});
    problem<X, Y> p({40, 3, 0, 12}, 30, 50, 81);
    const auto x = p.rows(30), dy = p.rows(50);
    const auto index = [&] {
        std::vector<int32_t> v(static_cast<std::size_t>(p.slots));
        for (int64_t s = 0; s < p.slots; ++s) v[s] = static_cast<int32_t>(s);
        return v;
    }();
    const auto w = p.template numbers<X>(4 * 50 * 30);
    const std::vector<Y> blank_y(static_cast<std::size_t>(p.slots * 50), poison<Y>());
    const std::vector<Y> blank_w(static_cast<std::size_t>(4 * 50 * 30), poison<Y>());
    const std::vector<Y> blank_dx(static_cast<std::size_t>(p.slots * 30), poison<Y>());
    auto y = blank_y, dw = blank_w, dx = blank_dx;
    const auto view = fm::stacked(fm::tensor_view<const X, 3>(w.data(), 4, 50, 30));
    const fm::indexed_rows<X> rows{fm::as_matrix(x, p.slots, 30), fm::as_vector(index)};
    const fm::indexed_rows<X> dy_rows{fm::as_matrix(dy, p.slots, 50), fm::as_vector(index)};

    const auto refuses = [&](const auto& verb) {
        fm::arena measure;
        verb(measure);
        REQUIRE(measure.bytes() > 0);
        fm::buffer<std::byte, fm::host_executor> memory(ex, measure.bytes());
        fm::arena short_of_one(fm::vector_view<std::byte>(memory.data(), measure.bytes() - 1));
        CHECK_THROWS_AS(verb(short_of_one), fm::out_of_memory);
        CHECK(short_of_one.used() == 0);
        CHECK(same_bits(y, blank_y));
        CHECK(same_bits(dx, blank_dx));
        CHECK(same_bits(dw, blank_w));
    };
    refuses([&](fm::arena& memory) {
        itself.forward(ex, p.groups(), rows, view, fm::matrix_view<const X>(),
                                   fm::matrix_view<Y>(y.data(), p.slots, 50), fm::no_epilogue{}, memory);
    });
    refuses([&](fm::arena& memory) {
        itself.dgrad(ex, p.groups(), dy_rows, view, fm::matrix_view<Y>(dx.data(), p.slots, 30), fm::no_epilogue{},
                                 memory);
    });
    refuses([&](fm::arena& memory) {
        itself.wgrad(ex, p.groups(), dy_rows, rows, fm::stacked(fm::tensor_view<Y, 3>(dw.data(), 4, 50, 30)),
                                 fm::write_mode::overwrite, memory);
    });
}

TEST_CASE("two threads with an executor each, and two that share one, get the bits of a single thread")
{
    fm::host_executor alone({.threads = 2}), shared({.threads = 2});
    const std::vector<int32_t> counts{70, 0, 3, 129};
    const auto forward = check_rows<fm::bfloat16, fm::bfloat16>(alone, verb::forward, counts, 90, 130, layout::stacked, true, true, 91);
    const auto dgrad = check_rows<float, float>(alone, verb::dgrad, counts, 90, 130, layout::stacked, false, false, 92);

    // doctest's checks lock, so the threads compute first and compare afterwards.
    problem<fm::bfloat16, fm::bfloat16> p(counts, 90, 130, 91);
    std::atomic<int> differ{0};
    const auto work = [&](fm::host_executor& ex, unsigned seed) {
        problem<float, float> q(counts, 90, 130, seed);
        const auto x = q.rows(130);
        const auto w = q.numbers<float>(4 * 130 * 90);
        std::vector<float> first;
        for (int run = 0; run < 30; ++run) {
            std::vector<float> y(static_cast<std::size_t>(q.slots * 90));
            fm::arena measure;
            const auto call = [&](fm::arena& memory) {
                itself.dgrad(ex, q.groups(), fm::plain_rows<float>{fm::as_matrix(x, q.slots, 130)},
                                         fm::stacked(fm::tensor_view<const float, 3>(w.data(), 4, 130, 90)),
                                         fm::matrix_view<float>(y.data(), q.slots, 90), fm::no_epilogue{}, memory);
            };
            call(measure);
            fm::buffer<std::byte, fm::host_executor> workspace(ex, measure.bytes());
            fm::arena memory(workspace.view());
            call(memory);
            if (first.empty()) first = y;
            differ += !same_bits(first, y);
        }
    };
    for (const bool share : {false, true}) {
        fm::host_executor second({.threads = 2});
        std::thread other([&] { work(share ? shared : second, 93); });
        work(share ? shared : alone, 94);
        other.join();
    }
    CHECK(differ == 0);
    CHECK(same_bits(forward, check_rows<fm::bfloat16, fm::bfloat16>(shared, verb::forward, counts, 90, 130, layout::stacked, true, true, 91)));
    CHECK(same_bits(dgrad, check_rows<float, float>(shared, verb::dgrad, counts, 90, 130, layout::stacked, false, false, 92)));
}

TEST_CASE("the caller's OpenMP setting is unchanged and no second pool of threads is started")
{
    const auto threads = [] {
        int n = 0;
        for ([[maybe_unused]] const auto& task : std::filesystem::directory_iterator("/proc/self/task")) ++n;
        return n;
    };
    const int before = omp_get_max_threads();
    omp_set_num_threads(3);
    fm::host_executor ex({.threads = 2});
    const int running = threads();
    check_rows<float, float>(ex, verb::forward, {300, 300}, 200, 200, layout::stacked, false, true, 101);
    check_rows<fm::bfloat16, fm::bfloat16>(ex, verb::dgrad, {300, 300}, 200, 200, layout::stacked, false, false, 102);
    check_wgrad<float, float>(ex, {300, 300}, 200, 200, layout::stacked, false, false, fm::write_mode::overwrite, 103);
    CHECK(omp_get_max_threads() == 3);
    CHECK(threads() == running);
    omp_set_num_threads(before);
}

TEST_CASE_TEMPLATE("no verb calls operator new, whatever the number of rows", P, types<float, float>,
                   types<fm::bfloat16, fm::bfloat16>)
{
    using X = typename P::in;
    using Y = typename P::out;
    fm::host_executor ex({.threads = 2});
    for (const int32_t rows : {1, 3, 40, 1400}) {
        problem<X, Y> p({rows, 0, rows, rows / 2}, 96, 600, 111);
        const auto x = p.template numbers<X>(p.slots * 96), dy = p.template numbers<X>(p.slots * 600);
        const auto index = p.index(p.slots);
        auto w = p.template numbers<X>(4 * 600 * 96);
        std::vector<Y> y(static_cast<std::size_t>(p.slots * 600)), dx(static_cast<std::size_t>(p.slots * 96));
        const auto view = fm::stacked(fm::tensor_view<X, 3>(w.data(), 4, 600, 96));
        const fm::weight_view<const X> read = view;
        const fm::indexed_rows<X> gathered{fm::as_matrix(x, p.slots, 96), fm::as_vector(index)};
        const fm::plain_rows<X> gradient{fm::as_matrix(dy, p.slots, 600)};
        const auto all = [&](fm::arena& memory) {
            const auto& gemm = itself;
            gemm.forward(ex, p.groups(), gathered, read, fm::matrix_view<const X>(), fm::matrix_view<Y>(y.data(), p.slots, 600),
                         fm::no_epilogue{}, memory);
            gemm.dgrad(ex, p.groups(), gradient, read, fm::matrix_view<Y>(dx.data(), p.slots, 96), fm::no_epilogue{}, memory);
            gemm.wgrad(ex, p.groups(), gradient, gathered, view, fm::write_mode::overwrite, memory);
        };
        fm::arena measure;
        all(measure);
        fm::buffer<std::byte, fm::host_executor> workspace(ex, measure.bytes());
        fm::arena memory(workspace.view());
        all(memory); // oneDNN generates its kernels on first use
        const support::allocations before;
        all(memory);
        const auto count = before.since();
        MESSAGE("operator new in three verbs with ", rows, " rows: ", count);
        CHECK(count == 0);
    }
}

TEST_CASE("what disagrees is refused by name")
{
    fm::host_executor ex({.threads = 1});
    std::vector<float> x(12 * 8), w(2 * 6 * 8), y(12 * 6);
    std::vector<int32_t> counts{5, 7};
    const std::vector<int64_t> offsets{0, 5, 12};
    support::workspace memory(ex, 1 << 16);
    const auto forward = [&](int64_t slots, int64_t width, int64_t columns, int64_t stride, int64_t bias_width) {
        itself.forward(ex, {fm::as_vector(counts), fm::as_vector(offsets), slots},
                                   fm::plain_rows<float>{fm::matrix_view<const float>(x.data(), 12, width)},
                                   fm::weight_view<const float>{w.data(), nullptr, 2, 6, 8, 48, stride, 1},
                                   fm::matrix_view<const float>(w.data(), 2, bias_width),
                                   fm::matrix_view<float>(y.data(), 12, columns), fm::no_epilogue{}, memory);
    };
    CHECK_NOTHROW(forward(12, 8, 6, 8, 6));
    CHECK_THROWS_WITH_AS(forward(11, 8, 6, 8, 6), doctest::Contains("rows (S,.)"), fm::invalid_argument);
    CHECK_THROWS_WITH_AS(forward(12, 7, 6, 8, 6), doctest::Contains("7"), fm::invalid_argument);
    CHECK_THROWS_WITH_AS(forward(12, 8, 5, 8, 6), doctest::Contains("W (E,out,in)"), fm::invalid_argument);
    CHECK_THROWS_WITH_AS(forward(12, 8, 6, 7, 6), doctest::Contains("stride"), fm::invalid_argument);
    CHECK_THROWS_WITH_AS(forward(12, 8, 6, 8, 5), doctest::Contains("bias (E,out)"), fm::invalid_argument);
    counts[1] = 8;
    CHECK_THROWS_WITH_AS(forward(12, 8, 6, 8, 6), doctest::Contains("counts (E)"), fm::invalid_argument);
    counts[1] = 7;
    CHECK(memory.arena().used() == 0);

    // Memory that is missing, and a gradient whose matrices overlap.
    const fm::row_groups groups{fm::as_vector(counts), fm::as_vector(offsets), 12};
    const fm::plain_rows<float> rows{fm::matrix_view<const float>(x.data(), 12, 8)}, nothing{fm::matrix_view<const float>(nullptr, 12, 8)};
    const fm::plain_rows<float> dy{fm::matrix_view<const float>(y.data(), 12, 6)};
    float* const apart[] = {w.data(), nullptr};
    const auto whole = fm::stacked(fm::tensor_view<float, 3>(w.data(), 2, 6, 8));
    const auto pointed = fm::separate(fm::vector_view<float* const>(apart, 2), 6, 8);
    const auto product = [&](const fm::row_groups& g, const fm::plain_rows<float>& from, const fm::weight_view<float>& weights) {
        itself.forward(ex, g, from, weights, fm::matrix_view<const float>(), fm::matrix_view<float>(y.data(), 12, 6),
                                   fm::no_epilogue{}, memory.arena());
    };
    const auto gradient = [&](const fm::plain_rows<float>& from, const fm::weight_view<float>& dw) {
        itself.wgrad(ex, groups, dy, from, dw, fm::write_mode::overwrite, memory.arena());
    };
    auto flat = whole;
    flat.expert_stride = 8;
    CHECK_THROWS_WITH_AS(product({{}, groups.offsets, 12}, rows, whole), doctest::Contains("offsets (E+1)"), fm::invalid_argument);
    CHECK_THROWS_WITH_AS(product({fm::vector_view<const int32_t>(nullptr, 2), groups.offsets, 12}, rows, whole),
                         doctest::Contains("counts (E) is a null pointer"), fm::invalid_argument);
    CHECK_THROWS_WITH_AS(product(groups, nothing, whole), doctest::Contains("rows (S,.) is a null pointer"), fm::invalid_argument);
    CHECK_THROWS_WITH_AS(product(groups, rows, pointed), doctest::Contains("memory for expert 1"), fm::invalid_argument);
    CHECK_THROWS_WITH_AS(gradient(nothing, whole), doctest::Contains("rows of X is a null pointer"), fm::invalid_argument);
    CHECK_THROWS_WITH_AS(gradient(rows, pointed), doctest::Contains("memory for expert 1"), fm::invalid_argument);
    CHECK_THROWS_WITH_AS(gradient(rows, flat), doctest::Contains("matrices that do not overlap"), fm::invalid_argument);
    CHECK(memory.arena().used() == 0);
}

TEST_CASE_TEMPLATE("products of few rows an expert are portable's to the bit, those of many oneDNN's own", X, float, fm::bfloat16)
{
    fm::host_executor ex({.threads = 2});
    const fm::gemm::onednn policy{.limits = {.along = 8, .across_bfloat16 = 8, .wgrad_bfloat16 = 8}};
    for (const int32_t rows : {4, 9}) { // with at most five slots of padding
        problem<X, float> p({rows, rows}, 64, 96, 5);
        const auto x = p.template numbers<X>(p.slots * 64), dy = p.template numbers<X>(p.slots * 96), w = p.template numbers<X>(2 * 96 * 64);
        const auto run = [&](const auto& gemm) {
            std::vector<float> y(p.slots * 96), dx(p.slots * 64), dw(2 * 96 * 64);
            const auto view = fm::stacked(fm::tensor_view<const X, 3>(w.data(), 2, 96, 64));
            const fm::plain_rows<X> in{fm::as_matrix(x, p.slots, 64)}, back{fm::as_matrix(dy, p.slots, 96)};
            support::in_workspace(ex, [&](fm::arena& m) {
                gemm.forward(ex, p.groups(), in, view, fm::matrix_view<const X>(), fm::as_matrix(y, p.slots, 96), fm::no_epilogue{}, m);
                gemm.dgrad(ex, p.groups(), back, view, fm::as_matrix(dx, p.slots, 64), fm::no_epilogue{}, m);
                gemm.wgrad(ex, p.groups(), back, in, fm::stacked(fm::tensor_view<float, 3>(dw.data(), 2, 96, 64)),
                           fm::write_mode::overwrite, m);
            });
            return std::vector<std::vector<float>>{y, dx, dw};
        };
        const auto chosen = run(policy), portable = run(fm::gemm::portable{}), own = run(itself);
        for (int verb = 0; verb < 3; ++verb) {
            CAPTURE(verb);
            const bool few = rows <= 8 && (verb == 0 || std::is_same_v<X, fm::bfloat16>);
            CHECK(same_bits(chosen[verb], few ? portable[verb] : own[verb]));
        }
        if (rows > 8 && std::is_same_v<X, float>) CHECK_FALSE(same_bits(portable[0], own[0])); // or nothing would be proved
    }
}
