// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// An exchange that is chosen when the program runs: one of the library's three, behind the verbs that a layer calls. So the
/// layer is compiled once for all of them.
#pragma once

#include <fastmoe/parallel/expert_parallel.hpp>

#include "train_gpt/rank_options.hpp"
#include "train_gpt/team_math.hpp"

namespace train_gpt {

/// See parallel/exchange.hpp for the contracts.
struct chosen_exchange {
    exchange_kind kind = exchange_kind::exact;
    int64_t budget = 0; ///< rows for a rank in the padded exchange. With the most tokens that a rank has, none is lost

    using partials = fm::accumulated_partials;
    template <class Real>
    struct state {
        fm::exact_exchange<>::state<Real> exact;
        fm::gathered_exchange<>::state<Real> gathered;
        fm::padded_exchange<>::state<Real> padded;
    };

    template <class Real, class Rule>
    state<Real> reserve(fm::arena& memory, const fm::routing<Real>& route, const fm::placed_experts<Rule>& place) const
    {
        state<Real> s;
        with(s, [&](const auto& x, auto& own) { own = x.template reserve<Real>(memory, route, place); });
        return s;
    }
    template <class State>
    fm::exchange_sizes sizes(const State& s) const
    {
        return with(s, [&](const auto& x, const auto& own) { return x.sizes(own); });
    }
    template <class Executor, class C, class Real, class Rule>
    void announce(Executor& ex, const C& c, const fm::routing<Real>& route, const fm::placed_experts<Rule>& place,
                  state<Real>& s, fm::arena& scratch) const
    {
        with(s, [&](const auto& x, auto& own) { x.announce(ex, c, route, place, own, scratch); });
    }
    template <class Real, class Rule>
    fm::routing<Real> reserve_received(fm::arena& memory, const state<Real>& s,
                                       const fm::placed_experts<Rule>& place) const
    {
        return with(s, [&](const auto& x, const auto& own) { return x.template reserve_received<Real>(memory, own, place); });
    }
    template <class Executor, class C, class Real, class Rule>
    void send_choices(Executor& ex, const C& c, const fm::routing<Real>& route, const fm::placed_experts<Rule>& place,
                      const state<Real>& s, const fm::routing<Real>& received, fm::arena& scratch) const
    {
        with(s, [&](const auto& x, const auto& own) { x.send_choices(ex, c, route, place, own, received, scratch); });
    }
    template <class Executor, class C, class State, class T>
    void send_rows(Executor& ex, const C& c, const State& s, matrix_view<const T> tokens, matrix_view<T> rows,
                   fm::arena& scratch) const
    {
        with(s, [&](const auto& x, const auto& own) { x.send_rows(ex, c, own, tokens, rows, scratch); });
    }
    template <class Real, class Executor, class C, class P>
    fm::returned_rows<P, Real> bring_rows_back(Executor& ex, const C& c, const fm::routing<Real>& route,
                                               const state<Real>& s, matrix_view<P> partial, fm::arena& memory) const
    {
        return with(s, [&](const auto& x, const auto& own) {
            return x.template bring_rows_back<Real>(ex, c, route, own, partial, memory);
        });
    }
    template <class Executor, class C, class Real>
    void bring_back(Executor& ex, const C& c, const state<Real>& s, vector_view<Real> values, vector_view<Real> out,
                    fm::arena& scratch) const
    {
        with(s, [&](const auto& x, const auto& own) { x.bring_back(ex, c, own, values, out, scratch); });
    }

private:
    /// f(the exchange, its state).
    template <class State, class F>
    auto with(State& s, const F& f) const
    {
        switch (kind) {
        case exchange_kind::gathered: return f(fm::gathered_exchange<>{}, s.gathered);
        case exchange_kind::padded: return f(fm::padded_exchange<>{.rows_per_rank = budget}, s.padded);
        default: return f(fm::exact_exchange<>{}, s.exact);
        }
    }
};

} // namespace train_gpt
