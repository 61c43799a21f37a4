// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The three grouped products on the host, cut into tiles that are one call each of a library's gemm on one thread. All
/// cuts follow from the shape and the row counts alone, so no bit depends on the threads. The call is a parameter:
///
///     Call::guard                                           lives while a thread takes tasks that call the library
///     Call::multiply(m, n, k, a, b, mode, c, stride)        c (m,n) = or += a (m,k) b (k,n); c is float
#pragma once

#include <atomic>
#include <cstring>

#include <fastmoe/gemm/portable_host.hpp>

namespace fastmoe::inline FASTMOE_ABI::detail::tiled {

using portable::least;
using portable::row_element_t;
constexpr int64_t greatest(int64_t a, int64_t b) noexcept { return a > b ? a : b; }

/// A row-major factor (rows,cols) with `stride` elements from a row to the next; transposed: stored as (cols,rows).
template <class T>
struct factor {
    const T* data;
    int64_t stride;
    bool transposed;
};

/// f(worker, task) for task in [0, n): a guard costs more than a small task, so each thread has one for all that it takes.
template <class Call, class F>
void for_each_call(host_executor& ex, int64_t n, const F& f)
{
    std::atomic<int64_t> next{0};
    ex.for_each_task(least(n, ex.threads()), [&](int worker, int64_t) {
        struct at_end { // of all tasks, or when one has thrown
            std::atomic<int64_t>& next;
            int64_t n;
            ~at_end() { next.store(n, std::memory_order_relaxed); }
        } const nothing_left{next, n};
        [[maybe_unused]] const typename Call::guard guard;
        for (int64_t t; (t = next.fetch_add(1, std::memory_order_relaxed)) < n;) f(worker, t);
    });
}

/// Tile sizes; a library's gemm packs both factors in each call, so that a tile must be wide to pay for it.
struct tile_sizes {
    int64_t rows = 640;         ///< the most rows in a call, which share the packing of the weights
    int64_t few_rows = 8;       ///< up to here a product streams its weights: narrow panels give every worker a share
    int64_t single_rows = 4;    ///< so few rows of a narrow type go one by one over a panel that stays in cache
    int64_t panel = 2048;       ///< columns of a panel of many rows, written in place
    int64_t summed_panel = 512; ///< the same where sums are rounded afterwards, from cache
    int64_t narrow_panel = 128; ///< columns of a panel of few rows
    int64_t least_side = 256;   ///< tiles are cut no smaller for the sake of more tasks
    int64_t most_sums = 512;    ///< side of a weight gradient's tile that is gathered, or rounded afterwards
    int64_t depth_bytes = 1536; ///< of each column of a weight gradient's factors that is gathered at a time
    int64_t row_tasks = 24;     ///< fewer tasks than this are cut finer
    int64_t unit = 48;          ///< columns of the AVX-512 kernels that fill 24 registers
};
inline constexpr tile_sizes sizes;

/// [0, extent) in equal parts of at most `most` elements, rounded up to `unit`.
struct cut {
    int64_t extent, width, parts;

    constexpr cut(int64_t n, int64_t most, int64_t unit) noexcept : extent(n), width(n), parts(n > 0)
    {
        if (n <= most) return;
        width = portable::round_up(portable::ceil_div(n, portable::ceil_div(n, most)), unit);
        parts = portable::ceil_div(n, width);
    }
    constexpr int64_t begin(int64_t part) const noexcept { return part * width; }
    constexpr int64_t size(int64_t part) const noexcept { return least(width, extent - begin(part)); }
};

template <class Rows>
inline constexpr bool gathers = requires(const Rows& rows) { rows.index; };

/// Columns [first, first + width) of `count` rows from `begin` on: in place, or gathered into `room`.
template <class Rows, class T>
factor<T> take_columns(const Rows& rows, int64_t begin, int64_t count, int64_t first, int64_t width, T* room)
{
    if constexpr (gathers<Rows>) {
        const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(width);
        for (int64_t r = 0; r < count; ++r) {
            const T* from = rows.row(begin + r);
            if (from) std::memcpy(static_cast<void*>(room + r * width), from + first, bytes);
            else std::memset(static_cast<void*>(room + r * width), 0, bytes);
        }
        return {room, width, false};
    } else return {rows.row(begin) + first, rows.extent(1), false};
}

/// Row r: y = sums + addend, rounded once. The addend may be y itself, and so may the sums.
template <class A, class Y>
struct store_sums {
    using vectorized = void;
    const float* sums;     // (rows,width)
    int64_t sums_stride;
    A* addend;             // (rows,width), or a row for all with stride 0, or null
    int64_t addend_stride;
    Y* y;                  // (rows,width)
    int64_t stride, width;

    template <class Team>
    void operator()(Team&, int64_t r) const
    {
        const float* from = sums + r * sums_stride;
        A* add = addend + (addend ? r * addend_stride : 0);
        if (add) store(y + r * stride, [=](int64_t i) { return static_cast<Y>(from[i] + static_cast<float>(add[i])); });
        else store(y + r * stride, [=](int64_t i) { return static_cast<Y>(from[i]); });
    }

private:
    template <class Value>
    void store(Y* to, Value value) const
    {
        constexpr int64_t step = 16; // a known count, and memory of its own: it vectorizes at every level of optimization
        int64_t i = 0;
        for (; i + step <= width; i += step) {
            Y block[step];
            for (int64_t j = 0; j < step; ++j) block[j] = value(i + j);
            std::memcpy(static_cast<void*>(to + i), block, sizeof block);
        }
        for (; i < width; ++i) to[i] = value(i);
    }
};

/// Rows [begin, begin + rows) of one expert, and its tasks: each computes some of the block's panels of columns.
struct row_block {
    int64_t begin, rows, expert, first_task;
    int32_t finished; ///< panels; who finishes the last one runs the epilogue
};

/// Y (S,N) = rows (S,K) times a matrix (K,N) of each expert: forward and dgrad.
template <class Call, class Rows, class W, class B, class Y, class Epilogue>
class row_product {
public:
    /// @param w  element (n,k) of the product's matrix is w(e,n,k)      // (E,N,K)
    row_product(host_executor& ex, const row_groups& groups, const Rows& rows, const weight_view<W>& w,
                const matrix_view<B>& bias, const matrix_view<Y>& y, const Epilogue& epilogue)
        : ex_(ex), groups_(groups), rows_(rows), w_(w), bias_(bias), y_(y), epilogue_(epilogue), depth_(rows.extent(1)),
          columns_(y.extent(1)), by_column_(w.col_stride == 1 && (w.row_stride != 1 || depth_ == 1)),
          line_(by_column_ ? greatest(w.row_stride, depth_) : greatest(w.col_stride, columns_))
    {
    }

    void run(arena& memory)
    {
        const int64_t rows = least(groups_.slots, sizes.rows);
        const auto blocks = memory.vector<row_block>(groups_.slots / sizes.rows + groups_.experts());
        gathered_ = memory.matrix<T>(gathers<Rows> ? ex_.threads() : 0, rows * depth_);
        sums_ = memory.matrix<float>(direct ? 0 : ex_.threads(), rows * least(columns_, widest + sizes.unit));
        if (memory.measuring()) return;
        const int64_t tasks = plan(blocks.data_handle());
        for_each_call<Call>(ex_, tasks, [this](int worker, int64_t task) { compute(worker, task); });
    }

private:
    using T = row_element_t<Rows>;
    static constexpr bool direct = std::is_same_v<Y, float>; ///< the library writes into y itself
    static constexpr int64_t widest = direct ? sizes.panel : sizes.summed_panel;

    /// Cuts the groups into blocks and the blocks into tasks; returns the number of tasks.
    int64_t plan(row_block* blocks)
    {
        blocks_ = blocks;
        int64_t many = 0, few = 0, rows = 0;
        for (int64_t e = 0; e < groups_.experts(); ++e) {
            const int64_t begin = groups_.offsets(e), count = groups_.counts(e);
            rows += count;
            expects(begin >= 0 && count >= 0 && begin <= groups_.slots - count && rows <= groups_.slots, "counts (E)", count,
                    "groups that share S = ", groups_.slots, " rows; so not for expert ", e);
            const cut parts(count, sizes.rows, 8);
            for (int64_t p = 0; p < parts.parts; ++p) {
                blocks[count_++] = {begin + parts.begin(p), parts.size(p), e, 0, 0};
                ++(parts.size(p) <= sizes.few_rows ? few : many);
            }
        }
        for (panel_ = widest; panel_ > sizes.least_side && many * cut_columns(panel_).parts < sizes.row_tasks;) panel_ /= 2;
        // Where tasks abound, each computes several panels: what it gathers and the rows it reads serve them all.
        many_per_task_ = greatest(1, many * cut_columns(panel_).parts / (2 * sizes.row_tasks));
        few_per_task_ = greatest(1, few * cut_columns(sizes.narrow_panel).parts / (4 * sizes.row_tasks));
        int64_t tasks = 0;
        for (int64_t b = 0; b < count_; ++b) {
            blocks[b].first_task = tasks;
            tasks += shares(blocks[b]).parts;
        }
        return tasks;
    }

    cut cut_columns(int64_t most) const noexcept { return {columns_, most, sizes.unit}; }
    static bool is_few(const row_block& b) noexcept { return b.rows <= sizes.few_rows; }
    cut panels(const row_block& b) const noexcept { return cut_columns(is_few(b) ? sizes.narrow_panel : panel_); }
    cut shares(const row_block& b) const noexcept
    {
        return {panels(b).parts, is_few(b) ? few_per_task_ : many_per_task_, 1};
    }

    row_block& block_of(int64_t task) const noexcept
    {
        int64_t low = 0, high = count_;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (blocks_[middle].first_task <= task ? low : high) = middle;
        }
        return blocks_[low];
    }

    void compute(int worker, int64_t task) const
    {
        row_block& b = block_of(task);
        const cut all = panels(b), split = shares(b);
        const int64_t share = task - b.first_task, first = split.begin(share), mine = split.size(share);
        T* room = gathers<Rows> ? &gathered_(worker, 0) : nullptr;
        const factor<T> x = take_columns(rows_, b.begin, b.rows, 0, depth_, room);
        for (int64_t p = first; p < first + mine; ++p) compute_panel(worker, b, x, all.begin(p), all.size(p));
        if constexpr (!std::is_same_v<Epilogue, no_epilogue>) {
            // Releases what this task wrote, and acquires what the others did.
            const auto n = static_cast<int32_t>(mine);
            if (std::atomic_ref(b.finished).fetch_add(n, std::memory_order_acq_rel) + n == all.parts)
                ex_.run_rows(worker, b.begin, b.begin + b.rows, portable::expert_rows<Epilogue>{b.expert, epilogue_});
        }
    }

    void compute_panel(int worker, const row_block& b, const factor<T>& x, int64_t first, int64_t width) const
    {
        Y* y = y_.data_handle() + b.begin * columns_ + first;
        float* sums;
        if constexpr (direct) sums = y;
        else sums = &sums_(worker, 0);
        const int64_t stride = direct ? columns_ : width;
        const factor<T> w{w_.base(b.expert) + first * w_.row_stride, line_, by_column_};
        const int64_t step = sizeof(T) < sizeof(float) && b.rows <= sizes.single_rows ? 1 : b.rows;
        for (int64_t r = 0; r < b.rows; r += step)
            Call::multiply(step, width, depth_, factor<T>{x.data + r * x.stride, x.stride, false}, w, write_mode::overwrite,
                           sums + r * stride, stride);
        B* bias = bias_.data_handle() ? bias_.data_handle() + b.expert * columns_ + first : nullptr;
        if (!direct || bias) ex_.run_rows(worker, 0, b.rows, store_sums<B, Y>{sums, stride, bias, 0, y, columns_, width});
    }

    host_executor& ex_;
    const row_groups& groups_;
    const Rows& rows_;            // (S,K)
    const weight_view<W>& w_;     // (E,N,K)
    const matrix_view<B>& bias_;  // (E,N) or null
    const matrix_view<Y>& y_;     // (S,N)
    const Epilogue& epilogue_;
    int64_t depth_, columns_;     // K, N
    bool by_column_;              ///< a line of a stored matrix is a column of the (K,N) factor
    int64_t line_;                ///< elements from a line to the next
    row_block* blocks_ = nullptr; // (count_)
    int64_t count_ = 0, panel_ = 0, many_per_task_ = 1, few_per_task_ = 1;
    matrix_view<T> gathered_;     // (threads, rows * K)
    matrix_view<float> sums_;     // (threads, rows * panel)
};

/// C[e] (M,N) (+)= left_e^T right_e: a weight gradient, or its transpose.
template <class Call, class Left, class Right, class G>
class depth_product {
public:
    /// Row m of expert e starts at dw.base(e) + m * stride.
    depth_product(host_executor& ex, const row_groups& groups, const Left& left, const Right& right,
                  const weight_view<G>& dw, int64_t stride, write_mode mode)
        : ex_(ex), groups_(groups), left_(left), right_(right), dw_(dw), stride_(greatest(stride, right.extent(1))), mode_(mode)
    {
    }

    void run(arena& memory)
    {
        const int64_t rows = left_.extent(1), columns = right_.extent(1);
        const int64_t height = least(rows, tallest), width = least(columns, widest + sizes.unit);
        const int64_t deep = least(groups_.slots, depth);
        lefts_ = memory.matrix<T>(gathers<Left> ? ex_.threads() : 0, deep * height);
        rights_ = memory.matrix<T>(gathers<Right> ? ex_.threads() : 0, deep * width);
        sums_ = memory.matrix<float>(direct ? 0 : ex_.threads(), height * width);
        if (memory.measuring()) return;

        int64_t total = 0, largest = 1;
        for (int64_t e = 0; e < groups_.experts(); ++e) {
            const int64_t begin = groups_.offsets(e), count = groups_.counts(e);
            expects(begin >= 0 && count >= 0 && begin <= groups_.slots - count, "counts (E)", count,
                    "a group inside of S = ", groups_.slots, " rows; so not for expert ", e);
            total += count;
            largest = greatest(largest, count);
        }
        // The largest group decides how evenly tasks can be shared: finer tiles where it holds much of the work.
        const int64_t busy = greatest(1, total / largest);
        int64_t h = tallest, w = widest;
        const auto tiles = [&] { return cut(rows, h, 8).parts * cut(columns, w, sizes.unit).parts; };
        while (h > sizes.least_side && busy * tiles() < sizes.row_tasks * 2 / 3) h /= 2;
        while (w > sizes.least_side && busy * tiles() < sizes.row_tasks * 2 / 3) w /= 2;
        const cut down(rows, h, 8), across(columns, w, sizes.unit);
        for_each_call<Call>(ex_, groups_.experts() * tiles(), [&, this, each = tiles()](int worker, int64_t task) {
            const int64_t m = task % each / across.parts, n = task % each % across.parts;
            compute(worker, task / each, down.begin(m), down.size(m), across.begin(n), across.size(n));
        });
    }

private:
    using T = row_element_t<Left>;
    static constexpr bool direct = std::is_same_v<G, float>;
    // A tile is long across what lies in place, so that few tiles gather the same columns.
    static constexpr int64_t longest = direct ? 4 * sizes.most_sums : 2 * sizes.most_sums;
    static constexpr int64_t tallest = gathers<Left> ? sizes.most_sums : longest;
    static constexpr int64_t widest = gathers<Left> ? longest : sizes.most_sums;
    static constexpr int64_t depth = sizes.depth_bytes / static_cast<int64_t>(sizeof(T));

    void compute(int worker, int64_t e, int64_t m0, int64_t m, int64_t n0, int64_t n) const
    {
        const int64_t begin = groups_.offsets(e), count = groups_.counts(e);
        G* c = dw_.base(e) + m0 * stride_ + n0;
        if (count == 0) {
            for (int64_t i = 0; i < m && mode_ == write_mode::overwrite; ++i)
                std::memset(static_cast<void*>(c + i * stride_), 0, sizeof(G) * static_cast<std::size_t>(n));
            return;
        }
        float* sums;
        if constexpr (direct) sums = c;
        else sums = &sums_(worker, 0);
        const int64_t stride = direct ? stride_ : n;
        T* left_room = gathers<Left> ? &lefts_(worker, 0) : nullptr;
        T* right_room = gathers<Right> ? &rights_(worker, 0) : nullptr;
        const int64_t step = gathers<Left> || gathers<Right> ? depth : count;
        write_mode mode = direct ? mode_ : write_mode::overwrite;
        for (int64_t k = 0; k < count; k += step, mode = write_mode::accumulate) {
            const int64_t here = least(step, count - k);
            factor<T> a = take_columns(left_, begin + k, here, m0, m, left_room);
            a.transposed = true;
            Call::multiply(m, n, here, a, take_columns(right_, begin + k, here, n0, n, right_room), mode, sums, stride);
        }
        G* old = mode_ == write_mode::accumulate ? c : nullptr;
        if constexpr (!direct) ex_.run_rows(worker, 0, m, store_sums<G, G>{sums, n, old, stride_, c, stride_, n});
    }

    host_executor& ex_;
    const row_groups& groups_;
    const Left& left_;         // (S,M)
    const Right& right_;       // (S,N)
    const weight_view<G>& dw_;
    int64_t stride_;
    write_mode mode_;
    matrix_view<T> lefts_;     // (threads, depth * M)
    matrix_view<T> rights_;    // (threads, depth * N)
    matrix_view<float> sums_;  // (threads, M * N)
};

} // namespace fastmoe::inline FASTMOE_ABI::detail::tiled
