// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The cheapest assignment of tokens to experts of bounded size, exactly, in integers: the solver behind
/// balanced_assignment.
///
/// Experts have prices, and every token starts where cost and price are least. While an expert e holds more than T/E, one
/// token too many leaves it along the cheapest path: a token of e to expert f, one of f to g, ..., up to an expert with
/// room. An edge costs what the cheapest move between its two experts does. With prices raised after each path no edge
/// costs less than nothing, and the paths of Dijkstra's algorithm keep the assignment the cheapest there is for the sizes
/// it has: successive shortest paths, for a graph whose nodes are the experts (Ahuja, Magnanti and Orlin 1993, sec. 9.7).
///
/// So there are fewer than T paths, each settles at most E experts, and an expert is settled in O(E). Every expert can
/// reach one with room in one step, so no price exceeds the first ones by more than the greatest cost. All is integers and
/// ties are broken by number, so the result is the same on any executor.
#pragma once

#include <fastmoe/exec/executor.hpp>
#include <fastmoe/exec/memory.hpp>
#include <fastmoe/routing/score.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail {

/// More than any path costs. Costs are below a fourth of it.
inline constexpr int64_t unreachable = int64_t{1} << 61;

struct lesser_of {
    template <class Value>
    FASTMOE_HOST_DEVICE constexpr Value operator()(Value a, Value b) const noexcept
    {
        return b < a ? b : a;
    }
};

/// What the solver works on; all memory of the executor.
struct assignment_problem {
    matrix_view<const int64_t> costs; // (E,T)  0 to 2^59
    int32_t* experts;                 // (T)    the expert of a token, -1: takes no part
    int64_t* own;                     // (T)    the cost of a token where it is
    int32_t *next, *previous;         // (T)    tokens of the same expert; -1: none
    int32_t *head, *load;             // (E)    the first of them, and how many
    int64_t* prices;                  // (E)
    int64_t* distances;               // (E)    of a search
    int64_t* pending;                 // (E)    the same until an expert is settled
    int32_t* origins;                 // (E)    the expert before on the way
    matrix_view<int64_t> moves;       // (E,E)  cost of the cheapest move from one expert to another
    matrix_view<int32_t> movers;      // (E,E)  which token that is

    static assignment_problem reserve(arena& memory, matrix_view<const int64_t> costs, vector_view<int32_t> experts)
    {
        const int64_t tokens = costs.extent(1), all = costs.extent(0);
        assignment_problem p{};
        p.costs = costs;
        p.experts = experts.data_handle();
        p.own = memory.vector<int64_t>(tokens).data_handle();
        p.next = memory.vector<int32_t>(tokens).data_handle();
        p.previous = memory.vector<int32_t>(tokens).data_handle();
        p.head = memory.vector<int32_t>(all).data_handle();
        p.load = memory.vector<int32_t>(all).data_handle();
        p.prices = memory.vector<int64_t>(all).data_handle();
        p.distances = memory.vector<int64_t>(all).data_handle();
        p.pending = memory.vector<int64_t>(all).data_handle();
        p.origins = memory.vector<int32_t>(all).data_handle();
        p.moves = memory.matrix<int64_t>(all, all);
        p.movers = memory.matrix<int32_t>(all, all);
        return p;
    }

    FASTMOE_HOST_DEVICE int64_t tokens() const noexcept { return costs.extent(1); }
    FASTMOE_HOST_DEVICE int64_t total_experts() const noexcept { return costs.extent(0); }
    FASTMOE_HOST_DEVICE const int64_t* column(int64_t e) const noexcept { return costs.data_handle() + e * tokens(); }

    /// By one lane.
    FASTMOE_HOST_DEVICE void link(int32_t t, int64_t e) const
    {
        next[t] = head[e];
        previous[t] = -1;
        if (head[e] >= 0) previous[head[e]] = t;
        head[e] = t;
        ++load[e];
        experts[t] = static_cast<int32_t>(e);
        own[t] = column(e)[t];
    }
    FASTMOE_HOST_DEVICE void unlink(int32_t t, int64_t e) const
    {
        if (previous[t] >= 0) next[previous[t]] = next[t];
        else head[e] = next[t];
        if (next[t] >= 0) previous[next[t]] = previous[t];
        --load[e];
    }

    /// Finds the cheapest move from one expert to another among all of its tokens.
    FASTMOE_HOST_DEVICE void find_move(int64_t from, int64_t to) const
    {
        const int64_t* cost = column(to);
        int64_t least = unreachable;
        int32_t mover = -1;
        for (int32_t t = head[from]; t >= 0; t = next[t]) {
            const int64_t here = cost[t] - own[t];
            if (here > least || (here == least && t > mover)) continue;
            least = here;
            mover = t;
        }
        moves(from, to) = least;
        movers(from, to) = mover;
    }
};

/// Lists every expert's tokens.
struct link_tokens {
    assignment_problem p;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const assignment_problem in = p;
        team.for_each(in.total_experts(), [in](int64_t e) { in.head[e] = -1; });
        team.for_each(in.total_experts(), [in](int64_t e) { in.load[e] = 0; });
        team.for_each(in.tokens(), [in](int64_t t) { in.own[t] = 0; });
        team.sync();
        if (team.lane() != 0) return;
        for (int64_t t = in.tokens(); t-- > 0;)
            if (in.experts[t] >= 0) in.link(static_cast<int32_t>(t), in.experts[t]);
    }
};

/// All cheapest moves to one expert.
struct find_moves {
    assignment_problem p;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t to) const
    {
        const assignment_problem in = p;
        team.for_each(in.total_experts(), [in, to](int64_t from) { in.find_move(from, to); });
    }
};

/// Moves tokens along cheapest paths until every expert holds as many.
struct even_out {
    using vectorized = void;
    assignment_problem p;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const int64_t all = p.total_experts();
        const int32_t* load = p.load;
        const int64_t tokens = team.reduce(all, int64_t{0}, adds{}, [load](int64_t e) { return int64_t{load[e]}; });
        const int64_t most = tokens / all;
        for (int64_t e = 0; e < all; ++e)
            while (load[e] > most) {
                const int64_t room = search(team, e, most);
                shift(team, e, room);
            }
    }

private:
    /// Dijkstra's algorithm from one expert to the nearest with room, which it returns; then raises the prices of the
    /// experts that are nearer. A move whose token has left costs no more than those that remain, so it may wait until the
    /// way over it is the shortest; it alone can cost less than nothing, which those that remain do not.
    template <class Team>
    FASTMOE_HOST_DEVICE int64_t search(Team& team, int64_t start, int64_t most) const
    {
        const int64_t all = p.total_experts();
        int64_t *prices = p.prices, *distances = p.distances, *pending = p.pending;
        int32_t* origins = p.origins;
        const int32_t* load = p.load;
        team.for_each(all, [=](int64_t e) { distances[e] = pending[e] = e == start ? 0 : unreachable; });
        team.sync();
        for (;;) {
            const int64_t distance =
                team.reduce(all, unreachable, lesser_of{}, [pending](int64_t e) { return pending[e]; });
            // Of equally near ones, one with room before the others.
            const int64_t found = team.reduce(all, 2 * all, lesser_of{}, [=](int64_t e) {
                const int64_t order = load[e] < most ? e : all + e;
                return pending[e] == distance ? order : 2 * all;
            });
            const int64_t nearest = found < all ? found : found - all;
            if (nearest != start && renew(team, nearest)) continue;
            team.sync(); // everybody has read the way there
            if (found < all) {
                team.for_each(all, [=](int64_t e) {
                    const int64_t before = distances[e];
                    prices[e] += before < distance ? distance - before : 0;
                });
                team.sync();
                return nearest;
            }
            const int64_t price = prices[nearest];
            const int64_t* move = p.moves.data_handle() + nearest * all;
            team.for_each(all, [=](int64_t e) {
                const int64_t edge = move[e] + prices[e] - price, before = distances[e], open = pending[e];
                const int64_t reached = edge > 0 ? distance + edge : distance;
                const int32_t origin = origins[e];
                distances[e] = reached < before ? reached : before;
                pending[e] = reached < before ? reached : open;
                origins[e] = reached < before ? static_cast<int32_t>(nearest) : origin;
                if (e == nearest) pending[e] = unreachable;
            });
            team.sync();
        }
    }

    /// If the token of the last move to an expert has left, finds another, and the shortest way with it.
    template <class Team>
    FASTMOE_HOST_DEVICE bool renew(Team& team, int64_t to) const
    {
        const assignment_problem in = p;
        const int64_t all = in.total_experts(), from = in.origins[to];
        if (in.experts[in.movers(from, to)] == from) return false;
        replace(team, from, to);
        const int64_t *distances = in.distances, *pending = in.pending;
        const auto way = [=](int64_t e) { // over e, if that is settled
            const int64_t edge = in.moves(e, to) + in.prices[to] - in.prices[e];
            const int64_t sum = edge > 0 ? distances[e] + edge : distances[e];
            const bool settled = (distances[e] < unreachable) & (pending[e] == unreachable);
            return settled ? sum : unreachable;
        };
        const int64_t shortest = team.reduce(all, unreachable, lesser_of{}, way);
        const int64_t origin =
            team.reduce(all, all, lesser_of{}, [=](int64_t e) { return way(e) == shortest ? e : all; });
        team.sync(); // everybody has read what was
        if (team.lane() == 0) {
            in.distances[to] = in.pending[to] = shortest;
            in.origins[to] = static_cast<int32_t>(origin);
        }
        team.sync();
        return true;
    }

    /// The cheapest of the moves that remain: by one lane along a short list, by all among all tokens if it is long.
    template <class Team>
    FASTMOE_HOST_DEVICE void replace(Team& team, int64_t from, int64_t to) const
    {
        const assignment_problem in = p;
        const int64_t tokens = in.tokens();
        constexpr int64_t longer = 16; // a step of a list costs as much as so many tokens in a row
        if (in.load[from] * longer < tokens) {
            team.sync(); // everybody has read who it was
            if (team.lane() == 0) in.find_move(from, to);
            team.sync();
            return;
        }
        const int32_t* experts = in.experts;
        const int64_t *own = in.own, *cost = in.column(to);
        // No load hangs on a condition: g++ 12 -O3 makes a masked one of it, and takes its zeros for the other case.
        const int64_t least = team.reduce(tokens, unreachable, lesser_of{}, [=](int64_t t) {
            const int64_t move = cost[t] - own[t];
            return experts[t] == from ? move : unreachable;
        });
        const int32_t mover = team.reduce(tokens, INT32_MAX, lesser_of{}, [=](int64_t t) {
            const int64_t move = cost[t] - own[t];
            const bool is = (experts[t] == from) & (move == least);
            return is ? static_cast<int32_t>(t) : INT32_MAX;
        });
        team.sync();
        if (team.lane() == 0) {
            in.moves(from, to) = least;
            in.movers(from, to) = mover;
        }
        team.sync();
    }

    /// Moves one token over every edge of the way, the last first.
    template <class Team>
    FASTMOE_HOST_DEVICE void shift(Team& team, int64_t start, int64_t room) const
    {
        const assignment_problem in = p;
        for (int64_t to = room; to != start;) {
            const int64_t from = in.origins[to];
            const int32_t t = in.movers(from, to);
            team.sync(); // everybody has read which
            if (team.lane() == 0) {
                in.unlink(t, from);
                in.link(t, to);
            }
            team.sync();
            team.for_each(in.total_experts(), [in, to, t](int64_t next) {
                const int64_t cost = in.column(next)[t] - in.own[t];
                if (cost > in.moves(to, next)) return;
                in.moves(to, next) = cost;
                in.movers(to, next) = t;
            });
            team.sync();
            to = from;
        }
    }
};

/// Assigns tokens to experts so that their sum of costs is the least, with the same number for each.
/// @param p  experts: of every token one whose cost and price are least, or -1: it takes no part; E divides the number of
///           those that do. prices: any, within 2^59. Both are overwritten
template <class Executor>
void solve_assignment(Executor& ex, const assignment_problem& p)
{
    const int64_t experts = p.total_experts();
    fastmoe::for_each_row(ex, 1, link_tokens{p}, {.width = p.tokens()});
    fastmoe::for_each_row(ex, experts, find_moves{p}, {.width = 4 * p.tokens()});
    fastmoe::for_each_row(ex, 1, even_out{p}, {.width = p.tokens() * experts});
}

} // namespace fastmoe::inline FASTMOE_ABI::detail
