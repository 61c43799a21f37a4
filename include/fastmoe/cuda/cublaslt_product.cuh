// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A product as cuBLAS and cuBLASLt know it, by columns, and their failures as exceptions. Part of cublaslt.cuh.
#pragma once

#include <string>
#include <type_traits>

#include <cublasLt.h>

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/cuda/cuda_check.cuh>

namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI {

/// Throws cuda_error, which names the call and the status; out_of_memory where memory is what was missing.
inline void lt_check(cublasStatus_t status, const std::string& call, location where = location::current())
{
    if (status == CUBLAS_STATUS_SUCCESS) [[likely]]
        return;
    std::string text = call;
    text += " failed: ";
    text += cublasLtGetStatusName(status);
    text += ", ";
    text += cublasLtGetStatusString(status);
    if (status == CUBLAS_STATUS_ALLOC_FAILED) raise<out_of_memory>(text, where);
    raise<cuda_error>(text, where);
}

/// Whether a factor is what lies in memory, column by column, or that transposed.
enum class lt_order : std::uint8_t { as_is, turned };

constexpr cublasOperation_t lt_operation(lt_order order) noexcept { return order == lt_order::turned ? CUBLAS_OP_T : CUBLAS_OP_N; }

template <class T>
inline constexpr cudaDataType_t lt_type = CUDA_R_32F;
template <>
inline constexpr cudaDataType_t lt_type<double> = CUDA_R_64F;
template <>
inline constexpr cudaDataType_t lt_type<bfloat16> = CUDA_R_16BF;
template <>
inline constexpr cudaDataType_t lt_type<half> = CUDA_R_16F;

/// A matrix by columns.
struct lt_matrix {
    void* data = nullptr;
    int64_t line = 0; ///< elements from a column to the next
    cudaDataType_t type = CUDA_R_32F;
    int64_t element = 4; ///< bytes
    lt_order order = lt_order::as_is;

    template <class T>
    static lt_matrix of(T* data, int64_t line, lt_order order)
    {
        using scalar = std::remove_const_t<T>;
        return {const_cast<scalar*>(data), line, lt_type<scalar>, sizeof(scalar), order};
    }
    bool aligned_to(std::uintptr_t bytes) const noexcept { return reinterpret_cast<std::uintptr_t>(data) % bytes == 0; }
    /// What the address is a multiple of, as far as algorithms care.
    std::uint32_t alignment() const
    {
        std::uint32_t out = 256;
        while (!aligned_to(out)) out /= 2;
        return out;
    }
};

/// d (m,n) = a (m,k) b (k,n), plus d if it adds, plus bias (m) in every column.
struct lt_product {
    int64_t m = 0, n = 0, k = 0;
    lt_matrix a, b, d;
    const void* bias = nullptr;
    bool adds = false;

    std::string text() const
    {
        std::string out = "m "; // not "m " + text: g++ 12 warns of an overlap in its own operator
        out += std::to_string(m) + ", n " + std::to_string(n) + ", k " + std::to_string(k);
        return out;
    }
};

/// Sums are in double for double, in float for all others.
constexpr cublasComputeType_t lt_compute(cudaDataType_t type) noexcept { return type == CUDA_R_64F ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F; }

/// A scalar of the sums' type, as cuBLAS reads it.
struct lt_scalar {
    double wide;
    float narrow;

    explicit lt_scalar(double value) noexcept : wide(value), narrow(static_cast<float>(value)) {}
    const void* as(cudaDataType_t type) const noexcept { return type == CUDA_R_64F ? static_cast<const void*>(&wide) : &narrow; }
};

/// The stride of a matrix with a single line may be anything.
constexpr int64_t lt_line(int64_t stride, int64_t length) noexcept { return stride > length ? stride : length; }

} // namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI
