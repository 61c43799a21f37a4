// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The gate of examples/compose.cu, as a user writes one: each token goes to the two experts with the greatest logits, a and b,
/// with weights w = sigmoid(l_a - l_b) and 1 - w. It fits into a moe_layer as well.
#pragma once

#include <fastmoe/core/math.hpp>
#include <fastmoe/routing/gate.hpp>

namespace compose {

namespace fm = fastmoe;
using fm::int64_t;

template <class Real>
struct choose_pair {
    fm::matrix_view<const Real> logits; // (T,E)
    fm::routing<Real> out;              // two choices a token

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        const auto better = [this, t](int64_t e, int64_t than) { return logits(t, e) > logits(t, than); };
        int64_t a = 0, b = 1; // of equal logits the lower id; two that differ, whatever the logits are
        if (better(b, a)) a = 1, b = 0;
        for (int64_t e = 2; e < logits.extent(1); ++e) {
            if (better(e, a)) b = a, a = e;
            else if (better(e, b)) b = e;
        }
        const Real w = fm::math::sigmoid(logits(t, a) - logits(t, b));
        out.experts(2 * t) = static_cast<fm::int32_t>(a);
        out.experts(2 * t + 1) = static_cast<fm::int32_t>(b);
        out.weights(2 * t) = w;
        out.weights(2 * t + 1) = Real(1) - w;
    }
};

/// dl_a = (dw_a - dw_b) w (1 - w) = -dl_b.
template <class Real>
struct choose_pair_backward {
    fm::routing<Real> chosen;
    fm::vector_view<const Real> dweights; // (2T)
    fm::matrix_view<Real> dlogits;        // (T,E)

    FASTMOE_HOST_DEVICE void operator()(int64_t t) const
    {
        const Real slope = chosen.weights(2 * t) * chosen.weights(2 * t + 1);
        const Real d = (dweights(2 * t) - dweights(2 * t + 1)) * slope;
        for (int64_t e = 0; e < dlogits.extent(1); ++e) dlogits(t, e) = Real(0);
        dlogits(t, chosen.experts(2 * t)) = d;
        dlogits(t, chosen.experts(2 * t + 1)) = -d;
    }
};

struct pair_gate {
    int64_t experts = 2; ///< two or more
    static constexpr int64_t k = 2;

    template <class Executor, class T, class Communicator, class State>
    void route(Executor& ex, const fm::gate_input<T>& in, const Communicator&, const State& state, fm::arena& scratch) const
    {
        if (scratch.measuring()) return; // takes no scratch
        fm::expects(experts >= 2, "pair_gate.experts", experts, "2 or more");
        fm::expects_shape(in.logits, "logits (T,E)", in.x.extent(0), experts);
        fm::for_each(ex, in.x.extent(0), choose_pair<fm::accumulate_t<T>>{in.logits, state.routing});
    }

    /// It has no losses of its own, so no factor of them.
    template <class Executor, class T, class Communicator, class State, class Real>
    void backward(Executor& ex, const fm::gate_input<T>& in, const Communicator&, const State& state,
                  fm::vector_view<const Real> dweights, Real, fm::matrix_view<Real> dlogits, fm::arena& scratch) const
    {
        if (!scratch.measuring())
            fm::for_each(ex, in.x.extent(0), choose_pair_backward<Real>{state.routing, dweights, dlogits});
    }
};

} // namespace compose
