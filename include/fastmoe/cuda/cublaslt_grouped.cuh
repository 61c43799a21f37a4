// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// gemm::cublaslt_grouped: all groups of a product as one call of cuBLASLt that reads their sizes on the device, so that nothing
/// waits and a CUDA graph can capture it. There from cuBLAS 13.4 on (CUBLAS_VERSION >= 130400), where NVIDIA calls it
/// experimental; with older toolkits this header is empty. Included by name; link cuBLASLt (component cublaslt).
///
///     fm::cublaslt_context context;                        // outlives the work
///     fm::mlp<fm::swiglu, fm::gemm::cublaslt_grouped> expert{.width = 4096, .hidden = 2048, .gemm = {&context}};
#pragma once

#include <fastmoe/cuda/cublaslt_groups.cuh>
#include <fastmoe/cuda/cublaslt_rows.cuh>
#include <fastmoe/exec/scratch.hpp>

#if CUBLAS_VERSION >= 130400

namespace fastmoe::inline FASTMOE_ABI::gemm::inline FASTMOE_CUDA_ABI {

/// Grouped products of bfloat16 or half by cuBLASLt's grouped layouts, into the same type or float, on compute capability 9.0,
/// 10.x and 11.0. They take widths that are multiples of 8 and matrices and lines that begin where 16 bytes divide: pointers
/// of experts that are held apart have to, by the caller's word. What the host sees to be otherwise, other types and other
/// executors go to gemm::portable. A bias of the output's type is laid into the output first and is a term of the sums.
///
/// Rows that are read through an index are copied first, into the arena; the epilogue runs when all groups are done. A group
/// outside of S is a fault, and is computed as if it were empty.
/// @throws cuda_error naming the shape that cuBLASLt has nothing for, as on other devices
struct cublaslt_grouped {
    static constexpr bool gathers_rows = false;
    static constexpr bool fuses_epilogue = false;
    static constexpr bool needs_host_counts = false;

    cublaslt_context* context = nullptr;

    /// As portable::forward.
    template <executor Executor, class Rows, class W, class B, class Y, class Epilogue>
    void forward(Executor& ex, const row_groups& groups, const Rows& x, const weight_view<W>& w, matrix_view<B> bias,
                 matrix_view<Y> y, const Epilogue& epilogue, arena& memory) const
    {
        if constexpr (multiplies<Executor, element<Rows>, W, Y>)
            if (!bias.data_handle() || std::is_same_v<std::remove_const_t<B>, Y>) {
                if (!memory.measuring() && bias.data_handle()) expects_shape(bias, "bias (E,out)", groups.experts(), w.out);
                const matrix_view<const Y> terms(reinterpret_cast<const Y*>(bias.data_handle()), bias.extent(0), bias.extent(1));
                if (rows(ex, groups, x, weight_view<const std::remove_const_t<W>>(w), terms, y, epilogue, memory)) return;
            }
        portable{}.forward(ex, groups, x, w, bias, y, epilogue, memory);
    }

    /// As portable::dgrad.
    template <executor Executor, class Rows, class W, class Y, class Epilogue>
    void dgrad(Executor& ex, const row_groups& groups, const Rows& dy, const weight_view<W>& w, matrix_view<Y> dx,
               const Epilogue& epilogue, arena& memory) const
    {
        if constexpr (multiplies<Executor, element<Rows>, W, Y>) {
            const auto turned = detail::portable::transposed(weight_view<const std::remove_const_t<W>>(w));
            if (rows(ex, groups, dy, turned, matrix_view<const Y>{}, dx, epilogue, memory)) return;
        }
        portable{}.dgrad(ex, groups, dy, w, dx, epilogue, memory);
    }

    /// As portable::wgrad.
    template <executor Executor, class DyRows, class XRows, class G>
    void wgrad(Executor& ex, const row_groups& groups, const DyRows& dy, const XRows& x, const weight_view<G>& dw,
               write_mode mode, arena& memory) const
    {
        if constexpr (multiplies<Executor, element<DyRows>, element<XRows>, G>)
            if (gradients(ex, groups, dy, x, dw, mode, memory)) return;
        portable{}.wgrad(ex, groups, dy, x, dw, mode, memory);
    }

private:
    template <class Rows>
    using element = detail::portable::row_element_t<Rows>;

    template <class Executor, class X, class W, class Y>
    static constexpr bool multiplies = detail::lt_multiplies<Executor, X, W, Y> && sizeof(X) == 2;

    /// The experts' matrices as one side of the products, by columns: rows of ours are columns there, unless they are columns.
    template <class T>
    static detail::lt_side<T> side_of(const weight_view<T>& w, detail::lt_order by_row, detail::lt_order by_column)
    {
        const bool rows = w.col_stride == 1;
        return {w.data, w.pointers, w.expert_stride, detail::lt_steps::experts,
                rows ? detail::lt_line(w.row_stride, w.in) : detail::lt_line(w.col_stride, w.out), rows ? by_row : by_column};
    }
    template <class T>
    static detail::lt_side<T> side_of(matrix_view<T> rows, detail::lt_order order)
    {
        return {rows.data_handle(), nullptr, rows.extent(1), detail::lt_steps::rows, rows.extent(1), order};
    }

    /// False, and nothing done, for what cuBLASLt does not take. A measuring arena counts what portable would need, too: it
    /// has not seen the addresses that decide.
    template <class Rows, class T, class Y, class Epilogue>
    bool rows(cuda_executor& ex, const row_groups& groups, const Rows& x, const weight_view<const T>& w, matrix_view<const Y> bias,
              matrix_view<Y> y, const Epilogue& epilogue, arena& memory) const
    {
        expects(context != nullptr, "gemm.context", "a null pointer", "a cublaslt_context");
        using lt_groups = detail::lt_groups<const T, const T, Y>;
        lt_groups p{groups, w.out, lt_groups::counted, w.in, side_of(w, detail::lt_order::turned, detail::lt_order::as_is), {},
                    side_of(y, detail::lt_order::as_is)};
        if (w.in == 0 || w.out == 0 || w.in % 8 != 0 || w.out % 8 != 0 || !p.a.aligned() || !p.d.aligned()) return false;
        if constexpr (requires { x.index; }) {
        } else {
            if (!side_of(x.data, detail::lt_order::as_is).aligned()) return false;
        }
        if (!memory.measuring()) detail::expects_row_product<cuda_executor>(groups, x, w, y);
        detail::with_scratch(memory, [&](arena& a) {
            const auto workspace = a.vector<std::byte>(context->workspace_bytes());
            const auto arrays = detail::lt_group_arrays::reserve(groups.experts(), a);
            const auto from = detail::rows_in_order(ex, groups, x, a);
            if (a.measuring() || groups.experts() == 0 || groups.slots == 0) return;
            p.b = side_of(from, detail::lt_order::as_is);
            if (bias.data_handle()) detail::begin_with_bias(ex, groups, bias, y);
            multiply(ex, p, bias.data_handle() ? write_mode::accumulate : write_mode::overwrite, arrays, workspace);
            detail::end_rows(ex, groups, epilogue, w.out);
        });
        return !memory.measuring();
    }

    template <class DyRows, class XRows, class G>
    bool gradients(cuda_executor& ex, const row_groups& groups, const DyRows& dy, const XRows& x, const weight_view<G>& dw,
                   write_mode mode, arena& memory) const
    {
        expects(context != nullptr, "gemm.context", "a null pointer", "a cublaslt_context");
        using T = element<DyRows>;
        const bool by_row = dw.col_stride == 1;
        using lt_groups = detail::lt_groups<const T, const T, G>;
        lt_groups p{groups, by_row ? dw.in : dw.out, by_row ? dw.out : dw.in, lt_groups::counted, {}, {},
                    side_of(dw, detail::lt_order::as_is, detail::lt_order::as_is)};
        const auto begins = [](const auto& rows) {
            if constexpr (requires { rows.index; }) return true;
            else return side_of(rows.data, detail::lt_order::as_is).aligned();
        };
        if (p.m == 0 || p.n == 0 || p.m % 8 != 0 || p.n % 8 != 0 || !p.d.aligned() || !begins(dy) || !begins(x)) return false;
        if (!memory.measuring()) detail::expects_gradient_product<cuda_executor>(groups, dy, x, dw);
        detail::with_scratch(memory, [&](arena& a) {
            const auto workspace = a.vector<std::byte>(context->workspace_bytes());
            const auto arrays = detail::lt_group_arrays::reserve(groups.experts(), a);
            const auto left = detail::rows_in_order(ex, groups, dy, a), right = detail::rows_in_order(ex, groups, x, a);
            if (a.measuring() || groups.experts() == 0) return;
            // dW^T (in,out) = X_e^T (in,n) dY_e (n,out), by columns; dW itself where that is how it lies.
            p.a = side_of(by_row ? right : left, detail::lt_order::as_is);
            p.b = side_of(by_row ? left : right, detail::lt_order::turned);
            if (mode == write_mode::overwrite) {
                const detail::clear_empty_groups<const T, const T, G> clear{p};
                fastmoe::for_each(ex, clear.tasks(), clear);
            }
            multiply(ex, p, mode, arrays, workspace);
        });
        return !memory.measuring();
    }

    template <class A, class B, class D>
    void multiply(cuda_executor& ex, const detail::lt_groups<A, B, D>& p, write_mode mode, const detail::lt_group_arrays& arrays,
                  vector_view<std::byte> workspace) const
    {
        const float beta = mode == write_mode::accumulate ? 1 : 0;
        fastmoe::for_each(ex, p.groups.experts(), detail::lay_groups<A, B, D>{p, arrays, beta, ex.faults()});
        if (p.groups.slots > 0) detail::multiply_groups(*context, ex, p, arrays, workspace);
    }
};

static_assert(grouped_gemm<cublaslt_grouped, cuda_executor, float>);
static_assert(grouped_gemm<cublaslt_grouped, cuda_executor, bfloat16>);
static_assert(grouped_gemm<cublaslt_grouped, host_executor, float>);

} // namespace fastmoe::inline FASTMOE_ABI::gemm::inline FASTMOE_CUDA_ABI

#endif
