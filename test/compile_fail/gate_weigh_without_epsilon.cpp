// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A weighing over the chosen that has no epsilon is refused where it enters the gate.
// expect: weighs_choices
// expect: epsilon
#include <fastmoe/moe.hpp>

struct my_weighing {
    static constexpr bool over_chosen = true;
#if defined(CORRECT)
    double epsilon = 0;
#endif
};

fastmoe::top_k_gate<fastmoe::softmax_score, fastmoe::top_k, my_weighing> make() { return {}; }
