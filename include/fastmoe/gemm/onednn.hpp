// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// gemm::onednn: the grouped products of float and bfloat16 on the host, by oneDNN's gemm calls on one thread each.
/// Needs libdnnl with its OpenMP or sequential runtime. Included by name, never by an umbrella.
#pragma once

#include <atomic>
#include <cstring>

#include <oneapi/dnnl/dnnl.h>

#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/gemm/grouped_gemm.hpp>
#include <fastmoe/gemm/portable.hpp>

#if DNNL_CPU_THREADING_RUNTIME != DNNL_RUNTIME_OMP && DNNL_CPU_THREADING_RUNTIME != DNNL_RUNTIME_SEQ
#error "fastmoe/gemm/onednn.hpp needs a oneDNN that was built with the OpenMP or the sequential CPU runtime"
#endif

namespace fastmoe::inline FASTMOE_ABI {

namespace detail::dnnl {

// Declared under names of our own, so that <omp.h>, whose declarations differ between compilers, may be included too.
#if DNNL_CPU_THREADING_RUNTIME == DNNL_RUNTIME_OMP
extern "C" int fastmoe_omp_get_max_threads() __asm__("omp_get_max_threads");
extern "C" void fastmoe_omp_set_num_threads(int) __asm__("omp_set_num_threads");

/// While it lives, oneDNN's calls from this thread use this thread alone. The caller's own setting comes back after it.
class one_thread {
public:
    one_thread() noexcept : before_(fastmoe_omp_get_max_threads())
    {
        if (before_ != 1) fastmoe_omp_set_num_threads(1);
    }
    ~one_thread()
    {
        if (before_ != 1) fastmoe_omp_set_num_threads(before_);
    }
    one_thread(const one_thread&) = delete;
    one_thread& operator=(const one_thread&) = delete;

private:
    int before_;
};
#else
struct one_thread {
    one_thread() noexcept {}
};
#endif

// The bfloat16 twin of dnnl_sgemm: exported with C linkage by every oneDNN from 1.0 on, though no public header declares
// it. Weak, so that a library without it still links; portable then takes its place.
extern "C" [[gnu::weak]] dnnl_status_t fastmoe_dnnl_gemm_bf16(char, char, dnnl_dim_t, dnnl_dim_t, dnnl_dim_t, float,
                                                              const void*, dnnl_dim_t, const void*, dnnl_dim_t, float,
                                                              float*, dnnl_dim_t) __asm__("dnnl_gemm_bf16bf16f32");

/// Whether products of T are oneDNN's business on this machine.
template <class T>
bool multiplies() noexcept
{
    if constexpr (std::is_same_v<T, float>) return true;
    else if constexpr (std::is_same_v<T, bfloat16>)
        return &fastmoe_dnnl_gemm_bf16 != nullptr &&
               (dnnl_get_effective_cpu_isa() & dnnl_cpu_isa_avx512_core_bf16) == dnnl_cpu_isa_avx512_core_bf16;
    else return false;
}

/// A row-major factor (rows, cols) with `stride` elements from a row to the next; transposed: stored as (cols, rows).
template <class T>
struct factor {
    const T* data;
    int64_t stride;
    bool transposed;
};

/// c (m,n) = or += a (m,k) b (k,n). Sums in float; c is not read when it is overwritten.
template <class T>
void multiply(int64_t m, int64_t n, int64_t k, factor<T> a, factor<T> b, write_mode mode, float* c, int64_t stride)
{
    const char ta = a.transposed ? 'T' : 'N', tb = b.transposed ? 'T' : 'N';
    const float beta = mode == write_mode::accumulate ? 1.f : 0.f;
    dnnl_status_t status;
    if constexpr (std::is_same_v<T, float>)
        status = dnnl_sgemm(ta, tb, m, n, k, 1.f, a.data, a.stride, b.data, b.stride, beta, c, stride);
    else status = fastmoe_dnnl_gemm_bf16(ta, tb, m, n, k, 1.f, a.data, a.stride, b.data, b.stride, beta, c, stride);
    expects<out_of_memory>(status != dnnl_out_of_memory, "oneDNN", "out of memory", "room for one packed block");
    expects<error>(status == dnnl_success, "oneDNN's status", static_cast<int>(status), "success");
}

constexpr int64_t smaller(int64_t a, int64_t b) noexcept { return a < b ? a : b; }
constexpr int64_t larger(int64_t a, int64_t b) noexcept { return a > b ? a : b; }

/// [0, extent) in equal parts no wider than `most`, each a multiple of `unit` but the last.
struct cut {
    int64_t extent, width, parts;

    constexpr cut(int64_t n, int64_t most, int64_t unit) noexcept : extent(n)
    {
        const int64_t pieces = (n + most - 1) / most;
        width = pieces > 1 ? ((n + pieces - 1) / pieces + unit - 1) / unit * unit : n;
        parts = n > 0 ? (n + width - 1) / width : 0;
    }
    constexpr int64_t begin(int64_t part) const noexcept { return part * width; }
    constexpr int64_t size(int64_t part) const noexcept
    {
        return width < extent - begin(part) ? width : extent - begin(part);
    }
};

/// The shapes of tiles. They follow from the shape of the product alone, never from the number of threads.
struct tiling {
    int64_t rows = 640;         ///< the most rows that one call multiplies: what packing the weights is spread over
    int64_t few_rows = 8;       ///< up to here a product streams its weights: narrow panels give every worker a share
    int64_t single_rows = 4;    ///< so few bfloat16 rows are quicker one by one, over a panel that stays in cache
    int64_t panel = 512;        ///< columns of a panel for many rows
    int64_t narrow_panel = 128; ///< columns of a panel for few rows
    int64_t depth_bytes = 1536; ///< of a column of gathered rows at a time in a weight gradient: oneDNN's own depth
    int64_t tasks = 64;         ///< enough tasks to keep workers evenly busy
    int64_t unit = 48;          ///< columns of oneDNN's AVX-512 kernel
};
inline constexpr tiling tile;

/// Gives the arena back what was taken since.
struct loan {
    arena& memory;
    int64_t used = memory.used();

    ~loan() { memory.rewind(used); }
};

template <class Rows>
using element_t = std::remove_cvref_t<decltype(*std::declval<const Rows&>().row(0))>;
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
            if (from) std::memcpy(room + r * width, from + first, bytes);
            else std::memset(static_cast<void*>(room + r * width), 0, bytes);
        }
        return {room, width, false};
    } else return {rows.row(begin) + first, rows.extent(1), false};
}

/// y += bias for a row of floats.
template <class B>
struct add_bias {
    using vectorized = void;
    B* bias;       // (width)
    float* y;      // (rows,width), `stride` apart
    int64_t stride, width;

    template <class Team>
    void operator()(Team& team, int64_t r) const
    {
        float* to = y + r * stride;
        team.for_each(width, [&, this](int64_t i) { to[i] += static_cast<float>(bias[i]); });
    }
};

/// y = sums + bias, or y += sums, for a row of a narrow type: rounded once.
template <class B, class Y>
struct round_row {
    using vectorized = void;
    const float* sums; // (rows,width)
    B* bias;           // (width) or null
    Y* y;              // (rows,width), `stride` apart
    int64_t stride, width;
    write_mode mode = write_mode::overwrite;

    template <class Team>
    void operator()(Team& team, int64_t r) const
    {
        const float* from = sums + r * width;
        Y* to = y + r * stride;
        if (mode == write_mode::accumulate)
            team.for_each(width, [=](int64_t i) { to[i] = Y(static_cast<float>(to[i]) + from[i]); });
        else if (bias) team.for_each(width, [=, this](int64_t i) { to[i] = Y(from[i] + static_cast<float>(bias[i])); });
        else team.for_each(width, [=](int64_t i) { to[i] = Y(from[i]); });
    }
};

template <class F>
struct vectorized_like {};
template <vectorized_functor F>
struct vectorized_like<F> {
    using vectorized = void;
};

/// The epilogue as a functor of the row alone.
template <class Epilogue>
struct finish_row : vectorized_like<Epilogue> {
    const Epilogue& epilogue;
    int64_t expert;

    finish_row(const Epilogue& f, int64_t e) noexcept : epilogue(f), expert(e) {}
    template <class Team>
    void operator()(Team& team, int64_t row) const
    {
        epilogue(team, expert, row);
    }
};

/// Rows [begin, begin + rows) of one expert, and its tasks: each computes some of the block's panels of columns.
struct row_block {
    int64_t begin, rows, expert;
    int64_t first_task;
    int32_t finished; ///< panels; who finishes the last one runs the epilogue
};

/// Y (S,N) = rows (S,K) times a matrix (K,N) of each expert: forward and dgrad.
template <class Rows, class W, class B, class Y, class Epilogue>
class row_product {
public:
    /// Element (k,n) of expert e is w.base(e)[k * k_stride + n * n_stride].
    row_product(host_executor& ex, const row_groups& groups, const Rows& rows, const weight_view<W>& w,
                int64_t k_stride, int64_t n_stride, matrix_view<B> bias, matrix_view<Y> y, const Epilogue& epilogue)
        : ex_(ex), groups_(groups), rows_(rows), w_(w), depth_(rows.extent(1)), columns_(y.extent(1)), n_stride_(n_stride),
          stored_by_column_(k_stride == 1 && (n_stride != 1 || depth_ == 1)),
          line_(stored_by_column_ ? larger(n_stride, depth_) : larger(k_stride, columns_)), bias_(bias), y_(y),
          epilogue_(epilogue)
    {
    }

    void run(arena& memory)
    {
        loan scratch{memory};
        const int64_t most_rows = smaller(groups_.slots, tile.rows);
        const int64_t panel = smaller(columns_, tile.panel + tile.unit);
        const auto blocks = memory.vector<row_block>(groups_.slots / tile.rows + groups_.experts());
        gathered_ = memory.matrix<T>(gathers<Rows> ? ex_.threads() : 0, most_rows * depth_);
        sums_ = memory.matrix<float>(direct ? 0 : ex_.threads(), most_rows * panel);
        if (memory.measuring()) return;
        const int64_t tasks = plan(blocks.data_handle());
        ex_.for_each_task(tasks, [this](int worker, int64_t task) { compute(worker, task); });
    }

private:
    using T = element_t<Rows>;
    static constexpr bool direct = std::is_same_v<Y, float>; ///< oneDNN writes into y itself

    /// Cuts the groups into blocks and the blocks into tasks; returns the number of tasks.
    int64_t plan(row_block* block)
    {
        blocks_ = block;
        int64_t many = 0, few = 0, rows = 0;
        for (int64_t e = 0; e < groups_.experts(); ++e) {
            const int64_t begin = groups_.offsets(e), count = groups_.counts(e);
            expects(begin >= 0 && count >= 0 && begin + count <= groups_.slots, "counts (E)", count,
                    "groups inside of S = ", groups_.slots, " rows");
            rows += count;
            expects(rows <= groups_.slots, "counts (E)", rows, "at most S = ", groups_.slots, " rows in all");
            const cut parts(count, tile.rows, 8);
            for (int64_t p = 0; p < parts.parts; ++p) {
                block[count_++] = {begin + parts.begin(p), parts.size(p), e, 0, 0};
                ++(parts.size(p) <= tile.few_rows ? few : many);
            }
        }
        const int64_t wide = cut(columns_, tile.panel, tile.unit).parts;
        panel_ = many * wide < tile.tasks / 2 ? tile.panel / 2 : tile.panel;
        // Gathering is repeated by each task of a block: rather fewer of them.
        const int64_t wanted = gathers<Rows> ? tile.tasks / 2 : tile.tasks;
        many_per_task_ = larger(1, many * cut(columns_, panel_, tile.unit).parts / wanted);
        few_per_task_ = larger(1, few * cut(columns_, tile.narrow_panel, tile.unit).parts / wanted);
        int64_t tasks = 0;
        for (int64_t b = 0; b < count_; ++b) {
            block[b].first_task = tasks;
            tasks += cut(panels(block[b]).parts, per_task(block[b]), 1).parts;
        }
        return tasks;
    }

    bool is_few(const row_block& b) const noexcept { return b.rows <= tile.few_rows; }
    cut panels(const row_block& b) const noexcept
    {
        return {columns_, is_few(b) ? tile.narrow_panel : panel_, tile.unit};
    }
    int64_t per_task(const row_block& b) const noexcept { return is_few(b) ? few_per_task_ : many_per_task_; }

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
        const one_thread guard;
        row_block& b = block_of(task);
        const cut all = panels(b), shares(all.parts, per_task(b), 1);
        const int64_t share = task - b.first_task;
        T* room = gathers<Rows> ? &gathered_(worker, 0) : nullptr;
        const factor<T> x = take_columns(rows_, b.begin, b.rows, 0, depth_, room);
        for (int64_t p = shares.begin(share); p < shares.begin(share) + shares.size(share); ++p)
            compute_panel(worker, b, x, all.begin(p), all.size(p));
        const auto mine = static_cast<int32_t>(shares.size(share));
        // Release what this task wrote; acquire what the others wrote, for the epilogue.
        const int32_t before = std::atomic_ref(b.finished).fetch_add(mine, std::memory_order_acq_rel);
        if constexpr (!std::is_same_v<Epilogue, no_epilogue>)
            if (before + mine == all.parts)
                ex_.run_rows(worker, b.begin, b.begin + b.rows, finish_row<Epilogue>(epilogue_, b.expert));
    }

    void compute_panel(int worker, const row_block& b, factor<T> x, int64_t first, int64_t width) const
    {
        Y* y = y_.data_handle() + b.begin * columns_ + first;
        float* sums;
        if constexpr (direct) sums = y;
        else sums = &sums_(worker, 0);
        const int64_t stride = direct ? columns_ : width;
        const factor<T> w{w_.base(b.expert) + first * n_stride_, line_, stored_by_column_};
        const bool one_by_one = !std::is_same_v<T, float> && b.rows <= tile.single_rows;
        const int64_t step = one_by_one ? 1 : b.rows;
        for (int64_t r = 0; r < b.rows; r += step)
            multiply(step, width, depth_, {x.data + r * x.stride, x.stride, false}, w, write_mode::overwrite,
                     sums + r * stride, stride);
        B* bias = bias_.data_handle() ? bias_.data_handle() + b.expert * columns_ + first : nullptr;
        if constexpr (!direct) ex_.run_rows(worker, 0, b.rows, round_row<B, Y>{sums, bias, y, columns_, width});
        else if (bias) ex_.run_rows(worker, 0, b.rows, add_bias<B>{bias, y, columns_, width});
    }

    host_executor& ex_;
    const row_groups& groups_;
    const Rows& rows_;            // (S,K)
    const weight_view<W>& w_;
    int64_t depth_, columns_;     // K, N
    int64_t n_stride_;
    bool stored_by_column_;       ///< a line of the weights is a column of the (K,N) matrix
    int64_t line_;                ///< elements from a line to the next
    matrix_view<B> bias_;   // (E,N) or null
    matrix_view<Y> y_;            // (S,N)
    const Epilogue& epilogue_;
    row_block* blocks_ = nullptr; // (count_)
    int64_t count_ = 0, panel_ = 0, many_per_task_ = 1, few_per_task_ = 1;
    matrix_view<T> gathered_;     // (threads, rows * K)
    matrix_view<float> sums_;     // (threads, rows * panel)
};

/// C[e] (M,N) (+)= left_e^T right_e: a weight gradient, or its transpose.
template <class Left, class Right, class G>
class depth_product {
public:
    /// Row m of expert e starts at dw.base(e) + m * stride.
    depth_product(host_executor& ex, const row_groups& groups, const Left& left, const Right& right,
                  const weight_view<G>& dw, int64_t stride, write_mode mode)
        : ex_(ex), groups_(groups), left_(left), right_(right), dw_(dw), stride_(larger(stride, right.extent(1))), mode_(mode)
    {
    }

    void run(arena& memory)
    {
        loan scratch{memory};
        const int64_t rows = left_.extent(1), columns = right_.extent(1);
        const int64_t height = smaller(rows, tallest), width = smaller(columns, widest + tile.unit);
        const int64_t deep = smaller(groups_.slots, depth);
        lefts_ = memory.matrix<T>(gathers<Left> ? ex_.threads() : 0, deep * height);
        rights_ = memory.matrix<T>(gathers<Right> ? ex_.threads() : 0, deep * width);
        sums_ = memory.matrix<float>(direct ? 0 : ex_.threads(), height * width);
        if (memory.measuring()) return;

        int64_t total = 0, largest = 1;
        for (int64_t e = 0; e < groups_.experts(); ++e) {
            total += groups_.counts(e);
            largest = larger(largest, groups_.counts(e));
        }
        // The largest expert decides how evenly tasks can be shared: finer tiles where it holds much of the work.
        const int64_t busy = larger(1, total / largest);
        int64_t h = tallest, w = widest;
        const auto few = [&] { return busy * cut(rows, h, 8).parts * cut(columns, w, tile.unit).parts < tile.tasks / 4; };
        while (h > 256 && few()) h /= 2;
        while (w > 256 && few()) w /= 2;
        const cut down(rows, h, 8), across(columns, w, tile.unit);
        const int64_t tiles = down.parts * across.parts;
        ex_.for_each_task(groups_.experts() * tiles, [&, this](int worker, int64_t task) {
            const int64_t t = task % tiles, m = t / across.parts, n = t % across.parts;
            compute(worker, task / tiles, down.begin(m), down.size(m), across.begin(n), across.size(n));
        });
    }

private:
    using T = element_t<Left>;
    static constexpr bool direct = std::is_same_v<G, float>;
    // A tile is wide across what lies in place, so that few tiles gather the same columns.
    static constexpr int64_t tallest = gathers<Left> ? 512 : direct ? 2048 : 1024;
    static constexpr int64_t widest = !gathers<Left> ? 512 : direct ? 2048 : 1024;
    static constexpr int64_t depth = tile.depth_bytes / static_cast<int64_t>(sizeof(T));

    void compute(int worker, int64_t e, int64_t m0, int64_t m, int64_t n0, int64_t n) const
    {
        const one_thread guard;
        const int64_t begin = groups_.offsets(e), count = groups_.counts(e);
        G* c = dw_.base(e) + m0 * stride_ + n0;
        if (count == 0) {
            if (mode_ == write_mode::overwrite)
                for (int64_t i = 0; i < m; ++i)
                    std::memset(static_cast<void*>(c + i * stride_), 0, sizeof(G) * static_cast<std::size_t>(n));
            return;
        }
        float* sums;
        if constexpr (direct) sums = c;
        else sums = &sums_(worker, 0);
        T* left_room = gathers<Left> ? &lefts_(worker, 0) : nullptr;
        T* right_room = gathers<Right> ? &rights_(worker, 0) : nullptr;
        const int64_t step = gathers<Left> || gathers<Right> ? depth : count;
        write_mode mode = direct ? mode_ : write_mode::overwrite;
        for (int64_t k = 0; k < count; k += step, mode = write_mode::accumulate) {
            const int64_t here = smaller(step, count - k);
            factor<T> a = take_columns(left_, begin + k, here, m0, m, left_room);
            a.transposed = true;
            multiply(m, n, here, a, take_columns(right_, begin + k, here, n0, n, right_room), mode, sums,
                     direct ? stride_ : n);
        }
        if constexpr (!direct) ex_.run_rows(worker, 0, m, round_row<const float, G>{sums, nullptr, c, stride_, n, mode_});
    }

    host_executor& ex_;
    const row_groups& groups_;
    const Left& left_;   // (S,M)
    const Right& right_; // (S,N)
    const weight_view<G>& dw_;
    int64_t stride_;
    write_mode mode_;
    matrix_view<T> lefts_;    // (threads, depth * M)
    matrix_view<T> rights_;   // (threads, depth * N)
    matrix_view<float> sums_; // (threads, M * N)
};

} // namespace detail::dnnl

namespace gemm {

/// Grouped products by oneDNN: each task is one call on one thread over a tile that the shape alone fixes, so that the
/// bits do not depend on the number of threads and no second pool runs. Holds nothing: there is no primitive to cache.
///
/// oneDNN computes float, and bfloat16 with output in bfloat16 or float (in float sums, rounded once); all other types,
/// empty matrices and processors without AVX-512 bfloat16 go to portable. Allocates nothing itself; each of oneDNN's
/// calls packs its factors into a block of its own, of a bounded size.
struct onednn {
    static constexpr bool gathers_rows = true, fuses_epilogue = true, needs_host_counts = true;

    /// y[s] = rows[s] w[e(s)]^T + bias[e(s)], then the epilogue of the row.
    /// @param rows  plain or indexed                    // (S,in)
    /// @param bias  or without memory                   // (E,out)
    /// @param y     overwritten in the groups' rows     // (S,out)
    /// @throws invalid_argument if shapes disagree, out_of_memory if the arena is too small: nothing is written then
    template <class Rows, class W, class B, class Y, class Epilogue>
    void forward(host_executor& ex, const row_groups& groups, const Rows& rows, const weight_view<W>& w,
                 matrix_view<B> bias, matrix_view<Y> y, const Epilogue& epilogue, arena& memory) const
    {
        if constexpr (is_native<element_t<Rows>, W, Y> && !std::is_same_v<std::remove_const_t<B>, double>)
            if (computes(rows, w)) {
                if (!memory.measuring()) {
                    check(groups, rows, w, w.in);
                    expects_shape(y, "y (S,out)", groups.slots, w.out);
                    if (bias.data_handle()) expects_shape(bias, "bias (E,out)", groups.experts(), w.out);
                }
                return detail::dnnl::row_product(ex, groups, rows, w, w.col_stride, w.row_stride, bias, y, epilogue).run(memory);
            }
        portable{}.forward(ex, groups, rows, w, bias, y, epilogue, memory);
    }

    /// dx[s] = rows[s] w[e(s)], then the epilogue of the row.
    /// @param rows  of dY, plain or indexed             // (S,out)
    /// @param dx    overwritten in the groups' rows     // (S,in)
    template <class Rows, class W, class Y, class Epilogue>
    void dgrad(host_executor& ex, const row_groups& groups, const Rows& rows, const weight_view<W>& w,
               matrix_view<Y> dx, const Epilogue& epilogue, arena& memory) const
    {
        if constexpr (is_native<element_t<Rows>, W, Y>)
            if (computes(rows, w)) {
                if (!memory.measuring()) {
                    check(groups, rows, w, w.out);
                    expects_shape(dx, "dx (S,in)", groups.slots, w.in);
                }
                const matrix_view<const float> none;
                return detail::dnnl::row_product(ex, groups, rows, w, w.row_stride, w.col_stride, none, dx, epilogue)
                    .run(memory);
            }
        portable{}.dgrad(ex, groups, rows, w, dx, epilogue, memory);
    }

    /// dw[e] = or += dy_e^T x_e. An expert without rows gets zeros, or keeps what it has.
    /// @param dy_rows  plain or indexed                 // (S,out)
    /// @param x_rows   plain or indexed                 // (S,in)
    template <class DyRows, class XRows, class G>
    void wgrad(host_executor& ex, const row_groups& groups, const DyRows& dy_rows, const XRows& x_rows,
               const weight_view<G>& dw, write_mode mode, arena& memory) const
    {
        if constexpr (is_native<element_t<DyRows>, element_t<XRows>, G>)
            if (computes(x_rows, dw)) {
                if (!memory.measuring()) {
                    check(groups, dy_rows, dw, dw.out);
                    check(groups, x_rows, dw, dw.in);
                }
                if (dw.col_stride == 1)
                    detail::dnnl::depth_product(ex, groups, dy_rows, x_rows, dw, dw.row_stride, mode).run(memory);
                else detail::dnnl::depth_product(ex, groups, x_rows, dy_rows, dw, dw.col_stride, mode).run(memory);
                return;
            }
        portable{}.wgrad(ex, groups, dy_rows, x_rows, dw, mode, memory);
    }

private:
    template <class Rows>
    using element_t = detail::dnnl::element_t<Rows>;

    /// Types that oneDNN multiplies: X by W into Y.
    template <class X, class W, class Y>
    static constexpr bool is_native =
        std::is_same_v<X, std::remove_const_t<W>> && (std::is_same_v<X, float> || std::is_same_v<X, bfloat16>) &&
        (std::is_same_v<Y, float> || std::is_same_v<Y, X>);

    template <class Rows, class W>
    static bool computes(const Rows&, const weight_view<W>& w) noexcept
    {
        return detail::dnnl::multiplies<element_t<Rows>>() && w.out > 0 && w.in > 0;
    }

    template <class Rows, class W>
    static void check(const row_groups& groups, const Rows& rows, const weight_view<W>& w, int64_t depth)
    {
        detail::expects_groups(groups, rows.extent(0));
        expects(rows.extent(1) == depth, "rows (S,.)", rows.extent(1), depth, " columns, as the weights have");
        detail::expects_weights(w, "weights (E,out,in)", groups.experts(), w.out, w.in);
        const bool by_row = w.col_stride == 1;
        const int64_t lines = by_row ? w.out : w.in, width = by_row ? w.in : w.out, stride = by_row ? w.row_stride : w.col_stride;
        expects(lines == 1 || stride >= width, "weights' stride", stride, width, " or more: lines that do not overlap");
    }
};

} // namespace gemm

} // namespace fastmoe::inline FASTMOE_ABI
