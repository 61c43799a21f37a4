// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A layer by gemm::hopper half of whose tokens go to one expert, beside the same layer with as many for each.
#include <fastmoe/gemm/hopper.hpp>

#include "bench_parts.cuh"

namespace timing {
namespace {

struct fill_table {
    std::int32_t* to;
    std::int32_t experts;
    bool skewed;
    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        const auto e = static_cast<std::int32_t>((i * 7919) % experts);
        to[i] = skewed && i % 2 == 0 ? 0 : e;
    }
};
struct count_up {
    std::int32_t* to;
    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { to[i] = static_cast<std::int32_t>(i); }
};

} // namespace

void bench_skew(fm::cuda_executor& ex, figures& out)
{
    if (!runs_hopper(ex)) return;
    const shape s{131072, 4096, 2048, 64, 1, 10};
    const int64_t n = s.tokens * s.width;
    const auto x = random_values(ex, n), dy = random_values(ex, n);
    fm::buffer<bfloat16, fm::cuda_executor> y(ex, n), dx(ex, n);
    fm::buffer<std::int32_t, fm::cuda_executor> table(ex, s.tokens), ids(ex, s.tokens);
    fm::for_each(ex, s.tokens, count_up{ids.data()});
    const fm::moe_layer l{fm::hash_gate{.experts = s.experts, .assignment = {fm::matrix_view<const std::int32_t>(table.data(), s.tokens, 1)}},
                          fm::mlp<fm::swiglu, fm::gemm::hopper>{.width = s.width, .hidden = s.hidden, .layout = fm::gated_layout::interleaved},
                          fm::self{}};
    const auto weights = fm::random_weights<bfloat16>(ex, l, 1);
    const auto gradients = fm::zero_weights<bfloat16>(ex, l);
    const fm::matrix_view<const bfloat16> tokens(x.data(), s.tokens, s.width), from_above(dy.data(), s.tokens, s.width);
    fm::buffer<std::byte, fm::cuda_executor> kept(ex, l.forward_bytes<bfloat16>(ex, s.tokens, s.width)),
        lent(ex, l.backward_bytes<bfloat16>(ex, s.tokens, s.width));
    double took[2];
    for (const bool skewed : {false, true}) {
        fm::for_each(ex, s.tokens, fill_table{table.data(), static_cast<std::int32_t>(s.experts), skewed});
        took[skewed] = milliseconds_of(ex, s.rounds, [&] {
            fm::arena a(kept.view()), b(lent.view());
            const auto saved = l.forward(ex, tokens, weights.view(), y.matrix(s.tokens, s.width), a, {.token_ids = ids.view()});
            l.backward(ex, saved, from_above, weights.view(), dx.matrix(s.tokens, s.width), gradients.view(), b);
        });
        out.add(s.name() + (skewed ? " forward + backward, half on one expert" : " forward + backward, as many on each"), took[skewed], 0,
                18.0 * static_cast<double>(s.tokens * s.k) * static_cast<double>(s.hidden * s.width));
    }
    out.claim("half of all tokens on one expert: speed / even", took[0] / took[1], wanted::at_least, 0.90);
}

} // namespace timing
