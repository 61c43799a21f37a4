// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// gemm::onednn: the grouped products of float and bfloat16 on the host by oneDNN, one call on one thread for each tile.
/// Needs libdnnl with its OpenMP or its sequential runtime; link it, and the OpenMP runtime that it uses (libgomp).
#pragma once

#include <signal.h>

#include <oneapi/dnnl/dnnl.h>

#include <fastmoe/gemm/portable.hpp>
#include <fastmoe/gemm/tiled_products.hpp>

#if DNNL_CPU_THREADING_RUNTIME != DNNL_RUNTIME_OMP && DNNL_CPU_THREADING_RUNTIME != DNNL_RUNTIME_SEQ
#error "fastmoe/gemm/onednn.hpp needs a oneDNN that was built with the OpenMP or the sequential CPU runtime"
#endif

namespace fastmoe::inline FASTMOE_ABI {

namespace detail::onednn {

// Under names of our own: the declarations in <omp.h> differ between compilers, and it may be included as well.
extern "C" int fastmoe_omp_get_max_threads() __asm__("omp_get_max_threads");
extern "C" void fastmoe_omp_set_num_threads(int) __asm__("omp_set_num_threads");

// The bfloat16 twin of dnnl_sgemm. Every oneDNN since 1.0 exports it with C linkage, though no public header declares it.
// Weak, so that a library without it still links: bfloat16 is then left to portable.
extern "C" [[gnu::weak]] dnnl_status_t fastmoe_dnnl_bgemm(char, char, dnnl_dim_t, dnnl_dim_t, dnnl_dim_t, float,
                                                          const void*, dnnl_dim_t, const void*, dnnl_dim_t, float, float*,
                                                          dnnl_dim_t) __asm__("dnnl_gemm_bf16bf16f32");

/// While it lives, oneDNN uses none but the calling thread. OpenMP's setting is each thread's own, and comes back after.
class one_thread {
public:
#if DNNL_CPU_THREADING_RUNTIME == DNNL_RUNTIME_OMP
    one_thread() noexcept : before_(fastmoe_omp_get_max_threads())
    {
        if (before_ != 1) fastmoe_omp_set_num_threads(1);
    }
    ~one_thread()
    {
        if (before_ != 1) fastmoe_omp_set_num_threads(before_);
    }
#else
    one_thread() noexcept {}
#endif
    one_thread(const one_thread&) = delete;
    one_thread& operator=(const one_thread&) = delete;

private:
    [[maybe_unused]] int before_ = 1;
};

/// While it lives, signals wait that come from outside of the thread. oneDNN's float kernels of AVX2 and AVX-512 keep the
/// stack pointer in a block of the heap while they run, and the kernel would put a handler's frame over what lies before
/// that block. Faults of the thread itself are delivered as ever.
class signals_wait {
public:
    signals_wait() noexcept
    {
        sigset_t most;
        ::sigfillset(&most);
        for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS, SIGABRT}) ::sigdelset(&most, fault);
        ::pthread_sigmask(SIG_BLOCK, &most, &before_);
    }
    ~signals_wait() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
    signals_wait(const signals_wait&) = delete;
    signals_wait& operator=(const signals_wait&) = delete;

private:
    sigset_t before_;
};

/// oneDNN's gemm as the call of a tile.
struct call {
    struct guard {
        one_thread alone;
        signals_wait undisturbed;
    };

    template <class T>
    static void multiply(int64_t m, int64_t n, int64_t k, const tiled::factor<T>& a, const tiled::factor<T>& b,
                         write_mode mode, float* c, int64_t stride)
    {
        const char ta = a.transposed ? 'T' : 'N', tb = b.transposed ? 'T' : 'N';
        const float beta = mode == write_mode::accumulate ? 1.f : 0.f; // 0: c is not read
        dnnl_status_t status;
        if constexpr (std::is_same_v<T, float>)
            status = dnnl_sgemm(ta, tb, m, n, k, 1.f, a.data, a.stride, b.data, b.stride, beta, c, stride);
        else status = fastmoe_dnnl_bgemm(ta, tb, m, n, k, 1.f, a.data, a.stride, b.data, b.stride, beta, c, stride);
        if (status == dnnl_out_of_memory) raise<out_of_memory>("oneDNN has no memory to pack a tile");
        if (status != dnnl_success) raise<error>("oneDNN's gemm failed with status " + std::to_string(status));
    }
};

/// Whether oneDNN multiplies T well on this machine.
template <class T>
bool multiplies() noexcept
{
    if constexpr (std::is_same_v<T, float>) return true;
    constexpr int needed = dnnl_cpu_isa_avx512_core_bf16;
    return &fastmoe_dnnl_bgemm != nullptr && (dnnl_get_effective_cpu_isa() & needed) == needed;
}

} // namespace detail::onednn

namespace gemm {

/// The mean number of rows an expert, S / E, up to which a product goes to portable instead: packing the weights anew in
/// each call, as oneDNN's gemm does, then costs more than its kernels gain. Measured on Zen 4 and Zen 5 (bench_gemm, which
/// sets all of them to 0); they follow from the shape alone, so bits do not depend on the routing.
struct onednn_limits {
    int64_t along = 256;          ///< weights whose rows lie along the reduction: forward
    int64_t across_bfloat16 = 256; ///< weights across it, in bfloat16: dgrad
    int64_t wgrad_bfloat16 = 512; ///< the weights' gradient, in bfloat16
};

/// Grouped products by oneDNN. Each tile is one call of its gemm on the worker's thread, of a shape that follows from the
/// problem alone: the bits do not depend on the number of threads and no second pool of threads runs. There are no
/// primitives, so the policy holds nothing, takes any number of rows as it is, and may be shared by threads.
///
/// oneDNN computes float, and bfloat16 into bfloat16 or float: sums in float, rounded once, subnormal bfloat16 taken as
/// zero. Other types, other executors, empty matrices and processors without AVX-512 bfloat16 go to portable. Nothing
/// here allocates; oneDNN packs into a block of bounded size that it takes from malloc and frees in each call. A signal
/// that comes to a thread in a product waits until its part of that is done.
struct onednn {
    static constexpr bool gathers_rows = true;
    static constexpr bool fuses_epilogue = true;
    static constexpr bool needs_host_counts = true;

    onednn_limits limits{};

    /// Y[s] = X[s] W[e(s)]^T + bias[e(s)] for the rows of groups, then epilogue(team, e, s).
    /// @param x       plain_rows or indexed_rows                        // (S,in)
    /// @param w       stored (out,in) or transposed                     // (E,out,in)
    /// @param bias    added before the rounding; without memory: none   // (E,out)
    /// @param y       overwritten; rows outside of groups untouched     // (S,out)
    /// @param memory  scratch, given back; only counted on a measuring arena
    /// @throws invalid_argument if shapes disagree or a group lies outside of S, out_of_memory; then nothing is written
    template <executor Executor, class Rows, class W, class B, class Y, class Epilogue>
    void forward(Executor& ex, const row_groups& groups, const Rows& x, const weight_view<W>& w, matrix_view<B> bias,
                 matrix_view<Y> y, const Epilogue& epilogue, arena& memory) const
    {
        if constexpr (is_native<Executor, element<Rows>, W, Y> && !std::is_same_v<std::remove_const_t<B>, double>)
            if (computes(x, y) && !few_rows<W>(groups, w)) {
                if (!memory.measuring() && bias.data_handle()) expects_shape(bias, "bias (E,out)", groups.experts(), w.out);
                return multiply_rows(ex, groups, x, w, bias, y, epilogue, memory);
            }
        portable{}.forward(ex, groups, x, w, bias, y, epilogue, memory);
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
        if constexpr (is_native<Executor, element<Rows>, W, Y>)
            if (computes(dy, dx) && !few_rows<W>(groups, detail::portable::transposed(w)))
                return multiply_rows(ex, groups, dy, detail::portable::transposed(w), matrix_view<const float>(), dx,
                                     epilogue, memory);
        portable{}.dgrad(ex, groups, dy, w, dx, epilogue, memory);
    }

    /// dW[e] (+)= dY_e^T X_e. Overwriting, an expert without rows gets zeros; accumulating, it is left alone.
    /// @param dy  plain_rows or indexed_rows                            // (S,out)
    /// @param x   plain_rows or indexed_rows                            // (S,in)
    /// @param dw  overwritten, or read, added to and rounded once       // (E,out,in)
    /// @throws as forward
    template <executor Executor, class DyRows, class XRows, class G>
    void wgrad(Executor& ex, const row_groups& groups, const DyRows& dy, const XRows& x, const weight_view<G>& dw,
               write_mode mode, arena& memory) const
    {
        using namespace detail::tiled;
        if constexpr (is_native<Executor, element<DyRows>, element<XRows>, G>)
            if (computes(dy, x) && groups.slots > (std::is_same_v<element<XRows>, float> ? 0 : limits.wgrad_bfloat16) * groups.experts()) {
                if (!memory.measuring()) {
                    detail::expects_gradient_product<Executor>(groups, dy, x, dw);
                    expects_lines(dw, "dW (E,out,in)");
                }
                using call = detail::onednn::call;
                const int64_t line = dw.col_stride == 1 ? dw.row_stride : dw.col_stride;
                if (dw.col_stride == 1)
                    lend(depth_product<call, DyRows, XRows, G>(ex, groups, dy, x, dw, line, mode), memory);
                else lend(depth_product<call, XRows, DyRows, G>(ex, groups, x, dy, dw, line, mode), memory);
                return;
            }
        portable{}.wgrad(ex, groups, dy, x, dw, mode, memory);
    }

private:
    template <class Rows>
    using element = detail::portable::row_element_t<Rows>;

    /// Types that oneDNN multiplies: X by W into Y.
    template <class Executor, class X, class W, class Y>
    static constexpr bool is_native =
        derives_from_host<Executor> && std::is_same_v<X, std::remove_const_t<W>> &&
        (std::is_same_v<X, float> || std::is_same_v<X, bfloat16>) && (std::is_same_v<Y, float> || std::is_same_v<Y, X>);

    template <class Rows, class Other>
    static bool computes(const Rows& x, const Other& y) noexcept
    {
        return detail::onednn::multiplies<element<Rows>>() && x.extent(1) > 0 && y.extent(1) > 0;
    }

    template <class W, class View>
    bool few_rows(const row_groups& groups, const View& w) const noexcept
    {
        constexpr bool wide = std::is_same_v<std::remove_const_t<W>, float>;
        const int64_t limit = w.col_stride == 1 ? limits.along : (wide ? 0 : limits.across_bfloat16);
        return groups.slots <= limit * groups.experts();
    }

    template <class T>
    static void expects_lines(const weight_view<T>& w, const char* name)
    {
        const bool by_row = w.col_stride == 1;
        const int64_t stride = by_row ? w.row_stride : w.col_stride, width = by_row ? w.in : w.out;
        expects((by_row ? w.out : w.in) == 1 || stride >= width, name, stride, "a stride of at least ", width);
    }

    template <class Rows, class W, class B, class Y, class Epilogue>
    static void multiply_rows(host_executor& ex, const row_groups& groups, const Rows& x, const weight_view<W>& w,
                              matrix_view<B> bias, matrix_view<Y> y, const Epilogue& epilogue, arena& memory)
    {
        if (!memory.measuring()) {
            detail::expects_row_product<host_executor>(groups, x, w, y);
            expects_lines(w, "W (E,out,in)");
        }
        using call = detail::onednn::call;
        lend(detail::tiled::row_product<call, Rows, W, B, Y, Epilogue>(ex, groups, x, w, bias, y, epilogue), memory);
    }

    /// Runs the product with the arena's memory, and gives that back.
    template <class Product>
    static void lend(Product product, arena& memory)
    {
        const arena::scope lent(memory);
        product.run(memory);
    }
};

static_assert(grouped_gemm<onednn, host_executor, float>);
static_assert(grouped_gemm<onednn, host_executor, bfloat16>);

} // namespace gemm

} // namespace fastmoe::inline FASTMOE_ABI
