// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// SwiGLU forward and backward over rows that stay in the cache. Compiled once for each level of optimization, each time with
// a FASTMOE_ABI and a FASTMOE_BENCH_LEVEL of its own, so that nothing of one is linked for another.
#include <memory>
#include <vector>

#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/ops/activate_rows.hpp>

#include "levels/activation.hpp"

namespace bench {
namespace {

namespace fm = fastmoe;

struct there_and_back {
    using vectorized = void;
    const float* pre;    // (S,2*hidden)
    float *a, *d, *dpre; // (S,hidden) (S,hidden) (S,2*hidden)
    int64_t hidden;
    fm::detail::gated_columns columns;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t s) const
    {
        fm::detail::activate_row<fm::swiglu, float>(team, fm::swiglu{}, pre + 2 * s * hidden, a + s * hidden, hidden, columns, 1.0f);
        fm::detail::activate_row_backward<fm::swiglu, float>(team, fm::swiglu{}, pre + 2 * s * hidden, d + s * hidden,
                                                             dpre + 2 * s * hidden, hidden, columns, 1.0f);
    }
};

constexpr int64_t rows = 64, hidden = 512;

struct scene {
    fm::host_executor ex;
    std::vector<float> pre = std::vector<float>(2 * rows * hidden), dpre = pre;
    std::vector<float> a = std::vector<float>(rows * hidden), d = a;

    explicit scene(fm::instruction_set level) : ex({.threads = 1, .best = level})
    {
        for (std::size_t i = 0; i < pre.size(); ++i) pre[i] = static_cast<float>(i * 7919 % 1009) / 252.0f - 2.0f;
    }
    void turn()
    {
        std::fill(d.begin(), d.end(), 0.5f); // backward leaves the activation there
        ex.for_each_row(rows, there_and_back{pre.data(), a.data(), d.data(), dpre.data(), hidden, {1, hidden}}, fm::row_hint{});
    }
};

} // namespace

activation_turn FASTMOE_BENCH_LEVEL(bool avx512)
{
    const auto level = avx512 ? fm::instruction_set::avx512 : fm::instruction_set::avx2;
    if (fm::native_instruction_set() < level) return {};
    const auto s = std::make_shared<scene>(level);
    return {[s] { s->turn(); }, [s] { return s->dpre; }};
}

} // namespace bench
