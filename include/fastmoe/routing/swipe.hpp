// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Swipe (FastMoE): every worker gets as many choices as its own tokens make; what is too much for one moves to another.
/// Nothing is dropped, and no worker waits for a busier one.
#pragma once

#include <fastmoe/routing/assigned_gate.hpp>
#include <fastmoe/routing/capacity_over_ranks.hpp>
#include <fastmoe/routing/choose.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail {

/// The greatest logit of an expert in [begin, end) that is not among n ids; ties to the lower id. -1 if all are.
template <class Real>
FASTMOE_HOST_DEVICE int32_t best_unused(const Real* logits, int64_t begin, int64_t end, const int32_t* ids, int64_t n)
{
    int32_t best = -1;
    order_key<Real> key = no_key<order_key<Real>>;
    for (int64_t e = begin; e < end; ++e) {
        bool used = false;
        for (int64_t j = 0; j < n; ++j) used |= ids[j] == e;
        const auto own = ordered(logits[e]);
        if (used || own <= key) continue;
        key = own;
        best = static_cast<int32_t>(e);
    }
    return best;
}

/// A rank's own budget in its place, zeros in the others'.
struct own_budget {
    int64_t* budget; // (R)
    int64_t rank, choices;

    FASTMOE_HOST_DEVICE void operator()(int64_t r) const { budget[r] = r == rank ? choices : 0; }
};

/// The worker of each token's choice of one place.
struct worker_of_choice {
    const int32_t* experts; // (T,K)
    int32_t* workers;       // (T)
    int64_t k, place, each; ///< experts of a worker

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        const int32_t e = experts[t * k + place];
        workers[t] = e < 0 ? -1 : static_cast<int32_t>(e / each);
    }
};

/// What a rank knows of all workers while the choices of one place are settled.
struct worker_room {
    int64_t* budget; // (R)    choices that a worker may still get
    int64_t* limit;  // (R)    the same, before this place
    int64_t* base;   // (R)    how many choices of lower ranks want the worker
    int64_t* end;    // (R+1)  room for moved choices up to and including the worker; then the number of this rank's first
};

/// Choices of lower ranks, then of lower tokens, stay; the others are numbered in that order, and fill the room that is left
/// from worker 0 on.
struct settle_workers {
    const int64_t* table; // (R,R)  choices that rank r has for worker w
    worker_room room;
    int64_t rank, ranks;

    FASTMOE_HOST_DEVICE void operator()(int64_t) const
    {
        int64_t moved = 0, moved_before = 0, filled = 0;
        for (int64_t w = 0; w < ranks; ++w) {
            int64_t before = 0;
            room.limit[w] = room.budget[w];
            for (int64_t r = 0; r < ranks; ++r) {
                const int64_t here = table[r * ranks + w], kept = room.budget[w] - before;
                if (r == rank) room.base[w] = before;
                before += here;
                const int64_t over = here - (kept < 0 ? 0 : (kept < here ? kept : here));
                moved += over;
                if (r < rank) moved_before += over;
            }
            const int64_t left = room.budget[w] - before;
            room.budget[w] = left > 0 ? left : 0;
        }
        for (int64_t w = 0; w < ranks; ++w) {
            const int64_t start = filled;
            room.end[w] = filled += room.budget[w];
            const int64_t taken = moved < filled ? moved - start : room.budget[w];
            room.budget[w] -= taken > 0 ? taken : 0;
        }
        room.end[ranks] = moved_before;
    }
};

/// Bucket 0 for choices that must move.
struct must_move {
    const int32_t* workers; // (T)
    const int32_t* order;   // (T)  among this rank's choices of the worker
    int32_t* moves;         // (T)  0 or -1
    worker_room room;

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        const int32_t w = workers[t];
        moves[t] = w >= 0 && room.base[w] + order[t] >= room.limit[w] ? 0 : -1;
    }
};

/// Gives each token its expert of one place.
template <class Real>
struct place_choice {
    matrix_view<const Real> logits; // (T,E)
    const int32_t* workers;         // (T)
    const int32_t* number;          // (T)  of a choice that moves, on this rank; -1: stays
    int32_t* experts;               // (T,K)
    worker_room room;
    int64_t k, place, each, ranks;

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        int64_t w = workers[t];
        if (w < 0) return;
        int32_t *ids = experts + t * k, *own = ids + place;
        const Real* l = logits.data_handle() + t * logits.extent(1);
        if (number[t] < 0) {
            bool taken = false; // by a choice that moved here
            for (int64_t j = 0; j < place; ++j) taken |= ids[j] == *own;
            if (!taken) return;
        } else {
            const int64_t n = room.end[ranks] + number[t];
            for (w = 0; w < ranks - 1 && n >= room.end[w];) ++w;
        }
        const int32_t there = best_unused(l, w * each, (w + 1) * each, ids, place);
        *own = there >= 0 ? there : best_unused(l, 0, ranks * each, ids, place);
    }
};

} // namespace detail

/// In training: every token chooses its top K. Each of the R ranks' workers holds E/R experts, in order, and has a budget of
/// T*K choices, with the T of its own rank. Places are settled one after the other, all first choices before any second; of
/// one place, choices in order of rank and token keep their worker while its budget lasts. Those that are left over go, in
/// the same order, to the workers that have room, the lowest first, and take the best expert there that the token does not
/// have. So every choice is made, no expert comes twice in a token, and the budgets hold, if a worker has K experts; with
/// fewer, a token that has all experts of a worker takes its best other one, over the budget.
///
/// In inference, where a token's experts must not depend on others: its top K, best first.
///
/// FastMoE's code moves the same choices to the same workers, but to expert (place mod E/R) there, whatever its score and
/// whether or not the token has it already, so that an expert can come twice.
struct swipe {
    static constexpr bool reads_logits = true;
    static constexpr bool ragged = false;

    template <class Executor, class T, class Communicator, class Real>
    void assign(Executor& ex, const gate_input<T>& in, const Communicator& c, const assignment<Real>& to,
                arena& scratch) const
    {
        const int64_t tokens = to.tokens, experts = to.total_experts, k = to.k, ranks = c.size(), rank = c.rank();
        expects(experts % ranks == 0, "experts", experts, "a multiple of the ", ranks, " ranks");
        detail::expects_team_room(top_k::scratch_bytes<Real>(experts, k), "experts", experts);
        const bool live = !scratch.measuring();
        if (live)
            detail::choose_rows(ex, in.logits, in.mask.extent(0) ? in.mask : vector_view<const std::uint8_t>{}, k,
                                detail::logit_rows{}, to.experts);
        if (in.mode == gate_mode::inference || ranks == 1) return;
        const auto workers = scratch.vector<int32_t>(tokens), order = scratch.vector<int32_t>(tokens);
        const auto moves = scratch.vector<int32_t>(tokens), number = scratch.vector<int32_t>(tokens);
        const auto counts = scratch.vector<int32_t>(ranks), moving = scratch.vector<int32_t>(1);
        const auto table = scratch.vector<int64_t>(ranks * ranks + 1);
        const auto budget = scratch.vector<int64_t>(ranks), others = scratch.vector<int64_t>(3 * ranks + 1);
        int64_t* rest = others.data_handle();
        const detail::worker_room room{budget.data_handle(), rest, live ? rest + ranks : nullptr,
                                       live ? rest + 2 * ranks : nullptr};
        const int64_t each = experts / ranks;
        const arena::scope lent(scratch);
        if (live) {
            fastmoe::for_each(ex, ranks, detail::own_budget{budget.data_handle(), rank, tokens * k});
            c.all_reduce(ex, budget);
        }
        for (int64_t place = 0; place < k; ++place) {
            if (live)
                fastmoe::for_each(
                    ex, tokens,
                    detail::worker_of_choice{to.experts.data_handle(), workers.data_handle(), k, place, each});
            bucket(ex, workers, counts, order, scratch);
            if (live) {
                fastmoe::for_each(ex, table.extent(0),
                                  detail::write_row{counts.data_handle(), table.data_handle(), ranks, rank, ranks, 0});
                c.all_reduce(ex, table);
                fastmoe::for_each(ex, 1, detail::settle_workers{table.data_handle(), room, rank, ranks});
                fastmoe::for_each(
                    ex, tokens,
                    detail::must_move{workers.data_handle(), order.data_handle(), moves.data_handle(), room});
            }
            bucket(ex, moves, moving, number, scratch);
            if (!live) break; // each place takes the same
            fastmoe::for_each(ex, tokens,
                              detail::place_choice<Real>{in.logits, workers.data_handle(), number.data_handle(),
                                                         to.experts.data_handle(), room, k, place, each, ranks});
        }
    }
};

/// Scores are read again where a choice has moved: softmax over the chosen.
using swipe_gate = assigned_gate<swipe, softmax_score, renormalize>;

} // namespace fastmoe::inline FASTMOE_ABI
