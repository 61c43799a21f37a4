// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// gemm::cublaslt without a GPU: its products, a call a group and all in one, over libraries that compute on the host what the
/// descriptors say; how often it asks them, and what it does when they fail.
#include <thread>

#include "cublaslt_cases.hpp"

namespace {

constexpr int64_t workspace = 1024;

fm::cublaslt_options with(fm::group_calls calls) { return {.workspace_bytes = workspace, .experts = 16, .calls = calls}; }

/// Groups of 3, 0, 5 and 5 rows, of width 7 to 4, in float.
struct little_product {
    std::vector<int32_t> counts{3, 0, 5, 5};
    std::vector<int64_t> offsets{0, 3, 3, 8, 13};
    int64_t slots = 13, in = 7, out = 4;
    std::vector<float> x = std::vector<float>(static_cast<std::size_t>(slots * in), 1.0f), w = std::vector<float>(static_cast<std::size_t>(4 * out * in), 2.0f),
                       y = std::vector<float>(static_cast<std::size_t>(slots * out), -1.0f), dw = std::vector<float>(static_cast<std::size_t>(4 * out * in), -1.0f);

    ~little_product() { fake_cuda::of_program().wait(); }

    fm::row_groups groups() const { return {fm::as_vector(counts), fm::as_vector(offsets), slots}; }
    fm::plain_rows<float> rows() const { return {fm::matrix_view<const float>(x.data(), slots, in)}; }
    fm::plain_rows<float> outputs() const { return {fm::matrix_view<const float>(y.data(), slots, out)}; }
    fm::weight_view<const float> weights() const { return {w.data(), nullptr, 4, out, in, out * in, in, 1}; }
    fm::weight_view<float> gradient() { return {dw.data(), nullptr, 4, out, in, out * in, in, 1}; }

    void forward(fm::cuda_executor& ex, const fm::gemm::cublaslt& gemm, fm::matrix_view<const float> bias = {})
    {
        support::in_workspace(ex, [&](fm::arena& memory) {
            try {
                gemm.forward(ex, groups(), rows(), weights(), bias, fm::matrix_view<float>(y.data(), slots, out), fm::no_epilogue{}, memory);
            } catch (...) {
                CHECK(memory.used() == 0);
                throw;
            }
            CHECK(memory.used() == 0);
        });
    }
    void wgrad(fm::cuda_executor& ex, const fm::gemm::cublaslt& gemm)
    {
        support::in_workspace(ex, [&](fm::arena& memory) { gemm.wgrad(ex, groups(), outputs(), rows(), gradient(), fm::write_mode::overwrite, memory); });
    }
    /// Whether y is what forward leaves there.
    bool is_done(fm::cuda_executor& ex) const
    {
        ex.synchronize();
        return std::all_of(y.begin(), y.end(), [](float v) { return v == 14.0f; });
    }
};

} // namespace

TEST_CASE_TEMPLATE("a call a group gives the sums of all three verbs in every storage", Types, types<double, double, double, double>,
                   types<float, float, float, float>, types<fm::bfloat16, fm::bfloat16, fm::bfloat16, fm::bfloat16>,
                   types<fm::half, fm::half, fm::half, fm::half>, types<fm::bfloat16, fm::bfloat16, float, float>,
                   types<fm::half, fm::half, float, float>)
{
    fm::cublaslt_context context(with(fm::group_calls::one_each));
    check_products<Types>(fm::gemm::cublaslt{&context}, 1, lt_shapes());
    CHECK(fake_cuda::of_program().calls["cublasLtMatmul"] > 0);
    CHECK(fake_cuda::of_program().calls["cublasGemmGroupedBatchedEx"] == 0);
}

TEST_CASE_TEMPLATE("one call for all groups gives the sums of all three verbs in every storage", Types, types<double, double, double, double>,
                   types<float, float, float, float>, types<fm::bfloat16, fm::bfloat16, fm::bfloat16, fm::bfloat16>,
                   types<fm::half, fm::half, fm::half, fm::half>, types<fm::bfloat16, fm::bfloat16, float, float>)
{
    fm::cublaslt_context context(with(fm::group_calls::one_for_all));
    check_products<Types>(fm::gemm::cublaslt{&context}, 2, lt_shapes());
    // Not into a wider type.
    CHECK((fake_cuda::of_program().calls["cublasGemmGroupedBatchedEx"] > 0) == std::is_same_v<typename Types::X, typename Types::Y>);
}

TEST_CASE("types that cuBLAS does not multiply, and a bias of another, go to gemm::portable")
{
    fm::cublaslt_context context(with(fm::group_calls::one_each));
    check_products<types<float, fm::bfloat16, float, double>>(fm::gemm::cublaslt{&context}, 3, {{{3, 0, 9}, 8, 16}});
    CHECK(fake_cuda::of_program().calls["cublasLtMatmul"] == 0);
    fake_cuda& cuda = fresh_cuda();
    FASTMOE_SEEDED(r, 4);
    fm::cuda_executor ex;
    lt_case<types<fm::half, fm::half, float, fm::half>>(r, {{3, 0, 9}, 8, 16}, weight_storage::stacked, start::aligned)
        .check_forward(ex, fm::gemm::cublaslt{&context});
    CHECK(cuda.calls["cublasLtMatmul"] == 2); // the two groups of the product without a bias
}

TEST_CASE("an algorithm is asked for once a shape, and all are forgotten when there are too many")
{
    fm::cublaslt_context context({.workspace_bytes = workspace, .experts = 16, .algorithms = 3});
    const fm::gemm::cublaslt gemm{&context};
    fake_cuda& cuda = fresh_cuda();
    fm::cuda_executor ex;
    little_product p;
    p.forward(ex, gemm);
    CHECK(cuda.calls["cublasLtMatmul"] == 3); // no call for the empty group
    CHECK(cuda.calls["cublasLtMatmulAlgoGetHeuristic"] == static_cast<int>(context.algorithms()));
    const int asked = cuda.calls["cublasLtMatmulAlgoGetHeuristic"];
    CHECK(asked >= 2); // 3 rows and 5, which may begin at addresses of two kinds
    CHECK(asked <= 3);
    p.forward(ex, gemm);
    CHECK(cuda.calls["cublasLtMatmul"] == 6);
    CHECK(cuda.calls["cublasLtMatmulAlgoGetHeuristic"] == asked);
    p.wgrad(ex, gemm); // other shapes: there is no room for them beside the first
    CHECK(cuda.calls["cublasLtMatmulAlgoGetHeuristic"] > asked);
    CHECK(context.algorithms() <= 3);
    p.forward(ex, gemm);
    CHECK(p.is_done(ex));
    CHECK(complaint_of(cuda) == "");
}

TEST_CASE("all groups with rows are one call, which knows nothing of the others")
{
    fm::cublaslt_context context(with(fm::group_calls::one_for_all));
    const fm::gemm::cublaslt gemm{&context};
    fake_cuda& cuda = fresh_cuda();
    fm::cuda_executor ex;
    little_product p;
    p.forward(ex, gemm);
    CHECK(cuda.calls["cublasGemmGroupedBatchedEx"] == 1);
    CHECK(p.is_done(ex));
    p.wgrad(ex, gemm);
    CHECK(cuda.calls["cublasGemmGroupedBatchedEx"] == 2);
    CHECK(cuda.calls["cublasLtMatmul"] == 0);
    CHECK(cuda.calls["cudaMemset2DAsync"] == 1);
    p.counts.assign(4, 0);
    p.forward(ex, gemm);
    CHECK(cuda.calls["cublasGemmGroupedBatchedEx"] == 2);
    CHECK(complaint_of(cuda) == "");
}

TEST_CASE("of two-byte types, groups at addresses that cuBLAS does not take are products of their own")
{
    fm::cublaslt_context context(with(fm::group_calls::one_for_all));
    fake_cuda& cuda = fresh_cuda();
    FASTMOE_SEEDED(r, 5);
    fm::cuda_executor ex;
    // Of depth 16 and width 4: the second group's outputs begin 8 bytes after a place that 16 divide.
    const lt_case<types<fm::half, fm::half, fm::half, fm::half>> p(r, {{3, 2}, 4, 16}, weight_storage::stacked, start::aligned);
    p.check_forward(ex, fm::gemm::cublaslt{&context});
    CHECK(cuda.calls["cublasLtMatmul"] > 0);
    CHECK(complaint_of(cuda) == "");
}

TEST_CASE("products that are queued behind each other do not write into each other's addresses")
{
    fm::cublaslt_context context(with(fm::group_calls::one_for_all));
    const fm::gemm::cublaslt gemm{&context};
    fake_cuda& cuda = fresh_cuda();
    fm::cuda_executor ex;
    little_product first, second;
    fm::arena measure;
    gemm.forward(ex, first.groups(), first.rows(), first.weights(), fm::matrix_view<const float>{}, fm::matrix_view<float>(nullptr, 13, 4), fm::no_epilogue{},
                 measure);
    support::workspace a(ex, measure.bytes()), b(ex, measure.bytes());
    for (auto* p : {&first, &second})
        gemm.forward(ex, p->groups(), p->rows(), p->weights(), fm::matrix_view<const float>{}, fm::matrix_view<float>(p->y.data(), 13, 4), fm::no_epilogue{},
                     p == &first ? a : b);
    CHECK(first.is_done(ex));
    CHECK(second.is_done(ex));
    CHECK(complaint_of(cuda) == "");
}

TEST_CASE("a call that fails is a cuda_error with its name and status, leaves the workspace, and the next call works")
{
    struct failure {
        const char* function;
        cublasStatus_t status;
        const char* text;
        fm::group_calls calls = fm::group_calls::one_each;
    };
    for (const failure& f : std::vector<failure>{
             {"cublasLtMatmul", CUBLAS_STATUS_EXECUTION_FAILED, "cublasLtMatmul of m 4, n 3, k 7 failed: CUBLAS_STATUS_EXECUTION_FAILED"},
             {"cublasLtMatmulAlgoGetHeuristic", CUBLAS_STATUS_NOT_SUPPORTED,
              "cublasLtMatmulAlgoGetHeuristic of m 4, n 3, k 7 failed: CUBLAS_STATUS_NOT_SUPPORTED"},
             {"cublasLtMatmulDescInit", CUBLAS_STATUS_INVALID_VALUE, "cublasLtMatmulDescInit failed: CUBLAS_STATUS_INVALID_VALUE"},
             {"cublasLtMatmulDescSetAttribute", CUBLAS_STATUS_INVALID_VALUE, "cublasLtMatmulDescSetAttribute failed"},
             {"cublasLtMatrixLayoutInit", CUBLAS_STATUS_INVALID_VALUE, "cublasLtMatrixLayoutInit failed"},
             {"cublasLtMatmulPreferenceInit", CUBLAS_STATUS_INVALID_VALUE, "cublasLtMatmulPreferenceInit failed"},
             {"cublasLtMatmulPreferenceSetAttribute", CUBLAS_STATUS_INVALID_VALUE, "cublasLtMatmulPreferenceSetAttribute failed"},
             {"cublasGemmGroupedBatchedEx", CUBLAS_STATUS_NOT_SUPPORTED,
              "cublasGemmGroupedBatchedEx of 3 groups, the first of m 4, n 3, k 7 failed: CUBLAS_STATUS_NOT_SUPPORTED", fm::group_calls::one_for_all},
             {"cublasSetStream", CUBLAS_STATUS_NOT_INITIALIZED, "cublasSetStream failed: CUBLAS_STATUS_NOT_INITIALIZED", fm::group_calls::one_for_all},
             {"cublasSetWorkspace", CUBLAS_STATUS_INVALID_VALUE, "cublasSetWorkspace failed", fm::group_calls::one_for_all},
         }) {
        CAPTURE(f.function);
        fm::cublaslt_context context(with(f.calls));
        const fm::gemm::cublaslt gemm{&context};
        fake_cuda& cuda = fresh_cuda();
        fm::cuda_executor ex;
        little_product p;
        cuda.fail(f.function, f.status);
        CHECK(has(text_thrown<fm::cuda_error>([&] { p.forward(ex, gemm); }), f.text));
        p.forward(ex, gemm);
        CHECK(p.is_done(ex));
    }
}

TEST_CASE("a failure after the first products does not queue those again")
{
    fm::cublaslt_context context(with(fm::group_calls::one_each));
    const fm::gemm::cublaslt gemm{&context};
    fake_cuda& cuda = fresh_cuda();
    fm::cuda_executor ex;
    little_product p;
    cuda.fail("cublasLtMatmul", CUBLAS_STATUS_EXECUTION_FAILED, 2);
    CHECK_THROWS_AS(p.forward(ex, gemm), fm::cuda_error);
    CHECK(cuda.calls["cublasLtMatmul"] == 2);
    p.forward(ex, gemm);
    CHECK(cuda.calls["cublasLtMatmul"] == 5);
}

TEST_CASE("a shape that cuBLASLt has no algorithm for is named")
{
    fm::cublaslt_context context(with(fm::group_calls::one_each));
    const fm::gemm::cublaslt gemm{&context};
    fake_cuda& cuda = fresh_cuda();
    fm::cuda_executor ex;
    little_product p;
    cuda.has_no_algorithm = true;
    const std::string text = text_thrown<fm::cuda_error>([&] { p.forward(ex, gemm); });
    cuda.has_no_algorithm = false;
    CHECK(has(text, "m 4, n 3, k 7 failed: CUBLAS_STATUS_NOT_SUPPORTED"));
    CHECK(context.algorithms() == 0);
    p.forward(ex, gemm);
    CHECK(p.is_done(ex));
}

TEST_CASE("memory that cannot be had is out_of_memory, wherever it is missing, and nothing leaks")
{
    fake_cuda& cuda = fresh_cuda();
    const std::size_t pinned = cuda.pinned.size();
    const auto make = [] { const fm::cublaslt_context context(with(fm::group_calls::one_for_all)); };
    cuda.fail("cudaMallocHost", cudaErrorMemoryAllocation);
    CHECK(has(text_thrown<fm::out_of_memory>(make), "cudaMallocHost failed: cudaErrorMemoryAllocation"));
    cuda.fail("cublasLtCreate", CUBLAS_STATUS_ALLOC_FAILED);
    CHECK(has(text_thrown<fm::out_of_memory>(make), "cublasLtCreate failed: CUBLAS_STATUS_ALLOC_FAILED"));
    cuda.fail("cublasCreate", CUBLAS_STATUS_ALLOC_FAILED);
    CHECK(has(text_thrown<fm::out_of_memory>(make), "cublasCreate failed: CUBLAS_STATUS_ALLOC_FAILED"));
    cuda.fail("cublasSetMathMode", CUBLAS_STATUS_NOT_INITIALIZED);
    CHECK(has(text_thrown<fm::cuda_error>(make), "cublasSetMathMode failed: CUBLAS_STATUS_NOT_INITIALIZED"));
    CHECK(cuda.calls["cublasLtDestroy"] == 2); // of the two contexts that had got a handle
    CHECK(cuda.calls["cublasDestroy"] == 1);
    CHECK(cuda.pinned.size() == pinned);

    fm::cublaslt_context context(with(fm::group_calls::one_for_all));
    const fm::gemm::cublaslt gemm{&context};
    fm::cuda_executor ex;
    little_product p;
    fm::arena none{fm::vector_view<std::byte>(nullptr, 0)};
    CHECK_THROWS_AS(gemm.forward(ex, p.groups(), p.rows(), p.weights(), fm::matrix_view<const float>{}, fm::matrix_view<float>(p.y.data(), 13, 4), fm::no_epilogue{}, none),
                    fm::out_of_memory);
    ex.synchronize();
    CHECK(p.y == std::vector<float>(p.y.size(), -1.0f));
}

TEST_CASE("a group outside of S, too many experts, and no context are refused before anything is written")
{
    fm::cublaslt_context context(with(fm::group_calls::one_each)), three({.workspace_bytes = workspace, .experts = 3});
    fake_cuda& cuda = fresh_cuda();
    fm::cuda_executor ex;
    little_product p;
    CHECK(has(text_thrown<fm::invalid_argument>([&] { p.forward(ex, {&three}); }), "experts is 4; expected at most options.experts = 3"));
    CHECK(has(text_thrown<fm::invalid_argument>([&] { p.forward(ex, {}); }), "gemm.context is a null pointer"));
    p.offsets[2] = 11;
    CHECK(has(text_thrown<fm::invalid_argument>([&] { p.forward(ex, {&context}); }), "offsets(e)"));
    ex.synchronize();
    CHECK(p.y == std::vector<float>(p.y.size(), -1.0f));
    CHECK(cuda.calls["cublasLtMatmul"] == 0);
    CHECK_THROWS_AS(fm::cublaslt_context({.workspace_bytes = -1}), fm::invalid_argument);
    CHECK_THROWS_AS(fm::cublaslt_context({.experts = 0}), fm::invalid_argument);
    CHECK_THROWS_AS(fm::cublaslt_context({.algorithms = 0}), fm::invalid_argument);
}

TEST_CASE("a stream that is captured cannot be waited for, and the product says so")
{
    fm::cublaslt_context context(with(fm::group_calls::one_each));
    fake_cuda& cuda = fresh_cuda();
    fm::cuda_executor ex;
    little_product p;
    cuda.capturing = true;
    const std::string text = text_thrown<fm::cuda_error>([&] { p.forward(ex, {&context}); });
    cuda.capturing = false;
    cuda.replay(); // what was freed meanwhile
    cuda.graph.clear();
    CHECK(has(text, "cudaStreamSynchronize failed"));
}

TEST_CASE("threads that share a context take turns")
{
    fm::cublaslt_context context(with(fm::group_calls::one_for_all));
    fresh_cuda();
    std::vector<int> done(3);
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t)
        threads.emplace_back([&, t] {
            fm::cuda_executor ex;
            bool all = true;
            for (int i = 0; i < 20; ++i) {
                little_product p;
                p.forward(ex, {&context});
                all = all && p.is_done(ex);
            }
            done[static_cast<std::size_t>(t)] = all;
        });
    for (std::thread& t : threads) t.join();
    CHECK(done == std::vector<int>(3, 1));
    CHECK(complaint_of(fake_cuda::of_program()) == "");
}
