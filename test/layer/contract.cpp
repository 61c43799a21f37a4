// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the layer promises besides values: memory, bits, threads, and what it does with bad input.
#include <doctest/doctest.h>

#include <thread>

#include "support/allocations.hpp"
#include "support/compare.hpp"
#include "support/layer_memory.hpp"

using namespace fastmoe;
namespace oracle = support::reference;

namespace {

using expert_type = mlp<swiglu>;
using gate_type = top_k_gate<softmax_score>;
using layer_type = moe_layer<gate_type, expert_type, self>;

layer_type make_layer(int64_t experts = 8, int64_t k = 2, int64_t width = 48, int64_t hidden = 40)
{
    return {gate_type{.experts = experts, .k = k, .capacity = {.factor = 1.5}, .balance = {0.1}, .z = {0.01}},
            expert_type{.width = width, .hidden = hidden, .biases = true}, self{}};
}

template <class T, class Executor = host_executor>
struct run_memory {
    support::layer_memory<T, expert_type, Executor> w;
    support::gradient_memory<accumulate_t<T>, expert_type, Executor> g;
    support::guarded<T> x, y, dy, dx;

    run_memory(Executor& ex, const layer_type& layer, int64_t tokens, std::uint64_t seed)
        : run_memory(ex, layer, tokens, support::random(seed))
    {
    }
    run_memory(Executor& ex, const layer_type& layer, int64_t tokens, support::random r)
        : w(ex, r, layer.expert, layer.gate.experts, oracle::activation::swiglu, true), g(ex, w.model),
          x(tokens, layer.expert.width), y(tokens, layer.expert.width), dy(tokens, layer.expert.width),
          dx(tokens, layer.expert.width)
    {
        support::fill_normal(r, x.view());
        support::fill_normal(r, dy.view());
    }
    /// Everything that a step writes.
    std::vector<double> results()
    {
        std::vector<double> out = support::widened(y.view());
        const auto add = [&out](const std::vector<double>& v) { out.insert(out.end(), v.begin(), v.end()); };
        add(support::widened(dx.view()));
        add(support::widened(g.gate.view()));
        add(support::widened(g.gate_bias.view()));
        add(g.experts.up());
        add(g.experts.down());
        add(g.experts.up_bias());
        add(g.experts.down_bias());
        return out;
    }
};

} // namespace

TEST_CASE_TEMPLATE("the same bits come out for 1, 2 and 4 threads and on every run", T, FASTMOE_DTYPES)
{
    const auto layer = make_layer();
    std::vector<std::vector<double>> results;
    for (const int threads : {1, 2, 4, 2}) {
        host_executor ex({.threads = threads});
        run_memory<T> m(ex, layer, 700, 61);
        for (int repeat = 0; repeat < 2; ++repeat) {
            const auto saved = layer.forward(ex, m.x.view(), m.w.views, m.y.view());
            layer.backward(ex, saved, m.dy.view(), m.w.views, m.dx.view(), m.g.views);
            results.push_back(m.results());
        }
    }
    for (const auto& r : results) CHECK(support::same_bits(r, results[0]));
}

TEST_CASE_TEMPLATE("with the caller's workspace a step allocates nothing", T, FASTMOE_DTYPES)
{
    const auto layer = make_layer();
    host_executor ex({.threads = 2});
    run_memory<T> m(ex, layer, 300, 62);
    support::workspace kept(ex, layer.forward_bytes<T>(ex, 300, 48));
    support::workspace lent(ex, layer.backward_bytes<T, accumulate_t<T>>(ex, 300, 48));
    support::workspace inference(ex, layer.infer_bytes<T>(ex, 300, 48));
    for (int repeat = 0; repeat < 2; ++repeat) {
        kept.arena().rewind(0);
        const support::allocations before;
        const auto saved = layer.forward(ex, m.x.view(), m.w.views, m.y.view(), kept.arena());
        layer.backward(ex, saved, m.dy.view(), m.w.views, m.dx.view(), m.g.views, lent.arena());
        layer.infer(ex, m.x.view(), m.w.views, m.y.view(), inference.arena());
        CHECK(before.since() == 0);
    }
}

TEST_CASE("what is saved is routing, plan and the expert's pre-activation, to the byte")
{
    const auto layer = make_layer(64, 2, 512, 2048);
    const int64_t tokens = 4096, choices = 2 * tokens;
    arena expert, rest;
    layer.expert.reserve_saved<float>(expert, choices);
    CHECK(expert.bytes() == choices * 2 * 2048 * 4);
    rest.matrix<float>(tokens, 64);                             // logits
    layer.gate.reserve<float>(rest, tokens);                    // choices, weights, losses
    reserve_plan(rest, tokens, choices, 64);                    // slots
    CHECK(layer.saved_bytes<float>(tokens, 512) == expert.bytes() + rest.bytes());
    CHECK(rest.bytes() < choices * 200);                        // a few hundred bytes a token, no row of x or y
}

TEST_CASE("a workspace one byte too small is refused before anything is written")
{
    const auto layer = make_layer();
    host_executor ex({.threads = 2});
    run_memory<float> m(ex, layer, 50, 63);
    support::workspace small(ex, layer.infer_bytes<float>(ex, 50, 48) - 1);
    const auto text = support::message_of<out_of_memory>([&] { layer.infer(ex, m.x.view(), m.w.views, m.y.view(), small.arena()); });
    CHECK_MESSAGE(support::has(text, "workspace is"), text);
    CHECK(support::poisoned(m.y.view()) == 50 * 48);
    support::workspace forward(ex, layer.forward_bytes<float>(ex, 50, 48) - 1);
    CHECK_THROWS_AS((void)layer.forward(ex, m.x.view(), m.w.views, m.y.view(), forward.arena()), out_of_memory);
    CHECK(support::poisoned(m.y.view()) == 50 * 48);
    const auto saved = layer.forward(ex, m.x.view(), m.w.views, m.y.view());
    support::workspace backward(ex, layer.backward_bytes<float>(ex, 50, 48) - 1);
    CHECK_THROWS_AS(layer.backward(ex, saved, m.dy.view(), m.w.views, m.dx.view(), m.g.views, backward.arena()), out_of_memory);
    CHECK(support::poisoned(m.dx.view()) == 50 * 48);
    CHECK(support::poisoned(m.g.gate.view()) == 8 * 48);
}

TEST_CASE_TEMPLATE("weight gradients in a later call are those of one call, written or added", T, FASTMOE_DTYPES)
{
    using G = accumulate_t<T>;
    const auto layer = make_layer();
    host_executor ex({.threads = 2});
    run_memory<T> once(ex, layer, 90, 64), later(ex, layer, 90, 64), twice(ex, layer, 90, 64);
    const auto saved = layer.forward(ex, once.x.view(), once.w.views, once.y.view());
    layer.backward(ex, saved, once.dy.view(), once.w.views, once.dx.view(), once.g.views);
    layer.backward(ex, saved, twice.dy.view(), twice.w.views, twice.dx.view(), twice.g.views);
    layer.backward(ex, saved, twice.dy.view(), twice.w.views, twice.dx.view(), twice.g.views, {.gradients = write_mode::accumulate});
    (void)layer.forward(ex, later.x.view(), later.w.views, later.y.view());
    support::workspace pending_memory(ex, layer.backward_input_bytes<T>(ex, 90, 48));
    support::workspace lent(ex, layer.backward_weights_bytes<T, G>(ex, 90, 48));
    const auto pending = layer.backward_input(ex, saved, later.dy.view(), later.w.views, later.dx.view(), pending_memory.arena());
    CHECK(support::poisoned(later.g.gate.view()) == 8 * 48);
    layer.backward_weights(ex, saved, pending, later.g.views, lent.arena());
    CHECK(support::same_bits(later.results(), once.results()));
    // Written once and added once. A product may start its sums from what is there, so rounding may differ.
    const auto is_double_of = [](const auto& found, std::vector<double> expected) {
        for (double& v : expected) v *= 2;
        return support::close(support::narrowed<G>(found), expected, {.length = 200});
    };
    CHECK(is_double_of(support::widened(twice.g.gate.view()), support::widened(once.g.gate.view())));
    CHECK(is_double_of(twice.g.experts.up(), once.g.experts.up()));
    CHECK(is_double_of(twice.g.experts.down_bias(), once.g.experts.down_bias()));
}

TEST_CASE("two threads share one layer, each with its own executor, and two with one executor")
{
    const auto layer = make_layer();
    host_executor first({.threads = 2}), second({.threads = 2});
    run_memory<float> expected(first, layer, 200, 65), a(first, layer, 200, 65), b(second, layer, 200, 65), c(first, layer, 200, 65);
    const auto step = [&](host_executor& ex, run_memory<float>& m) {
        for (int repeat = 0; repeat < 5; ++repeat) {
            const auto saved = layer.forward(ex, m.x.view(), m.w.views, m.y.view());
            layer.backward(ex, saved, m.dy.view(), m.w.views, m.dx.view(), m.g.views);
        }
    };
    step(first, expected);
    std::thread one([&] { step(first, a); }), two([&] { step(second, b); }), three([&] { step(first, c); });
    one.join();
    two.join();
    three.join();
    CHECK(support::same_bits(a.results(), expected.results()));
    CHECK(support::same_bits(b.results(), expected.results()));
    CHECK(support::same_bits(c.results(), expected.results()));
}

TEST_CASE("two microbatches may be in flight")
{
    const auto layer = make_layer();
    host_executor ex({.threads = 2});
    run_memory<float> a(ex, layer, 60, 66), b(ex, layer, 33, 67), a_alone(ex, layer, 60, 66);
    const auto saved_a = layer.forward(ex, a.x.view(), a.w.views, a.y.view());
    const auto saved_b = layer.forward(ex, b.x.view(), b.w.views, b.y.view());
    layer.backward(ex, saved_b, b.dy.view(), b.w.views, b.dx.view(), b.g.views);
    layer.backward(ex, saved_a, a.dy.view(), a.w.views, a.dx.view(), a.g.views);
    const auto saved = layer.forward(ex, a_alone.x.view(), a_alone.w.views, a_alone.y.view());
    layer.backward(ex, saved, a_alone.dy.view(), a_alone.w.views, a_alone.dx.view(), a_alone.g.views);
    CHECK(support::same_bits(a.results(), a_alone.results()));
}

TEST_CASE_TEMPLATE("logits that are not finite follow the documented order, and other tokens are untouched", T, double, float)
{
    const auto layer = layer_type{gate_type{.experts = 4, .k = 2}, expert_type{.width = 4, .hidden = 6}, self{}};
    host_executor ex({.threads = 2});
    support::random r(68);
    support::layer_memory<T, expert_type, host_executor> w(ex, r, layer.expert, 4, oracle::activation::swiglu, false);
    // The router reads one column each, so that the token's columns are its logits.
    for (int64_t e = 0; e < 4; ++e)
        for (int64_t d = 0; d < 4; ++d) w.views.gate(e, d) = T(e == d);
    w.model.gate = support::widened(w.views.gate);
    support::guarded<T> x(4, 4), y(4, 4);
    support::fill_normal(r, x.view());
    x.view()(1, 2) = T(NAN); // 0 * NaN is NaN: every logit of this token
    layer.infer(ex, x.view(), w.views, y.view());
    const auto saved = layer.forward(ex, x.view(), w.views, y.view());
    CHECK(saved.routing().experts(2) == -1);
    CHECK(saved.routing().experts(3) == -1);
    for (int64_t d = 0; d < 4; ++d) {
        CHECK(double(y.view()(1, d)) == 0.0); // dropped
        CHECK(std::isfinite(double(y.view()(0, d))));
    }
    const auto out = oracle::forward(w.model, {.k = 2}, support::widened(x.view()), 4);
    CHECK(support::close(y.view(), out.y, {.length = 100, .roundings = 4, .magnitude = 10}));
}

TEST_CASE("all tokens on one expert is a layer like any other")
{
    const auto layer = layer_type{gate_type{.experts = 5, .k = 2}, expert_type{.width = 6, .hidden = 8}, self{}};
    host_executor ex({.threads = 2});
    support::random r(69);
    support::layer_memory<double, expert_type, host_executor> w(ex, r, layer.expert, 5, oracle::activation::swiglu, false);
    support::gradient_memory<double, expert_type, host_executor> g(ex, w.model);
    support::guarded<double> x(300, 6), y(300, 6), dy(300, 6), dx(300, 6);
    support::fill_normal(r, x.view());
    support::fill_normal(r, dy.view());
    for (int64_t t = 0; t < 300; ++t) x.view()(t, 0) = 50;
    for (int64_t e = 0; e < 5; ++e) w.views.gate(e, 0) = e == 3 ? 10 : e == 1 ? 5 : -5;
    w.model.gate = support::widened(w.views.gate);
    const auto saved = layer.forward(ex, x.view(), w.views, y.view());
    CHECK(saved.plan().counts(3) == 300);
    CHECK(saved.plan().counts(0) == 0);
    layer.backward(ex, saved, dy.view(), w.views, dx.view(), g.views);
    const auto xs = support::widened(x.view());
    const auto out = oracle::forward(w.model, {.k = 2}, xs, 300);
    const auto back = oracle::backward(w.model, {.k = 2}, xs, 300, out, support::widened(dy.view()));
    const support::tolerance bound{.length = 4000, .roundings = 8, .magnitude = 2e4};
    CHECK(support::close(y.view(), out.y, bound));
    CHECK(support::close(dx.view(), back.x, bound));
    CHECK(support::close(support::narrowed<double>(g.experts.up()), oracle::stacked(back.experts, &oracle::expert::up), bound));
    for (int64_t i = 0; i < g.views.expert.up.out * g.views.expert.up.in; ++i)
        REQUIRE(g.views.expert.up.base(0)[i] == 0.0); // no token: exact zeros over the poison
}

TEST_CASE("bad input is refused by the name of the argument, and y stays as it was")
{
    const auto layer = make_layer();
    host_executor ex({.threads = 2});
    run_memory<float> m(ex, layer, 20, 70);
    support::guarded<float> narrow(20, 47), few(19, 48);
    const auto text = [](auto f) { return support::message_of<invalid_argument>(f); };
    const auto infer = [&](matrix_view<const float> x, moe_weights<const float, expert_type> w, matrix_view<float> y) {
        return text([&] { layer.infer(ex, x, w, y); });
    };
    const moe_weights<const float, expert_type> w = m.w.views;
    CHECK(support::has(infer(few.view(), w, m.y.view()), "x (T,D) is of shape (19,48); expected (20,48)"));
    CHECK(support::has(infer(narrow.view(), w, narrow.view()), "weights.gate (E,D) is of shape (8,48); expected (8,47)"));
    CHECK(support::has(infer({}, w, m.y.view()), "x (T,D) is of shape (0,0)"));
    CHECK(support::has(infer(matrix_view<const float>(nullptr, 20, 48), w, m.y.view()), "x (T,D) is a null pointer"));
    const matrix_view<const float> skewed(reinterpret_cast<const float*>(reinterpret_cast<const char*>(m.x.data()) + 2), 20, 48);
    CHECK(support::has(infer(skewed, w, m.y.view()), "expected a pointer aligned to 4 bytes"));
    auto wrong = w;
    wrong.expert.up.experts = 7;
    CHECK(support::has(infer(m.x.view(), wrong, m.y.view()), "weights.up (E,H',D) is 7; expected 8 experts"));
    auto bias = w;
    bias.gate_bias = slice(w.gate_bias, 0, 7);
    CHECK(support::has(infer(m.x.view(), bias, m.y.view()), "gate_bias (E) is of shape (7); expected (8)"));
    const auto gate = [&](gate_type g) {
        const layer_type bad{g, layer.expert, self{}};
        return text([&] { bad.infer(ex, m.x.view(), w, m.y.view()); });
    };
    CHECK(support::has(gate({.experts = 8, .k = 9}), "k is 9; expected at most the number of experts, 8"));
    CHECK(support::has(gate({.experts = 8, .k = 0}), "k is 0; expected 1 or more"));
    CHECK(support::has(gate({.experts = 8, .k = 2, .capacity = {.factor = -1}}), "capacity.factor is -1; expected zero or more"));
    support::workspace memory(ex, 1 << 20);
    const vector_view<std::byte> misaligned(memory.arena().vector<std::byte>(4096).data_handle() + 8, 1024);
    CHECK(support::has(text([&] { arena a(misaligned); }), "workspace is"));
    CHECK(support::poisoned(m.y.view()) == 20 * 48);
    const auto saved = layer.forward(ex, m.x.view(), m.w.views, m.y.view());
    CHECK(support::has(text([&] { layer.backward(ex, saved, few.view(), m.w.views, m.dx.view(), m.g.views); }), "dy (T,D) is of shape (19,48)"));
    CHECK(support::has(text([&] { layer.backward(ex, saved, m.dy.view(), m.w.views, few.view(), m.g.views); }), "dx (T,D) is of shape (19,48)"));
    CHECK(support::poisoned(m.dx.view()) == 20 * 48);
}
