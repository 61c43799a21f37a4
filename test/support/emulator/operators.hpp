// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// What instructions compute of numbers, as "PTX ISA" says it.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

namespace emulator {

template <class T>
constexpr bool real_type = std::is_floating_point_v<T>;
template <class T>
using whole = std::conditional_t<real_type<T>, T, std::make_unsigned_t<std::conditional_t<real_type<T>, int, T>>>;

struct plus_op {
    template <class T>
    T operator()(T a, T b) const
    {
        return static_cast<T>(static_cast<whole<T>>(a) + static_cast<whole<T>>(b));
    }
};
struct minus_op {
    template <class T>
    T operator()(T a, T b) const
    {
        return static_cast<T>(static_cast<whole<T>>(a) - static_cast<whole<T>>(b));
    }
};
struct times_op {
    template <class T>
    T operator()(T a, T b) const
    {
        if constexpr (real_type<T>)
            return a * b;
        else
            return static_cast<T>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
    }
};
template <class T>
using wider = std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                                 std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, std::int64_t, std::uint64_t>,
                                                    std::conditional_t<std::is_signed_v<T>, std::int32_t, std::uint32_t>>>;
struct high_op {
    template <class T>
    T operator()(T a, T b) const
    {
        return static_cast<T>((static_cast<wider<T>>(a) * static_cast<wider<T>>(b)) >> (8 * sizeof(T)));
    }
};
struct wide_op {
    template <class T>
    auto operator()(T a, T b) const
    {
        return static_cast<wider<T>>(static_cast<wider<T>>(a) * static_cast<wider<T>>(b));
    }
};
struct divide_op {
    template <class T>
    T operator()(T a, T b) const
    {
        if constexpr (real_type<T>)
            return a / b;
        else if (b == 0)
            return static_cast<T>(-1);
        else if (std::is_signed_v<T> && b == static_cast<T>(-1))
            return static_cast<T>(-static_cast<whole<T>>(a));
        else
            return static_cast<T>(a / b);
    }
};
/// Within two units of the last place; zero where 1/b is subnormal.
struct divide_approx_op {
    float operator()(float a, float b) const
    {
        const float size = std::fabs(b);
        if (size > 0x1p126f && size < std::numeric_limits<float>::infinity())
            return std::isinf(a) ? std::numeric_limits<float>::quiet_NaN() : std::copysign(0.0f, a * std::copysign(1.0f, b));
        return a / b;
    }
};
struct rest_op {
    template <class T>
    T operator()(T a, T b) const
    {
        if (b == 0) return a;
        if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
        return static_cast<T>(a % b);
    }
};
struct least_op {
    template <class T>
    T operator()(T a, T b) const
    {
        if constexpr (real_type<T>)
            return std::isnan(a) ? b : std::isnan(b) ? a : (a < b || (a == b && std::signbit(a))) ? a : b;
        else
            return a < b ? a : b;
    }
};
struct most_op {
    template <class T>
    T operator()(T a, T b) const
    {
        if constexpr (real_type<T>)
            return std::isnan(a) ? b : std::isnan(b) ? a : (a > b || (a == b && !std::signbit(a))) ? a : b;
        else
            return a > b ? a : b;
    }
};
struct and_op {
    template <class T>
    T operator()(T a, T b) const
    {
        return static_cast<T>(a & b);
    }
};
struct or_op {
    template <class T>
    T operator()(T a, T b) const
    {
        return static_cast<T>(a | b);
    }
};
struct xor_op {
    template <class T>
    T operator()(T a, T b) const
    {
        return static_cast<T>(a ^ b);
    }
};
struct not_op {
    template <class T>
    T operator()(T a) const
    {
        return static_cast<T>(~a);
    }
};
struct negate_op {
    template <class T>
    T operator()(T a) const
    {
        if constexpr (real_type<T>)
            return -a;
        else
            return static_cast<T>(-static_cast<whole<T>>(a));
    }
};
struct size_op {
    template <class T>
    T operator()(T a) const
    {
        if constexpr (real_type<T>)
            return std::fabs(a);
        else
            return a < 0 ? static_cast<T>(-static_cast<whole<T>>(a)) : a;
    }
};
struct left_op {
    template <class T>
    T operator()(T a, std::uint32_t b) const
    {
        return b >= 8 * sizeof(T) ? T{0} : static_cast<T>(static_cast<whole<T>>(a) << b);
    }
};
struct right_op {
    template <class T>
    T operator()(T a, std::uint32_t b) const
    {
        if (b >= 8 * sizeof(T)) return std::is_signed_v<T> && a < 0 ? static_cast<T>(-1) : T{0};
        return static_cast<T>(a >> b);
    }
};
struct count_op {
    template <class T>
    std::uint32_t operator()(T a) const
    {
        return static_cast<std::uint32_t>(std::popcount(a));
    }
};
struct zeros_op {
    template <class T>
    std::uint32_t operator()(T a) const
    {
        return static_cast<std::uint32_t>(std::countl_zero(a));
    }
};
struct reverse_op {
    template <class T>
    T operator()(T a) const
    {
        T out = 0;
        for (std::size_t n = 0; n < 8 * sizeof(T); ++n) out = static_cast<T>((out << 1) | ((a >> n) & 1));
        return out;
    }
};
struct fma_op {
    template <class T>
    T operator()(T a, T b, T c) const
    {
        return std::fma(a, b, c);
    }
};
struct mad_op {
    template <class T>
    T operator()(T a, T b, T c) const
    {
        return plus_op{}(times_op{}(a, b), c);
    }
};
struct mad_wide_op {
    template <class T>
    wider<T> operator()(T a, T b, wider<T> c) const
    {
        return plus_op{}(wide_op{}(a, b), c);
    }
};
struct exp2_op {
    float operator()(float a) const { return std::exp2(a); }
};
struct log2_op {
    float operator()(float a) const { return std::log2(a); }
};
struct reciprocal_op {
    template <class T>
    T operator()(T a) const
    {
        return T{1} / a;
    }
};
struct root_op {
    template <class T>
    T operator()(T a) const
    {
        return std::sqrt(a);
    }
};
struct reciprocal_root_op {
    template <class T>
    T operator()(T a) const
    {
        return T{1} / std::sqrt(a);
    }
};
struct sine_op {
    float operator()(float a) const { return std::sin(a); }
};
struct cosine_op {
    float operator()(float a) const { return std::cos(a); }
};
struct tanh_op {
    float operator()(float a) const { return std::tanh(a); }
};

} // namespace emulator
