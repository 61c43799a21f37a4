// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Elements of a type that the library does not know are refused by the layer's first call.
// expect: element type is none of double, float, bfloat16 and half
// expect: scalar
#include <fastmoe/moe.hpp>

namespace fm = fastmoe;

#if defined(CORRECT)
using element = float;
#else
using element = int;
#endif

using expert = fm::linear<>;
void use(fm::host_executor& ex, const fm::moe_layer<fm::top_k_gate<>, expert>& layer, fm::moe_weights<element, expert> w,
         fm::matrix_view<element> x)
{
    layer.infer(ex, x, w, x);
}
