// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A training step of a layer on the host with memory for all that it reads and writes: for what must hold whatever the
/// values are (bits, threads, memory). Gradients are kept in accumulate_t. It counts allocations: see allocations.hpp.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include <doctest/doctest.h>

#include "allocations.hpp"
#include "compare.hpp"
#include "counting_memory.hpp"
#include "layer_memory.hpp"

namespace support {

/// The same seed gives the same weights and input.
template <class T, class Layer>
struct layer_step {
    using expert_type = std::remove_cvref_t<decltype(Layer::expert)>;
    using G = fastmoe::accumulate_t<T>;

    const Layer& layer;
    std::int64_t tokens, width;
    reference::model model;
    layer_memory<T, expert_type, fastmoe::host_executor> w;
    layer_memory<G, expert_type, fastmoe::host_executor> g;
    guarded<T> x, y, dy, dx;

    layer_step(fastmoe::host_executor& ex, const Layer& l, std::int64_t count, std::uint64_t seed)
        : layer_step(ex, l, count, random(seed))
    {
    }

    auto forward(fastmoe::host_executor& ex) { return layer.forward(ex, x.view(), w.views, y.view()); }
    template <class Saved>
    void backward(fastmoe::host_executor& ex, const Saved& saved, const fastmoe::backward_options& options = {})
    {
        layer.backward(ex, saved, dy.view(), w.views, dx.view(), g.views, options);
    }
    void run(fastmoe::host_executor& ex)
    {
        const auto saved = forward(ex);
        backward(ex, saved);
    }

    /// Everything that a step writes.
    std::vector<double> results()
    {
        std::vector<double> out = widened(y.view());
        const auto add = [&out](const std::vector<double>& v) { out.insert(out.end(), v.begin(), v.end()); };
        add(widened(dx.view()));
        add(widened(g.gate.view()));
        add(widened(g.gate_bias.view()));
        for (auto member : {&reference::expert::up, &reference::expert::down, &reference::expert::up_bias, &reference::expert::down_bias})
            add(g.experts.read(member));
        return out;
    }

private:
    layer_step(fastmoe::host_executor& ex, const Layer& l, std::int64_t count, random r)
        : layer(l), tokens(count), width(l.expert.model_width()),
          model(random_model<T, fastmoe::host_executor>(r, l.expert, width, l.gate.experts, r.normals(l.gate.experts, 0.3))),
          w(ex, l.expert, model), g(ex, l.expert, poisoned(model)), x(count, width), y(count, width), dy(count, width), dx(count, width)
    {
        fill_normal(r, x.view());
        fill_normal(r, dy.view());
    }
};

/// The same bits for 1, 2 and 4 threads and on every run.
template <class T, class Layer>
void check_bits(const Layer& layer, std::int64_t tokens)
{
    std::vector<std::vector<double>> results;
    for (const int threads : {1, 2, 4, 2}) {
        fastmoe::host_executor ex({.threads = threads});
        layer_step<T, Layer> m(ex, layer, tokens, 61);
        for (int repeat = 0; repeat < 2; ++repeat) {
            m.run(ex);
            results.push_back(m.results());
        }
    }
    for (const double v : results[0]) REQUIRE(v - v == 0); // written, and finite
    for (const auto& r : results) CHECK(same_bits(r, results[0]));
}

/// Three threads share a layer, two of them an executor as well; each gets the bits of a step alone.
template <class T, class Layer>
void check_shared(const Layer& layer, std::int64_t tokens)
{
    fastmoe::host_executor first({.threads = 2}), second({.threads = 2});
    layer_step<T, Layer> expected(first, layer, tokens, 65), a(first, layer, tokens, 65), b(second, layer, tokens, 65),
        c(first, layer, tokens, 65);
    const auto steps = [](fastmoe::host_executor& ex, layer_step<T, Layer>& m) {
        for (int repeat = 0; repeat < 5; ++repeat) m.run(ex);
    };
    expected.run(first);
    std::thread one([&] { steps(first, a); }), two([&] { steps(second, b); }), three([&] { steps(first, c); });
    one.join();
    two.join();
    three.join();
    for (auto* m : {&a, &b, &c}) CHECK(same_bits(m->results(), expected.results()));
}

/// Two microbatches in flight, the first of them last back: each gets the bits of a step alone.
template <class T, class Layer>
void check_in_flight(const Layer& layer)
{
    fastmoe::host_executor ex({.threads = 2});
    layer_step<T, Layer> a(ex, layer, 60, 66), b(ex, layer, 33, 67), a_alone(ex, layer, 60, 66), b_alone(ex, layer, 33, 67);
    const auto saved_a = a.forward(ex);
    const auto saved_b = b.forward(ex);
    a.backward(ex, saved_a);
    b.backward(ex, saved_b);
    a_alone.run(ex);
    b_alone.run(ex);
    CHECK(same_bits(a.results(), a_alone.results()));
    CHECK(same_bits(b.results(), b_alone.results()));
}

/// Calls of all of a layer's passes in the caller's workspaces, of exactly the size asked for.
template <class T, class Layer>
class layer_calls {
public:
    using G = fastmoe::accumulate_t<T>;

    layer_calls(fastmoe::host_executor& ex, layer_step<T, Layer>& m)
        : ex_(ex), m_(m), forward_(ex, m.layer.template forward_bytes<T>(ex, m.tokens, m.width)),
          backward_(ex, m.layer.template backward_bytes<T, G>(ex, m.tokens, m.width)),
          input_(ex, m.layer.template backward_input_bytes<T>(ex, m.tokens, m.width)),
          weights_(ex, m.layer.template backward_weights_bytes<T, G>(ex, m.tokens, m.width)),
          infer_(ex, m.layer.template infer_bytes<T>(ex, m.tokens, m.width))
    {
    }

    void operator()()
    {
        for (auto* w : {&forward_, &input_}) w->arena().rewind(0);
        const auto saved = m_.layer.forward(ex_, m_.x.view(), m_.w.views, m_.y.view(), forward_.arena());
        m_.layer.backward(ex_, saved, m_.dy.view(), m_.w.views, m_.dx.view(), m_.g.views, backward_.arena());
        const auto pending =
            m_.layer.backward_input(ex_, saved, m_.dy.view(), m_.w.views, m_.dx.view(), input_.arena());
        m_.layer.backward_weights(ex_, saved, pending, m_.g.views, weights_.arena());
        m_.layer.infer(ex_, m_.x.view(), m_.w.views, m_.y.view(), infer_.arena());
    }

private:
    fastmoe::host_executor& ex_;
    layer_step<T, Layer>& m_;
    workspace<fastmoe::host_executor> forward_, backward_, input_, weights_, infer_;
};

/// What a layer keeps besides what its expert declares: logits, routing and plan.
template <class T, class Gate>
std::int64_t routing_bytes(const Gate& gate, std::int64_t tokens)
{
    fastmoe::arena rest;
    rest.matrix<fastmoe::accumulate_t<T>>(tokens, gate.experts);
    gate.template reserve<fastmoe::accumulate_t<T>>(rest, tokens);
    reserve_plan(rest, tokens, tokens * gate.k, gate.experts);
    return rest.bytes();
}

/// Without a workspace, what forward holds afterwards is what saved_bytes says, and what it took on the way forward_bytes;
/// with the caller's workspaces no pass takes anything.
template <class T, class Expert>
void check_memory(const Expert& expert, std::int64_t experts)
{
    const fastmoe::moe_layer layer{fastmoe::top_k_gate<>{.experts = experts, .k = 2}, expert, fastmoe::self{}};
    using layer_type = std::remove_const_t<decltype(layer)>;
    counting_memory memory;
    fastmoe::host_executor ex({.threads = 2, .memory = &memory});
    layer_step<T, layer_type> m(ex, layer, 70, 57);
    const std::int64_t others = memory.live(), width = expert.model_width();
    memory.reset();
    {
        const auto saved = m.forward(ex);
        CHECK(memory.live() - others == layer.template saved_bytes<T>(70, width));
        CHECK(memory.peak() - others == layer.template forward_bytes<T>(ex, 70, width));
    }
    CHECK(memory.live() == others);
    layer_calls<T, layer_type> calls(ex, m);
    calls();
    memory.reset();
    const allocations before;
    calls();
    CHECK(before.since() == 0);
    CHECK(before.mallocs() == 0);
    CHECK(memory.calls() == 0);
}

} // namespace support
