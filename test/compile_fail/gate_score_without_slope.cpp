// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A score whose rows do not say how a value moves with its logit is refused where it enters the gate.
// expect: answers_for_experts
// expect: row\.slope
#include <fastmoe/moe.hpp>

struct my_score {
    template <class Real>
    struct scores {
        static constexpr bool sums_to_one = false;
        const Real* logits;
        bool empty() const { return false; }
        Real selection(fastmoe::int64_t e) const { return logits[e]; }
        Real value(Real l) const { return l; }
#if defined(CORRECT)
        Real slope(Real, Real) const { return 1; }
#endif
    };
    template <class Team, class Real>
    scores<Real> row(Team&, const Real* logits, fastmoe::int64_t) const
    {
        return {logits};
    }
};

fastmoe::top_k_gate<my_score> make() { return {}; }
