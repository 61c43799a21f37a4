// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A matrix seen through a list of row numbers: dispatch without a copy. Grouped GEMMs that gather read it directly.
#pragma once

#include <fastmoe/core/tensor.hpp>

namespace fastmoe::inline FASTMOE_ABI {

/// Row s is data row index(s); an index of -1 stands for a row of zeros.
template <class T>
struct indexed_rows {
    matrix_view<const T> data;        // (N,D)
    vector_view<const int32_t> index; // (S)

    FASTMOE_HOST_DEVICE constexpr int64_t extent(int dimension) const noexcept
    {
        return dimension == 0 ? index.extent(0) : data.extent(1);
    }

    /// The start of row s, or null for a row of zeros.
    FASTMOE_HOST_DEVICE constexpr const T* row(int64_t s) const noexcept
    {
        const int64_t i = index(s);
        return i < 0 ? nullptr : data.data_handle() + i * data.extent(1);
    }
};

/// The same interface over rows that lie in order.
template <class T>
struct plain_rows {
    matrix_view<const T> data; // (S,D)

    FASTMOE_HOST_DEVICE constexpr int64_t extent(int dimension) const noexcept { return data.extent(dimension); }
    FASTMOE_HOST_DEVICE constexpr const T* row(int64_t s) const noexcept
    {
        return data.data_handle() + s * data.extent(1);
    }
};

} // namespace fastmoe::inline FASTMOE_ABI
