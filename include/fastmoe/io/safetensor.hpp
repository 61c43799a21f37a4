// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A tensor as the safetensors reader gives it and the writer takes it: element type, shape, and where it lies.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/core/float8.hpp>
#include <fastmoe/core/error.hpp>
#include <fastmoe/core/tensor.hpp>

namespace fastmoe::inline FASTMOE_ABI {
namespace io {

/// The element types of the format. Sub-byte types are not among them.
enum class element_type : std::uint8_t {
    boolean,
    u8,
    i8,
    f8_e5m2,
    f8_e4m3,
    f8_e8m0,
    i16,
    u16,
    f16,
    bf16,
    i32,
    u32,
    f32,
    f64,
    i64,
    u64,
    c64,
    count_
};

namespace detail {

/// A row of the table below, in the order of element_type.
struct element_type_fact {
    const char* name; ///< as headers spell it
    int bytes;
};
inline constexpr element_type_fact element_types[] = {
    {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E5M2", 1}, {"F8_E4M3", 1}, {"F8_E8M0", 1},
    {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},     {"U32", 4},
    {"F32", 4},  {"F64", 8}, {"I64", 8}, {"U64", 8},     {"C64", 8}};
static_assert(sizeof element_types / sizeof *element_types == static_cast<std::size_t>(element_type::count_));

} // namespace detail

/// The format's name of a type, e.g. "BF16".
/// @param t  not count_
inline const char* name_of(element_type t) { return detail::element_types[static_cast<int>(t)].name; }
/// The size of one element.
/// @param t  not count_
inline int bytes_of(element_type t) { return detail::element_types[static_cast<int>(t)].bytes; }

/// The format's type for a C++ type; count_ where there is none. BOOL has none: a file may hold bytes that are no bool.
template <class T>
inline constexpr element_type element_type_of = element_type::count_;
template <class T>
inline constexpr element_type element_type_of<const T> = element_type_of<T>;
template <>
inline constexpr element_type element_type_of<double> = element_type::f64;
template <>
inline constexpr element_type element_type_of<float> = element_type::f32;
template <>
inline constexpr element_type element_type_of<bfloat16> = element_type::bf16;
template <>
inline constexpr element_type element_type_of<half> = element_type::f16;
template <>
inline constexpr element_type element_type_of<float8_e4m3> = element_type::f8_e4m3;
template <>
inline constexpr element_type element_type_of<std::int8_t> = element_type::i8;
template <>
inline constexpr element_type element_type_of<std::int16_t> = element_type::i16;
template <>
inline constexpr element_type element_type_of<std::int32_t> = element_type::i32;
template <>
inline constexpr element_type element_type_of<std::int64_t> = element_type::i64;
template <>
inline constexpr element_type element_type_of<std::uint8_t> = element_type::u8;
template <>
inline constexpr element_type element_type_of<std::uint16_t> = element_type::u16;
template <>
inline constexpr element_type element_type_of<std::uint32_t> = element_type::u32;
template <>
inline constexpr element_type element_type_of<std::uint64_t> = element_type::u64;

/// A row-major tensor in host memory that it does not own.
struct safetensor {
    element_type type{};
    std::vector<int64_t> shape;      ///< empty for a scalar; extents may be 0
    const std::byte* data = nullptr; ///< not null unless an extent is 0

    /// The size of the data. The product cannot overflow where the shape is that of real memory, and the reader gives
    /// no other.
    int64_t bytes() const
    {
        int64_t n = bytes_of(type);
        for (int64_t extent : shape) n *= extent;
        return n;
    }
};

/// By name, so none can stand twice and the order is the same on every run.
using safetensor_map = std::map<std::string, safetensor, std::less<>>;
using metadata_map = std::map<std::string, std::string, std::less<>>;

/// What a file says: tensors that point into its bytes, and the strings of "__metadata__".
struct safetensors {
    safetensor_map tensors;
    metadata_map metadata;
};

/// A view of any rank as the writer takes it. The data is referenced, not copied.
template <class T, class Shape>
safetensor as_safetensor(::cuda::std::mdspan<T, Shape> v)
{
    static_assert(element_type_of<T> != element_type::count_, "safetensors has no name for this element type");
    safetensor out{element_type_of<T>, {}, reinterpret_cast<const std::byte*>(v.data_handle())};
    for (std::size_t i = 0; i < Shape::rank(); ++i) out.shape.push_back(v.extent(i));
    return out;
}

namespace detail {

/// A name from a file, fit for a message: short and without control characters.
inline std::string name_text(std::string_view s)
{
    std::string out = "'";
    for (char c : s.substr(0, 120)) out += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
    return out + (s.size() > 120 ? "...'" : "'");
}

/// The first extents of a shape, for a message.
inline std::string shape_text(const std::vector<int64_t>& shape)
{
    std::string out = "(";
    for (std::size_t i = 0; i < shape.size() && i < 8; ++i) out += (i ? "," : "") + std::to_string(shape[i]);
    return out + (shape.size() > 8 ? ",...)" : ")");
}

} // namespace detail
} // namespace io
} // namespace fastmoe::inline FASTMOE_ABI
