// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Counts ids into buckets and ranks each within its bucket, in a stable order: the heart of the plan and of capacity.
#pragma once

#include <fastmoe/exec/executor.hpp>
#include <fastmoe/exec/memory.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// The order in which entries of one bucket are ranked. `by_column` takes the ids as (rows, columns) and ranks all of
/// column 0 before any of column 1: every token's first choice before any second.
enum class bucket_order : std::uint8_t { by_position, by_column };

namespace verbs {
struct bucket;
}

namespace detail {

/// Blocks of positions that are counted independently; fixed by the shape, so the result is too.
struct bucket_blocks {
    int64_t size, count;

    static constexpr bucket_blocks of(int64_t n) noexcept
    {
        const int64_t size = n / 64 > 1024 ? (n + 63) / 64 : 1024;
        return {size, (n + size - 1) / size};
    }
};

struct bucket_position {
    int64_t rows, columns;
    bucket_order order;

    FASTMOE_HOST_DEVICE int64_t operator()(int64_t i) const noexcept
    {
        return order == bucket_order::by_position ? i : (i % rows) * columns + i / rows;
    }
};

struct bucket_count {
    vector_view<const int32_t> ids;   // (N)
    matrix_view<int32_t> histogram;   // (blocks,E)
    bucket_position position;
    int64_t block_size;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t b) const
    {
        int32_t* count = histogram.data_handle() + b * histogram.extent(1);
        team.for_each(histogram.extent(1), [count](int64_t e) { count[e] = 0; });
        team.sync();
        if (team.lane() != 0) return;
        const int64_t n = ids.extent(0), end = (b + 1) * block_size < n ? (b + 1) * block_size : n;
        for (int64_t i = b * block_size; i < end; ++i) {
            const int32_t e = ids(position(i));
            if (e >= 0) ++count[e];
        }
    }
};

/// Turns the histogram of a bucket into the rank that each block starts at.
struct bucket_scan {
    matrix_view<int32_t> histogram; // (blocks,E)
    vector_view<int32_t> counts;    // (E)

    FASTMOE_HOST_DEVICE void operator()(int64_t e) const
    {
        int32_t total = 0;
        for (int64_t b = 0; b < histogram.extent(0); ++b) {
            const int32_t here = histogram(b, e);
            histogram(b, e) = total;
            total += here;
        }
        counts(e) = total;
    }
};

struct bucket_rank {
    vector_view<const int32_t> ids; // (N)
    matrix_view<int32_t> histogram; // (blocks,E)
    vector_view<int32_t> ranks;     // (N)
    bucket_position position;
    int64_t block_size;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t b) const
    {
        if (team.lane() != 0) return;
        int32_t* next = histogram.data_handle() + b * histogram.extent(1);
        const int64_t n = ids.extent(0), end = (b + 1) * block_size < n ? (b + 1) * block_size : n;
        for (int64_t i = b * block_size; i < end; ++i) {
            const int64_t c = position(i);
            const int32_t e = ids(c);
            ranks(c) = e >= 0 ? next[e]++ : -1;
        }
    }
};

} // namespace detail

template <class Executor>
struct implementation<verbs::bucket, Executor> {
    static void run(Executor& ex, vector_view<const int32_t> ids, detail::bucket_position position,
                    vector_view<int32_t> counts, vector_view<int32_t> ranks, arena& scratch)
    {
        const auto blocks = detail::bucket_blocks::of(ids.extent(0));
        const auto histogram = scratch.matrix<int32_t>(blocks.count, counts.extent(0));
        if (scratch.measuring()) return;
        const row_hint hint{.width = blocks.size + counts.extent(0)};
        for_each_row(ex, blocks.count, detail::bucket_count{ids, histogram, position, blocks.size}, hint);
        for_each(ex, counts.extent(0), detail::bucket_scan{histogram, counts});
        for_each_row(ex, blocks.count, detail::bucket_rank{ids, histogram, ranks, position, blocks.size}, hint);
    }
};

/// ranks[i] = how many earlier positions have the id of position i; counts[e] = how many have id e at all.
/// @param ids      in [-1, E); -1 belongs to no bucket and gets rank -1           // (N)
/// @param columns  for by_column: ids are (N / columns, columns)
/// @param counts   overwritten                                                    // (E)
/// @param ranks    overwritten                                                    // (N)
/// @param scratch  taken and given back; on a measuring arena only counted
template <executor Executor>
void bucket(Executor& ex, vector_view<const int32_t> ids, vector_view<int32_t> counts, vector_view<int32_t> ranks,
            arena& scratch, bucket_order order = bucket_order::by_position, int64_t columns = 1)
{
    expects(ids.extent(0) <= INT32_MAX, "ids (N)", ids.extent(0), "at most 2^31 - 1 entries");
    expects(columns > 0 && ids.extent(0) % columns == 0, "columns", columns, "a divisor of ", ids.extent(0));
    if (!scratch.measuring()) expects_shape(ranks, "ranks (N)", ids.extent(0));
    const arena::scope lent(scratch);
    implementation<verbs::bucket, Executor>::run(ex, ids, {ids.extent(0) / columns, columns, order}, counts, ranks,
                                                 scratch);
}

} // namespace fastmoe::inline FASTMOE_ABI
