// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What moves rows around the products, beside a device copy of the same run, at the first of the published sizes; and what of a
/// forward pass gate, plan and combine are. Bytes are those that have to come and go: a row that K experts read counts K times.
#include <fastmoe/gemm/hopper.hpp>

#include "bench_parts.cuh"

namespace timing {

void bench_verbs(fm::cuda_executor& ex, figures& out)
{
    const shape s = published[0];
    const fm::moe_layer l{fm::top_k_gate<fm::softmax_score>{.experts = s.experts, .k = s.k},
                          fm::mlp<fm::swiglu, fm::gemm::hopper>{.width = s.width, .hidden = s.hidden, .layout = fm::gated_layout::interleaved},
                          fm::self{}};
    const auto weights = fm::random_weights<bfloat16>(ex, l, 1);
    const auto x = random_values(ex, s.tokens * s.width), dy = random_values(ex, s.tokens * s.width);
    fm::buffer<bfloat16, fm::cuda_executor> y(ex, s.tokens * s.width);
    const fm::matrix_view<const bfloat16> tokens(x.data(), s.tokens, s.width), gradients(dy.data(), s.tokens, s.width);
    const auto result = y.matrix(s.tokens, s.width);
    fm::buffer<std::byte, fm::cuda_executor> kept(ex, l.forward_bytes<bfloat16>(ex, s.tokens, s.width)), lent(ex, int64_t{1} << 30);
    fm::arena memory(kept.view());
    const auto saved = l.forward(ex, tokens, weights.view(), result, memory);
    const auto& parts = saved.parts();
    const auto& plan = saved.plan();
    const int64_t slots = plan.slots, choices = s.tokens * s.k;
    auto rows = random_values(ex, slots * s.width);
    const auto some = rows.matrix(slots, s.width);
    fm::buffer<float, fm::cuda_executor> dweights(ex, choices);

    const double wide = 2.0 * static_cast<double>(s.width), of_rows = static_cast<double>(choices) * wide, of_tokens = static_cast<double>(s.tokens) * wide;
    const auto moves = [&](const char* verb, double bytes, const auto& body) {
        const double ms = milliseconds_of(ex, 10, body);
        out.add(s.name() + " " + verb, ms, bytes);
        out.claim(std::string(verb) + ": bandwidth / a device copy's", bytes / ms * 1e-6 / out.copy_gb_per_s, wanted::at_least, 0.80);
    };
    moves("dispatch", 2 * of_rows, [&] { fm::dispatch(ex, tokens, plan, some); });
    moves("combine", of_rows + of_tokens, [&] { fm::combine(ex, some, saved.routing(), plan, result); });
    moves("combine without weights", of_rows + of_tokens, [&] { fm::combine_unweighted(ex, some, saved.routing(), plan, result); });
    moves("gradient of the routing weights", 2 * of_rows,
          [&] { fm::combine_weights_backward(ex, gradients, some, saved.routing(), plan, dweights.view()); });

    // Activations of rows, where an epilogue does not do them.
    auto hidden = random_values(ex, 3 * slots * s.hidden), dpre = random_values(ex, 2 * slots * s.hidden);
    const fm::matrix_view<bfloat16> pre(hidden.data(), slots, 2 * s.hidden), a(hidden.data() + 2 * slots * s.hidden, slots, s.hidden);
    const auto columns = fm::detail::gated_columns::of(fm::gated_layout::interleaved, s.hidden);
    const auto each_row = [&](const auto& f) {
        fm::for_each_row(ex, slots, fm::detail::portable::end_row<std::remove_cvref_t<decltype(f)>>{plan.groups(), f}, {.width = 2 * s.hidden});
    };
    const double of_hidden = 2.0 * static_cast<double>(choices) * static_cast<double>(s.hidden);
    moves("activation", 3 * of_hidden, [&] {
        each_row(fm::detail::activate<fm::swiglu, bfloat16>{pre, a, columns, parts.expert_view(), true, true, {}});
    });
    moves("activation, backward", 6 * of_hidden, [&] {
        each_row(fm::detail::activate_backward<fm::swiglu, bfloat16>{pre, a, dpre.matrix(slots, 2 * s.hidden), {gradients, plan.token_of}, {}, dweights.view(),
                                                                     columns, parts.expert_view(), fm::weigh_at::activation, {}});
    });

    // What comes before and after the products.
    fm::buffer<float, fm::cuda_executor> logits(ex, s.tokens * s.experts), dlogits(ex, s.tokens * s.experts);
    fm::for_each(ex, s.tokens * s.experts, fm::detail::fill<float>{dlogits.data(), 0.01f});
    const auto gate = weights.view().gate;
    const fm::matrix_view<const bfloat16> router(gate.data_handle(), gate.extent(0), gate.extent(1));
    const double of_logits = 4.0 * static_cast<double>(s.tokens * s.experts), few = of_tokens + of_logits;
    const auto project = [&] {
        fm::arena b(lent.view());
        fm::project(ex, tokens, router, fm::vector_view<const bfloat16>{}, logits.matrix(s.tokens, s.experts), b);
    };
    const auto route = [&] {
        fm::arena b(lent.view());
        l.gate.route(ex, parts.gate_view(fm::gate_mode::training), fm::self{}, parts.gate, b);
    };
    const auto make_plan = [&] {
        fm::arena b(lent.view());
        fm::make_plan(ex, saved.routing(), plan, b);
    };
    out.add(s.name() + " router", milliseconds_of(ex, 10, project), few);
    out.add(s.name() + " choice and weights", milliseconds_of(ex, 10, route), of_logits);
    out.add(s.name() + " plan", milliseconds_of(ex, 10, make_plan), 12.0 * static_cast<double>(choices));
    const double around = milliseconds_of(ex, 10, [&] { project(), route(), make_plan(), fm::combine(ex, some, saved.routing(), plan, result); });
    const double forward = milliseconds_of(ex, 10, [&] {
        fm::arena b(kept.view());
        l.forward(ex, tokens, weights.view(), result, b);
    });
    out.claim("gate + plan + combine / forward", around / forward, wanted::at_most, 0.05);

    fm::buffer<float, fm::cuda_executor> dgate(ex, s.experts * s.width);
    const fm::matrix_view<const float> of_loss(dlogits.data(), s.tokens, s.experts);
    out.add(s.name() + " router, gradient of x", milliseconds_of(ex, 10, [&] {
                fm::arena b(lent.view());
                fm::project_input_backward(ex, of_loss, router, result, fm::write_mode::overwrite, b);
            }), few);
    out.add(s.name() + " router, gradient of its weights", milliseconds_of(ex, 10, [&] {
                fm::arena b(lent.view());
                fm::project_weights_backward(ex, of_loss, tokens, dgate.matrix(s.experts, s.width), fm::vector_view<float>{}, fm::write_mode::overwrite, b);
            }), few);
}

} // namespace timing
