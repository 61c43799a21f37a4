// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Something that is no expert is refused where it enters a pair, as several of a kind.
// expect: states_weighing
// expect: weighs_output
#include <fastmoe/moe.hpp>

namespace fm = fastmoe;

struct my_expert {
    static constexpr bool applies_weights = true;
#if defined(CORRECT)
    static constexpr bool weighs_output() { return true; }
#endif
};

fm::several<my_expert> make() { return {}; }
