// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The oracle's experts in the memory of an executor, in any layout: the weights of an expert policy, or room for their
/// gradients. What a policy of the library or of a test is in the oracle stands here once.
#pragma once

#include <vector>

#include <fastmoe/expert/expert_tuple.hpp>
#include <fastmoe/expert/linear.hpp>
#include <fastmoe/expert/mlp.hpp>

#include "executors.hpp"
#include "poison.hpp"
#include "reference.hpp"

namespace support {

/// The oracle's name of an activation.
template <class Activation>
inline constexpr auto activation_kind = reference::activation::relu;
template <>
inline constexpr auto activation_kind<fastmoe::gelu> = reference::activation::gelu;
template <>
inline constexpr auto activation_kind<fastmoe::gelu_tanh> = reference::activation::gelu_tanh;
template <>
inline constexpr auto activation_kind<fastmoe::silu> = reference::activation::silu;
template <>
inline constexpr auto activation_kind<fastmoe::swiglu> = reference::activation::swiglu;
template <>
inline constexpr auto activation_kind<fastmoe::geglu> = reference::activation::geglu;

inline reference::weight_at where_of(fastmoe::weigh_at w)
{
    return w == fastmoe::weigh_at::output  ? reference::weight_at::output
           : w == fastmoe::weigh_at::input ? reference::weight_at::input
                                           : reference::weight_at::activation;
}

/// Experts with random weights that T can hold exactly.
template <class T>
std::vector<reference::expert> random_experts(random& r, std::int64_t count, reference::expert_kind kind,
                                              reference::activation act, std::int64_t width, std::int64_t hidden, bool biases)
{
    std::vector<reference::expert> out;
    for (std::int64_t e = 0; e < count; ++e) {
        auto expert = make_expert(kind, act, width, hidden, biases);
        const auto draw = [&](reference::numbers& v, double deviation) {
            v = widened(narrowed<T>(r.normals(static_cast<std::int64_t>(v.size()), deviation)));
        };
        draw(expert.up, 1 / std::sqrt(double(width)));
        draw(expert.down, 1 / std::sqrt(double(expert.down_columns())));
        draw(expert.up_bias, 0.5);
        draw(expert.down_bias, 0.5);
        out.push_back(expert);
    }
    return out;
}

/// How matrices lie in memory.
struct weight_layout {
    bool transposed = false, pointers = false;
    std::int64_t padding = 0; ///< poisoned elements after each line, and after each matrix
};

/// The matrices of E experts as one weight_view over memory that this owns.
template <class T, class Executor>
class weight_memory {
public:
    /// @param matrices  (out,in) of each expert, row by row
    weight_memory(Executor& ex, const std::vector<reference::numbers>& matrices, std::int64_t out, std::int64_t in,
                  const weight_layout& layout)
        : memory_(ex, 0), pointers_(ex, 0)
    {
        const auto count = static_cast<std::int64_t>(matrices.size());
        const std::int64_t lines = layout.transposed ? in : out, line = (layout.transposed ? out : in) + layout.padding;
        view_ = {nullptr, nullptr, count, out, in, lines * line + layout.padding, layout.transposed ? 1 : line,
                 layout.transposed ? line : 1};
        std::vector<T> all(count * view_.expert_stride);
        poison(fastmoe::as_vector(all));
        elements_ = std::vector<bool>(all.size());
        for (std::int64_t e = 0; e < count; ++e)
            for (std::int64_t o = 0; o < out; ++o)
                for (std::int64_t i = 0; i < in; ++i) {
                    const std::int64_t at = e * view_.expert_stride + o * view_.row_stride + i * view_.col_stride;
                    all[at] = narrow_or_poison<T>(matrices[e][o * in + i]);
                    elements_[at] = true;
                }
        memory_ = upload(ex, all);
        view_.data = memory_.data();
        if (!layout.pointers) return;
        std::vector<T*> list;
        for (std::int64_t e = 0; e < count; ++e) list.push_back(view_.base(e));
        pointers_ = upload(ex, list);
        view_.pointers = pointers_.data();
        view_.data = nullptr;
        view_.expert_stride = 0;
    }

    const fastmoe::weight_view<T>& view() const { return view_; }
    /// What (e, o, i) holds now.
    double operator()(std::int64_t e, std::int64_t o, std::int64_t i) const { return double(view_(e, o, i)); }
    /// Whether nothing was written between the matrices.
    bool gaps_kept() const
    {
        for (std::size_t at = 0; at < elements_.size(); ++at)
            if (!elements_[at] && !is_poison(memory_.data()[at])) return false;
        return true;
    }

private:
    fastmoe::buffer<T, Executor> memory_;
    fastmoe::buffer<T*, Executor> pointers_;
    fastmoe::weight_view<T> view_;
    std::vector<bool> elements_;
};

/// The weights of an expert policy in memory, filled from the oracle's; read(member) gives what the memory holds now, in
/// the oracle's order, for all experts in turn. Specialized for every policy, with a random model and the weight's place.
template <class T, class Expert, class Executor>
class expert_memory;

/// The same for what a bias and a matrix have in common.
template <class T, class Executor>
class weights_with_bias {
public:
    /// @param row  of the oracle that stands at row o of the memory
    template <class Row>
    weights_with_bias(Executor& ex, const std::vector<reference::expert>& experts, reference::numbers reference::expert::*matrix,
                      reference::numbers reference::expert::*bias, std::int64_t out, std::int64_t in, const weight_layout& layout,
                      const Row& row)
        : matrix_(ex, ordered(experts, matrix, out, in, row), out, in, layout), bias_(ex, 0)
    {
        for (std::int64_t o = 0; o < out; ++o) rows_.push_back(row(o));
        if (experts.empty() || (experts.front().*bias).empty()) return;
        reference::numbers all;
        for (const auto& e : ordered(experts, bias, out, 1, row)) all.insert(all.end(), e.begin(), e.end());
        bias_ = upload(ex, narrowed_or_poison<T>(all));
    }

    const fastmoe::weight_view<T>& view() const { return matrix_.view(); }
    fastmoe::matrix_view<T> bias_view()
    {
        return bias_.size() ? bias_.matrix(view().experts, view().out) : fastmoe::matrix_view<T>();
    }
    bool gaps_kept() const { return matrix_.gaps_kept(); }

    reference::numbers matrix() const
    {
        const auto& w = view();
        reference::numbers out(w.experts * w.out * w.in);
        for (std::int64_t e = 0; e < w.experts; ++e)
            for (std::int64_t o = 0; o < w.out; ++o)
                for (std::int64_t i = 0; i < w.in; ++i) out[(e * w.out + rows_[o]) * w.in + i] = matrix_(e, o, i);
        return out;
    }
    reference::numbers bias() const
    {
        reference::numbers out(bias_.size());
        for (std::int64_t n = 0; n < bias_.size(); ++n)
            out[n / view().out * view().out + rows_[n % view().out]] = double(bias_.data()[n]);
        return out;
    }

private:
    template <class Row>
    static std::vector<reference::numbers> ordered(const std::vector<reference::expert>& experts,
                                                   reference::numbers reference::expert::*member, std::int64_t out,
                                                   std::int64_t in, const Row& row)
    {
        std::vector<reference::numbers> all;
        for (const auto& e : experts) {
            all.emplace_back();
            for (std::int64_t o = 0; o < out; ++o)
                all.back().insert(all.back().end(), (e.*member).begin() + row(o) * in, (e.*member).begin() + (row(o) + 1) * in);
        }
        return all;
    }

    weight_memory<T, Executor> matrix_;
    fastmoe::buffer<T, Executor> bias_;
    std::vector<std::int64_t> rows_;
};

template <class T, class Activation, class Gemm, class Executor>
class expert_memory<T, fastmoe::mlp<Activation, Gemm>, Executor> {
public:
    using expert = fastmoe::mlp<Activation, Gemm>;

    static std::vector<reference::expert> draw(random& r, const expert& e, std::int64_t count)
    {
        return random_experts<T>(r, count, reference::expert_kind::mlp, activation_kind<Activation>, e.width, e.hidden, e.biases);
    }
    static reference::weight_at where(const expert& e) { return where_of(e.weigh); }

    expert_memory(Executor& ex, const expert& e, const std::vector<reference::expert>& experts, const weight_layout& layout = {})
        : up_(ex, experts, &reference::expert::up, &reference::expert::up_bias, e.up_width(), e.width, layout,
              [interleaved = Activation::gated && e.layout == fastmoe::gated_layout::interleaved, half = e.hidden](std::int64_t o) {
                  return interleaved ? o % 2 * half + o / 2 : o;
              }),
          down_(ex, experts, &reference::expert::down, &reference::expert::down_bias, e.width, e.hidden, layout,
                [](std::int64_t o) { return o; }),
          views_{up_.view(), down_.view(), up_.bias_view(), down_.bias_view()}
    {
    }

    const fastmoe::mlp_weights<T>& views() const { return views_; }
    reference::numbers read(reference::numbers reference::expert::*member) const
    {
        return member == &reference::expert::up        ? up_.matrix()
               : member == &reference::expert::down    ? down_.matrix()
               : member == &reference::expert::up_bias ? up_.bias()
                                                       : down_.bias();
    }
    bool gaps_kept() const { return up_.gaps_kept() && down_.gaps_kept(); }

private:
    weights_with_bias<T, Executor> up_, down_;
    fastmoe::mlp_weights<T> views_;
};

template <class T, class Gemm, class Executor>
class expert_memory<T, fastmoe::linear<Gemm>, Executor> {
public:
    using expert = fastmoe::linear<Gemm>;

    static std::vector<reference::expert> draw(random& r, const expert& e, std::int64_t count)
    {
        return random_experts<T>(r, count, reference::expert_kind::linear, {}, e.width, 0, e.biases);
    }
    static reference::weight_at where(const expert&) { return reference::weight_at::output; }

    expert_memory(Executor& ex, const expert& e, const std::vector<reference::expert>& experts, const weight_layout& layout = {})
        : only_(ex, experts, &reference::expert::down, &reference::expert::down_bias, e.width, e.width, layout,
                [](std::int64_t o) { return o; }),
          views_{only_.view(), only_.bias_view()}
    {
    }

    const fastmoe::linear_weights<T>& views() const { return views_; }
    reference::numbers read(reference::numbers reference::expert::*member) const
    {
        return member == &reference::expert::down        ? only_.matrix()
               : member == &reference::expert::down_bias ? only_.bias()
                                                         : reference::numbers();
    }
    bool gaps_kept() const { return only_.gaps_kept(); }

private:
    weights_with_bias<T, Executor> only_;
    fastmoe::linear_weights<T> views_;
};

template <class T, class First, class Second, class Executor>
class expert_memory<T, fastmoe::expert_pair<First, Second>, Executor> {
public:
    using expert = fastmoe::expert_pair<First, Second>;
    using first_memory = expert_memory<T, First, Executor>;
    using second_memory = expert_memory<T, Second, Executor>;

    static std::vector<reference::expert> draw(random& r, const expert& e, std::int64_t)
    {
        auto all = first_memory::draw(r, e.first.expert, e.first.count);
        const auto more = second_memory::draw(r, e.second.expert, e.second.count);
        all.insert(all.end(), more.begin(), more.end());
        return all;
    }
    static reference::weight_at where(const expert& e) { return first_memory::where(e.first.expert); }

    expert_memory(Executor& ex, const expert& e, const std::vector<reference::expert>& experts, const weight_layout& layout = {})
        : first_(ex, e.first.expert, {experts.begin(), experts.begin() + e.first.count}, layout),
          second_(ex, e.second.expert, {experts.begin() + e.first.count, experts.end()}, layout),
          views_{first_.views(), second_.views()}
    {
    }

    const typename expert::template weights<T>& views() const { return views_; }
    reference::numbers read(reference::numbers reference::expert::*member) const
    {
        auto all = first_.read(member);
        const auto more = second_.read(member);
        all.insert(all.end(), more.begin(), more.end());
        return all;
    }
    bool gaps_kept() const { return first_.gaps_kept() && second_.gaps_kept(); }

private:
    first_memory first_;
    second_memory second_;
    typename expert::template weights<T> views_;
};

/// The same experts with NaN for every number, which stands for poison in memory: gradients that must be overwritten.
inline std::vector<reference::expert> poisoned(std::vector<reference::expert> experts)
{
    for (auto& e : experts)
        for (auto* part : {&e.up, &e.up_bias, &e.down, &e.down_bias})
            for (double& v : *part) v = NAN;
    return experts;
}

/// The same experts with random numbers that G can hold: gradients that are to be added to.
template <class G>
std::vector<reference::expert> redrawn(random& r, std::vector<reference::expert> experts)
{
    for (auto& e : experts)
        for (auto* part : {&e.up, &e.up_bias, &e.down, &e.down_bias})
            *part = widened(normal_vector<G>(r, static_cast<std::int64_t>(part->size())));
    return experts;
}

} // namespace support
