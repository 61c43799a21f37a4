// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the layer promises besides values: memory, bits, threads, and what it does with bad input.
#include <doctest/doctest.h>

#include "support/allocations.hpp"
#include "support/compare_layer.hpp"
#include "support/counting_memory.hpp"
#include "support/layer_step.hpp"

using namespace fastmoe;
namespace oracle = support::reference;

namespace {

using expert_type = mlp<swiglu>;
using gate_type = top_k_gate<softmax_score>;
using layer_type = moe_layer<gate_type, expert_type, self>;

layer_type make_layer(weigh_at weigh = weigh_at::output, int64_t experts = 8, int64_t k = 2, int64_t width = 48, int64_t hidden = 40)
{
    return {gate_type{.experts = experts, .k = k, .capacity = {.factor = 1.5}, .balance = {0.1}, .z = {0.01}},
            expert_type{.width = width, .hidden = hidden, .biases = true, .weigh = weigh}, self{}};
}

template <class T>
using step = support::layer_step<T, layer_type>;

} // namespace

TEST_CASE_TEMPLATE("the same bits come out for 1, 2 and 4 threads and on every run", T, FASTMOE_DTYPES)
{
    support::check_bits<T>(make_layer(), 700);
}

TEST_CASE_TEMPLATE("with the caller's workspace no pass allocates anything, wherever the weight is", T, FASTMOE_DTYPES)
{
    for (const auto weigh : {weigh_at::output, weigh_at::activation, weigh_at::input}) {
        const auto layer = make_layer(weigh);
        host_executor ex({.threads = 2});
        step<T> m(ex, layer, 300, 62);
        support::layer_calls<T, layer_type> calls(ex, m);
        for (int repeat = 0; repeat < 2; ++repeat) {
            const support::allocations before;
            calls();
            CHECK(before.since() == 0);
            CHECK(before.mallocs() == 0);
        }
    }
}

TEST_CASE("what is saved is routing, plan and the expert's pre-activation, to the byte")
{
    const auto layer = make_layer(weigh_at::output, 64, 2, 512, 2048);
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

TEST_CASE("fine-grained experts save little: the rows of docs/performance.md, in bfloat16")
{
    struct shape {
        int64_t tokens, width, hidden, experts, k;
        double most; // GiB, the input included
    };
    for (const shape& s : {shape{32768, 4096, 256, 256, 16, 0.80}, shape{24576, 1536, 256, 128, 8, 0.28}}) {
        const moe_layer layer{top_k_gate<softmax_score>{.experts = s.experts, .k = s.k}, mlp<swiglu>{.width = s.width, .hidden = s.hidden}, self{}};
        const int64_t choices = s.tokens * s.k, kept = layer.saved_bytes<bfloat16>(s.tokens, s.width);
        const int64_t pre = choices * 2 * s.hidden * 2;
        CHECK(kept - pre >= 20 * choices + 4 * s.tokens * s.experts);         // expert, weight, slot, choice and token of each choice; logits
        CHECK(kept - pre < 20 * choices + 4 * s.tokens * s.experts + 262144); // and nothing else but what is of experts
        CHECK(static_cast<double>(kept + s.tokens * s.width * 2) / (1 << 30) < s.most);
    }
}

TEST_CASE_TEMPLATE("without a workspace, forward takes from the executor's resource what it keeps and what it lends, no more", T,
                   FASTMOE_DTYPES)
{
    for (const auto weigh : {weigh_at::output, weigh_at::input}) {
        const auto layer = make_layer(weigh);
        support::counting_memory memory;
        host_executor ex({.threads = 2, .memory = &memory});
        step<T> m(ex, layer, 90, 63);
        const int64_t others = memory.live();
        const int64_t kept = layer.template saved_bytes<T>(90, 48), all = layer.template forward_bytes<T>(ex, 90, 48);
        memory.reset();
        {
            const auto saved = m.forward(ex);
            CHECK(memory.live() - others == kept);
            CHECK(memory.peak() - others == all);
            CHECK(memory.calls() == 2);
            memory.reset();
            m.backward(ex, saved);
            CHECK(memory.live() - others == kept);
            CHECK(memory.peak() - others == kept + layer.template backward_bytes<T, accumulate_t<T>>(ex, 90, 48));
            CHECK(memory.calls() == 1);
        }
        CHECK(memory.live() == others);
        memory.reset();
        layer.infer(ex, m.x.view(), m.w.views, m.y.view());
        CHECK(memory.peak() - others == layer.template infer_bytes<T>(ex, 90, 48));
        CHECK(memory.live() == others);
    }
}

TEST_CASE("a workspace one byte too small is refused before anything is written")
{
    const auto layer = make_layer();
    host_executor ex({.threads = 2});
    step<float> m(ex, layer, 50, 63);
    support::workspace small(ex, layer.infer_bytes<float>(ex, 50, 48) - 1);
    const auto text = support::message_of<out_of_memory>([&] { layer.infer(ex, m.x.view(), m.w.views, m.y.view(), small.arena()); });
    CHECK_MESSAGE(support::has(text, "workspace is"), text);
    CHECK(support::poisoned(m.y.view()) == 50 * 48);
    support::workspace forward(ex, layer.forward_bytes<float>(ex, 50, 48) - 1);
    CHECK_THROWS_AS((void)layer.forward(ex, m.x.view(), m.w.views, m.y.view(), forward.arena()), out_of_memory);
    CHECK(support::poisoned(m.y.view()) == 50 * 48);
    const auto saved = m.forward(ex);
    const auto untouched = m.results();
    support::workspace backward(ex, layer.backward_bytes<float>(ex, 50, 48) - 1);
    CHECK_THROWS_AS(layer.backward(ex, saved, m.dy.view(), m.w.views, m.dx.view(), m.g.views, backward.arena()), out_of_memory);
    support::workspace input(ex, layer.backward_input_bytes<float>(ex, 50, 48) - 1);
    CHECK_THROWS_AS((void)layer.backward_input(ex, saved, m.dy.view(), m.w.views, m.dx.view(), input.arena()), out_of_memory);
    support::workspace enough(ex, layer.backward_input_bytes<float>(ex, 50, 48)), dx_memory(ex, 0);
    support::guarded<float> other(50, 48);
    const auto pending = layer.backward_input(ex, saved, m.dy.view(), m.w.views, other.view(), enough.arena());
    support::workspace weights(ex, layer.backward_weights_bytes<float>(ex, 50, 48) - 1);
    CHECK_THROWS_AS(layer.backward_weights(ex, saved, pending, m.g.views, weights.arena()), out_of_memory);
    CHECK(support::same_bits(m.results(), untouched));
}

TEST_CASE_TEMPLATE("weight gradients in a later call are those of one call, written or added", T, FASTMOE_DTYPES)
{
    using G = accumulate_t<T>;
    const auto layer = make_layer();
    host_executor ex({.threads = 2});
    step<T> once(ex, layer, 90, 64), later(ex, layer, 90, 64);
    const auto saved = once.forward(ex);
    (void)later.forward(ex);
    once.backward(ex, saved);
    support::workspace pending_memory(ex, layer.template backward_input_bytes<T>(ex, 90, 48));
    support::workspace lent(ex, layer.template backward_weights_bytes<T, G>(ex, 90, 48));
    const auto pending = layer.backward_input(ex, saved, later.dy.view(), later.w.views, later.dx.view(), pending_memory.arena());
    CHECK(support::poisoned(later.g.gate.view()) == 8 * 48);
    layer.backward_weights(ex, saved, pending, later.g.views, lent.arena());
    CHECK(support::same_bits(later.results(), once.results()));
    once.backward(ex, saved, {.gradients = write_mode::accumulate});
    CHECK_FALSE(support::same_bits(later.results(), once.results()));
    layer.backward_weights(ex, saved, pending, later.g.views, lent.arena(), {.gradients = write_mode::accumulate});
    CHECK(support::same_bits(later.results(), once.results()));
}

TEST_CASE_TEMPLATE("two threads share one layer, each with its own executor, and two with one executor", T, FASTMOE_DTYPES)
{
    support::check_shared<T>(make_layer(), 120);
}

TEST_CASE_TEMPLATE("two microbatches may be in flight", T, FASTMOE_DTYPES)
{
    support::check_in_flight<T>(make_layer());
}

TEST_CASE_TEMPLATE("logits that are not finite follow the documented order, and other tokens are untouched", T, FASTMOE_DTYPES)
{
    const layer_type layer{gate_type{.experts = 4, .k = 2}, expert_type{.width = 4, .hidden = 6}, self{}};
    host_executor ex({.threads = 2});
    step<T> m(ex, layer, 7, 68);
    // The router reads one column each, so that the token's columns are its logits.
    for (int64_t e = 0; e < 4; ++e)
        for (int64_t d = 0; d < 4; ++d) m.w.views.gate(e, d) = T(e == d);
    m.model.gate = support::widened(m.w.views.gate);
    m.w.views.gate_bias = {};
    m.g.views.gate_bias = {};
    m.model.gate_bias = {};
    m.x.view()(1, 2) = T(NAN);      // 0 * NaN is NaN: every logit of this token
    m.x.view()(3, 0) = T(INFINITY); // 0 * Inf is NaN: all logits but the first
    m.x.view()(5, 1) = T(-INFINITY); // -Inf and NaN alone: nothing to choose
    for (const int64_t t : {3, 5}) m.dy.view()(t, 0) = T(1);
    layer.infer(ex, m.x.view(), m.w.views, m.y.view());
    const auto inferred = support::download(ex, m.y.view());
    const auto saved = m.forward(ex);
    CHECK(support::same_bits(support::download(ex, m.y.view()), inferred));
    m.backward(ex, saved);
    const auto expert = [&](int64_t c) { return saved.routing().experts(c); };
    for (const int64_t t : {1, 5}) {
        CHECK(expert(2 * t) == -1);
        CHECK(expert(2 * t + 1) == -1);
        for (int64_t d = 0; d < 4; ++d) {
            CHECK(double(m.y.view()(t, d)) == 0.0);
            CHECK(double(m.dx.view()(t, d)) == 0.0);
        }
    }
    CHECK(expert(6) == 0); // +Inf, then the first of those that are NaN
    CHECK(expert(7) == 1);
    CHECK(saved.routing().weights(6) == 1);
    CHECK(saved.routing().weights(7) == 0);
    const std::vector<int64_t> live{0, 2, 4, 6};
    const auto x = compare_layer::rows_of(support::widened(m.x.view()), live, 4);
    const auto dy = compare_layer::rows_of(support::widened(m.dy.view()), live, 4);
    std::vector<int> chosen;
    for (const int64_t t : live) chosen.insert(chosen.end(), {expert(2 * t), expert(2 * t + 1)});
    const support::expected_routing<T> route({.k = 2}, support::expected_logits<T>(m.model, x, 4), 4, 4, chosen, std::vector<bool>(8, true));
    CHECK(route.complaint() == "");
    const auto expected = support::expect_layer<T>(m.model, x, route, dy);
    CHECK(support::within(compare_layer::rows_of(inferred, live, 4), expected.y));
    CHECK(support::within(compare_layer::rows_of(support::download(ex, m.dx.view()), live, 4), expected.dx));
}

TEST_CASE("bad input is refused by the name of the argument, and y stays as it was")
{
    const auto layer = make_layer();
    host_executor ex({.threads = 2});
    step<float> m(ex, layer, 20, 70);
    support::guarded<float> narrow(20, 47), few(19, 48);
    const auto text = [](auto f) { return support::message_of<invalid_argument>(f); };
    const auto infer = [&](matrix_view<const float> x, moe_weights<const float, expert_type> w, matrix_view<float> y) {
        return text([&] { layer.infer(ex, x, w, y); });
    };
    const moe_weights<const float, expert_type> w = m.w.views;
    CHECK(support::has(infer(few.view(), w, m.y.view()), "x (T,D) is of shape (19,48); expected (20,48)"));
    CHECK(support::has(infer(narrow.view(), w, narrow.view()), "x (T,D) is 47; expected mlp.width = 48 columns"));
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
