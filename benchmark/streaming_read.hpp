// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The roof of a memory-bound call: the executor's threads read the same bytes once and do nothing else with them.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

#include <fastmoe/exec/host_executor.hpp>

namespace bench {

using fastmoe::int64_t;

struct block {
    const std::byte* data;
    int64_t bytes; // a multiple of 64
};

/// Adds up 64-bit words: an exact sum, so the compiler uses the widest loads, and one cycle of latency an addition hides.
struct add_words {
    using vectorized = void;
    const block* blocks;
    std::atomic<std::uint64_t>* total;

    template <class Team>
    void operator()(Team&, int64_t b) const
    {
        const auto* word = reinterpret_cast<const std::uint64_t*>(blocks[b].data);
        const int64_t n = blocks[b].bytes / 8;
        std::uint64_t sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += word[i];
        total->fetch_add(sum, std::memory_order_relaxed);
    }
};

/// Cuts memory into blocks of `grain` bytes; threads take the next one as they finish.
inline void cut(std::vector<block>& blocks, const void* memory, int64_t bytes, int64_t grain)
{
    const auto* data = static_cast<const std::byte*>(memory);
    for (int64_t at = 0; at < bytes; at += grain) blocks.push_back({data + at, std::min(grain, bytes - at)});
}

/// Reads all blocks once; returns the sum of their words.
inline std::uint64_t streaming_read(fastmoe::host_executor& ex, const std::vector<block>& blocks)
{
    std::atomic<std::uint64_t> total{0};
    const add_words read{blocks.data(), &total};
    ex.for_each_task(static_cast<int64_t>(blocks.size()),
                     [&](int worker, int64_t b) { ex.run_rows(worker, b, b + 1, read); });
    return total.load();
}

} // namespace bench
