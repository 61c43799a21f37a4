// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How often a token's input gradient is rounded: the experts' rows and the router's part are summed, then rounded once.
#include <doctest/doctest.h>

#include <fastmoe/layer/shared_expert.hpp>

#include "support/compare.hpp"
#include "support/layer_memory.hpp"

using namespace fastmoe;

namespace {

constexpr int64_t tokens = 1100, width = 70, experts = 4; // more than one block of rows, and more than one piece

/// Chooses experts t and t+1 with weight 1 each; the gradient of its logits is what a test gives.
struct given_gate {
    int64_t experts = 0, k = 2;
    const double* dlogits = nullptr; // (T,E)
    input_jitter jitter{};

    template <class Executor, class T, class C, class State>
    void route(Executor&, const gate_input<T>& in, const C&, const State& state, arena& scratch) const
    {
        if (scratch.measuring()) return;
        for (int64_t c = 0; c < 2 * in.x.extent(0); ++c) {
            state.routing.experts(c) = static_cast<int32_t>((c / 2 + c % 2) % experts);
            state.routing.weights(c) = 1;
        }
    }
    template <class Executor, class T, class C, class State, class Real>
    void backward(Executor&, const gate_input<T>&, const C&, const State&, vector_view<const Real>, Real, matrix_view<Real> out,
                  arena& scratch) const
    {
        if (scratch.measuring()) return;
        for (int64_t i = 0; i < out.extent(0) * out.extent(1); ++i) out.data_handle()[i] = static_cast<Real>(dlogits[i]);
    }
};

/// The same, and a part of its own that it adds to dx.
struct adding_gate : given_gate {
    const double* part = nullptr; // (T,D)
    template <class T>
    using parameters = no_parameters<T>;

    template <class T>
    parameters<T> reserve_parameters(arena&, int64_t) const
    {
        return {};
    }
    template <class Executor, class T>
    void initialize(Executor&, const parameters<T>&, std::uint64_t) const
    {
    }
    template <class Executor, class T, class C, class State>
    void route(Executor& ex, const gate_input<T>& in, const parameters<const T>&, const C& c, const State& state, arena& scratch) const
    {
        given_gate::route(ex, in, c, state, scratch);
    }
    template <class Executor, class T, class C, class State, class Real>
    void backward(Executor& ex, const gate_input<T>& in, const parameters<const T>&, const C& c, const State& state,
                  vector_view<const Real> dweights, Real scale, matrix_view<Real> out, matrix_view<T> dx, arena& scratch) const
    {
        given_gate::backward(ex, in, c, state, dweights, scale, out, scratch);
        if (scratch.measuring()) return;
        ex.synchronize(); // dx is added to here and now
        for (int64_t i = 0; i < dx.extent(0) * dx.extent(1); ++i) {
            T& to = dx.data_handle()[i];
            to = T(Real(to) + static_cast<Real>(part[i]));
        }
    }
    template <class Executor, class T, class State, class G>
    void parameter_gradients(Executor&, const gate_input<T>&, const State&, const parameters<G>&, write_mode, arena&) const
    {
    }
};

/// A layer whose rows' gradients T holds exactly: linear experts, multiples of the unit matrix by a power of two.
template <class Cell, class Gate>
struct exact_rows {
    using T = typename Cell::type;
    using layer_type = moe_layer<Gate, linear<>>;
    layer_type layer;
    std::vector<T> gate, matrices = std::vector<T>(experts * width * width, T(0.0f));
    support::guarded<T> x{tokens, width}, dy{tokens, width}, dx{tokens, width}, y{tokens, width};
    std::vector<double> rows = std::vector<double>(tokens * width), gates;

    exact_rows(const Gate& g, support::random& r)
        : layer{g, linear<>{.width = width}, self{}}, gate(support::narrowed<T>(r.normals(experts * width))), gates(support::widened(gate))
    {
        for (int64_t e = 0; e < experts; ++e)
            for (int64_t d = 0; d < width; ++d) matrices[(e * width + d) * width + d] = T(e % 2 ? 256.0f : 1.0f);
        support::fill_normal(r, x.view());
        for (int64_t i = 0; i < tokens * width; ++i) {
            const double d = double(r.integer(-15, 15));
            dy.data()[i] = support::narrow<T>(d);
            rows[i] = 257 * d; // an even and an odd expert: more bits than bfloat16 and half have
        }
    }
    typename layer_type::template weights<T> weights()
    {
        return {as_matrix(gate, experts, width), {}, {stacked(tensor_view<T, 3>(matrices.data(), experts, width, width)), {}}};
    }
    template <class Executor>
    void run(Executor& ex, const gate_options& options = {})
    {
        const auto saved = layer.forward(ex, x.view(), weights(), y.view(), options);
        support::in_workspace(ex, [&](arena& memory) {
            if (memory.measuring()) memory.vector<std::byte>(1 << 22);
            else (void)layer.backward_input(ex, saved, dy.view(), weights(), dx.view(), memory);
        });
        ex.synchronize();
    }
};

/// dlogits whose products are of the size of the rows, so that sums cancel; none for every seventh token.
std::vector<double> draw_dlogits(support::random& r)
{
    auto out = r.normals(tokens * experts, 1000);
    for (int64_t i = 0; i < tokens * experts; ++i) out[i] = i / experts % 7 == 3 ? 0 : double(static_cast<float>(out[i]));
    return out;
}

/// rows + dlogits gate * u, and the sum of the absolute terms.
struct expectation {
    std::vector<double> value, magnitude;

    template <class Factor>
    expectation(const std::vector<double>& rows, const std::vector<double>& dlogits, const std::vector<double>& gate, Factor u)
        : value(rows), magnitude(rows)
    {
        for (double& m : magnitude) m = std::fabs(m);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t e = 0; e < experts; ++e)
                for (int64_t d = 0; d < width; ++d) {
                    const double term = dlogits[t * experts + e] * gate[e * width + d] * u(t * width + d);
                    value[t * width + d] += term;
                    magnitude[t * width + d] += std::fabs(term);
                }
    }
};

} // namespace

TEST_CASE_TEMPLATE("the input's gradient is rounded once, whatever the experts' and the router's parts are", Cell, FASTMOE_CELLS)
{
    FASTMOE_SEEDED(r, 95);
    FASTMOE_EXECUTOR(ex, Cell);
    const auto dlogits = draw_dlogits(r);
    exact_rows<Cell, given_gate> run({.experts = experts, .dlogits = dlogits.data()}, r);
    run.run(ex);
    const expectation e(run.rows, dlogits, run.gates, [](int64_t) { return 1.0; });
    CHECK(support::close(run.dx.view(), e.value, {.length = experts + 4, .roundings = 1, .magnitudes = &e.magnitude}));
    CHECK_EQ(run.dx.damage(), "");
}

TEST_CASE_TEMPLATE("so is that of a jittered router", Cell, FASTMOE_CELLS)
{
    using real = accumulate_t<typename Cell::type>;
    FASTMOE_SEEDED(r, 96);
    FASTMOE_EXECUTOR(ex, Cell);
    const auto dlogits = draw_dlogits(r);
    std::vector<std::uint64_t> random{3, 8};
    exact_rows<Cell, given_gate> run({.experts = experts, .dlogits = dlogits.data(), .jitter = {0.25}}, r);
    run.run(ex, {.random = random.data(), .first_token = 9});
    const random_source source{random.data(), random_stream::jitter};
    const expectation e(run.rows, dlogits, run.gates, [&](int64_t i) {
        return 0.75 + 0.5 * double(source.uniform<real>(static_cast<std::uint64_t>(9 * width + i)));
    });
    CHECK(support::close(run.dx.view(), e.value, {.length = experts + 8, .roundings = 1, .magnitudes = &e.magnitude}));
}

TEST_CASE_TEMPLATE("what a gate adds to dx by itself is rounded on its own, and the sum once", Cell, FASTMOE_CELLS)
{
    using T = typename Cell::type;
    FASTMOE_SEEDED(r, 97);
    FASTMOE_EXECUTOR(ex, Cell);
    const auto dlogits = draw_dlogits(r);
    auto part = r.normals(tokens * width);
    adding_gate gate;
    gate.experts = experts;
    gate.dlogits = dlogits.data();
    gate.part = part.data();
    exact_rows<Cell, adding_gate> run(gate, r);
    run.run(ex);
    auto rows = run.rows;
    for (std::size_t i = 0; i < rows.size(); ++i) rows[i] += double(support::narrow<T>(part[i]));
    const expectation e(rows, dlogits, run.gates, [](int64_t) { return 1.0; });
    CHECK(support::close(run.dx.view(), e.value, {.length = experts + 8, .roundings = 1, .magnitudes = &e.magnitude}));
}

TEST_CASE_TEMPLATE("a shared expert rounds its rows, and then what it adds them to: one rounding of each, no more", Cell, FASTMOE_CELLS)
{
    using T = typename Cell::type;
    FASTMOE_SEEDED(r, 98);
    FASTMOE_EXECUTOR(ex, Cell);
    const int64_t n = 30, wide = 21;
    const shared_expert shared{linear<>{.width = wide}};
    auto matrix = support::normal_vector<T>(r, wide * wide), gradient = matrix;
    const auto view = [&](std::vector<T>& m) { return linear_weights<T>{stacked(tensor_view<T, 3>(m.data(), 1, wide, wide)), {}}; };
    support::guarded<T> x(n, wide), y(n, wide), dy(n, wide), dx(n, wide);
    const auto xs = support::fill_normal(r, x.view()), dys = support::fill_normal(r, dy.view());
    const auto ys = support::fill_normal(r, y.view(), 100), dxs = support::fill_normal(r, dx.view(), 100);
    support::in_workspace(ex, [&](arena& memory) {
        const auto kept = shared.forward(ex, x.view(), view(matrix), y.view(), memory);
        shared.backward(ex, kept, dy.view(), view(matrix), dx.view(), view(gradient), write_mode::overwrite, memory);
        ex.synchronize();
    });
    const auto w = support::widened(matrix);
    // |error| <= eps |rows| + eps |sum| + what the fp32 sums lose.
    const auto within = [&](support::guarded<T>& found, const std::vector<double>& before, const std::vector<double>& rows, bool transposed) {
        for (int64_t t = 0; t < n; ++t)
            for (int64_t d = 0; d < wide; ++d) {
                double sum = 0, magnitude = 0;
                for (int64_t j = 0; j < wide; ++j) {
                    const double term = rows[t * wide + j] * w[transposed ? j * wide + d : d * wide + j];
                    sum += term;
                    magnitude += std::fabs(term);
                }
                const double expected = before[t * wide + d] + sum;
                const double bound = support::roundoff<T> * (1.01 * std::fabs(sum) + 1.01 * std::fabs(expected)) +
                                     30 * support::roundoff<accumulate_t<T>> * (magnitude + std::fabs(before[t * wide + d]));
                REQUIRE(std::fabs(double(found.view()(t, d)) - expected) <= bound);
            }
    };
    within(y, ys, xs, false);
    within(dx, dxs, dys, true);
}
