// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// An activation without a derivative does not make an mlp.
// expect: plain_activation
// expect: a\.derivative
#include <fastmoe/moe.hpp>

struct my_activation {
    static constexpr bool gated = false;
    template <class Real>
    static Real value(Real x)
    {
        return x;
    }
#if defined(CORRECT)
    template <class Real>
    static Real derivative(Real)
    {
        return Real(1);
    }
#endif
};

fastmoe::mlp<my_activation> make() { return {}; }
