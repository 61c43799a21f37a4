// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The products of gemm::hopper_fp8, run an instruction at a time without a GPU, against sums in double of the numbers that codes and scales
/// stand for; and how far those sums are from the ones of the numbers themselves.
#include <fastmoe/gemm/hopper_fp8.hpp>

#include "portable_cases.hpp"
#if !defined(FASTMOE_TEST_CUDA)
#include "support/fiber_clusters.hpp"
#include "support/sanitizers.hpp"
#include "support/warps.hpp"
#endif

namespace {

using fm::float8_e4m3;
using fm::gemm::hopper_product;
using fm::gemm::hopper_schedule;
using fm::gemm::hopper_tuning;

#if defined(FASTMOE_TEST_CUDA) // nvcc takes no fibers: the GPU alone
using clusters = fm::cuda_executor;
#define ON_CLUSTERS ", on the GPU"
#else
using clusters = support::fiber_clusters<support::warps>;
#define ON_CLUSTERS ""
#endif

template <hopper_tuning of_rows>
struct always {
    static constexpr hopper_tuning of(hopper_product, bool) noexcept { return of_rows; }
};

/// The numbers that codes stand for, by the definition: a scale of the largest magnitude / 448, the nearest of the 253 finite ones.
double decoded(double x, double largest)
{
    const float scale = std::max(static_cast<float>(largest) / 448.0f, 0x1p-63f);
    return static_cast<double>(scale * static_cast<float>(float8_e4m3(static_cast<float>(x) / scale)));
}
/// Rows of a reference, decoded by blocks of 128 columns.
class decoded_rows {
public:
    decoded_rows(const support::reference_rows& from, const ragged& g, int64_t width)
    {
        for (int64_t s = 0; s < g.slots; ++s) {
            values_.emplace_back();
            if (g.expert_of(s) < 0 || !from(s)) continue;
            for (int64_t k = 0; k < width; k += 128) {
                const int64_t end = std::min(width, k + 128);
                double largest = 0;
                for (int64_t i = k; i < end; ++i) largest = std::max(largest, std::fabs(from(s)[i]));
                for (int64_t i = k; i < end; ++i) values_.back().push_back(decoded(from(s)[i], largest));
            }
        }
    }
    support::reference_rows reference() const
    {
        return [this](int64_t s) { return values_[static_cast<std::size_t>(s)].empty() ? nullptr : values_[static_cast<std::size_t>(s)].data(); };
    }

private:
    std::vector<std::vector<double>> values_;
};
/// Matrices, decoded by blocks of 128 by 128.
support::reference_weights decoded_weights(const support::reference_weights& w, int64_t experts, int64_t out, int64_t in)
{
    auto values = std::make_shared<std::vector<double>>(static_cast<std::size_t>(experts * out * in));
    for (int64_t e = 0; e < experts; ++e)
        for (int64_t o = 0; o < out; o += 128)
            for (int64_t n = 0; n < in; n += 128) {
                double largest = 0;
                const auto each = [&](auto f) {
                    for (int64_t i = o; i < std::min(out, o + 128); ++i)
                        for (int64_t j = n; j < std::min(in, n + 128); ++j) f(i, j);
                };
                each([&](int64_t i, int64_t j) { largest = std::max(largest, std::fabs(w(e, i, j))); });
                each([&](int64_t i, int64_t j) { (*values)[static_cast<std::size_t>((e * out + i) * in + j)] = decoded(w(e, i, j), largest); });
            }
    return [=](int64_t e, int64_t o, int64_t i) { return (*values)[static_cast<std::size_t>((e * out + o) * in + i)]; };
}

/// Tensor cores keep some 14 bits of a sum of codes: those of a stage are so much less exact than float's.
constexpr int64_t length_of(int64_t depth)
{
#if defined(FASTMOE_TEST_CUDA)
    return (depth + 1) << 20; // near() takes its root: 2^10 roundings of float's
#else
    return depth + 1;
#endif
}

/// Sums of codes are close to those of the numbers: each factor is off by at most 2^-4 of it, or 2^-10 scales where codes are subnormal;
/// the root of the mean square of both is much less.
void check_distance(const std::vector<double>& got, const support::product& exact, const ragged& g, int64_t width)
{
    double off = 0, all = 0;
    for (std::size_t i = 0; i < got.size(); ++i)
        if (g.expert_of(static_cast<int64_t>(i) / width) >= 0) {
            off += (got[i] - exact.value[i]) * (got[i] - exact.value[i]);
            all += exact.value[i] * exact.value[i];
        }
    CHECK(std::sqrt(off) <= 0.05 * std::sqrt(all) + 1e-12);
}
template <class T>
std::vector<double> in_double(const std::vector<T>& v)
{
    return {v.begin(), v.end()};
}

template <class T, class Y, class Executor, class Gemm>
void check_products(support::random& r, const shape& c, Executor& ex, const Gemm& gemm, weight_storage storage)
{
    const ragged g = ragged::of(r, c.counts, 3);
    INFO(text_of(g, c, storage));
    const test_rows<T> x(r, g, c.in, support::start::aligned), dy(r, g, c.out, support::start::aligned);
    test_weights<T> w(storage, g.experts(), c.out, c.in, support::start::aligned);
    w.fill(r);
    const fm::weight_view<const T> weights = w.view();
    const auto exact = [&](int64_t e, int64_t o, int64_t i) { return w(e, o, i); };
    const auto coded = decoded_weights(exact, g.experts(), c.out, c.in);
    const std::vector<float> bias = support::normal_vector<float>(r, g.experts() * c.out);
    const auto inside = [&](int64_t width) { return [&g, width](int64_t i) { return g.expert_of(i / width) >= 0; }; };
    {
        const decoded_rows rows(x.indexed_reference(), g, c.in);
        const auto got = rows_outcome<Y>(ex, g, c.out, [&](auto y, const auto& epilogue, fm::arena& memory) {
            gemm.forward(ex, g.view(), x.indexed(), weights, fm::matrix_view<const float>(bias.data(), g.experts(), c.out), y, epilogue, memory);
        }, support::start::aligned);
        CHECK(got.complaint == "");
        CHECK(first_wrong<float>(got.values, support::reference_forward(g, rows.reference(), coded, support::widened(bias), c.out, c.in),
                                 length_of(c.in), inside(c.out)) == "");
        check_distance(in_double(got.values), support::reference_forward(g, x.indexed_reference(), exact, support::widened(bias), c.out, c.in), g, c.out);
    }
    {
        const decoded_rows rows(dy.plain_reference(), g, c.out);
        const auto got = rows_outcome<Y>(ex, g, c.in, [&](auto dx, const auto& epilogue, fm::arena& memory) {
            gemm.dgrad(ex, g.view(), dy.plain(), weights, dx, epilogue, memory);
        }, support::start::aligned);
        CHECK(got.complaint == "");
        CHECK(first_wrong<float>(got.values, support::reference_dgrad(g, rows.reference(), coded, c.out, c.in), length_of(c.out), inside(c.in)) == "");
        check_distance(in_double(got.values), support::reference_dgrad(g, dy.plain_reference(), exact, c.out, c.in), g, c.in);
    }
    const auto got = gradient_outcome<float>(ex, g, std::vector<float>{}, weight_storage::stacked, c, [&](auto& e, const fm::weight_view<float>& dw, fm::arena& memory) {
        gemm.wgrad(e, g.view(), dy.indexed(), x.plain(), dw, fm::write_mode::overwrite, memory);
    }, support::start::aligned);
    const auto expected = support::reference_wgrad(g, dy.indexed_reference(), x.plain_reference(), [](int64_t, int64_t, int64_t) { return 0.0; }, c.out, c.in);
    int64_t depth = 2;
    for (const int32_t n : c.counts) depth = std::max<int64_t>(depth, n + 2);
    CHECK(first_wrong<float>(got, expected, depth, [](int64_t) { return true; }) == "");
}

/// Sizes around those of tiles and blocks of scales; rows of codes are whole 16 bytes.
std::vector<shape> whole_shapes(support::random& r)
{
    std::vector<shape> out;
    out.push_back({{4, 12}, 16, 16});
    out.push_back({{127, 128, 129, 0, 1}, 144, 272});
    out.push_back({{16, 1, 40}, 272, 128});
    out.push_back({{150}, 32, 400});
    out.push_back({support::random_counts(r, 5, 150), 16 * r.integer(1, 20), 16 * r.integer(1, 20)});
    out.push_back({support::random_counts(r, 12, 20), 16 * r.integer(1, 12), 16 * r.integer(1, 12)});
    return out;
}

template <class T, class Y, class Gemm>
void check_whole(unsigned seed, const Gemm& gemm, std::size_t each)
{
#if FASTMOE_UNDER_ASAN
    each = 3; // it takes long enough
#endif
    FASTMOE_SEEDED(r, seed);
    const std::vector<shape> shapes = whole_shapes(r);
    std::size_t turn = 0;
    for (const auto storage : {weight_storage::stacked, weight_storage::padded, weight_storage::transposed, weight_storage::pointers}) {
#if defined(FASTMOE_TEST_CUDA)
        auto ex = support::column<clusters>::make();
#else
        clusters ex(r.integer(1, 4), static_cast<unsigned>(r.integer(1, 1000)));
#endif
        for (std::size_t i = turn++ % each; i < shapes.size(); i += each) check_products<T, Y>(r, shapes[i], ex, gemm, storage);
#if !defined(FASTMOE_TEST_CUDA)
        CHECK(ex.products > 20);
        CHECK(ex.box_bytes > 0);
#endif
    }
}

} // namespace

TEST_CASE_TEMPLATE("forward and dgrad are the sums of what codes stand for, wgrad of the numbers" ON_CLUSTERS, T, FASTMOE_DTYPES_OF_16_BITS)
{
#if defined(FASTMOE_TEST_CUDA)
    FASTMOE_NEEDS(support::column<clusters>);
#endif
    check_whole<T, T>(91, fm::gemm::hopper_fp8{}, 1);
    check_whole<T, float>(92, fm::gemm::hopper_fp8{}, 3);
}

TEST_CASE("every way of cutting gives the sums" ON_CLUSTERS)
{
#if defined(FASTMOE_TEST_CUDA)
    FASTMOE_NEEDS(support::column<clusters>);
#endif
    using enum hopper_schedule;
    using fm::gemm::hopper_fp8_with;
    check_whole<bfloat16, bfloat16>(93, hopper_fp8_with<always<hopper_tuning{.columns = 64, .stages = 2}>>{}, 3);
    check_whole<bfloat16, bfloat16>(94, hopper_fp8_with<always<hopper_tuning{.columns = 128, .stages = 3, .schedule = ping_pong}>>{}, 3);
    check_whole<bfloat16, bfloat16>(95, hopper_fp8_with<always<hopper_tuning{.rows = 64, .columns = 64, .stages = 2, .schedule = ping_pong}>>{}, 3);
    check_whole<bfloat16, float>(96, hopper_fp8_with<always<hopper_tuning{.columns = 32, .stages = 3, .turned = true}>>{}, 3);
}

static_assert(fm::gemm::hopper_scaled_default(hopper_product::rows, true).fits_scaled() && fm::gemm::hopper_scaled_default(hopper_product::few_rows, false).fits_scaled());
static_assert(!hopper_tuning{.columns = 256}.fits_scaled() && hopper_tuning{.columns = 128, .stages = 3, .schedule = hopper_schedule::ping_pong}.fits_scaled());
