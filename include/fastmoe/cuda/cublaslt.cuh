// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// gemm::cublaslt: the grouped products by cuBLASLt, one call a group. It has to know the groups on the host: each product
/// copies their counts there and waits for the stream. Included by name; link cuBLASLt (component cublaslt).
///
///     fm::cublaslt_context context;                        // one a stream; outlives the work
///     fm::mlp<fm::swiglu, fm::gemm::cublaslt> expert{.width = 4096, .hidden = 2048, .gemm = {&context}};
#pragma once

#include <fastmoe/cuda/cublaslt_context.cuh>
#include <fastmoe/cuda/cuda_executor.cuh>
#include <fastmoe/exec/scratch.hpp>
#include <fastmoe/gemm/portable.hpp>
#include <fastmoe/ops/rows.hpp>

namespace fastmoe::inline FASTMOE_ABI::gemm::inline FASTMOE_CUDA_ABI {

/// Grouped products by cuBLASLt, for double, float, bfloat16 and half, into the same type or, of the last two, float. float is
/// computed in float, never TF32. A bias of the output's type is added by cuBLASLt's epilogue. Sums have the order that
/// cuBLASLt chooses for a shape on a device: the same bits on every run for the same counts.
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
        if constexpr (is_native<Executor, element<Rows>, W, Y>)
            if (w.in > 0 && w.out > 0 && (!bias.data_handle() || std::is_same_v<std::remove_const_t<B>, Y>)) {
                if (!memory.measuring() && bias.data_handle()) expects_shape(bias, "bias (E,out)", groups.experts(), w.out);
                return rows(ex, groups, x, weight_view<const std::remove_const_t<W>>(w), bias.data_handle(), y, epilogue, memory);
            }
        portable{}.forward(ex, groups, x, w, bias, y, epilogue, memory);
    }

    /// As portable::dgrad.
    template <executor Executor, class Rows, class W, class Y, class Epilogue>
    void dgrad(Executor& ex, const row_groups& groups, const Rows& dy, const weight_view<W>& w, matrix_view<Y> dx,
               const Epilogue& epilogue, arena& memory) const
    {
        if constexpr (is_native<Executor, element<Rows>, W, Y>)
            if (w.in > 0 && w.out > 0) {
                const auto turned = detail::portable::transposed(weight_view<const std::remove_const_t<W>>(w));
                return rows(ex, groups, dy, turned, nullptr, dx, epilogue, memory);
            }
        portable{}.dgrad(ex, groups, dy, w, dx, epilogue, memory);
    }

    /// As portable::wgrad.
    template <executor Executor, class DyRows, class XRows, class G>
    void wgrad(Executor& ex, const row_groups& groups, const DyRows& dy, const XRows& x, const weight_view<G>& dw,
               write_mode mode, arena& memory) const
    {
        if constexpr (is_native<Executor, element<DyRows>, element<XRows>, G>)
            if (dw.in > 0 && dw.out > 0) return gradients(ex, groups, dy, x, dw, mode, memory);
        portable{}.wgrad(ex, groups, dy, x, dw, mode, memory);
    }

private:
    template <class Rows>
    using element = detail::portable::row_element_t<Rows>;

    template <class Executor, class X, class W, class Y>
    static constexpr bool is_native = std::is_same_v<Executor, cuda_executor> && std::is_same_v<X, std::remove_const_t<W>> &&
                                      (std::is_same_v<Y, X> || (std::is_same_v<Y, float> && sizeof(X) == 2));

    /// The stride of a matrix with a single line may be anything.
    static constexpr int64_t line_of(int64_t stride, int64_t length) noexcept { return stride > length ? stride : length; }

    /// The rows in order, copied if they are not.                                                // (S,D)
    template <class T>
    static matrix_view<const T> in_order(cuda_executor&, const plain_rows<T>& rows, arena&)
    {
        return rows.data;
    }
    template <class T>
    static matrix_view<const T> in_order(cuda_executor& ex, const indexed_rows<T>& rows, arena& memory)
    {
        const auto out = memory.matrix<T>(rows.extent(0), rows.extent(1));
        using real = accumulate_t<T>;
        if (!memory.measuring())
            for_each_row(ex, out.extent(0), detail::gather_rows<real, T, unit_scale<real>>{rows, out, {}}, {.width = out.extent(1)});
        return out;
    }

    template <class Rows, class T, class Y, class Epilogue>
    void rows(cuda_executor& ex, const row_groups& groups, const Rows& x, const weight_view<const T>& w, const void* bias,
              matrix_view<Y> y, const Epilogue& epilogue, arena& memory) const
    {
        expects(context != nullptr, "gemm.context", "a null pointer", "a cublaslt_context");
        if (!memory.measuring()) {
            detail::expects_groups(groups, x.extent(0));
            detail::expects_rows(x, "rows (S,.)");
            detail::expects_weights(w, "W (E,out,in)", groups.experts(), y.extent(1), x.extent(1));
            expects_shape(y, "output rows (S,.)", groups.slots, w.out);
        }
        detail::with_scratch(memory, [&](arena& a) {
            const auto workspace = a.vector<std::byte>(context->workspace_bytes());
            if (a.measuring()) return (void)in_order(ex, x, a);
            const auto lock = context->read_groups(ex, groups, w.pointers);
            const auto from = in_order(ex, x, a);
            for (int64_t e = 0; e < groups.experts(); ++e) {
                const int64_t n = context->count(e), first = context->offset(e);
                if (n == 0) continue;
                // Y_e^T (out,n) = W (out,in) X_e^T (in,n), by columns: each row of ours is a column there.
                const T* matrix = w.pointers ? context->template pointer<const T>(e) : w.data + e * w.expert_stride;
                detail::lt_product p;
                p.m = w.out, p.n = n, p.k = w.in;
                p.a = w.col_stride == 1 ? detail::lt_matrix::of(matrix, line_of(w.row_stride, w.in), detail::lt_order::turned)
                                        : detail::lt_matrix::of(matrix, line_of(w.col_stride, w.out), detail::lt_order::as_is);
                p.b = detail::lt_matrix::of(from.data_handle() + first * w.in, w.in, detail::lt_order::as_is);
                p.d = detail::lt_matrix::of(y.data_handle() + first * w.out, w.out, detail::lt_order::as_is);
                p.bias = bias ? static_cast<const Y*>(bias) + e * w.out : nullptr;
                context->multiply(ex, p, workspace);
            }
            if constexpr (!std::is_same_v<Epilogue, no_epilogue>)
                for_each_row(ex, groups.slots, detail::portable::end_row<Epilogue>{groups, epilogue}, {.width = w.out});
        });
    }

    template <class DyRows, class XRows, class G>
    void gradients(cuda_executor& ex, const row_groups& groups, const DyRows& dy, const XRows& x, const weight_view<G>& dw,
                   write_mode mode, arena& memory) const
    {
        expects(context != nullptr, "gemm.context", "a null pointer", "a cublaslt_context");
        if (!memory.measuring()) {
            detail::expects_groups(groups, x.extent(0));
            expects(dy.extent(0) == x.extent(0), "rows of dY", dy.extent(0), "S = ", x.extent(0));
            detail::expects_rows(dy, "rows of dY");
            detail::expects_rows(x, "rows of X");
            detail::expects_gradient<cuda_executor>(dw, groups.experts(), dy.extent(1), x.extent(1));
        }
        detail::with_scratch(memory, [&](arena& a) {
            const auto workspace = a.vector<std::byte>(context->workspace_bytes());
            if (a.measuring()) return (void)in_order(ex, dy, a), (void)in_order(ex, x, a);
            const auto lock = context->read_groups(ex, groups, dw.pointers);
            const auto left = in_order(ex, dy, a), right = in_order(ex, x, a);
            const bool by_row = dw.col_stride == 1;
            for (int64_t e = 0; e < groups.experts(); ++e) {
                const int64_t n = context->count(e), first = context->offset(e);
                G* to = dw.pointers ? context->template pointer<G>(e) : dw.data + e * dw.expert_stride;
                const int64_t line = by_row ? line_of(dw.row_stride, dw.in) : line_of(dw.col_stride, dw.out);
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
                context->multiply(ex, p, workspace);
            }
        });
    }
};

static_assert(grouped_gemm<cublaslt, cuda_executor, float>);
static_assert(grouped_gemm<cublaslt, cuda_executor, bfloat16>);
static_assert(grouped_gemm<cublaslt, host_executor, float>);

} // namespace fastmoe::inline FASTMOE_ABI::gemm::inline FASTMOE_CUDA_ABI
