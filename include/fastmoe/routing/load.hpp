// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How evenly experts are used: counts of choices, and the figures that a monitor plots, layer by layer and step by step.
/// Both stay in the executor's memory, so a step that is watched need not wait.
#pragma once

#include <cmath>

#include <fastmoe/comm/communicator.hpp>
#include <fastmoe/ops/bucket.hpp>
#include <fastmoe/ops/reduce.hpp>
#include <fastmoe/routing/score.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Of c, the choices of each expert. Without any choice: 0, 1, 1 and 0.
struct load_report {
    double cv;            ///< standard deviation (of all E, not of a sample) over mean
    double max_over_min;  ///< infinite where an expert has none
    double max_over_mean; ///< what the slowest expert costs where all wait for it
    double dropped;       ///< share of the choices that were dropped afterwards
};

namespace verbs {
struct count_choices;
struct measure_load;
} // namespace verbs

namespace detail {

/// Counts a block of ids; one out of range is recorded, and counts for none.
struct count_block {
    vector_view<const int32_t> ids; // (C)
    matrix_view<int32_t> counts;    // (blocks,E)
    int64_t block_size;
    fault_recorder faults;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t b) const
    {
        int32_t* row = counts.data_handle() + b * counts.extent(1);
        int32_t* own = bucket_room{counts.extent(1)}.of(team, row);
        team.for_each(counts.extent(1), [own](int64_t e) { own[e] = 0; });
        team.sync();
        const int64_t n = ids.extent(0), begin = b * block_size, end = begin + block_size < n ? begin + block_size : n;
        const auto& self = *this;
        team.tally(
            end - begin, own, [&self, begin](int64_t i) { return self.read(begin + i); }, [](int64_t, int32_t) {});
        if (own != row) team.for_each(counts.extent(1), [own, row](int64_t e) { row[e] = own[e]; });
    }

    FASTMOE_HOST_DEVICE int32_t read(int64_t c) const
    {
        const int32_t e = ids(c);
        if (e >= 0 && e < counts.extent(1)) return e;
        if (e != -1) faults.record(fault_kind::expert_out_of_range, c, e);
        return -1;
    }
};

struct add_counts {
    matrix_view<const int32_t> counts; // (blocks,E)
    int64_t* total;                    // (E)
    write_mode mode;

    FASTMOE_HOST_DEVICE void operator()(int64_t e) const
    {
        int64_t sum = mode == write_mode::accumulate ? total[e] : 0;
        for (int64_t b = 0; b < counts.extent(0); ++b) sum += counts(b, e);
        total[e] = sum;
    }
};

struct report_load {
    const int64_t* counts; // (2,E)  chosen, kept
    load_report* report;   // (1)
    int64_t experts;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const int64_t *chosen = counts, *kept = counts + experts;
        const int64_t all = team.reduce(experts, int64_t{0}, adds{}, [=](int64_t e) { return chosen[e]; });
        const int64_t left = team.reduce(experts, int64_t{0}, adds{}, [=](int64_t e) { return kept[e]; });
        const int64_t most = team.reduce(experts, int64_t{0}, greater_of{}, [=](int64_t e) { return chosen[e]; });
        const int64_t least = -team.reduce(experts, -INT64_MAX, greater_of{}, [=](int64_t e) { return -chosen[e]; });
        const double n = static_cast<double>(experts), mean = static_cast<double>(all) / n;
        const double squares = team.reduce(experts, 0.0, adds{}, [=](int64_t e) {
            const double off = static_cast<double>(chosen[e]) - mean;
            return off * off;
        });
        if (team.lane() != 0) return;
        const double top = static_cast<double>(most);
        if (all == 0) *report = {0, 1, 1, 0};
        else
            *report = {std::sqrt(squares / n) / mean, least > 0 ? top / static_cast<double>(least) : infinity<double>,
                       top / mean, static_cast<double>(all - left) / static_cast<double>(all)};
    }
};

} // namespace detail

template <class Executor>
struct implementation<verbs::count_choices, Executor> {
    static void run(Executor& ex, vector_view<const int32_t> chosen, int64_t experts, int64_t* counts, write_mode mode,
                    arena& scratch)
    {
        const auto blocks = detail::bucket_blocks::of<Executor>(chosen.extent(0));
        const auto partial = scratch.matrix<int32_t>(blocks.count, experts);
        if (scratch.measuring()) return;
        fastmoe::for_each_row(
            ex, blocks.count, detail::count_block{chosen, partial, blocks.size, ex.faults()},
            {.width = blocks.size + experts, .scratch_bytes = detail::bucket_room{experts}.bytes(), .in_turn = true});
        fastmoe::for_each(ex, experts, detail::add_counts{partial, counts, mode});
    }
};

template <class Executor>
struct implementation<verbs::measure_load, Executor> {
    template <class Communicator>
    static void run(Executor& ex, vector_view<const int32_t> chosen, vector_view<const int32_t> kept, int64_t experts,
                    const Communicator& c, vector_view<load_report> report, arena& scratch)
    {
        using counter = implementation<verbs::count_choices, Executor>;
        const auto counts = scratch.vector<int64_t>(2 * experts);
        {
            const arena::scope lent(scratch);
            counter::run(ex, chosen, experts, counts.data_handle(), write_mode::overwrite, scratch);
        }
        int64_t* left = counts.data_handle() ? counts.data_handle() + experts : nullptr;
        counter::run(ex, kept, experts, left, write_mode::overwrite, scratch);
        if (scratch.measuring()) return;
        c.all_reduce(ex, counts);
        fastmoe::for_each_row(ex, 1, detail::report_load{counts.data_handle(), report.data_handle(), experts},
                              {.width = experts});
    }
};

/// counts(e) (+)= how many choices went to e. Sum it over ranks with a communicator.
/// @param chosen   in [-1, E); -1 counts for none, as does, recorded and thrown as deliver_faults() does, an id out of
///                 range                                                                       // (C)
/// @param counts   overwritten or added to                                                     // (E)
/// @param scratch  taken and given back; on a measuring arena only counted
/// @throws invalid_argument if shapes make no sense, out_of_memory; nothing is written then
template <executor Executor>
void count_choices(Executor& ex, vector_view<const int32_t> chosen, vector_view<int64_t> counts, write_mode mode,
                   arena& scratch)
{
    const arena::scope lent(scratch);
    using verb = implementation<verbs::count_choices, Executor>;
    if (!scratch.measuring()) {
        expects_shape(chosen, "chosen (C)", chosen.extent(0));
        expects_shape(counts, "counts (E)", counts.extent(0));
    }
    verb::run(ex, chosen, counts.extent(0), counts.data_handle(), mode, scratch);
    if (!scratch.measuring()) ex.deliver_faults();
}

/// The load that a gate's choices mean, over all ranks.
/// @param chosen   the choices before any is dropped for capacity                              // (C)
/// @param kept     the same after it                                                           // (C)
/// @param report   overwritten; memory of the executor                                         // (1)
/// @param scratch  taken and given back; on a measuring arena only counted
/// @throws as count_choices
template <executor Executor, class Communicator>
void measure_load(Executor& ex, vector_view<const int32_t> chosen, type_identity_t<vector_view<const int32_t>> kept,
                  int64_t experts, const Communicator& c, vector_view<load_report> report, arena& scratch)
{
    expects(experts >= 1, "experts", experts, "1 or more");
    if (!scratch.measuring()) {
        expects_shape(chosen, "chosen (C)", chosen.extent(0));
        expects_shape(kept, "kept (C)", chosen.extent(0));
        expects_shape(report, "report (1)", 1);
    }
    const arena::scope lent(scratch);
    implementation<verbs::measure_load, Executor>::run(ex, chosen, kept, experts, c, report, scratch);
    if (!scratch.measuring()) ex.deliver_faults();
}

} // namespace fastmoe::inline FASTMOE_ABI
