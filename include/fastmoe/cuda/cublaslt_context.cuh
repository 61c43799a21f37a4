// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What gemm::cublaslt keeps between calls: the library's handle, the algorithms that it has found, and pinned memory for
/// the groups. The caller owns it. Part of cublaslt.cuh.
#pragma once

#include <array>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>

#include <cublasLt.h>

#include <fastmoe/cuda/cuda_executor.cuh>
#include <fastmoe/gemm/grouped_gemm.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI {

inline void lt_check(cublasStatus_t status, const std::string& call, location where = location::current())
{
    if (status == CUBLAS_STATUS_SUCCESS) [[likely]]
        return;
    std::string text = call;
    text += " failed: ";
    text += cublasLtGetStatusString(status);
    raise<cuda_error>(text, where);
}

/// Whether a factor is what lies in memory, column by column, or that transposed.
enum class lt_order : std::uint8_t { as_is, turned };

template <class T>
inline constexpr cudaDataType_t lt_type = CUDA_R_32F;
template <>
inline constexpr cudaDataType_t lt_type<double> = CUDA_R_64F;
template <>
inline constexpr cudaDataType_t lt_type<bfloat16> = CUDA_R_16BF;
template <>
inline constexpr cudaDataType_t lt_type<half> = CUDA_R_16F;

/// A matrix by columns.
struct lt_matrix {
    void* data = nullptr;
    int64_t line = 0; ///< elements from a column to the next
    cudaDataType_t type = CUDA_R_32F;
    int64_t element = 4; ///< bytes
    lt_order order = lt_order::as_is;

    template <class T>
    static lt_matrix of(T* data, int64_t line, lt_order order)
    {
        using scalar = std::remove_const_t<T>;
        return {const_cast<scalar*>(data), line, lt_type<scalar>, sizeof(scalar), order};
    }
    /// What the address is a multiple of, as far as algorithms care.
    std::uint32_t alignment() const
    {
        std::uint32_t out = 256;
        while (reinterpret_cast<std::uintptr_t>(data) % out != 0) out /= 2;
        return out;
    }
};

/// d (m,n) = a (m,k) b (k,n), plus d if it adds, plus bias (m) in every column.
struct lt_product {
    int64_t m = 0, n = 0, k = 0;
    lt_matrix a, b, d;
    const void* bias = nullptr;
    bool adds = false;
};

} // namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI

namespace fastmoe::inline FASTMOE_ABI::inline FASTMOE_CUDA_ABI {

struct cublaslt_options {
    int64_t workspace_bytes = int64_t{32} << 20; ///< of scratch that each product takes from its arena for cuBLASLt
    int64_t experts = 1024;                      ///< the most groups of a product
    int64_t algorithms = 4096;                   ///< the most that are remembered, one a shape; then all are forgotten
};

/// Made on the current device, and used with executors of that device. Threads may share one; they take turns.
class cublaslt_context {
public:
    /// @throws cuda_error, out_of_memory, invalid_argument if an option makes no sense
    explicit cublaslt_context(const cublaslt_options& options = {}) : options_(options)
    {
        expects(options.workspace_bytes >= 0, "options.workspace_bytes", options.workspace_bytes, "0 or more");
        expects(options.experts >= 1 && options.experts <= 1 << 20, "options.experts", options.experts, "1 to ", 1 << 20);
        expects(options.algorithms >= 1, "options.algorithms", options.algorithms, "1 or more");
        void* pinned = nullptr;
        detail::cuda_check(cudaMallocHost(&pinned, static_cast<std::size_t>(options.experts * 20)), "cudaMallocHost");
        groups_.reset(static_cast<std::byte*>(pinned));
        cublasLtHandle_t handle = nullptr;
        detail::lt_check(cublasLtCreate(&handle), "cublasLtCreate");
        handle_.reset(handle);
    }
    cublaslt_context(const cublaslt_context&) = delete;
    cublaslt_context& operator=(const cublaslt_context&) = delete;

    int64_t workspace_bytes() const noexcept { return options_.workspace_bytes; }
    /// How many shapes have an algorithm.
    std::size_t algorithms() const noexcept { return found_.size(); }

    // -- for gemm::cublaslt, which holds the lock that the first of these returns ------------------------------------

    /// Copies counts, offsets and, if there are any, the experts' pointers to the host, and waits for the stream.
    /// @throws invalid_argument if a group does not lie inside of S
    [[nodiscard]] std::unique_lock<std::mutex> read_groups(cuda_executor& ex, const row_groups& groups, const void* pointers)
    {
        const int64_t experts = groups.experts();
        expects(experts <= options_.experts, "experts", experts, "at most options.experts = ", options_.experts);
        std::unique_lock lock(mutex_);
        ex.copy(offsets(), groups.offsets.data_handle(), experts * 8);
        ex.copy(counts(), groups.counts.data_handle(), experts * 4);
        if (pointers) ex.copy(addresses(), pointers, experts * 8);
        detail::cuda_check(cudaStreamSynchronize(ex.stream()), "cudaStreamSynchronize");
        detail::expects_groups_inside(vector_view<const int32_t>(counts(), experts), vector_view<const int64_t>(offsets(), experts + 1),
                                      groups.slots);
        return lock;
    }
    int64_t count(int64_t e) const noexcept { return counts()[e]; }
    int64_t offset(int64_t e) const noexcept { return offsets()[e]; }
    template <class T>
    T* pointer(int64_t e) const noexcept
    {
        return static_cast<T*>(addresses()[e]);
    }

    /// Queues a product. @param workspace  (workspace_bytes)
    void multiply(cuda_executor& ex, const detail::lt_product& p, vector_view<std::byte> workspace)
    {
        const detail::on_device here(ex.device());
        const bool wide = p.a.type == CUDA_R_64F;
        cublasLtMatmulDescOpaque_t what{};
        detail::lt_check(cublasLtMatmulDescInit(&what, wide ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F, wide ? CUDA_R_64F : CUDA_R_32F),
                         "cublasLtMatmulDescInit");
        set(what, CUBLASLT_MATMUL_DESC_TRANSA, p.a.order == detail::lt_order::turned ? CUBLAS_OP_T : CUBLAS_OP_N);
        set(what, CUBLASLT_MATMUL_DESC_TRANSB, p.b.order == detail::lt_order::turned ? CUBLAS_OP_T : CUBLAS_OP_N);
        if (p.bias) {
            set(what, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
            set(what, CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
        }
        auto a = layout(p.a, p.m, p.k), b = layout(p.b, p.k, p.n), d = layout(p.d, p.m, p.n);
        const cublasLtMatmulAlgo_t& algorithm = find(p, what, a, b, d);
        const float one = 1, zero = 0;
        const double one_wide = 1, zero_wide = 0;
        const void* alpha = wide ? static_cast<const void*>(&one_wide) : &one;
        const void* beta = wide ? static_cast<const void*>(p.adds ? &one_wide : &zero_wide) : p.adds ? &one : &zero;
        detail::lt_check(cublasLtMatmul(handle_.get(), &what, alpha, p.a.data, &a, p.b.data, &b, beta, p.d.data, &d, p.d.data, &d,
                                        &algorithm, workspace.data_handle(), static_cast<std::size_t>(workspace.extent(0)), ex.stream()),
                         text_of(p));
    }

    /// d becomes zeros.
    void fill_zero(cuda_executor& ex, const detail::lt_product& p)
    {
        const detail::on_device here(ex.device());
        const auto bytes = [&](int64_t n) { return static_cast<std::size_t>(n * p.d.element); };
        detail::cuda_check(cudaMemset2DAsync(p.d.data, bytes(p.d.line), 0, bytes(p.m), static_cast<std::size_t>(p.n), ex.stream()),
                           "cudaMemset2DAsync");
    }

private:
    template <class Value>
    static void set(cublasLtMatmulDescOpaque_t& what, cublasLtMatmulDescAttributes_t name, const Value& value)
    {
        detail::lt_check(cublasLtMatmulDescSetAttribute(&what, name, &value, sizeof value), "cublasLtMatmulDescSetAttribute");
    }

    /// A factor as it lies in memory.
    static cublasLtMatrixLayoutOpaque_t layout(const detail::lt_matrix& x, int64_t rows, int64_t cols)
    {
        if (x.order == detail::lt_order::turned) std::swap(rows, cols);
        cublasLtMatrixLayoutOpaque_t out{};
        detail::lt_check(cublasLtMatrixLayoutInit(&out, x.type, static_cast<std::uint64_t>(rows), static_cast<std::uint64_t>(cols), x.line),
                         "cublasLtMatrixLayoutInit");
        return out;
    }

    static std::string text_of(const detail::lt_product& p)
    {
        std::string out = "cublasLtMatmul of m ";
        out += std::to_string(p.m) + ", n " + std::to_string(p.n) + ", k " + std::to_string(p.k);
        return out;
    }

    /// What an algorithm is chosen by.
    using shape = std::array<int64_t, 16>;

    const cublasLtMatmulAlgo_t& find(const detail::lt_product& p, cublasLtMatmulDescOpaque_t& what, cublasLtMatrixLayoutOpaque_t& a,
                                     cublasLtMatrixLayoutOpaque_t& b, cublasLtMatrixLayoutOpaque_t& d)
    {
        const shape key{p.m, p.n, p.k, p.a.line, p.b.line, p.d.line, p.a.type, p.d.type, int64_t(p.a.order), int64_t(p.b.order),
                        p.a.alignment(), p.b.alignment(), p.d.alignment(), p.bias != nullptr, p.adds,
                        p.bias ? int64_t(reinterpret_cast<std::uintptr_t>(p.bias) % 16) : 0};
        if (const auto known = found_.find(key); known != found_.end()) return known->second;
        cublasLtMatmulPreferenceOpaque_t wishes{};
        detail::lt_check(cublasLtMatmulPreferenceInit(&wishes), "cublasLtMatmulPreferenceInit");
        const auto wish = [&wishes](cublasLtMatmulPreferenceAttributes_t name, const auto& value) {
            detail::lt_check(cublasLtMatmulPreferenceSetAttribute(&wishes, name, &value, sizeof value), "cublasLtMatmulPreferenceSetAttribute");
        };
        wish(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<std::uint64_t>(options_.workspace_bytes));
        wish(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, p.a.alignment());
        wish(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, p.b.alignment());
        wish(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, p.d.alignment());
        wish(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, p.d.alignment());
        cublasLtMatmulHeuristicResult_t result{};
        int results = 0;
        const auto status = cublasLtMatmulAlgoGetHeuristic(handle_.get(), &what, &a, &b, &d, &d, &wishes, 1, &result, &results);
        detail::lt_check(status == CUBLAS_STATUS_SUCCESS && results == 0 ? CUBLAS_STATUS_NOT_SUPPORTED : status, text_of(p));
        if (static_cast<int64_t>(found_.size()) >= options_.algorithms) found_.clear();
        return found_.emplace(key, result.algo).first->second;
    }

    // The pinned memory: offsets (E), addresses (E), counts (E).
    int64_t* offsets() const noexcept { return reinterpret_cast<int64_t*>(groups_.get()); }
    void** addresses() const noexcept { return reinterpret_cast<void**>(groups_.get() + options_.experts * 8); }
    int32_t* counts() const noexcept { return reinterpret_cast<int32_t*>(groups_.get() + options_.experts * 16); }

    struct free_pinned {
        void operator()(std::byte* p) const noexcept { (void)cudaFreeHost(p); }
    };
    struct destroy_handle {
        using pointer = cublasLtHandle_t;
        void operator()(cublasLtHandle_t h) const noexcept { (void)cublasLtDestroy(h); }
    };

    cublaslt_options options_;
    std::unique_ptr<std::byte, free_pinned> groups_;
    std::unique_ptr<cublasLtContext, destroy_handle> handle_;
    std::mutex mutex_;
    std::map<shape, cublasLtMatmulAlgo_t> found_;
};

} // namespace fastmoe::inline FASTMOE_ABI::inline FASTMOE_CUDA_ABI
