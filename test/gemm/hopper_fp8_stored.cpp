// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Weights that are stored as codes: wherever they and their scales lie they give the same sums, and what is missing is refused before
/// anything is written.
#include <fastmoe/gemm/hopper_fp8.hpp>

#include "portable_cases.hpp"
#include "support/fiber_clusters.hpp"
#include "support/warps.hpp"

namespace {

using fm::float8_e4m3;
using clusters = support::fiber_clusters<support::warps>;

/// Whose host looks at pointers.
struct readable_clusters : clusters {
    static constexpr bool readable_memory = true;
    using clusters::clusters;
};
static_assert(fm::has_readable_memory<readable_clusters> && !fm::has_readable_memory<clusters>);

/// Codes that start at whole 16 bytes, with gaps that are NaN, and scales in one array or held apart.
class stored_weights {
public:
    stored_weights(weight_storage storage, bool scales_apart, int64_t experts, int64_t out, int64_t in)
        : memory_(static_cast<std::size_t>(experts * (out + 32) * (in + 32) + 32)), scales_(static_cast<std::size_t>(experts * each(out, in)))
    {
        std::memset(static_cast<void*>(memory_.data()), 0x7f, memory_.size());
        const int64_t gap = storage == weight_storage::stacked ? 0 : 16;
        fm::weight_view<float8_e4m3> w{nullptr, nullptr, experts, out, in, out * (in + gap) + gap, in + gap, 1};
        if (storage == weight_storage::transposed) w.row_stride = 1, w.col_stride = out + gap, w.expert_stride = in * (out + gap);
        w.data = memory_.data() + (16 - reinterpret_cast<std::uintptr_t>(memory_.data()) % 16) % 16;
        view.scales = scales_.data();
        for (int64_t e = experts - 1; e >= 0; --e) {
            pointers_.push_back(w.base(e));
            scale_pointers_.push_back(scales_.data() + e * each(out, in));
        }
        if (storage == weight_storage::pointers) w.pointers = pointers_.data(), w.data = nullptr, w.expert_stride = 0;
        if (scales_apart) view.scale_pointers = scale_pointers_.data(), view.scales = nullptr;
        view.codes = w;
    }
    stored_weights(const stored_weights&) = delete;

    fm::block_scaled_weights<float8_e4m3> view;
    std::vector<float8_e4m3*>& pointers() { return pointers_; }
    std::vector<float*>& scale_pointers() { return scale_pointers_; }

private:
    static int64_t each(int64_t out, int64_t in) { return fm::scale_blocks(out) * fm::scale_blocks(in); }
    std::vector<float8_e4m3> memory_;
    std::vector<float> scales_;
    std::vector<float8_e4m3*> pointers_;
    std::vector<float*> scale_pointers_;
};

constexpr weight_storage storages[] = {weight_storage::stacked, weight_storage::padded, weight_storage::transposed, weight_storage::pointers};

template <class T, class Y>
void check_storages(support::random& r, const shape& c)
{
    const ragged g = ragged::of(r, c.counts, 3);
    const test_rows<T> x(r, g, c.in, support::start::aligned);
    test_weights<T> w(weight_storage::stacked, g.experts(), c.out, c.in);
    w.fill(r);
    const std::vector<float> bias = support::normal_vector<float>(r, g.experts() * c.out);
    support::guarded<float8_e4m3> codes(x.indexed().data.extent(0), c.in);
    support::guarded<float> scales(x.indexed().data.extent(0), fm::scale_blocks(c.in));
    fm::host_executor host;
    fm::quantize_rows(host, x.indexed().data, codes.view(), scales.view());
    const fm::block_scaled_rows<fm::indexed_rows<float8_e4m3>> rows{{codes.view(), x.indexed().index}, scales.view()};
    const auto forward = [&](auto& ex, const auto& given, const auto& matrices) {
        const auto got = rows_outcome<Y>(ex, g, c.out, [&](auto y, const auto& epilogue, fm::arena& memory) {
            fm::gemm::hopper_fp8_stored{}.forward(ex, g.view(), given, matrices, fm::matrix_view<const float>(bias.data(), g.experts(), c.out), y, epilogue, memory);
        }, support::start::aligned);
        CHECK(got.complaint == "");
        return got.values;
    };
    clusters of_numbers(2, 5);
    const auto expected = rows_outcome<Y>(of_numbers, g, c.out, [&](auto y, const auto& epilogue, fm::arena& memory) {
        fm::gemm::hopper_fp8{}.forward(of_numbers, g.view(), x.indexed(), w.view(), fm::matrix_view<const float>(bias.data(), g.experts(), c.out), y, epilogue, memory);
    }, support::start::aligned).values;
    const bool is_whole = c.in % 16 == 0 && c.out % 8 == 0;
    for (const auto storage : storages)
        for (const bool apart : {false, true}) {
            INFO(text_of(g, c, storage));
            CAPTURE(apart);
            stored_weights stored(storage, apart, g.experts(), c.out, c.in);
            fm::quantize_weights(host, w.view(), stored.view);
            clusters ex(r.integer(1, 4), static_cast<unsigned>(r.integer(1, 1000)));
            const auto got = forward(ex, x.indexed(), stored.view), of_codes = forward(ex, rows, stored.view);
            CHECK(std::memcmp(got.data(), of_codes.data(), got.size() * sizeof(Y)) == 0);
            const bool by_warpgroups = is_whole && storage != weight_storage::transposed;
            CHECK((ex.products > 0) == by_warpgroups);
            CHECK((ex.box_bytes > 0) == (by_warpgroups && storage != weight_storage::pointers));
            int wrong = 0;
            for (std::size_t i = 0; i < got.size(); ++i) {
                if (g.expert_of(static_cast<int64_t>(i) / c.out) < 0) continue;
                const double a = static_cast<double>(got[i]), b = static_cast<double>(expected[i]);
                wrong += by_warpgroups ? std::memcmp(&got[i], &expected[i], sizeof(Y)) != 0 : !(std::fabs(a - b) <= 0.01 * (std::fabs(b) + 1));
            }
            CHECK(wrong == 0);
        }
}

} // namespace

TEST_CASE("codes and scales that lie anywhere give the bits of those that lie in one array, transposed ones those of floats")
{
    FASTMOE_SEEDED(r, 97);
    for (const shape& c : {shape{{40, 0, 3}, 136, 272}, shape{{16, 1, 40}, 272, 144}, shape{{5, 4}, 264, 144}, shape{{50, 60}, 8, 128}, shape{{5, 60}, 24, 24}}) {
        check_storages<bfloat16, bfloat16>(r, c);
        check_storages<fm::half, float>(r, c);
    }
    check_storages<float, float>(r, {{40, 0, 3}, 136, 144});
}

TEST_CASE_TEMPLATE("a matrix or scales that are nowhere are refused where the host can look, and nothing is written", Executor, fm::host_executor, readable_clusters)
{
    FASTMOE_SEEDED(r, 98);
    Executor ex;
    const ragged g = ragged::of(r, {20, 20}, 0);
    const test_rows<bfloat16> x(r, g, 32, support::start::aligned);
    test_weights<bfloat16> w(weight_storage::pointers, 2, 32, 32, support::start::aligned);
    w.fill(r);
    const auto refused = [&](const auto& matrices, const char* text) {
        support::guarded<bfloat16> y(g.slots, 32);
        support::in_workspace(ex, [&](fm::arena& memory) {
            const auto forward = [&] {
                fm::gemm::hopper_fp8_stored{}.forward(ex, g.view(), x.plain(), matrices, fm::matrix_view<const float>{}, y.view(), fm::no_epilogue{}, memory);
            };
            if (memory.measuring()) return forward();
            CHECK_THROWS_WITH_AS(forward(), doctest::Contains(text), fm::invalid_argument);
            if constexpr (requires { matrices.pointers; })
                CHECK_THROWS_WITH_AS((fm::gemm::hopper_fp8{}.dgrad(ex, g.view(), x.plain(), matrices, y.view(), fm::no_epilogue{}, memory)), doctest::Contains(text), fm::invalid_argument);
            CHECK(memory.used() == 0);
        });
        CHECK(support::poisoned(y.vector()) == g.slots * 32);
    };
    const bfloat16* numbers[] = {w.view().base(0), nullptr};
    refused(fm::separate(fm::vector_view<const bfloat16* const>(numbers, 2), 32, 32), "memory for expert 1");
    {
        stored_weights stored(weight_storage::pointers, true, 2, 32, 32);
        stored.pointers()[1] = nullptr;
        refused(stored.view, "memory for expert 1");
    }
    {
        stored_weights stored(weight_storage::pointers, true, 2, 32, 32);
        stored.scale_pointers()[1] = nullptr;
        refused(stored.view, "scales of expert 1");
    }
    stored_weights stored(weight_storage::pointers, true, 2, 32, 32);
    stored.view.scale_pointers = nullptr;
    refused(stored.view, "without scales");
}

TEST_CASE("codes and results may begin anywhere: what lines and boxes cannot take goes another way")
{
    FASTMOE_SEEDED(r, 97);
    const int64_t out = 48, in = 160;
    const ragged g = ragged::of(r, {60, 3, 70}, 2);
    const test_rows<bfloat16> x(r, g, in, support::start::aligned);
    std::vector<float8_e4m3> codes(static_cast<std::size_t>(3 * out * in + 32));
    std::vector<float> scales(3 * 2);
    for (auto& v : scales) v = static_cast<float>(r.uniform(0.1, 2));
    const auto at = [&](int64_t beyond) {
        auto* first = codes.data() + (16 - reinterpret_cast<std::uintptr_t>(codes.data()) % 16) % 16 + beyond;
        support::random same(5);
        for (int64_t i = 0; i < 3 * out * in; ++i) first[i] = float8_e4m3(static_cast<float>(same.normal(100)));
        return fm::block_scaled_weights<const float8_e4m3>{fm::stacked(fm::tensor_view<const float8_e4m3, 3>(first, 3, out, in)), scales.data()};
    };
    const auto values = [&](const auto& w, support::start begin, bool by_codes) {
        readable_clusters ex(2, 3);
        const auto got = rows_outcome<float>(ex, g, out, [&](auto y, const auto& epilogue, fm::arena& memory) {
            fm::gemm::hopper_fp8_stored{}.forward(ex, g.view(), x.indexed(), w, fm::matrix_view<const float>{}, y, epilogue, memory);
        }, begin);
        CHECK(got.complaint == "");
        CHECK((ex.products > 0) == by_codes);
        return got.values;
    };
    const auto expected = values(at(0), support::start::aligned, true);
    const auto is_same = [&](const std::vector<float>& got) {
        double largest = 0;
        for (std::size_t i = 0; i < got.size(); ++i)
            if (g.expert_of(static_cast<int64_t>(i) / out) >= 0) largest = std::max(largest, std::fabs(static_cast<double>(expected[i])));
        for (std::size_t i = 0; i < got.size(); ++i)
            if (g.expert_of(static_cast<int64_t>(i) / out) >= 0)
                if (!(std::fabs(static_cast<double>(got[i]) - static_cast<double>(expected[i])) <= 1e-5 * largest)) return false;
        return largest > 1;
    };
    CHECK(is_same(values(at(0), support::start::odd, true)));      // y
    CHECK(is_same(values(at(1), support::start::aligned, false))); // codes
}
