// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Thrust's containers and pointers become views. Without nvcc its device is the CPU, so that this runs anywhere.
#if !defined(__CUDACC__)
#define THRUST_DEVICE_SYSTEM THRUST_DEVICE_SYSTEM_CPP
#endif

#include <cstdint>
#include <type_traits>

#include <thrust/device_ptr.h>
#include <thrust/device_vector.h>
#include <thrust/host_vector.h>

#include <doctest/doctest.h>

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/core/tensor.hpp>

namespace fm = fastmoe;

TEST_CASE("a thrust::host_vector is seen as a vector and as a matrix, without a copy")
{
    thrust::host_vector<float> v(6, 1.0f);
    const auto m = fm::as_matrix(v, 2, 3);
    static_assert(std::is_same_v<decltype(m), const fm::matrix_view<float>>);
    m(1, 2) = 4;
    CHECK(v[5] == 4);
    const thrust::host_vector<float>& constant = v;
    static_assert(std::is_same_v<decltype(fm::as_vector(constant)), fm::vector_view<const float>>);
    CHECK(fm::as_vector(constant)(5) == 4);
    CHECK_THROWS_AS(fm::as_matrix(v, 2, 2), fm::invalid_argument);
}

TEST_CASE("a thrust::device_vector and a thrust::device_ptr give views of device memory")
{
    thrust::device_vector<fm::bfloat16> v(6);
    const auto m = fm::as_matrix(v, 3, 2);
    static_assert(std::is_same_v<decltype(m), const fm::matrix_view<fm::bfloat16>>);
    CHECK(m.data_handle() == thrust::raw_pointer_cast(v.data()));
    CHECK(m.extent(0) == 3);
    const thrust::device_ptr<fm::bfloat16> p = v.data() + 2;
    const fm::vector_view<fm::bfloat16> tail(fm::raw_pointer(p), 4);
    CHECK(tail.data_handle() == m.data_handle() + 2);
    const thrust::device_vector<fm::bfloat16>& constant = v;
    static_assert(std::is_same_v<decltype(fm::as_vector(constant)), fm::vector_view<const fm::bfloat16>>);
    CHECK(fm::as_vector(constant).extent(0) == 6);
}
