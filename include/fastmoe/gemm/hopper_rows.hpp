// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the host does for a product of rows by warpgroups: whether it can be, which tiles it is cut into, and the memory it takes.
#pragma once

#include <fastmoe/gemm/hopper_products.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::hopper {

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

inline bool is_line(const void* p) noexcept { return reinterpret_cast<std::uintptr_t>(p) % chunk_bytes == 0; }
template <class T>
bool is_whole(matrix_view<T> m) noexcept
{
    return is_line(m.data_handle()) && m.extent(1) % chunk == 0 && m.extent(1) % chunk_of<T> == 0 && m.extent(1) <= INT32_MAX;
}
template <class Rows>
    requires(has_scales<Rows> || requires(const Rows& r) { r.data; })
bool is_whole(const Rows& rows) noexcept
{
    return is_whole(data_of(rows));
}
/// As many of S rows as coordinates and strides of a map can say: all, or none.
constexpr int64_t rows_of_map(int64_t slots, int64_t line) noexcept
{
    constexpr int64_t most = int64_t{1} << 39;
    return slots <= INT32_MAX && slots < most / (line > 0 ? line : 1) ? slots : 0;
}
/// Boxes of the first rows.
/// @param rows  is_whole(rows)
/// @param none  any line of memory, in the place of rows if there are none
template <class T>
box_source box_of_rows(const matrix_view<T>& rows, int64_t mapped, const void* none, int box_rows) noexcept
{
    constexpr int64_t bytes = sizeof(T);
    const int64_t line = bytes * rows.extent(1), high = mapped > 0 ? mapped : 1;
    return {mapped > 0 ? static_cast<const void*>(rows.data_handle()) : none,
            {rows.extent(1), high, 1},
            {line, line * high},
            {depth_of<std::remove_const_t<T>>, box_rows},
            static_cast<int>(bytes)};
}
/// Where the host can look at the pointers of matrices that are held apart; elsewhere the kernel does.
template <class Executor, class W>
bool are_lines([[maybe_unused]] const weight_view<W>& w) noexcept
{
    if constexpr (has_readable_memory<Executor>)
        for (int64_t e = 0; w.pointers && e < w.experts; ++e)
            if (!is_line(w.pointers[e])) return false;
    return true;
}
/// Lines of whole 16 bytes, and what boxes ask of matrices.
template <class W>
bool fits(const weight_view<W>& w) noexcept
{
    const bool deep = w.col_stride == 1;
    const int64_t line = deep ? w.row_stride : w.col_stride, length = deep ? w.in : w.out, lines = deep ? w.out : w.in;
    constexpr int64_t most = (int64_t{1} << 39) / static_cast<int64_t>(sizeof(W)); // of bytes 2^40
    constexpr int whole = chunk_of<W>;
    if (w.experts <= 0 || w.out <= 0 || w.in <= 0 || w.in % whole != 0 || w.out % chunk != 0) return false;
    if (w.experts > INT32_MAX || w.in > INT32_MAX || w.out > INT32_MAX || (w.row_stride != 1 && !deep)) return false;
    if (line < length || line % whole != 0 || line >= most / lines) return false;
    if (w.pointers) return true;
    return is_line(w.data) && (w.experts == 1 || (w.expert_stride >= line * lines && w.expert_stride % whole == 0 && w.expert_stride < most));
}

/// @tparam Tunings  how products are cut into tiles
template <class Tunings>
struct row_calls {
    template <class Epilogue>
    static void reserve(const row_groups& groups, int64_t out, arena& memory)
    {
        const arena::scope lent(memory);
        constexpr int columns = wide_rows.columns < narrow_rows.columns ? wide_rows.columns : narrow_rows.columns;
        (void)memory.vector<int64_t>(groups.experts() + 1);
        if (has_sums<Epilogue>()) (void)memory.matrix<float>(groups.slots, (out + columns - 1) / columns);
    }

    /// Whether the device is one for these products.
    template <class Rows, class Weights, class B, class Y, class Executor>
    static bool has_device(Executor& ex)
    {
        using product = row_product<few_rows, lie::deep, Rows, Weights, typename Executor::box_map, to_rows<B, Y, rounded_pairs>>;
        return ex.template has_clusters<multiply_tiles<product>>();
    }

    /// False if it is none: nothing is done then.
    /// @param w  weight_view, or block_scaled_weights whose columns are contiguous; fits(w)
    /// @param x  is_whole(x)
    template <class Executor, class Rows, class Weights, class B, class Y, class Epilogue>
    static bool run(Executor& ex, const row_groups& groups, const Rows& x, const Weights& w, matrix_view<const B> bias, matrix_view<Y> y,
                    const Epilogue& epilogue, arena& memory)
    {
        const auto& matrices = matrices_of(w);
        const auto run = [&]<class Map, hopper_tuning how>(const auto& end) {
            if constexpr (!has_scales<Rows>)
                if (matrices.col_stride != 1) return tiles<how, lie::wide, Map>(ex, groups, x, w, bias, y, end, epilogue, memory);
            return tiles<how, lie::deep, Map>(ex, groups, x, w, bias, y, end, epilogue, memory);
        };
        using map = typename Executor::box_map;
        const auto run_many = [&](const auto& end) {
            return matrices.out > narrow_rows.columns ? run.template operator()<map, wide_rows>(end) : run.template operator()<map, narrow_rows>(end);
        };
        // Tiles of few rows are stored an element at a time, wherever y begins.
        const bool is_few = groups.slots <= 16 * groups.experts() || !is_line(y.data_handle());
        if constexpr (pairs_epilogue<Epilogue> && sizeof(Y) == 2) {
            const bool takes_pairs = !matrices.pointers && epilogue.takes_pairs();
            if constexpr (!wide_rows.turned && !narrow_rows.turned)
                if (takes_pairs && !is_few) return run_many(epilogue.in_pairs());
            if constexpr (few_rows.turned && !has_sums<Epilogue>()) // see store_turned_pairs
                if (takes_pairs && is_few && reinterpret_cast<std::uintptr_t>(y.data_handle()) % alignof(pair<Y>) == 0)
                    return run.template operator()<map, few_rows>(epilogue.in_pairs());
        }
        // Matrices that are held apart have no map. They are brought in lines, and have as few kernels as will do.
        const bool done = matrices.pointers ? is_few ? run.template operator()<no_map, few_rows>(rounded_pairs{})
                                                     : run.template operator()<no_map, narrow_rows>(rounded_pairs{})
                          : is_few ? run.template operator()<map, few_rows>(rounded_pairs{})
                                   : run_many(rounded_pairs{});
        if constexpr (!std::is_same_v<Epilogue, no_epilogue>)
            if (done)
                fastmoe::for_each_row(ex, groups.slots, portable::end_row<Epilogue>{groups, epilogue},
                                      {.width = matrices.out});
        return done;
    }

private:
    static constexpr int64_t most_counted = 1024; ///< experts whose tiles each block counts for itself

    /// Whether its pairs, if it has them, are summed.
    template <class Epilogue>
    static constexpr bool has_sums() noexcept
    {
        if constexpr (pairs_epilogue<Epilogue>) return decltype(std::declval<const Epilogue&>().in_pairs())::has_sums;
        return false;
    }
    static constexpr hopper_tuning wide_rows = Tunings::of(gemm::hopper_product::rows, true), narrow_rows = Tunings::of(gemm::hopper_product::rows, false),
                                   few_rows = Tunings::of(gemm::hopper_product::few_rows, false);

    template <hopper_tuning how, lie how_w, class Map, class Executor, class Rows, class Weights, class B, class Y, class End, class Epilogue>
    static bool tiles(Executor& ex, const row_groups& groups, const Rows& x, const Weights& w, matrix_view<const B> bias,
                      matrix_view<Y> y, const End& end, const Epilogue& epilogue, arena& memory)
    {
        using product = row_product<how, how_w, Rows, Weights, Map, to_rows<B, Y, End>>;
        using multiply = multiply_tiles<product>;
        if (!ex.template has_clusters<multiply>()) return false;
        const auto& m = matrices_of(w);
        arena needed;
        reserve<Epilogue>(groups, m.out, needed);
        memory.require(needed.bytes());
        const arena::scope lent(memory);
        const auto before = memory.vector<int64_t>(groups.experts() + 1);
        matrix_view<float> sums;
        if constexpr (End::has_sums) sums = memory.matrix<float>(groups.slots, ceil_div(m.out, how.columns));
        if (groups.slots == 0) return true;
        constexpr int64_t tokens = how.tokens() * how.cluster;
        const int64_t list_bytes = (groups.experts() + 1) * static_cast<int64_t>(sizeof(int64_t));
        const bool counts_itself = groups.experts() <= most_counted && multiply::shared_bytes + list_bytes <= hopper_tuning::most_shared_bytes;
        if (!counts_itself)
            fastmoe::for_each_row(ex, 1, tiles::count_row_tiles{groups, before, tokens}, {.width = groups.experts()});
        constexpr bool deep = how_w == lie::deep;
        using T = typename product::element;
        constexpr int64_t bytes = sizeof(T);
        const box_source source{m.data,
                                {deep ? m.in : m.out, deep ? m.out : m.in, m.experts},
                                {bytes * (deep ? m.row_stride : m.col_stride),
                                 bytes * (m.experts > 1 ? m.expert_stride : deep ? m.row_stride * m.out : m.col_stride * m.in)},
                                {depth_of<T>, deep ? product::weight_rows / how.cluster : depth},
                                static_cast<int>(bytes)};
        const int64_t mapped = rows_of_map(groups.slots, bytes * x.extent(1));
        const auto describe = [&]<bool is_there>(const box_source& from) {
            if constexpr (is_there) return ex.describe(from);
            else return no_map{};
        };
        const box_source of_rows = box_of_rows(data_of(x), mapped, m.data, product::tokens);
        const multiply f{{describe.template operator()<product::has_map>(source), describe.template operator()<product::boxes_rows>(of_rows),
                          mapped, w, groups, counts_itself ? vector_view<const int64_t>() : before, x, m.out, {bias, y, end, sums}, ex.faults()}};
        ex.for_each_cluster((groups.slots / tokens + groups.experts()) * ceil_div(m.out, product::weight_rows), f,
                            multiply::shared_bytes + (counts_itself ? list_bytes : 0));
        if constexpr (!product::has_map) ex.deliver_faults();
        if constexpr (End::has_sums) {
            const finish_row<Epilogue> finish{epilogue, sums};
            fastmoe::for_each_row(ex, groups.slots, portable::end_row<finish_row<Epilogue>>{groups, finish},
                                  {.width = sums.extent(1)});
        }
        return true;
    }
};

} // namespace fastmoe::inline FASTMOE_ABI::detail::hopper
