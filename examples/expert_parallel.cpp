// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Ranks that share experts: four of them, threads here, in two replicas of two. Each trains on its own tokens, and together
/// they do what one rank does with all tokens. With `fastmoe/comm/mpi.hpp` the same body runs in processes.
#include <fastmoe/moe.hpp>

#include <cmath>
#include <cstdio>
#include <vector>

namespace fm = fastmoe;

constexpr int ranks = 4, replicas = 2, tokens = 96, width = 32, experts = 6;

// [ranks]
/// One step on this rank's share of the tokens; returns the gradient's norm. Each communicator is a policy: with fm::self for
/// both it is the program of one rank.
template <class World, class Group, class Data>
double step(fm::host_executor& ex, const World& world, const Group& group, const Data& data, const float* x, const float* dy)
{
    const int own = tokens / world.size();
    const auto share = [&](const float* all) { return fm::matrix_view<const float>(all + world.rank() * own * width, own, width); };

    const fm::moe_layer layer{
        fm::top_k_gate<>{.experts = experts, .k = 2, .balance = {.coefficient = 0.01}},
        fm::mlp<fm::swiglu>{.width = width, .hidden = 64},
        fm::expert_parallel{group, world, fm::round_robin_placement{}, fm::exact_exchange<>{}}};
    const auto weights = fm::random_weights<float>(ex, layer, /*seed=*/1); // of this rank's experts
    const auto gradients = fm::zero_weights<float>(ex, layer);
    std::vector<float> y(own * width), dx(own * width);

    const auto saved = layer.forward(ex, share(x), weights.view(), fm::as_matrix(y, own, width));
    layer.backward(ex, saved, share(dy), weights.view(), fm::as_matrix(dx, own, width), gradients.view());

    const auto& w = weights.view();
    const auto& g = gradients.view();
    const fm::parameter_view parameters[] = {
        fm::as_parameter(w.gate, g.gate, fm::parameter_tag::world),               // all ranks have the router
        fm::as_parameter(w.expert.up, g.expert.up, fm::parameter_tag::data),      // replicas have the same experts
        fm::as_parameter(w.expert.down, g.expert.down, fm::parameter_tag::data)};
    const fm::vector_view<const fm::parameter_view> all(parameters, 3);
    fm::synchronize_gradients(ex, all, world, data); // sums
    return fm::clip_gradients(ex, all, world, data, /*max_norm=*/1.0);
}
// [ranks]

int main()
{
    std::vector<float> x(tokens * width), dy(tokens * width);
    for (std::size_t i = 0; i < x.size(); ++i) {
        x[i] = float(i * 7919 % 1009) / 504.5f - 1.0f;
        dy[i] = float(i * 104729 % 997) / 498.5f - 1.0f;
    }
    double norms[ranks] = {};
    fm::run_ranks(ranks, [&](const fm::threads& world) {
        fm::host_executor ex({.threads = 1});
        const int members = ranks / replicas; // that share the experts of a replica
        const fm::threads group = world.split(world.rank() / members, world.rank());
        const fm::threads data = world.split(world.rank() % members, world.rank()); // the same experts in each replica
        norms[world.rank()] = step(ex, world, group, data, x.data(), dy.data());
    });
    fm::host_executor ex;
    const double one = step(ex, fm::self{}, fm::self{}, fm::self{}, x.data(), dy.data());
    std::printf("gradient norm on one rank %.4f, on four ranks", one);
    for (const double n : norms) std::printf(" %.4f", n);
    std::printf("\n");
    return std::fabs(norms[0] / one - 1) < 1e-5 && norms[0] == norms[3] ? 0 : 1;
}
