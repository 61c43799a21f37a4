// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A ragged assignment that does not say how many choices there are is refused where it enters the gate.
// expect: states_assignment
// expect: choices
#include <fastmoe/moe.hpp>

struct my_assignment {
    static constexpr bool reads_logits = true;
    static constexpr bool ragged = true;
#if defined(CORRECT)
    fastmoe::int64_t choices(fastmoe::int64_t tokens, fastmoe::int64_t, fastmoe::int64_t k) const { return tokens * k; }
#endif
    template <class... Anything>
    void assign(Anything&&...) const
    {
    }
};

fastmoe::assigned_gate<my_assignment> make() { return {}; }
