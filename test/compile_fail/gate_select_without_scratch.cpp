// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A selection that does not say what scratch a team needs is refused where a gate with it enters a layer.
// expect: selects_experts
// expect: scratch_bytes
#include <fastmoe/moe.hpp>

struct my_selection {
    static constexpr bool takes_greatest = false;
#if defined(CORRECT)
    template <class Real>
    fastmoe::int64_t scratch_bytes(fastmoe::int64_t, fastmoe::int64_t) const
    {
        return 0;
    }
#endif
    template <class Team, class Row>
    void operator()(Team&, const Row&, fastmoe::int64_t, fastmoe::int64_t k, std::int32_t* chosen) const
    {
        for (fastmoe::int64_t j = 0; j < k; ++j) chosen[j] = static_cast<std::int32_t>(j);
    }
};

void run(fastmoe::host_executor& ex, fastmoe::matrix_view<const float> x, fastmoe::matrix_view<float> y)
{
    const fastmoe::moe_layer layer{fastmoe::top_k_gate<fastmoe::softmax_score, my_selection>{.experts = 4, .k = 2}, fastmoe::mlp<>{.width = 8, .hidden = 4}};
    const auto w = fastmoe::random_weights<float>(ex, layer, 1);
    layer.infer(ex, x, w.view(), y);
}
