// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What gemm::cublaslt keeps between calls: the libraries' handles, the algorithms that it has found, and pinned memory for
/// the groups. The caller owns it. Part of cublaslt.cuh.
#pragma once

#include <array>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include <cublas_v2.h>

#include <fastmoe/cuda/cublaslt_product.cuh>
#include <fastmoe/cuda/cuda_executor.cuh>
#include <fastmoe/gemm/grouped_gemm.hpp>

namespace fastmoe::inline FASTMOE_ABI::inline FASTMOE_CUDA_ABI {

/// How gemm::cublaslt issues the products of the groups.
enum class group_calls : std::uint8_t {
    one_each,   ///< cublasLtMatmul for each group, by the algorithm that cuBLASLt chooses for its shape
    one_for_all ///< cublasGemmGroupedBatchedEx for all that it takes, cublasLtMatmul for each of the others
};

struct cublaslt_options {
    int64_t workspace_bytes = int64_t{32} << 20; ///< of scratch that each product takes from its arena for cuBLASLt
    int64_t experts = 1024;                      ///< the most groups of a product
    int64_t algorithms = 4096;                   ///< the most that are remembered, one a shape; then all are forgotten
    group_calls calls = group_calls::one_each;
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
        detail::cuda_check(cudaMallocHost(&pinned, static_cast<std::size_t>(options.experts * 48)), "cudaMallocHost");
        groups_.reset(static_cast<std::byte*>(pinned));
        cublasLtHandle_t handle = nullptr;
        detail::lt_check(cublasLtCreate(&handle), "cublasLtCreate");
        handle_.reset(handle);
        if (options.calls == group_calls::one_each) return;
        cublasHandle_t blas = nullptr;
        detail::lt_check(cublasCreate(&blas), "cublasCreate");
        blas_.reset(blas);
        cudaEvent_t copied = nullptr;
        detail::cuda_check(cudaEventCreateWithFlags(&copied, cudaEventDisableTiming), "cudaEventCreateWithFlags");
        copied_.reset(copied);
        // Sums of parts of a depth are float as well.
        const int mode = static_cast<int>(CUBLAS_DEFAULT_MATH) | static_cast<int>(CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION);
        detail::lt_check(cublasSetMathMode(blas, static_cast<cublasMath_t>(mode)), "cublasSetMathMode");
    }
    cublaslt_context(const cublaslt_context&) = delete;
    cublaslt_context& operator=(const cublaslt_context&) = delete;

    int64_t workspace_bytes() const noexcept { return options_.workspace_bytes; }
    group_calls calls() const noexcept { return options_.calls; }
    /// How many shapes have an algorithm.
    std::size_t algorithms() const
    {
        const std::lock_guard lock(mutex_);
        return found_.size();
    }

    // -- for gemm::cublaslt and gemm::cublaslt_grouped, which hold the lock that the first two of these return -------

    [[nodiscard]] std::unique_lock<std::mutex> lock() { return std::unique_lock(mutex_); }

    /// Copies counts, offsets and, if there are any, the experts' pointers to the host, and waits for the stream.
    /// @throws invalid_argument if a group does not lie inside of S
    [[nodiscard]] std::unique_lock<std::mutex> read_groups(cuda_executor& ex, const row_groups& groups, const void* pointers)
    {
        const int64_t experts = groups.experts();
        expects(experts <= options_.experts, "experts", experts, "at most options.experts = ", options_.experts);
        std::unique_lock lock(mutex_);
        products_.clear();
        ex.copy(offsets(), groups.offsets.data_handle(), experts * 8);
        ex.copy(counts(), groups.counts.data_handle(), experts * 4);
        if (pointers) ex.copy(addresses(), pointers, experts * 8);
        ex.wait();
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

    /// Of device memory that run() needs for the addresses of as many products.
    int64_t address_count(int64_t experts) const noexcept { return calls() == group_calls::one_for_all ? 3 * experts : 0; }
    /// Remembers a product for run().
    void add(const detail::lt_product& p) { products_.push_back(p); }

    /// Queues the products that were added.
    /// @param workspace  (workspace_bytes)
    /// @param addresses  (address_count)
    void run(cuda_executor& ex, vector_view<std::byte> workspace, vector_view<void*> addresses)
    {
        const detail::on_device here(ex.device());
        together_.clear();
        for (const detail::lt_product& p : products_)
            if (calls() == group_calls::one_for_all && is_groupable(p)) together_.push_back(p);
            else multiply(ex, p, workspace);
        if (!together_.empty()) multiply_together(ex, workspace, addresses);
    }

    /// d becomes zeros.
    void fill_zero(cuda_executor& ex, const detail::lt_product& p)
    {
        const detail::on_device here(ex.device());
        const auto bytes = [&](int64_t n) { return static_cast<std::size_t>(n * p.d.element); };
        detail::cuda_check(cudaMemset2DAsync(p.d.data, bytes(p.d.line), 0, bytes(p.m), static_cast<std::size_t>(p.n), ex.stream()),
                           "cudaMemset2DAsync");
    }

    cublasLtHandle_t handle() const noexcept { return handle_.get(); }

    /// What an algorithm is chosen by.
    using shape = std::array<int64_t, 17>;

    /// The algorithm for a shape: the one that is remembered, or what cuBLASLt answers to `name`. It may not keep parts of sums
    /// in a narrower type than that of the sums.
    /// @param wish  wish(set) adds further preferences by set(attribute, value)
    template <class Wish>
    const cublasLtMatmulAlgo_t& find(const shape& key, const std::string& name, cublasLtMatmulDescOpaque_t& what,
                                     cublasLtMatrixLayoutOpaque_t& a, cublasLtMatrixLayoutOpaque_t& b,
                                     cublasLtMatrixLayoutOpaque_t& d, const Wish& wish)
    {
        if (const auto known = found_.find(key); known != found_.end()) return known->second;
        cublasLtMatmulPreferenceOpaque_t wishes{};
        detail::lt_check(cublasLtMatmulPreferenceInit(&wishes), "cublasLtMatmulPreferenceInit");
        const auto set = [&wishes](cublasLtMatmulPreferenceAttributes_t attribute, const auto& value) {
            detail::lt_check(cublasLtMatmulPreferenceSetAttribute(&wishes, attribute, &value, sizeof value),
                             "cublasLtMatmulPreferenceSetAttribute");
        };
        set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<std::uint64_t>(options_.workspace_bytes));
        set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
        wish(set);
        cublasLtMatmulHeuristicResult_t result{};
        int results = 0;
        const auto status = cublasLtMatmulAlgoGetHeuristic(handle(), &what, &a, &b, &d, &d, &wishes, 1, &result, &results);
        std::string call = "cublasLtMatmulAlgoGetHeuristic of ";
        call += name;
        detail::lt_check(status, call);
        detail::lt_check(results == 0 ? CUBLAS_STATUS_NOT_SUPPORTED : result.state, call);
        if (static_cast<int64_t>(found_.size()) >= options_.algorithms) found_.clear();
        return found_.emplace(key, result.algo).first->second;
    }

    template <class Value>
    static void set(cublasLtMatmulDescOpaque_t& what, cublasLtMatmulDescAttributes_t name, const Value& value)
    {
        detail::lt_check(cublasLtMatmulDescSetAttribute(&what, name, &value, sizeof value), "cublasLtMatmulDescSetAttribute");
    }

private:
    /// Queues a product by itself.
    void multiply(cuda_executor& ex, const detail::lt_product& p, vector_view<std::byte> workspace)
    {
        cublasLtMatmulDescOpaque_t what{};
        detail::lt_check(cublasLtMatmulDescInit(&what, detail::lt_compute(p.a.type), p.a.type == CUDA_R_64F ? CUDA_R_64F : CUDA_R_32F),
                         "cublasLtMatmulDescInit");
        set(what, CUBLASLT_MATMUL_DESC_TRANSA, detail::lt_operation(p.a.order));
        set(what, CUBLASLT_MATMUL_DESC_TRANSB, detail::lt_operation(p.b.order));
        if (p.bias) {
            set(what, CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
            set(what, CUBLASLT_MATMUL_DESC_BIAS_POINTER, p.bias);
        }
        auto a = layout(p.a, p.m, p.k), b = layout(p.b, p.k, p.n), d = layout(p.d, p.m, p.n);
        const shape key{p.m, p.n, p.k, p.a.line, p.b.line, p.d.line, p.a.type, p.d.type, int64_t(p.a.order), int64_t(p.b.order),
                        p.a.alignment(), p.b.alignment(), p.d.alignment(), p.bias != nullptr, p.adds, 0, 0};
        const cublasLtMatmulAlgo_t& algorithm = find(key, p.text(), what, a, b, d, [&p](const auto& wish) {
            wish(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, p.a.alignment());
            wish(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, p.b.alignment());
            wish(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, p.d.alignment());
            wish(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, p.d.alignment());
        });
        const detail::lt_scalar alpha(1), beta(p.adds ? 1 : 0);
        std::string call = "cublasLtMatmul of ";
        call += p.text();
        detail::lt_check(cublasLtMatmul(handle(), &what, alpha.as(p.a.type), p.a.data, &a, p.b.data, &b, beta.as(p.a.type), p.d.data, &d,
                                        p.d.data, &d, &algorithm, workspace.data_handle(), static_cast<std::size_t>(workspace.extent(0)),
                                        ex.stream()),
                         call);
    }

    /// Whether cublasGemmGroupedBatchedEx takes a product: it knows no output that is wider than the factors, and of two-byte
    /// types only addresses that are as aligned as a column of depth k.
    static bool is_groupable(const detail::lt_product& p) noexcept
    {
        if (p.a.type != p.d.type || p.bias) return false;
        if (p.a.element > 2) return true;
        const int64_t depth = p.k * p.a.element;
        const std::uintptr_t bytes = depth % 16 == 0 ? 16 : depth % 4 == 0 ? 4 : 1;
        return p.a.aligned_to(bytes) && p.b.aligned_to(bytes) && p.d.aligned_to(bytes);
    }

    /// Queues the products of `together_` as one call, each as a group of one.
    void multiply_together(cuda_executor& ex, vector_view<std::byte> workspace, vector_view<void*> addresses)
    {
        const auto& all = together_;
        const auto n = static_cast<int64_t>(all.size());
        const cudaDataType_t type = all.front().a.type;
        void** const from = products_of_groups();
        detail::cuda_check(cudaEventSynchronize(copied_.get()), "cudaEventSynchronize"); // what another stream may still be reading
        call_arrays to(static_cast<std::size_t>(n));
        for (std::size_t i = 0; i < all.size(); ++i) {
            const detail::lt_product& p = all[i];
            from[i] = p.a.data, from[static_cast<std::size_t>(n) + i] = p.b.data, from[static_cast<std::size_t>(2 * n) + i] = p.d.data;
            to.turn_a[i] = detail::lt_operation(p.a.order), to.turn_b[i] = detail::lt_operation(p.b.order);
            to.m[i] = p.m, to.n[i] = p.n, to.k[i] = p.k;
            to.line_a[i] = p.a.line, to.line_b[i] = p.b.line, to.line_d[i] = p.d.line;
            to.set_scalars(i, type, p.adds ? 1 : 0);
        }
        void** const a = addresses.data_handle();
        ex.copy(a, from, 3 * n * static_cast<int64_t>(sizeof(void*)));
        detail::cuda_check(cudaEventRecord(copied_.get(), ex.stream()), "cudaEventRecord");
        // In this order: a new stream takes the workspace away.
        detail::lt_check(cublasSetStream(blas_.get(), ex.stream()), "cublasSetStream");
        detail::lt_check(cublasSetWorkspace(blas_.get(), workspace.data_handle(), static_cast<std::size_t>(workspace.extent(0))),
                         "cublasSetWorkspace");
        std::string call = "cublasGemmGroupedBatchedEx of ";
        call += std::to_string(n) + " groups, the first of " + all.front().text();
        detail::lt_check(cublasGemmGroupedBatchedEx_64(blas_.get(), to.turn_a.data(), to.turn_b.data(), to.m.data(), to.n.data(),
                                                       to.k.data(), to.ones.data(), a, type, to.line_a.data(), a + n, type,
                                                       to.line_b.data(), to.sums.data(), a + 2 * n, type, to.line_d.data(), n,
                                                       to.sizes.data(), detail::lt_compute(type)),
                         call);
    }

    /// What cublasGemmGroupedBatchedEx reads on the host, before it returns.
    struct call_arrays {
        std::vector<cublasOperation_t> turn_a, turn_b;
        std::vector<int64_t> m, n, k, line_a, line_b, line_d, sizes;
        std::vector<double> ones, sums; // alpha and beta: floats, where the sums are

        explicit call_arrays(std::size_t groups)
            : turn_a(groups), turn_b(groups), m(groups), n(groups), k(groups), line_a(groups), line_b(groups), line_d(groups),
              sizes(groups, 1), ones(groups), sums(groups)
        {
        }
        void set_scalars(std::size_t i, cudaDataType_t type, double beta)
        {
            const detail::lt_scalar alpha(1), more(beta);
            const std::size_t bytes = type == CUDA_R_64F ? sizeof(double) : sizeof(float);
            std::memcpy(reinterpret_cast<std::byte*>(ones.data()) + i * bytes, alpha.as(type), bytes);
            std::memcpy(reinterpret_cast<std::byte*>(sums.data()) + i * bytes, more.as(type), bytes);
        }
    };

    /// A factor as it lies in memory.
    static cublasLtMatrixLayoutOpaque_t layout(const detail::lt_matrix& x, int64_t rows, int64_t cols)
    {
        if (x.order == detail::lt_order::turned) std::swap(rows, cols);
        cublasLtMatrixLayoutOpaque_t out{};
        detail::lt_check(cublasLtMatrixLayoutInit(&out, x.type, static_cast<std::uint64_t>(rows), static_cast<std::uint64_t>(cols), x.line),
                         "cublasLtMatrixLayoutInit");
        return out;
    }

    // The pinned memory: offsets (E), addresses (E), three addresses for the product of each group, counts (E).
    int64_t* offsets() const noexcept { return reinterpret_cast<int64_t*>(groups_.get()); }
    void** addresses() const noexcept { return reinterpret_cast<void**>(groups_.get() + options_.experts * 8); }
    void** products_of_groups() const noexcept { return addresses() + options_.experts; }
    int32_t* counts() const noexcept { return reinterpret_cast<int32_t*>(groups_.get() + options_.experts * 40); }

    struct free_pinned {
        void operator()(std::byte* p) const noexcept { (void)cudaFreeHost(p); }
    };
    struct destroy_event {
        void operator()(cudaEvent_t e) const noexcept { (void)cudaEventDestroy(e); }
    };
    struct destroy_handle {
        void operator()(cublasLtHandle_t h) const noexcept { (void)cublasLtDestroy(h); }
        void operator()(cublasHandle_t h) const noexcept { (void)cublasDestroy(h); }
    };

    cublaslt_options options_;
    std::unique_ptr<std::byte, free_pinned> groups_;
    std::unique_ptr<std::remove_pointer_t<cublasLtHandle_t>, destroy_handle> handle_;
    std::unique_ptr<std::remove_pointer_t<cublasHandle_t>, destroy_handle> blas_;
    std::unique_ptr<std::remove_pointer_t<cudaEvent_t>, destroy_event> copied_; ///< after the last copy out of products_of_groups()
    mutable std::mutex mutex_;
    std::map<shape, cublasLtMatmulAlgo_t> found_;
    std::vector<detail::lt_product> products_, together_;
};

} // namespace fastmoe::inline FASTMOE_ABI::inline FASTMOE_CUDA_ABI
