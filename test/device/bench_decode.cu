// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Inference of few tokens at Mixtral's sizes, as replays of a captured graph, by the bandwidth at which the weights of the experts
/// that were chosen come.
#include <vector>

#include <fastmoe/gemm/hopper.hpp>

#include "bench_parts.cuh"

namespace timing {
namespace {

template <class Gemm>
double decode(fm::cuda_executor& ex, figures& out, const shape& s, const std::string& label, fm::gated_layout layout)
{
    const fm::moe_layer l{fm::top_k_gate<fm::softmax_score>{.experts = s.experts, .k = s.k},
                          fm::mlp<fm::swiglu, Gemm>{.width = s.width, .hidden = s.hidden, .layout = layout}, fm::self{}};
    const auto weights = fm::random_weights<bfloat16>(ex, l, 1);
    const auto x = random_values(ex, s.tokens * s.width);
    const fm::matrix_view<const bfloat16> tokens(x.data(), s.tokens, s.width);
    fm::buffer<bfloat16, fm::cuda_executor> y(ex, s.tokens * s.width);
    fm::buffer<std::byte, fm::cuda_executor> memory(ex, l.template infer_bytes<bfloat16>(ex, s.tokens, s.width)),
        kept(ex, l.template forward_bytes<bfloat16>(ex, s.tokens, s.width));
    fm::arena room(kept.view());
    const auto saved = l.forward(ex, tokens, weights.view(), y.matrix(s.tokens, s.width), room);
    std::vector<std::int32_t> counts(static_cast<std::size_t>(s.experts));
    ex.copy_to_host(counts.data(), saved.plan().counts.data_handle(), s.experts * static_cast<int64_t>(sizeof(std::int32_t)));
    int64_t active = 0;
    for (const std::int32_t c : counts) active += c > 0;
    const double bytes = 6.0 * static_cast<double>(active) * static_cast<double>(s.hidden * s.width);
    const double ms = captured_milliseconds_of(ex, s.rounds, [&] {
        fm::arena a(memory.view());
        l.infer(ex, tokens, weights.view(), y.matrix(s.tokens, s.width), a);
    });
    out.add(s.name() + " " + label + ", " + std::to_string(active) + " active", ms, bytes);
    return bytes / ms * 1e-6 / out.copy_gb_per_s;
}

} // namespace

void bench_decode(fm::cuda_executor& ex, figures& out)
{
    fm::cuda_executor early(ex.stream(), nullptr, {.programmatic_launch = true});
    for (const int64_t tokens : {1, 8, 32, 128}) {
        const shape s{tokens, 4096, 14336, 8, 2, 20};
        const double by_portable = decode<fm::gemm::portable>(ex, out, s, "portable", fm::gated_layout::concatenated);
        if (!runs_hopper(ex)) {
            out.claim(s.name() + " infer: weights' bandwidth / a copy's", by_portable, wanted::at_least, 0.60);
            continue;
        }
        const double plain = decode<fm::gemm::hopper>(ex, out, s, "hopper, interleaved", fm::gated_layout::interleaved);
        const double overlapped = decode<fm::gemm::hopper>(early, out, s, "hopper, interleaved, programmatic launches", fm::gated_layout::interleaved);
        out.claim(s.name() + " infer: weights' bandwidth / a copy's", plain, wanted::at_least, tokens <= 32 ? 0.85 : 0.60);
        out.claim(s.name() + " infer, programmatic launches: the same", overlapped, wanted::at_least, tokens <= 32 ? 0.85 : 0.60);
    }
}

} // namespace timing
