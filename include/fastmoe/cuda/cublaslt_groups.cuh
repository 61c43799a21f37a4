// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// All groups' products as one of cuBLASLt's, whose sizes and addresses the device writes and reads: cuBLASLt's grouped
/// layouts, of version 13.4. Part of cublaslt_grouped.cuh.
#pragma once

#include <fastmoe/cuda/cublaslt_context.cuh>
#include <fastmoe/exec/fault.hpp>

#if CUBLAS_VERSION >= 130400

namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI {

/// Where the matrices of one side lie: one after the other, rows of a token each, or by expert, at a distance or anywhere.
enum class lt_steps : std::uint8_t { rows, experts };

template <class T>
struct lt_side {
    T* data = nullptr;
    T* const* pointers = nullptr; ///< (E), in place of data
    int64_t step = 0;             ///< elements from a row, or an expert, to the next
    lt_steps steps = lt_steps::rows;
    int64_t line = 0; ///< elements from a column to the next
    lt_order order = lt_order::as_is;

    FASTMOE_HOST_DEVICE T* of(int64_t e, int64_t first) const noexcept
    {
        return pointers ? pointers[e] : data + (steps == lt_steps::rows ? first : e) * step;
    }
    /// Whether each address, as far as the host knows them, and each column begins where 16 bytes divide.
    bool aligned() const noexcept
    {
        const auto bytes = static_cast<int64_t>(sizeof(T));
        return line * bytes % 16 == 0 && (pointers || step * bytes % 16 == 0) && reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
    }
};

/// d_e (m,n) (+)= a_e (m,k) b_e (k,n) for each expert, all by columns. A size that is `counted` is the number of its rows.
template <class A, class B, class D>
struct lt_groups {
    static constexpr int64_t counted = -1;
    row_groups groups;
    int64_t m = 0, n = 0, k = 0;
    lt_side<A> a;
    lt_side<B> b;
    lt_side<D> d;

    /// Zero for a group that does not lie inside of S.
    FASTMOE_HOST_DEVICE int64_t rows(int64_t e) const noexcept
    {
        return is_group_inside(groups.counts, groups.offsets, e, groups.slots) ? groups.counts(e) : 0;
    }
    /// What cuBLASLt asks of all sides.
    bool aligned() const noexcept { return a.aligned() && b.aligned() && d.aligned(); }
};

/// The memory of the device that a product's sizes, addresses and scalars need.
struct lt_group_arrays {
    matrix_view<int64_t> sizes;   // (9,E): rows, columns and line of a, b and d, as they are stored
    matrix_view<void*> addresses; // (3,E)
    vector_view<float> scalars;   // (2): alpha, beta

    static lt_group_arrays reserve(int64_t experts, arena& memory)
    {
        return {memory.matrix<int64_t>(9, experts), memory.matrix<void*>(3, experts), memory.vector<float>(2)};
    }
};

/// Writes them: f(e) for each expert. A group without rows gets no columns, so that nothing is computed for it.
template <class A, class B, class D>
struct lay_groups {
    lt_groups<A, B, D> from;
    lt_group_arrays to;
    float beta;
    fault_recorder faults;

    FASTMOE_HOST_DEVICE void operator()(int64_t e) const
    {
        const auto& g = from.groups;
        if (!is_group_inside(g.counts, g.offsets, e, g.slots)) faults.record(fault_kind::group_out_of_range, e, g.counts(e));
        const int64_t rows = from.rows(e), first = rows > 0 ? g.offsets(e) : 0;
        const int64_t n = rows == 0 ? 0 : from.n == from.counted ? rows : from.n, k = from.k == from.counted ? rows : from.k;
        lay(0, e, from.a, first, from.m, k);
        lay(1, e, from.b, first, k, n);
        lay(2, e, from.d, first, from.m, n);
        if (e == 0) to.scalars(0) = 1, to.scalars(1) = beta;
    }

private:
    template <class T>
    FASTMOE_HOST_DEVICE void lay(int64_t which, int64_t e, const lt_side<T>& side, int64_t first, int64_t rows, int64_t columns) const
    {
        const bool turned = side.order == lt_order::turned;
        to.sizes(3 * which, e) = turned ? columns : rows;
        to.sizes(3 * which + 1, e) = turned ? rows : columns;
        to.sizes(3 * which + 2, e) = side.line;
        to.addresses(which, e) = const_cast<std::remove_const_t<T>*>(side.of(e, first));
    }
};

/// Zeros for the outputs of groups without rows, some elements of a column at a time.
template <class A, class B, class D>
struct clear_empty_groups {
    static constexpr int64_t elements = 128;
    lt_groups<A, B, D> all;

    int64_t tasks() const noexcept { return all.groups.experts() * all.n * portable::ceil_div(all.m, elements); }

    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        const int64_t parts = (all.m + elements - 1) / elements, e = i / parts / all.n;
        if (all.rows(e) > 0) return;
        D* const column = all.d.of(e, 0) + i / parts % all.n * all.d.line;
        const int64_t begin = i % parts * elements;
        for (int64_t j = begin; j < begin + elements && j < all.m; ++j) column[j] = D(0.0f);
    }
};

/// Asks cuBLASLt for the product that lay_groups has described, and queues it.
template <class A, class B, class D>
void multiply_groups(cublaslt_context& context, cuda_executor& ex, const lt_groups<A, B, D>& p, const lt_group_arrays& arrays,
                     vector_view<std::byte> workspace)
{
    const on_device here(ex.device());
    const auto lock = context.lock();
    cublasLtMatmulDescOpaque_t what{};
    lt_check(cublasLtMatmulDescInit(&what, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescInit");
    context.set(what, CUBLASLT_MATMUL_DESC_TRANSA, lt_operation(p.a.order));
    context.set(what, CUBLASLT_MATMUL_DESC_TRANSB, lt_operation(p.b.order));
    context.set(what, CUBLASLT_MATMUL_DESC_POINTER_MODE, static_cast<std::int32_t>(CUBLASLT_POINTER_MODE_DEVICE));
    const int64_t experts = p.groups.experts();
    const auto layout = [&](int64_t which, cudaDataType_t type) {
        cublasLtMatrixLayoutOpaque_t out{};
        const int64_t* const rows = &arrays.sizes(3 * which, 0);
        lt_check(cublasLtGroupedMatrixLayoutInit(&out, type, static_cast<int>(experts), rows, rows + experts, rows + 2 * experts),
                 "cublasLtGroupedMatrixLayoutInit");
        const std::int32_t wide = CUBLASLT_INTEGER_WIDTH_64;
        for (const auto width : {CUBLASLT_GROUPED_MATRIX_LAYOUT_ROWS_COLS_ARRAY_INTEGER_WIDTH, CUBLASLT_GROUPED_MATRIX_LAYOUT_LD_ARRAY_INTEGER_WIDTH})
            lt_check(cublasLtMatrixLayoutSetAttribute(&out, width, &wide, sizeof wide), "cublasLtMatrixLayoutSetAttribute");
        return out;
    };
    const auto type = lt_type<std::remove_const_t<A>>;
    auto a = layout(0, type), b = layout(1, type), d = layout(2, lt_type<D>);
    int64_t average = 1; // rows of a group, as a power of two: not an algorithm for each number of tokens
    while (average * experts < p.groups.slots) average *= 2;
    const auto mean = [average](int64_t size) { return size == lt_groups<A, B, D>::counted ? average : size; };
    const cublaslt_context::shape key{p.m, p.n, p.k, p.a.line, p.b.line, p.d.line, type, lt_type<D>, int64_t(p.a.order), int64_t(p.b.order),
                                      int64_t(p.a.steps), int64_t(p.d.steps), 0, experts, average, 0, 1};
    std::string name = std::to_string(experts); // in steps: g++ 12 warns of an overlap in its own operator
    name += " groups of about m ";
    name += std::to_string(mean(p.m)) + ", n " + std::to_string(mean(p.n)) + ", k " + std::to_string(mean(p.k));
    const cublasLtMatmulAlgo_t& algorithm = context.find(key, name, what, a, b, d, [&](const auto& wish) {
        for (const auto side : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                                CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
            wish(side, std::uint32_t{16});
        // The header says uint32_t of these; the library takes eight bytes, as NVIDIA's own sample gives it.
        wish(CUBLASLT_MATMUL_PREF_GROUPED_DESC_D_AVERAGE_ROWS, mean(p.m));
        wish(CUBLASLT_MATMUL_PREF_GROUPED_DESC_D_AVERAGE_COLS, mean(p.n));
        wish(CUBLASLT_MATMUL_PREF_GROUPED_AVERAGE_REDUCTION_DIM, mean(p.k));
    });
    const float* const scalars = arrays.scalars.data_handle();
    void* const* const at = arrays.addresses.data_handle();
    void* const to = const_cast<void**>(at + 2 * experts);
    std::string call = "cublasLtMatmul of ";
    call += name;
    lt_check(cublasLtMatmul(context.handle(), &what, scalars, at, &a, at + experts, &b, scalars + 1, to, &d, to, &d, &algorithm,
                            workspace.data_handle(), static_cast<std::size_t>(workspace.extent(0)), ex.stream()),
             call);
}

} // namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI

#endif
