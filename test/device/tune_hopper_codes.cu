// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Candidates for products of codes: both products of an mlp, of rows and weights that were quantized before, for many rows and for few.
#include <fastmoe/gemm/hopper_fp8.hpp>

#include "tune_hopper.cuh"

namespace tune {

namespace {

using enum hopper_schedule;
using fm::float8_e4m3;

template <hopper_tuning how>
using codes_policy = fm::gemm::hopper_fp8_with<always<how>>;

using codes_candidates = candidates<hopper_tuning{.rows = 128, .columns = 128, .stages = 6, .cluster = 2},
                                    hopper_tuning{.rows = 128, .columns = 128, .stages = 6, .cluster = 1},
                                    hopper_tuning{.rows = 128, .columns = 128, .stages = 6, .cluster = 2, .band = 16},
                                    hopper_tuning{.rows = 128, .columns = 128, .stages = 6, .cluster = 2, .schedule = ping_pong},
                                    hopper_tuning{.rows = 64, .columns = 128, .stages = 8, .cluster = 2, .schedule = ping_pong},
                                    hopper_tuning{.rows = 128, .columns = 64, .stages = 8, .cluster = 1}>;
using few_codes_candidates = candidates<hopper_tuning{.rows = 128, .columns = 16, .stages = 10, .band = 1, .turned = true},
                                        hopper_tuning{.rows = 128, .columns = 16, .stages = 6, .band = 1, .turned = true},
                                        hopper_tuning{.rows = 64, .columns = 16, .stages = 20, .schedule = ping_pong, .band = 1, .turned = true},
                                        hopper_tuning{.rows = 128, .columns = 32, .stages = 10, .band = 1, .turned = true}>;

/// Rows of codes, and of the numbers that they stand for.
struct coded {
    coded(fm::cuda_executor& ex, fm::matrix_view<const bfloat16> from)
        : rows(from.extent(0)), width(from.extent(1)), codes(ex, rows * width), scales(ex, rows * fm::scale_blocks(width)), floats(ex, rows * width)
    {
        fm::quantize_rows(ex, from, codes.matrix(rows, width), scales.matrix(rows, fm::scale_blocks(width)));
        fm::dequantize_rows(ex, codes.matrix(rows, width), scales.matrix(rows, fm::scale_blocks(width)), floats.matrix(rows, width));
    }
    int64_t rows, width;
    fm::buffer<float8_e4m3, fm::cuda_executor> codes;
    fm::buffer<float, fm::cuda_executor> scales, floats;
};
/// The same of weights.
struct coded_weights {
    coded_weights(fm::cuda_executor& ex, const fm::weight_view<bfloat16>& w)
        : codes(ex, w.experts * w.out * w.in), scales(ex, w.experts * fm::scale_blocks(w.out) * fm::scale_blocks(w.in)), floats(ex, w.experts * w.out * w.in)
    {
        const fm::block_scaled_weights<float8_e4m3> to{fm::stacked(fm::tensor_view<float8_e4m3, 3>(codes.data(), w.experts, w.out, w.in)), scales.data()};
        fm::quantize_weights(ex, w, to);
        view = to;
        numbers = fm::stacked(fm::tensor_view<float, 3>(floats.data(), w.experts, w.out, w.in));
        fm::dequantize_weights(ex, view, numbers);
    }
    fm::buffer<float8_e4m3, fm::cuda_executor> codes;
    fm::buffer<float, fm::cuda_executor> scales, floats;
    fm::block_scaled_weights<const float8_e4m3> view;
    fm::weight_view<float> numbers;
};

template <hopper_tuning... hows, class Codes, class Numbers, class Epilogue>
void compare_codes(session& to, candidates<hows...>, comparison what, const fm::row_groups& groups, const Codes& x, const Numbers& numbers,
                   const coded_weights& w, fm::matrix_view<bfloat16> y, const Epilogue& end, fm::vector_view<bfloat16> result)
{
    auto& ex = to.executor();
    const fm::matrix_view<const float> no_bias{};
    (what.tried.push_back({hows, [&](fm::arena& memory) { codes_policy<hows>{}.forward(ex, groups, x, w.view, no_bias, y, end, memory); }}), ...);
    to.compare(std::move(what), [&](fm::arena& memory) { fm::gemm::portable{}.forward(ex, groups, numbers, w.numbers, no_bias, y, end, memory); }, result);
}

template <class Candidates>
void both_products(session& to, layer& l, const char* slot, Candidates all, bool by_bytes)
{
    auto& ex = to.executor();
    const shape& s = l.s;
    const int64_t slots = l.slots(), wide = 2 * s.hidden;
    const auto columns = fm::detail::gated_columns::of(fm::gated_layout::interleaved, s.hidden);
    const auto pre = l.pre.matrix(slots, wide), a = l.a.matrix(slots, s.hidden), y = l.y.matrix(slots, s.width);
    const auto in = l.input();
    const auto what = [&](const char* product, int64_t depth, int64_t out) {
        const double cells = static_cast<double>(depth * out);
        return comparison{slot, std::string(product) + " in codes, " + s.name(),
                          by_bytes ? cells * static_cast<double>(l.active) : 2.0 * static_cast<double>(slots) * cells, by_bytes, out};
    };
    {
        coded x(ex, l.x.matrix(s.tokens, s.width));
        const coded_weights up(ex, layer::stack(l.up, s.experts, wide, s.width));
        const fm::block_scaled_rows<fm::indexed_rows<float8_e4m3>> rows{{x.codes.matrix(x.rows, x.width), in.x.index}, x.scales.matrix(x.rows, fm::scale_blocks(x.width))};
        compare_codes(to, all, what("x up, activated", s.width, wide), in.groups, rows, fm::indexed_rows<float>{x.floats.matrix(x.rows, x.width), in.x.index}, up,
                      pre, fm::detail::activate<fm::swiglu, bfloat16>{pre, a, columns, in, false, true, {}}, l.a.view());
    }
    coded rows(ex, a);
    const coded_weights down(ex, layer::stack(l.down, s.experts, s.width, s.hidden));
    const fm::block_scaled_rows<fm::plain_rows<float8_e4m3>> codes{{rows.codes.matrix(slots, s.hidden)}, rows.scales.matrix(slots, fm::scale_blocks(s.hidden))};
    compare_codes(to, all, what("a down", s.hidden, s.width), in.groups, codes, fm::plain_rows<float>{rows.floats.matrix(slots, s.hidden)}, down, y,
                  fm::no_epilogue{}, l.y.view());
}

} // namespace

void tune_codes(session& to, layer& l)
{
    both_products(to, l, "rows of codes", codes_candidates{}, false);
}
void tune_few_codes(session& to, layer& l)
{
    both_products(to, l, "few rows of codes", few_codes_candidates{}, true);
}

} // namespace tune
