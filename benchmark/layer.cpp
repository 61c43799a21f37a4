// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The layer, forward and backward, against the six products of a dense MLP over as many rows: what experts, gate, moves
/// and activation cost beside the arithmetic that nobody can avoid. T 4096, D 512, H 2048, K 2, GELU.

#include <memory>

#include <fastmoe/gemm/onednn.hpp>
#include <fastmoe/gemm/portable.hpp>

#include "moe_setup.hpp"
#include "race.hpp"

namespace {

using namespace bench;

constexpr int64_t experts[] = {4, 16, 64};

/// What a GEMM library is to reach, in the order of `experts`.
struct targets {
    target kind;
    double roof[3];
    double growth;
};

template <class T, class Gemm>
standing hold(const std::string& gemm, const targets& goal)
{
    fm::host_executor ex;
    const shape base{4096, 512, 2048, 0, 2};
    mlp_products<T, Gemm> dense(ex, 1, base.choices(), base.width, base.hidden);
    const even_groups one(1, base.choices());

    race r;
    const auto roof_call = [&] {
        dense.forward(one.view());
        dense.backward(one.view());
    };
    const int roof = r.add(roof_call);
    std::unique_ptr<moe_setup<T, Gemm>> layers[3];
    int lane[3];
    for (int i = 0; i < 3; ++i) {
        shape s = base;
        s.experts = experts[i];
        layers[i] = std::make_unique<moe_setup<T, Gemm>>(ex, s);
        lane[i] = r.add([layer = layers[i].get()] { layer->train(); });
    }
    r.run(budget(12));

    const double flops = 3 * dense.forward_flops();
    const std::string prefix = std::string("layer forward + backward, ") + type_name<T>() + ", " + gemm + ", ";
    standing out{{}, r.rounds()};
    for (int i = 0; i < 3; ++i)
        out.claims.push_back({.text = prefix + "E " + std::to_string(experts[i]) + ": speed / dense MLP's six products",
                              .ratio = r.ratio(roof, lane[i]),
                              .kind = goal.kind,
                              .value = goal.roof[i],
                              .seconds_a_call = r.time(lane[i]).middle,
                              .also = {{"roof_ms", 1e3 * r.time(roof).middle},
                                       {"roof_gflops", flops / r.time(roof).middle * 1e-9}}});
    out.claims.push_back({.text = prefix + "time at E 64 / time at E 4",
                          .ratio = r.ratio(lane[2], lane[0]),
                          .kind = goal.kind == target::none ? target::none : target::at_most,
                          .value = goal.growth,
                          .seconds_a_call = r.time(lane[2]).middle});
    return out;
}

template <class T, class Gemm>
void add(const std::string& gemm, const targets& goal)
{
    const std::string prefix = std::string("layer/") + type_name<T>() + "/" + gemm + "/";
    register_lines({prefix + "experts:4", prefix + "experts:16", prefix + "experts:64", prefix + "growth"},
                   [=] { return hold<T, Gemm>(gemm, goal); });
}

} // namespace

int main(int argc, char** argv)
{
    constexpr targets fp32{target::at_least, {0.90, 0.90, 0.82}, 1.25};
    constexpr targets bf16{target::at_least, {0.85, 0.85, 0.78}, 1.25};
    constexpr targets free{target::none, {}, 0};
    add<float, fm::gemm::onednn>("onednn", fp32);
    add<fm::bfloat16, fm::gemm::onednn>("onednn", bf16);
    add<float, fm::gemm::portable>("portable", free);
    add<fm::bfloat16, fm::gemm::portable>("portable", free);
    return run_all(argc, argv);
}
