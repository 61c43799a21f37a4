// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Candidates for rows of tokens: both products of an mlp and the gradients of their inputs, with what ends them in registers.
#include "tune_hopper.cuh"

namespace tune {

namespace {

using enum hopper_schedule;

/// Two blocks need whole 128 columns: a stage of W that lies wide is brought 64 columns at a time, by turns.
using rows_candidates = candidates<hopper_tuning{.rows = 128, .columns = 256, .stages = 4, .cluster = 2},
                                   hopper_tuning{.rows = 128, .columns = 256, .stages = 4, .cluster = 2, .fences_lines = false},
                                   hopper_tuning{.rows = 128, .columns = 256, .stages = 4, .cluster = 1},
                                   hopper_tuning{.rows = 128, .columns = 256, .stages = 4, .cluster = 2, .band = 16},
                                   hopper_tuning{.rows = 128, .columns = 256, .stages = 4, .cluster = 2, .band = 4},
                                   hopper_tuning{.rows = 128, .columns = 192, .stages = 5, .cluster = 1},
                                   hopper_tuning{.rows = 64, .columns = 256, .stages = 5, .cluster = 2, .schedule = ping_pong},
                                   hopper_tuning{.rows = 64, .columns = 256, .stages = 5, .cluster = 1, .schedule = ping_pong},
                                   hopper_tuning{.rows = 128, .columns = 128, .stages = 6, .cluster = 2, .schedule = ping_pong},
                                   hopper_tuning{.rows = 128, .columns = 128, .stages = 6, .cluster = 1, .schedule = ping_pong},
                                   hopper_tuning{.rows = 128, .columns = 128, .stages = 6, .cluster = 2},
                                   hopper_tuning{.rows = 64, .columns = 128, .stages = 9, .cluster = 2, .schedule = ping_pong}>;

} // namespace

void tune_rows(session& to, layer& l)
{
    auto& ex = to.executor();
    const shape& s = l.s;
    const int64_t slots = l.slots(), wide = 2 * s.hidden;
    const auto columns = fm::detail::gated_columns::of(fm::gated_layout::interleaved, s.hidden);
    const auto pre = l.pre.matrix(slots, wide), dpre = l.dpre.matrix(slots, wide), a = l.a.matrix(slots, s.hidden), y = l.y.matrix(slots, s.width);
    const auto up = layer::stack(l.up, s.experts, wide, s.width), down = layer::stack(l.down, s.experts, s.width, s.hidden);
    const auto in = l.input();
    const fm::matrix_view<const float> no_bias{};
    const auto what = [&](const char* product, int64_t depth, int64_t out) {
        return comparison{out > 128 ? "wide rows" : "narrow rows", std::string(product) + ", " + s.name(),
                          2.0 * static_cast<double>(slots) * static_cast<double>(depth * out), false, out};
    };
    compare(to, rows_candidates{}, what("x up, activated", s.width, wide), l.a.view(), [&](const auto& gemm, fm::arena& memory) {
        gemm.forward(ex, in.groups, in.x, up, no_bias, pre,
                     fm::detail::activate<fm::swiglu, bfloat16>{pre, a, columns, in, false, true, {}}, memory);
    });
    compare(to, rows_candidates{}, what("a down", s.hidden, s.width), l.y.view(), [&](const auto& gemm, fm::arena& memory) {
        gemm.forward(ex, in.groups, fm::plain_rows<bfloat16>{a}, down, no_bias, y, fm::no_epilogue{}, memory);
    });
    compare(to, rows_candidates{}, what("dy down^T, activation's backward", s.width, s.hidden), l.dpre.view(),
            [&](const auto& gemm, fm::arena& memory) {
                gemm.dgrad(ex, in.groups, in.x, down, a,
                           fm::detail::activate_backward<fm::swiglu, bfloat16>{
                               pre, a, dpre, in.x, {}, l.dweights.view(), columns, in, fm::weigh_at::output, {}},
                           memory);
            });
    compare(to, rows_candidates{}, what("dpre up^T", wide, s.width), l.y.view(), [&](const auto& gemm, fm::arena& memory) {
        gemm.dgrad(ex, in.groups, fm::plain_rows<bfloat16>{dpre}, up, y, fm::no_epilogue{}, memory);
    });
}

} // namespace tune
