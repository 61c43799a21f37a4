// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Weight gradients so large that they are written past the caches: the bits of those that are not, and nothing beside them.
#include <doctest/doctest.h>

#include <cstring>
#include <utility>
#include <vector>

#include <fastmoe/gemm/portable.hpp>

#include "support/random.hpp"
#include "support/scratch.hpp"

using namespace fastmoe;

namespace {

constexpr int64_t experts = 4, out = 1100, in = 1290, step = 1296; // 22 MB; tiles and vectors divide neither side
constexpr float poison = -777;

/// (E,O,step) with a line before and after, `shift` floats from an aligned place.
struct gradient {
    std::vector<float> memory = std::vector<float>(experts * out * step + 64, poison);
    int64_t shift;

    explicit gradient(int64_t floats) : shift(floats)
    {
        while (reinterpret_cast<std::uintptr_t>(memory.data() + shift - floats) % 64 != 0 || shift < 16) ++shift;
    }
    weight_view<float> view() { return {memory.data() + shift, nullptr, experts, out, in, out * step, step, 1}; }
};

template <class T>
gradient wgrad(int threads, int64_t shift, const std::vector<T>& dy, const std::vector<T>& x, const row_groups& groups, write_mode mode)
{
    host_executor ex({.threads = threads});
    gradient dw(shift);
    if (mode == write_mode::accumulate)
        for (float& value : dw.memory) value = 0;
    support::in_workspace(ex, [&](arena& memory) {
        gemm::portable{}.wgrad(ex, groups, plain_rows<T>{as_matrix(dy, groups.slots, out)},
                               plain_rows<T>{as_matrix(x, groups.slots, in)}, dw.view(), mode, memory);
    });
    return dw;
}

} // namespace

TEST_CASE_TEMPLATE("a large weight gradient is the same bits wherever it begins, for any number of threads, written or added", T,
                   float, bfloat16)
{
    FASTMOE_SEEDED(r, 17);
    const std::vector<int32_t> counts{5, 0, 200, 530};
    const std::vector<int64_t> offsets{0, 5, 5, 205, 735};
    // Summed in one pass, not at all, and in many.
    const row_groups groups{as_vector(counts), as_vector(offsets), 735};
    std::vector<T> dy(735 * out), x(735 * in);
    for (T& value : dy) value = T(static_cast<float>(r.uniform(-1, 1)));
    for (T& value : x) value = T(static_cast<float>(r.uniform(-1, 1)));

    gradient added = wgrad<T>(1, 0, dy, x, groups, write_mode::accumulate); // reads what it adds to: never streamed
    for (const int threads : {1, 3})
        for (const int64_t shift : {0, 1}) {
            CAPTURE(threads);
            CAPTURE(shift);
            gradient dw = wgrad<T>(threads, shift, dy, x, groups, write_mode::overwrite);
            int64_t other = 0, touched = 0;
            for (int64_t row = 0; row < experts * out; ++row) {
                const float* ours = dw.memory.data() + dw.shift + row * step;
                const float* theirs = added.memory.data() + added.shift + row * step;
                other += std::memcmp(ours, theirs, in * sizeof(float)) != 0;
                for (int64_t i = in; i < step; ++i) touched += ours[i] != poison;
            }
            for (int64_t i = 0; i < dw.shift; ++i) touched += dw.memory[i] != poison;
            for (auto i = static_cast<std::size_t>(dw.shift + experts * out * step); i < dw.memory.size(); ++i)
                touched += dw.memory[i] != poison;
            CHECK(other == 0);
            CHECK(touched == 0);
        }
    // One element of each kind against its sum in double: of a whole tile, of the last row, of the last column.
    for (const auto& [o, i] : {std::pair<int64_t, int64_t>{7, 3}, {out - 1, 200}, {300, in - 1}}) {
        double sum = 0, sizes = 0;
        for (int64_t s = 5; s < 205; ++s) {
            const double term = static_cast<double>(float(dy[s * out + o])) * static_cast<double>(float(x[s * in + i]));
            sum += term;
            sizes += term < 0 ? -term : term;
        }
        const double error = sum - added.memory[added.shift + (2 * out + o) * step + i];
        CHECK((error < 0 ? -error : error) <= 201 * 6e-8 * sizes);
    }
}
