// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Data parallelism of a whole layer: R ranks with unequal parts of a batch, after synchronization, have the gradients that
/// one rank has of all of it, and three steps of training leave them with its weights.
#include <doctest/doctest.h>

#include <string>
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

#include "support/compare.hpp"

namespace fm = fastmoe;
using fm::int64_t;

namespace {

constexpr int64_t width = 6;

struct trained {
    std::vector<std::vector<double>> gradients; ///< of the first step: gate, up, down, and both biases
    std::vector<std::vector<double>> weights;   ///< after three
    std::vector<double> norms;
};

/// Three steps of a rank on its tokens of a batch, with a loss whose gradient is dy. Every rank has all experts. The ranks
/// begin with different weights; those of the first hold.
template <class T, class Communicator>
trained train(const Communicator& c, const std::vector<T>& x, const std::vector<T>& dy, int64_t first, int64_t count)
{
    fm::host_executor ex({.threads = 2});
    fm::moe_layer layer{fm::top_k_gate<fm::softmax_score>{.experts = 5, .k = 2},
                        fm::mlp<fm::swiglu>{.width = width, .hidden = 4, .biases = true}, fm::self{}};
    const auto weights = fm::random_weights<T>(ex, layer, 3 + c.rank());
    const auto gradients = fm::zero_weights<T>(ex, layer);
    const auto& w = weights.view();
    const auto& g = gradients.view();
    const auto all = fm::parameter_tag::world;
    const std::vector<fm::parameter_view> list{
        fm::as_parameter(w.gate, g.gate, all), fm::as_parameter(w.expert.up, g.expert.up, all),
        fm::as_parameter(w.expert.down, g.expert.down, all), fm::as_parameter(w.expert.up_bias, g.expert.up_bias, all),
        fm::as_parameter(w.expert.down_bias, g.expert.down_bias, all)};
    fm::broadcast_parameters(ex, fm::as_vector(list), c, fm::self{});

    const auto of = [&](const std::vector<T>& v) { return fm::matrix_view<const T>(v.data() + first * width, count, width); };
    std::vector<T> y_memory(count * width + 1), dx_memory(count * width + 1);
    const fm::matrix_view<T> y(y_memory.data(), count, width), dx(dx_memory.data(), count, width);
    const auto copies = [&](bool values) {
        std::vector<std::vector<double>> out;
        for (const auto& p : list) {
            const T* from = static_cast<const T*>(values ? p.values : p.gradient);
            out.emplace_back(from, from + p.count);
        }
        return out;
    };
    trained out;
    for (int step = 0; step < 3; ++step) {
        const auto saved = layer.forward(ex, of(x), w, y);
        layer.backward(ex, saved, of(dy), w, dx, g);
        fm::synchronize_gradients(ex, fm::as_vector(list), c, fm::self{}, {.bucket_bytes = 200});
        if (step == 0) out.gradients = copies(false);
        out.norms.push_back(fm::clip_gradients(ex, fm::as_vector(list), c, fm::self{}, 3.0));
        for (const auto& p : list)
            for (int64_t i = 0; i < p.count; ++i)
                static_cast<T*>(p.values)[i] -= T(0.1) * static_cast<const T*>(p.gradient)[i];
    }
    out.weights = copies(true);
    return out;
}

} // namespace

TEST_CASE_TEMPLATE("R ranks with unequal tokens, one of them with none, train as one rank does on the joined batch", T, double,
                   float)
{
    FASTMOE_SEEDED(rng, 521);
    const int64_t tokens = 31;
    const auto x = support::normal_vector<T>(rng, tokens * width), dy = support::normal_vector<T>(rng, tokens * width);
    const trained joined = train<T>(fm::self{}, x, dy, 0, tokens);
    CHECK(joined.norms[0] > 3.0); // so that clipping is part of it
    const std::vector<std::vector<int64_t>> cuts{{0, 31}, {0, 27, 31}, {0, 20, 20, 31}, {0, 1, 20, 24, 31}, {0, 1, 2, 5, 5, 20, 21, 30, 31}};
    for (const auto& cut : cuts) {
        const int ranks = static_cast<int>(cut.size()) - 1;
        INFO("ranks ", ranks);
        std::vector<trained> parts(ranks);
        fm::run_ranks(ranks, [&](const fm::threads& c) {
            const int r = c.rank();
            parts[r] = train<T>(c, x, dy, cut[r], cut[r + 1] - cut[r]);
        });
        for (const trained& part : parts) {
            const auto check = [&](const std::vector<double>& got, const std::vector<double>& expected, double length) {
                CHECK(support::close(std::vector<T>(got.begin(), got.end()), expected, {.length = length, .magnitude = 8}));
            };
            for (std::size_t p = 0; p < joined.gradients.size(); ++p) {
                check(part.gradients[p], joined.gradients[p], double(2 * tokens + 40));
                // An error of the first step goes on through the next two.
                check(part.weights[p], joined.weights[p], double(10 * (2 * tokens + 40)));
                CHECK(part.weights[p] == parts[0].weights[p]); // all ranks have the same bits
            }
            check(part.norms, joined.norms, double(10 * (2 * tokens + 40)));
            CHECK(part.norms == parts[0].norms);
        }
    }
}
