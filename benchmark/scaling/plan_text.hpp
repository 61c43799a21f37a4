// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What of a model fits where, as a text table.
#pragma once

#include <map>
#include <string>

#include "layer_memory.hpp"
#include "train_gpt/report.hpp"

namespace scaling {

inline double gib(double bytes) { return bytes / 1073741824.0; }

/// By name.
using numbers = std::map<std::string, double>;

/// A trillion parameters.
inline numbers trillion()
{
    return {{"layers", 60},      {"width", 7168},        {"hidden", 3072},        {"experts", 256},    {"k", 8},
            {"vocabulary", 131072}, {"kv", 1024},        {"matrices", 3},         {"tokens", 4096},    {"device-gib", 80},
            {"from", 8},         {"to", 1024},           {"weight-bytes", 2},     {"gradient-bytes", 2}, {"optimizer-bytes", 12}};
}

inline std::string plan_text(const numbers& o)
{
    using train_gpt::detail::format;
    std::string out;
    const auto whole = [&](const char* name) { return static_cast<std::int64_t>(o.at(name)); };
    const model m{whole("layers"), whole("width"), whole("hidden"), whole("experts"), whole("k"), whole("vocabulary"),
                  whole("kv"), whole("matrices")};
    const precision p{o.at("weight-bytes"), o.at("gradient-bytes"), o.at("optimizer-bytes")};
    out += format("%lld blocks, D %lld, E %lld of H %lld, K %lld, vocabulary %lld: %.4g parameters, %.4g of them on every rank\n",
                static_cast<long long>(m.layers), static_cast<long long>(m.width), static_cast<long long>(m.experts),
                static_cast<long long>(m.hidden), static_cast<long long>(m.k), static_cast<long long>(m.vocabulary),
                m.parameters(), m.dense_parameters());
    out += format("%g + %g + %g bytes a parameter for weight, gradient and optimizer; %lld tokens a rank; %g GiB a device\n\n",
                p.weight, p.gradient, p.optimizer, static_cast<long long>(whole("tokens")), o.at("device-gib"));
    out += format("%6s %9s | %9s %9s %9s | %9s %9s | %23s | %23s\n", "", "experts", "dense", "dense opt.", "experts", "activ.",
                "activ.", "dense opt. on every rank", "dense opt. sharded");
    out += format("%6s %9s | %9s %9s %9s | %9s %9s | %11s %11s | %11s %11s\n", "ranks", "a rank", "w + g", "a rank", "w + g + o",
                "kept", "recomp.", "kept", "recomp.", "kept", "recomp.");
    for (std::int64_t ranks = whole("from"); ranks <= whole("to"); ranks *= 2) {
        if (slices_of(m, ranks) == 0) {
            out += format("%6lld cannot share %lld experts of H %lld\n", static_cast<long long>(ranks),
                        static_cast<long long>(m.experts), static_cast<long long>(m.hidden));
            continue;
        }
        const activations a = activations_of(m, whole("tokens"), ranks);
        const auto all = [&](dense_optimizer d, block_activations b) { return memory_of(m, p, a, ranks, d, b); };
        const auto kept = all(dense_optimizer::sharded, block_activations::kept);
        const auto again = all(dense_optimizer::sharded, block_activations::recomputed);
        const std::string held = kept.slices > 1 ? "1/" + std::to_string(kept.slices) : std::to_string(kept.experts);
        out += format("%6lld %9s | %9.1f %9.1f %9.1f | %9.1f %9.1f |", static_cast<long long>(ranks), held.c_str(),
                    gib(kept.dense_weights + kept.dense_gradients), gib(kept.dense_state),
                    gib(kept.expert_weights + kept.expert_gradients + kept.expert_state), gib(kept.activations),
                    gib(again.activations));
        for (const auto d : {dense_optimizer::replicated, dense_optimizer::sharded}) {
            for (const auto b : {block_activations::kept, block_activations::recomputed}) {
                const double total = gib(all(d, b).total());
                out += format(" %6.1f %-4s", total, total <= o.at("device-gib") ? "fits" : "-");
            }
            out += d == dense_optimizer::replicated ? " |" : "\n";
        }
    }
    out += "\nGiB of the fullest rank. w, g, o: weights, gradients, optimizer.\n";
    return out;
}

} // namespace scaling
