// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The products of gemm::hopper on experts of one size, each beside a dense product of cuBLASLt with as many operations.
#include <vector>

#include <fastmoe/cuda/cublaslt.cuh>
#include <fastmoe/gemm/hopper.hpp>

#include "bench_parts.cuh"

namespace timing {
namespace {

/// Groups of `each` rows.
struct equal_groups {
    fm::buffer<std::int32_t, fm::cuda_executor> counts;
    fm::buffer<int64_t, fm::cuda_executor> offsets;

    struct fill {
        std::int32_t* counts;
        int64_t* offsets;
        int64_t experts, each;
        FASTMOE_HOST_DEVICE void operator()(int64_t e) const
        {
            if (e < experts) counts[e] = static_cast<std::int32_t>(each);
            offsets[e] = e * each;
        }
    };
    equal_groups(fm::cuda_executor& ex, int64_t experts, int64_t each) : counts(ex, experts), offsets(ex, experts + 1)
    {
        fm::for_each(ex, experts + 1, fill{counts.data(), offsets.data(), experts, each});
    }
    fm::row_groups view(int64_t slots) const { return {counts.view(), offsets.view(), slots}; }
};

/// Forward, dgrad and wgrad of W (E,out,in) over S rows in groups of one size: the times of each.
template <class Gemm>
std::vector<double> times_of(fm::cuda_executor& ex, const Gemm& gemm, int64_t rows, int64_t experts, int64_t out, int64_t in)
{
    const auto x = random_values(ex, rows * in), dy = random_values(ex, rows * out), w = random_values(ex, experts * out * in, 0.05f);
    fm::buffer<bfloat16, fm::cuda_executor> result(ex, rows * (in > out ? in : out)), dw(ex, experts * out * in);
    const equal_groups of(ex, experts, rows / experts);
    const fm::row_groups groups = of.view(rows);
    const fm::plain_rows<bfloat16> xs{fm::matrix_view<const bfloat16>(x.data(), rows, in)}, dys{fm::matrix_view<const bfloat16>(dy.data(), rows, out)};
    const auto weights = fm::stacked(fm::tensor_view<const bfloat16, 3>(w.data(), experts, out, in));
    const auto gradients = fm::stacked(fm::tensor_view<bfloat16, 3>(dw.data(), experts, out, in));
    const auto time = [&](const auto& body) {
        fm::arena query;
        body(query);
        fm::buffer<std::byte, fm::cuda_executor> memory(ex, query.bytes());
        return milliseconds_of(ex, 10, [&] {
            fm::arena a(memory.view());
            body(a);
        });
    };
    return {time([&](fm::arena& a) {
                gemm.forward(ex, groups, xs, weights, fm::matrix_view<const bfloat16>{}, result.matrix(rows, out), fm::no_epilogue{}, a);
            }),
            time([&](fm::arena& a) { gemm.dgrad(ex, groups, dys, weights, result.matrix(rows, in), fm::no_epilogue{}, a); }),
            time([&](fm::arena& a) { gemm.wgrad(ex, groups, dys, xs, gradients, fm::write_mode::overwrite, a); })};
}

} // namespace

void bench_products(fm::cuda_executor& ex, figures& out)
{
    if (!runs_hopper(ex)) return;
    fm::cublaslt_context context;
    for (const shape& s : published) {
        const int64_t rows = s.tokens * s.k;
        for (const bool up : {true, false}) {
            const int64_t n = up ? 2 * s.hidden : s.width, k = up ? s.width : s.hidden;
            const auto grouped = times_of(ex, fm::gemm::hopper{}, rows, s.experts, n, k), dense = times_of(ex, fm::gemm::cublaslt{&context}, rows, 1, n, k);
            const char* const verbs[] = {"forward", "dgrad", "wgrad"};
            const double operations = 2.0 * static_cast<double>(rows) * static_cast<double>(n * k);
            for (std::size_t v = 0; v < 3; ++v) {
                const std::string name = s.name() + (up ? " up " : " down ") + verbs[v];
                out.add(name + ", hopper", grouped[v], 0, operations);
                out.add(name + ", dense by cublaslt", dense[v], 0, operations);
                out.claim(name + ": speed / dense", dense[v] / grouped[v], wanted::at_least, 0.90);
            }
        }
    }
}

} // namespace timing
