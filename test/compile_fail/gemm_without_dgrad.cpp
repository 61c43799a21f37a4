// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A GEMM that lacks a product is refused by the expert's first call, which names the missing expression.
// expect: the GEMM lacks what an expert asks
// expect: g\.dgrad
#include <fastmoe/moe.hpp>

namespace fm = fastmoe;

struct my_gemm {
    static constexpr bool gathers_rows = true;
    static constexpr bool fuses_epilogue = true;
    static constexpr bool needs_host_counts = true;

    template <class Executor, class Rows, class W, class B, class Y, class Epilogue>
    void forward(Executor&, const fm::row_groups&, const Rows&, const fm::weight_view<W>&, fm::matrix_view<B>,
                 fm::matrix_view<Y>, const Epilogue&, fm::arena&) const
    {
    }
#if defined(CORRECT)
    template <class Executor, class Rows, class W, class Y, class Epilogue>
    void dgrad(Executor&, const fm::row_groups&, const Rows&, const fm::weight_view<W>&, fm::matrix_view<Y>, const Epilogue&,
               fm::arena&) const
    {
    }
#endif
};

using expert = fm::linear<my_gemm>;
void use(fm::host_executor& ex, const fm::moe_layer<fm::top_k_gate<>, expert>& layer, fm::moe_weights<float, expert> w,
         fm::matrix_view<float> x)
{
    layer.infer(ex, x, w, x);
}
