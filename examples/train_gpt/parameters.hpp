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

#include "train_gpt/copies.hpp"
#include "train_gpt/gpt_config.hpp"

namespace train_gpt {

/// The gate of every layer, as a user of the library writes one: with one choice the Switch router, whose weight is the
/// probability; with more, top-K with weights renormalized over the chosen. It forwards to whichever K asks for.
struct gpt_gate {
    int64_t experts = 1; ///< E
    int64_t k = 1;       ///< K
    double balance = 0;  ///< coefficient

    template <class Real>
    fm::top_k_state<Real> reserve(fm::arena& memory, int64_t tokens) const
    {
        return with_choice([&](const auto& gate) { return gate.template reserve<Real>(memory, tokens); });
    }
    template <class Executor, class T, class Communicator, class State>
    void route(Executor& ex, const fm::gate_input<T>& in, const Communicator& c, const State& state,
               fm::arena& scratch) const
    {
        with_choice([&](const auto& gate) { gate.route(ex, in, c, state, scratch); });
    }
    template <class Executor, class T, class Communicator, class State, class Real>
    void backward(Executor& ex, const fm::gate_input<T>& in, const Communicator& c, const State& state,
                  vector_view<const Real> dweights, Real loss_scale, matrix_view<Real> dlogits,
                  fm::arena& scratch) const
    {
        with_choice([&](const auto& gate) { gate.backward(ex, in, c, state, dweights, loss_scale, dlogits, scratch); });
    }

private:
    template <class F>
    auto with_choice(const F& f) const
    {
        if (k == 1) return f(fm::switch_gate{.experts = experts, .k = 1, .balance = {.coefficient = balance}});
        return f(fm::top_k_gate<>{.experts = experts, .k = k, .balance = {.coefficient = balance}});
    }
};

template <class Gemm>
using expert_of = fm::mlp<fm::gelu, Gemm>;

/// The MLP of every block.
/// @tparam Parallel  fm::self, or how ranks share the experts
template <class Gemm, class Parallel = fm::self>
using layer_of = fm::moe_layer<gpt_gate, expert_of<Gemm>, Parallel>;

template <class Gemm, class Parallel>
layer_of<Gemm, Parallel> make_layer(const gpt_config& c, const Parallel& parallel)
{
    return {gpt_gate{.experts = c.experts, .k = c.k, .balance = c.balance},
            expert_of<Gemm>{.width = c.width, .hidden = c.hidden}, parallel};
}

/// Which of a layer's experts a rank holds: [first, first + count), as block_placement gives them.
struct expert_range {
    int64_t first = 0, count = 0;

    template <class Gemm, class Parallel>
    static expert_range of(const layer_of<Gemm, Parallel>& layer)
    {
        if constexpr (std::is_same_v<Parallel, fm::self>) return {0, layer.gate.experts};
        else {
            const auto& p = layer.communicator;
            static_assert(std::is_same_v<std::remove_cvref_t<decltype(p.placement)>, fm::block_placement>);
            return {p.placement.expert(p.rank(), 0, layer.gate.experts, p.size()), layer.local_experts()};
        }
    }
};

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

template <class W, class Gemm, class Parallel>
gpt_tensors<W, Gemm> reserve_tensors(fm::arena& memory, const gpt_config& c, const layer_of<Gemm, Parallel>& layer)
{
    gpt_tensors<W, Gemm> t;
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
    /// Of experts' tensors: E of the whole model, and which of them these are. 0: every rank has the whole tensor.
    int64_t all_experts = 0;
    expert_range own{};

    int64_t size() const
    {
        int64_t n = 1;
        for (const int64_t extent : shape) n *= extent;
        return n;
    }
    /// Elements of the model's tensor, and where this part of it begins.
    int64_t whole_size() const { return all_experts == 0 ? size() : all_experts * each(); }
    int64_t begin() const { return all_experts == 0 ? 0 : own.first * each(); }

private:
    int64_t each() const { return shape[1] * shape[2]; }
};

/// All tensors by name, in the order of memory's first appearance in the model.
/// @param all, own  the model's experts, and those that are here
template <class W, class Gemm>
std::vector<tensor_entry<W>> entries(const gpt_tensors<W, Gemm>& t, int64_t all, expert_range own)
{
    std::vector<tensor_entry<W>> out;
    const auto matrix = [&](std::string name, matrix_view<W> m, double deviation) {
        out.push_back({std::move(name), {m.extent(0), m.extent(1)}, m.data_handle(), deviation, 0, {}});
    };
    const auto stack = [&](std::string name, fm::weight_view<W> w, double deviation) {
        out.push_back({std::move(name), {w.experts, w.out, w.in}, w.data, deviation, all, own});
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
    std::uint64_t first; ///< number of the draw for data[0]

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

template <class Real>
struct set_elements {
    using vectorized = void;
    Real* data; // (N)
    Real value;

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { data[i] = value; }
};

} // namespace detail

/// Draws all weights. An expert has its draws wherever it is.
template <class Executor, class W>
void start_tensors(Executor& ex, const std::vector<tensor_entry<W>>& all, std::uint64_t seed)
{
    fm::buffer<std::uint64_t, Executor> seed_and_step(ex, 2);
    const std::uint64_t words[] = {seed, 0};
    to_executor<Executor, std::uint64_t>(ex, words, seed_and_step.view());
    const fm::random_source source{seed_and_step.data(), fm::random_stream::weights};
    std::uint64_t first = 0;
    for (const auto& e : all) {
        const auto begin = first + static_cast<std::uint64_t>(e.begin());
        fm::for_each(ex, e.size(), detail::start_tensor<W>{e.data, e.size(), e.deviation, source, begin});
        first += static_cast<std::uint64_t>(e.whole_size());
    }
    ex.synchronize();
}

} // namespace train_gpt
