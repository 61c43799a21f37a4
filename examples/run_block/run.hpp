// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The block itself, for one type: the library's primitives in a row, with the model's gate and experts.
#pragma once

#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(RUN_BLOCK_ONEDNN)
#include <fastmoe/gemm/onednn.hpp>
#else
#include <fastmoe/gemm/portable.hpp>
#endif

#include <fastmoe/routing/plan.hpp>
#include <fastmoe/routing/project.hpp>
#include <fastmoe/transfer/combine.hpp>

#include "run_block/models.hpp"
#include "run_block/program.hpp"
#include "run_block/weights.hpp"

namespace run_block {

#if defined(RUN_BLOCK_ONEDNN)
using products = fm::gemm::onednn;
#else
using products = fm::gemm::portable;
#endif

/// All parameters of a block.
template <class T>
struct block_weights {
    matrix<float> router, router_bias, correction; // (E,D), (1,E), (1,E)
    matrix<T> shared_gate;                         // (1,D)
    expert_weights<T> experts, shared;

    /// @throws format_error that names a tensor which is missing, not as it must be, or one too many
    block_weights(fm::host_executor& ex, const std::string& path, const description& d)
    {
        tensor_file file(path, d.text());
        const int64_t count = d.numbers.experts, width = d.numbers.width;
        const auto one = [&](auto& to, const names& called, const shape& extents, int64_t rows, int64_t cols) {
            const auto& t = file.take(called, extents);
            to = {ex, rows, cols};
            load(ex, t, to.view());
        };
        one(router, d.router, {count, width}, count, width);
        if (!d.router_bias.empty()) one(router_bias, {d.router_bias}, {count}, 1, count);
        if (!d.correction_bias.empty())
            one(correction, d.correction_bias, d.correction_in_row ? shape{1, count} : shape{count}, 1, count);
        if (d.sharing == sharing::gated) one(shared_gate, {d.shared + "_gate.weight"}, {1, width}, 1, width);
        experts = load_experts<T>(ex, file, d);
        shared = load_shared<T>(ex, file, d);
        file.expect_no_more();
    }
};

/// Runs f(arena) for its size, then with memory.
template <class F>
void with_workspace(fm::host_executor& ex, const F& f)
{
    fm::arena measure;
    f(measure);
    fm::buffer<std::byte, fm::host_executor> storage(ex, measure.bytes());
    fm::arena memory(storage.view());
    f(memory);
}

/// y = sum over a token's choices of weight * expert(x): plan -> experts -> combine.
template <class T, class Expert>
void run_experts(fm::host_executor& ex, const Expert& expert, const fm::mlp_weights<const T>& w,
                 fm::matrix_view<const T> x, const fm::routing<float>& routing, fm::matrix_view<T> y)
{
    with_workspace(ex, [&](fm::arena& memory) {
        const auto plan = fm::reserve_plan(memory, x.extent(0), routing.choices(), routing.total_experts);
        const auto rows = memory.matrix<T>(plan.slots, x.extent(1));
        fm::make_plan(ex, routing, plan, memory);
        const fm::expert_input<T> in{{x, plan.token_of}, plan.groups(), routing.weights, plan.choice_of};
        expert.infer(ex, in, w, rows, memory);
        if (memory.measuring()) return;
        if (expert.weighs_output()) fm::combine(ex, rows, routing, plan, y);
        else fm::combine_unweighted(ex, rows, routing, plan, y);
    });
}

/// Adds the shared experts to y.
template <class T, class Shared>
void run_shared(fm::host_executor& ex, const Shared& shared, block_weights<T>& w, fm::matrix_view<const T> x,
                fm::matrix_view<T> y)
{
    if constexpr (requires { shared.expert; }) {
        if (shared.expert.hidden == 0) return;
        with_workspace(ex, [&](fm::arena& memory) {
            if constexpr (requires(typename Shared::template weights<T> v) { v.gate; })
                shared.infer(ex, x, typename Shared::template weights<T>{w.shared_gate.view(), w.shared.views}, y, memory);
            else shared.infer(ex, x, w.shared.views, y, memory);
        });
    }
}

/// Files in, file out.
template <class T>
void run(fm::host_executor& ex, const program_options& o, description d)
{
    tensor_file input(o.input, "the input, whose tensor is 'x'");
    const int64_t tokens = input.shape_of("x", 2)[0], width = d.numbers.width, k = d.numbers.k;
    const auto& given = input.take("x", {tokens, width});
    input.expect_no_more();
    fm::expects<fm::format_error>(tokens <= INT32_MAX / k, "tokens of tensor 'x'", tokens, "at most 2^31 - 1 choices");
    block_weights<T> w(ex, o.weights, d);
    if (!d.correction_bias.empty())
        d.numbers.bias = fm::vector_view<const float>(w.correction.view().data_handle(), d.numbers.experts);

    // The router sees what the files hold, in float32 whatever T is: near ties decide who computes.
    matrix<float> logits(ex, tokens, d.numbers.experts), weights(ex, tokens, k), out(ex, tokens, width);
    matrix<fm::int32_t> experts(ex, tokens, k);
    load(ex, given, out.view());
    with_workspace(ex, [&](fm::arena& memory) {
        const auto bias = w.router_bias.view();
        fm::project(ex, out.view(), w.router.view(), fm::vector_view<const float>(bias.data_handle(), bias.extent(1)),
                    logits.view(), memory);
    });
    const fm::routing<float> routing{tokens,
                                     d.numbers.experts,
                                     k,
                                     fm::vector_view<fm::int32_t>(experts.view().data_handle(), tokens * k),
                                     fm::vector_view<float>(weights.view().data_handle(), tokens * k),
                                     {}};
    route(ex, d, logits.view(), routing);
    matrix<T> x(ex, tokens, width), y(ex, tokens, width);
    load(ex, given, x.view());
    const fm::matrix_view<const T> rows = x.view();
    with_model<products>(d, [&](const auto& m) {
        run_experts<T>(ex, m.expert, w.experts.views, rows, routing, y.view());
        run_shared<T>(ex, m.shared, w, rows, y.view());
    });
    fm::copy_weights(ex, fm::single(y.view()), fm::single(out.view()));
    ex.synchronize();
    fm::io::write_safetensors(o.output, {{{"y", fm::io::as_safetensor(out.view())},
                                          {"experts", fm::io::as_safetensor(experts.view())},
                                          {"weights", fm::io::as_safetensor(weights.view())}},
                                         {{"model_type", d.model_type}, {"dtype", fm::dtype_name<T>}}});
}

} // namespace run_block
