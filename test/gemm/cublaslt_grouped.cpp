// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// gemm::cublaslt_grouped without a GPU, and with toolkits that do not have its functions, which are declared here as cuBLAS
/// 13.4 declares them: its products, what it leaves to others, and that it can be captured and replayed with other groups.
#include "support/fake_cuda.hpp"

#include "support/cublaslt_13_4.hpp"

#include "cublaslt_cases.hpp"

#include <fastmoe/cuda/cublaslt_grouped.cuh>

namespace {

constexpr int64_t workspace = 1024;

using fm::bfloat16;
using bf16 = types<bfloat16, bfloat16, bfloat16, bfloat16>;

static_assert(!fm::gemm::cublaslt_grouped::needs_host_counts);

} // namespace

TEST_CASE_TEMPLATE("one grouped product gives the sums of all three verbs in every storage", Types, bf16,
                   types<fm::half, fm::half, fm::half, fm::half>, types<bfloat16, bfloat16, float, float>, types<fm::half, fm::half, float, float>)
{
    fm::cublaslt_context context({.workspace_bytes = workspace});
    check_products<Types>(fm::gemm::cublaslt_grouped{&context}, 11, lt_shapes());
    fake_cuda& cuda = fake_cuda::of_program();
    CHECK(cuda.calls["cublasLtMatmul"] > 0);
    CHECK(cuda.calls["cublasLtMatrixLayoutInit"] == 0);
}

TEST_CASE_TEMPLATE("types that a grouped product does not take go to gemm::portable", Types, types<float, float, float, float>,
                   types<double, double, double, double>)
{
    fm::cublaslt_context context({.workspace_bytes = workspace});
    check_products<Types>(fm::gemm::cublaslt_grouped{&context}, 12, {{{8, 1, 0, 24}, 24, 40}});
    CHECK(fake_cuda::of_program().calls["cublasLtMatmul"] == 0);
}

TEST_CASE("a product is one call where 16 bytes divide what they must, and none elsewhere")
{
    fm::cublaslt_context context({.workspace_bytes = workspace});
    const fm::gemm::cublaslt_grouped gemm{&context};
    FASTMOE_SEEDED(r, 13);
    const auto calls = [&](int64_t out, int64_t in, weight_storage storage, start begin) {
        const lt_case<bf16> one(r, {{3, 0, 9}, out, in}, storage, begin);
        fake_cuda& cuda = fresh_cuda();
        fm::cuda_executor ex;
        one.check_dgrad(ex, gemm);
        CHECK(complaint_of(cuda) == "");
        return cuda.calls["cublasLtMatmul"];
    };
    for (const weight_storage storage : {weight_storage::stacked, weight_storage::padded, weight_storage::transposed, weight_storage::pointers})
        CHECK(calls(16, 24, storage, start::aligned) == 2);
    CHECK(calls(16, 20, weight_storage::stacked, start::aligned) == 0);
    CHECK(calls(12, 24, weight_storage::stacked, start::aligned) == 0);
    CHECK(calls(16, 24, weight_storage::stacked, start::odd) == 0);
    CHECK(calls(16, 24, weight_storage::padded, start::odd) == 0);

    // Matrices that begin where 16 bytes divide, of lines that do not.
    const lt_case<bf16> one(r, {{3, 0, 9}, 16, 24}, weight_storage::stacked, start::aligned);
    const auto calls_of = [&](int64_t row_stride, int64_t expert_stride) {
        std::vector<bfloat16> w(static_cast<std::size_t>(3 * expert_stride), bfloat16(1.0f)), dx(static_cast<std::size_t>(one.g.slots * 24));
        fake_cuda& cuda = fresh_cuda();
        fm::cuda_executor ex;
        support::in_workspace(ex, [&](fm::arena& memory) {
            gemm.dgrad(ex, one.g.view(), one.dy.plain(), fm::weight_view<const bfloat16>{w.data(), nullptr, 3, 16, 24, expert_stride, row_stride, 1},
                       fm::matrix_view<bfloat16>(dx.data(), one.g.slots, 24), fm::no_epilogue{}, memory);
        });
        ex.synchronize();
        CHECK(complaint_of(cuda) == "");
        return cuda.calls["cublasLtMatmul"];
    };
    CHECK(calls_of(32, 512) == 1);
    CHECK(calls_of(28, 512) == 0);
    CHECK(calls_of(32, 516) == 0);
}

TEST_CASE("an algorithm is asked for once a shape and power of two of its rows")
{
    fm::cublaslt_context context({.workspace_bytes = workspace});
    const fm::gemm::cublaslt_grouped gemm{&context};
    FASTMOE_SEEDED(r, 14);
    fake_cuda& cuda = fresh_cuda();
    fm::cuda_executor ex;
    const auto ask = [&](std::vector<int32_t> counts) {
        const lt_case<bf16> one(r, {std::move(counts), 16, 24}, weight_storage::stacked, start::aligned);
        one.check_dgrad(ex, gemm);
        return std::pair(cuda.calls["cublasLtMatmulAlgoGetHeuristic"], static_cast<int>(context.algorithms()));
    };
    CHECK(ask({20, 0, 30}) == std::pair(1, 1));
    CHECK(ask({2, 40, 9}) == std::pair(1, 1));
    CHECK(ask({200, 40, 9}) == std::pair(2, 2));
    CHECK(ask({20, 0, 30}) == std::pair(2, 2));
}

TEST_CASE("a captured product is replayed with the groups of that time, and waits for nothing")
{
    fm::cublaslt_context context({.workspace_bytes = workspace});
    const fm::gemm::cublaslt_grouped gemm{&context};
    fake_cuda& cuda = fresh_cuda();
    constexpr int64_t slots = 12, experts = 3, out = 8, in = 16;
    std::vector<int32_t> counts(experts);
    std::vector<int64_t> offsets(experts + 1);
    std::vector<bfloat16> x(slots * in, bfloat16(1.0f)), w(experts * out * in), y(slots * out), bias(experts * out), dw(w.size());
    for (std::size_t i = 0; i < w.size(); ++i) w[i] = bfloat16(static_cast<float>(i / (out * in) + 1)); // expert e: e + 1
    for (std::size_t i = 0; i < bias.size(); ++i) bias[i] = bfloat16(100.0f);
    const fm::row_groups groups{fm::as_vector(counts), fm::as_vector(offsets), slots};
    const fm::plain_rows<bfloat16> rows{fm::matrix_view<const bfloat16>(x.data(), slots, in)};
    const fm::plain_rows<bfloat16> outputs{fm::matrix_view<const bfloat16>(y.data(), slots, out)};
    const fm::weight_view<bfloat16> weights{w.data(), nullptr, experts, out, in, out * in, in, 1}, gradient{dw.data(), nullptr, experts, out, in, out * in, in, 1};
    const auto step = [&](fm::cuda_executor& ex, fm::arena& memory) {
        gemm.forward(ex, groups, rows, weights, fm::matrix_view<const bfloat16>(bias.data(), experts, out), fm::matrix_view<bfloat16>(y.data(), slots, out),
                     fm::no_epilogue{}, memory);
        gemm.wgrad(ex, groups, outputs, rows, gradient, fm::write_mode::overwrite, memory);
    };
    fm::cuda_executor ex;
    fm::arena measure;
    step(ex, measure);
    support::workspace memory(ex, measure.bytes());
    ex.synchronize();
    const int waits = cuda.calls["cudaStreamSynchronize"], allocations = cuda.calls["cudaMallocFromPoolAsync"];
    cuda.capturing = true;
    step(ex, memory);
    cuda.capturing = false;
    CHECK(cuda.calls["cudaStreamSynchronize"] == waits);
    CHECK(cuda.calls["cudaMallocFromPoolAsync"] == allocations);
    for (const std::vector<int32_t>& now : {std::vector<int32_t>{5, 0, 7}, {0, 12, 0}, {0, 0, 0}, {4, 4, 4}}) {
        counts = now;
        for (std::size_t e = 0; e < 3; ++e) offsets[e + 1] = offsets[e] + counts[e];
        y.assign(y.size(), bfloat16(-1.0f));
        dw.assign(dw.size(), bfloat16(-1.0f));
        cuda.replay();
        ex.synchronize();
        std::vector<float> expected, expected_gradient, got, got_gradient;
        for (std::size_t e = 0; e < 3; ++e) {
            const float value = 100 + 16 * static_cast<float>(e + 1);
            expected.insert(expected.end(), static_cast<std::size_t>(counts[e] * out), value);
            expected_gradient.insert(expected_gradient.end(), out * in, static_cast<float>(bfloat16(value * static_cast<float>(counts[e]))));
        }
        expected.resize(y.size(), -1.0f);
        for (const bfloat16 v : y) got.push_back(static_cast<float>(v));
        for (const bfloat16 v : dw) got_gradient.push_back(static_cast<float>(v));
        CHECK(got == expected);
        CHECK(got_gradient == expected_gradient);
    }
    cuda.graph.clear();
    CHECK(complaint_of(cuda) == "");
}

TEST_CASE("a group outside of S is a fault, and computed as if it were empty")
{
    fm::cublaslt_context context({.workspace_bytes = workspace});
    const fm::gemm::cublaslt_grouped gemm{&context};
    FASTMOE_SEEDED(r, 15);
    fresh_cuda();
    lt_case<bf16> one(r, {{4, 3}, 8, 16}, weight_storage::stacked, start::aligned);
    one.g.counts[1] = 1000;
    std::vector<bfloat16> dw(2 * 8 * 16, bfloat16(-1.0f)), y(static_cast<std::size_t>(one.g.slots * 8), bfloat16(-1.0f));
    fm::cuda_executor ex;
    support::in_workspace(ex, [&](fm::arena& memory) {
        gemm.wgrad(ex, one.g.view(), one.dy.plain(), one.x.plain(), fm::weight_view<bfloat16>{dw.data(), nullptr, 2, 8, 16, 128, 16, 1}, fm::write_mode::overwrite,
                   memory);
    });
    CHECK(has(text_thrown<fm::invalid_argument>([&] { ex.synchronize(); }), "counts(1) is 1000; expected a group inside of the S rows"));
    CHECK(std::all_of(dw.begin() + 128, dw.end(), [](bfloat16 v) { return static_cast<float>(v) == 0.0f; }));
    support::in_workspace(ex, [&](fm::arena& memory) {
        gemm.forward(ex, one.g.view(), one.x.plain(), one.weights(), fm::matrix_view<const bfloat16>{}, fm::matrix_view<bfloat16>(y.data(), one.g.slots, 8),
                     fm::no_epilogue{}, memory);
    });
    CHECK_THROWS_AS(ex.synchronize(), fm::invalid_argument);
    CHECK(std::all_of(y.begin() + one.g.offsets[1] * 8, y.end(), [](bfloat16 v) { return static_cast<float>(v) == -1.0f; }));
}

TEST_CASE("a call that fails is a cuda_error with its name and status, and the next call works")
{
    fm::cublaslt_context context({.workspace_bytes = workspace});
    const fm::gemm::cublaslt_grouped gemm{&context};
    FASTMOE_SEEDED(r, 16);
    const lt_case<bf16> one(r, {{4, 0, 8}, 8, 16}, weight_storage::stacked, start::aligned);
    fake_cuda& cuda = fresh_cuda();
    std::vector<bfloat16> y(static_cast<std::size_t>(one.g.slots * 8)); // outlives what was queued when a call failed
    fm::cuda_executor ex;
    const auto forward = [&](const fm::gemm::cublaslt_grouped& by) {
        support::in_workspace(ex, [&](fm::arena& memory) {
            by.forward(ex, one.g.view(), one.x.plain(), one.weights(), fm::matrix_view<const bfloat16>(one.bias.data(), 3, 8),
                       fm::matrix_view<bfloat16>(y.data(), one.g.slots, 8), fm::no_epilogue{}, memory);
        });
    };
    const auto name_of = [&](const char* function, cublasStatus_t status) {
        cuda.fail(function, status);
        const std::string text = text_thrown<fm::cuda_error>([&] { forward(gemm); });
        ex.synchronize();
        return text;
    };
    CHECK(has(name_of("cublasLtMatmul", CUBLAS_STATUS_EXECUTION_FAILED), "cublasLtMatmul of 3 groups of about m 8, n "));
    CHECK(has(name_of("cublasLtGroupedMatrixLayoutInit", CUBLAS_STATUS_INVALID_VALUE), "cublasLtGroupedMatrixLayoutInit failed: CUBLAS_STATUS_INVALID_VALUE"));
    CHECK(has(name_of("cublasLtMatrixLayoutSetAttribute", CUBLAS_STATUS_INVALID_VALUE), "cublasLtMatrixLayoutSetAttribute failed"));
    fm::cublaslt_context other({.workspace_bytes = workspace});
    cuda.has_no_algorithm = true;
    CHECK(has(text_thrown<fm::cuda_error>([&] { forward({&other}); }), "failed: CUBLAS_STATUS_NOT_SUPPORTED"));
    cuda.has_no_algorithm = false;
    CHECK(has(text_thrown<fm::invalid_argument>([&] { forward({}); }), "gemm.context is a null pointer"));
    one.check_forward(ex, gemm);
    CHECK(complaint_of(cuda) == "");
}
