// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A GPT whose MLPs are this library's mixture of experts: parameters in one buffer, activations in an arena that is
/// sized once by running the same code on an arena without storage.
#pragma once

#include <optional>

#include "train_gpt/attention.hpp"
#include "train_gpt/copies.hpp"
#include "train_gpt/cross_entropy.hpp"
#include "train_gpt/embedding.hpp"
#include "train_gpt/gate_report.hpp"
#include "train_gpt/layer_norm.hpp"
#include "train_gpt/linear.hpp"
#include "train_gpt/parameters.hpp"

namespace train_gpt {

/// What a pass of the model is for: whether the MoE layers keep what their backward needs.
enum class pass : std::uint8_t { inference, training };

/// @tparam T     type of weights and activations; the residual stream, gradients and the optimizer's copy are in
///               accumulate_t<T>
/// @tparam Gemm  the library's policy for all products
/// @tparam Parallel  fm::self, or how ranks share the experts: then each rank has a share of a batch's sequences, perhaps
///                   none, and holds its own experts; all ranks call the same functions in the same order
template <class T, class Executor, class Gemm, class Parallel = fm::self>
class gpt {
public:
    using real = accumulate_t<T>;
    using layer_type = layer_of<Gemm, Parallel>;
    using expert_type = expert_of<Gemm>;
    using moe_saved = fm::moe_saved<T, decltype(layer_type::gate), expert_type, Executor, Parallel>;

    /// The executor must outlive the model.
    gpt(Executor& ex, const gpt_config& config, std::uint64_t seed)
        requires std::is_same_v<Parallel, fm::self>
        : gpt(ex, config, seed, fm::self{})
    {
    }
    /// The weights that the seed gives to the experts which this rank holds; those of the others are elsewhere.
    gpt(Executor& ex, const gpt_config& config, std::uint64_t seed, const Parallel& parallel)
        : ex_(&ex),
          config_((config.check(), config)),
          layer_(make_layer<Gemm>(config, parallel)),
          own_(expert_range::of<Gemm, Parallel>(layer_))
    {
        fm::arena measure;
        reserve_tensors<real, Gemm, Parallel>(measure, config_, layer_);
        master_storage_ = storage(measure.bytes());
        gradient_storage_ = storage(measure.bytes());
        master_ = place<real>(master_storage_);
        gradient_ = place<real>(gradient_storage_);
        if constexpr (!std::is_same_v<T, real>) {
            fm::arena rounded;
            reserve_tensors<T, Gemm, Parallel>(rounded, config_, layer_);
            rounded_storage_ = storage(rounded.bytes());
            rounded_ = place<T>(rounded_storage_);
        }
        // Blocks of an arena end on a boundary: what lies between them stays zero.
        for (const auto& flat : {parameters(), gradients()})
            fm::for_each(ex, flat.extent(0), detail::set_elements<real>{flat.data_handle(), real(0)});
        start_tensors(ex, named(master_), seed);
        parameters_changed();
    }

    const gpt_config& config() const noexcept { return config_; }
    /// The optimizer's copy of all parameters, and their gradients, each as one vector.              // (N)
    vector_view<real> parameters() noexcept { return flat(master_storage_); }
    vector_view<real> gradients() noexcept { return flat(gradient_storage_); }
    const gpt_tensors<real, Gemm>& tensors() const noexcept { return master_; }
    /// What tensors() has, by name, and the gradients in the same order.
    std::vector<tensor_entry<real>> named_tensors() const { return named(master_); }
    std::vector<tensor_entry<real>> named_gradients() const { return named(gradient_); }
    int64_t decayed() const noexcept { return master_.decayed; }

    /// Of the whole model, whoever holds them.
    int64_t total_params() const
    {
        int64_t n = 0;
        for (const auto& e : named(master_)) n += e.whole_size();
        return n;
    }
    /// Those that take part in the computation of one token.
    int64_t active_params() const
    {
        return total_params() - config_.layers * (config_.experts - config_.k) * 2 * config_.width * config_.hidden;
    }

    /// To be called after the parameters have changed: refreshes the weights that the products read.
    void parameters_changed()
    {
        if constexpr (!std::is_same_v<T, real>) {
            const auto from = named(master_);
            const auto to = named(rounded_);
            for (std::size_t i = 0; i < from.size(); ++i)
                fm::for_each(*ex_, from[i].size(), detail::round_elements<T, real>{from[i].data, to[i].data});
        }
    }

    /// Bytes of workspace for gradient() and loss() of this many sequences, if no rank has more.
    int64_t training_bytes(int64_t batch, int64_t length) const
    {
        fm::arena measure;
        const vector_view<const int32_t> ids(nullptr, batch * length);
        auto kept = forward(shape(batch, length), ids, pass::training, measure);
        const auto dlogits = head_loss<true>(kept, ids, {}, measure);
        backward(kept, ids, dlogits, measure);
        return measure.bytes();
    }
    /// Bytes of workspace for logits() of this many sequences, if no rank has more.
    int64_t inference_bytes(int64_t batch, int64_t length) const
    {
        fm::arena measure;
        forward(shape(batch, length), vector_view<const int32_t>(nullptr, batch * length), pass::inference, measure);
        return measure.bytes();
    }

    /// The mean loss of a batch and its gradient with respect to all parameters, that of the balance losses included. Over
    /// ranks: this rank's part of the cross entropy and of the gradient, to be summed, and the gates' losses in whole.
    /// @param ids      sequences of `length` tokens                                     // (T)
    /// @param targets  the token after each                                             // (T)
    /// @param loss     overwritten: the cross entropy in nats; the sum of the gates' own losses  // (2)
    /// @param counts   overwritten with the choices that each expert here got, unless without memory // (layers,E)
    /// @param mean_over  tokens of the joined batch; 0: there are no others
    void gradient(vector_view<const int32_t> ids, vector_view<const int32_t> targets, int64_t length,
                  vector_view<real> loss, matrix_view<int32_t> counts, fm::arena memory, int64_t mean_over = 0)
    {
        memory.require(training_bytes(ids.extent(0) / length, length));
        auto kept = forward(shape(ids.extent(0) / length, length), ids, pass::training, memory);
        const auto dlogits = head_loss<true>(kept, targets, loss, memory, mean_over);
        report_gates(kept, loss, counts);
        backward(kept, ids, dlogits, memory);
    }
    /// The loss alone; counts as above.
    void loss(vector_view<const int32_t> ids, vector_view<const int32_t> targets, int64_t length,
              vector_view<real> loss, matrix_view<int32_t> counts, fm::arena memory, int64_t mean_over = 0)
    {
        auto kept = forward(shape(ids.extent(0) / length, length), ids, pass::training, memory);
        head_loss<false>(kept, targets, loss, memory, mean_over);
        report_gates(kept, loss, counts);
    }
    /// Logits of the next token after each position; they stay in the workspace.                     // (T,V)
    matrix_view<const real> logits(vector_view<const int32_t> ids, int64_t length, fm::arena memory)
    {
        return forward(shape(ids.extent(0) / length, length), ids, pass::inference, memory).logits;
    }

private:
    /// What a block keeps for its backward.
    struct block_kept {
        matrix_view<real> x_attention, x_mlp; // (T,D)  the residual stream before each half
        norm_saved<real> norm1, norm2;
        matrix_view<T> h1, qkv, y, h2;        // (T,D), (T,3D), (T,D), (T,D)
        attention_saved<real> attention;
        std::optional<moe_saved> moe;
    };
    struct kept_pass {
        attention_shape shape;
        fm::row_groups all;
        std::vector<block_kept> blocks;
        matrix_view<real> x;      // (T,D)
        norm_saved<real> norm;
        matrix_view<T> h;         // (T,D)
        matrix_view<real> logits; // (T,V)
    };

    attention_shape shape(int64_t batch, int64_t length) const
    {
        fm::expects(length >= 1 && length <= config_.context, "length", length, "1 to context = ", config_.context);
        return {batch, length, config_.heads, config_.width / config_.heads};
    }

    /// From ids to logits. On a measuring arena it only counts.
    kept_pass forward(attention_shape s, vector_view<const int32_t> ids, pass what, fm::arena& memory) const
    {
        const int64_t tokens = s.tokens(), width = config_.width;
        const bool live = !memory.measuring();
        kept_pass p;
        p.shape = s;
        p.all = one_group(*ex_, tokens, memory);
        auto x = memory.matrix<real>(tokens, width);
        if (live) embed<real>(*ex_, ids, s.length, master_.tokens, master_.positions, x);
        matrix_view<T> branch;
        for (std::size_t i = 0; i < master_.blocks.size(); ++i) {
            p.blocks.push_back(attend(i, p, x, branch, memory));
            auto& b = p.blocks.back();
            branch = memory.matrix<T>(tokens, width);
            mix(i, b, what, branch, memory);
            x = b.x_mlp;
        }
        p.x = memory.matrix<real>(tokens, width);
        p.norm = reserve_norm<real>(memory, tokens);
        p.h = memory.matrix<T>(tokens, width);
        p.logits = memory.matrix<real>(tokens, config_.vocabulary);
        if (live) add_norm<T>(*ex_, x, branch, master_.norm, p.x, p.h, p.norm);
        linear<T>(*ex_, gemm_, p.all, p.h, weights().tokens, p.logits, memory);
        return p;
    }

    /// The attention half of block i on x + branch, up to and with the second norm.
    block_kept attend(std::size_t i, const kept_pass& p, matrix_view<real> x, matrix_view<T> branch,
                      fm::arena& memory) const
    {
        const int64_t tokens = p.shape.tokens(), width = config_.width;
        const bool live = !memory.measuring();
        block_kept b;
        b.x_attention = i == 0 ? x : memory.matrix<real>(tokens, width); // nothing is added before the first block
        b.x_mlp = memory.matrix<real>(tokens, width);
        b.norm1 = reserve_norm<real>(memory, tokens);
        b.norm2 = reserve_norm<real>(memory, tokens);
        b.h1 = memory.matrix<T>(tokens, width);
        b.qkv = memory.matrix<T>(tokens, 3 * width);
        b.y = memory.matrix<T>(tokens, width);
        b.h2 = memory.matrix<T>(tokens, width);
        b.attention = reserve_attention<real>(memory, p.shape);
        const int64_t mark = memory.used();
        const auto out = memory.matrix<T>(tokens, width);
        const auto &norms = master_.blocks[i];
        const auto &w = weights().blocks[i];
        if (live) add_norm<T>(*ex_, x, branch, norms.norm1, b.x_attention, b.h1, b.norm1);
        linear<T>(*ex_, gemm_, p.all, b.h1, w.qkv, b.qkv, memory);
        if (live) attention<T>(*ex_, p.shape, b.qkv, b.y, b.attention);
        linear<T>(*ex_, gemm_, p.all, b.y, w.out, out, memory);
        if (live) add_norm<T>(*ex_, b.x_attention, out, norms.norm2, b.x_mlp, b.h2, b.norm2);
        memory.rewind(mark);
        return b;
    }

    /// y = moe(h2): the layer of this library.
    void mix(std::size_t i, block_kept& b, pass what, matrix_view<T> y, fm::arena& memory) const
    {
        const int64_t tokens = y.extent(0), width = y.extent(1), mark = memory.used();
        const auto& w = weights().blocks[i].moe;
        if (memory.measuring()) {
            memory.vector<std::byte>(what == pass::training ? layer_.template forward_bytes<T>(*ex_, tokens, width)
                                                            : layer_.template infer_bytes<T>(*ex_, tokens, width));
            memory.rewind(mark);
            if (what == pass::training) memory.vector<std::byte>(layer_.template saved_bytes<T>(tokens, width));
        } else if (what == pass::training) {
            b.moe.emplace(layer_.forward(*ex_, b.h2, w, y, memory));
        } else {
            layer_.infer(*ex_, b.h2, w, y, memory);
        }
    }

    template <bool WithGradient>
    matrix_view<T> head_loss(const kept_pass& p, vector_view<const int32_t> targets, vector_view<real> loss,
                             fm::arena& memory, int64_t mean_over = 0) const
    {
        matrix_view<T> dlogits;
        if (WithGradient) dlogits = memory.matrix<T>(p.logits.extent(0), p.logits.extent(1));
        const auto losses = memory.vector<real>(p.logits.extent(0));
        if (!memory.measuring())
            cross_entropy<T>(*ex_, p.logits, targets, losses, fm::slice(loss, 0, 1), dlogits, mean_over);
        return dlogits;
    }

    /// From dlogits to the gradients of all parameters. On a measuring arena it only counts.
    void backward(kept_pass& p, vector_view<const int32_t> ids, matrix_view<T> dlogits, fm::arena& memory) const
    {
        const int64_t tokens = p.shape.tokens(), width = config_.width;
        const bool live = !memory.measuring();
        const auto dx = memory.matrix<real>(tokens, width);
        matrix_view<T> rounded; // dx as the products read it
        if constexpr (std::is_same_v<T, real>) rounded = dx;
        else rounded = memory.matrix<T>(tokens, width);
        const auto dh = memory.matrix<T>(tokens, width);
        if (live) fm::for_each(*ex_, tokens * width, detail::set_elements<real>{dx.data_handle(), real(0)});
        linear_backward<T>(*ex_, gemm_, p.all, p.h, weights().tokens, dlogits, dh, gradient_.tokens, memory);
        norm_backward<T>(*ex_, p.x, p.norm, master_.norm, dh, dx, rounded, gradient_.norm, memory);
        for (std::size_t i = p.blocks.size(); i-- > 0;) {
            mix_backward(i, p.blocks[i], rounded, dh, memory);
            norm_backward<T>(*ex_, p.blocks[i].x_mlp, p.blocks[i].norm2, master_.blocks[i].norm2, dh, dx, rounded,
                             gradient_.blocks[i].norm2, memory);
            attend_backward(i, p, rounded, dh, memory);
            norm_backward<T>(*ex_, p.blocks[i].x_attention, p.blocks[i].norm1, master_.blocks[i].norm1, dh, dx, rounded,
                             gradient_.blocks[i].norm1, memory);
        }
        embed_backward<real>(*ex_, ids, p.shape.length, dx, gradient_.tokens, gradient_.positions, memory);
    }

    void mix_backward(std::size_t i, const block_kept& b, matrix_view<T> dy, matrix_view<T> dh, fm::arena& memory) const
    {
        const int64_t mark = memory.used();
        if (memory.measuring())
            memory.vector<std::byte>(layer_.template backward_bytes<T, real>(*ex_, dy.extent(0), dy.extent(1)));
        else layer_.backward(*ex_, *b.moe, dy, weights().blocks[i].moe, dh, gradient_.blocks[i].moe, memory);
        memory.rewind(mark);
    }

    void attend_backward(std::size_t i, const kept_pass& p, matrix_view<T> dout, matrix_view<T> dh,
                         fm::arena& memory) const
    {
        const int64_t tokens = dout.extent(0), width = dout.extent(1), mark = memory.used();
        const auto& b = p.blocks[i];
        const auto& w = weights().blocks[i];
        const auto dy = memory.matrix<T>(tokens, width);
        const auto dqkv = memory.matrix<T>(tokens, 3 * width);
        linear_backward<T>(*ex_, gemm_, p.all, b.y, w.out, dout, dy, gradient_.blocks[i].out, memory);
        attention_backward<T>(*ex_, p.shape, b.qkv, b.y, dy, b.attention, dqkv, memory);
        linear_backward<T>(*ex_, gemm_, p.all, b.h1, w.qkv, dqkv, dh, gradient_.blocks[i].qkv, memory);
        memory.rewind(mark);
    }

    /// What the gates chose and lost.
    void report_gates(const kept_pass& p, vector_view<real> loss, matrix_view<int32_t> counts) const
    {
        fm::expects_shape(loss, "loss (2)", 2);
        if (counts.data_handle()) fm::expects_shape(counts, "counts (layers,E)", config_.layers, config_.experts);
        clear_report(*ex_, fm::slice(loss, 1, 1), counts);
        for (std::size_t i = 0; i < p.blocks.size(); ++i)
            add_report(*ex_, layer_, *p.blocks[i].moe, fm::slice(loss, 1, 1),
                       counts.data_handle() ? fm::row(counts, static_cast<int64_t>(i)) : vector_view<int32_t>{}, own_);
    }

    auto named(const auto& tensors) const { return entries(tensors, config_.experts, own_); }

    /// The weights that the products read.
    const auto& weights() const noexcept
    {
        if constexpr (std::is_same_v<T, real>) return master_;
        else return rounded_;
    }

    using bytes = fm::buffer<std::byte, Executor>;
    bytes storage(int64_t size) { return bytes(*ex_, size); }
    template <class W>
    gpt_tensors<W, Gemm> place(bytes& memory) const
    {
        fm::arena a(memory.view());
        return reserve_tensors<W, Gemm, Parallel>(a, config_, layer_);
    }
    static vector_view<real> flat(bytes& memory) noexcept
    {
        return vector_view<real>(reinterpret_cast<real*>(memory.data()), memory.size() / int64_t{sizeof(real)});
    }

    Executor* ex_;
    gpt_config config_;
    layer_type layer_;
    expert_range own_; // of each layer's experts
    Gemm gemm_{};
    bytes master_storage_, gradient_storage_, rounded_storage_;
    gpt_tensors<real, Gemm> master_, gradient_;
    gpt_tensors<T, Gemm> rounded_;
};

} // namespace train_gpt
