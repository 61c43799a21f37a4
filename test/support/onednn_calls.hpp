// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Counts the program's calls of oneDNN's gemm, so that a test can tell whether oneDNN was really at work. It stands
/// before the library's symbols and passes on to them: include it in one file of an executable.
#pragma once

#include <atomic>
#include <cstdint>

#include <dlfcn.h>

#include <fastmoe/gemm/onednn.hpp>

namespace support {

/// Calls so far.
inline std::atomic<std::int64_t> onednn_float_calls{0}, onednn_bfloat16_calls{0};

/// The library's own function, looked up behind this program.
template <class Function>
Function* behind(const char* name)
{
    (void)dnnl_version(); // keeps the library among those that are linked
    return reinterpret_cast<Function*>(::dlsym(RTLD_NEXT, name));
}

/// Calls for products of T since it was made.
template <class T>
struct onednn_calls {
    std::int64_t start = count().load();
    std::int64_t since() const { return count().load() - start; }

private:
    static std::atomic<std::int64_t>& count()
    {
        return std::is_same_v<T, fastmoe::bfloat16> ? onednn_bfloat16_calls : onednn_float_calls;
    }
};

} // namespace support

extern "C" dnnl_status_t dnnl_sgemm(char ta, char tb, dnnl_dim_t m, dnnl_dim_t n, dnnl_dim_t k, float alpha, const float* a,
                                    dnnl_dim_t lda, const float* b, dnnl_dim_t ldb, float beta, float* c, dnnl_dim_t ldc)
{
    static auto* const library = support::behind<decltype(dnnl_sgemm)>("dnnl_sgemm");
    ++support::onednn_float_calls;
    return library(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}

extern "C" dnnl_status_t fastmoe_counted_bgemm(char ta, char tb, dnnl_dim_t m, dnnl_dim_t n, dnnl_dim_t k, float alpha,
                                               const void* a, dnnl_dim_t lda, const void* b, dnnl_dim_t ldb, float beta,
                                               float* c, dnnl_dim_t ldc) __asm__("dnnl_gemm_bf16bf16f32");
extern "C" dnnl_status_t fastmoe_counted_bgemm(char ta, char tb, dnnl_dim_t m, dnnl_dim_t n, dnnl_dim_t k, float alpha,
                                               const void* a, dnnl_dim_t lda, const void* b, dnnl_dim_t ldb, float beta,
                                               float* c, dnnl_dim_t ldc)
{
    static auto* const library = support::behind<decltype(fastmoe_counted_bgemm)>("dnnl_gemm_bf16bf16f32");
    ++support::onednn_bfloat16_calls;
    return library(ta, tb, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
}
