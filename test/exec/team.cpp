// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What every team promises, on one lane and on four real threads.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <cuda/std/atomic>

#include <doctest/doctest.h>

#include <fastmoe/exec/executor.hpp>

#include "support/executors.hpp"
#include "support/poison.hpp"
#include "support/random.hpp"
#include "support/warps.hpp"

namespace fm = fastmoe;
using std::int64_t;

namespace {

struct plus {
    template <class T>
    FASTMOE_HOST_DEVICE T operator()(T a, T b) const
    {
        return a + b;
    }
};
struct larger {
    template <class T>
    FASTMOE_HOST_DEVICE T operator()(T a, T b) const
    {
        return a > b ? a : b;
    }
};

/// The best value and where it stands: what an argmax reduces.
struct place {
    float value;
    int32_t id;
};
struct better {
    FASTMOE_HOST_DEVICE place operator()(place a, place b) const
    {
        return a.value > b.value || (a.value == b.value && a.id < b.id) ? a : b;
    }
};

/// Counts the visits of every element.
struct visit {
    fm::vector_view<int32_t> seen; // (n)
    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { ::cuda::std::atomic_ref<int32_t>(seen(i)).fetch_add(1); }
};

struct visit_rows {
    fm::matrix_view<int32_t> seen; // (rows,n)
    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t row) const
    {
        team.for_each(seen.extent(1), [&](int64_t i) { ::cuda::std::atomic_ref<int32_t>(seen(row, i)).fetch_add(1); });
    }
};

/// Sum, largest and argmax of each row, as every lane sees them.
struct summarize {
    fm::matrix_view<const int64_t> x;    // (rows,n)
    fm::matrix_view<int64_t> sums, tops; // (rows,lanes)
    fm::matrix_view<int32_t> where;      // (rows,lanes)
    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t row) const
    {
        const int64_t n = x.extent(1), lane = team.lane();
        sums(row, lane) = team.reduce(n, int64_t{0}, plus{}, [&](int64_t i) { return x(row, i); });
        tops(row, lane) = team.reduce(n, INT64_MIN, larger{}, [&](int64_t i) { return x(row, i); });
        constexpr float least = -std::numeric_limits<float>::infinity(); // a constant: the call would be the host's
        const place none{least, INT32_MAX};
        const auto at = [&](int64_t i) { return place{static_cast<float>(x(row, i)), static_cast<int32_t>(i)}; };
        where(row, lane) = team.reduce(n, none, better{}, at).id;
    }
};

struct scan_rows {
    fm::matrix_view<const int64_t> x; // (rows,n)
    fm::matrix_view<int64_t> before;  // (rows,n)
    fm::matrix_view<int64_t> totals;  // (rows,lanes)
    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t row) const
    {
        totals(row, team.lane()) = team.scan(
            x.extent(1), int64_t{0}, plus{}, [&](int64_t i) { return x(row, i); },
            [&](int64_t i, int64_t sum) { before(row, i) = sum; });
    }
};

/// Notes who is given an element by for_each, who by reduce, and how often.
struct note_lanes {
    fm::matrix_view<int32_t> owner, calls, strangers; // (rows,n)
    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t row) const
    {
        const int64_t n = owner.extent(1);
        const auto lane = static_cast<int32_t>(team.lane());
        // Nothing here waits: what an element's lane wrote is read by the same lane.
        team.for_each(n, [&](int64_t i) { owner(row, i) = lane, calls(row, i) = strangers(row, i) = 0; });
        (void)team.reduce(n, 0, plus{}, [&](int64_t i) {
            ++calls(row, i);
            strangers(row, i) += owner(row, i) != lane;
            return 1;
        });
        team.for_each(n, [&](int64_t i) { strangers(row, i) += owner(row, i) != lane; });
    }
};

/// Reverses a row in place by way of scratch: wrong without the two syncs, as soon as there are lanes.
struct reverse {
    fm::matrix_view<int32_t> x; // (rows,n)
    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t row) const
    {
        const int64_t n = x.extent(1);
        int32_t* copy = team.template scratch<int32_t>(n);
        team.for_each(n, [&](int64_t i) { copy[i] = x(row, i); });
        team.sync();
        team.for_each(n, [&](int64_t i) { x(row, i) = copy[n - 1 - i]; });
    }
};

/// Whether two blocks of scratch are aligned, apart, and the same for all lanes.
struct take_scratch {
    fm::matrix_view<int64_t> first, second; // (rows,lanes)
    int64_t n;
    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t row) const
    {
        first(row, team.lane()) = reinterpret_cast<int64_t>(team.template scratch<char>(n));
        second(row, team.lane()) = reinterpret_cast<int64_t>(team.template scratch<double>(n));
    }
};

struct tally_rows {
    fm::matrix_view<const int32_t> keys; // (rows,n)
    fm::matrix_view<int32_t> ranks;      // (rows,n)
    fm::matrix_view<int32_t> counts;     // (rows,kinds)
    bool shared;
    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t row) const
    {
        int32_t* own = counts.data_handle() + row * counts.extent(1);
        int32_t* count = shared ? team.template scratch<int32_t>(counts.extent(1)) : own;
        if (shared) team.for_each(counts.extent(1), [=](int64_t e) { count[e] = own[e]; });
        team.sync();
        team.tally(keys.extent(1), count, [&](int64_t i) { return keys(row, i); }, [&](int64_t i, int32_t rank) { ranks(row, i) = rank; });
        if (shared) team.for_each(counts.extent(1), [=](int64_t e) { own[e] = count[e]; });
    }
};

struct count_lanes {
    fm::matrix_view<int64_t> lanes; // (rows,8)
    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t row) const
    {
        lanes(row, team.lane()) = team.lanes();
    }
};

constexpr int64_t most_lanes = 256; ///< of a team, on any executor

template <class T>
struct grid {
    grid(int64_t rows, int64_t cols) : memory(rows * cols), rows(rows), cols(cols) { support::poison(view()); }
    fm::matrix_view<T> view() { return fm::matrix_view<T>(memory.data(), rows, cols); }
    std::vector<T> memory;
    int64_t rows, cols;
};

} // namespace

TEST_CASE_TEMPLATE("for_each visits every element exactly once, for any count", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    for (const int64_t n : {0, 1, 2, 3, 4, 5, 63, 64, 65, 1000, 2047, 2048, 2049, 131072, 200003}) {
        std::vector<int32_t> seen(n, 0);
        fm::for_each(ex, n, visit{fm::as_vector(seen)});
        ex.synchronize();
        CHECK(seen == std::vector<int32_t>(n, 1));
    }
    fm::for_each(ex, -5, visit{});
}

TEST_CASE_TEMPLATE("a team's for_each visits every element of every row exactly once", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    for (const int64_t rows : {0, 1, 3, 65, 130})
        for (const int64_t n : {0, 1, 3, 4, 5, 33}) {
            std::vector<int32_t> seen(rows * n, 0);
            fm::for_each_row(ex, rows, visit_rows{fm::as_matrix(seen, rows, n)}, {.width = n});
            ex.synchronize();
            CHECK(seen == std::vector<int32_t>(rows * n, 1));
        }
}

TEST_CASE_TEMPLATE("every lane of a team gets the reduction of the whole row", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(r, 3);
    for (const int64_t n : {0, 1, 2, 3, 4, 5, 7, 15, 16, 17, 31, 32, 33, 100}) {
        INFO("n ", n);
        const int64_t rows = 9;
        std::vector<int64_t> x(rows * n);
        for (int64_t& v : x) v = r.integer(-50, 50);
        grid<int64_t> sums(rows, most_lanes), tops(rows, most_lanes);
        grid<int32_t> where(rows, most_lanes);
        fm::for_each_row(ex, rows, summarize{fm::as_matrix(x, rows, n), sums.view(), tops.view(), where.view()},
                         {.width = n});
        ex.synchronize();
        for (int64_t i = 0; i < rows; ++i) {
            int64_t sum = 0, top = INT64_MIN;
            int32_t at = std::numeric_limits<int32_t>::max();
            for (int64_t j = 0; j < n; ++j) {
                sum += x[i * n + j];
                if (x[i * n + j] > top) at = static_cast<int32_t>(j);
                top = std::max(top, x[i * n + j]);
            }
            int64_t lanes = 0;
            for (int64_t lane = 0; lane < most_lanes; ++lane) {
                if (sums.view()(i, lane) == -1 && tops.view()(i, lane) == -1 && where.view()(i, lane) == -1) continue;
                ++lanes;
                CHECK(sums.view()(i, lane) == sum);
                CHECK(tops.view()(i, lane) == top);
                CHECK(where.view()(i, lane) == at);
            }
            CHECK(lanes >= 1);
        }
    }
}

TEST_CASE_TEMPLATE("a reduction calls its function once for each element, on the lane that for_each gives it", Cell,
                   FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    for (const int64_t n : {1, 2, 3, 4, 5, 15, 16, 17, 33, 100}) {
        const int64_t rows = 5;
        grid<int32_t> owner(rows, n), calls(rows, n), strangers(rows, n);
        fm::for_each_row(ex, rows, note_lanes{owner.view(), calls.view(), strangers.view()}, {.width = n});
        ex.synchronize();
        int64_t wrong = 0;
        for (int64_t i = 0; i < rows; ++i)
            for (int64_t j = 0; j < n; ++j) wrong += calls.view()(i, j) != 1 || strangers.view()(i, j) != 0;
        INFO("n ", n);
        CHECK(wrong == 0);
    }
}

TEST_CASE_TEMPLATE("a scan gives every element the sum of those before it and every lane the total", Cell,
                   FASTMOE_EXECUTORS_AND_WARPS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(r, 4);
    for (const int64_t n : {0, 1, 3, 4, 5, 8, 29, 127, 130, 2100}) {
        const int64_t rows = 6;
        std::vector<int64_t> x(rows * n);
        for (int64_t& v : x) v = r.integer(1, 9);
        grid<int64_t> before(rows, n), totals(rows, most_lanes);
        fm::for_each_row(ex, rows, scan_rows{fm::as_matrix(x, rows, n), before.view(), totals.view()}, {.width = n});
        ex.synchronize();
        for (int64_t i = 0; i < rows; ++i) {
            int64_t sum = 0;
            for (int64_t j = 0; j < n; ++j) {
                CHECK(before.view()(i, j) == sum);
                sum += x[i * n + j];
            }
            CHECK(totals.view()(i, 0) == sum);
            for (int64_t lane = 1; lane < 256; ++lane)
                CHECK((totals.view()(i, lane) == sum || totals.view()(i, lane) == -1));
        }
    }
}

TEST_CASE_TEMPLATE("a tally ranks keys in their order and counts them, from what was counted before, in scratch and in memory", Cell,
                   FASTMOE_EXECUTORS_AND_WARPS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(r, 5);
    for (const bool shared : {false, true})
        for (const int64_t n : {0, 1, 4, 7, 31, 33, 257, 1500}) {
            const int64_t rows = 3, kinds = r.one_of<int64_t>(1, 2, 5, 40);
            std::vector<int32_t> keys(rows * n);
            for (int32_t& e : keys) e = static_cast<int32_t>(r.integer(r.coin(0.2) ? -2 : 0, kinds - 1));
            grid<int32_t> ranks(rows, n), counts(rows, kinds);
            std::vector<int32_t> begin(rows * kinds);
            for (int64_t i = 0; i < rows * kinds; ++i) counts.memory[i] = begin[i] = static_cast<int32_t>(r.integer(0, 9));
            const auto bytes = shared ? kinds * static_cast<int64_t>(sizeof(int32_t)) : 0;
            fm::for_each_row(ex, rows, tally_rows{fm::as_matrix(keys, rows, n), ranks.view(), counts.view(), shared},
                             {.width = n, .scratch_bytes = bytes, .in_turn = r.coin(0.5)});
            ex.synchronize();
            for (int64_t i = 0; i < rows; ++i) {
                std::vector<int32_t> next(begin.begin() + i * kinds, begin.begin() + (i + 1) * kinds);
                for (int64_t j = 0; j < n; ++j) {
                    const int32_t e = keys[i * n + j];
                    CHECK(ranks.view()(i, j) == (e < 0 ? -1 : next[e]++));
                }
                for (int64_t e = 0; e < kinds; ++e) CHECK(counts.view()(i, e) == next[e]);
            }
        }
}

TEST_CASE_TEMPLATE("what lanes write to scratch is there for all of them after sync", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    const int64_t rows = 50, n = 37;
    std::vector<int32_t> x(rows * n), expected(rows * n);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < n; ++j) {
            x[i * n + j] = static_cast<int32_t>(100 * i + j);
            expected[i * n + n - 1 - j] = x[i * n + j];
        }
    fm::for_each_row(ex, rows, reverse{fm::as_matrix(x, rows, n)}, {.width = n, .scratch_bytes = n * 4});
    ex.synchronize();
    CHECK(x == expected);
}

TEST_CASE_TEMPLATE("scratch is the same memory for all lanes of a row, aligned, and its blocks are apart", Cell,
                   FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    for (const int64_t n : {1, 5, 64, 100}) {
        grid<int64_t> first(3, most_lanes), second(3, most_lanes);
        fm::for_each_row(ex, 3, take_scratch{first.view(), second.view(), n},
                         {.scratch_bytes = (n + 63) / 64 * 64 + n * 8});
        ex.synchronize();
        for (int64_t i = 0; i < 3; ++i) {
            CHECK(first.view()(i, 0) % 64 == 0);
            CHECK(second.view()(i, 0) % 64 == 0);
            CHECK(second.view()(i, 0) >= first.view()(i, 0) + n);
            for (int64_t lane = 1; lane < most_lanes; ++lane)
                if (first.view()(i, lane) != -1) CHECK(first.view()(i, lane) == first.view()(i, 0));
        }
    }
}

TEST_CASE_TEMPLATE("a hint beyond what every executor can give is refused", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    std::vector<int64_t> memory(2 * most_lanes);
    const count_lanes f{fm::as_matrix(memory, 2, most_lanes)};
    CHECK_THROWS_AS(fm::for_each_row(ex, 2, f, {.scratch_bytes = fm::team_scratch_bytes + 1}), fm::invalid_argument);
    CHECK_NOTHROW(fm::for_each_row(ex, 2, f, {.scratch_bytes = fm::team_scratch_bytes}));
    ex.synchronize();
}

TEST_CASE_TEMPLATE("lanes are numbered from zero and know how many they are", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    std::vector<int64_t> memory(5 * most_lanes, 0);
    fm::for_each_row(ex, 5, count_lanes{fm::as_matrix(memory, 5, most_lanes)}, {});
    ex.synchronize();
    const int64_t lanes = memory[0];
    CHECK(lanes >= 1);
    for (int64_t i = 0; i < 5; ++i)
        for (int64_t lane = 0; lane < most_lanes; ++lane) CHECK(memory[i * most_lanes + lane] == (lane < lanes ? lanes : 0));
}
