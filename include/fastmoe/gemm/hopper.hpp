// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// gemm::hopper: the grouped products by warpgroups of compute capability 9.0. Sizes are read on the device; rows are gathered on
/// the way into shared memory; nothing waits, allocates, or is patched from call to call.
#pragma once

#include <fastmoe/gemm/hopper_products.hpp>
#include <fastmoe/gemm/portable.hpp>

namespace fastmoe::inline FASTMOE_ABI {

namespace detail::hopper {

/// After a product whose end has sums: adds up what the tiles of a row found, in their order.
template <class Epilogue>
struct finish_row {
    using vectorized = void;
    Epilogue epilogue;
    matrix_view<const float> sums; // (S,tiles across)

    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t e, int64_t s) const
    {
        const float* const from = sums.data_handle() + s * sums.extent(1);
        const float total = team.reduce(sums.extent(1), 0.0f, [](float a, float b) { return a + b; }, [from](int64_t i) { return from[i]; });
        epilogue.finish(team, e, s, total);
    }
};

} // namespace detail::hopper

namespace gemm {

/// Tunings that the library has chosen. A user's own is a struct with such a function.
struct hopper_tunings {
    static constexpr hopper_tuning of(hopper_product product, bool wide) noexcept { return hopper_default(product, wide); }
};

/// Grouped products of bfloat16 or half, summed in float and rounded once, into the same type or float. What a warpgroup
/// cannot take goes to gemm::portable: other types and executors, devices other than 9.x and code that was not compiled
/// for sm_90a, rows or matrices that do not start at whole 16 bytes (D, H, strides and pointers), W held apart by pointers.
/// One shape on one device takes one way, so the bits are the same on every run.
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
            if (memory.measuring()) reserve<Epilogue>(groups, w.out, memory);
            else if (fits(w) && is_whole(x) && is_whole(y)) {
                if (bias.data_handle()) expects_shape(bias, "bias (E,out)", groups.experts(), w.out);
                if (rows(ex, groups, x, weight_view<const std::remove_const_t<W>>(w), matrix_view<const std::remove_const_t<B>>(bias), y,
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
            if (memory.measuring()) reserve<Epilogue>(groups, w.in, memory);
            else if (fits(w) && is_whole(dy) && is_whole(dx)) {
                const auto turned = detail::portable::transposed(weight_view<const std::remove_const_t<W>>(w));
                if (rows(ex, groups, dy, turned, matrix_view<const float>{}, dx, epilogue, memory)) return;
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
            if (!memory.measuring() && groups.experts() > 0 && groups.slots <= INT32_MAX && dw.out > 0 && dw.in > 0 && is_whole(dy) && is_whole(x)) {
                detail::expects_groups(groups, x.extent(0));
                expects(dy.extent(0) == x.extent(0), "rows of dY", dy.extent(0), "S = ", x.extent(0));
                detail::expects_rows(dy, "rows of dY");
                detail::expects_rows(x, "rows of X");
                detail::expects_gradient<Executor>(dw, groups.experts(), dy.extent(1), x.extent(1));
                if (dw.col_stride == 1 ? gradients(ex, groups, dy, x, dw, mode)
                                       : gradients(ex, groups, x, dy, detail::portable::transposed(dw), mode))
                    return;
            }
        portable{}.wgrad(ex, groups, dy, x, dw, mode, memory);
    }

private:
    template <class Rows>
    using element = detail::portable::row_element_t<Rows>;

    template <class Executor, class X, class W, class Y>
    static constexpr bool takes = runs_clusters<Executor> && std::is_same_v<X, std::remove_const_t<W>> && sizeof(X) == 2 &&
                                  (std::is_same_v<Y, X> || std::is_same_v<Y, float>);

    static bool is_line(const void* p) noexcept { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; }
    template <class T>
    static bool is_whole(matrix_view<T> m) noexcept
    {
        return is_line(m.data_handle()) && m.extent(1) % 8 == 0 && m.extent(1) <= INT32_MAX;
    }
    template <class Rows>
        requires requires(const Rows& r) { r.data; }
    static bool is_whole(const Rows& rows) noexcept
    {
        return is_whole(rows.data);
    }
    /// What boxes ask of matrices.
    template <class W>
    static bool fits(const weight_view<W>& w) noexcept
    {
        const bool deep = w.col_stride == 1;
        const int64_t line = deep ? w.row_stride : w.col_stride, length = deep ? w.in : w.out, lines = deep ? w.out : w.in;
        constexpr int64_t most = int64_t{1} << 38; // of bytes 2^40
        if (w.experts <= 0 || w.out <= 0 || w.in <= 0 || w.pointers || !is_line(w.data) || w.in % 8 != 0 || w.out % 8 != 0) return false;
        if (w.experts > INT32_MAX || w.in > INT32_MAX || w.out > INT32_MAX || (w.row_stride != 1 && !deep)) return false;
        if (line < length || line % 8 != 0 || line >= most / lines) return false;
        return w.experts == 1 || (w.expert_stride >= line * lines && w.expert_stride % 8 == 0 && w.expert_stride < most);
    }
    template <class Epilogue>
    static constexpr bool has_sums() noexcept
    {
        if constexpr (pairs_epilogue<Epilogue>) return decltype(std::declval<const Epilogue&>().in_pairs())::has_sums;
        return false;
    }

    static constexpr hopper_tuning wide_rows = Tunings::of(hopper_product::rows, true), narrow_rows = Tunings::of(hopper_product::rows, false),
                                   few_rows = Tunings::of(hopper_product::few_rows, false);

    template <class Epilogue>
    static void reserve(const row_groups& groups, int64_t out, arena& memory)
    {
        const arena::scope lent(memory);
        constexpr int columns = wide_rows.columns < narrow_rows.columns ? wide_rows.columns : narrow_rows.columns;
        (void)memory.vector<int64_t>(groups.experts() + 1);
        if (has_sums<Epilogue>()) (void)memory.matrix<float>(groups.slots, (out + columns - 1) / columns);
    }

    /// False if the device has no clusters: nothing is done then.
    template <class Executor, class Rows, class W, class B, class Y, class Epilogue>
    static bool rows(Executor& ex, const row_groups& groups, const Rows& x, const weight_view<const W>& w, matrix_view<const B> bias,
                     matrix_view<Y> y, const Epilogue& epilogue, arena& memory)
    {
        detail::expects_groups(groups, x.extent(0));
        detail::expects_rows(x, "rows (S,.)");
        detail::expects_weights(w, "W (E,out,in)", groups.experts(), y.extent(1), x.extent(1));
        expects_shape(y, "output rows (S,.)", groups.slots, w.out);
        const auto run = [&]<hopper_tuning how>(const auto& end) {
            return w.col_stride == 1 ? tiles<how, detail::lie::deep>(ex, groups, x, w, bias, y, end, epilogue, memory)
                                     : tiles<how, detail::lie::wide>(ex, groups, x, w, bias, y, end, epilogue, memory);
        };
        const auto run_many = [&](const auto& end) {
            return w.out > narrow_rows.columns ? run.template operator()<wide_rows>(end) : run.template operator()<narrow_rows>(end);
        };
        const bool is_few = groups.slots <= 16 * groups.experts();
        if constexpr (pairs_epilogue<Epilogue> && sizeof(Y) == 2 && !wide_rows.turned && !narrow_rows.turned) // pairs are not turned
            if (!is_few && epilogue.takes_pairs()) return run_many(epilogue.in_pairs());
        const bool done = is_few ? run.template operator()<few_rows>(rounded_pairs{}) : run_many(rounded_pairs{});
        if constexpr (!std::is_same_v<Epilogue, no_epilogue>)
            if (done) for_each_row(ex, groups.slots, detail::portable::end_row<Epilogue>{groups, epilogue}, {.width = w.out});
        return done;
    }

    template <hopper_tuning how, detail::lie how_w, class Executor, class Rows, class W, class B, class Y, class End, class Epilogue>
    static bool tiles(Executor& ex, const row_groups& groups, const Rows& x, const weight_view<const W>& w, matrix_view<const B> bias,
                      matrix_view<Y> y, const End& end, const Epilogue& epilogue, arena& memory)
    {
        using namespace detail::hopper;
        using product = row_product<how, how_w, Rows, typename Executor::box_map, to_rows<B, Y, End>>;
        using multiply = multiply_tiles<product>;
        if (!ex.template has_clusters<multiply>()) return false;
        arena needed;
        reserve<Epilogue>(groups, w.out, needed);
        memory.require(needed.bytes());
        const arena::scope lent(memory);
        const auto before = memory.vector<int64_t>(groups.experts() + 1);
        matrix_view<float> sums;
        if constexpr (End::has_sums) sums = memory.matrix<float>(groups.slots, ceil_div(w.out, how.columns));
        if (groups.slots == 0) return true;
        constexpr int64_t tokens = how.tokens() * how.cluster;
        for_each_row(ex, 1, detail::block::count_row_tiles{groups, before, tokens}, {.width = groups.experts()});
        constexpr bool deep = how_w == detail::lie::deep;
        const box_source source{w.data,
                                {deep ? w.in : w.out, deep ? w.out : w.in, w.experts},
                                {2 * (deep ? w.row_stride : w.col_stride), w.experts > 1 ? 2 * w.expert_stride : 2 * (deep ? w.row_stride * w.out : w.col_stride * w.in)},
                                {depth, deep ? product::weight_rows / how.cluster : depth}};
        const multiply f{{ex.describe(source), {groups, before}, x, w.out, {bias, y, end, sums}}};
        ex.for_each_cluster((groups.slots / tokens + groups.experts()) * ceil_div(w.out, product::weight_rows), f, multiply::shared_bytes);
        if constexpr (End::has_sums) {
            const finish_row<Epilogue> finish{epilogue, sums};
            for_each_row(ex, groups.slots, detail::portable::end_row<finish_row<Epilogue>>{groups, finish}, {.width = sums.extent(1)});
        }
        return true;
    }

    template <class Executor, class DownRows, class AcrossRows, class G>
    static bool gradients(Executor& ex, const row_groups& groups, const DownRows& down, const AcrossRows& across,
                          const weight_view<G>& dw, write_mode mode)
    {
        using namespace detail::hopper;
        const auto run = [&]<hopper_tuning how>() {
            using multiply = multiply_tiles<gradient_product<how, DownRows, AcrossRows, G>>;
            if (!ex.template has_clusters<multiply>()) return false;
            const multiply f{{groups, down, across, dw, mode, ex.faults()}};
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
