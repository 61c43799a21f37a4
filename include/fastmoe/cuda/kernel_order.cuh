// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How kernels of one stream follow each other, and what they are compiled for. Part of cuda_executor.cuh.
#pragma once

#include <fastmoe/cuda/cuda_check.cuh>

namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI {

/// Whether every architecture that this is compiled for is that one, as 900, or a later one.
constexpr bool compiled_for([[maybe_unused]] int least) noexcept
{
#if defined(__CUDA_ARCH_LIST__)
    for (const int architecture : {__CUDA_ARCH_LIST__})
        if (architecture < least) return false;
    return true;
#else
    return false;
#endif
}

/// Where each kernel begins: waits for the kernels before, if this one was let begin before they ended, and lets the next one
/// begin. See cuda_options.
inline __device__ void wait_for_kernels()
{
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;\n\tgriddepcontrol.launch_dependents;" ::: "memory");
#endif
}

} // namespace fastmoe::inline FASTMOE_ABI::detail::inline FASTMOE_CUDA_ABI
