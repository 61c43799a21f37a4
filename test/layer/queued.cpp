// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A layer on an executor that behaves as a CUDA stream does: nothing is read on the host, nothing waits, and what was
/// captured once is right for other inputs.
#include <cmath>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/gemm/block_products.hpp>
#include <fastmoe/gemm/hopper_fp8.hpp>
#include <fastmoe/moe.hpp>

#include "support/fiber_blocks.hpp"
#include "support/fiber_clusters.hpp"
#include "support/queued.hpp"
#include "support/random.hpp"

using namespace fastmoe;

namespace {

constexpr int64_t tokens = 70, width = 32;

/// A training step and inference with memory of an executor for all that they read and write.
template <class T, class Layer, class Executor>
struct step {
    using G = accumulate_t<T>;
    const Layer& layer;
    Executor& ex;
    owned_weights_t<T, Layer, Executor> weights;
    owned_weights_t<G, Layer, Executor> gradients;
    buffer<T, Executor> x, dy, y, dx, inferred;
    buffer<std::byte, Executor> memory, lent;
    buffer<std::uint64_t, Executor> random;

    step(const Layer& l, Executor& e)
        : layer(l), ex(e), weights(random_weights<T>(e, l, 1)), gradients(zero_weights<G>(e, l)), x(e, tokens * width),
          dy(e, tokens * width), y(e, tokens * width), dx(e, tokens * width), inferred(e, tokens * width),
          memory(e, l.template forward_bytes<T>(e, tokens, width)),
          lent(e, l.template backward_bytes<T, G>(e, tokens, width) + l.template infer_bytes<T>(e, tokens, width)),
          random(e, 2)
    {
    }

    /// Queues all three passes.
    void run()
    {
        arena a(memory.view()), b(lent.view());
        const auto matrix = [](auto& m) { return m.matrix(tokens, width); };
        const gate_options options{.random = random.data()};
        const auto saved = layer.forward(ex, matrix(x), weights.view(), matrix(y), a, options);
        layer.backward(ex, saved, matrix(dy), weights.view(), matrix(dx), gradients.view(), b);
        layer.infer(ex, matrix(x), weights.view(), matrix(inferred), b, options);
    }
    void fill(std::uint64_t seed, std::uint64_t number = 0)
    {
        support::random r(seed);
        const auto write = [&] {
            for (int64_t i = 0; i < tokens * width; ++i) x.data()[i] = T(static_cast<float>(r.normal()));
            for (int64_t i = 0; i < tokens * width; ++i) dy.data()[i] = T(static_cast<float>(r.normal()));
            random.data()[0] = 9;
            random.data()[1] = number;
        };
        if constexpr (requires { ex.touch(write); }) ex.touch(write);
        else write();
    }
    std::vector<float> results()
    {
        ex.synchronize();
        std::vector<float> out;
        const auto read = [&] {
            for (auto* m : {&y, &dx, &inferred})
                for (int64_t i = 0; i < tokens * width; ++i) out.push_back(static_cast<float>(m->data()[i]));
            const auto gate = gradients.view().gate;
            for (int64_t i = 0; i < gate.extent(0) * gate.extent(1); ++i) out.push_back(static_cast<float>(gate.data_handle()[i]));
            if constexpr (requires { gradients.view().expert.up; }) {
                const auto up = gradients.view().expert.up;
                for (int64_t i = 0; i < up.experts * up.out * up.in; ++i) out.push_back(static_cast<float>(up.data[i]));
            }
        };
        if constexpr (requires { ex.touch(read); }) ex.touch(read);
        else read();
        return out;
    }
};

/// The largest difference, and NaN if there is one.
double difference(const std::vector<float>& a, const std::vector<float>& b)
{
    REQUIRE(a.size() == b.size());
    double most = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
        const double d = std::fabs(double(a[i]) - double(b[i]));
        most = d > most || std::isnan(d) ? d : most;
    }
    return most;
}

/// What two orders of the same sums may differ by.
template <class T>
double bound()
{
    if constexpr (std::is_same_v<T, double>) return 1e-6;
    else if constexpr (std::is_same_v<T, float>) return 2e-5;
    else return std::is_same_v<T, bfloat16> ? 0.15 : 0.02;
}

using layer_type = moe_layer<top_k_gate<softmax_score>, mlp<swiglu>, self>;

layer_type make_layer(weigh_at weigh = weigh_at::output)
{
    return {top_k_gate<softmax_score>{.experts = 6, .k = 2, .capacity = {.factor = 1.25}, .balance = {.coefficient = 0.01},
                                               .z = {.coefficient = 0.001}},
                     mlp<swiglu>{.width = width, .hidden = 16, .biases = true, .weigh = weigh}, self{}};
}

/// A step is captured and replayed with other routings: each time the bits of a step that was not, and the host's values.
template <class T, class Layer, class HostLayer, class Device>
void replays_as_host(const Layer& layer, const HostLayer& on_host, Device& device)
{
    host_executor host({.threads = 2});
    step<T, Layer, Device> captured(layer, device), eager(layer, device);
    step<T, HostLayer, host_executor> expected(on_host, host);
    captured.fill(16);
    const auto graph = device.capture([&] { captured.run(); });
    for (const std::uint64_t seed : {17, 18}) {
        captured.fill(seed);
        eager.fill(seed);
        expected.fill(seed);
        device.replay(graph);
        eager.run();
        expected.run();
        const auto results = captured.results();
        CHECK(results == eager.results());
        CHECK(difference(results, expected.results()) < bound<T>());
    }
}

} // namespace

TEST_CASE_TEMPLATE("a layer reads nothing on the host, waits for nothing, and computes what it computes on the host", T, double,
                   float, bfloat16, fastmoe::half)
{
    for (const auto weigh : {weigh_at::output, weigh_at::activation, weigh_at::input}) {
        const auto layer = make_layer(weigh);
        support::queued device;
        host_executor host({.threads = 2});
        step<T, layer_type, support::queued> a(layer, device);
        step<T, layer_type, host_executor> b(layer, host);
        a.fill(2);
        b.fill(2);
        a.run();
        b.run();
        const auto mine = a.results();
        CHECK(mine.size() > 6000);
        CHECK(difference(mine, b.results()) < bound<T>());
    }
}

TEST_CASE_TEMPLATE("a captured step is replayed with other routing, and equals the step that was not captured bit for bit", T,
                   float, bfloat16)
{
    const auto layer = make_layer();
    support::queued device;
    step<T, layer_type, support::queued> captured(layer, device), eager(layer, device);
    captured.fill(3);
    const auto graph = device.capture([&] { captured.run(); });
    CHECK(graph.size() > 20);
    std::vector<float> before;
    for (const std::uint64_t seed : {4, 5, 6}) {
        captured.fill(seed);
        eager.fill(seed);
        device.replay(graph);
        eager.run();
        const auto results = captured.results();
        CHECK(results == eager.results());
        CHECK(results != before);
        before = results;
    }
}

TEST_CASE_TEMPLATE("with the products of blocks a layer computes what it computes on the host, and what is captured is replayed", T,
                   float, bfloat16, fastmoe::half)
{
    support::fiber_blocks<support::queued> device;
    replays_as_host<T>(make_layer(), make_layer(), device);
    CHECK((device.products > 1000) == (sizeof(T) == 2)); // tensor cores
    CHECK(device.lines > 1000);
    CHECK(device.bank_conflicts == 0);
}

TEST_CASE_TEMPLATE("so it does with those of warpgroups, activations in registers", T, bfloat16, fastmoe::half)
{
    support::fiber_clusters<support::queued> device;
    const auto with = [](auto gemm) {
        using expert = mlp<swiglu, decltype(gemm)>;
        return moe_layer{top_k_gate<softmax_score>{.experts = 3, .k = 2, .capacity = {.factor = 1.25}},
                         expert{.width = width, .hidden = 16, .biases = true, .layout = gated_layout::interleaved}, self{}};
    };
    replays_as_host<T>(with(gemm::hopper{}), with(gemm::portable{}), device);
    CHECK(device.products > 100);
    CHECK(device.box_bytes > 0);
}

TEST_CASE("so it does with products of codes, which are quantized in the workspace")
{
    support::fiber_clusters<support::queued> device;
    using expert = mlp<swiglu, gemm::hopper_fp8>;
    const moe_layer layer{top_k_gate<softmax_score>{.experts = 3, .k = 2, .capacity = {.factor = 1.25}},
                          expert{.width = width, .hidden = 32, .biases = true, .layout = gated_layout::interleaved}, self{}};
    replays_as_host<bfloat16>(layer, layer, device);
    CHECK(device.products > 100);
    CHECK(device.box_bytes > 100000); // the weights' codes, too
}

TEST_CASE("a step of decoding is six launches: logits, choices, plan, two products, combine")
{
    support::fiber_clusters<support::fiber_blocks<support::queued>> device;
    const auto launches = [&](int64_t few, gated_layout layout) {
        using expert = mlp<swiglu, gemm::hopper>;
        const moe_layer layer{top_k_gate<softmax_score>{.experts = 8, .k = 2}, expert{.width = width, .hidden = 16, .layout = layout}, self{}};
        const auto weights = random_weights<bfloat16>(device, layer, 1);
        buffer<bfloat16, decltype(device)> x(device, few * width), y(device, few * width);
        buffer<std::byte, decltype(device)> memory(device, layer.infer_bytes<bfloat16>(device, few, width));
        const auto graph = device.capture([&] {
            arena a(memory.view());
            layer.infer(device, x.matrix(few, width), weights.view(), y.matrix(few, width), a);
        });
        return graph.size();
    };
    for (const int64_t few : {1, 8, 32}) {
        CHECK(launches(few, gated_layout::interleaved) == 6);
        CHECK(launches(few, gated_layout::concatenated) == 7); // activations, row by row
    }
}

TEST_CASE("other gates wait for nothing either; a replay draws what its step says")
{
    support::queued device;
    enum class draws { none, some };
    const auto run = [&](const auto& gate, draws chance) {
        const moe_layer layer{gate, linear<>{.width = width}, self{}};
        step<float, std::remove_cvref_t<decltype(layer)>, support::queued> s(layer, device);
        s.fill(7);
        const auto graph = device.capture([&] { s.run(); });
        const auto replay = [&](std::uint64_t number) {
            s.fill(7, number);
            device.replay(graph);
            return s.results();
        };
        const auto first = replay(0);
        CHECK(difference(first, replay(0)) == 0);
        CHECK((difference(first, replay(1)) > 0) == (chance == draws::some));
    };
    run(switch_gate{.experts = 6}, draws::none);
    run(expert_choice_gate{.experts = 6, .k = 2}, draws::none);
    run(top_k_gate<sigmoid_score, group_limited>{.experts = 6, .k = 2, .select = {.groups = 3, .keep = 2}}, draws::none);
    run(token_rounding_gate{.experts = 6, .k = 2}, draws::none);
    run(sinkhorn_gate{.experts = 6}, draws::none);
    run(base_gate{.experts = 6}, draws::none);
    run(swipe_gate{.experts = 6, .k = 2}, draws::none);
    run(cosine_gate<>{.experts = 6, .k = 2, .projection_width = 16}, draws::none);
    run(noisy_gate{.experts = 6, .k = 2, .importance = {0.1}, .load = {0.1}}, draws::some);
    run(gshard_gate<>{.experts = 6}, draws::some);
}

TEST_CASE("a fault is thrown by whoever waits, once, and the executor goes on")
{
    support::queued device;
    struct record_one {
        fault_recorder faults;
        void operator()(int64_t i) const { faults.record(fault_kind::expert_out_of_range, 5 + i, 77); }
    };
    for_each(device, 3, record_one{device.faults()});
    CHECK_THROWS_WITH_AS(device.synchronize(), doctest::Contains("routing.experts(5) is 77"), invalid_argument);
    CHECK_NOTHROW(device.synchronize());
}

namespace {

/// Captures a step, replays it on other tokens, and holds it to one that was not captured and to the layer of one rank.
template <class Exchange>
void capture_exchange(const Exchange& exchange)
{
    const auto plain = make_layer();
    const expert_parallel ranks{self{}, self{}, round_robin_placement{}, exchange};
    const moe_layer<top_k_gate<softmax_score>, mlp<swiglu>, std::remove_const_t<decltype(ranks)>> layer{plain.gate, plain.expert, ranks};
    using type = std::remove_const_t<decltype(layer)>;
    support::queued device;
    step<float, type, support::queued> captured(layer, device), eager(layer, device);
    step<float, layer_type, support::queued> one(plain, device);
    captured.fill(13);
    const auto graph = device.capture([&] { captured.run(); });
    for (const std::uint64_t seed : {14, 15}) {
        captured.fill(seed);
        eager.fill(seed);
        one.fill(seed);
        device.replay(graph);
        eager.run();
        one.run();
        const auto results = captured.results();
        CHECK(difference(results, eager.results()) == 0);
        CHECK(difference(results, one.results()) < bound<float>());
    }
}

} // namespace

TEST_CASE("exchanges whose counts the host does not learn are captured and replayed with other routing")
{
    capture_exchange(padded_exchange<>{.rows_per_rank = tokens});
    capture_exchange(gathered_exchange<>{.most_tokens = tokens});
}
