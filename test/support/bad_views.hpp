// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What can be wrong with a view, one thing at a time: each extent one less and one more, no memory, memory between two
/// elements. A verb must refuse every one of them by name.
#pragma once

#include <string>
#include <vector>

#include <fastmoe/gemm/grouped_gemm.hpp>

namespace support {

template <class View>
struct bad_view {
    std::string what;
    View view;
};

/// A pointer that is not aligned for T.
template <class T>
T* skewed(T* p)
{
    static_assert(alignof(T) > 1);
    using byte = std::conditional_t<std::is_const_v<T>, const char, char>;
    return reinterpret_cast<T*>(reinterpret_cast<byte*>(p) + 1);
}

enum class memory_is { needed, optional };

template <class T>
std::vector<bad_view<fastmoe::vector_view<T>>> bad_views(fastmoe::vector_view<T> v, memory_is memory = memory_is::needed)
{
    using view = fastmoe::vector_view<T>;
    std::vector<bad_view<view>> out{{"shorter", view(v.data_handle(), v.extent(0) - 1)},
                                    {"longer", view(v.data_handle(), v.extent(0) + 1)},
                                    {"misaligned", view(skewed(v.data_handle()), v.extent(0))}};
    if (memory == memory_is::needed) out.push_back({"null", view(nullptr, v.extent(0))});
    return out;
}

template <class T>
std::vector<bad_view<fastmoe::matrix_view<T>>> bad_views(fastmoe::matrix_view<T> m, memory_is memory = memory_is::needed)
{
    using view = fastmoe::matrix_view<T>;
    auto* p = m.data_handle();
    const auto rows = m.extent(0), columns = m.extent(1);
    std::vector<bad_view<view>> out{{"fewer rows", view(p, rows - 1, columns)},    {"more rows", view(p, rows + 1, columns)},
                                    {"fewer columns", view(p, rows, columns - 1)}, {"more columns", view(p, rows, columns + 1)},
                                    {"misaligned", view(skewed(p), rows, columns)}};
    if (memory == memory_is::needed) out.push_back({"null", view(nullptr, rows, columns)});
    return out;
}

template <class T>
std::vector<bad_view<fastmoe::weight_view<T>>> bad_views(const fastmoe::weight_view<T>& w)
{
    std::vector<bad_view<fastmoe::weight_view<T>>> out;
    const auto add = [&](const char* what, auto change) {
        out.push_back({what, w});
        change(out.back().view);
    };
    add("fewer experts", [](auto& v) { --v.experts; });
    add("more experts", [](auto& v) { ++v.experts; });
    add("fewer rows", [](auto& v) { --v.out; });
    add("more rows", [](auto& v) { ++v.out; });
    add("fewer columns", [](auto& v) { --v.in; });
    add("more columns", [](auto& v) { ++v.in; });
    add("no stride of 1", [](auto& v) { v.row_stride = 2, v.col_stride = 2; });
    add("misaligned", [](auto& v) { v.data = skewed(v.data); });
    add("null", [](auto& v) { v.data = nullptr; });
    return out;
}

} // namespace support
