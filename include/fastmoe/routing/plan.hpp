// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What everything after the gate reads: where each choice's row stands when rows are sorted by expert.
#pragma once

#include <fastmoe/gemm/grouped_gemm.hpp>
#include <fastmoe/routing/check_choices.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// A stable counting sort of choices by expert: within an expert, slots are in choice order. The same routing gives the
/// same plan on any executor.
struct plan {
    vector_view<int32_t> counts;    // (E)    choices that each expert got and has a slot for
    vector_view<int64_t> offsets;   // (E+1)  first slot of each expert
    vector_view<int32_t> slot_of;   // (C)    -1: dropped
    vector_view<int32_t> choice_of; // (S)    -1: padding
    vector_view<int32_t> token_of;  // (S)    -1: padding
    int64_t tokens = 0;             ///< T
    int64_t slots = 0;              ///< S: the bound that buffers are sized by; offsets(E) are in use
    int64_t alignment = 1;          ///< experts start at multiples of it
    int64_t slots_each = -1;        ///< every expert has exactly so many slots; -1: what its choices and alignment ask

    row_groups groups() const noexcept { return {counts, offsets, slots}; }
};

namespace detail {

inline plan reserve_slots(arena& memory, int64_t tokens, int64_t choices, int64_t experts, int64_t slots)
{
    plan p;
    p.counts = memory.vector<int32_t>(experts);
    p.offsets = memory.vector<int64_t>(experts + 1);
    p.slot_of = memory.vector<int32_t>(choices);
    p.choice_of = memory.vector<int32_t>(slots);
    p.token_of = memory.vector<int32_t>(slots);
    p.tokens = tokens;
    p.slots = slots;
    return p;
}

/// The most choices that can have a slot, since a token has an expert once at most: min(C, T * E).
constexpr int64_t most_placed(int64_t tokens, int64_t choices, int64_t experts) noexcept
{
    if (experts == 0) return 0;
    return tokens > choices / experts ? choices : tokens * experts;
}

} // namespace detail

/// Room for a plan of `choices` choices. S = min(choices, tokens * experts) + experts * (alignment - 1): a token has an
/// expert once at most, so where K of its choices are listed and few experts are here, only so many of them need a slot.
inline plan reserve_plan(arena& memory, int64_t tokens, int64_t choices, int64_t experts, int64_t alignment = 1)
{
    expects(alignment >= 1, "alignment", alignment, "1 or more");
    expects(experts >= 0 && experts <= INT32_MAX, "experts", experts, "0 to 2^31 - 1");
    const int64_t slots = detail::most_placed(tokens, choices, experts) + experts * (alignment - 1);
    expects(slots <= INT32_MAX, "slots", slots, "at most 2^31 - 1");
    plan p = detail::reserve_slots(memory, tokens, choices, experts, slots);
    p.alignment = alignment;
    return p;
}

/// Room for a plan that pads every expert to `slots_each` slots, such as a capacity: expert e has slots [e * slots_each,
/// (e + 1) * slots_each), its choices first. S = experts * slots_each. Choices beyond that are dropped, the last first.
inline plan reserve_padded_plan(arena& memory, int64_t tokens, int64_t choices, int64_t experts, int64_t slots_each)
{
    expects(slots_each >= 0, "slots_each", slots_each, "zero or more");
    expects(experts >= 0 && experts <= INT32_MAX, "experts", experts, "0 to 2^31 - 1");
    expects(slots_each == 0 || experts <= INT32_MAX / slots_each, "slots_each", slots_each, "at most 2^31 - 1 slots in all");
    plan p = detail::reserve_slots(memory, tokens, choices, experts, experts * slots_each);
    p.slots_each = slots_each;
    return p;
}

namespace verbs {
struct make_plan;
}

namespace detail {

/// Everything that make_plan writes, as reserve_plan gives it.
template <class Real>
void expects_plan(const plan& p, const routing<Real>& route)
{
    expects(p.tokens == route.tokens, "plan.tokens", p.tokens, "the routing's T = ", route.tokens);
    expects(p.alignment >= 1, "plan.alignment", p.alignment, "1 or more");
    if (p.slots_each >= 0) {
        expects(p.slots == route.total_experts * p.slots_each, "plan.slots", p.slots, "E * slots_each = ",
                route.total_experts * p.slots_each);
    } else {
        const int64_t needed = most_placed(route.tokens, route.choices(), route.total_experts) + route.total_experts * (p.alignment - 1);
        expects(p.slots >= needed, "plan.slots", p.slots, "min(C, T * E) + E * (alignment - 1) = ", needed, " or more");
    }
    expects(p.slots <= INT32_MAX, "plan.slots", p.slots, "at most 2^31 - 1");
    expects_shape(p.counts, "plan.counts (E)", route.total_experts);
    expects_shape(p.offsets, "plan.offsets (E+1)", route.total_experts + 1);
    expects_shape(p.slot_of, "plan.slot_of (C)", route.choices());
    expects_shape(p.choice_of, "plan.choice_of (S)", p.slots);
    expects_shape(p.token_of, "plan.token_of (S)", p.slots);
}

struct plan_offsets {
    plan p;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const auto& self = p;
        const int64_t each = p.slots_each;
        if (each >= 0) {
            team.for_each(self.counts.extent(0), [&self, each](int64_t e) {
                if (self.counts(e) > each) self.counts(e) = static_cast<int32_t>(each);
            });
            team.sync();
        }
        const int64_t total = team.scan(
            self.counts.extent(0), int64_t{0}, [](int64_t a, int64_t b) { return a + b; },
            [&self, each](int64_t e) {
                return each >= 0 ? each : (self.counts(e) + self.alignment - 1) / self.alignment * self.alignment;
            },
            [&self](int64_t e, int64_t start) { self.offsets(e) = start; });
        if (team.lane() == 0) self.offsets(self.counts.extent(0)) = total;
    }
};

struct clear_slots {
    using vectorized = void;
    int32_t* choice_of; // (S)
    int32_t* token_of;  // (S)

    FASTMOE_HOST_DEVICE void operator()(int64_t s) const { choice_of[s] = token_of[s] = -1; }
};

/// slot_of holds ranks when this begins and slots when it ends.
template <class Real>
struct place_choices {
    routing<Real> route;
    vector_view<const int32_t> ids; // (C)
    plan p;

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        for (int64_t c = route.begin(t); c < route.end(t); ++c) {
            const int32_t e = ids(c);
            if (e < 0) continue;
            if (p.slots_each >= 0 && p.slot_of(c) >= p.slots_each) {
                p.slot_of(c) = -1;
                continue;
            }
            const auto s = static_cast<int32_t>(p.offsets(e) + p.slot_of(c));
            p.slot_of(c) = s;
            p.choice_of(s) = static_cast<int32_t>(c);
            p.token_of(s) = static_cast<int32_t>(t);
        }
    }
};

/// All of a plan by one team: of few choices, where each further loop would cost more than what it does.
template <class Real>
struct plan_few {
    check_choice<Real> checked;
    plan p;

    /// Choices and experts of the largest.
    static constexpr int64_t most_choices = 2048, most_experts = 4096;

    static bool takes(const routing<Real>& route) noexcept
    {
        return !route.ragged() && route.k <= few_choices && route.choices() <= most_choices && route.total_experts <= most_experts;
    }
    row_hint hint() const noexcept
    {
        const int64_t choices = checked.route.choices(), experts = checked.route.total_experts;
        return {.width = choices + experts + p.slots, .scratch_bytes = ((choices + 15) / 16 + (experts + 15) / 16) * 64};
    }

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const int64_t choices = checked.route.choices(), experts = checked.route.total_experts;
        const auto& self = *this;
        const vector_view<int32_t> ids(team.template scratch<int32_t>(choices), choices);
        int32_t* counts = team.template scratch<int32_t>(experts);
        team.for_each(experts, [counts](int64_t e) { counts[e] = 0; });
        team.for_each(p.slots, [&self](int64_t s) { self.p.choice_of(s) = self.p.token_of(s) = -1; });
        team.for_each(checked.route.tokens, check_few<Real>{checked, ids});
        team.sync();
        team.tally(
            choices, counts, [ids](int64_t c) { return ids(c); }, [&self](int64_t c, int32_t rank) { self.p.slot_of(c) = rank; });
        team.for_each(experts, [&self, counts](int64_t e) { self.p.counts(e) = counts[e]; });
        team.sync();
        plan_offsets{p}(team, 0);
        team.sync();
        team.for_each(checked.route.tokens, place_choices<Real>{checked.route, ids, p});
    }
};

} // namespace detail

template <class Executor>
struct implementation<verbs::make_plan, Executor> {
    template <class Real>
    static void run(Executor& ex, const routing<Real>& route, const plan& p, arena& scratch)
    {
        if (detail::plan_few<Real>::takes(route)) {
            const detail::plan_few<Real> all{{route, ex.faults()}, p};
            if (!scratch.measuring()) fastmoe::for_each_row(ex, 1, all, all.hint());
            return;
        }
        detail::with_checked_choices(ex, route, scratch, [&](const routing<Real>& safe, vector_view<int32_t> ids) {
            bucket(ex, ids, p.counts, p.slot_of, scratch);
            if (scratch.measuring()) return;
            fastmoe::for_each_row(ex, 1, detail::plan_offsets{p}, {.width = route.total_experts});
            fastmoe::for_each(ex, p.slots, detail::clear_slots{p.choice_of.data_handle(), p.token_of.data_handle()});
            fastmoe::for_each(ex, route.tokens, detail::place_choices<Real>{safe, ids, p});
        });
    }
};

/// Fills the plan from a routing. Ids that are out of range, or that stand twice in one token, count as dropped, so that
/// nothing is ever read or written out of bounds, and are reported: by deliver_faults() on the host, which this calls
/// (the plan is complete when it throws), by synchronize() elsewhere.
/// @param route    ids and choices; `first` must not decrease nor pass C
/// @param p        from reserve_plan with the same tokens, choices and experts; overwritten
/// @param scratch  taken and given back; on a measuring arena only counted
/// @throws invalid_argument if shapes disagree, out_of_memory if the scratch is too small (before anything is written)
template <executor Executor, class Real>
void make_plan(Executor& ex, const routing<Real>& route, const plan& p, arena& scratch)
{
    if (!scratch.measuring()) {
        detail::expects_routing(route);
        detail::expects_plan(p, route);
        arena measure;
        implementation<verbs::make_plan, Executor>::run(ex, route, p, measure);
        scratch.require(measure.bytes());
    }
    const arena::scope lent(scratch);
    implementation<verbs::make_plan, Executor>::run(ex, route, p, scratch);
    if (!scratch.measuring()) ex.deliver_faults();
}

} // namespace fastmoe::inline FASTMOE_ABI
