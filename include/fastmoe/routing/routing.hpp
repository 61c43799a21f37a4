// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What a gate decides: for every token its choices, in token order, each an expert and a weight.
#pragma once

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/exec/executor.hpp>
#include <fastmoe/exec/memory.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Choices of token t are entries [begin(t), end(t)): k for every token, or ragged with `first`.
/// Real is double for double tensors and float for all others.
template <class Real>
struct routing {
    int64_t tokens = 0;                 ///< T
    int64_t total_experts = 0;          ///< E
    int64_t k = 0;                      ///< K; 0 where choices are ragged
    vector_view<int32_t> experts;       // (C)    in [0, E), or -1: dropped
    vector_view<Real> weights;          // (C)    0 for a dropped choice
    vector_view<const int32_t> first;   // (T+1)  empty where every token has k choices
    int64_t origin = 0;                 ///< choices before these, if they are a part of more: faults count from there

    FASTMOE_HOST_DEVICE constexpr bool ragged() const noexcept { return first.extent(0) != 0; }
    FASTMOE_HOST_DEVICE constexpr int64_t choices() const noexcept { return experts.extent(0); }
    FASTMOE_HOST_DEVICE constexpr int64_t begin(int64_t t) const noexcept { return ragged() ? inside(first(t)) : t * k; }
    FASTMOE_HOST_DEVICE constexpr int64_t end(int64_t t) const noexcept
    {
        return ragged() ? inside(first(t + 1)) : (t + 1) * k;
    }

private:
    // A wrong `first` is a fault that make_plan reports; until then it must not lead out of the arrays.
    FASTMOE_HOST_DEVICE constexpr int64_t inside(int64_t c) const noexcept
    {
        return c < 0 ? 0 : (c > choices() ? choices() : c);
    }
};

/// Room for k choices of every token.
template <class Real>
routing<Real> reserve_routing(arena& memory, int64_t tokens, int64_t total_experts, int64_t k)
{
    expects(k >= 0 && (k == 0 || tokens <= INT32_MAX / k), "tokens * k", tokens, "at most 2^31 - 1 choices");
    return {tokens, total_experts, k, memory.vector<int32_t>(tokens * k), memory.vector<Real>(tokens * k), {}};
}

namespace detail {

template <class Real>
void expects_routing(const routing<Real>& r)
{
    expects(r.tokens >= 0, "routing.tokens", r.tokens, "zero or more");
    expects(r.total_experts >= 0, "routing.total_experts", r.total_experts, "zero or more");
    if (r.ragged()) expects_shape(r.first, "routing.first (T+1)", r.tokens + 1);
    else expects(r.choices() == r.tokens * r.k, "routing.experts (C)", r.choices(), "T * K = ", r.tokens * r.k);
    expects_shape(r.experts, "routing.experts (C)", r.choices());
    expects_shape(r.weights, "routing.weights (C)", r.choices());
}

/// The offsets of ragged choices as they should be: from 0, without a decrease, up to C. So no choice belongs to two
/// tokens, and whatever stands in `first`, each is written by one of them or by none.
template <class Real>
struct repair_first {
    routing<Real> route;
    vector_view<int32_t> repaired; // (T+1)
    fault_recorder faults;

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t) const
    {
        const auto& self = *this;
        team.scan(
            route.tokens + 1, int32_t{0}, [](int32_t a, int32_t b) { return a > b ? a : b; },
            [&self](int64_t t) { return self.counts_for(t) ? self.route.first(t) : int32_t{0}; },
            [&self](int64_t t, int32_t least) {
                const int32_t here = self.route.first(t);
                const bool wrong = !self.counts_for(t) || here < least;
                if (wrong) self.faults.record(fault_kind::first_out_of_order, t, here);
                self.repaired(t) = wrong ? least : here;
            });
    }

private:
    /// Whether the number may raise those after it.
    FASTMOE_HOST_DEVICE bool counts_for(int64_t t) const { return route.first(t) <= route.choices() && (t != 0 || route.first(0) == 0); }
};

} // namespace detail

} // namespace fastmoe::inline FASTMOE_ABI
