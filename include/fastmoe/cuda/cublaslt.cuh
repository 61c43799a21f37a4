// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// gemm::cublaslt: the grouped products by cuBLASLt, one call a group, or by cuBLAS, one call for all of them. It has to know
/// the groups on the host: each product copies their counts there and waits for the stream. Included by name; link cuBLASLt
/// and cuBLAS (component cublaslt).
///
///     fm::cublaslt_context context;                        // one a stream; outlives the work
///     fm::mlp<fm::swiglu, fm::gemm::cublaslt> expert{.width = 4096, .hidden = 2048, .gemm = {&context}};
///
///     fm::cublaslt_context context{{.calls = fm::group_calls::one_for_all}};
#pragma once

#include <fastmoe/cuda/cublaslt_context.cuh>
#include <fastmoe/cuda/cublaslt_rows.cuh>
#include <fastmoe/exec/scratch.hpp>

namespace fastmoe::inline FASTMOE_ABI::gemm::inline FASTMOE_CUDA_ABI {

/// Grouped products by cuBLASLt, for double, float, bfloat16 and half, into the same type or, of the last two, float. float is
/// computed in float, never TF32, and no part of a sum is kept in two bytes. A bias of the output's type is a term of the
/// sums: cuBLASLt's epilogue adds it, or the one call for all adds to it. Sums have the order that cuBLASLt chooses for a
/// shape on a device, or cuBLAS for a list of them: the same bits on every run for the same counts.
///
/// Rows that are read through an index are copied first, into the arena; the epilogue runs when all groups are done. Other
/// executors, and types that cuBLASLt does not multiply, go to gemm::portable.
/// @throws invalid_argument if a group lies outside of S, or there are more experts than the context was made for: before
///         anything is written; cuda_error naming the shape that cuBLASLt has nothing for
struct cublaslt {
    static constexpr bool gathers_rows = false;
    static constexpr bool fuses_epilogue = false;
    static constexpr bool needs_host_counts = true;

    cublaslt_context* context = nullptr;

    /// As portable::forward.
    template <executor Executor, class Rows, class W, class B, class Y, class Epilogue>
    void forward(Executor& ex, const row_groups& groups, const Rows& x, const weight_view<W>& w, matrix_view<B> bias,
                 matrix_view<Y> y, const Epilogue& epilogue, arena& memory) const
    {
        if constexpr (detail::lt_multiplies<Executor, element<Rows>, W, Y>)
            if (w.in > 0 && w.out > 0 && (!bias.data_handle() || std::is_same_v<std::remove_const_t<B>, Y>)) {
                if (!memory.measuring() && bias.data_handle()) expects_shape(bias, "bias (E,out)", groups.experts(), w.out);
                const matrix_view<const Y> terms(reinterpret_cast<const Y*>(bias.data_handle()), bias.extent(0), bias.extent(1));
                return rows(ex, groups, x, weight_view<const std::remove_const_t<W>>(w), terms, y, epilogue, memory);
            }
        portable{}.forward(ex, groups, x, w, bias, y, epilogue, memory);
    }

    /// As portable::dgrad.
    template <executor Executor, class Rows, class W, class Y, class Epilogue>
    void dgrad(Executor& ex, const row_groups& groups, const Rows& dy, const weight_view<W>& w, matrix_view<Y> dx,
               const Epilogue& epilogue, arena& memory) const
    {
        if constexpr (detail::lt_multiplies<Executor, element<Rows>, W, Y>)
            if (w.in > 0 && w.out > 0) {
                const auto turned = detail::portable::transposed(weight_view<const std::remove_const_t<W>>(w));
                return rows(ex, groups, dy, turned, matrix_view<const Y>{}, dx, epilogue, memory);
            }
        portable{}.dgrad(ex, groups, dy, w, dx, epilogue, memory);
    }

    /// As portable::wgrad.
    template <executor Executor, class DyRows, class XRows, class G>
    void wgrad(Executor& ex, const row_groups& groups, const DyRows& dy, const XRows& x, const weight_view<G>& dw,
               write_mode mode, arena& memory) const
    {
        if constexpr (detail::lt_multiplies<Executor, element<DyRows>, element<XRows>, G>)
            if (dw.in > 0 && dw.out > 0) return gradients(ex, groups, dy, x, dw, mode, memory);
        portable{}.wgrad(ex, groups, dy, x, dw, mode, memory);
    }

private:
    template <class Rows>
    using element = detail::portable::row_element_t<Rows>;

    template <class Rows, class T, class Y, class Epilogue>
    void rows(cuda_executor& ex, const row_groups& groups, const Rows& x, const weight_view<const T>& w, matrix_view<const Y> bias,
              matrix_view<Y> y, const Epilogue& epilogue, arena& memory) const
    {
        expects(context != nullptr, "gemm.context", "a null pointer", "a cublaslt_context");
        if (!memory.measuring()) detail::expects_row_product<cuda_executor>(groups, x, w, y);
        detail::with_scratch(memory, [&](arena& a) {
            const auto workspace = a.vector<std::byte>(context->workspace_bytes());
            const auto addresses = a.vector<void*>(context->address_count(groups.experts()));
            if (a.measuring()) return (void)detail::rows_in_order(ex, groups, x, a);
            const auto lock = context->read_groups(ex, groups, w.pointers);
            const auto from = detail::rows_in_order(ex, groups, x, a);
            const bool lays_bias = bias.data_handle() && (context->calls() == group_calls::one_for_all || !detail::are_lines(bias));
            if (lays_bias) detail::begin_with_bias(ex, groups, bias, y);
            for (int64_t e = 0; e < groups.experts(); ++e) {
                const int64_t n = context->count(e), first = context->offset(e);
                if (n == 0) continue;
                // Y_e^T (out,n) = W (out,in) X_e^T (in,n), by columns: each row of ours is a column there.
                const T* matrix = w.pointers ? context->template pointer<const T>(e) : w.data + e * w.expert_stride;
                detail::lt_product p;
                p.m = w.out, p.n = n, p.k = w.in;
                p.a = w.col_stride == 1 ? detail::lt_matrix::of(matrix, detail::lt_line(w.row_stride, w.in), detail::lt_order::turned)
                                        : detail::lt_matrix::of(matrix, detail::lt_line(w.col_stride, w.out), detail::lt_order::as_is);
                p.b = detail::lt_matrix::of(from.data_handle() + first * w.in, w.in, detail::lt_order::as_is);
                p.d = detail::lt_matrix::of(y.data_handle() + first * w.out, w.out, detail::lt_order::as_is);
                p.adds = lays_bias;
                p.bias = bias.data_handle() && !lays_bias ? bias.data_handle() + e * w.out : nullptr;
                context->add(p);
            }
            context->run(ex, workspace, addresses);
            detail::end_rows(ex, groups, epilogue, w.out);
        });
    }

    template <class DyRows, class XRows, class G>
    void gradients(cuda_executor& ex, const row_groups& groups, const DyRows& dy, const XRows& x, const weight_view<G>& dw,
                   write_mode mode, arena& memory) const
    {
        expects(context != nullptr, "gemm.context", "a null pointer", "a cublaslt_context");
        if (!memory.measuring()) detail::expects_gradient_product<cuda_executor>(groups, dy, x, dw);
        detail::with_scratch(memory, [&](arena& a) {
            const auto workspace = a.vector<std::byte>(context->workspace_bytes());
            const auto addresses = a.vector<void*>(context->address_count(groups.experts()));
            if (a.measuring()) return (void)detail::rows_in_order(ex, groups, dy, a), (void)detail::rows_in_order(ex, groups, x, a);
            const auto lock = context->read_groups(ex, groups, dw.pointers);
            const auto left = detail::rows_in_order(ex, groups, dy, a), right = detail::rows_in_order(ex, groups, x, a);
            const bool by_row = dw.col_stride == 1;
            for (int64_t e = 0; e < groups.experts(); ++e) {
                const int64_t n = context->count(e), first = context->offset(e);
                G* to = dw.pointers ? context->template pointer<G>(e) : dw.data + e * dw.expert_stride;
                const int64_t line = by_row ? detail::lt_line(dw.row_stride, dw.in) : detail::lt_line(dw.col_stride, dw.out);
                detail::lt_product p;
                p.m = by_row ? dw.in : dw.out, p.n = by_row ? dw.out : dw.in, p.k = n;
                p.d = detail::lt_matrix::of(to, line, detail::lt_order::as_is);
                if (n == 0) {
                    if (mode == write_mode::overwrite) context->fill_zero(ex, p);
                    continue;
                }
                // dW^T (in,out) = X_e^T (in,n) dY_e (n,out), by columns; dW itself where that is how it lies.
                const auto& above = by_row ? right : left;
                const auto& below = by_row ? left : right;
                p.a = detail::lt_matrix::of(above.data_handle() + first * p.m, p.m, detail::lt_order::as_is);
                p.b = detail::lt_matrix::of(below.data_handle() + first * p.n, p.n, detail::lt_order::turned);
                p.adds = mode == write_mode::accumulate;
                context->add(p);
            }
            context->run(ex, workspace, addresses);
        });
    }
};

static_assert(grouped_gemm<cublaslt, cuda_executor, float>);
static_assert(grouped_gemm<cublaslt, cuda_executor, bfloat16>);
static_assert(grouped_gemm<cublaslt, host_executor, float>);

} // namespace fastmoe::inline FASTMOE_ABI::gemm::inline FASTMOE_CUDA_ABI
