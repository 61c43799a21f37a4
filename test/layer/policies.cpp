// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What a user brings: a gate, an expert, several types of experts, an expert that all tokens share.
#include <doctest/doctest.h>

#include "support/compare.hpp"
#include "support/layer_memory.hpp"

using namespace fastmoe;
namespace oracle = support::reference;

namespace {

/// Sends token t to experts t mod E and (t+1) mod E with weights 0.75 and 0.25, or to what a test writes into it.
template <class T>
struct alternate_functor {
    routing<accumulate_t<T>> route;
    const int32_t* ids;

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        for (int64_t j = 0; j < 2; ++j) {
            const int64_t c = 2 * t + j;
            route.experts(c) = ids ? ids[c] : static_cast<int32_t>((t + j) % route.total_experts);
            route.weights(c) = accumulate_t<T>(j == 0 ? 0.75 : 0.25);
        }
    }
};

/// A user's gate: one function for inference, two for training.
struct alternate_gate {
    int64_t experts = 0, k = 2;
    const int32_t* ids = nullptr;

    template <class Executor, class T, class Communicator, class State>
    void route(Executor& ex, const gate_input<T>& in, const Communicator&, const State& state, arena& scratch) const
    {
        if (!scratch.measuring()) for_each(ex, in.x.extent(0), alternate_functor<T>{state.routing, ids});
    }
    template <class Executor, class T, class Communicator, class State, class Real>
    void backward(Executor& ex, const gate_input<T>&, const Communicator&, const State&, vector_view<const Real>, Real,
                  matrix_view<Real> dlogits, arena& scratch) const
    {
        if (!scratch.measuring())
            for_each(ex, dlogits.extent(0) * dlogits.extent(1), detail::fill<Real>{dlogits.data_handle(), Real(0)});
    }
};

/// A user's expert: y = s * x with a scale per expert and column. It reads rows through the plan, knows nothing of
/// routing weights, and keeps nothing.
template <class T>
struct scale_weights {
    matrix_view<T> scale; // (E,D)
    template <std::same_as<const T> U>
    operator scale_weights<U>() const
    {
        return {scale};
    }
};

template <class T, class W, class Out>
struct scale_row {
    row_groups groups;
    indexed_rows<T> x;
    matrix_view<W> scale;
    Out y;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t e) const
    {
        const auto& self = *this;
        for (int64_t s = groups.offsets(e); s < groups.offsets(e) + groups.counts(e); ++s)
            team.for_each(scale.extent(1), [&self, s, e](int64_t d) {
                using real = accumulate_t<T>;
                self.y(s, d) = T(real(self.x.row(s)[d]) * real(self.scale(e, d)));
            });
    }
};

template <class T, class G>
struct scale_gradient {
    row_groups groups;
    indexed_rows<T> x, dy;
    matrix_view<G> scale;
    write_mode mode;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t e) const
    {
        const auto& self = *this;
        team.for_each(scale.extent(1), [&self, e](int64_t d) {
            accumulate_t<T> total = self.mode == write_mode::accumulate ? accumulate_t<T>(self.scale(e, d)) : 0;
            for (int64_t s = self.groups.offsets(e); s < self.groups.offsets(e) + self.groups.counts(e); ++s)
                total += accumulate_t<T>(self.x.row(s)[d]) * accumulate_t<T>(self.dy.row(s)[d]);
            self.scale(e, d) = G(total);
        });
    }
};

struct scale_expert {
    int64_t width = 0;
    static constexpr bool applies_weights = false;
    static bool weighs_output() { return true; }
    template <class T>
    using weights = scale_weights<T>;

    template <class T>
    weights<T> reserve_weights(arena& memory, int64_t experts) const
    {
        return {memory.matrix<T>(experts, width)};
    }
    template <class T>
    nothing_saved reserve_saved(arena&, int64_t) const
    {
        return {};
    }
    template <class T>
    nothing_saved reserve_pending(arena&, int64_t) const
    {
        return {};
    }
    template <class Executor, class T>
    void infer(Executor& ex, const expert_input<T>& in, const weights<const T>& w, matrix_view<T> y, arena& scratch) const
    {
        if (!scratch.measuring())
            for_each_row(ex, in.groups.experts(), scale_row<T, const T, matrix_view<T>>{in.groups, in.x, w.scale, y}, {.width = width});
    }
    template <class Executor, class T>
    void forward(Executor& ex, const expert_input<T>& in, const weights<const T>& w, const nothing_saved&, matrix_view<T> y,
                 arena& scratch) const
    {
        infer(ex, in, w, y, scratch);
    }
    template <class Executor, class T>
    void backward(Executor& ex, const expert_input<T>& in, const weights<const T>& w, const nothing_saved&,
                  const indexed_rows<T>& dy, const nothing_saved&, matrix_view<T> dx, vector_view<accumulate_t<T>>,
                  arena& scratch) const
    {
        if (!scratch.measuring())
            for_each_row(ex, in.groups.experts(), scale_row<T, const T, matrix_view<T>>{in.groups, dy, w.scale, dx}, {.width = width});
    }
    template <class Executor, class T, class G>
    void weight_gradients(Executor& ex, const expert_input<T>& in, const nothing_saved&, const indexed_rows<T>& dy,
                          const nothing_saved&, const weights<G>& g, write_mode mode, arena& scratch) const
    {
        if (!scratch.measuring())
            for_each_row(ex, in.groups.experts(), scale_gradient<T, G>{in.groups, in.x, dy, g.scale, mode}, {.width = width});
    }
};

} // namespace

TEST_CASE_TEMPLATE("a user's gate and a user's expert make a layer that trains", Cell, FASTMOE_CELLS)
{
    using T = typename Cell::type;
    FASTMOE_SEEDED(r, 51);
    FASTMOE_EXECUTOR(ex, Cell);
    const int64_t tokens = 23, width = 9, experts = 4;
    const moe_layer layer{top_k_gate<softmax_score>{.experts = experts, .k = 2}, scale_expert{width}, self{}};
    auto scale = support::upload(ex, support::narrowed<T>(r.normals(experts * width)));
    auto gate = support::upload(ex, support::narrowed<T>(r.normals(experts * width)));
    const moe_weights<T, scale_expert> w{gate.matrix(experts, width), {}, {scale.matrix(experts, width)}};
    support::guarded<T> x(tokens, width), y(tokens, width), dy(tokens, width), dx(tokens, width), dscale(experts, width), dgate(experts, width);
    const auto xs = support::fill_normal(r, x.view()), dys = support::fill_normal(r, dy.view());
    const auto saved = layer.forward(ex, x.view(), w, y.view());
    layer.backward(ex, saved, dy.view(), w, dx.view(), moe_weights<T, scale_expert>{dgate.view(), {}, {dscale.view()}});
    ex.synchronize();

    // A linear expert of the oracle with a diagonal matrix is the same function.
    oracle::model m{width, support::widened(gate.view()), {}, {}, {}, oracle::weight_at::output};
    for (int64_t e = 0; e < experts; ++e) {
        auto one = oracle::make_expert(oracle::expert_kind::linear, oracle::activation::relu, width, 0, false);
        for (int64_t d = 0; d < width; ++d) one.down[d * width + d] = double(scale.data()[e * width + d]);
        m.experts.push_back(one);
    }
    const auto ids = support::download(ex, saved.routing().experts);
    const std::vector<int> fixed(ids.begin(), ids.end());
    const oracle::options o{.k = 2};
    const auto out = oracle::forward(m, o, xs, tokens, &fixed);
    const auto back = oracle::backward(m, o, xs, tokens, out, dys);
    const support::tolerance loose{.length = 200, .roundings = 8, .magnitude = 40};
    CHECK(support::close(y.view(), out.y, loose));
    CHECK(support::close(dx.view(), back.x, loose));
    CHECK(support::close(dgate.view(), back.gate, {.length = 400, .roundings = 8, .magnitude = 200}));
    oracle::numbers diagonal;
    for (int64_t e = 0; e < experts; ++e)
        for (int64_t d = 0; d < width; ++d) diagonal.push_back(back.experts[e].down[d * width + d]);
    CHECK(support::close(dscale.view(), diagonal, {.length = 200, .roundings = 8, .magnitude = 60}));
}

TEST_CASE_TEMPLATE("a gate that names an expert out of range, or one twice, is an error that names the choice", Cell,
                   FASTMOE_EXECUTORS)
{
    FASTMOE_SEEDED(r, 52);
    FASTMOE_EXECUTOR(ex, Cell);
    const mlp<gelu> expert{.width = 6, .hidden = 5};
    support::layer_memory<float, mlp<gelu>, typename Cell::executor> w(ex, r, expert, 3, oracle::activation::gelu, false);
    support::guarded<float> x(4, 6), y(4, 6);
    support::fill_normal(r, x.view());
    for (const auto& [ids, text] : {std::pair{std::vector<int32_t>{0, 1, 1, 2, 0, 3, 0, 1}, "routing.experts(5) is 3"},
                                    std::pair{std::vector<int32_t>{0, 1, 1, 2, 0, -7, 0, 1}, "routing.experts(5) is -7"},
                                    std::pair{std::vector<int32_t>{0, 1, 1, 1, 0, 2, 0, 1}, "routing.experts(3) is 1; expected each expert once"}}) {
        auto memory = support::upload(ex, ids);
        const moe_layer layer{alternate_gate{3, 2, memory.data()}, expert, self{}};
        const auto found = support::message_of<invalid_argument>([&] {
            layer.infer(ex, x.view(), w.views, y.view());
            ex.synchronize();
        });
        CHECK_MESSAGE(support::has(found, text), found);
        const auto trained = support::message_of<invalid_argument>([&] {
            (void)layer.forward(ex, x.view(), w.views, y.view());
            ex.synchronize();
        });
        CHECK_MESSAGE(support::has(trained, text), trained);
        CHECK(y.damage() == "");
    }
    // The executor works on, and choices of -1 are no error.
    auto memory = support::upload(ex, std::vector<int32_t>{-1, -1, 0, -1, 1, 2, -1, 2});
    const moe_layer layer{alternate_gate{3, 2, memory.data()}, expert, self{}};
    layer.infer(ex, x.view(), w.views, y.view());
    ex.synchronize();
    for (int64_t d = 0; d < 6; ++d) CHECK(y.view()(0, d) == 0.0f);
    CHECK(support::poisoned(y.view()) == 0);
}

TEST_CASE_TEMPLATE("experts of different types behind one gate give the oracle's values and gradients", Cell, FASTMOE_CELLS)
{
    using T = typename Cell::type;
    FASTMOE_SEEDED(r, 53);
    FASTMOE_EXECUTOR(ex, Cell);
    const int64_t tokens = 40, width = 7;
    const auto experts = expert_tuple(several{mlp<swiglu>{.width = width, .hidden = 5}, 2}, several{mlp<gelu>{.width = width, .hidden = 11}, 3},
                                      several{mlp<relu>{.width = width, .hidden = 3}, 1});
    using expert_type = std::remove_const_t<decltype(experts)>;
    const moe_layer layer{top_k_gate<softmax_score>{.experts = 6, .k = 3}, experts, self{}};
    oracle::model m{width, {}, {}, {}, {}, oracle::weight_at::output};
    const auto add = [&](int64_t count, oracle::activation act, int64_t hidden) {
        const auto some = support::random_experts<T>(r, count, oracle::expert_kind::mlp, act, width, hidden, false);
        m.experts.insert(m.experts.end(), some.begin(), some.end());
        return some;
    };
    const auto a = add(2, oracle::activation::swiglu, 5), b = add(3, oracle::activation::gelu, 11), c = add(1, oracle::activation::relu, 3);
    using Executor = typename Cell::executor;
    support::mlp_memory<T, Executor> wa(ex, a, {}, false), wb(ex, b, {}, false), wc(ex, c, {}, false);
    support::mlp_memory<T, Executor> ga(ex, a, {}, true), gb(ex, b, {}, true), gc(ex, c, {}, true);
    auto gate = support::upload(ex, support::narrowed<T>(r.normals(6 * width)));
    m.gate = support::widened(gate.view());
    support::guarded<T> dgate(6, width), x(tokens, width), y(tokens, width), dy(tokens, width), dx(tokens, width);
    const auto xs = support::fill_normal(r, x.view()), dys = support::fill_normal(r, dy.view());
    const moe_weights<T, expert_type> w{gate.matrix(6, width), {}, {wa.views(), {wb.views(), wc.views()}}};
    const moe_weights<T, expert_type> g{dgate.view(), {}, {ga.views(), {gb.views(), gc.views()}}};
    const auto saved = layer.forward(ex, x.view(), w, y.view());
    layer.backward(ex, saved, dy.view(), w, dx.view(), g);
    ex.synchronize();
    const auto ids = support::download(ex, saved.routing().experts);
    const std::vector<int> fixed(ids.begin(), ids.end());
    const oracle::options o{.k = 3};
    const auto out = oracle::forward(m, o, xs, tokens, &fixed);
    const auto back = oracle::backward(m, o, xs, tokens, out, dys);
    const support::tolerance bound{.length = 300, .roundings = 8, .magnitude = 60};
    CHECK(support::close(y.view(), out.y, bound));
    CHECK(support::close(dx.view(), back.x, bound));
    const auto check = [&](const auto& found, int64_t first, int64_t count) {
        const std::vector<oracle::expert> part(back.experts.begin() + first, back.experts.begin() + first + count);
        CHECK(support::close(support::narrowed<T>(found.up()), oracle::stacked(part, &oracle::expert::up), bound));
        CHECK(support::close(support::narrowed<T>(found.down()), oracle::stacked(part, &oracle::expert::down), bound));
    };
    check(ga, 0, 2);
    check(gb, 2, 3);
    check(gc, 5, 1);
}

TEST_CASE_TEMPLATE("a shared expert adds its output to y and its gradient to dx", Cell, FASTMOE_CELLS)
{
    using T = typename Cell::type;
    using Executor = typename Cell::executor;
    FASTMOE_SEEDED(r, 54);
    FASTMOE_EXECUTOR(ex, Cell);
    const int64_t tokens = 19, width = 10;
    const mlp<swiglu> expert{.width = width, .hidden = 6, .biases = true};
    const moe_layer layer{top_k_gate<softmax_score>{.experts = 4, .k = 2}, expert, self{}};
    const shared_expert shared{expert};
    support::layer_memory<T, mlp<swiglu>, Executor> w(ex, r, expert, 4, oracle::activation::swiglu, true);
    support::gradient_memory<T, mlp<swiglu>, Executor> g(ex, w.model);
    w.model.shared = support::random_experts<T>(r, 1, oracle::expert_kind::mlp, oracle::activation::swiglu, width, 6, true);
    support::mlp_memory<T, Executor> ws(ex, w.model.shared, {}, false), gs(ex, w.model.shared, {}, true);
    support::guarded<T> x(tokens, width), y(tokens, width), again(tokens, width), dy(tokens, width), dx(tokens, width);
    const auto xs = support::fill_normal(r, x.view()), dys = support::fill_normal(r, dy.view());
    const auto saved = layer.forward(ex, x.view(), w.views, y.view());
    layer.infer(ex, x.view(), w.views, again.view());
    layer.backward(ex, saved, dy.view(), w.views, dx.view(), g.views);
    support::in_workspace(ex, [&](arena& memory) {
        const auto kept = shared.forward(ex, x.view(), ws.views(), y.view(), memory);
        shared.infer(ex, x.view(), ws.views(), again.view(), memory);
        shared.backward(ex, kept, dy.view(), ws.views(), dx.view(), gs.views(), write_mode::overwrite, memory);
        ex.synchronize();
    });
    const auto ids = support::download(ex, saved.routing().experts);
    const std::vector<int> fixed(ids.begin(), ids.end());
    const oracle::options o{.k = 2};
    const auto out = oracle::forward(w.model, o, xs, tokens, &fixed);
    const auto back = oracle::backward(w.model, o, xs, tokens, out, dys);
    const support::tolerance bound{.length = 300, .roundings = 8, .magnitude = 60};
    CHECK(support::close(y.view(), out.y, bound));
    CHECK(support::same_bits(support::download(ex, again.view()), support::download(ex, y.view())));
    CHECK(support::close(dx.view(), back.x, bound));
    CHECK(support::close(support::narrowed<T>(gs.up()), oracle::stacked(back.shared, &oracle::expert::up), bound));
    CHECK(support::close(support::narrowed<T>(gs.down_bias()), oracle::stacked(back.shared, &oracle::expert::down_bias), bound));
}

TEST_CASE_TEMPLATE("linear experts give the oracle's values and gradients", Cell, FASTMOE_CELLS)
{
    using T = typename Cell::type;
    FASTMOE_SEEDED(r, 55);
    FASTMOE_EXECUTOR(ex, Cell);
    const int64_t tokens = 31, width = 12, experts = 5;
    const moe_layer layer{top_k_gate<softmax_score>{.experts = experts, .k = 2}, linear<>{.width = width, .biases = true}, self{}};
    oracle::model m{width, {}, {}, support::random_experts<T>(r, experts, oracle::expert_kind::linear, oracle::activation::relu, width, width, true), {}, oracle::weight_at::output};
    auto weight = support::upload(ex, support::narrowed<T>(oracle::stacked(m.experts, &oracle::expert::down)));
    auto bias = support::upload(ex, support::narrowed<T>(oracle::stacked(m.experts, &oracle::expert::down_bias)));
    auto gate = support::upload(ex, support::narrowed<T>(r.normals(experts * width)));
    m.gate = support::widened(gate.view());
    using weights = moe_weights<T, linear<>>;
    const auto views = [&](T* g, T* m, T* b) {
        return weights{matrix_view<T>(g, experts, width), {}, {stacked(tensor_view<T, 3>(m, experts, width, width)), matrix_view<T>(b, experts, width)}};
    };
    const weights w = views(gate.data(), weight.data(), bias.data());
    support::guarded<T> dgate(experts, width), dweight(experts * width, width), dbias(experts, width);
    support::guarded<T> x(tokens, width), y(tokens, width), dy(tokens, width), dx(tokens, width);
    const auto xs = support::fill_normal(r, x.view()), dys = support::fill_normal(r, dy.view());
    const auto saved = layer.forward(ex, x.view(), w, y.view());
    layer.backward(ex, saved, dy.view(), w, dx.view(), views(dgate.data(), dweight.data(), dbias.data()));
    ex.synchronize();
    const auto ids = support::download(ex, saved.routing().experts);
    const std::vector<int> fixed(ids.begin(), ids.end());
    const oracle::options o{.k = 2};
    const auto out = oracle::forward(m, o, xs, tokens, &fixed);
    const auto back = oracle::backward(m, o, xs, tokens, out, dys);
    const support::tolerance bound{.length = 300, .roundings = 8, .magnitude = 60};
    CHECK(support::close(y.view(), out.y, bound));
    CHECK(support::close(dx.view(), back.x, bound));
    CHECK(support::close(dweight.view(), oracle::stacked(back.experts, &oracle::expert::down), bound));
    CHECK(support::close(dbias.view(), oracle::stacked(back.experts, &oracle::expert::down_bias), bound));
}
