// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the grouped products promise beside their numbers: what they refuse, by name and before they write, and that
/// the workspace comes back.
#include <doctest/doctest.h>

#include <vector>

#include <fastmoe/gemm/portable.hpp>

#include "reference_gemm.hpp"
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
        const std::string text = message_of<invalid_argument>([&] { p.wgrad(ex, memory); });
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
        CHECK(p.y.damage() + p.dx.damage() == "");
        CHECK_NOTHROW(ex.synchronize());
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
                    wrong += !support::near<accumulate_t<T>>(dw(e, o, i), 1 + sum, magnitude, p.counts[e]);
                }
        CHECK(wrong == 0);
    }
    CHECK(p.dw.damage() == "");
}
