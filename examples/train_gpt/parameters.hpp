// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The tensors of a GPT, laid out by an arena: the same function gives the parameters, their gradients and their copies
/// in a shorter type, and names them for the checkpoint.
#pragma once

#include <string>
#include <vector>

#include <fastmoe/exec/random.hpp>
#include <fastmoe/expert/mlp.hpp>
#include <fastmoe/layer/moe_layer.hpp>
#include <fastmoe/routing/top_k_gate.hpp>

#include "train_gpt/team_math.hpp"

namespace train_gpt {

/// Everything that decides the shapes of the model.
struct gpt_config {
    int64_t vocabulary = 256;   ///< V  bytes
    int64_t context = 128;      ///< most positions of a sequence
    int64_t width = 128;        ///< D
    int64_t layers = 4;
    int64_t heads = 4;
    int64_t experts = 8;        ///< E  1: a plain MLP
    int64_t k = 2;              ///< K
    int64_t hidden = 256;       ///< H  of one expert
    double balance = 0.01;      ///< coefficient of the balance loss

    /// The dense model that computes as much for a token: one MLP as wide as the K experts that a token meets.
    gpt_config dense() const
    {
        gpt_config c = *this;
        c.hidden = k * hidden;
        c.experts = c.k = 1;
        c.balance = 0;
        return c;
    }
    void check() const
    {
        for (const auto& [value, name] : {std::pair{vocabulary, "vocabulary"}, {context, "context"}, {width, "width"},
                                          {layers, "layers"}, {heads, "heads"}, {experts, "experts"}, {k, "k"},
                                          {hidden, "hidden"}})
            fm::expects(value >= 1, name, value, "1 or more");
        fm::expects(width % heads == 0, "width", width, "a multiple of heads = ", heads);
        fm::expects(k <= experts, "k", k, "at most experts = ", experts);
    }
};

@GATE@

/// The MLP of every block. The gate's weights are renormalized over the chosen; a single expert has weight 1.
template <class Gemm>
auto make_layer(const gpt_config& c)
{
    return fm::moe_layer{@MAKE@,
                         fm::mlp<fm::gelu, Gemm>{.width = c.width, .hidden = c.hidden}, fm::self{}};
}

template <class Gemm>
using layer_of = decltype(make_layer<Gemm>(gpt_config{}));
template <class Gemm>
using expert_of = fm::mlp<fm::gelu, Gemm>;

/// One block: x += out(attention(qkv(norm1(x)))), then x += moe(norm2(x)).
template <class W, class Gemm>
struct block_tensors {
    matrix_view<W> qkv, out;                // (3D,D), (D,D)
    fm::moe_weights<W, expert_of<Gemm>> moe;
    matrix_view<W> norm1, norm2;            // (2,D)  gain, bias
};

template <class W, class Gemm>
struct gpt_tensors {
    matrix_view<W> tokens;    // (V,D)  also the output head
    std::vector<block_tensors<W, Gemm>> blocks;
    matrix_view<W> norm;      // (2,D)
    matrix_view<W> positions; // (context,D)
    int64_t decayed = 0;      ///< elements before this one decay: all matrices but the positions
};

template <class W, class Gemm>
gpt_tensors<W, Gemm> reserve_tensors(fm::arena& memory, const gpt_config& c)
{
    gpt_tensors<W, Gemm> t;
    const auto layer = make_layer<Gemm>(c);
    t.tokens = memory.matrix<W>(c.vocabulary, c.width);
    for (int64_t i = 0; i < c.layers; ++i) {
        block_tensors<W, Gemm> b;
        b.qkv = memory.matrix<W>(3 * c.width, c.width);
        b.out = memory.matrix<W>(c.width, c.width);
        b.moe = layer.template reserve_weights<W>(memory, c.width);
        t.blocks.push_back(b);
    }
    t.decayed = memory.used() / static_cast<int64_t>(sizeof(W));
    for (auto& b : t.blocks) {
        b.norm1 = memory.matrix<W>(2, c.width);
        b.norm2 = memory.matrix<W>(2, c.width);
    }
    t.norm = memory.matrix<W>(2, c.width);
    t.positions = memory.matrix<W>(c.context, c.width);
    return t;
}

/// One named tensor and how it starts: normal with a deviation, or a norm's gain of 1 and bias of 0.
template <class W>
struct tensor_entry {
    std::string name;
    std::vector<int64_t> shape;
    W* data;
    double deviation; ///< below 0: a norm

    int64_t size() const
    {
        int64_t n = 1;
        for (const int64_t extent : shape) n *= extent;
        return n;
    }
};

/// All tensors by name, in the order of memory's first appearance in the model.
template <class W, class Gemm>
std::vector<tensor_entry<W>> entries(const gpt_tensors<W, Gemm>& t)
{
    std::vector<tensor_entry<W>> out;
    const auto matrix = [&](std::string name, matrix_view<W> m, double deviation) {
        out.push_back({std::move(name), {m.extent(0), m.extent(1)}, m.data_handle(), deviation});
    };
    const auto stack = [&](std::string name, fm::weight_view<W> w, double deviation) {
        out.push_back({std::move(name), {w.experts, w.out, w.in}, w.data, deviation});
    };
    // Branches start smaller the more of them are summed, so that the stream's size does not grow with depth.
    const double branch = 1 / std::sqrt(2.0 * double(t.blocks.size()));
    const auto fan = [](int64_t in) { return 1 / std::sqrt(double(in)); };
    matrix("tokens", t.tokens, 0.02);
    matrix("positions", t.positions, 0.02);
    for (std::size_t i = 0; i < t.blocks.size(); ++i) {
        const auto& b = t.blocks[i];
        const std::string at = "layers." + std::to_string(i) + ".";
        matrix(at + "norm1", b.norm1, -1);
        matrix(at + "attention.qkv", b.qkv, fan(b.qkv.extent(1)));
        matrix(at + "attention.out", b.out, branch * fan(b.out.extent(1)));
        matrix(at + "norm2", b.norm2, -1);
        matrix(at + "moe.gate", b.moe.gate, 0.02);
        stack(at + "moe.up", b.moe.expert.up, fan(b.moe.expert.up.in));
        stack(at + "moe.down", b.moe.expert.down, branch * fan(b.moe.expert.down.in));
    }
    matrix("norm", t.norm, -1);
    return out;
}

namespace detail {

template <class W>
struct start_tensor {
    W* data; // (N)
    int64_t size;
    double deviation;
    fm::random_source source;
    std::uint64_t first;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        if (deviation < 0) data[i] = W(2 * i < size ? 1.0f : 0.0f);
        else data[i] = W(W(deviation) * source.template normal<W>(first + static_cast<std::uint64_t>(i)));
    }
};

template <class T, class Real>
struct round_elements {
    using vectorized = void;
    const Real* from; // (N)
    T* to;            // (N)

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { to[i] = T(from[i]); }
};

struct copy_counts {
    const int32_t* from; // (E)
    int32_t* to;         // (E)

    FASTMOE_HOST_DEVICE void operator()(int64_t e) const { to[e] = from[e]; }
};

template <class Real>
struct set_elements {
    using vectorized = void;
    Real* data; // (N)
    Real value;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { data[i] = value; }
};

} // namespace detail

} // namespace train_gpt
