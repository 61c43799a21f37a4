// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The compositions of fastmoe/models as layers that train. Their values are held to the reference by blocks.cpp; here,
/// their gradients to their values.
#include <algorithm>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/moe.hpp>

#include "support/compare.hpp"
#include "support/finite_difference.hpp"

using namespace fastmoe;

namespace {

constexpr int64_t tokens = 5, width = 6, experts = 8;

struct shared_room {
    buffer<std::byte, host_executor> weights, gradients;
};

/// Weights and gradients of a shared expert, gated or not, or of none.
template <class Shared>
struct shared_part {
    using expert_type = decltype(Shared::expert);
    static constexpr bool gated = requires(typename Shared::template weights<double> w) { w.gate; };
    host_executor& ex;
    const Shared& shared;
    shared_room room;
    std::vector<double> gate, dgate;
    mlp_weights<double> w, g;

    shared_part(host_executor& e, const Shared& s, support::random& r)
        : ex(e), shared(s), gate(r.normals(width)), dgate(width)
    {
        arena measure;
        shared.expert.template reserve_weights<double>(measure, 1);
        room.weights = {ex, measure.bytes()};
        room.gradients = {ex, measure.bytes()};
        arena from(room.weights.view()), to(room.gradients.view());
        w = shared.expert.template reserve_weights<double>(from, 1);
        g = shared.expert.template reserve_weights<double>(to, 1);
        shared.expert.initialize(ex, w, 7);
    }
    auto weights()
    {
        if constexpr (gated) return gated_shared_weights<const double, expert_type>{as_matrix(gate, 1, width), w};
        else return mlp_weights<const double>(w);
    }
    auto gradients()
    {
        if constexpr (gated) return gated_shared_weights<double, expert_type>{as_matrix(dgate, 1, width), g};
        else return g;
    }
    void infer(matrix_view<const double> x, matrix_view<double> y)
    {
        arena measure;
        shared.infer(ex, x, weights(), y, measure);
        buffer<std::byte, host_executor> memory(ex, measure.bytes());
        arena scratch(memory.view());
        shared.infer(ex, x, weights(), y, scratch);
    }
    void backward(matrix_view<const double> x, matrix_view<double> y, matrix_view<const double> dy, matrix_view<double> dx)
    {
        arena measure;
        const auto run = [&](arena& memory) {
            const auto kept = shared.forward(ex, x, weights(), y, memory);
            shared.backward(ex, kept, dy, weights(), dx, gradients(), write_mode::overwrite, memory);
        };
        run(measure);
        buffer<std::byte, host_executor> memory(ex, measure.bytes());
        arena scratch(memory.view());
        run(scratch);
    }
};
template <>
struct shared_part<models::no_shared_expert> {
    shared_part(host_executor&, const models::no_shared_expert&, support::random&) {}
    void infer(matrix_view<const double>, matrix_view<double>) {}
    void backward(matrix_view<const double>, matrix_view<double>, matrix_view<const double>, matrix_view<double>) {}
};

/// dx, and the router's gradient, against finite differences of the block's own values.
template <class Block>
void check_gradients(const std::string& name, const Block& m)
{
    CAPTURE(name);
    FASTMOE_SEEDED(r, 71);
    host_executor ex({.threads = 1});
    const moe_layer layer{m.gate, m.expert, self{}};
    auto w = random_weights<double>(ex, layer, 3), g = zero_weights<double>(ex, layer);
    shared_part<std::remove_cvref_t<decltype(m.shared)>> shared(ex, m.shared, r);
    auto x = r.normals(tokens * width);
    const auto dy = r.normals(tokens * width);
    std::vector<double> y(x.size()), dx(x.size());
    const auto matrix = [](auto& v) { return as_matrix(v, tokens, width); };
    const auto value = [&] {
        layer.infer(ex, matrix(x), w.view(), matrix(y));
        shared.infer(matrix(x), matrix(y));
        double sum = 0;
        for (std::size_t i = 0; i < y.size(); ++i) sum += y[i] * dy[i];
        return sum;
    };
    const auto saved = layer.forward(ex, matrix(x), w.view(), matrix(y));
    layer.backward(ex, saved, matrix(dy), w.view(), matrix(dx), g.view());
    shared.backward(matrix(x), matrix(y), matrix(dy), matrix(dx));
    const auto expected = support::finite_difference(value, x, 1e-4);
    for (std::size_t i = 0; i < dx.size(); ++i) CHECK(std::fabs(dx[i] - expected[i]) < 1e-9);
    auto router = w.view().gate;
    std::vector<double> rows(router.data_handle(), router.data_handle() + router.size());
    const auto slopes = support::finite_difference(
        [&] {
            std::copy(rows.begin(), rows.end(), router.data_handle());
            return value();
        },
        rows, 1e-4);
    double largest = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) {
        CHECK(std::fabs(g.view().gate.data_handle()[i] - slopes[i]) < 1e-9);
        largest = std::max(largest, std::fabs(slopes[i]));
    }
    CHECK(largest > 1e-3); // the router learns
}

} // namespace

TEST_CASE("every model's composition has the gradients of its values, the router's included")
{
    std::vector<float> bias;
    for (int64_t e = 0; e < experts; ++e) bias.push_back(0.1f * static_cast<float>(e % 3));
    const models::config c{.width = width, .hidden = 5, .experts = experts, .k = 3, .groups = 4, .keep = 2, .scale = 2.5,
                           .shared_hidden = 4, .bias = as_vector(bias), .least_sum = 0.3, .norm_power = 2, .mask_epsilon = 0.2,
                           .activation = {.limit = 0.5}};
    check_gradients("mixtral", models::mixtral(c));
    check_gradients("olmoe", models::olmoe(c));
    check_gradients("qwen2_moe", models::qwen2_moe(c));
    check_gradients("dbrx", models::dbrx(c));
    check_gradients("deepseek_v2", models::deepseek_v2(c));
    check_gradients("deepseek_v3", models::deepseek_v3(c));
    check_gradients("minimax_m2", models::minimax_m2(c));
    check_gradients("gpt_oss", models::gpt_oss(c));
    check_gradients("llama4", models::llama4(c));
    check_gradients("ernie4_5_moe", models::ernie4_5_moe(c));
    check_gradients("phimoe", models::phimoe(c));
}

TEST_CASE("models that share a composition are one type")
{
    const models::config c{.width = 4, .hidden = 4, .experts = 4, .k = 2};
    const auto same = [](const auto& a, const auto& b) { return std::is_same_v<decltype(a), decltype(b)>; };
    CHECK(same(models::mixtral(c), models::minimax(c)));
    CHECK(same(models::mixtral(c), models::granite_moe(c)));
    CHECK(same(models::mixtral(c), models::qwen3_moe(c)));
    CHECK(same(models::olmoe(c), models::jamba(c)));
    CHECK(same(models::deepseek_v3(c), models::kimi_k2(c)));
    CHECK(same(models::deepseek_v3(c), models::glm4_moe(c)));
}
