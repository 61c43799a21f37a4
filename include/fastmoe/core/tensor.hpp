// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Views: mdspan aliases with 64-bit extents, the words for their shapes, and the checks at every door.
///
///     T tokens    E experts   K choices per token   C choices in all (T*K, or fewer, or ragged)
///     S slots (rows in expert order, <= C + padding)   D model width   H hidden width   R ranks   L local experts
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>

#include <cuda/std/mdspan>

#include <fastmoe/core/config.hpp>
#include <fastmoe/core/error.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// A row-major view that owns nothing; element access is `v(i, j)`.
template <class T, std::size_t Rank>
using tensor_view = ::cuda::std::mdspan<T, ::cuda::std::dextents<int64_t, Rank>>;

template <class T>
using vector_view = tensor_view<T, 1>;

template <class T>
using matrix_view = tensor_view<T, 2>;

using std::type_identity_t;

/// Row i of a matrix.                                                             // (cols)
template <class T>
FASTMOE_HOST_DEVICE constexpr vector_view<T> row(matrix_view<T> m, int64_t i) noexcept
{
    return vector_view<T>(m.data_handle() + i * m.extent(1), m.extent(1));
}

/// Elements [first, first + count) of a vector. What is measured on views without memory is cut like any other.
template <class T>
FASTMOE_HOST_DEVICE constexpr vector_view<T> slice(vector_view<T> v, int64_t first, int64_t count) noexcept
{
    return vector_view<T>(v.data_handle() ? v.data_handle() + first : nullptr, count);
}

/// Rows [first, first + count) of a matrix, likewise.
template <class T>
FASTMOE_HOST_DEVICE constexpr matrix_view<T> slice_rows(matrix_view<T> m, int64_t first, int64_t count) noexcept
{
    return matrix_view<T>(m.data_handle() ? m.data_handle() + first * m.extent(1) : nullptr, count, m.extent(1));
}

/// The memory of a vector that may be left out: null if it is empty, whatever its pointer is.
template <class T>
FASTMOE_HOST_DEVICE constexpr T* pointer_or_null(vector_view<T> v) noexcept
{
    return v.extent(0) != 0 ? v.data_handle() : nullptr;
}

/// The raw pointer behind a raw or a fancy pointer (thrust::device_ptr, std::unique_ptr).
template <class Pointer>
constexpr auto* raw_pointer(const Pointer& p) noexcept
{
    if constexpr (std::is_pointer_v<Pointer>) return p;
    else if constexpr (requires { p.get(); }) return p.get();
    else return std::to_address(p);
}

/// A container with data() and size() (std::vector, thrust::device_vector, cuda::std::span) as a vector. // (size)
template <class Container>
constexpr auto as_vector(Container&& c)
{
    auto* p = raw_pointer(c.data());
    return vector_view<std::remove_pointer_t<decltype(p)>>(p, static_cast<int64_t>(c.size()));
}

/// A container as a row-major matrix.                                             // (rows, cols)
/// @throws invalid_argument if it does not hold exactly rows * cols elements
template <class Container>
constexpr auto as_matrix(Container&& c, int64_t rows, int64_t cols)
{
    auto* p = raw_pointer(c.data());
    const auto size = static_cast<int64_t>(c.size());
    const bool fits = rows >= 0 && cols >= 0 && (cols == 0 || rows <= size / cols); // so that the product cannot overflow
    expects(fits && rows * cols == size, "container size", size, "rows * cols = ", rows, " * ", cols);
    return matrix_view<std::remove_pointer_t<decltype(p)>>(p, rows, cols);
}

namespace detail {

template <class View>
std::string shape_text(const View& v, const char* before = "")
{
    std::string out = before; // not before + shape: g++ 12 warns of an overlap in its own operator
    for (std::size_t i = 0; i < View::rank(); ++i) {
        out += i ? "," : "(";
        out += std::to_string(v.extent(i));
    }
    out += ")";
    return out;
}

} // namespace detail

/// Throws invalid_argument unless the view has these extents, a pointer if it is not empty, and natural alignment.
/// @param name  the argument and its shape in words, e.g. "weights (T,K)"
template <class T, class Shape, class... Extents>
void expects_shape(::cuda::std::mdspan<T, Shape> v, const char* name, Extents... extents)
{
    constexpr std::size_t Rank = Shape::rank();
    static_assert(sizeof...(Extents) == Rank);
    const int64_t wanted[] = {static_cast<int64_t>(extents)...};
    bool same = true;
    int64_t size = 1;
    for (std::size_t i = 0; i < Rank; ++i) {
        same = same && v.extent(i) == wanted[i];
        size = size == 0 ? 0 : v.extent(i);
    }
    if (!same) {
        std::string text;
        for (std::size_t i = 0; i < Rank; ++i) {
            text += i ? "," : "(";
            text += std::to_string(wanted[i]);
        }
        expects(false, name, detail::shape_text(v, "of shape "), text, ")");
    }
    if (size != 0 && v.data_handle() == nullptr) // the text is built only then
        expects(false, name, "a null pointer", "memory for shape ", detail::shape_text(v));
    expects(reinterpret_cast<std::uintptr_t>(v.data_handle()) % alignof(T) == 0, name,
            static_cast<const void*>(v.data_handle()), "a pointer aligned to ", alignof(T), " bytes");
}

namespace detail {

/// Throws unless two views have no byte in common.
template <class A, class B>
void expects_apart(matrix_view<A> a, const char* name, matrix_view<B> b, const char* other)
{
    const auto begin = [](auto v) { return reinterpret_cast<std::uintptr_t>(v.data_handle()); };
    const auto bytes = [](auto v) {
        return static_cast<std::uintptr_t>(v.extent(0) * v.extent(1)) * sizeof(*v.data_handle());
    };
    const bool apart = bytes(a) == 0 || bytes(b) == 0 || begin(a) + bytes(a) <= begin(b) || begin(b) + bytes(b) <= begin(a);
    expects(apart, name, "memory that is shared", "none in common with ", other);
}

} // namespace detail

} // namespace fastmoe::inline FASTMOE_ABI
