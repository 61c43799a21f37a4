// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What cublasLt.h of cuBLAS 13.4 declares beyond that of older toolkits, as far as gemm::cublaslt_grouped needs it: names,
/// values and signatures as in that header. Nothing where the toolkit is new enough. The library of 13.4 takes eight bytes for
/// the averages, though its header says uint32_t of them; no older one has the functions.
#pragma once

#include <cublasLt.h>

#if CUBLAS_VERSION < 130400
#undef CUBLAS_VERSION
#define CUBLAS_VERSION 130400

typedef enum {
    CUBLASLT_INTEGER_WIDTH_32 = 0,
    CUBLASLT_INTEGER_WIDTH_64 = 1,
} cublasLtIntegerWidth_t;

inline constexpr int CUBLASLT_BATCH_MODE_GROUPED = 2; // the enumeration of older headers ends at 1

inline constexpr auto CUBLASLT_GROUPED_MATRIX_LAYOUT_ROWS_COLS_ARRAY_INTEGER_WIDTH = static_cast<cublasLtMatrixLayoutAttribute_t>(12);
inline constexpr auto CUBLASLT_GROUPED_MATRIX_LAYOUT_LD_ARRAY_INTEGER_WIDTH = static_cast<cublasLtMatrixLayoutAttribute_t>(13);

inline constexpr auto CUBLASLT_MATMUL_PREF_GROUPED_AVERAGE_REDUCTION_DIM = static_cast<cublasLtMatmulPreferenceAttributes_t>(13);
inline constexpr auto CUBLASLT_MATMUL_PREF_GROUPED_DESC_D_AVERAGE_ROWS = static_cast<cublasLtMatmulPreferenceAttributes_t>(14);
inline constexpr auto CUBLASLT_MATMUL_PREF_GROUPED_DESC_D_AVERAGE_COLS = static_cast<cublasLtMatmulPreferenceAttributes_t>(15);

extern "C" cublasStatus_t CUBLASWINAPI cublasLtGroupedMatrixLayoutInit_internal(cublasLtMatrixLayout_t matLayout, size_t size,
                                                                                cudaDataType type, int groupCount,
                                                                                const void* rows_array, const void* cols_array,
                                                                                const void* ld_array);

inline cublasStatus_t cublasLtGroupedMatrixLayoutInit(cublasLtMatrixLayout_t matLayout, cudaDataType type, int groupCount,
                                                      const void* rows_array, const void* cols_array, const void* ld_array)
{
    return cublasLtGroupedMatrixLayoutInit_internal(matLayout, sizeof(*matLayout), type, groupCount, rows_array, cols_array, ld_array);
}
#endif
