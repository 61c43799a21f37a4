// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Random shapes and data for tests: a counter-based generator whose numbers depend on the seed alone, the same with
/// every compiler and library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <type_traits>
#include <utility>
#include <vector>

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/core/tensor.hpp>

/// Declares a generator and prints its seed if an assertion of this scope fails. FASTMOE_TEST_SEED in the environment
/// replaces the seed, to look for failures that the fixed one does not meet. Include doctest first.
#define FASTMOE_SEEDED(name, value)                                                                                   \
    ::support::random name{::support::seed_or(value)};                                                                \
    INFO("seed ", name.seed())

namespace support {

using std::int64_t;

inline std::uint64_t seed_or(std::uint64_t fixed)
{
    const char* text = std::getenv("FASTMOE_TEST_SEED");
    return text ? std::strtoull(text, nullptr, 10) : fixed;
}

/// splitmix64 (Steele, Lea and Flood 2014). Write it support::random: the C library owns the plain name.
class random {
public:
    explicit random(std::uint64_t seed) : seed_(seed), state_(seed) {}

    std::uint64_t seed() const { return seed_; }

    std::uint64_t bits()
    {
        std::uint64_t z = (state_ += 0x9e3779b97f4a7c15u);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
        return z ^ (z >> 31);
    }
    /// An integer in [low, high].
    int64_t integer(int64_t low, int64_t high)
    {
        return low + static_cast<int64_t>(bits() % static_cast<std::uint64_t>(high - low + 1));
    }
    /// A real in [low, high).
    double uniform(double low = 0, double high = 1)
    {
        return low + (high - low) * (static_cast<double>(bits() >> 11) * 0x1p-53);
    }
    /// Mean 0, the given deviation.
    double normal(double deviation = 1)
    {
        const double radius = std::sqrt(-2 * std::log(1 - uniform()));
        return deviation * radius * std::cos(2 * std::acos(-1.0) * uniform());
    }
    bool coin(double chance = 0.5) { return uniform() < chance; }
    template <class Choice, class... Choices>
    Choice one_of(Choice first, Choices... rest)
    {
        const Choice all[] = {first, rest...};
        return all[integer(0, static_cast<int64_t>(sizeof...(rest)))];
    }

    std::vector<double> normals(int64_t count, double deviation = 1)
    {
        std::vector<double> out(static_cast<std::size_t>(count));
        for (double& v : out) v = normal(deviation);
        return out;
    }
    /// 0, ..., count-1 in random order.
    std::vector<int> permutation(int64_t count)
    {
        std::vector<int> out(static_cast<std::size_t>(count));
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int>(i);
        for (int64_t i = count - 1; i > 0; --i) std::swap(out[i], out[integer(0, i)]);
        return out;
    }

private:
    std::uint64_t seed_, state_;
};

/// To T, rounded once: what a test gives to the library. double to bfloat16 and half goes through float, so take the
/// oracle's input from what was stored (see widened), never from the number before.
template <class T>
T narrow(double v)
{
    if constexpr (fastmoe::scalar<T> && !std::is_floating_point_v<T>) return T(static_cast<float>(v));
    else return static_cast<T>(v);
}

template <class T, class Shape>
int64_t size_of(::cuda::std::mdspan<T, Shape> v)
{
    int64_t n = 1;
    for (std::size_t i = 0; i < Shape::rank(); ++i) n *= v.extent(i);
    return n;
}

template <class T>
std::vector<T> narrowed(const std::vector<double>& values)
{
    std::vector<T> out;
    out.reserve(values.size());
    for (double v : values) out.push_back(narrow<T>(v));
    return out;
}

/// The exact values of stored elements, for the oracle.
template <class T>
std::vector<double> widened(const std::vector<T>& values)
{
    return std::vector<double>(values.begin(), values.end());
}
template <class T, class Shape>
std::vector<double> widened(::cuda::std::mdspan<T, Shape> v)
{
    return std::vector<double>(v.data_handle(), v.data_handle() + size_of(v));
}

/// Writes random numbers into a view and returns what it then holds, exactly, for the oracle.
template <class T, class Shape>
std::vector<double> fill_normal(random& r, ::cuda::std::mdspan<T, Shape> v, double deviation = 1)
{
    for (int64_t i = 0; i < size_of(v); ++i) v.data_handle()[i] = narrow<T>(r.normal(deviation));
    return widened(v);
}
template <class T, class Shape>
std::vector<double> fill_uniform(random& r, ::cuda::std::mdspan<T, Shape> v, double low, double high)
{
    for (int64_t i = 0; i < size_of(v); ++i) v.data_handle()[i] = narrow<T>(r.uniform(low, high));
    return widened(v);
}
/// Writes given values, rounded to T, and returns what it then holds.
template <class T, class Shape>
std::vector<double> fill(::cuda::std::mdspan<T, Shape> v, const std::vector<double>& values)
{
    for (int64_t i = 0; i < size_of(v); ++i) v.data_handle()[i] = narrow<T>(values.at(static_cast<std::size_t>(i)));
    return widened(v);
}

/// As many random numbers as asked for, in T.
template <class T>
std::vector<T> normal_vector(random& r, int64_t count, double deviation = 1)
{
    return narrowed<T>(r.normals(count, deviation));
}

} // namespace support
