// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <cstdint>
#include <vector>

#include <fastmoe/comm/rank_sums.hpp>
#include <fastmoe/exec/executor.hpp>

#include "support/compare.hpp"
#include "support/executors.hpp"

namespace fm = fastmoe;
using fm::int64_t;

TEST_CASE_TEMPLATE("blocks that came by message are added in rank order and rounded once, wherever the own one lies", Cell,
                   FASTMOE_CELLS)
{
    using T = typename Cell::type;
    using sum = fm::accumulate_t<T>;
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(rng, 64);
    for (int ranks : {1, 2, 5, 70})
        for (int64_t count : {1, 1024, 2500}) {
            const int64_t stride = count + rng.integer(0, 3);
            const int rank = static_cast<int>(rng.integer(0, ranks - 1));
            const auto blocks = support::normal_vector<T>(rng, ranks * stride, 100);
            auto stacked = blocks;
            std::vector<T> own;
            for (int64_t i = 0; i < count; ++i) {
                own.push_back(blocks[static_cast<std::size_t>(rank * stride + i)]);
                stacked[static_cast<std::size_t>(rank * stride + i)] = T(12345.f); // not to be read
            }
            std::vector<T> expected;
            for (int64_t i = 0; i < count; ++i) {
                sum total = sum(blocks[static_cast<std::size_t>(i)]);
                for (int r = 1; r < ranks; ++r) total += sum(blocks[static_cast<std::size_t>(r * stride + i)]);
                expected.push_back(T(total));
            }
            const auto from = support::upload(ex, stacked);
            auto mine = support::upload(ex, own);
            const fm::detail::sum_stacked_blocks<T> f{from.data(), mine.data(), mine.data(), rank, ranks, stride, count};
            fm::for_each_row(ex, (count + f.size - 1) / f.size, f, {.width = f.size * ranks, .scratch_bytes = f.scratch_bytes});
            CHECK(support::same_bits(support::download(ex, mine.view()), expected));
        }
}
