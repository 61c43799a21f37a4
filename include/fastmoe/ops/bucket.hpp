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

/// Blocks of positions that are counted independently. Ranks do not depend on how positions are cut.
struct bucket_blocks {
    int64_t size, count;

    /// Of a host, whose threads are few; or of a device, whose warps are many and take some steps each.
    template <class Executor>
    static constexpr bucket_blocks of(int64_t n) noexcept
    {
        constexpr int64_t most = has_readable_memory<Executor> ? 64 : 1024, least = has_readable_memory<Executor> ? 1024 : 256;
        const int64_t size = n / most > least ? (n + most - 1) / most : least;
        return {size, (n + size - 1) / size};
    }
};

/// Where a team counts: lanes that stand side by side in scratch, if there is room; else in the row of memory itself.
struct bucket_room {
    int64_t experts;

    FASTMOE_HOST_DEVICE constexpr int64_t bytes() const noexcept { return experts <= 2048 ? experts * static_cast<int64_t>(sizeof(int32_t)) : 0; }

    template <class Team>
    FASTMOE_HOST_DEVICE int32_t* of(Team& team, int32_t* row) const
    {
        if constexpr (!is_single_lane<Team>)
            if (bytes() > 0) return team.template scratch<int32_t>(experts);
        return row;
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
        int32_t* row = histogram.data_handle() + b * histogram.extent(1);
        int32_t* count = bucket_room{histogram.extent(1)}.of(team, row);
        team.for_each(histogram.extent(1), [count](int64_t e) { count[e] = 0; });
        team.sync();
        const int64_t n = ids.extent(0), begin = b * block_size, end = begin + block_size < n ? begin + block_size : n;
        const auto& self = *this;
        team.tally(
            end - begin, count, [&self, begin](int64_t i) { return self.ids(self.position(begin + i)); }, [](int64_t, int32_t) {});
        if (count != row) team.for_each(histogram.extent(1), [count, row](int64_t e) { row[e] = count[e]; });
    }
};

/// Turns the histogram of a bucket into the rank that each block starts at.
struct bucket_scan {
    matrix_view<int32_t> histogram; // (blocks,E)
    vector_view<int32_t> counts;    // (E)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t e) const
    {
        const auto& self = *this;
        const int32_t total = team.scan(
            histogram.extent(0), int32_t{0}, [](int32_t a, int32_t b) { return a + b; },
            [&self, e](int64_t b) { return self.histogram(b, e); }, [&self, e](int64_t b, int32_t start) { self.histogram(b, e) = start; });
        if (team.lane() == 0) counts(e) = total;
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
        int32_t* row = histogram.data_handle() + b * histogram.extent(1);
        int32_t* next = bucket_room{histogram.extent(1)}.of(team, row);
        if (next != row) team.for_each(histogram.extent(1), [next, row](int64_t e) { next[e] = row[e]; });
        team.sync();
        const int64_t n = ids.extent(0), begin = b * block_size, end = begin + block_size < n ? begin + block_size : n;
        const auto& self = *this;
        team.tally(
            end - begin, next, [&self, begin](int64_t i) { return self.ids(self.position(begin + i)); },
            [&self, begin](int64_t i, int32_t rank) { self.ranks(self.position(begin + i)) = rank; });
    }
};

} // namespace detail

template <class Executor>
struct implementation<verbs::bucket, Executor> {
    static void run(Executor& ex, vector_view<const int32_t> ids, detail::bucket_position position,
                    vector_view<int32_t> counts, vector_view<int32_t> ranks, arena& scratch)
    {
        const auto blocks = detail::bucket_blocks::of<Executor>(ids.extent(0));
        const auto histogram = scratch.matrix<int32_t>(blocks.count, counts.extent(0));
        if (scratch.measuring()) return;
        const detail::bucket_room room{counts.extent(0)};
        const row_hint hint{.width = blocks.size + counts.extent(0), .scratch_bytes = room.bytes(), .in_turn = true};
        fastmoe::for_each_row(ex, blocks.count, detail::bucket_count{ids, histogram, position, blocks.size}, hint);
        fastmoe::for_each_row(ex, counts.extent(0), detail::bucket_scan{histogram, counts}, {.width = 8 * blocks.count});
        fastmoe::for_each_row(ex, blocks.count, detail::bucket_rank{ids, histogram, ranks, position, blocks.size}, hint);
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
