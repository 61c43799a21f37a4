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

/// A matrix stored in lines: whether `lines` of them, `stride` apart and `width` long, lie clear of each other.
constexpr bool lies_clear(int64_t lines, int64_t width, int64_t stride) noexcept { return lines <= 1 || stride >= width; }

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
    int64_t rows = 640;          ///< the most rows that one call multiplies: what packing the weights is spread over
    int64_t few_rows = 8;        ///< from here down a product streams its weights: narrow panels keep all workers busy
    int64_t repeated_rows = 4;   ///< bfloat16 rows that are cheaper as products of one row, over a panel kept in cache
    int64_t panel = 512;         ///< columns of a panel of many rows
    int64_t narrow_panel = 128;  ///< columns of a panel of few rows
    int64_t depth = 512;         ///< gathered rows of a weight gradient at a time
    int64_t tasks = 64;          ///< tasks that keep workers evenly busy
    int64_t unit = 48;           ///< the columns of oneDNN's AVX-512 kernel
};
inline constexpr tiling tile;

constexpr int64_t least(int64_t a, int64_t b) noexcept { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) noexcept { return a > b ? a : b; }

template <class Rows>
using element_t = std::remove_cvref_t<decltype(*std::declval<const Rows&>().row(0))>;
template <class Rows>
inline constexpr bool gathered = requires(const Rows& r) { r.index; };

/// Columns [first, first + width) of `count` rows from `begin` on as a factor: in place, or gathered into `tile`.
template <class Rows, class T = element_t<Rows>>
factor<T> columns(const Rows& rows, int64_t begin, int64_t count, int64_t first, int64_t width, T* into)
{
    if constexpr (gathered<Rows>) {
        for (int64_t r = 0; r < count; ++r) {
            const T* from = rows.row(begin + r);
            const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(width);
            if (from) std::memcpy(into + r * width, from + first, bytes);
            else std::memset(static_cast<void*>(into + r * width), 0, bytes);
        }
        return {into, width, false};
    }
    else return {rows.row(begin) + first, rows.extent(1), false};
}

/// Row r: to = from + bias, rounded once. In place for float.
template <class From, class B, class To>
struct finish_row {
    using vectorized = void;
    const float* from; // (rows, width), from_stride apart
    int64_t from_stride;
    const B* bias; // (width) or null
    To* to;
    int64_t to_stride, width;
    write_mode mode = write_mode::overwrite;
};
