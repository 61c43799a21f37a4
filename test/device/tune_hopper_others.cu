// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Candidates for few rows of tokens, where W is read once, and for gradients of weights.
#include "tune_hopper.cuh"

namespace tune {

namespace {

using enum hopper_schedule;

using few_rows_candidates = candidates<hopper_tuning{.rows = 128, .columns = 16, .stages = 10, .band = 1, .turned = true},
                                       hopper_tuning{.rows = 128, .columns = 16, .stages = 12, .band = 1, .turned = true},
                                       hopper_tuning{.rows = 128, .columns = 16, .stages = 6, .band = 1, .turned = true},
                                       hopper_tuning{.rows = 128, .columns = 16, .stages = 12, .schedule = ping_pong, .band = 1, .turned = true},
                                       hopper_tuning{.rows = 64, .columns = 16, .stages = 20, .schedule = ping_pong, .band = 1, .turned = true},
                                       hopper_tuning{.rows = 128, .columns = 32, .stages = 10, .band = 1, .turned = true},
                                       hopper_tuning{.rows = 64, .columns = 32, .stages = 16, .schedule = ping_pong, .band = 1, .turned = true},
                                       hopper_tuning{.rows = 128, .columns = 64, .stages = 8, .band = 1, .turned = true}>;

using gradients_candidates = candidates<hopper_tuning{.rows = 128, .columns = 256, .stages = 4},
                                        hopper_tuning{.rows = 128, .columns = 256, .stages = 4, .cluster = 2},
                                        hopper_tuning{.rows = 128, .columns = 256, .stages = 4, .cluster = 2, .band = 4},
                                        hopper_tuning{.rows = 128, .columns = 256, .stages = 4, .band = 4},
                                        hopper_tuning{.rows = 64, .columns = 256, .stages = 5, .schedule = ping_pong},
                                        hopper_tuning{.rows = 128, .columns = 128, .stages = 6, .cluster = 2, .schedule = ping_pong},
                                        hopper_tuning{.rows = 128, .columns = 128, .stages = 6},
                                        hopper_tuning{.rows = 128, .columns = 128, .stages = 6, .schedule = ping_pong},
                                        hopper_tuning{.rows = 64, .columns = 128, .stages = 9, .schedule = ping_pong},
                                        hopper_tuning{.rows = 128, .columns = 64, .stages = 9, .schedule = ping_pong}>;

} // namespace

void tune_few_rows(session& to, layer& l)
{
    auto& ex = to.executor();
    const shape& s = l.s;
    const int64_t slots = l.slots(), wide = 2 * s.hidden;
    const auto pre = l.pre.matrix(slots, wide), a = l.a.matrix(slots, s.hidden), y = l.y.matrix(slots, s.width);
    const auto up = layer::stack(l.up, s.experts, wide, s.width), down = layer::stack(l.down, s.experts, s.width, s.hidden);
    const fm::matrix_view<const float> no_bias{};
    const auto what = [&](const char* product, int64_t depth, int64_t out) {
        return comparison{"few rows", std::string(product) + ", " + s.name(), 2.0 * static_cast<double>(l.active) * static_cast<double>(depth * out),
                          true, out};
    };
    compare(to, few_rows_candidates{}, what("x up", s.width, wide), l.pre.view(), [&](const auto& gemm, fm::arena& memory) {
        gemm.forward(ex, l.groups(), l.gathered(), up, no_bias, pre, fm::no_epilogue{}, memory);
    });
    compare(to, few_rows_candidates{}, what("a down", s.hidden, s.width), l.y.view(), [&](const auto& gemm, fm::arena& memory) {
        gemm.forward(ex, l.groups(), fm::plain_rows<bfloat16>{a}, down, no_bias, y, fm::no_epilogue{}, memory);
    });
}

void tune_gradients(session& to, layer& l)
{
    auto& ex = to.executor();
    const shape& s = l.s;
    const int64_t slots = l.slots(), wide = 2 * s.hidden;
    const auto dpre = l.dpre.matrix(slots, wide), a = l.a.matrix(slots, s.hidden);
    layer::words gradients(ex, s.experts * wide * s.width);
    const auto what = [&](const char* product, int64_t rows, int64_t columns) {
        return comparison{columns > 128 ? "wide gradients" : "narrow gradients", std::string(product) + ", " + s.name(),
                          2.0 * static_cast<double>(slots) * static_cast<double>(rows * columns), false, columns};
    };
    compare(to, gradients_candidates{}, what("dy^T a", s.width, s.hidden),
            fm::vector_view<bfloat16>(gradients.data(), s.experts * s.width * s.hidden), [&](const auto& gemm, fm::arena& memory) {
                gemm.wgrad(ex, l.groups(), l.gathered(), fm::plain_rows<bfloat16>{a}, layer::stack(gradients, s.experts, s.width, s.hidden),
                           fm::write_mode::overwrite, memory);
            });
    compare(to, gradients_candidates{}, what("dpre^T x", wide, s.width), gradients.view(), [&](const auto& gemm, fm::arena& memory) {
        gemm.wgrad(ex, l.groups(), fm::plain_rows<bfloat16>{dpre}, l.gathered(), layer::stack(gradients, s.experts, wide, s.width),
                   fm::write_mode::overwrite, memory);
    });
}

} // namespace tune
