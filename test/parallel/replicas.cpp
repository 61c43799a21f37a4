// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Training over a grid of ranks, expert-parallel in its rows and data-parallel in its columns: after synchronization R ranks
/// with unequal parts of a batch have the gradients that one rank has of all of it, and three steps leave them with its
/// weights.
#include <doctest/doctest.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include <fastmoe/comm/threads.hpp>
#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/expert/mlp.hpp>
#include <fastmoe/layer/moe_layer.hpp>
#include <fastmoe/layer/owned_weights.hpp>
#include <fastmoe/parallel/broadcast_parameters.hpp>
#include <fastmoe/parallel/gradient_norm.hpp>
#include <fastmoe/parallel/gradients.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

#include "scene.hpp"
#include "support/compare.hpp"

namespace fm = fastmoe;
using fm::int64_t;

namespace {

constexpr int64_t width = 6, hidden = 4, experts = 5;
constexpr double most = 3; ///< norm

/// By tensor and expert, -1 for what is no expert's.
using tensors = std::map<std::pair<int, int64_t>, std::vector<double>>;

struct trained {
    tensors gradients; ///< of the first step, synchronized
    tensors weights;   ///< after three
    std::vector<double> norms;
};

/// Three steps of a rank on its tokens of a batch. Only the ranks of the first row begin with the model's weights.
/// @param expert_of  the global id of a local expert
template <class T, class Parallel, class World, class Data, class ExpertOf>
trained train(const Parallel& parallel, const World& world, const Data& data, const ExpertOf& expert_of, bool first_row,
              const std::vector<T>& x, const std::vector<T>& dy, int64_t first, int64_t count)
{
    fm::host_executor ex({.threads = 2});
    const fm::top_k_gate<fm::softmax_score> gate{.experts = experts, .k = 2, .balance = {.coefficient = 0.5}, .z = {.coefficient = 0.1}};
    const fm::mlp<fm::swiglu> expert{.width = width, .hidden = hidden, .biases = true};
    const fm::moe_layer layer{gate, expert, parallel};
    const auto weights = fm::zero_weights<T>(ex, layer), gradients = fm::zero_weights<T>(ex, layer);
    const auto& w = weights.view();
    const auto& g = gradients.view();
    const auto replicated = fm::parameter_tag::data;
    const std::vector<fm::parameter_view> list{fm::as_parameter(w.gate, g.gate, fm::parameter_tag::world),
                                               fm::as_parameter(w.expert.up, g.expert.up, replicated),
                                               fm::as_parameter(w.expert.down, g.expert.down, replicated),
                                               fm::as_parameter(w.expert.up_bias, g.expert.up_bias, replicated),
                                               fm::as_parameter(w.expert.down_bias, g.expert.down_bias, replicated)};
    const int64_t local = w.expert.up.experts;
    // f(tensor, expert, its elements from .. on, how many)
    const auto for_each_tensor = [&](bool values, const auto& f) {
        for (std::size_t p = 0; p < list.size(); ++p) {
            T* from = static_cast<T*>(values ? list[p].values : list[p].gradient);
            if (p == 0) f(0, int64_t{-1}, from, list[p].count);
            else
                for (int64_t l = 0; l < local; ++l)
                    f(static_cast<int>(p), expert_of(l), from + l * (list[p].count / local), list[p].count / local);
        }
    };
    for_each_tensor(true, [&](int tensor, int64_t e, T* to, int64_t n) {
        support::random values(static_cast<std::uint64_t>(tensor * 100 + e + 1));
        for (int64_t i = 0; i < n; ++i) to[i] = T(first_row ? values.uniform(-0.7, 0.7) : 99);
    });
    if (first_row && world.rank() > 0) // the gate's values come from rank 0 alone
        for (int64_t i = 0; i < w.gate.extent(0) * w.gate.extent(1); ++i) w.gate.data_handle()[i] = T(-99);
    fm::broadcast_parameters(ex, fm::as_vector(list), world, data);

    const auto of = [&](const std::vector<T>& v) { return fm::matrix_view<const T>(v.data() + first * width, count, width); };
    std::vector<T> y_memory(count * width + 1), dx_memory(count * width + 1);
    const fm::matrix_view<T> y(y_memory.data(), count, width), dx(dx_memory.data(), count, width);
    const auto copies = [&](bool values) {
        tensors out;
        for_each_tensor(values, [&](int tensor, int64_t e, T* from, int64_t n) { out[{tensor, e}].assign(from, from + n); });
        return out;
    };
    trained out;
    for (int step = 0; step < 3; ++step) {
        const auto saved = layer.forward(ex, of(x), w, y);
        layer.backward(ex, saved, of(dy), w, dx, g);
        fm::synchronize_gradients(ex, fm::as_vector(list), world, data, {.bucket_bytes = 200});
        if (step == 0) out.gradients = copies(false);
        out.norms.push_back(fm::clip_gradients(ex, fm::as_vector(list), world, data, most));
        for (const auto& p : list)
            for (int64_t i = 0; i < p.count; ++i)
                static_cast<T*>(p.values)[i] -= T(0.1) * static_cast<const T*>(p.gradient)[i];
    }
    out.weights = copies(true);
    return out;
}

} // namespace

TEST_CASE_TEMPLATE("a grid of ranks with unequal tokens, one of them with none, trains as one rank does on the joined batch", T,
                   double, float)
{
    FASTMOE_SEEDED(rng, 521);
    const int64_t tokens = 31;
    const auto x = support::normal_vector<T>(rng, tokens * width), dy = support::normal_vector<T>(rng, tokens * width);
    const trained joined = train<T>(fm::self{}, fm::self{}, fm::self{}, [](int64_t l) { return l; }, true, x, dy, 0, tokens);
    CHECK(joined.norms[0] > most); // so that clipping is part of it
    const std::vector<std::vector<int64_t>> cuts{
        {0, 31}, {0, 27, 31}, {0, 20, 20, 31}, {0, 1, 20, 24, 31}, {0, 1, 2, 5, 5, 20, 21, 30, 31}};
    for (const auto& cut : cuts)
        for (const scene::grid grid : scene::grids(static_cast<int>(cut.size()) - 1)) {
            INFO("ranks ", grid.ranks, ", expert-parallel ", grid.columns);
            std::vector<trained> parts(grid.ranks);
            fm::run_ranks(grid.ranks, [&](const fm::threads& world) {
                const int r = world.rank();
                const fm::threads group = world.split(grid.row(r), r), data = grid.data_of(world);
                const fm::placed_experts<fm::block_placement> place{{}, experts, grid.columns, 1, group.rank()};
                parts[r] = train<T>(fm::expert_parallel{group, world}, world, data, [&](int64_t l) { return place.expert(l); },
                                    grid.row(r) == 0, x, dy, cut[r], cut[r + 1] - cut[r]);
            });
            const auto check = [&](const std::vector<double>& got, const std::vector<double>& expected, double length) {
                CHECK(support::close(std::vector<T>(got.begin(), got.end()), expected, {.length = length, .magnitude = 8}));
            };
            std::size_t found = 0;
            for (int r = 0; r < grid.ranks; ++r) {
                const trained& part = parts[r];
                found += grid.row(r) == 0 ? part.weights.size() - 1 : 0;
                for (const auto& [of, values] : part.gradients) check(values, joined.gradients.at(of), double(2 * tokens + 40));
                // An error of the first step goes on through the next two.
                for (const auto& [of, values] : part.weights) {
                    check(values, joined.weights.at(of), double(10 * (2 * tokens + 40)));
                    const int holder = of.second < 0 ? 0 : grid.column(r);
                    CHECK(values == parts[holder].weights.at(of)); // all who hold it have the same bits
                }
                check(part.norms, joined.norms, double(10 * (2 * tokens + 40)));
                CHECK(part.norms == parts[0].norms);
            }
            CHECK_EQ(found, 4 * experts); // each expert once a row
        }
}
