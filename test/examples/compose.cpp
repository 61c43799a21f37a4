// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The step of examples/compose.cu where there is no GPU: against a block written out token by token in double and its finite
/// differences, on every executor of the tests; and captured and replayed on one that queues as a stream does.
#include <algorithm>
#include <cmath>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/layer/moe_layer.hpp>

#include "compose/block.hpp"
#include "compose/loops.hpp"
#include "support/compare.hpp"
#include "support/executors.hpp"
#include "support/finite_difference.hpp"
#include "support/queued.hpp"
#include "support/random.hpp"

namespace {

namespace fm = fastmoe;
using fm::int64_t;

static_assert(fm::gate_policy<compose::pair_gate, fm::host_executor, fm::bfloat16, fm::self>);
static_assert(fm::trainable_expert<compose::squared_relu_expert, fm::host_executor, fm::bfloat16>);

constexpr compose::block_shape small{.tokens = 9, .width = 6, .hidden = 5, .experts = 4};

/// The block in double, with loops.
struct oracle {
    compose::block_shape s;
    std::vector<double> in; // h, gate, up, down, dout, as block_shape lays them out

    const double* gate() const { return in.data() + s.tokens * s.width; }
    const double* up() const { return gate() + s.experts * s.width; }
    const double* down() const { return up() + s.experts * s.hidden * s.width; }
    const double* dout() const { return down() + s.experts * s.hidden * s.width; }

    std::vector<double> normalized(int64_t t) const
    {
        const double* h = in.data() + t * s.width;
        double squares = 0;
        for (int64_t d = 0; d < s.width; ++d) squares += h[d] * h[d];
        std::vector<double> x(h, h + s.width);
        for (double& v : x) v /= std::sqrt(squares / double(s.width) + 1e-6);
        return x;
    }
    std::vector<double> logits(int64_t t) const
    {
        const auto x = normalized(t);
        std::vector<double> l(s.experts, 0.0);
        for (int64_t e = 0; e < s.experts; ++e)
            for (int64_t d = 0; d < s.width; ++d) l[e] += x[d] * gate()[e * s.width + d];
        return l;
    }
    /// The two greatest, and by how much the second leads the third.
    struct choice {
        int64_t a, b;
        double lead;
    };
    choice choose(int64_t t) const
    {
        const auto l = logits(t);
        std::vector<int64_t> order(s.experts);
        for (int64_t e = 0; e < s.experts; ++e) order[e] = e;
        std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return l[i] > l[j]; });
        return {order[0], order[1], l[order[1]] - l[order[2]]};
    }
    std::vector<double> out(int64_t t) const
    {
        const auto x = normalized(t), l = logits(t);
        const choice c = choose(t);
        std::vector<double> to(in.begin() + t * s.width, in.begin() + (t + 1) * s.width);
        for (const int64_t e : {c.a, c.b}) {
            const double weight = std::exp(l[e]) / (std::exp(l[c.a]) + std::exp(l[c.b]));
            for (int64_t j = 0; j < s.hidden; ++j) {
                double pre = 0;
                for (int64_t d = 0; d < s.width; ++d) pre += x[d] * up()[(e * s.hidden + j) * s.width + d];
                for (int64_t d = 0; pre > 0 && d < s.width; ++d)
                    to[d] += weight * pre * pre * down()[(e * s.width + d) * s.hidden + j];
            }
        }
        return to;
    }
    std::vector<double> outputs() const
    {
        std::vector<double> all;
        for (int64_t t = 0; t < s.tokens; ++t)
            for (double v : out(t)) all.push_back(v);
        return all;
    }
    double loss() const
    {
        const auto y = outputs();
        double sum = 0;
        for (std::size_t i = 0; i < y.size(); ++i) sum += y[i] * dout()[i];
        return sum;
    }
};

/// Inputs that T holds, whose tokens choose so clearly that rounding does not change the choice.
template <class T>
std::vector<T> draw(support::random& r, const compose::block_shape& s)
{
    std::vector<T> in;
    for (int64_t i = 0; i < s.elements(); ++i) {
        const bool token = i < s.tokens * s.width || i >= s.elements() - s.tokens * s.width;
        in.push_back(support::narrow<T>(r.normal(token ? 1 : 0.6)));
    }
    for (int64_t t = 0; t < s.tokens; ++t)
        while (oracle{s, support::widened(in)}.choose(t).lead < 0.3)
            for (int64_t d = 0; d < s.width; ++d) in[t * s.width + d] = support::narrow<T>(r.normal());
    return in;
}

/// The step with memory of an executor, a workspace of exactly its size, and outputs that are NaN before it runs.
template <class T, class Executor>
struct scene {
    Executor& ex;
    compose::block_shape shape;
    fm::buffer<T, Executor> in, out;
    compose::loops<Executor> kernels;
    fm::buffer<std::byte, Executor> workspace;

    scene(Executor& e, const compose::block_shape& s)
        : ex(e), shape(s), in(e, s.elements()), out(e, s.elements()), kernels{e, s.tokens, s.width},
          workspace(e, compose::step_bytes(e, kernels, pointers()))
    {
    }
    compose::block_pointers<T> pointers() { return shape.lay_out<T>(in.data(), out.data()); }
    void fill(const std::vector<T>& values)
    {
        reach([&] {
            for (int64_t i = 0; i < in.size(); ++i) in.data()[i] = values[i], out.data()[i] = support::narrow<T>(NAN);
            for (int64_t i = 0; i < workspace.size(); ++i) workspace.data()[i] = std::byte{0xff};
        });
    }
    void run()
    {
        fm::arena memory(workspace.view());
        compose::train_step(ex, kernels, pointers(), memory);
    }
    std::vector<T> results()
    {
        ex.synchronize();
        std::vector<T> values;
        reach([&] { values.assign(out.data(), out.data() + out.size()); });
        return values;
    }

private:
    template <class F>
    void reach(const F& f)
    {
        if constexpr (requires { ex.touch(f); }) ex.touch(f);
        else f();
    }
};

/// The gradients of h, gate, up and down, then out: what a step writes, in its order.
std::vector<double> expected(oracle o)
{
    std::vector<double> h(o.in.begin(), o.in.end() - o.s.tokens * o.s.width);
    auto all = support::finite_difference(
        [&] {
            std::copy(h.begin(), h.end(), o.in.begin());
            return o.loss();
        },
        h, 1e-4);
    std::copy(h.begin(), h.end(), o.in.begin());
    const auto y = o.outputs();
    all.insert(all.end(), y.begin(), y.end());
    return all;
}

} // namespace

TEST_CASE("in double, the step gives the block's output and the finite differences of every input")
{
    FASTMOE_SEEDED(r, 901);
    fm::host_executor ex({.threads = 2});
    for (int repeat = 0; repeat < 5; ++repeat) {
        scene<double, fm::host_executor> step(ex, small);
        const auto in = draw<double>(r, small);
        step.fill(in);
        step.run();
        const auto found = step.results(), wanted = expected({small, in});
        REQUIRE(found.size() == wanted.size());
        for (std::size_t i = 0; i < found.size(); ++i) {
            INFO("element ", i, " is ", found[i], ", expected ", wanted[i]);
            REQUIRE(std::fabs(found[i] - wanted[i]) < 1e-8 * (1 + std::fabs(wanted[i])));
        }
    }
}

TEST_CASE_TEMPLATE("so it does within the rounding of every type, on every executor", Cell, FASTMOE_CELLS)
{
    using T = typename Cell::type;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(r, 902);
    scene<T, typename Cell::executor> step(ex, small);
    const auto in = draw<T>(r, small);
    step.fill(in);
    step.run();
    // x and pre count twice in the square; then a, rows, y and out, and as many on the way back.
    const double roundings = 10;
    auto wanted = expected({small, support::widened(in)});
    const auto found = step.results();
    const auto n = static_cast<std::size_t>(small.tokens * small.width), size = found.size();
    const auto router = static_cast<std::size_t>(small.experts * small.width);
    const std::size_t stack = router * static_cast<std::size_t>(small.hidden), at[] = {0, n, n + router, n + router + stack, size - n, size};
    for (int part = 0; part < 5; ++part) { // each is as exact as its own largest element asks
        INFO("part ", part);
        const std::vector<T> mine(found.begin() + at[part], found.begin() + at[part + 1]);
        const std::vector<double> should(wanted.begin() + at[part], wanted.begin() + at[part + 1]);
        CHECK(support::close(mine, should, {.length = std::is_same_v<T, double> ? 1e6 : 100, .roundings = roundings}));
    }
}

TEST_CASE_TEMPLATE("captured once it is replayed for other tokens, and equals the step that was not captured bit for bit", T, float,
                   fm::bfloat16)
{
    FASTMOE_SEEDED(r, 903);
    const compose::block_shape s{.tokens = 70, .width = 24, .hidden = 20, .experts = 6};
    support::queued device;
    fm::host_executor host({.threads = 2});
    scene<T, support::queued> captured(device, s), eager(device, s);
    scene<T, fm::host_executor> same(host, s);
    captured.fill(draw<T>(r, s));
    const auto graph = device.capture([&] { captured.run(); });
    CHECK(graph.size() > 20);
    std::vector<T> before;
    for (int repeat = 0; repeat < 3; ++repeat) {
        const auto in = draw<T>(r, s);
        captured.fill(in);
        eager.fill(in);
        same.fill(in);
        device.replay(graph);
        eager.run();
        same.run();
        const auto found = captured.results();
        CHECK(support::same_bits(found, eager.results()));
        CHECK_FALSE(support::same_bits(found, before));
        CHECK(support::close(found, support::widened(same.results()), {.length = 200, .roundings = 2}));
        before = found;
    }
}

TEST_CASE("its gate and its expert stand in a layer, which gives the same bits for the same tokens")
{
    FASTMOE_SEEDED(r, 904);
    const compose::block_shape s{.tokens = 70, .width = 24, .hidden = 20, .experts = 6};
    fm::host_executor ex({.threads = 2});
    scene<float, fm::host_executor> step(ex, s);
    step.fill(draw<float>(r, s));
    step.run();
    const auto found = step.results();

    const fm::moe_layer layer{compose::pair_gate{.experts = s.experts}, compose::squared_relu_expert{.width = s.width, .hidden = s.hidden},
                              fm::self{}};
    const auto p = step.pointers();
    std::vector<float> in(step.in.data(), step.in.data() + step.in.size()), out(in.size(), NAN);
    std::vector<float> x(s.tokens * s.width), y(x.size()), dy(p.dout, p.dout + s.tokens * s.width), dx(x.size());
    const auto mine = s.lay_out<float>(in.data(), out.data());
    step.kernels.normalize(p.h, x.data());
    using weights = fm::moe_weights<float, compose::squared_relu_expert>;
    const auto stack = [](float* m, int64_t e, int64_t o, int64_t i) { return fm::stacked(fm::tensor_view<float, 3>(m, e, o, i)); };
    const auto views = [&](float* gate, float* up, float* down) {
        return weights{fm::matrix_view<float>(gate, s.experts, s.width), {},
                       {stack(up, s.experts, s.hidden, s.width), stack(down, s.experts, s.width, s.hidden)}};
    };
    float* gate = in.data() + s.tokens * s.width;
    float* up = gate + s.experts * s.width;
    const auto w = views(gate, up, up + s.experts * s.hidden * s.width);
    const auto matrix = [&](auto& v) { return fm::as_matrix(v, s.tokens, s.width); };
    const auto saved = layer.forward(ex, matrix(x), w, matrix(y));
    layer.backward(ex, saved, matrix(dy), w, matrix(dx), views(mine.dgate, mine.dup, mine.ddown));
    step.kernels.add(p.h, y.data(), mine.out);
    step.kernels.normalize_backward(p.h, dx.data(), p.dout, mine.dh);

    const auto rows = static_cast<std::size_t>(s.tokens * s.width); // the layer rounds dx once, the step twice
    CHECK(support::same_bits(std::vector<float>(found.begin() + rows, found.end()), std::vector<float>(out.begin() + rows, out.end())));
    CHECK(support::close(std::vector<float>(found.begin(), found.begin() + rows),
                         std::vector<double>(out.begin(), out.begin() + rows), {.length = 4, .roundings = 4}));
}
