// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Experts that apply the routing weights beside experts that do not, in one layer.
#include <doctest/doctest.h>

#include "support/compare.hpp"
#include "support/mlp_memory.hpp"

using namespace fastmoe;
namespace oracle = support::reference;

namespace {

template <class T, class Executor>
struct linear_memory {
    std::int64_t experts, width;
    buffer<T, Executor> weight, bias;

    linear_memory(Executor& ex, const std::vector<oracle::expert>& from, bool poison)
        : experts(static_cast<std::int64_t>(from.size())), width(from[0].width),
          weight(support::upload(ex, support::narrowed<T>(oracle::stacked(from, &oracle::expert::down)))),
          bias(support::upload(ex, support::narrowed<T>(oracle::stacked(from, &oracle::expert::down_bias))))
    {
        if (poison) support::poison(weight.view()), support::poison(bias.view());
    }
    linear_weights<T> views()
    {
        return {stacked(tensor_view<T, 3>(weight.data(), experts, width, width)), bias.matrix(experts, width)};
    }
};

/// What expert_tuple would give for three types, and their weights and gradients.
template <class Cell>
struct three_types {
    using T = typename Cell::type;
    using Executor = typename Cell::executor;
    static constexpr int64_t tokens = 40, width = 9, hidden = 5;

    std::vector<oracle::expert> a, b, c; // linear, mlp, linear
    linear_memory<T, Executor> wa, wc, ga, gc;
    support::mlp_memory<T, Executor> wb, gb;

    three_types(Executor& ex, support::random& r)
        : a(support::random_experts<T>(r, 2, oracle::expert_kind::linear, oracle::activation::relu, width, width, true)),
          b(support::random_experts<T>(r, 3, oracle::expert_kind::mlp, oracle::activation::gelu, width, hidden, true)),
          c(support::random_experts<T>(r, 1, oracle::expert_kind::linear, oracle::activation::relu, width, width, true)),
          wa(ex, a, false), wc(ex, c, false), ga(ex, a, true), gc(ex, c, true), wb(ex, b, {}, false), gb(ex, b, {}, true)
    {
    }
    static auto tuple(weigh_at weigh = weigh_at::output)
    {
        const linear<> one{.width = width, .biases = true};
        return expert_tuple(several{one, 2}, several{mlp<gelu>{.width = width, .hidden = hidden, .biases = true, .weigh = weigh}, 3},
                            several{one, 1});
    }
};

} // namespace

TEST_CASE_TEMPLATE("linear experts on either side of an mlp give the oracle's values and gradients", Cell, FASTMOE_CELLS)
{
    using T = typename Cell::type;
    FASTMOE_SEEDED(r, 91);
    FASTMOE_EXECUTOR(ex, Cell);
    three_types<Cell> t(ex, r);
    const int64_t tokens = t.tokens, width = t.width;
    using expert_type = decltype(t.tuple());
    static_assert(expert_type::applies_weights);
    const moe_layer layer{top_k_gate<>{.experts = 6, .k = 3}, t.tuple(), self{}};
    oracle::model m{width, {}, {}, t.a, {}, oracle::weight_at::output};
    m.experts.insert(m.experts.end(), t.b.begin(), t.b.end());
    m.experts.insert(m.experts.end(), t.c.begin(), t.c.end());
    auto gate = support::upload(ex, support::narrowed<T>(r.normals(6 * width)));
    m.gate = support::widened(gate.view());
    support::guarded<T> dgate(6, width), x(tokens, width), y(tokens, width), again(tokens, width), dy(tokens, width), dx(tokens, width);
    const auto xs = support::fill_normal(r, x.view()), dys = support::fill_normal(r, dy.view());
    const moe_weights<T, expert_type> w{gate.matrix(6, width), {}, {t.wa.views(), {t.wb.views(), t.wc.views()}}};
    const moe_weights<T, expert_type> g{dgate.view(), {}, {t.ga.views(), {t.gb.views(), t.gc.views()}}};

    support::workspace kept(ex, layer.template forward_bytes<T>(ex, tokens, width));
    support::workspace lent(ex, layer.template backward_bytes<T>(ex, tokens, width));
    const auto saved = layer.forward(ex, x.view(), w, y.view(), kept.arena());
    layer.infer(ex, x.view(), w, again.view());
    layer.backward(ex, saved, dy.view(), w, dx.view(), g, lent.arena());
    ex.synchronize();
    const auto ids = support::download(ex, saved.routing().experts);
    const std::vector<int> fixed(ids.begin(), ids.end());
    const oracle::options o{.k = 3};
    const auto out = oracle::forward(m, o, xs, tokens, &fixed);
    const auto back = oracle::backward(m, o, xs, tokens, out, dys);
    const support::tolerance bound{.length = 300, .roundings = 8, .magnitude = 60};
    CHECK(support::close(y.view(), out.y, bound));
    CHECK(support::same_bits(support::download(ex, again.view()), support::download(ex, y.view())));
    CHECK(support::close(dx.view(), back.x, bound));
    CHECK(support::close(dgate.view(), back.gate, {.length = 400, .roundings = 8, .magnitude = 300}));
    const auto part = [&](int64_t first, int64_t count, auto member) {
        const std::vector<oracle::expert> of(back.experts.begin() + first, back.experts.begin() + first + count);
        return oracle::stacked(of, member);
    };
    CHECK(support::close(t.ga.weight.view(), part(0, 2, &oracle::expert::down), bound));
    CHECK(support::close(t.ga.bias.view(), part(0, 2, &oracle::expert::down_bias), bound));
    CHECK(support::close(support::narrowed<T>(t.gb.up()), part(2, 3, &oracle::expert::up), bound));
    CHECK(support::close(support::narrowed<T>(t.gb.down()), part(2, 3, &oracle::expert::down), bound));
    CHECK(support::close(support::narrowed<T>(t.gb.down_bias()), part(2, 3, &oracle::expert::down_bias), bound));
    CHECK(support::close(t.gc.weight.view(), part(5, 1, &oracle::expert::down), bound));
    CHECK(support::close(t.gc.bias.view(), part(5, 1, &oracle::expert::down_bias), bound));
    CHECK(y.damage() + dx.damage() == "");
}

TEST_CASE("a linear expert beside an mlp that applies the weights elsewhere than on the output is refused")
{
    using types = three_types<support::cell<host_executor, float>>;
    host_executor ex({.threads = 1});
    support::random r(92);
    types t(ex, r);
    const moe_layer layer{top_k_gate<>{.experts = 6, .k = 2}, types::tuple(weigh_at::activation), self{}};
    const auto w = random_weights<float>(ex, layer, 1);
    support::guarded<float> x(3, types::width), y(3, types::width);
    support::fill_normal(r, x.view());
    const auto text = support::message_of<invalid_argument>([&] { layer.infer(ex, x.view(), w.view(), y.view()); });
    CHECK_MESSAGE(support::has(text, "weighs_output() of the first expert is "), text);
    CHECK_EQ(support::poisoned(y.view()), 3 * types::width);
}

TEST_CASE("a pair keeps what its types keep, each for all slots, and the outputs of those that apply no weights")
{
    const auto pair = expert_tuple(several{linear<>{.width = 64}, 2}, several{mlp<gelu>{.width = 64, .hidden = 128}, 2});
    arena all;
    pair.reserve_saved<float>(all, 512);
    CHECK_EQ(all.bytes(), 512 * (64 + 128) * 4);
}
