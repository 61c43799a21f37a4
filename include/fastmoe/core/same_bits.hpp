// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Memory that holds bfloat16 or half under another library's name, CUDA's __nv_bfloat16 and __half first of all, as views
/// of this library's types. Nothing is copied, and no header of that library is needed.
#pragma once

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/core/tensor.hpp>

struct __half;
struct __nv_bfloat16;

namespace fastmoe::inline FASTMOE_ABI {

/// Which scalar has the bits of a foreign type, as the member `type`. Specialize it for a type of your own that is nothing
/// but the 16 bits.
template <class Foreign>
struct same_bits {};
template <>
struct same_bits<::__half> {
    using type = half;
};
template <>
struct same_bits<::__nv_bfloat16> {
    using type = bfloat16;
};

template <class Foreign>
concept has_same_bits = requires { requires scalar<typename same_bits<std::remove_const_t<Foreign>>::type>; };

/// The same memory as this library's scalars; const stays const. The compiler takes the two types for different memory, so
/// look at it through one of them at a time: this call ends what was done through the foreign type before, and the end of a
/// verb what the verb has done.
template <has_same_bits Foreign>
auto* as_scalars(Foreign* p) noexcept
{
    using Scalar = typename same_bits<std::remove_const_t<Foreign>>::type;
    static_assert(sizeof(Foreign) == sizeof(Scalar) && alignof(Foreign) == alignof(Scalar) &&
                  std::is_trivially_copyable_v<Foreign>);
    auto* out = reinterpret_cast<std::conditional_t<std::is_const_v<Foreign>, const Scalar, Scalar>*>(p);
#if !defined(__CUDA_ARCH__)
    __asm__ volatile("" : "+r"(out) : : "memory"); // the compiler forgets where the pointer is from, and keeps no stores back
#endif
    return out;
}

/// The same for a view of any rank.
///
///     layer.infer(ex, as_scalars(as_matrix(x, tokens, width)), weights.view(), as_scalars(as_matrix(y, tokens, width)));
template <has_same_bits Foreign, class Shape>
auto as_scalars(::cuda::std::mdspan<Foreign, Shape> v) noexcept
{
    auto* p = as_scalars(v.data_handle());
    return ::cuda::std::mdspan<std::remove_pointer_t<decltype(p)>, Shape>(p, v.extents());
}

} // namespace fastmoe::inline FASTMOE_ABI
