// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A score whose rows do not say how a value moves with its logit is refused where a gate with it enters a layer.
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

void run(fastmoe::host_executor& ex, fastmoe::matrix_view<const float> x, fastmoe::matrix_view<float> y)
{
    const fastmoe::moe_layer layer{fastmoe::top_k_gate<my_score>{.experts = 4, .k = 2}, fastmoe::mlp<>{.width = 8, .hidden = 4}};
    const auto w = fastmoe::random_weights<float>(ex, layer, 1);
    layer.infer(ex, x, w.view(), y);
}
