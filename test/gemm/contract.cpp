// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the grouped products promise beside their numbers: what they refuse, by name and before they write, and that
/// the workspace comes back.
#include <doctest/doctest.h>

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
