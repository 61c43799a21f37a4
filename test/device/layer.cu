// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Every functor of a layer, forward, backward and inference, compiled for a device by calling the layer on cuda_executor.
/// Nothing here is run. A new gate or expert is a line below.
#include <fastmoe/cuda.cuh>

namespace {

namespace fm = fastmoe;

/// All three calls of a layer.
template <class T, class Layer>
void instantiate(const Layer& layer)
{
    fm::arena measure;
    const fm::matrix_view<T> x(nullptr, 0, 64);
    const auto w = layer.template reserve_weights<T>(measure, 64);
    fm::cuda_executor ex;
    auto saved = layer.forward(ex, x, w, x);
    layer.backward(ex, saved, x, w, x, w);
    layer.infer(ex, x, w, x);
}

/// A layer of each dtype: gated experts with biases, capacity, and both losses.
template <class T>
void dtype()
{
    const fm::moe_layer layer{
        fm::top_k_gate<fm::softmax_score>{.experts = 8, .k = 2, .capacity = {.factor = 1.25},
                                          .balance = {.coefficient = 0.01}, .z = {.coefficient = 0.001}},
        fm::mlp<fm::swiglu>{.width = 64, .hidden = 128, .biases = true}, fm::self{}};
    instantiate<T>(layer);
}

/// Gates before an expert that leaves the weights to combine.
template <class Gate>
void gate(const Gate& g)
{
    instantiate<float>(fm::moe_layer{g, fm::linear<>{.width = 64}, fm::self{}});
}

template <class Activation>
void activation()
{
    const fm::switch_gate g{.experts = 8};
    instantiate<float>(fm::moe_layer{g, fm::mlp<Activation>{.width = 64, .hidden = 128}, fm::self{}});
}

} // namespace

void instantiate_dtypes()
{
    dtype<double>();
    dtype<float>();
    dtype<fm::bfloat16>();
    dtype<fm::half>();
}

void instantiate_gates()
{
    gate(fm::top_k_gate<fm::sigmoid_score, fm::group_limited>{.experts = 8, .k = 2});
    gate(fm::top_k_gate<fm::sqrt_softplus_score>{.experts = 8, .k = 2});
    gate(fm::top_k_gate<fm::biased_softmax_score>{.experts = 8, .k = 2});
    gate(fm::noisy_gate{.experts = 8, .k = 2, .importance = {0.1}, .load = {0.1}});
    gate(fm::cosine_gate<>{.experts = 8, .k = 2, .projection_width = 16});
    gate(fm::cosine_gate<fm::group_limited, fm::raw_scores>{.experts = 8, .k = 2, .projection_width = 16,
                                                            .bias = fm::projection_bias::learned});
    gate(fm::sparse_mixer_gate{.experts = 8, .k = 2, .pick = fm::mixer_pick::sampled});
    gate(fm::gshard_gate<>{.experts = 8});
    gate(fm::gshard_gate<fm::raw_scores>{.experts = 8});
    gate(fm::hash_gate{.experts = 8});
    gate(fm::random_gate{.experts = 8, .k = 2});
    gate(fm::expert_choice_gate{.experts = 8, .k = 2});
    gate(fm::sinkhorn_gate{.experts = 8});
    gate(fm::base_gate{.experts = 8});
    gate(fm::token_rounding_gate{.experts = 8, .k = 2});
    gate(fm::swipe_gate{.experts = 8, .k = 2});
    gate(fm::topology_gate{.experts = 8, .k = 2});
}

/// What balances experts without a loss, and what reports their load.
void instantiate_balance()
{
    fm::cuda_executor ex;
    fm::arena memory;
    const fm::matrix_view<float> logits(nullptr, 0, 8);
    const fm::gate_logits<float> in{logits, {}};
    const fm::vector_view<float> bias(nullptr, 8);
    const fm::vector_view<fm::int64_t> counts(nullptr, 8);
    const fm::vector_view<const fm::int32_t> chosen(nullptr, 0);
    fm::count_choices(ex, chosen, counts, fm::write_mode::overwrite, memory);
    fm::update_bias(ex, {}, counts, bias);
    fm::balance_by_quantile(ex, fm::sigmoid_score{}, in, 2, fm::self{}, bias, memory);
    const fm::matrix_view<fm::int64_t> histogram(nullptr, 8, 1000);
    fm::count_quantiles(ex, fm::sigmoid_score{}, in, 2, bias, histogram, memory);
    fm::balance_by_histogram(ex, 2, fm::self{}, histogram, bias, memory);
    fm::measure_load(ex, chosen, chosen, 8, fm::self{}, fm::vector_view<fm::load_report>(nullptr, 1), memory);
}

void instantiate_activations()
{
    activation<fm::relu>();
    activation<fm::gelu>();
    activation<fm::gelu_tanh>();
    activation<fm::silu>();
    activation<fm::geglu>();
    activation<fm::clamped_swiglu>();
}

/// Experts beside the layer.
template <class Shared, class Weights>
void shared_expert(const Shared& shared, const Weights& w, fm::arena& memory)
{
    const fm::matrix_view<float> x(nullptr, 0, 64);
    fm::cuda_executor ex;
    const auto kept = shared.forward(ex, x, w, x, memory);
    shared.backward(ex, kept, x, w, x, w, fm::write_mode::overwrite, memory);
    shared.infer(ex, x, w, x, memory);
}

void instantiate_shared_experts()
{
    const fm::mlp<fm::swiglu> expert{.width = 64, .hidden = 128};
    fm::arena memory;
    const auto w = expert.reserve_weights<float>(memory, 1);
    shared_expert(fm::shared_expert{expert}, w, memory);
    shared_expert(fm::gated_shared_expert{expert}, fm::gated_shared_weights<float, fm::mlp<fm::swiglu>>{{}, w}, memory);
}
