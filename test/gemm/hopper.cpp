// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The products of gemm::hopper, run an instruction at a time without a GPU, against sums in double.
#include <fastmoe/gemm/hopper.hpp>

#include "block_cases.hpp"
#if !defined(FASTMOE_TEST_CUDA)
#include "support/fiber_clusters.hpp"
#endif

namespace {

#if defined(FASTMOE_TEST_CUDA) // nvcc takes no fibers: the GPU alone
using clusters = fm::cuda_executor;
#else
using clusters = support::fiber_clusters<support::lanes>;
#endif
static_assert(fm::executor<clusters> && fm::runs_clusters<clusters>);

using fm::gemm::hopper_product;
using fm::gemm::hopper_schedule;
using fm::gemm::hopper_tuning;

/// One way of cutting for all products.
template <hopper_tuning of_rows, hopper_tuning of_gradients = fm::gemm::hopper_default(hopper_product::gradients, false)>
struct always {
    static constexpr hopper_tuning of(hopper_product product, bool) noexcept
    {
        return product == hopper_product::gradients ? of_gradients : of_rows;
    }
};

/// Rows and matrices of whole 16 bytes.
std::vector<shape> whole_shapes(support::random& r)
{
    std::vector<shape> out;
    out.push_back({{4, 12}, 8, 8});
    out.push_back({{0, 0, 0}, 16, 8});
    out.push_back({{127, 128, 129, 0, 1}, 136, 72});
    out.push_back({{16, 1, 40}, 264, 64});
    out.push_back({{300}, 24, 200});
    out.push_back({support::random_counts(r, 5, 150), 8 * r.integer(1, 40), 8 * r.integer(1, 40)});
    out.push_back({support::random_counts(r, 12, 20), 8 * r.integer(1, 20), 8 * r.integer(1, 20)});
    return out;
}

#if defined(FASTMOE_TEST_CUDA)
/// One of the kernels, to ask whether they are there.
using first_kernel = fm::detail::hopper::multiply_tiles<
    fm::detail::hopper::gradient_product<fm::gemm::hopper_default(hopper_product::gradients, false), fm::plain_rows<bfloat16>, fm::plain_rows<bfloat16>, float>>;
#endif

/// All of them, or every third, in every storage that boxes can bring. The instructions that ran are warpgroups' own.
template <class T, class Y, class Gemm>
void check_whole(unsigned seed, const Gemm& gemm, std::size_t each = 3)
{
    FASTMOE_SEEDED(r, seed);
    const std::vector<shape> shapes = whole_shapes(r);
    std::size_t turn = 0;
    for (const weight_storage storage : {weight_storage::stacked, weight_storage::padded, weight_storage::transposed}) {
#if defined(FASTMOE_TEST_CUDA)
        clusters ex;
        if (!ex.has_clusters<first_kernel>()) FASTMOE_SKIP("the device is not of compute capability 9.0, or the code not for sm_90a");
#else
        clusters ex(r.integer(1, 4), static_cast<unsigned>(r.integer(1, 1000)));
#endif
        for (std::size_t i = turn++; i < shapes.size(); i += each) check_products<T, T, Y>(r, shapes[i], ex, gemm, storage, support::start::aligned);
#if !defined(FASTMOE_TEST_CUDA)
        CHECK(ex.products > 100);
        CHECK(ex.box_bytes > 0);
#endif
    }
}


} // namespace

TEST_CASE_TEMPLATE("forward, dgrad and wgrad are their sums, whatever lies how", T, bfloat16, fm::half)
{
    FASTMOE_SEEDED(r, 51);
#if defined(FASTMOE_TEST_CUDA)
    if (!support::cell<fm::cuda_executor, T>::available()) FASTMOE_SKIP("no device");
#endif
    clusters ex;
    for (const shape& c : block_shapes(r)) check_products<T, T, T>(r, c, ex, fm::gemm::hopper{});
    for (const shape& c : whole_shapes(r)) check_products<T, T, T>(r, c, ex, fm::gemm::hopper{});
    check_whole<T, T>(52, fm::gemm::hopper{}, 1);
    check_whole<T, float>(53, fm::gemm::hopper{});
}

TEST_CASE("every way of cutting gives the sums")
{
#if defined(FASTMOE_TEST_CUDA)
    if (!support::cell<fm::cuda_executor, float>::available()) FASTMOE_SKIP("no device");
#endif
    using enum hopper_schedule;
    using fm::gemm::hopper_with;
    SUBCASE("a tile for two warpgroups")
    {
        check_whole<bfloat16, bfloat16>(54, hopper_with<always<hopper_tuning{.columns = 64, .stages = 2}, hopper_tuning{.columns = 64, .stages = 2}>>{});
        check_whole<bfloat16, bfloat16>(55, hopper_with<always<hopper_tuning{.columns = 192, .stages = 3}, hopper_tuning{.columns = 256, .stages = 3}>>{});
        check_whole<bfloat16, bfloat16>(56, hopper_with<always<hopper_tuning{.columns = 256, .stages = 4, .band = 1}>>{});
    }
    SUBCASE("a tile each")
    {
        check_whole<bfloat16, bfloat16>(57, hopper_with<always<hopper_tuning{.columns = 128, .stages = 3, .schedule = ping_pong},
                                                              hopper_tuning{.columns = 128, .stages = 5, .schedule = ping_pong}>>{});
        check_whole<bfloat16, bfloat16>(58, hopper_with<always<hopper_tuning{.rows = 64, .columns = 256, .stages = 3, .schedule = ping_pong},
                                                              hopper_tuning{.rows = 64, .columns = 64, .stages = 2, .schedule = ping_pong}>>{});
    }
    SUBCASE("two blocks that share weights")
    {
        check_whole<bfloat16, bfloat16>(59, hopper_with<always<hopper_tuning{.columns = 128, .stages = 2, .cluster = 2}>>{});
        check_whole<bfloat16, float>(60, hopper_with<always<hopper_tuning{.columns = 256, .stages = 4, .cluster = 2}>>{});
        check_whole<bfloat16, bfloat16>(61, hopper_with<always<hopper_tuning{.columns = 128, .stages = 3, .cluster = 2, .schedule = ping_pong}>>{});
    }
    SUBCASE("rows of tokens on the short side")
    {
        check_whole<bfloat16, bfloat16>(62, hopper_with<always<hopper_tuning{.columns = 16, .stages = 3, .turned = true}>>{});
        check_whole<bfloat16, float>(63, hopper_with<always<hopper_tuning{.columns = 32, .stages = 4, .turned = true}>>{});
        check_whole<bfloat16, bfloat16>(64, hopper_with<always<hopper_tuning{.rows = 64, .columns = 16, .stages = 3, .schedule = ping_pong, .turned = true}>>{});
    }
}
