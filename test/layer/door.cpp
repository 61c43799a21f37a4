// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The layer's door: whatever is wrong with one view is told by its name, and no output is touched then.
#include <doctest/doctest.h>

#include <fastmoe/layer/shared_expert.hpp>
#include <fastmoe/routing/lookup.hpp>

#include "support/bad_views.hpp"
#include "support/compare.hpp"
#include "support/layer_memory.hpp"

using namespace fastmoe;
using support::bad_views;
using support::memory_is;

namespace {

using expert_type = mlp<swiglu>;
using gate_type = top_k_gate<>;
using layer_type = moe_layer<gate_type, expert_type, self>;
constexpr int64_t tokens = 10, width = 6, hidden = 4, experts = 3;

layer_type make_layer(int64_t count = experts)
{
    return {gate_type{.experts = count, .k = 2}, expert_type{.width = width, .hidden = hidden, .biases = true}, self{}};
}

/// All views of a step; whatever is an output is poison.
struct step {
    host_executor ex{{.threads = 2}};
    support::random r{111};
    layer_type layer = make_layer();
    support::reference::model model = support::random_model<float, host_executor>(r, layer.expert, width, experts, r.normals(experts, 0.3));
    support::layer_memory<float, expert_type, host_executor> weights{ex, layer.expert, model}, gradients{ex, layer.expert, support::poisoned(model)};
    support::guarded<float> x_memory{tokens, width}, y_memory{tokens, width}, dy_memory{tokens, width}, dx_memory{tokens, width};
    support::guarded<float> good_y{tokens, width};
    support::workspace<host_executor> space{ex, 1 << 18};

    matrix_view<const float> x = x_memory.view(), dy = dy_memory.view();
    matrix_view<float> y = y_memory.view(), dx = dx_memory.view();
    moe_weights<const float, expert_type> w = weights.views;
    moe_weights<float, expert_type> g = gradients.views;
    moe_saved<float, gate_type, expert_type, host_executor> saved;
    moe_pending<float, expert_type> pending;

    step()
        : saved((support::fill_normal(r, x_memory.view()), support::fill_normal(r, dy_memory.view()),
                 layer.forward(ex, x_memory.view(), weights.views, good_y.view()))),
          pending(layer.backward_input(ex, saved, dy_memory.view(), weights.views, good_y.view(), space.arena()))
    {
    }

    int64_t untouched()
    {
        const auto& e = gradients.views.expert;
        const auto all = [](const weight_view<float>& v) { return matrix_view<float>(v.data, v.experts * v.out, v.in); };
        return support::poisoned(y_memory.view()) + support::poisoned(dx_memory.view()) + support::poisoned(gradients.gate.view()) +
               support::poisoned(gradients.gate_bias.view()) + support::poisoned(all(e.up)) + support::poisoned(all(e.down)) +
               support::poisoned(e.up_bias) + support::poisoned(e.down_bias);
    }

    enum call : unsigned { infer = 1, forward = 2, backward = 4, backward_input = 8, backward_weights = 16 };

    /// Every call of the set refuses, by a text that has `name`, and leaves all outputs and the workspace as they were.
    void refuses(unsigned calls, const char* name)
    {
        const int64_t before = untouched(), used = space.arena().used();
        for (const bool own : {false, true}) { // with a workspace, and without
            const auto check = [&](call c, auto run) {
                if (!(calls & c)) return;
                CAPTURE(int(c));
                const auto text = support::message_of<invalid_argument>(run);
                CHECK_MESSAGE(support::has(text, name), text);
                CHECK_EQ(untouched(), before);
                CHECK_EQ(space.arena().used(), used);
            };
            auto& a = space.arena();
            check(infer, [&] { own ? layer.infer(ex, x, w, y, a) : layer.infer(ex, x, w, y); });
            check(forward, [&] { own ? (void)layer.forward(ex, x, w, y, a) : (void)layer.forward(ex, x, w, y); });
            check(backward, [&] { own ? layer.backward(ex, saved, dy, w, dx, g, a) : layer.backward(ex, saved, dy, w, dx, g); });
            check(backward_input, [&] { (void)layer.backward_input(ex, saved, dy, w, dx, a); });
            check(backward_weights, [&] { layer.backward_weights(ex, saved, pending, g, a); });
        }
    }
    /// The same for all that can be wrong with a view.
    template <class View>
    void refuses_all(unsigned calls, View& view, const char* name, memory_is memory = memory_is::needed)
    {
        const View good = view;
        const auto bad = [&] {
            if constexpr (requires { bad_views(good, memory); }) return bad_views(good, memory);
            else return bad_views(good);
        }();
        for (const auto& b : bad) {
            CAPTURE(b.what);
            view = b.view;
            refuses(calls, name);
            view = good;
        }
    }
};

} // namespace

TEST_CASE("every view of a layer is refused by its name for whatever is wrong with it, before any output is touched")
{
    step s;
    constexpr unsigned ahead = step::infer | step::forward, back = step::backward | step::backward_input;
    s.refuses_all(ahead, s.x, "(T,D) is ");
    s.refuses_all(ahead, s.y, "(T,D) is ");
    s.refuses_all(back, s.dy, "dy (T,D) is ");
    s.refuses_all(back, s.dx, "dx (T,D) is ");
    s.refuses_all(ahead | back, s.w.gate, "weights.gate (E,D) is ");
    s.refuses_all(ahead | back, s.w.gate_bias, "weights.gate_bias (E) is ", memory_is::optional);
    s.refuses_all(ahead | back, s.w.expert.up, "weights.up (E,H',D) is ");
    s.refuses_all(ahead | back, s.w.expert.down, "weights.down (E,D,H) is ");
    s.refuses_all(ahead | back, s.w.expert.up_bias, "weights.up_bias (E,H') is ", memory_is::optional);
    s.refuses_all(ahead | back, s.w.expert.down_bias, "weights.down_bias (E,D) is ", memory_is::optional);
    constexpr unsigned gradients = step::backward | step::backward_weights;
    s.refuses_all(gradients, s.g.gate, "gradients.gate (E,D) is ");
    s.refuses_all(gradients, s.g.gate_bias, "gradients.gate_bias (E) is ", memory_is::optional);
    s.refuses_all(gradients, s.g.expert.up, "gradients.up (E,H',D) is ");
    s.refuses_all(gradients, s.g.expert.down, "gradients.down (E,D,H) is ");
    s.refuses_all(gradients, s.g.expert.up_bias, "gradients.up_bias (E,H') is ", memory_is::optional);
    s.refuses_all(gradients, s.g.expert.down_bias, "gradients.down_bias (E,D) is ", memory_is::optional);
    // Nothing was wrong with the rest.
    s.layer.infer(s.ex, s.x, s.w, s.y);
    s.layer.backward(s.ex, s.saved, s.dy, s.w, s.dx, s.g);
    CHECK_EQ(s.untouched(), 0);
}

TEST_CASE("what another layer kept is refused")
{
    step s;
    s.layer = make_layer(experts + 1);
    const auto more = random_weights<float>(s.ex, s.layer, 1);
    s.w = more.view();
    s.refuses(step::backward | step::backward_input, "saved.plan().counts (E) is 3; expected the gate's E = 4");
}

TEST_CASE("a gradient over what the weight gradients read is refused; input alone may overwrite it")
{
    step s;
    const matrix_view<const float> dy = s.dy, x = s.x;
    const auto writable = [](matrix_view<const float> m, int64_t skip = 0) {
        return matrix_view<float>(const_cast<float*>(m.data_handle()) + skip, tokens, width);
    };
    const auto copies = [](matrix_view<const float> m) { return support::widened(m); };
    const auto dy_before = copies(dy), x_before = copies(x);
    for (const int64_t skip : {int64_t(0), width, -width, tokens * width - 1, 1 - tokens * width}) {
        CAPTURE(skip);
        s.dx = writable(dy, skip);
        s.refuses(step::backward, "dx (T,D) is memory that is shared; expected none in common with dy (T,D)");
        s.dx = writable(x, skip);
        s.refuses(step::backward | step::backward_input, "dx (T,D) is memory that is shared; expected none in common with x (T,D)");
        s.y = writable(x, skip);
        s.refuses(step::forward, "y (T,D) is memory that is shared; expected none in common with x (T,D)");
    }
    CHECK(copies(dy) == dy_before);
    CHECK(copies(x) == x_before);

    // In place where nothing is read afterwards: the same bits as apart.
    (void)s.layer.backward_input(s.ex, s.saved, dy, s.w, s.dx_memory.view(), s.space.arena());
    (void)s.layer.backward_input(s.ex, s.saved, dy, s.w, writable(dy), s.space.arena());
    CHECK(copies(dy) == copies(s.dx_memory.view()));
    s.layer.infer(s.ex, x, s.w, s.y_memory.view());
    s.layer.infer(s.ex, x, s.w, writable(x));
    CHECK(copies(x) == copies(s.y_memory.view()));
}

TEST_CASE("a shared expert refuses every wrong view, and a gradient over what it still reads, before any output is touched")
{
    step s;
    const shared_expert shared{s.layer.expert};
    const std::vector<support::reference::expert> one{s.model.experts[0]};
    const support::expert_memory<float, expert_type, host_executor> weights(s.ex, shared.expert, one),
        gradients(s.ex, shared.expert, support::poisoned(one));
    mlp_weights<const float> w = weights.views();
    mlp_weights<float> g = gradients.views();
    auto& a = s.space.arena();
    const auto kept = shared.forward(s.ex, s.x, weights.views(), s.good_y.view(), a);
    const auto untouched = [&] {
        int64_t whole = s.untouched();
        using support::reference::expert;
        for (auto member : {&expert::up, &expert::down, &expert::up_bias, &expert::down_bias})
            for (const double d : gradients.read(member)) whole += std::isnan(d);
        return whole;
    };
    const int64_t before = untouched(), used = a.used();
    const auto refused = [&](auto call, const char* name) {
        const auto text = support::message_of<invalid_argument>(call);
        CHECK_MESSAGE(support::has(text, name), text);
        CHECK_EQ(untouched(), before);
        CHECK_EQ(a.used(), used);
    };
    const auto ahead = [&](const char* name) {
        refused([&] { shared.infer(s.ex, s.x, w, s.y, a); }, name);
        refused([&] { (void)shared.forward(s.ex, s.x, w, s.y, a); }, name);
    };
    const auto back = [&](const char* name) {
        refused([&] { shared.backward(s.ex, kept, s.dy, w, s.dx, g, write_mode::overwrite, a); }, name);
    };
    const auto all = [](auto& view, const auto& bad, auto check) {
        const auto good = view;
        for (const auto& b : bad) {
            CAPTURE(b.what);
            view = b.view;
            check();
            view = good;
        }
    };
    all(s.x, bad_views(s.x), [&] { ahead("(T,D) is "); });
    all(s.y, bad_views(s.y), [&] { ahead("(T,D) is "); });
    all(w.up, bad_views(w.up), [&] { ahead("weights.up"), back("weights.up"); });
    all(w.down_bias, bad_views(w.down_bias, memory_is::optional), [&] { ahead("weights.down_bias"), back("weights.down_bias"); });
    all(s.dy, bad_views(s.dy), [&] { back("dy (T,D) is "); });
    all(s.dx, bad_views(s.dx), [&] { back("dx (T,D) is "); });
    all(g.down, bad_views(g.down), [&] { back("gradients.down"); });
    all(g.up_bias, bad_views(g.up_bias, memory_is::optional), [&] { back("gradients.up_bias"); });
    s.dx = matrix_view<float>(s.dy_memory.data(), tokens, width);
    back("dx (T,D) is memory that is shared; expected none in common with dy (T,D)");
    s.dx = matrix_view<float>(s.x_memory.data(), tokens, width);
    back("dx (T,D) is memory that is shared; expected none in common with x (T,D)");
    s.y = matrix_view<float>(s.x_memory.data(), tokens, width);
    refused([&] { (void)shared.forward(s.ex, s.x, w, s.y, a); }, "y (T,D) is memory that is shared");
    // A workspace that is too small by a byte.
    s.y = s.y_memory.view(), s.dx = s.dx_memory.view();
    const auto short_of = [&](auto call) {
        arena measure;
        call(measure);
        support::workspace small(s.ex, measure.bytes() - 1);
        CHECK_THROWS_AS(call(small.arena()), out_of_memory);
        CHECK_EQ(untouched(), before);
        CHECK_EQ(small.arena().used(), 0);
    };
    short_of([&](arena& m) { shared.infer(s.ex, s.x, w, s.y, m); });
    short_of([&](arena& m) { (void)shared.forward(s.ex, s.x, w, s.y, m); });
    short_of([&](arena& m) { shared.backward(s.ex, kept, s.dy, w, s.dx, g, write_mode::overwrite, m); });
}

namespace {

/// Neither applies the routing weights nor leaves them to combine(): y = sum of x.
struct deaf_expert : linear<> {
    static constexpr bool weighs_output() noexcept { return false; }
};

} // namespace

TEST_CASE("an expert that withholds the routing weights' gradient trains behind a table, and not behind a router")
{
    host_executor ex({.threads = 2});
    support::random r(112);
    const deaf_expert expert{{.width = width}};
    const moe_layer routed{gate_type{.experts = experts, .k = 2}, expert, self{}};
    auto w = random_weights<float>(ex, routed, 1), g = zero_weights<float>(ex, routed);
    support::guarded<float> x(tokens, width), y(tokens, width), dx(tokens, width);
    support::fill_normal(r, x.view());
    routed.infer(ex, x.view(), w.view(), y.view()); // no gradient is asked of it
    support::poison(y.view());
    const auto text = support::message_of<invalid_argument>([&] { (void)routed.forward(ex, x.view(), w.view(), y.view()); });
    CHECK_MESSAGE(support::has(text, "expert.weighs_output() is false; expected true"), text);
    CHECK_EQ(support::poisoned(y.view()), tokens * width);

    const std::vector<int32_t> table{1, 0, 2}, ids(tokens, 2);
    hash_gate gate{.experts = experts, .k = 1};
    gate.assignment = {matrix_view<const int32_t>(table.data(), 3, 1)};
    const moe_layer hashed{gate, expert, self{}};
    const auto saved = hashed.forward(ex, x.view(), w.view(), y.view(), {.token_ids = as_vector(ids)});
    hashed.backward(ex, saved, x.view(), w.view(), dx.view(), g.view());
    // y = W x of expert 2, dx = W^T dy, both without a weight.
    const auto& m = w.view().expert.weight;
    for (int64_t t = 0; t < tokens; ++t)
        for (int64_t d = 0; d < width; ++d) {
            double ahead = 0, back = 0;
            for (int64_t i = 0; i < width; ++i) {
                ahead += double(m(2, d, i)) * double(x.view()(t, i));
                back += double(m(2, i, d)) * double(x.view()(t, i));
            }
            CHECK(std::fabs(double(y.view()(t, d)) - ahead) < 1e-5);
            CHECK(std::fabs(double(dx.view()(t, d)) - back) < 1e-5);
        }
}

TEST_CASE("a gate that reads no logits leaves the router's gradients alone, whatever their shape")
{
    host_executor ex({.threads = 2});
    support::random r(113);
    const std::vector<int32_t> table{1, 0, 2}, ids(tokens, 1);
    hash_gate gate{.experts = experts, .k = 1};
    gate.assignment = {matrix_view<const int32_t>(table.data(), 3, 1)};
    const moe_layer layer{gate, expert_type{.width = width, .hidden = hidden}, self{}};
    const auto w = random_weights<float>(ex, layer, 1);
    const auto zeros = zero_weights<float>(ex, layer);
    support::guarded<float> x(tokens, width), y(tokens, width), dx(tokens, width), router(experts + 1, 2), bias(experts - 1);
    support::fill_normal(r, x.view());
    auto g = zeros.view();
    g.gate = router.view();
    g.gate_bias = bias.vector();
    const auto saved = layer.forward(ex, x.view(), w.view(), y.view(), {.token_ids = as_vector(ids)});
    layer.backward(ex, saved, x.view(), w.view(), dx.view(), g);
    CHECK_EQ(support::poisoned(router.view()), 2 * (experts + 1));
    CHECK_EQ(support::poisoned(bias.vector()), experts - 1);
    CHECK_EQ(support::poisoned(dx.view()), 0);
}

TEST_CASE("inference over a part of its input is refused, over just its input it is not")
{
    step s;
    std::vector<float> all((tokens + 1) * width, 0.5f), apart(tokens * width, -7.f);
    s.x = matrix_view<const float>(all.data(), tokens, width);
    s.y = matrix_view<float>(all.data() + width, tokens, width);
    s.refuses(step::infer, "y (T,D) is memory that is shared; expected none in common with x (T,D), unless it is x");
    for (const float v : all) CHECK_EQ(v, 0.5f);
    s.layer.infer(s.ex, s.x, s.w, as_matrix(apart, tokens, width));
    s.layer.infer(s.ex, s.x, s.w, matrix_view<float>(all.data(), tokens, width));
    all.resize(apart.size());
    CHECK(support::same_bits(all, apart));
}

TEST_CASE("gradients that overlap are refused before any output is touched")
{
    step s;
    const auto whole = s.g;
    for (auto* matrices : {&s.g.expert.up, &s.g.expert.down}) {
        matrices->expert_stride = 0;
        s.refuses(step::backward | step::backward_weights, "is 0; expected strides of matrices that do not overlap");
        s.g = whole;
    }
}

TEST_CASE("gradients held apart of which one is missing are refused before any output is touched")
{
    step s;
    const auto whole = s.g;
    for (const bool is_up : {true, false}) {
        auto& matrices = is_up ? s.g.expert.up : s.g.expert.down;
        std::vector<float*> apart;
        for (int64_t e = 0; e < experts; ++e) apart.push_back(matrices.data + e * matrices.expert_stride);
        apart[2] = nullptr;
        matrices = separate(vector_view<float* const>(apart.data(), experts), matrices.out, matrices.in);
        s.refuses(step::backward | step::backward_weights, is_up ? "gradients.up (E,H',D) is " : "gradients.down (E,D,H) is ");
        s.refuses(step::backward | step::backward_weights, "expected memory for expert 2");
        s.g = whole;
    }
}

TEST_CASE("x of another width than the expert's is told so, not the router's weights")
{
    host_executor ex({.threads = 1});
    const auto layer = make_layer();
    const auto w = random_weights<float>(ex, layer, 1);
    std::vector<float> x(6 * (width + 1)), y(x.size());
    const auto text = support::message_of<invalid_argument>(
        [&] { layer.infer(ex, as_matrix(x, 6, width + 1), w.view(), as_matrix(y, 6, width + 1)); });
    CHECK_MESSAGE(support::has(text, "x (T,D) is "), text);
    CHECK_MESSAGE(support::has(text, "expected mlp.width = "), text);
}

namespace {

/// @param spoil  gives a view of the gate's own a shape that it should not have
template <class Gate, class Spoil>
void refuses_own(const Gate& gate, const Spoil& spoil, const char* of_weights, const char* of_gradients)
{
    host_executor ex({.threads = 1});
    const moe_layer layer{gate, mlp<swiglu>{.width = 8, .hidden = 4}};
    const auto weights = random_weights<float>(ex, layer, 1), gradients = zero_weights<float>(ex, layer);
    std::vector<float> x(6 * 8, 1.f), dy(6 * 8, 1.f), y(6 * 8, -7.f), dx(6 * 8, -7.f);
    std::vector<std::uint64_t> random{1, 2}; // seed and step
    const gate_options options{.random = random.data()};
    const auto saved = layer.forward(ex, as_matrix(x, 6, 8), weights.view(), as_matrix(y, 6, 8), options);
    const auto said = [&](auto w, auto g) {
        return support::message_of<invalid_argument>(
            [&] { layer.backward(ex, saved, as_matrix(dy, 6, 8), w, as_matrix(dx, 6, 8), g); });
    };
    auto w = weights.view(), g = gradients.view();
    spoil(g.own);
    CHECK(support::has(said(weights.view(), g), of_gradients));
    spoil(w.own);
    CHECK(support::has(said(w, gradients.view()), of_weights));
    for (const float v : dx) CHECK(v == -7.f);
    for (int64_t i = 0; i < 4 * 8 * 4; ++i) CHECK(gradients.view().expert.down.data[i] == 0.f);
}

} // namespace

TEST_CASE("a gate's own parameters and their gradients are refused before any output is touched")
{
    refuses_own(
        cosine_gate<>{.experts = 4, .k = 2, .projection_width = 4},
        [](auto& own) { own.embeddings = matrix_view<float>(own.embeddings.data_handle(), 3, 4); },
        "embeddings (E,N) is of shape (3,4); expected (4,4)", "embeddings (E,N) is of shape (3,4); expected (4,4)");
    refuses_own(
        noisy_gate{.experts = 4, .k = 2}, [](auto& own) { own.noise = matrix_view<float>(own.noise.data_handle(), 3, 8); },
        "noise matrix (E,D) is of shape (3,8); expected (4,8)", "gradient of the noise matrix (E,D) is of shape (3,8); expected (4,8)");
}

TEST_CASE("a gate that is not the one of forward is refused before dx is written")
{
    host_executor ex({.threads = 1});
    const auto refuses = [&](const auto& of_forward, const auto& of_backward, const char* expected) {
        const moe_layer forward{of_forward, expert_type{.width = 8, .hidden = 16}, self{}};
        const moe_layer backward{of_backward, expert_type{.width = 8, .hidden = 16}, self{}};
        const auto w = random_weights<float>(ex, forward, 3);
        const auto grads = zero_weights<float>(ex, forward);
        support::guarded<float> x(5, 8), y(5, 8), dy(5, 8), dx(5, 8); // poisoned
        for (int64_t i = 0; i < 40; ++i) x.data()[i] = dy.data()[i] = float(i % 7) - 3;
        const std::uint64_t numbers[] = {1, 2};
        const auto state = forward.forward(ex, x.view(), w.view(), y.view(), {.random = numbers});
        CHECK_THROWS_WITH_AS(backward.backward(ex, state, dy.view(), w.view(), dx.view(), grads.view()), doctest::Contains(expected),
                             invalid_argument);
        CHECK(support::poisoned(dx.view()) == 40);
    };
    refuses(top_k_gate<>{.experts = 4, .k = 2}, top_k_gate<>{.experts = 4, .k = 3}, "state.routing.k is 2; expected the gate's K = 3");
    const noisy_gate noisy{.experts = 4, .k = 2};
    noisy_gate other = noisy;
    other.k = 3;
    refuses(noisy, other, "state.routing.k is 2; expected the gate's K = 3");
    other = noisy;
    other.balance.coefficient = 1;
    refuses(noisy, other, "state.slopes is of shape (0); expected (5)");
    other = noisy;
    other.load.coefficient = 1;
    refuses(noisy, other, "state.load.slopes (E) is of shape (0); expected (4)");
    other = noisy;
    other.importance.coefficient = 1;
    refuses(noisy, other, "state.importance.slopes (E) is of shape (0); expected (4)");
    const cosine_gate<> cosine{.experts = 4, .k = 2};
    cosine_gate<> more = cosine;
    more.k = 3;
    refuses(cosine, more, "state.routing.k is 2; expected the gate's K = 3");
}

TEST_CASE("widths whose products are no numbers of 64 bits are refused by name")
{
    arena measure;
    const int64_t most = int64_t{1} << 30;
    const auto says = [&](const auto& expert, const char* expected) {
        CHECK_THROWS_WITH_AS((void)expert.template reserve_weights<float>(measure, 8), doctest::Contains(expected), invalid_argument);
    };
    says(linear<>{.width = int64_t{1} << 32}, "linear.width is 4294967296; expected 0 to 1073741824");
    says(linear<>{.width = -1}, "linear.width is -1");
    says(expert_type{.width = 2 * most, .hidden = 16}, "mlp.width is 2147483648; expected 0 to 1073741824");
    says(expert_type{.width = 16, .hidden = INT64_MAX}, "mlp.hidden is 9223372036854775807; expected 0 to 1073741824");
}
