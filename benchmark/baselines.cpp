// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The layer against two other ways to compute the same: the naive one (mask, gather, one product an expert,
/// scatter-add) and one dot product an output. Both get the layer's gate, weights and tokens, and are compared with the
/// layer's results before anything is timed.

#include <memory>

#include <fastmoe/gemm/onednn.hpp>

#include "baselines/dot_product.hpp"
#include "baselines/naive.hpp"
#include "moe_setup.hpp"
#include "race.hpp"

namespace {

using namespace bench;
using Gemm = fm::gemm::onednn;

/// The layer's gate on its own: what the baselines run before their experts.
template <class T>
class gate_only {
public:
    explicit gate_only(moe_setup<T, Gemm>& moe) : moe_(moe)
    {
        kept_ = workspace_for(moe.ex, [&](fm::arena& a) { reserve(a); });
        fm::arena keep(kept_.view());
        reserve(keep);
        scratch_ = memory<std::byte>(moe.ex, int64_t{16} << 20);
    }
    void operator()()
    {
        fm::arena a(scratch_.view());
        const fm::matrix_view<const T> x = moe_.x();
        fm::project(moe_.ex, x, fm::matrix_view<const T>(moe_.weights.view().gate), fm::vector_view<const T>{}, logits_, a);
        moe_.layer.gate.route(moe_.ex, fm::gate_input<T>{x, logits_, {}, {}, fm::gate_mode::training, nullptr}, fm::self{},
                              state_, a);
    }
    /// From the gradient of the weights: the gradients of the router and, added, of the tokens.
    void backward(const memory<float>& dweights, fm::matrix_view<T> dx, fm::matrix_view<T> drouter)
    {
        fm::arena a(scratch_.view());
        const fm::matrix_view<const T> x = moe_.x();
        const fm::vector_view<const float> dw(dweights.data(), dweights.size());
        moe_.layer.gate.backward(moe_.ex, fm::gate_input<T>{x, logits_, {}, {}, fm::gate_mode::training, nullptr}, fm::self{},
                                 state_, dw, 1.0f, dlogits_, a);
        const auto& w = moe_.weights.view();
        fm::project_input_backward(moe_.ex, dlogits_, fm::matrix_view<const T>(w.gate), dx, fm::write_mode::accumulate, a);
        fm::project_weights_backward(moe_.ex, dlogits_, x, drouter, fm::vector_view<T>{}, fm::write_mode::overwrite, a);
    }
    const int32_t* experts() const { return state_.routing.experts.data_handle(); }
    const float* weights() const { return state_.routing.weights.data_handle(); }

private:
    void reserve(fm::arena& a)
    {
        logits_ = a.matrix<float>(moe_.sizes.tokens, moe_.sizes.experts);
        dlogits_ = a.matrix<float>(moe_.sizes.tokens, moe_.sizes.experts);
        state_ = fm::reserve_gate<float>(moe_.layer.gate, a, moe_.sizes.tokens);
    }

    moe_setup<T, Gemm>& moe_;
    fm::matrix_view<float> logits_, dlogits_; // (T,E)
    fm::gate_state_of<typename moe_setup<T, Gemm>::gate_type, T> state_;
    memory<std::byte> kept_, scratch_;
};

/// Forward and backward, all gradients. The naive way keeps its activations, as a framework would; the layer recomputes
/// them and keeps half as much.
template <class T>
standing hold_naive(const shape& s)
{
    fm::host_executor ex;
    moe_setup<T, Gemm> moe(ex, s);
    gate_only<T> gate(moe);
    baselines::naive_moe<T, Gemm> naive(ex, s.tokens, s.k, s.experts, s.width, s.hidden);
    const int64_t size = s.tokens * s.width;
    memory<T> y(ex, size), dx(ex, size);
    memory<float> dweights(ex, s.choices());
    auto gradients = fm::zero_weights<T>(ex, moe.layer);

    const auto& w = moe.weights.view().expert;
    const auto& g = gradients.view().expert;
    const auto naive_train = [&] {
        gate();
        naive.forward(ex, moe.x(), gate.experts(), gate.weights(), w.up, w.down, y.matrix(s.tokens, s.width));
        naive.backward(ex, moe.dy(), gate.weights(), w.up, w.down, dx.matrix(s.tokens, s.width), dweights.data(), g.up, g.down);
        gate.backward(dweights, dx.matrix(s.tokens, s.width), gradients.view().gate);
    };
    moe.train();
    naive_train();
    const int64_t all = s.experts * s.width * s.hidden;
    const auto& ours = moe.gradients.view().expert;
    same("the naive way's y", difference(y.data(), moe.y().data_handle(), size), bound<T>);
    same("the naive way's dx", difference(dx.data(), moe.dx().data_handle(), size), bound<T>);
    same("the naive way's gradient of the router",
         difference(gradients.view().gate.data_handle(), moe.gradients.view().gate.data_handle(), s.experts * s.width),
         bound<T>);
    same("the naive way's gradient of up", difference(g.up.data, ours.up.data, all), bound<T>);
    same("the naive way's gradient of down", difference(g.down.data, ours.down.data, all), bound<T>);

    race r;
    const int layer = r.add([&] { moe.train(); });
    const int other = r.add(naive_train);
    r.run(budget(5));
    return {{{.text = std::string("naive way, forward + backward, ") + type_name<T>() + ", T " + std::to_string(s.tokens) +
                      ", E " + std::to_string(s.experts) + ": its time / the layer's",
              .ratio = r.ratio(other, layer),
              .kind = target::at_least,
              .value = 1,
              .seconds_a_call = r.time(other).middle,
              .also = {{"layer_ms", 1e3 * r.time(layer).middle}}}},
            r.rounds()};
}

template <class T>
standing hold_dots(const shape& s)
{
    fm::host_executor ex;
    moe_setup<T, Gemm> moe(ex, s);
    gate_only<T> gate(moe);
    baselines::dot_product_moe<T> dots(ex, s.tokens, s.k, s.experts, s.width, s.hidden);
    memory<T> y(ex, s.tokens * s.width);
    const auto& w = moe.weights.view().expert;
    const auto dots_forward = [&] {
        gate();
        dots.forward(ex, moe.x(), gate.experts(), gate.weights(), w.up, w.down, y.matrix(s.tokens, s.width));
    };
    moe.infer();
    dots_forward();
    same("the dot products' y", difference(y.data(), moe.y().data_handle(), y.size()), bound<T>);

    race r;
    const int layer = r.add([&] { moe.infer(); });
    const int other = r.add(dots_forward);
    r.run(budget(2));
    return {{{.text = std::string("one dot product an output, forward, ") + type_name<T>() + ", T " +
                      std::to_string(s.tokens) + ", E " + std::to_string(s.experts) + ": its time / the layer's",
              .ratio = r.ratio(other, layer),
              .kind = target::at_least,
              .value = 1,
              .seconds_a_call = r.time(other).middle,
              .also = {{"layer_ms", 1e3 * r.time(layer).middle}}}},
            r.rounds()};
}

template <class T>
void add()
{
    for (int64_t experts : {4, 16, 64})
        register_lines({std::string("baselines/naive/") + type_name<T>() + "/experts:" + std::to_string(experts)},
                       [=] { return hold_naive<T>({4096, 512, 2048, experts, 2}); });
    for (int64_t tokens : {1, 16, 256, 4096})
        register_lines({std::string("baselines/dot_product/") + type_name<T>() + "/tokens:" + std::to_string(tokens)},
                       [=] { return hold_dots<T>({tokens, 512, 2048, 16, 2}); });
}

} // namespace

int main(int argc, char** argv)
{
    add<float>();
    add<fm::bfloat16>();
    return run_all(argc, argv);
}
