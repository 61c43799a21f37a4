// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A parameter as what happens between backward and the optimizer's step sees it: values, gradient, and which ranks hold
/// the same one. Lists of them may mix element types, so the type is a value here.
#pragma once

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/core/tensor.hpp>
#include <fastmoe/gemm/grouped_gemm.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Which ranks hold the same parameter.
enum class parameter_tag : std::uint8_t {
    world, ///< all: the gate, the dense part
    data,  ///< those of the data-parallel group of an expert-parallel coordinate: an expert that has replicas
    none,  ///< this one alone: an expert, or a slice of one, without replicas
};

/// The scalars as values.
enum class scalar_type : std::uint8_t { float64, float32, bfloat16, float16, count_ };

template <scalar T>
inline constexpr scalar_type scalar_type_of = scalar_type::count_;
template <>
inline constexpr scalar_type scalar_type_of<double> = scalar_type::float64;
template <>
inline constexpr scalar_type scalar_type_of<float> = scalar_type::float32;
template <>
inline constexpr scalar_type scalar_type_of<bfloat16> = scalar_type::bfloat16;
template <>
inline constexpr scalar_type scalar_type_of<half> = scalar_type::float16;

/// f(T{}) for the type that the value names.
/// @param type  not count_
template <class F>
void with_scalar_type(scalar_type type, const F& f)
{
    switch (type) {
    case scalar_type::float64: return f(double{});
    case scalar_type::float32: return f(float{});
    case scalar_type::bfloat16: return f(bfloat16{});
    default: return f(half{});
    }
}

/// A parameter and its gradient, both of memory that the executor reaches; made by as_parameter().
struct parameter_view {
    parameter_tag tag;
    scalar_type value_type, gradient_type;
    int64_t count;  ///< N
    void* values;   // (N)
    void* gradient; // (N)
};

/// Values and gradient of any rank, whose extents are the same.
/// @param gradient  of the type of the values or a wider one; each gradient stands in a list once
/// @throws invalid_argument if the extents differ
///
///     const parameter_view all[] = {as_parameter(w.gate, g.gate, parameter_tag::world),
///                                   as_parameter(w.expert.up, g.expert.up, parameter_tag::data)};
template <class T, class G, class Shape>
parameter_view as_parameter(::cuda::std::mdspan<T, Shape> values, ::cuda::std::mdspan<G, Shape> gradient,
                            parameter_tag tag)
{
    static_assert(scalar<T> && scalar<G>, "values and gradients are double, float, bfloat16 or half");
    static_assert(std::is_same_v<T, G> || sizeof(G) > sizeof(T), "a gradient has the type of its parameter or a wider one");
    int64_t count = 1;
    bool same = true;
    for (std::size_t i = 0; i < Shape::rank(); ++i) {
        count *= values.extent(i);
        same = same && values.extent(i) == gradient.extent(i);
    }
    if (!same) expects(false, "gradient", detail::shape_text(gradient, "of shape "), detail::shape_text(values), ", as values");
    return {tag, scalar_type_of<T>, scalar_type_of<G>, count, values.data_handle(), gradient.data_handle()};
}

/// Matrices of experts as they lie in memory: (E,out,in), or (E,in,out) if they are transposed.
/// @throws invalid_argument if they are held apart or leave gaps; take them one by one then
template <class T>
tensor_view<T, 3> packed(const weight_view<T>& w, const char* name = "weights")
{
    const bool plain = w.row_stride == w.in && w.col_stride == 1, transposed = w.row_stride == 1 && w.col_stride == w.out;
    expects(!w.pointers && (plain || transposed) && (w.experts <= 1 || w.expert_stride == w.out * w.in), name,
            "matrices held apart or with gaps", "one behind the other");
    return plain ? tensor_view<T, 3>(w.data, w.experts, w.out, w.in) : tensor_view<T, 3>(w.data, w.experts, w.in, w.out);
}

/// The weights of a rank's experts.
/// @throws invalid_argument if shapes or layouts differ, and as packed()
template <class T, class G>
parameter_view as_parameter(const weight_view<T>& values, const weight_view<G>& gradient, parameter_tag tag)
{
    expects(gradient.row_stride == values.row_stride && gradient.col_stride == values.col_stride, "gradient",
            "in another layout", "that of the values");
    return as_parameter(packed(values, "values"), packed(gradient, "gradient"), tag);
}

namespace detail {

/// The memory that a verb looks at.
enum class parameter_side : std::uint8_t { values, gradient };

inline scalar_type type_of(const parameter_view& p, parameter_side side) noexcept
{
    return side == parameter_side::values ? p.value_type : p.gradient_type;
}

template <class T>
vector_view<T> elements_of(const parameter_view& p, parameter_side side) noexcept
{
    return vector_view<T>(static_cast<T*>(side == parameter_side::values ? p.values : p.gradient), p.count);
}

/// Throws invalid_argument unless every entry names tags and types that there are, and has memory.
inline void expects_parameters(vector_view<const parameter_view> parameters, parameter_side side)
{
    expects_shape(parameters, "parameters", parameters.extent(0));
    for (int64_t i = 0; i < parameters.extent(0); ++i) {
        const parameter_view& p = parameters(i);
        const auto tag = static_cast<int>(p.tag), type = static_cast<int>(type_of(p, side));
        expects(tag <= static_cast<int>(parameter_tag::none), "a parameter's tag", tag, "world, data or none");
        expects(type < static_cast<int>(scalar_type::count_), "a parameter's type", type, "one of scalar_type");
        expects(p.count >= 0, "a parameter's count", p.count, "zero or more");
        with_scalar_type(type_of(p, side), [&](auto zero) {
            const char* name = side == parameter_side::values ? "a parameter's values (N)" : "a parameter's gradient (N)";
            expects_shape(elements_of<decltype(zero)>(p, side), name, p.count);
        });
    }
}

} // namespace detail

} // namespace fastmoe::inline FASTMOE_ABI
