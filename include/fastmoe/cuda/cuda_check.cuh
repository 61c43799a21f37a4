// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What the CUDA runtime reports becomes an exception here; and the namespace of code that depends on the architectures
/// it is compiled for. Part of cuda_executor.cuh.
#pragma once

#include <string>

#include <cuda_runtime.h>

#include <fastmoe/core/error.hpp>

// sm_800_900 for code compiled for compute capabilities 8.0 and 9.0: what is launched from here is in an inline namespace of
// this name, so that the linker never takes one object's kernel launch for another's.
#define FASTMOE_JOIN_1(a) sm_##a
#define FASTMOE_JOIN_2(a, b) sm_##a##_##b
#define FASTMOE_JOIN_3(a, b, c) sm_##a##_##b##_##c
#define FASTMOE_JOIN_4(a, b, c, d) sm_##a##_##b##_##c##_##d
#define FASTMOE_JOIN_5(a, b, c, d, e) sm_##a##_##b##_##c##_##d##_##e
#define FASTMOE_JOIN_6(a, b, c, d, e, f) sm_##a##_##b##_##c##_##d##_##e##_##f
#define FASTMOE_JOIN_7(a, b, c, d, e, f, g) sm_##a##_##b##_##c##_##d##_##e##_##f##_##g
#define FASTMOE_JOIN_8(a, b, c, d, e, f, g, h) sm_##a##_##b##_##c##_##d##_##e##_##f##_##g##_##h
#define FASTMOE_JOIN_9(a, b, c, d, e, f, g, h, ...) sm_##a##_##b##_##c##_##d##_##e##_##f##_##g##_##h##_more
#define FASTMOE_JOIN_PICK(a, b, c, d, e, f, g, h, i, j, k, l, name, ...) name
#define FASTMOE_JOIN(...)                                                                                             \
    FASTMOE_JOIN_PICK(__VA_ARGS__, FASTMOE_JOIN_9, FASTMOE_JOIN_9, FASTMOE_JOIN_9, FASTMOE_JOIN_9, FASTMOE_JOIN_8,    \
                      FASTMOE_JOIN_7, FASTMOE_JOIN_6, FASTMOE_JOIN_5, FASTMOE_JOIN_4, FASTMOE_JOIN_3, FASTMOE_JOIN_2, \
                      FASTMOE_JOIN_1, )                                                                               \
    (__VA_ARGS__)
#if defined(__CUDA_ARCH_LIST__)
#define FASTMOE_CUDA_ABI FASTMOE_JOIN(__CUDA_ARCH_LIST__)
#else
#define FASTMOE_CUDA_ABI sm_unknown
#endif

namespace fastmoe::inline FASTMOE_ABI::detail {

/// Throws cuda_error unless the call succeeded; out_of_memory where memory is what was missing.
inline void cuda_check(cudaError_t status, const char* call, location where = location::current())
{
    if (status == cudaSuccess) [[likely]]
        return;
    (void)cudaGetLastError(); // the next call that asks for it is not to find this one's
    std::string text = call; // not call + text: g++ 12 warns of an overlap in its own operator
    text += " failed: ";
    text += cudaGetErrorName(status);
    text += ", ";
    text += cudaGetErrorString(status);
    if (status == cudaErrorMemoryAllocation) raise<out_of_memory>(text, where);
    raise<cuda_error>(text, where);
}

/// Makes a device the calling thread's while this lives.
class [[nodiscard]] on_device {
public:
    explicit on_device(int device)
    {
        cuda_check(cudaGetDevice(&before_), "cudaGetDevice");
        if (before_ == device) before_ = -1;
        else cuda_check(cudaSetDevice(device), "cudaSetDevice");
    }
    on_device(const on_device&) = delete;
    on_device& operator=(const on_device&) = delete;
    ~on_device()
    {
        if (before_ >= 0) (void)cudaSetDevice(before_);
    }

private:
    int before_ = -1;
};

} // namespace fastmoe::inline FASTMOE_ABI::detail
