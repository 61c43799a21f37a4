// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The products of gemm::hopper, run an instruction at a time without a GPU, against sums in double.
#include <cmath>
#include <numeric>

#include <fastmoe/gemm/hopper.hpp>

#include "block_cases.hpp"
#if !defined(FASTMOE_TEST_CUDA)
#include "support/fiber_clusters.hpp"
#include "support/queued.hpp"
#include "support/sanitizers.hpp"
#include "support/warps.hpp"
#endif

namespace {

#if defined(FASTMOE_TEST_CUDA) // nvcc takes no fibers: the GPU alone
using clusters = fm::cuda_executor;
#define ON_CLUSTERS ", on the GPU"
#else
using clusters = support::fiber_clusters<support::warps>;
#define ON_CLUSTERS ""
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

/// All of them, or every third, in every storage: three that boxes bring, and matrices held apart, which lines do. The instructions that ran are warpgroups' own.
template <class T, class Y, class Gemm>
void check_whole(unsigned seed, const Gemm& gemm, std::size_t each = 3)
{
#if FASTMOE_UNDER_ASAN
    each = 3; // it takes long enough
#endif
    FASTMOE_SEEDED(r, seed);
    const std::vector<shape> shapes = whole_shapes(r);
    std::size_t turn = 0;
    for (const weight_storage storage : {weight_storage::stacked, weight_storage::padded, weight_storage::transposed, weight_storage::pointers}) {
#if defined(FASTMOE_TEST_CUDA)
        auto ex = support::column<clusters>::make();
        if (!ex.has_clusters<first_kernel>()) FASTMOE_SKIP("the device is not of compute capability 9.0, or the code not for sm_90a");
#else
        clusters ex(r.integer(1, 4), static_cast<unsigned>(r.integer(1, 1000)));
#endif
        for (std::size_t i = turn++ % each; i < shapes.size(); i += each) check_products<T, T, Y>(r, shapes[i], ex, gemm, storage, support::start::aligned);
#if !defined(FASTMOE_TEST_CUDA)
        CHECK(ex.products > 100);
        CHECK((ex.box_bytes > 0) == (storage != weight_storage::pointers));
#endif
    }
}


#if !defined(FASTMOE_TEST_CUDA)
/// Knows how often a team was asked to count tiles.
struct counting_teams : support::warps {
    int64_t counted = 0;

    template <class F>
    void for_each_row(int64_t n, const F& f, fm::row_hint hint)
    {
        counted += std::is_same_v<F, fm::detail::tiles::count_row_tiles>;
        support::warps::for_each_row(n, f, hint);
    }
};

/// An epilogue by pairs that keeps an account of what it reads: results beside y are the half difference, the negated values or
/// those and what was read, and a row's sum is that of its values.
template <class T, int more_, bool summed>
struct counting_pairs {
    static constexpr int more = more_;
    static constexpr bool has_sums = summed;
    int64_t slots, width;
    int* begun; // rows that are none
    int* reads; // (S,N / 2)
    T* more_to; // (S,N / 2), (S,N) or (S,2 N)
    bool writes;

    bool writes_y() const { return writes; }
    fm::matrix_view<T> result() const { return fm::matrix_view<T>(more_to, slots, width * more / 2); }
    int begin(int64_t s) const
    {
        if (s < 0 || s >= slots) ++*begun;
        return static_cast<int>(s);
    }
    struct place {
        bool is;
        int row, column;
    };
    place read(int64_t s, int64_t n) const
    {
        if (n % 2 != 0 || n >= width || s >= slots) return ++*begun, place{};
        ++reads[(s * width + n) / 2];
        return {true, static_cast<int>(s), static_cast<int>(n)};
    }
    float pair(int row, const place& at, const float (&sums)[2], T (&y)[2], T (&out)[more]) const
    {
        if (at.is && row != at.row) ++*begun;
        y[0] = T(sums[0]), y[1] = T(sums[1]);
        if constexpr (more == 1) out[0] = T((float(y[0]) - float(y[1])) / 2);
        else out[0] = T(-float(y[0])), out[1] = T(-float(y[1]));
        if constexpr (more == 4) out[2] = T(float(at.row % 128)), out[3] = T(float(at.column % 128));
        return float(y[0]) + float(y[1]);
    }
};
template <class T, int more, bool sums>
struct counting_epilogue {
    counting_pairs<T, more, sums> pairs;
    float* totals; // (S)
    template <class Team>
    void operator()(Team&, int64_t, int64_t) const
    {
        ++*pairs.begun; // the row form, which nobody asked for
    }
    bool takes_pairs() const { return true; }
    counting_pairs<T, more, sums> in_pairs() const { return pairs; }
    template <class Team>
    void finish(Team& team, int64_t, int64_t s, float total) const
    {
        if (team.lane() == 0) totals[s] += total;
    }
};

/// @param counts  rows of experts: 16 or fewer on average are taken with the features down, where pairs are not summed
/// @param writes  y; otherwise it is left alone
template <class T, int more, bool sums>
void check_pairs(support::random& r, const std::vector<int32_t>& counts, bool writes)
{
    const ragged g = ragged::of(r, counts, 3);
    const int64_t in = 72, out = 272; // rows of half of them are whole lines, too
    const test_rows<T> x(r, g, in, support::start::aligned);
    test_weights<T> w(weight_storage::stacked, g.experts(), out, in, support::start::aligned);
    w.fill(r);
    const fm::weight_view<const T> weights = w.view();
    std::vector<T> bias(static_cast<std::size_t>(g.experts() * out));
    for (T& each : bias) each = T(static_cast<float>(r.normal()));
    const fm::matrix_view<const T> biases(bias.data(), g.experts(), out);
    int begun = 0;
    std::vector<int> reads(static_cast<std::size_t>(g.slots * out / 2));
    support::guarded<T> y(g.slots, out), plain(g.slots, out), results(g.slots, out * more / 2);
    std::vector<float> totals(static_cast<std::size_t>(g.slots));
    clusters ex(2, 3);
    support::in_workspace(ex, [&](fm::arena& memory) {
        const counting_epilogue<T, more, sums> epilogue{{g.slots, out, &begun, reads.data(), results.data(), writes}, totals.data()};
        fm::gemm::hopper{}.forward(ex, g.view(), x.indexed(), weights, biases, y.view(), epilogue, memory);
        fm::gemm::hopper{}.forward(ex, g.view(), x.indexed(), weights, biases, plain.view(), fm::no_epilogue{}, memory);
        ex.synchronize();
    });
    CHECK(begun == 0);
    CHECK(y.damage() == "");
    if (!writes) CHECK_EQ(support::poisoned(y.view()), g.slots * out);
    CHECK(results.damage() == "");
    for (int64_t s = 0; s < g.slots; ++s) {
        const bool is_row = g.expert_of(s) >= 0;
        double total = 0;
        for (int64_t n = 0; n < out; n += 2) {
            const T* of = plain.data() + s * out + n;
            CHECK_EQ(reads[static_cast<std::size_t>((s * out + n) / 2)], int{is_row});
            if (!is_row) continue;
            for (int64_t v = 0; v < 2 && writes; ++v) CHECK_EQ(float(y.data()[s * out + n + v]), float(of[v]));
            total += double(float(of[0])) + double(float(of[1]));
            if (more == 1) CHECK_EQ(float(results.data()[(s * out + n) / 2]), float(T((float(of[0]) - float(of[1])) / 2)));
            const T* const beside = results.data() + (s * out + n) * more / 2;
            if (more >= 2) CHECK_EQ(float(beside[0]), -float(of[0]));
            if (more >= 2) CHECK_EQ(float(beside[1]), -float(of[1]));
            if (more == 4) CHECK_EQ(float(beside[2]), float(s % 128));
            if (more == 4) CHECK_EQ(float(beside[3]), float(n % 128));
        }
        CHECK(std::fabs(totals[static_cast<std::size_t>(s)] - (sums ? total : 0)) < 1e-3);
    }
}
#endif

} // namespace

TEST_CASE_TEMPLATE("forward, dgrad and wgrad are their sums, whatever lies how" ON_CLUSTERS, T, FASTMOE_DTYPES_OF_16_BITS)
{
    FASTMOE_SEEDED(r, 51);
#if defined(FASTMOE_TEST_CUDA)
    using Cell = support::cell<clusters, T>;
    FASTMOE_EXECUTOR(ex, Cell);
#else
    clusters ex;
#endif
    for (const shape& c : block_shapes(r)) check_products<T, T, T>(r, c, ex, fm::gemm::hopper{});
    for (const shape& c : whole_shapes(r)) check_products<T, T, T>(r, c, ex, fm::gemm::hopper{});
    check_whole<T, T>(52, fm::gemm::hopper{}, 1);
    check_whole<T, float>(53, fm::gemm::hopper{});
}

TEST_CASE("every way of cutting gives the sums" ON_CLUSTERS)
{
#if defined(FASTMOE_TEST_CUDA)
    FASTMOE_NEEDS(support::column<clusters>);
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
#if !defined(FASTMOE_TEST_FEW_DTYPES) // sanitizers take long enough
        check_whole<bfloat16, bfloat16>(58, hopper_with<always<hopper_tuning{.rows = 64, .columns = 256, .stages = 3, .schedule = ping_pong},
                                                              hopper_tuning{.rows = 64, .columns = 64, .stages = 2, .schedule = ping_pong}>>{});
#endif
    }
    SUBCASE("two blocks that share weights")
    {
        check_whole<bfloat16, bfloat16>(59, hopper_with<always<hopper_tuning{.columns = 128, .stages = 2, .cluster = 2}>>{});
#if !defined(FASTMOE_TEST_FEW_DTYPES) // sanitizers take long enough
        check_whole<bfloat16, float>(60, hopper_with<always<hopper_tuning{.columns = 256, .stages = 4, .cluster = 2}>>{});
#endif
        check_whole<bfloat16, bfloat16>(61, hopper_with<always<hopper_tuning{.columns = 128, .stages = 3, .cluster = 2, .schedule = ping_pong}>>{});
    }
    SUBCASE("rows of tokens on the short side")
    {
        check_whole<bfloat16, bfloat16>(62, hopper_with<always<hopper_tuning{.columns = 16, .stages = 3, .turned = true}>>{});
#if !defined(FASTMOE_TEST_FEW_DTYPES) // sanitizers take long enough
        check_whole<bfloat16, float>(63, hopper_with<always<hopper_tuning{.columns = 32, .stages = 4, .turned = true}>>{});
        check_whole<bfloat16, bfloat16>(64, hopper_with<always<hopper_tuning{.rows = 64, .columns = 16, .stages = 3, .schedule = ping_pong, .turned = true}>>{});
#endif
    }
}

#if !defined(FASTMOE_TEST_CUDA)
TEST_CASE("any number of clusters gives the same bits")
{
    FASTMOE_SEEDED(r, 66);
    const ragged g = ragged::of(r, {130, 3, 0, 260, 50}, 3);
    const int64_t in = 72, out = 520;
    const test_rows<bfloat16> x(r, g, in, support::start::aligned), dy(r, g, out, support::start::aligned);
    test_weights<bfloat16> w(weight_storage::transposed, g.experts(), out, in, support::start::aligned);
    w.fill(r);
    const fm::weight_view<const bfloat16> weights = w.view();
    const auto values = [&](int64_t most, unsigned seed) {
        clusters ex(most, seed);
        auto got = rows_outcome<float>(ex, g, out, [&](auto y, const auto& epilogue, fm::arena& memory) {
            fm::gemm::hopper{}.forward(ex, g.view(), x.indexed(), weights, fm::matrix_view<const float>{}, y, epilogue, memory);
        }, support::start::aligned);
        CHECK(got.complaint == "");
        const auto dw = gradient_outcome<float>(ex, g, std::vector<float>{}, weight_storage::stacked, shape{g.counts, out, in}, [&](auto& e, const fm::weight_view<float>& to, fm::arena& memory) {
            fm::gemm::hopper{}.wgrad(e, g.view(), dy.plain(), x.indexed(), to, fm::write_mode::overwrite, memory);
        }, support::start::aligned);
        CHECK(ex.products > 100);
        got.values.insert(got.values.end(), dw.begin(), dw.end());
        return got.values;
    };
    const auto one = values(1, 2);
    for (const int64_t most : {2, 5, 1000}) CHECK(support::same_bits(values(most, static_cast<unsigned>(most + 1)), one));
}

TEST_CASE("a group that lies elsewhere is a fault of wgrad, whoever has its tiles, and forward writes no row outside of S")
{
    FASTMOE_SEEDED(r, 67);
    const ragged inside = ragged::of(r, {20, 30}, 0);
    const test_rows<bfloat16> x(r, inside, 16, support::start::aligned), dy(r, inside, 24, support::start::aligned);
    test_weights<bfloat16> w(weight_storage::stacked, 2, 24, 16, support::start::aligned);
    w.fill(r);
    const fm::weight_view<const bfloat16> weights = w.view();
    const auto check = [&](const auto& gemm) {
        for (const int64_t wrong : {int64_t{-7}, inside.slots - 5, inside.slots + 5, INT64_MAX - 3, INT64_MIN}) {
            CAPTURE(wrong);
            clusters ex(1);
            ragged g = inside;
            g.offsets[1] = wrong;
            support::guarded<bfloat16> y(g.slots, 24);
            support::in_workspace(ex, [&](fm::arena& memory) {
                gemm.forward(ex, g.view(), x.plain(), weights, fm::matrix_view<const bfloat16>{}, y.view(), fm::no_epilogue{}, memory);
            });
            CHECK(y.damage() == "");
            CHECK(ex.products > 0);
            std::vector<float> dw(2 * 24 * 16);
            CHECK_THROWS_WITH_AS(support::in_workspace(ex, [&](fm::arena& memory) {
                gemm.wgrad(ex, g.view(), dy.plain(), x.plain(), fm::stacked(fm::tensor_view<float, 3>(dw.data(), 2, 24, 16)),
                           fm::write_mode::overwrite, memory);
                ex.synchronize();
            }), doctest::Contains("1"), fm::invalid_argument);
        }
    };
    check(fm::gemm::hopper{});
    // The second expert's only tile is the second warpgroup's.
    check(fm::gemm::hopper_with<always<hopper_tuning{.columns = 128, .stages = 2}, hopper_tuning{.columns = 128, .stages = 2, .schedule = hopper_schedule::ping_pong}>>{});
}

TEST_CASE("rows that lie in order come in boxes where a tile has all of its rows, and in lines where it has not")
{
    FASTMOE_SEEDED(r, 69);
    const auto lines_of = [&](std::vector<int32_t> counts, bool gathered) {
        const ragged g = ragged::of(r, std::move(counts), 5);
        const test_rows<bfloat16> x(r, g, 72, support::start::aligned);
        test_weights<bfloat16> w(weight_storage::stacked, g.experts(), 264, 72, support::start::aligned);
        w.fill(r);
        const fm::weight_view<const bfloat16> weights = w.view();
        const auto old = [&](int64_t e, int64_t o, int64_t i) { return w(e, o, i); };
        clusters ex(2, 3);
        const auto got = rows_outcome<bfloat16>(ex, g, 264, [&](auto y, const auto& epilogue, fm::arena& memory) {
            if (gathered) fm::gemm::hopper{}.forward(ex, g.view(), x.indexed(), weights, fm::matrix_view<const float>{}, y, epilogue, memory);
            else fm::gemm::hopper{}.forward(ex, g.view(), x.plain(), weights, fm::matrix_view<const float>{}, y, epilogue, memory);
        }, support::start::aligned);
        CHECK(got.complaint == "");
        const auto expected = support::reference_forward(g, gathered ? x.indexed_reference() : x.plain_reference(), old, {}, 264, 72);
        CHECK(first_wrong<float>(got.values, expected, 73, [&](int64_t i) { return g.expert_of(i / 264) >= 0; }) == "");
        return ex.lines;
    };
    CHECK(lines_of({128, 256}, false) == 0);
    CHECK(lines_of({128, 256}, true) > 0);
    CHECK(lines_of({128, 257}, false) == 2 * 9); // a row of 72 is nine lines, for two tiles of columns
    CHECK(lines_of({127, 0}, false) == 2 * 9 * 127);
}

TEST_CASE_TEMPLATE("of a gradient's operands the one that lies in order comes in boxes for two blocks, where all rows of a stage count", Gradients,
                   std::integral_constant<int, 0>, std::integral_constant<int, 1>, std::integral_constant<int, 2>)
{
    constexpr hopper_tuning cuts[] = {{.columns = 128, .stages = 3, .cluster = 2},
                                      {.columns = 256, .stages = 2, .cluster = 2},
                                      {.columns = 128, .stages = 3, .cluster = 2, .schedule = hopper_schedule::ping_pong}};
    constexpr hopper_tuning cut = cuts[Gradients::value];
    const fm::gemm::hopper_with<always<hopper_tuning{.columns = 128, .stages = 2}, cut>> gemm;
    FASTMOE_SEEDED(r, 71);
    const ragged g = ragged::of(r, {130, 64, 63, 0, 200}, 5);
    const int64_t tokens = 50, out = 264, in = 136, experts = g.experts(), boxed = 1 + 1 + 0 + 0 + 3; // stages: one of 130 has a row that is none
    const auto numbers = [&](int64_t n) {
        std::vector<bfloat16> v(static_cast<std::size_t>(n));
        for (bfloat16& each : v) each = bfloat16(static_cast<float>(r.normal()));
        return v;
    };
    const std::vector<bfloat16> left = numbers(tokens * out);
    std::vector<bfloat16> right = numbers(g.slots * in), rows_of_left(static_cast<std::size_t>(g.slots * out));
    std::vector<int32_t> index(static_cast<std::size_t>(g.slots), -1);
    for (int64_t s = 0; s < g.slots; ++s) {
        const bool is = g.expert_of(s) >= 0 && s != g.offsets[0] + 70;
        if (is) index[static_cast<std::size_t>(s)] = static_cast<int32_t>(r.integer(0, tokens - 1));
        for (int64_t i = 0; i < in && !is; ++i) right[static_cast<std::size_t>(s * in + i)] = bfloat16(NAN); // 0 times that is none
        for (int64_t o = 0; o < out; ++o)
            rows_of_left[static_cast<std::size_t>(s * out + o)] = is ? left[static_cast<std::size_t>(index[static_cast<std::size_t>(s)] * out + o)] : bfloat16(0.0f);
    }
    const fm::indexed_rows<bfloat16> listed{fm::matrix_view<const bfloat16>(left.data(), tokens, out), fm::as_vector(index)};
    const fm::plain_rows<bfloat16> ordered{fm::matrix_view<const bfloat16>(right.data(), g.slots, in)};
    const auto check = [&](bool transposed, const auto& dy, const auto& x, int64_t stages, int64_t width) {
        clusters ex(3, static_cast<unsigned>(r.integer(1, 1000)));
        std::vector<float> dw(static_cast<std::size_t>(experts * out * in), NAN);
        const fm::weight_view<float> to = transposed ? fm::stacked_transposed(fm::tensor_view<float, 3>(dw.data(), experts, in, out))
                                                     : fm::stacked(fm::tensor_view<float, 3>(dw.data(), experts, out, in));
        support::in_workspace(ex, [&](fm::arena& memory) {
            gemm.wgrad(ex, g.view(), dy, x, to, fm::write_mode::overwrite, memory);
            ex.synchronize();
        });
        CHECK_EQ(ex.box_bytes, stages * width * 128);
        CHECK(ex.lines > 0);
        int64_t wrong = 0;
        for (int64_t e = 0; e < experts; ++e)
            for (int64_t o = 0; o < out; ++o)
                for (int64_t i = 0; i < in; ++i) {
                    double sum = 0, size = 1e-30;
                    for (int64_t s = g.offsets[static_cast<std::size_t>(e)]; s < g.offsets[static_cast<std::size_t>(e)] + g.counts[static_cast<std::size_t>(e)]; ++s) {
                        if (index[static_cast<std::size_t>(s)] < 0) continue;
                        const double each = double(float(rows_of_left[static_cast<std::size_t>(s * out + o)])) * double(float(right[static_cast<std::size_t>(s * in + i)]));
                        sum += each, size += std::fabs(each);
                    }
                    wrong += !(std::fabs(double(to(e, o, i)) - sum) <= 256 * 0x1p-24 * size);
                }
        CHECK_EQ(wrong, 0);
    };
    const auto tiles = [](int64_t n, int64_t each) { return (n + each - 1) / each; };
    const int64_t shared_across = tiles(out, 2 * cut.rows) * tiles(in, cut.columns), shared_down = tiles(in, cut.rows) * tiles(out, 2 * cut.columns);
    check(false, listed, ordered, boxed * shared_across, cut.columns);
    check(true, listed, ordered, boxed * shared_down, cut.rows); // which multiplies the other way round
    // Both in order: rows that are none are the caller's then. Both listed: no boxes, and no block shares.
    for (bfloat16& each : right)
        if (!(float(each) == float(each))) each = bfloat16(1.0f);
    const fm::plain_rows<bfloat16> both{fm::matrix_view<const bfloat16>(rows_of_left.data(), g.slots, out)};
    check(false, both, ordered, (boxed + 1) * shared_across, cut.columns);
    std::vector<int32_t> itself(static_cast<std::size_t>(g.slots));
    std::iota(itself.begin(), itself.end(), 0);
    check(false, listed, fm::indexed_rows<bfloat16>{ordered.data, fm::as_vector(itself)}, 0, 0);
}

TEST_CASE("without the fence lines are not shown to the products, which the fibers notice")
{
    FASTMOE_SEEDED(r, 70);
    const ragged g = ragged::of(r, {40}, 0);
    const test_rows<bfloat16> x(r, g, 64, support::start::aligned);
    test_weights<bfloat16> w(weight_storage::stacked, 1, 64, 64, support::start::aligned);
    w.fill(r);
    const fm::weight_view<const bfloat16> weights = w.view();
    clusters ex(1, 2);
    support::guarded<bfloat16> y(g.slots, 64);
    support::in_workspace(ex, [&](fm::arena& memory) {
        const auto forward = [&] {
            fm::gemm::hopper_with<always<hopper_tuning{.columns = 64, .stages = 2, .fences_lines = false}>>{}.forward(
                ex, g.view(), x.plain(), weights, fm::matrix_view<const bfloat16>{}, y.view(), fm::no_epilogue{}, memory);
        };
        if (memory.measuring()) forward();
        else CHECK_THROWS_WITH(forward(), doctest::Contains("were not shown"));
    });
}

TEST_CASE("a matrix held apart that no line of 16 bytes begins is a fault where the host cannot look, and zeros")
{
    FASTMOE_SEEDED(r, 68);
    const ragged g = ragged::of(r, {20, 30, 7}, 0);
    const test_rows<bfloat16> x(r, g, 16, support::start::aligned);
    test_weights<bfloat16> w(weight_storage::stacked, 3, 24, 32, support::start::aligned);
    w.fill(r);
    support::fiber_clusters<support::queued> device;
    const bfloat16* pointers[3];
    for (int64_t e = 0; e < 3; ++e) pointers[e] = w.view().base(e);
    ++pointers[1];
    auto matrices = fm::separate(fm::vector_view<const bfloat16* const>(pointers, 3), 24, 16);
    support::guarded<bfloat16> y(g.slots, 24);
    fm::arena arena(fm::vector_view<std::byte>(static_cast<std::byte*>(device.allocate(1 << 16)), 1 << 16));
    fm::gemm::hopper{}.forward(device, g.view(), x.plain(), matrices, fm::matrix_view<const bfloat16>{}, y.view(), fm::no_epilogue{}, arena);
    CHECK_THROWS_WITH_AS(device.synchronize(), doctest::Contains("matrix of expert 1 begins 2 bytes"), fm::invalid_argument);
    CHECK(device.products > 0);
    CHECK(y.damage() == "");
    for (int64_t s = 0; s < g.slots; ++s)
        for (int64_t n = 0; n < 24; ++n) CHECK((g.expert_of(s) == 1) == (static_cast<float>(y.data()[s * 24 + n]) == 0.0f));
    device.synchronize(); // usable
}

// What would hang, or write beyond a stage, does not fit.
static_assert(fm::gemm::hopper_default(hopper_product::rows, true).fits() && fm::gemm::hopper_default(hopper_product::rows, false).fits());
static_assert(!hopper_tuning{.columns = 32, .stages = 2}.fits() && !hopper_tuning{.columns = 96, .stages = 2}.fits());
static_assert(!hopper_tuning{.columns = 64, .stages = 2, .cluster = 2}.fits() && !hopper_tuning{.columns = 192, .stages = 2, .cluster = 2}.fits());
static_assert(!hopper_tuning{.rows = 64, .columns = 128, .stages = 2}.fits() && !hopper_tuning{.columns = 256, .stages = 5}.fits());

TEST_CASE_TEMPLATE("an epilogue by pairs reads once for each pair, and is begun for rows alone", T, FASTMOE_DTYPES_OF_16_BITS)
{
    FASTMOE_SEEDED(r, 65);
    const std::vector<int32_t> many{100, 0, 140, 30, 1}, few{9, 0, 1, 17, 16, 2};
    check_pairs<T, 1, true>(r, many, true);
    check_pairs<T, 2, true>(r, many, true);
    check_pairs<T, 1, false>(r, many, true);
    check_pairs<T, 1, false>(r, many, false);
    check_pairs<T, 1, false>(r, few, true);
    check_pairs<T, 1, false>(r, few, false);
    check_pairs<T, 2, false>(r, few, true);
    check_pairs<T, 2, false>(r, few, false);
    check_pairs<T, 4, true>(r, many, true);
    check_pairs<T, 4, false>(r, few, true);
}

TEST_CASE("tiles are counted by each block, or by a team before it where the experts are too many for that")
{
    FASTMOE_SEEDED(r, 66);
    for (const int64_t experts : {int64_t{1023}, int64_t{1024}, int64_t{1025}}) {
        CAPTURE(experts);
        std::vector<int32_t> counts(static_cast<std::size_t>(experts));
        for (int i = 0; i < 20; ++i) counts[static_cast<std::size_t>(r.integer(0, experts - 1))] = static_cast<int32_t>(r.integer(1, 20));
        counts[0] = 3, counts.back() = 200;
        support::fiber_clusters<counting_teams> ex(3, 5);
        check_products<bfloat16, bfloat16, bfloat16>(r, {counts, 16, 8}, ex, fm::gemm::hopper{}, weight_storage::stacked, support::start::aligned);
        CHECK((ex.counted > 0) == (experts > 1024));
    }
}
#endif
