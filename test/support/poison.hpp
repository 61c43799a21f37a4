// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Poisoned outputs and guarded memory: what a verb does not write stays visible, what it writes beside its output too.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include <fastmoe/core/tensor.hpp>

#include "random.hpp"

namespace support {

/// All bits set: NaN in every floating type, -1 in every signed integer.
inline constexpr unsigned char poison_byte = 0xff;

template <class T, class Shape>
void poison(::cuda::std::mdspan<T, Shape> v)
{
    if (size_of(v) > 0) std::memset(static_cast<void*>(v.data_handle()), poison_byte, sizeof(T) * size_of(v));
}

template <class T>
bool is_poison(const T& value)
{
    unsigned char bytes[sizeof(T)];
    std::memcpy(bytes, &value, sizeof(T));
    for (unsigned char b : bytes)
        if (b != poison_byte) return false;
    return true;
}

/// The number in T; poison for NaN, which then counts as such.
template <class T>
T narrow_or_poison(double v)
{
    T out = narrow<T>(v);
    if (v != v) std::memset(static_cast<void*>(&out), poison_byte, sizeof(T));
    return out;
}
template <class T>
std::vector<T> narrowed_or_poison(const std::vector<double>& values)
{
    std::vector<T> out;
    for (const double v : values) out.push_back(narrow_or_poison<T>(v));
    return out;
}

/// How many elements still are poison.
template <class T, class Shape>
int64_t poisoned(::cuda::std::mdspan<T, Shape> v)
{
    int64_t n = 0;
    for (int64_t i = 0; i < size_of(v); ++i) n += is_poison(v.data_handle()[i]);
    return n;
}

/// A poisoned matrix between guard rows. Memory is 256-byte aligned, plus `skew` elements: a skew of 1 gives a pointer
/// with no more than the alignment of T, which every verb has to accept.
///
///     guarded<float> y(tokens, width);   verb(ex, x, y.view());   CHECK(y.damage() == "");
template <class T>
class guarded {
public:
    guarded(int64_t rows, int64_t cols, int64_t skew = 0) : rows_(rows), cols_(cols)
    {
        const int64_t align = 256, element = sizeof(T);
        guard_ = (cols * element + align) / align * align;
        bytes_.assign(static_cast<std::size_t>(2 * guard_ + rows * cols * element + skew * element + align),
                      poison_byte);
        const auto base = reinterpret_cast<std::uintptr_t>(bytes_.data());
        first_ = static_cast<int64_t>((base + align - 1) / align * align - base) + guard_ + skew * element;
    }
    explicit guarded(int64_t count) : guarded(1, count) {}

    T* data() { return reinterpret_cast<T*>(bytes_.data() + first_); }
    fastmoe::matrix_view<T> view() { return fastmoe::matrix_view<T>(data(), rows_, cols_); }
    fastmoe::vector_view<T> vector() { return fastmoe::vector_view<T>(data(), rows_ * cols_); }

    /// Empty if nothing outside of the matrix was written, else which byte was.
    std::string damage() const
    {
        const int64_t last = first_ + rows_ * cols_ * static_cast<int64_t>(sizeof(T));
        for (int64_t i = 0; i < static_cast<int64_t>(bytes_.size()); ++i)
            if ((i < first_ || i >= last) && bytes_[i] != poison_byte)
                return i < first_ ? "written " + std::to_string(first_ - i) + " bytes before the first element"
                                  : "written " + std::to_string(i - last) + " bytes after the last element";
        return "";
    }

private:
    int64_t rows_, cols_, guard_ = 0, first_ = 0;
    std::vector<unsigned char> bytes_;
};

} // namespace support
