// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the grouped products promise beside their numbers: what they refuse, by name and before they write, and that
/// the workspace comes back.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include <fastmoe/gemm/portable.hpp>

#include "support/compare.hpp"
#include "support/executors.hpp"
#include "support/poison.hpp"
#include "support/scratch.hpp"

using namespace fastmoe;
using support::has;
using support::message_of;

namespace {

/// A small product whose parts a test replaces: 3 experts, 12 rows of them and 2 of padding, in 20, out 30.
template <class T, class G = T>
struct product {
    static constexpr int64_t experts = 3, slots = 14, in = 20, out = 30;
    std::vector<int32_t> counts{5, 0, 7};
    std::vector<int64_t> offsets{0, 6, 6, 14};
    support::guarded<T> x{slots, in, 1}, dy{slots, out, 1}, w{experts * out, in, 1}, y{slots, out, 1}, dx{slots, in, 1};
    support::guarded<G> dw{experts * out, in, 1};
    std::vector<T> bias = std::vector<T>(experts * out, T(0.5f));

    explicit product(support::random& r)
    {
        support::fill_normal(r, x.view());
        support::fill_normal(r, dy.view());
        support::fill_normal(r, w.view());
    }
    row_groups groups() const { return {as_vector(counts), as_vector(offsets), slots}; }
    weight_view<T> weights() { return stacked(tensor_view<T, 3>(w.data(), experts, out, in)); }
    weight_view<G> gradient() { return stacked(tensor_view<G, 3>(dw.data(), experts, out, in)); }
    matrix_view<const T> bias_view() const { return matrix_view<const T>(bias.data(), experts, out); }
    /// Elements of the outputs that nobody has written.
    bool untouched()
    {
        return y.damage() + dx.damage() + dw.damage() == "" && support::poisoned(y.vector()) == slots * out &&
               support::poisoned(dx.vector()) == slots * in && support::poisoned(dw.vector()) == experts * out * in;
    }
    void forward(auto& ex, arena& memory)
    {
        gemm::portable{}.forward(ex, groups(), plain_rows<T>{x.view()}, weights(), bias_view(), y.view(), no_epilogue{}, memory);
    }
    void dgrad(auto& ex, arena& memory)
    {
        gemm::portable{}.dgrad(ex, groups(), plain_rows<T>{dy.view()}, weights(), dx.view(), no_epilogue{}, memory);
    }
    void wgrad(auto& ex, arena& memory, write_mode mode = write_mode::overwrite)
    {
        gemm::portable{}.wgrad(ex, groups(), plain_rows<T>{dy.view()}, plain_rows<T>{x.view()}, gradient(), mode, memory);
    }
};

} // namespace

TEST_CASE("a product that throws has given its workspace back")
{
    FASTMOE_SEEDED(r, 201);
    host_executor ex({.threads = 2});
    product<float> p(r);
    support::workspace memory(ex, 1 << 20);
    p.counts[1] = 100;
    CHECK_THROWS_AS(p.forward(ex, memory), invalid_argument);
    CHECK(memory.arena().used() == 0);
    CHECK_THROWS_AS(p.dgrad(ex, memory), invalid_argument);
    CHECK(memory.arena().used() == 0);
    CHECK(p.untouched());
}

TEST_CASE_TEMPLATE("a group that leaves the rows is refused by name, and nothing is read or written beside the rows", Cell,
                   FASTMOE_EXECUTORS)
{
    FASTMOE_SEEDED(r, 202);
    FASTMOE_EXECUTOR(ex, Cell);
    const bool host = std::is_same_v<typename Cell::executor, host_executor>;
    struct group {
        int32_t count;
        int64_t offset;
        const char* host_text;
    };
    for (const group& wrong : {group{100000, 6, "offsets(e) is 6; expected a group of 100000 rows inside of 14 for expert 1"},
                               group{9, 6, "offsets(e) is 6; expected a group of 9 rows"},
                               group{INT32_MAX, INT64_MAX, "offsets(e) is 9223372036854775807"},
                               group{-1, 6, "counts(e) is -1; expected 0 or more for expert 1"},
                               group{1, -1, "offsets(e) is -1"}, group{0, 15, "offsets(e) is 15"}}) {
        product<float> p(r);
        p.counts[1] = wrong.count;
        p.offsets[1] = wrong.offset;
        support::workspace memory(ex, 1 << 20);
        const std::string text = message_of<invalid_argument>([&] {
            p.wgrad(ex, memory);
            ex.synchronize();
        });
        INFO(text);
        CHECK(has(text, host ? wrong.host_text
                             : ("counts(1) is " + std::to_string(wrong.count) + "; expected a group inside of the S rows").c_str()));
        CHECK(memory.arena().used() == 0);
        if (host) CHECK(p.untouched());
        CHECK(support::poisoned(row(p.dw.view(), product<float>::out)) == product<float>::in);
        CHECK(p.dw.damage() == "");
        if (host) {
            CHECK(has(message_of<invalid_argument>([&] { p.forward(ex, memory); }), wrong.host_text));
            CHECK(has(message_of<invalid_argument>([&] { p.dgrad(ex, memory); }), wrong.host_text));
        } else {
            CHECK_NOTHROW(p.forward(ex, memory));
            CHECK_NOTHROW(p.dgrad(ex, memory));
        }
        CHECK_NOTHROW(ex.synchronize());
        CHECK(p.y.damage() + p.dx.damage() == "");
    }
}

TEST_CASE_TEMPLATE("a gradient in double keeps every digit of sums in float that are added to it", Cell, FASTMOE_CELLS)
{
    using T = typename Cell::type;
    FASTMOE_SEEDED(r, 203);
    FASTMOE_EXECUTOR(ex, Cell);
    product<T, double> p(r);
    support::fill_normal(r, p.dy.view(), 0.01); // so that the sums are small beside 1
    for (const bool transposed : {false, true}) {
        std::fill_n(p.dw.data(), 3 * 20 * 30, 1.0);
        auto dw = p.gradient();
        if (transposed) dw = stacked_transposed(tensor_view<double, 3>(p.dw.data(), 3, 20, 30));
        support::in_workspace(ex, [&](arena& memory) {
            gemm::portable{}.wgrad(ex, p.groups(), plain_rows<T>{p.dy.view()}, plain_rows<T>{p.x.view()}, dw,
                                   write_mode::accumulate, memory);
        });
        ex.synchronize();
        int64_t wrong = 0;
        for (int64_t e = 0; e < 3; ++e)
            for (int64_t o = 0; o < 30; ++o)
                for (int64_t i = 0; i < 20; ++i) {
                    double sum = 0, magnitude = 0;
                    for (int64_t s = p.offsets[e]; s < p.offsets[e] + p.counts[e]; ++s) {
                        const double term = double(p.dy.view()(s, o)) * double(p.x.view()(s, i));
                        sum += term;
                        magnitude += std::fabs(term);
                    }
                    // dw - 1 is exact; the last rounding was one near 1, those before it were of the sum.
                    const double sums = (4 * std::sqrt(p.counts[e]) + 2) * support::roundoff<accumulate_t<T>> * magnitude;
                    wrong += !(std::fabs((dw(e, o, i) - 1) - sum) <= sums + 0x1p-53);
                }
        CHECK(wrong == 0);
    }
    CHECK(p.dw.damage() == "");
}

namespace {

/// The arguments of all three verbs, for a test to spoil one of.
template <class Rows, class DyRows>
struct arguments {
    row_groups groups;
    Rows x;
    DyRows dy;
    weight_view<float> w, dw;
    matrix_view<const float> bias;
    matrix_view<float> y, dx;
};

/// Each verb that takes the spoilt argument must refuse it by these words, and write nothing.
template <class Executor, class Spoil>
void check_refusals(Executor& ex, product<float>& p, const Spoil& spoil, const char* verbs, const std::string& words)
{
    CAPTURE(words);
    std::vector<int32_t> index(p.slots);
    for (int64_t s = 0; s < p.slots; ++s) index[s] = static_cast<int32_t>(s);
    support::workspace memory(ex, 1 << 20);
    const auto check = [&](auto a) {
        spoil(a);
        const gemm::portable g;
        const auto refuses = [&](char verb, const auto& call) {
            if (!std::strchr(verbs, verb)) return;
            const std::string text = message_of<invalid_argument>(call);
            CAPTURE(verb);
            CHECK_MESSAGE(text.find(words) != std::string::npos, text);
        };
        refuses('f', [&] { g.forward(ex, a.groups, a.x, a.w, a.bias, a.y, no_epilogue{}, memory.arena()); });
        refuses('d', [&] { g.dgrad(ex, a.groups, a.dy, a.w, a.dx, no_epilogue{}, memory.arena()); });
        refuses('w', [&] { g.wgrad(ex, a.groups, a.dy, a.x, a.dw, write_mode::overwrite, memory.arena()); });
    };
    const indexed_rows<float> x{p.x.view(), as_vector(index)}, dy{p.dy.view(), as_vector(index)};
    check(arguments<indexed_rows<float>, indexed_rows<float>>{p.groups(), x, dy, p.weights(), p.gradient(), p.bias_view(), p.y.view(), p.dx.view()});
    if constexpr (requires(arguments<plain_rows<float>, plain_rows<float>> a) { spoil(a); })
        check(arguments<plain_rows<float>, plain_rows<float>>{
            p.groups(), {p.x.view()}, {p.dy.view()}, p.weights(), p.gradient(), p.bias_view(), p.y.view(), p.dx.view()});
    CHECK(memory.arena().used() == 0);
    CHECK(p.untouched());
}

template <class View>
void lose(View& v)
{
    v = View(nullptr, v.extents());
}
/// The same elements, one byte further.
template <class T, class Shape>
void skew(::cuda::std::mdspan<T, Shape>& v)
{
    v = ::cuda::std::mdspan<T, Shape>(reinterpret_cast<T*>(reinterpret_cast<std::uintptr_t>(v.data_handle()) + 1), v.extents());
}

// Only of rows that have one; named, since nvcc forgets what a lambda requires.
struct lose_index_of_x {
    template <class Arguments>
    void operator()(Arguments& a) const
        requires requires { a.x.index; }
    {
        lose(a.x.index);
    }
};
struct lose_index_of_dy {
    template <class Arguments>
    void operator()(Arguments& a) const
        requires requires { a.dy.index; }
    {
        lose(a.dy.index);
    }
};

} // namespace

TEST_CASE_TEMPLATE("memory that is missing or misaligned is refused by name before anything is written", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_SEEDED(r, 204);
    FASTMOE_EXECUTOR(ex, Cell);
    product<float> p(r);
    const auto refuses = [&](const char* verbs, const std::string& words, const auto& spoil) { check_refusals(ex, p, spoil, verbs, words); };
    refuses("fdw", "counts (E) is a null pointer", [](auto& a) { lose(a.groups.counts); });
    refuses("fdw", "offsets (E+1) is a null pointer", [](auto& a) { lose(a.groups.offsets); });
    refuses("fdw", "a pointer aligned to 4 bytes", [](auto& a) { skew(a.groups.counts); });
    refuses("fdw", "a pointer aligned to 8 bytes", [](auto& a) { skew(a.groups.offsets); });
    refuses("f", "rows (S,.) is a null pointer", [](auto& a) { lose(a.x.data); });
    refuses("d", "rows (S,.) is a null pointer", [](auto& a) { lose(a.dy.data); });
    refuses("w", "rows of X is a null pointer", [](auto& a) { lose(a.x.data); });
    refuses("w", "rows of dY is a null pointer", [](auto& a) { lose(a.dy.data); });
    refuses("fw", "a pointer aligned to 4 bytes", [](auto& a) { skew(a.x.data); });
    refuses("dw", "a pointer aligned to 4 bytes", [](auto& a) { skew(a.dy.data); });
    refuses("fw", "index of rows (S) is a null pointer", lose_index_of_x{});
    refuses("dw", "index of rows (S) is a null pointer", lose_index_of_dy{});
    refuses("fd", "W (E,out,in) is a null pointer", [](auto& a) { a.w.data = nullptr; });
    refuses("w", "dW (E,out,in) is a null pointer", [](auto& a) { a.dw.data = nullptr; });
    refuses("f", "bias (E,out) is ", [](auto& a) { skew(a.bias); });
    refuses("f", "output rows (S,.) is a null pointer", [](auto& a) { lose(a.y); });
    refuses("d", "output rows (S,.) is a null pointer", [](auto& a) { lose(a.dx); });
    float* matrices[4] = {p.w.data(), p.w.data() + 600, p.w.data() + 1200, nullptr};
    const auto crooked = reinterpret_cast<float* const*>(reinterpret_cast<std::uintptr_t>(matrices) + 1);
    refuses("fd", "an array of pointers", [&](auto& a) { a.w.pointers = crooked; });
    refuses("w", "an array of pointers", [&](auto& a) { a.dw.pointers = crooked; });
    if (!std::is_same_v<typename Cell::executor, host_executor>) return; // elsewhere they lie where the host may not read
    matrices[1] = nullptr;
    refuses("fd", "memory for expert 1, aligned to 4 bytes", [&](auto& a) { a.w.pointers = matrices; });
    refuses("w", "memory for expert 1, aligned to 4 bytes", [&](auto& a) { a.dw.pointers = matrices; });
    matrices[1] = reinterpret_cast<float*>(reinterpret_cast<std::uintptr_t>(p.w.data()) + 2);
    refuses("fd", "memory for expert 1, aligned to 4 bytes", [&](auto& a) { a.w.pointers = matrices; });
    refuses("w", "memory for expert 1, aligned to 4 bytes", [&](auto& a) { a.dw.pointers = matrices; });
}

TEST_CASE_TEMPLATE("matrices that overlap are refused as a gradient, and read as weights", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_SEEDED(r, 205);
    FASTMOE_EXECUTOR(ex, Cell);
    product<float> p(r);
    const auto overlap = [&](int64_t expert, int64_t row, int64_t col, const std::string& words) {
        check_refusals(
            ex, p, [=](auto& a) { a.dw.expert_stride = expert, a.dw.row_stride = row, a.dw.col_stride = col; }, "w", words);
    };
    overlap(0, 20, 1, "dW (E,out,in) is 0; expected strides of matrices that do not overlap: 1 or more");
    overlap(599, 20, 1, "dW (E,out,in) is 599; expected strides of matrices that do not overlap: 600 or more");
    overlap(600, 19, 1, "dW (E,out,in) is 19; expected strides of matrices that do not overlap: 20 or more");
    overlap(600, 0, 1, "dW (E,out,in) is 0;");
    overlap(600, 1, 29, "dW (E,out,in) is 29; expected strides of matrices that do not overlap: 30 or more");
    overlap(600, 1, 1, "dW (E,out,in) is 1; expected strides of matrices that do not overlap: 30 or more");
    overlap(20, 20, 1, "expected strides of matrices that do not overlap");
    overlap(-10, 60, 1, "dW (E,out,in) is 10;");
    // Experts side by side in each row, and experts from the last to the first, do not overlap.
    const auto accepts = [&](weight_view<float> dw) {
        support::in_workspace(ex, [&](arena& memory) {
            gemm::portable{}.wgrad(ex, p.groups(), plain_rows<float>{p.dy.view()}, plain_rows<float>{p.x.view()}, dw,
                                   write_mode::overwrite, memory);
        });
        ex.synchronize();
        CHECK(support::poisoned(p.dw.vector()) == 0);
        support::poison(p.dw.vector());
    };
    accepts({p.dw.data(), nullptr, 3, 30, 20, 20, 60, 1});
    accepts({p.dw.data() + 1200, nullptr, 3, 30, 20, -600, 20, 1});
    accepts({p.dw.data(), nullptr, 3, 30, 20, 30, 1, 90});
    // One matrix that all experts read.
    auto shared = p.weights();
    shared.expert_stride = 0;
    support::in_workspace(ex, [&](arena& memory) {
        gemm::portable{}.forward(ex, p.groups(), plain_rows<float>{p.x.view()}, shared, p.bias_view(), p.y.view(), no_epilogue{}, memory);
    });
    ex.synchronize();
    CHECK(support::poisoned(p.y.vector()) == 2 * p.out);
}

TEST_CASE_TEMPLATE("a workspace one byte short is refused before anything is written", T, FASTMOE_DTYPES)
{
    FASTMOE_SEEDED(r, 206);
    host_executor ex({.threads = 2});
    product<T> p(r);
    const auto refuses = [&](const auto& verb) {
        arena measure;
        verb(measure);
        REQUIRE(measure.bytes() > 0);
        buffer<std::byte, host_executor> memory(ex, measure.bytes());
        arena short_of_one(vector_view<std::byte>(memory.data(), measure.bytes() - 1));
        CHECK_THROWS_AS(verb(short_of_one), out_of_memory);
        CHECK(short_of_one.used() == 0);
        CHECK(p.untouched());
        arena enough(memory.view());
        CHECK_NOTHROW(verb(enough));
        CHECK_FALSE(p.untouched());
        support::poison(p.y.vector());
        support::poison(p.dx.vector());
        support::poison(p.dw.vector());
    };
    refuses([&](arena& memory) { p.forward(ex, memory); });
    refuses([&](arena& memory) { p.dgrad(ex, memory); });
    refuses([&](arena& memory) { p.wgrad(ex, memory); });
}
