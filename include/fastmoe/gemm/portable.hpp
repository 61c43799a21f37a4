// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The grouped GEMM that needs no library and runs on every executor: the default of the experts. portable_plain.hpp is its
/// plain source, one row a team; on the host, tiles for the machine's instruction set replace it, on a GPU those of
/// block_products.hpp.
#pragma once

#include <concepts>

#include <fastmoe/gemm/grouped_gemm.hpp>
#include <fastmoe/gemm/portable_host.hpp>
#include <fastmoe/gemm/portable_plain.hpp>
#include <fastmoe/gemm/portable_wgrad.hpp>
#if defined(__CUDACC__) // no other compiler has executors with blocks, but for a test that includes the header itself
#include <fastmoe/gemm/block_products.hpp>
#endif

namespace fastmoe::inline FASTMOE_ABI {

/// The host's executor, or one of a user's that derives from it.
template <class Executor>
concept derives_from_host = std::derived_from<Executor, host_executor> && has_readable_memory<Executor>;

template <derives_from_host Executor>
struct implementation<verbs::multiply_rows, Executor> {
    template <class Rows, class W, class B, class Y, class Epilogue>
    static void run(host_executor& ex, const row_groups& groups, const Rows& x, const weight_view<const W>& w,
                    matrix_view<const B> bias, matrix_view<Y> y, const Epilogue& epilogue, arena& memory)
    {
        using X = detail::portable::row_element_t<Rows>;
        if constexpr (detail::portable::meet_in_pairs<X, W>)
            if (ex.best() >= instruction_set::avx512_bf16)
                return run_units(detail::portable::row_product<detail::portable::bfloat16_pair, Rows, W, B, Y>{ex, x, w, bias, y}, groups,
                                 epilogue, memory);
        run_units(detail::portable::row_product<detail::portable::product_total_t<X, W>, Rows, W, B, Y>{ex, x, w, bias, y}, groups, epilogue,
                  memory);
    }

private:
    template <class Product, class Epilogue>
    static void run_units(const Product& product, const row_groups& groups, const Epilogue& epilogue, arena& memory)
    {
        arena one_worker;
        product.reserve(one_worker);
        const detail::portable::row_cut cut{groups, memory.vector<int64_t>(groups.experts() + 1)};
        const auto scratch = memory.matrix<std::byte>(product.ex.threads(), one_worker.bytes());
        if (memory.measuring() || groups.experts() == 0) return;
        cut.count();
        constexpr auto sizes = detail::portable::blocks_of_host;
        const int64_t blocks = cut.blocks(), columns = product.y.extent(1);
        if (blocks == 0) return;
        // Rows whose columns are done by one task get their epilogue while they are in its cache.
        const int64_t wanted = detail::portable::least(detail::portable::ceil_div(sizes.tasks, blocks), columns / sizes.least_columns);
        const int64_t parts = blocks >= sizes.tasks || wanted < 2 ? 1 : wanted;
        const int64_t part = detail::portable::round_up(detail::portable::ceil_div(columns, parts), 16);
        const auto finish = [&](int worker, const detail::portable::row_block& b) {
            if constexpr (!std::is_same_v<Epilogue, no_epilogue>)
                product.ex.run_rows(worker, b.first, b.first + b.count, detail::portable::expert_rows<Epilogue>{b.expert, epilogue});
        };
        product.ex.for_each_task(blocks * parts, [&](int worker, int64_t task) {
            const detail::portable::row_block b = cut(task / parts);
            const int64_t begin = task % parts * part;
            arena mine(row(scratch, worker));
            product.block(worker, b, begin, detail::portable::least(begin + part, columns), mine);
            if (parts == 1) finish(worker, b);
        });
        if constexpr (!std::is_same_v<Epilogue, no_epilogue>)
            if (parts > 1) product.ex.for_each_task(blocks, [&](int worker, int64_t task) { finish(worker, cut(task)); });
    }
};

template <derives_from_host Executor>
struct implementation<verbs::multiply_weight_gradients, Executor> {
    template <class DyRows, class XRows, class G>
    static void run(host_executor& ex, const row_groups& groups, const DyRows& dy, const XRows& x, const weight_view<G>& dw,
                    write_mode mode, arena& memory)
    {
        // The lanes of a tile lie along the side on which dW is contiguous.
        if (dw.col_stride == 1) run_sides(ex, groups, x, dy, dw, mode, memory);
        else run_sides(ex, groups, dy, x, detail::portable::transposed(dw), mode, memory);
    }

private:
    template <class Lanes, class Scalars, class G>
    static void run_sides(host_executor& ex, const row_groups& groups, const Lanes& lanes, const Scalars& scalars,
                          const weight_view<G>& dw, write_mode mode, arena& memory)
    {
        using A = detail::portable::row_element_t<Lanes>;
        using B = detail::portable::row_element_t<Scalars>;
        if constexpr (detail::portable::meet_in_pairs<A, B>)
            if (ex.best() >= instruction_set::avx512_bf16)
                return run_units(detail::portable::gradient_product<detail::portable::bfloat16_pair, Lanes, Scalars, G>{ex, groups, lanes,
                                                                                                    scalars, dw, mode},
                                 memory);
        run_units(detail::portable::gradient_product<detail::portable::product_total_t<A, B>, Lanes, Scalars, G>{ex, groups, lanes, scalars, dw,
                                                                                             mode},
                  memory);
    }

    template <class Product>
    static void run_units(const Product& product, arena& memory)
    {
        arena one_worker;
        product.reserve(one_worker);
        const auto scratch = memory.matrix<std::byte>(product.ex.threads(), one_worker.bytes());
        if (memory.measuring()) return;
        detail::expects_groups_inside(product.groups.counts, product.groups.offsets, product.groups.slots);
        product.ex.for_each_task(product.tasks(), [&](int worker, int64_t task) {
            arena mine(row(scratch, worker));
            product.task(worker, task, mine);
        });
    }
};

namespace gemm {

/// The grouped GEMM without dependencies. Sums in fp32, in double if an operand is double, and rounds once; fp32 is fp32.
/// On the host two bfloat16 operands meet in the machine's bfloat16 dot product where it has one, which takes subnormal
/// numbers as zeros. Forward and dgrad take scratch for each thread, a plan of at most E + 1 numbers, and nothing else.
/// On a GPU from compute capability 8.0 on, bfloat16 and half meet in tensor cores and float in multiply-adds, never in TF32;
/// mixed operands are converted to float, and double is summed an element a thread.
struct portable {
    static constexpr bool gathers_rows = true;
    static constexpr bool fuses_epilogue = true;
    static constexpr bool needs_host_counts = false;

    /// Y[s] = X[s] W[e(s)]^T + bias[e(s)] for the rows of groups, then epilogue(team, e, s).
    /// @param x       plain_rows or indexed_rows                        // (S,in)
    /// @param w       stored (out,in) or transposed                     // (E,out,in)
    /// @param bias    added before the rounding; without memory: none   // (E,out)
    /// @param y       overwritten; rows outside of groups untouched     // (S,out)
    /// @param memory  scratch, given back; only counted on a measuring arena
    /// @throws invalid_argument if shapes disagree or a group lies outside of S, out_of_memory; then nothing is written. Where
    ///         the host cannot read the groups, rows outside of S are none, and wgrad reports such a group as a fault
    template <executor Executor, class Rows, class W, class B, class Y, class Epilogue>
    void forward(Executor& ex, const row_groups& groups, const Rows& x, const weight_view<W>& w, matrix_view<B> bias,
                 matrix_view<Y> y, const Epilogue& epilogue, arena& memory) const
    {
        if (!memory.measuring() && bias.data_handle()) expects_shape(bias, "bias (E,out)", groups.experts(), w.out);
        rows<Executor>(ex, groups, x, weight_view<const std::remove_const_t<W>>(w),
                       matrix_view<const std::remove_const_t<B>>(bias), y, epilogue, memory);
    }

    /// dX[s] = dY[s] W[e(s)] for the rows of groups, then epilogue(team, e, s).
    /// @param dy  plain_rows or indexed_rows                            // (S,out)
    /// @param w   as forward takes it                                   // (E,out,in)
    /// @param dx  overwritten; rows outside of groups untouched         // (S,in)
    /// @throws as forward
    template <executor Executor, class Rows, class W, class Y, class Epilogue>
    void dgrad(Executor& ex, const row_groups& groups, const Rows& dy, const weight_view<W>& w, matrix_view<Y> dx,
               const Epilogue& epilogue, arena& memory) const
    {
        rows<Executor>(ex, groups, dy, detail::portable::transposed(weight_view<const std::remove_const_t<W>>(w)),
                       matrix_view<const float>{}, dx, epilogue, memory);
    }

    /// dW[e] (+)= dY_e^T X_e. Overwriting, an expert without rows gets zeros; accumulating, it is left alone.
    /// @param dy  plain_rows or indexed_rows                            // (S,out)
    /// @param x   plain_rows or indexed_rows                            // (S,in)
    /// @param dw  overwritten, or read, added to in the wider type of dW and the sum, and rounded once   // (E,out,in)
    /// @throws as forward
    template <executor Executor, class DyRows, class XRows, class G>
    void wgrad(Executor& ex, const row_groups& groups, const DyRows& dy, const XRows& x, const weight_view<G>& dw,
               write_mode mode, arena& memory) const
    {
        using verb = implementation<verbs::multiply_weight_gradients, Executor>;
        if (!memory.measuring()) {
            detail::expects_gradient_product<Executor>(groups, dy, x, dw);
            arena needed;
            verb::run(ex, groups, dy, x, dw, mode, needed);
            memory.require(needed.bytes());
        }
        const arena::scope lent(memory);
        verb::run(ex, groups, dy, x, dw, mode, memory);
    }

private:
    template <class Executor, class Rows, class W, class B, class Y, class Epilogue>
    static void rows(Executor& ex, const row_groups& groups, const Rows& x, const weight_view<const W>& w,
                     matrix_view<const B> bias, matrix_view<Y> y, const Epilogue& epilogue, arena& memory)
    {
        using verb = implementation<verbs::multiply_rows, Executor>;
        if (!memory.measuring()) {
            detail::expects_row_product<Executor>(groups, x, w, y);
            arena needed;
            verb::run(ex, groups, x, w, bias, y, epilogue, needed);
            memory.require(needed.bytes());
        }
        const arena::scope lent(memory);
        verb::run(ex, groups, x, w, bias, y, epilogue, memory);
    }
};

} // namespace gemm

static_assert(grouped_gemm<gemm::portable, host_executor, float>);
static_assert(grouped_gemm<gemm::portable, host_executor, bfloat16>);

} // namespace fastmoe::inline FASTMOE_ABI
