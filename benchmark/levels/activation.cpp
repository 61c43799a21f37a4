// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// SwiGLU forward and backward over rows that stay in the cache. Compiled once for each level of optimization, each time with
// a FASTMOE_ABI and a FASTMOE_BENCH_LEVEL of its own, so that nothing of one is linked for another.
#include <algorithm>
#include <memory>
#include <vector>

#include <fastmoe/exec/host_executor.hpp>

#include "levels/activation.hpp"
#include "levels/there_and_back.hpp"

namespace bench {
namespace {

namespace fm = fastmoe;

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
