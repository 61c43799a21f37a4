// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// gemm::hopper: the grouped products by warpgroups of compute capability 9.0. Sizes are read on the device; rows are gathered on
/// the way into shared memory; nothing waits, allocates, or is patched from call to call.
#pragma once

#include <fastmoe/gemm/hopper_rows.hpp>
#include <fastmoe/gemm/portable.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace gemm {

/// Tunings that the library has chosen. A user's own is a struct with such a function.
struct hopper_tunings {
    static constexpr hopper_tuning of(hopper_product product, bool wide) noexcept { return hopper_default(product, wide); }
};

/// Grouped products of bfloat16 or half, summed in float and rounded once, into the same type or float. What a warpgroup
/// cannot take goes to gemm::portable: other types and executors, devices other than 9.x and code that was not compiled
/// for sm_90a, rows or matrices that do not start at whole 16 bytes (D, H, strides and pointers). One shape on one device takes
/// one way, so the bits are the same on every run.
///
/// W held apart by pointers is brought in lines, as rows are, without tensor maps. Where the host cannot read the pointers, a matrix
/// that does not begin at whole 16 bytes counts as zeros and is reported as a fault.
///
/// With 16 rows or fewer an expert, on average, rows of tokens are the short side of a tile and W is read once. With more, an
/// epilogue that can work by pairs is run on the sums in registers: an mlp's activation and its backward, if gate and up
/// are interleaved (copy_gated_weights() makes them so).
///
///     fm::mlp<fm::swiglu, fm::gemm::hopper> expert{.width = 4096, .hidden = 2048, .layout = fm::gated_layout::interleaved};
///
/// @tparam Tunings  how products are cut into tiles: hopper_tunings, or a struct with the same function
template <class Tunings>
struct hopper_with {
    static constexpr bool gathers_rows = true;
    static constexpr bool fuses_epilogue = true;
    static constexpr bool needs_host_counts = false;

    /// As portable::forward.
    template <executor Executor, class Rows, class W, class B, class Y, class Epilogue>
    void forward(Executor& ex, const row_groups& groups, const Rows& x, const weight_view<W>& w, matrix_view<B> bias,
                 matrix_view<Y> y, const Epilogue& epilogue, arena& memory) const
    {
        using namespace detail::hopper;
        if constexpr (takes<Executor, element<Rows>, W, Y>) {
            if (memory.measuring()) calls::template reserve<Epilogue>(groups, w.out, memory);
            else if (fits(w) && are_lines<Executor>(w) && is_whole(x) && is_whole(y)) {
                detail::expects_row_product<Executor>(groups, x, w, y);
                if (bias.data_handle()) expects_shape(bias, "bias (E,out)", groups.experts(), w.out);
                if (calls::run(ex, groups, x, weight_view<const std::remove_const_t<W>>(w), matrix_view<const std::remove_const_t<B>>(bias), y,
                         epilogue, memory))
                    return;
            }
        }
        portable{}.forward(ex, groups, x, w, bias, y, epilogue, memory);
    }

    /// As portable::dgrad.
    template <executor Executor, class Rows, class W, class Y, class Epilogue>
    void dgrad(Executor& ex, const row_groups& groups, const Rows& dy, const weight_view<W>& w, matrix_view<Y> dx,
               const Epilogue& epilogue, arena& memory) const
    {
        using namespace detail::hopper;
        if constexpr (takes<Executor, element<Rows>, W, Y>) {
            if (memory.measuring()) calls::template reserve<Epilogue>(groups, w.in, memory);
            else if (fits(w) && are_lines<Executor>(w) && is_whole(dy) && is_whole(dx)) {
                const auto turned = detail::portable::transposed(weight_view<const std::remove_const_t<W>>(w));
                detail::expects_row_product<Executor>(groups, dy, turned, dx);
                if (calls::run(ex, groups, dy, turned, matrix_view<const no_bias>{}, dx, epilogue, memory)) return;
            }
        }
        portable{}.dgrad(ex, groups, dy, w, dx, epilogue, memory);
    }

    /// As portable::wgrad.
    template <executor Executor, class DyRows, class XRows, class G>
    void wgrad(Executor& ex, const row_groups& groups, const DyRows& dy, const XRows& x, const weight_view<G>& dw,
               write_mode mode, arena& memory) const
    {
        if constexpr (takes<Executor, element<DyRows>, element<XRows>, G>)
            if (!memory.measuring() && groups.experts() > 0 && groups.slots <= INT32_MAX && dw.out > 0 && dw.in > 0 && detail::hopper::is_whole(dy) &&
                detail::hopper::is_whole(x)) {
                detail::expects_gradient_product<Executor>(groups, dy, x, dw);
                if (dw.col_stride == 1 ? gradients(ex, groups, dy, x, dw, mode)
                                       : gradients(ex, groups, x, dy, detail::portable::transposed(dw), mode))
                    return;
            }
        portable{}.wgrad(ex, groups, dy, x, dw, mode, memory);
    }

private:
    using calls = detail::hopper::row_calls<Tunings>;
    /// The same with nothing to share.
    static constexpr hopper_tuning alone(hopper_tuning how) noexcept
    {
        how.cluster = 1;
        return how;
    }
    template <class Rows>
    using element = detail::portable::row_element_t<Rows>;

    template <class Executor, class X, class W, class Y>
    static constexpr bool takes = runs_clusters<Executor> && std::is_same_v<X, std::remove_const_t<W>> && sizeof(X) == 2 &&
                                  (std::is_same_v<Y, X> || std::is_same_v<Y, float>);

    template <class Executor, class DownRows, class AcrossRows, class G>
    static bool gradients(Executor& ex, const row_groups& groups, const DownRows& down, const AcrossRows& across,
                          const weight_view<G>& dw, write_mode mode)
    {
        using namespace detail::hopper;
        const auto run = [&]<hopper_tuning asked>() {
            constexpr hopper_tuning how = has_order<DownRows, AcrossRows> ? asked : alone(asked);
            using map = std::conditional_t<how.cluster == 1, no_map, typename Executor::box_map>;
            using product = gradient_product<how, DownRows, AcrossRows, G, map>;
            using multiply = multiply_tiles<product>;
            if (!ex.template has_clusters<multiply>()) return false;
            const auto make = [&](const map& of_order, int64_t mapped) -> multiply {
                return {{of_order, mapped, groups, down, across, dw, mode, ex.faults()}};
            };
            const multiply f = [&] {
                if constexpr (!product::has_map) {
                    return make({}, 0);
                } else {
                    const matrix_view<const typename product::element> rows = [&] {
                        if constexpr (product::shares_across) return across.data;
                        else return down.data;
                    }();
                    const int64_t mapped = rows_of_map(rows.extent(0), rows.extent(1) * static_cast<int64_t>(sizeof(typename product::element)));
                    return make(ex.describe(box_of_rows(rows, mapped, ex.faults().words, depth)), mapped);
                }
            }();
            ex.for_each_cluster(f.product.tiles(), f, multiply::shared_bytes);
            ex.deliver_faults();
            return true;
        };
        return dw.in > 128 ? run.template operator()<Tunings::of(hopper_product::gradients, true)>()
                           : run.template operator()<Tunings::of(hopper_product::gradients, false)>();
    }
};

using hopper = hopper_with<hopper_tunings>;

} // namespace gemm

} // namespace fastmoe::inline FASTMOE_ABI
