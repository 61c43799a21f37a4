// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Weights and gradients in every layout, each call in a workspace of exactly the size that the layer asks for them.
#include <doctest/doctest.h>

#include <functional>

#include "support/compare.hpp"
#include "support/mlp_memory.hpp"

using namespace fastmoe;
namespace oracle = support::reference;

namespace {

/// Matrices whose rows, or columns, and experts lie further apart than they need to; the gaps are poison.
template <class T, class Executor>
class padded_matrices {
public:
    padded_matrices(Executor& ex, int64_t experts, int64_t out, int64_t in, bool transposed)
        : stride_((transposed ? out : in) + 3), lines_(transposed ? in : out), step_(lines_ * stride_ + 5),
          memory_(ex, experts * step_),
          view{memory_.data(), nullptr, experts, out, in, step_, transposed ? 1 : stride_, transposed ? stride_ : 1}
    {
        support::poison(memory_.view());
    }
    void set(const oracle::numbers& values)
    {
        for (int64_t e = 0, n = 0; e < view.experts; ++e)
            for (int64_t o = 0; o < view.out; ++o)
                for (int64_t i = 0; i < view.in; ++i) view(e, o, i) = support::narrow<T>(values[n++]);
    }
    oracle::numbers get() const
    {
        oracle::numbers out;
        for (int64_t e = 0; e < view.experts; ++e)
            for (int64_t o = 0; o < view.out; ++o)
                for (int64_t i = 0; i < view.in; ++i) out.push_back(double(view(e, o, i)));
        return out;
    }
    /// Elements between the lines and between the experts that are still poison, and how many there are.
    bool gaps_are_whole() const
    {
        int64_t whole = 0;
        for (int64_t i = 0; i < memory_.size(); ++i) whole += support::is_poison(memory_.data()[i]);
        return whole == view.experts * (3 * lines_ + 5);
    }

private:
    int64_t stride_, lines_, step_;
    buffer<T, Executor> memory_;

public:
    weight_view<T> view;
};

struct shape {
    int64_t tokens = 23, width = 12, hidden = 19, experts = 3;
};

/// A step with these views in workspaces that fit to the byte, and what the oracle says.
template <class Cell, class Activation>
void compare(typename Cell::executor& ex, const mlp<Activation>& expert, oracle::model& m, support::random& r, const shape& s,
             const mlp_weights<typename Cell::type>& weights, const mlp_weights<typename Cell::type>& gradients,
             const std::function<oracle::numbers()>& up, const std::function<oracle::numbers()>& down)
{
    using T = typename Cell::type;
    const moe_layer layer{top_k_gate<>{.experts = s.experts, .k = 2}, expert, self{}};
    auto gate = support::upload(ex, support::narrowed<T>(r.normals(s.experts * s.width, 0.3)));
    m.gate = support::widened(gate.view());
    support::guarded<T> dgate(s.experts, s.width), x(s.tokens, s.width), y(s.tokens, s.width), again(s.tokens, s.width),
        dy(s.tokens, s.width), dx(s.tokens, s.width);
    const auto xs = support::fill_normal(r, x.view()), dys = support::fill_normal(r, dy.view());
    const moe_weights<T, mlp<Activation>> w{gate.matrix(s.experts, s.width), {}, weights}, g{dgate.view(), {}, gradients};

    support::workspace kept(ex, layer.template forward_bytes<T>(ex, s.tokens, s.width, w));
    support::workspace inference(ex, layer.template infer_bytes<T>(ex, s.tokens, s.width, w));
    support::workspace lent(ex, layer.template backward_bytes<T>(ex, s.tokens, s.width, w, g));
    support::workspace first(ex, layer.template backward_input_bytes<T>(ex, s.tokens, s.width, w));
    support::workspace second(ex, layer.template backward_weights_bytes<T>(ex, s.tokens, s.width, g));
    const auto saved = layer.forward(ex, x.view(), w, y.view(), kept.arena());
    CHECK_EQ(kept.arena().used(), layer.template saved_bytes<T>(s.tokens, s.width));
    layer.infer(ex, x.view(), w, again.view(), inference.arena());
    layer.backward(ex, saved, dy.view(), w, dx.view(), g, lent.arena());
    const auto pending = layer.backward_input(ex, saved, dy.view(), w, dx.view(), first.arena());
    layer.backward_weights(ex, saved, pending, g, second.arena());
    // What the library takes for itself is measured the same way.
    (void)layer.forward(ex, x.view(), w, y.view());
    layer.infer(ex, x.view(), w, again.view());
    layer.backward(ex, saved, dy.view(), w, dx.view(), g);
    ex.synchronize();

    const auto ids = support::download(ex, saved.routing().experts);
    const std::vector<int> fixed(ids.begin(), ids.end());
    const oracle::options o{.k = 2};
    const auto out = oracle::forward(m, o, xs, s.tokens, &fixed);
    const auto back = oracle::backward(m, o, xs, s.tokens, out, dys);
    const support::tolerance bound{.length = 300, .roundings = 8, .magnitude = 60};
    CHECK(support::close(y.view(), out.y, bound));
    CHECK(support::same_bits(support::download(ex, again.view()), support::download(ex, y.view())));
    CHECK(support::close(dx.view(), back.x, bound));
    CHECK(support::close(support::narrowed<T>(up()), oracle::stacked(back.experts, &oracle::expert::up), bound));
    CHECK(support::close(support::narrowed<T>(down()), oracle::stacked(back.experts, &oracle::expert::down), bound));
}

template <class T>
oracle::model draw(support::random& r, const shape& s, oracle::activation act)
{
    return {s.width, {}, {}, support::random_experts<T>(r, s.experts, oracle::expert_kind::mlp, act, s.width, s.hidden, false), {},
            oracle::weight_at::output};
}

} // namespace

TEST_CASE_TEMPLATE("transposed, interleaved and separate matrices fit the workspace that is asked for them", Cell, FASTMOE_CELLS)
{
    using T = typename Cell::type;
    using Executor = typename Cell::executor;
    FASTMOE_SEEDED(r, 101);
    FASTMOE_EXECUTOR(ex, Cell);
    const shape s;
    for (const bool transposed : {false, true})
        for (const bool pointers : {false, true})
            for (const bool same : {true, false}) { // gradients in the layout of the weights, or in the other one
                CAPTURE(transposed);
                CAPTURE(pointers);
                CAPTURE(same);
                auto m = draw<T>(r, s, oracle::activation::swiglu);
                const auto gated = r.one_of(gated_layout::concatenated, gated_layout::interleaved);
                support::mlp_memory<T, Executor> w(ex, m.experts, {transposed, pointers, gated}, false);
                support::mlp_memory<T, Executor> g(ex, m.experts, {transposed == same, pointers == same, gated}, true);
                compare<Cell, swiglu>(ex, {.width = s.width, .hidden = s.hidden, .layout = gated}, m, r, s, w.views(), g.views(),
                                      [&] { return g.up(); }, [&] { return g.down(); });
            }
}

TEST_CASE_TEMPLATE("matrices with gaps between their lines and between the experts fit too, and the gaps stay whole", Cell, FASTMOE_CELLS)
{
    using T = typename Cell::type;
    using Executor = typename Cell::executor;
    FASTMOE_SEEDED(r, 102);
    FASTMOE_EXECUTOR(ex, Cell);
    const shape s;
    for (const bool transposed : {false, true}) {
        CAPTURE(transposed);
        auto m = draw<T>(r, s, oracle::activation::gelu);
        padded_matrices<T, Executor> up(ex, s.experts, s.hidden, s.width, transposed), down(ex, s.experts, s.width, s.hidden, transposed);
        padded_matrices<T, Executor> dup(ex, s.experts, s.hidden, s.width, !transposed), ddown(ex, s.experts, s.width, s.hidden, transposed);
        up.set(oracle::stacked(m.experts, &oracle::expert::up));
        down.set(oracle::stacked(m.experts, &oracle::expert::down));
        compare<Cell, gelu>(ex, {.width = s.width, .hidden = s.hidden}, m, r, s, {up.view, down.view, {}, {}},
                            {dup.view, ddown.view, {}, {}}, [&] { return dup.get(); }, [&] { return ddown.get(); });
        CHECK(up.gaps_are_whole());
        CHECK(down.gaps_are_whole());
        CHECK(dup.gaps_are_whole());
        CHECK(ddown.gaps_are_whole());
    }
}

TEST_CASE_TEMPLATE("a layer of the size of a model takes for transposed weights what these need, not what stacked ones would", T, float, bfloat16)
{
    host_executor ex({.threads = 2});
    FASTMOE_SEEDED(r, 103);
    const int64_t tokens = 256, width = 512, hidden = 1024, experts = 4;
    const moe_layer layer{top_k_gate<>{.experts = experts, .k = 2}, mlp<gelu>{.width = width, .hidden = hidden}, self{}};
    const auto stacked_weights = random_weights<T>(ex, layer, 1);
    auto w = stacked_weights.view();
    w.expert.up = stacked_transposed(tensor_view<T, 3>(w.expert.up.data, experts, width, hidden));
    w.expert.down = stacked_transposed(tensor_view<T, 3>(w.expert.down.data, experts, hidden, width));
    CHECK_NE(layer.template infer_bytes<T>(ex, tokens, width, w), layer.template infer_bytes<T>(ex, tokens, width));
    const auto gradients = zero_weights<T>(ex, layer);
    auto g = gradients.view();
    g.expert.up = stacked_transposed(tensor_view<T, 3>(g.expert.up.data, experts, width, hidden));
    support::guarded<T> x(tokens, width), y(tokens, width), dx(tokens, width);
    support::fill_normal(r, x.view());
    layer.infer(ex, x.view(), w, y.view());
    const auto saved = layer.forward(ex, x.view(), w, y.view());
    layer.backward(ex, saved, x.view(), w, dx.view(), g);
    CHECK_EQ(support::poisoned(y.view()) + support::poisoned(dx.view()), 0);
}
