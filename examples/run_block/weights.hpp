// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Tensors of a file, of whatever float type and layout, become the library's weights of one type: gate rows first, (out,
/// in).
#pragma once

#include <string>
#include <utility>
#include <vector>

#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/expert/layout.hpp>

#include "run_block/description.hpp"
#include "run_block/tensor_file.hpp"

namespace run_block {

/// An owned matrix.                                                               // (rows,cols)
template <class T>
class matrix {
public:
    matrix() = default;
    matrix(fm::host_executor& ex, int64_t rows, int64_t cols) : memory_(ex, rows * cols), rows_(rows), cols_(cols) {}
    fm::matrix_view<T> view() { return memory_.matrix(rows_, cols_); }

private:
    fm::buffer<T, fm::host_executor> memory_;
    int64_t rows_ = 0, cols_ = 0;
};

/// Weights of an mlp in memory of their own.
template <class T>
struct expert_weights {
    matrix<T> up, down, up_bias, down_bias;
    fm::mlp_weights<T> views;

    expert_weights() = default;
    expert_weights(fm::host_executor& ex, int64_t experts, int64_t width, int64_t hidden, bool biases)
        : up(ex, experts * 2 * hidden, width), down(ex, experts * width, hidden)
    {
        const auto stack = [&](matrix<T>& m, int64_t out, int64_t in) {
            return fm::stacked(fm::tensor_view<T, 3>(m.view().data_handle(), experts, out, in));
        };
        views = {stack(up, 2 * hidden, width), stack(down, width, hidden), {}, {}};
        if (!biases) return;
        up_bias = matrix<T>(ex, experts, 2 * hidden);
        down_bias = matrix<T>(ex, experts, width);
        views.up_bias = up_bias.view();
        views.down_bias = down_bias.view();
    }
};

/// Where a matrix or E of them stand in a tensor: element (e, o, i) is at e * expert + o * row + i * col.
struct strides {
    int64_t expert, row, col;
};

namespace detail {

template <class T>
fm::weight_view<T> part(T* data, int64_t experts, int64_t out, int64_t in, const strides& s)
{
    return {data, nullptr, experts, out, in, s.expert, s.row, s.col};
}

/// f(pointer to the elements).
template <class F>
void with_elements(const fm::io::safetensor& t, const F& f)
{
    using enum fm::io::element_type;
    if (t.type == f32) f(reinterpret_cast<const float*>(t.data));
    else if (t.type == bf16) f(reinterpret_cast<const fm::bfloat16*>(t.data));
    else f(reinterpret_cast<const fm::half*>(t.data));
}

} // namespace detail

/// Copies a tensor to a place, converted.
template <class T>
void load(fm::host_executor& ex, const fm::io::safetensor& from, const strides& at, const fm::weight_view<T>& to)
{
    detail::with_elements(from, [&](const auto* data) {
        fm::copy_weights(ex, detail::part(data, to.experts, to.out, to.in, at), to);
    });
}

/// The same, where gate and up rows stand in turns and shall not.
template <class T>
void load_in_turns(fm::host_executor& ex, const fm::io::safetensor& from, const strides& at, const fm::weight_view<T>& to)
{
    detail::with_elements(from, [&](const auto* data) {
        fm::copy_gated_weights(ex, detail::part(data, to.experts, to.out, to.in, at), fm::gated_layout::interleaved, to,
                               fm::gated_layout::concatenated);
    });
}

template <class T>
void load(fm::host_executor& ex, const fm::io::safetensor& from, fm::matrix_view<T> to)
{
    const int64_t cols = to.extent(1);
    load(ex, from, {to.size() ? to.extent(0) * cols : 0, cols, 1}, fm::single(to));
}

/// Gate or up rows of experts [first, first + count) in a stack of both.
template <class T>
fm::weight_view<T> half_of(const fm::weight_view<T>& up, bool second, int64_t first, int64_t count)
{
    auto out = up;
    out.out = up.out / 2;
    out.experts = count;
    out.data = up.data + first * up.expert_stride + (second ? out.out * up.row_stride : 0);
    return out;
}

/// The matrices of one expert, each a tensor of its own.
struct expert_tensors {
    const fm::io::safetensor &gate, &up, &down;

    /// @param prefix    of the names, with its dot
    /// @param numbered  w1, w3, w2: as Mixtral's and Phi's checkpoints have it
    static expert_tensors take(tensor_file& file, const std::string& prefix, bool numbered, int64_t width, int64_t hidden)
    {
        return {file.take(prefix + (numbered ? "w1.weight" : "gate_proj.weight"), {hidden, width}),
                file.take(prefix + (numbered ? "w3.weight" : "up_proj.weight"), {hidden, width}),
                file.take(prefix + (numbered ? "w2.weight" : "down_proj.weight"), {width, hidden})};
    }

    template <class T>
    void load_to(fm::host_executor& ex, const fm::mlp_weights<T>& to, int64_t e) const
    {
        const int64_t width = to.up.in, hidden = to.down.in;
        load(ex, gate, {0, width, 1}, half_of(to.up, false, e, 1));
        load(ex, up, {0, width, 1}, half_of(to.up, true, e, 1));
        auto matrix = to.down;
        matrix.experts = 1;
        matrix.data += e * to.down.expert_stride;
        load(ex, down, {0, hidden, 1}, matrix);
    }
};

/// Whether the file holds experts one by one: a name that begins with "experts." and a digit.
inline bool one_by_one(const tensor_file& file)
{
    return file.any([](const std::string& name) {
        return name.starts_with("experts.") && name.size() > 8 && name[8] >= '0' && name[8] <= '9';
    });
}

/// All routed experts. Every shape is known to be right before memory is taken.
template <class T>
expert_weights<T> load_experts(fm::host_executor& ex, tensor_file& file, const description& d)
{
    const int64_t count = d.numbers.experts, width = d.numbers.width, hidden = d.numbers.hidden;
    expert_weights<T> w;
    if ((d.stacking == stacking::out_in || d.stacking == stacking::in_out) && one_by_one(file)) {
        const bool other = file.any([](const std::string& name) { return name.ends_with(".gate_proj.weight") && name.starts_with("experts."); });
        const bool numbers = file.any([](const std::string& name) { return name.ends_with(".w1.weight"); });
        std::vector<expert_tensors> all;
        for (int64_t e = 0; e < count; ++e)
            all.push_back(expert_tensors::take(file, "experts." + std::to_string(e) + ".",
                                               numbers || (d.numbered && !other), width, hidden));
        w = expert_weights<T>(ex, count, width, hidden, false);
        for (int64_t e = 0; e < count; ++e) all[static_cast<std::size_t>(e)].load_to(ex, w.views, e);
        return w;
    }
    switch (d.stacking) {
    case stacking::out_in: {
        const auto &up = file.take(d.gate_up, {count, 2 * hidden, width}), &down = file.take(d.down, {count, width, hidden});
        w = expert_weights<T>(ex, count, width, hidden, false);
        load(ex, up, {2 * hidden * width, width, 1}, w.views.up);
        load(ex, down, {width * hidden, hidden, 1}, w.views.down);
        break;
    }
    case stacking::in_out: {
        const auto &up = file.take(d.gate_up, {count, width, 2 * hidden}), &down = file.take(d.down, {count, hidden, width});
        w = expert_weights<T>(ex, count, width, hidden, false);
        load(ex, up, {2 * hidden * width, 1, 2 * hidden}, w.views.up);
        load(ex, down, {width * hidden, 1, width}, w.views.down);
        break;
    }
    case stacking::in_out_in_turns: {
        const auto &up = file.take(d.gate_up, {count, width, 2 * hidden}), &down = file.take(d.down, {count, hidden, width});
        const auto &up_bias = file.take("experts.gate_up_proj_bias", {count, 2 * hidden}),
                   &down_bias = file.take("experts.down_proj_bias", {count, width});
        w = expert_weights<T>(ex, count, width, hidden, true);
        load_in_turns(ex, up, {2 * hidden * width, 1, 2 * hidden}, w.views.up);
        load_in_turns(ex, up_bias, {2 * hidden, 1, 1},
                      detail::part(w.views.up_bias.data_handle(), count, 2 * hidden, 1, {2 * hidden, 1, 1}));
        load(ex, down, {width * hidden, 1, width}, w.views.down);
        load(ex, down_bias, w.views.down_bias);
        break;
    }
    case stacking::flat: {
        const shape flat{count * hidden, width};
        const auto &gate = file.take("experts.mlp.w1", flat), &up = file.take("experts.mlp.v1", flat),
                   &down = file.take("experts.mlp.w2", flat);
        w = expert_weights<T>(ex, count, width, hidden, false);
        load(ex, gate, {hidden * width, width, 1}, half_of(w.views.up, false, 0, count));
        load(ex, up, {hidden * width, width, 1}, half_of(w.views.up, true, 0, count));
        load(ex, down, {hidden * width, 1, width}, w.views.down);
        break;
    }
    }
    return w;
}

/// The shared experts, which checkpoints hold as one.
template <class T>
expert_weights<T> load_shared(fm::host_executor& ex, tensor_file& file, const description& d)
{
    const int64_t width = d.numbers.width, hidden = d.numbers.shared_hidden;
    if (d.sharing == sharing::none) return {};
    const auto matrices = expert_tensors::take(file, d.shared + ".", false, width, hidden);
    expert_weights<T> w(ex, 1, width, hidden, d.shared_biases);
    matrices.load_to(ex, w.views, 0);
    if (!d.shared_biases) return w;
    T* up = w.views.up_bias.data_handle();
    load(ex, file.take(d.shared + ".gate_proj.bias", {hidden}), fm::matrix_view<T>(up, 1, hidden));
    load(ex, file.take(d.shared + ".up_proj.bias", {hidden}), fm::matrix_view<T>(up + hidden, 1, hidden));
    load(ex, file.take(d.shared + ".down_proj.bias", {width}), w.views.down_bias);
    return w;
}

} // namespace run_block
