// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Instructions of one thread each, and those of a warp that need no more than registers.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>

#include "support/emulator/device.hpp"
#include "support/emulator/numbers.hpp"

namespace emulator {

namespace {

template <int bytes>
using word = std::conditional_t<bytes == 1, std::uint8_t, std::conditional_t<bytes == 2, std::uint16_t, std::conditional_t<bytes == 4, std::uint32_t, std::uint64_t>>>;
template <class T>
using line_of = std::conditional_t<sizeof(T) == 8, std::uint64_t, std::uint32_t>; ///< what a register holds of it

template <class T, class W>
T value(W w)
{
    return std::bit_cast<T>(static_cast<word<sizeof(T)>>(w));
}
template <class T>
line_of<T> bits(T v)
{
    return static_cast<line_of<T>>(std::bit_cast<word<sizeof(T)>>(v));
}

template <class F>
void each(std::uint32_t lanes, F&& f)
{
    if (lanes == ~0u) {
#pragma GCC ivdep
        for (int l = 0; l < 32; ++l) f(l);
    } else {
        for (std::uint32_t left = lanes; left; left &= left - 1) f(std::countr_zero(left));
    }
}

// -- arithmetic ------------------------------------------------------------------------------------------------------

template <class R, class A, class Op>
void unary(warp& w, const instruction& i, std::uint32_t lanes)
{
    auto* d = w.at<line_of<R>>(i.d);
    const auto* a = w.at<line_of<A>>(i.a);
    each(lanes, [&](int l) { d[l] = bits<R>(Op{}(value<A>(a[l]))); });
}
/// variant 1: the register is of 8 bytes, and A of its lower ones, as cvt may have it.
template <class R, class A, class Op>
void converted(warp& w, const instruction& i, std::uint32_t lanes)
{
    auto* d = w.at<line_of<R>>(i.d);
    const auto* a = w.at<line_of<A>>(i.a);
    if (i.variant == 0) each(lanes, [&](int l) { d[l] = bits<R>(Op{}(value<A>(a[l]))); });
    else each(lanes, [&](int l) { d[l] = bits<R>(Op{}(value<A>(a[2 * l]))); });
}
template <class R, class A, class B, class Op>
void binary(warp& w, const instruction& i, std::uint32_t lanes)
{
    auto* d = w.at<line_of<R>>(i.d);
    const auto* a = w.at<line_of<A>>(i.a);
    const auto* b = w.at<line_of<B>>(i.b);
    each(lanes, [&](int l) { d[l] = bits<R>(Op{}(value<A>(a[l]), value<B>(b[l]))); });
}
template <class R, class A, class C, class Op>
void ternary(warp& w, const instruction& i, std::uint32_t lanes)
{
    auto* d = w.at<line_of<R>>(i.d);
    const auto* a = w.at<line_of<A>>(i.a);
    const auto* b = w.at<line_of<A>>(i.b);
    const auto* c = w.at<line_of<C>>(i.c);
    each(lanes, [&](int l) { d[l] = bits<R>(Op{}(value<A>(a[l]), value<A>(b[l]), value<C>(c[l]))); });
}
template <class T, class Op>
void compare(warp& w, const instruction& i, std::uint32_t lanes)
{
    const auto* a = w.at<line_of<T>>(i.a);
    const auto* b = w.at<line_of<T>>(i.b);
    std::uint32_t is = 0;
    for (int l = 0; l < 32; ++l) is |= static_cast<std::uint32_t>(Op{}(value<T>(a[l]), value<T>(b[l]))) << l;
    std::uint32_t other = ~is;
    if (i.c != no_slot) { // setp.lt.and p, a, b, c
        const std::uint32_t c = w.predicate(i.c);
        is = i.variant == 1 ? is & c : i.variant == 2 ? is | c : is ^ c;
        other = i.variant == 1 ? other & c : i.variant == 2 ? other | c : other ^ c;
    }
    auto& d = w.predicate(i.d);
    if (i.e != no_slot) {
        auto& e = w.predicate(i.e);
        e = (e & ~lanes) | (other & lanes);
    }
    d = (d & ~lanes) | (is & lanes);
}

template <class T>
constexpr bool real_type = std::is_floating_point_v<T>;
template <class T>
using whole = std::conditional_t<real_type<T>, T, std::make_unsigned_t<std::conditional_t<real_type<T>, int, T>>>;

struct plus_op {
    template <class T> T operator()(T a, T b) const { return static_cast<T>(static_cast<whole<T>>(a) + static_cast<whole<T>>(b)); }
};
struct minus_op {
    template <class T> T operator()(T a, T b) const { return static_cast<T>(static_cast<whole<T>>(a) - static_cast<whole<T>>(b)); }
};
struct times_op {
    template <class T> T operator()(T a, T b) const
    {
        if constexpr (real_type<T>) return a * b;
        else return static_cast<T>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
    }
};
template <class T>
using wider = std::conditional_t<sizeof(T) == 8, std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>,
                                 std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, std::int64_t, std::uint64_t>,
                                                    std::conditional_t<std::is_signed_v<T>, std::int32_t, std::uint32_t>>>;
struct high_op {
    template <class T> T operator()(T a, T b) const { return static_cast<T>((static_cast<wider<T>>(a) * static_cast<wider<T>>(b)) >> (8 * sizeof(T))); }
};
struct wide_op {
    template <class T> auto operator()(T a, T b) const { return static_cast<wider<T>>(static_cast<wider<T>>(a) * static_cast<wider<T>>(b)); }
};
struct divide_op {
    template <class T> T operator()(T a, T b) const
    {
        if constexpr (real_type<T>) return a / b;
        else if (b == 0) return static_cast<T>(-1);
        else if (std::is_signed_v<T> && b == static_cast<T>(-1)) return static_cast<T>(-static_cast<whole<T>>(a));
        else return static_cast<T>(a / b);
    }
};
/// Within two units of the last place; zero where 1/b is subnormal.
struct divide_approx_op {
    float operator()(float a, float b) const
    {
        const float size = std::fabs(b);
        if (size > 0x1p126f && size < std::numeric_limits<float>::infinity()) return std::isinf(a) ? std::numeric_limits<float>::quiet_NaN() : std::copysign(0.0f, a * std::copysign(1.0f, b));
        return a / b;
    }
};
struct rest_op {
    template <class T> T operator()(T a, T b) const
    {
        if (b == 0) return a;
        if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
        return static_cast<T>(a % b);
    }
};
struct least_op {
    template <class T> T operator()(T a, T b) const
    {
        if constexpr (real_type<T>) return std::isnan(a) ? b : std::isnan(b) ? a : (a < b || (a == b && std::signbit(a))) ? a : b;
        else return a < b ? a : b;
    }
};
struct most_op {
    template <class T> T operator()(T a, T b) const
    {
        if constexpr (real_type<T>) return std::isnan(a) ? b : std::isnan(b) ? a : (a > b || (a == b && !std::signbit(a))) ? a : b;
        else return a > b ? a : b;
    }
};
struct and_op { template <class T> T operator()(T a, T b) const { return static_cast<T>(a & b); } };
struct or_op { template <class T> T operator()(T a, T b) const { return static_cast<T>(a | b); } };
struct xor_op { template <class T> T operator()(T a, T b) const { return static_cast<T>(a ^ b); } };
struct not_op { template <class T> T operator()(T a) const { return static_cast<T>(~a); } };
struct negate_op {
    template <class T> T operator()(T a) const
    {
        if constexpr (real_type<T>) return -a;
        else return static_cast<T>(-static_cast<whole<T>>(a));
    }
};
struct size_op {
    template <class T> T operator()(T a) const
    {
        if constexpr (real_type<T>) return std::fabs(a);
        else return a < 0 ? static_cast<T>(-static_cast<whole<T>>(a)) : a;
    }
};
struct left_op { template <class T> T operator()(T a, std::uint32_t b) const { return b >= 8 * sizeof(T) ? T{0} : static_cast<T>(static_cast<whole<T>>(a) << b); } };
struct right_op {
    template <class T> T operator()(T a, std::uint32_t b) const
    {
        if (b >= 8 * sizeof(T)) return std::is_signed_v<T> && a < 0 ? static_cast<T>(-1) : T{0};
        return static_cast<T>(a >> b);
    }
};
struct count_op { template <class T> std::uint32_t operator()(T a) const { return static_cast<std::uint32_t>(std::popcount(a)); } };
struct zeros_op { template <class T> std::uint32_t operator()(T a) const { return static_cast<std::uint32_t>(std::countl_zero(a)); } };
struct reverse_op {
    template <class T> T operator()(T a) const
    {
        T out = 0;
        for (std::size_t n = 0; n < 8 * sizeof(T); ++n) out = static_cast<T>((out << 1) | ((a >> n) & 1));
        return out;
    }
};
struct fma_op { template <class T> T operator()(T a, T b, T c) const { return std::fma(a, b, c); } };
struct mad_op { template <class T> T operator()(T a, T b, T c) const { return plus_op{}(times_op{}(a, b), c); } };
struct mad_wide_op { template <class T> wider<T> operator()(T a, T b, wider<T> c) const { return plus_op{}(wide_op{}(a, b), c); } };
struct exp2_op { float operator()(float a) const { return std::exp2(a); } };
struct log2_op { float operator()(float a) const { return std::log2(a); } };
struct reciprocal_op { template <class T> T operator()(T a) const { return T{1} / a; } };
struct root_op { template <class T> T operator()(T a) const { return std::sqrt(a); } };
struct reciprocal_root_op { template <class T> T operator()(T a) const { return T{1} / std::sqrt(a); } };
struct sine_op { float operator()(float a) const { return std::sin(a); } };
struct cosine_op { float operator()(float a) const { return std::cos(a); } };
struct tanh_op { float operator()(float a) const { return std::tanh(a); } };

inline float flushed(float a) { return std::fpclassify(a) == FP_SUBNORMAL ? std::copysign(0.0f, a) : a; }
/// .ftz: subnormal operands and results count as zero.
template <class Op>
struct flushing {
    template <class... A> auto operator()(A... a) const
    {
        if constexpr (std::is_same_v<decltype(Op{}(flushed(static_cast<float>(a))...)), float>) return flushed(Op{}(flushed(a)...));
        else return Op{}(flushed(a)...);
    }
};
template <class Op>
struct saturating {
    template <class... A> auto operator()(A... a) const
    {
        const auto v = Op{}(a...);
        return v >= 1 ? decltype(v)(1) : v > 0 ? v : decltype(v)(0); // NaN is zero
    }
};

struct eq_op { template <class T> bool operator()(T a, T b) const { return a == b; } };
struct ne_op { template <class T> bool operator()(T a, T b) const { if constexpr (real_type<T>) return a < b || a > b; else return a != b; } };
struct lt_op { template <class T> bool operator()(T a, T b) const { return a < b; } };
struct le_op { template <class T> bool operator()(T a, T b) const { return a <= b; } };
struct gt_op { template <class T> bool operator()(T a, T b) const { return a > b; } };
struct ge_op { template <class T> bool operator()(T a, T b) const { return a >= b; } };
template <class Op>
struct or_nan { template <class T> bool operator()(T a, T b) const { return a != a || b != b || Op{}(a, b); } };
struct nan_op { template <class T> bool operator()(T a, T b) const { return a != a || b != b; } };
struct num_op { template <class T> bool operator()(T a, T b) const { return a == a && b == b; } };

// -- moves -----------------------------------------------------------------------------------------------------------

template <class W>
void move_line(warp& w, const instruction& i, std::uint32_t lanes)
{
    auto* d = w.at<W>(i.d);
    const auto* a = w.at<W>(i.a);
    each(lanes, [&](int l) { d[l] = a[l]; });
}
void move_predicate(warp& w, const instruction& i, std::uint32_t lanes)
{
    auto& d = w.predicate(i.d);
    d = (d & ~lanes) | (w.predicate(i.a) & lanes);
}
void set_predicate(warp& w, const instruction& i, std::uint32_t lanes) // variant: the number
{
    auto& d = w.predicate(i.d);
    d = i.variant ? d | lanes : d & ~lanes;
}
/// Of `count` parts of `variant` bits, the lowest first.
template <class W, class P>
void pack(warp& w, const instruction& i, std::uint32_t lanes)
{
    auto* d = w.at<W>(i.d);
    each(lanes, [&](int l) {
        std::uint64_t v = 0;
        for (std::size_t n = i.list.size(); n-- > 0;) v = (v << i.variant) | (static_cast<std::uint64_t>(w.at<P>(i.list[n])[l]) & ((1ull << i.variant) - 1));
        d[l] = static_cast<W>(v);
    });
}
template <class W, class P>
void unpack(warp& w, const instruction& i, std::uint32_t lanes)
{
    const auto* a = w.at<W>(i.a);
    each(lanes, [&](int l) {
        const std::uint64_t v = a[l];
        for (std::size_t n = 0; n < i.list.size(); ++n)
            if (i.list[n] != no_slot) w.at<P>(i.list[n])[l] = static_cast<P>((v >> (static_cast<std::size_t>(i.variant) * n)) & ((1ull << i.variant) - 1));
    });
}
template <class W>
void select(warp& w, const instruction& i, std::uint32_t lanes)
{
    auto* d = w.at<W>(i.d);
    const auto* a = w.at<W>(i.a);
    const auto* b = w.at<W>(i.b);
    const std::uint32_t p = w.predicate(i.c);
    each(lanes, [&](int l) { d[l] = p >> l & 1 ? a[l] : b[l]; });
}
template <class Op>
void logic(warp& w, const instruction& i, std::uint32_t lanes)
{
    auto& d = w.predicate(i.d);
    d = (d & ~lanes) | (Op{}(w.predicate(i.a), w.predicate(i.b)) & lanes);
}
void negate_predicate(warp& w, const instruction& i, std::uint32_t lanes)
{
    auto& d = w.predicate(i.d);
    d = (d & ~lanes) | (~w.predicate(i.a) & lanes);
}
template <class W>
void insert_bits(warp& w, const instruction& i, std::uint32_t lanes) // bfi d, a, b, c, m: into b, from bit c, m of them
{
    auto* d = w.at<W>(i.d);
    const auto *a = w.at<W>(i.a), *b = w.at<W>(i.b);
    const auto *from = w.at<std::uint32_t>(i.c), *count = w.at<std::uint32_t>(i.m);
    each(lanes, [&](int l) {
        const std::uint32_t at = from[l] & 255, n = count[l] & 255;
        W v = b[l];
        for (std::uint32_t k = 0; k < n && at + k < 8 * sizeof(W); ++k) v = (v & ~(W{1} << (at + k))) | ((a[l] >> k & 1) << (at + k));
        d[l] = v;
    });
}
template <class T>
void extract_bits(warp& w, const instruction& i, std::uint32_t lanes) // bfe d, a, b, c
{
    using W = line_of<T>;
    auto* d = w.at<W>(i.d);
    const auto* a = w.at<W>(i.a);
    const auto *from = w.at<std::uint32_t>(i.b), *count = w.at<std::uint32_t>(i.c);
    each(lanes, [&](int l) {
        const std::uint32_t size = 8 * sizeof(T), at = from[l] & 255, n = count[l] & 255;
        const bool sign = std::is_signed_v<T> && n > 0 && (a[l] >> std::min(at + n - 1, size - 1) & 1);
        W v = sign ? ~W{0} : W{0};
        for (std::uint32_t k = 0; k < n && k < size; ++k) {
            const W bit = at + k < size ? (a[l] >> (at + k) & 1) : W{sign};
            v = (v & ~(W{1} << k)) | (bit << k);
        }
        d[l] = v;
    });
}
void permute(warp& w, const instruction& i, std::uint32_t lanes) // prmt d, a, b, c
{
    auto* d = w.at<std::uint32_t>(i.d);
    const auto *a = w.at<std::uint32_t>(i.a), *b = w.at<std::uint32_t>(i.b), *c = w.at<std::uint32_t>(i.c);
    each(lanes, [&](int l) {
        const std::uint64_t all = static_cast<std::uint64_t>(b[l]) << 32 | a[l];
        std::uint32_t v = 0;
        for (int n = 0; n < 4; ++n) {
            const std::uint32_t which = c[l] >> (4 * n) & 15;
            std::uint32_t byte = static_cast<std::uint32_t>(all >> (8 * (which & 7)) & 255);
            if (which & 8) byte = byte & 128 ? 255 : 0;
            v |= byte << (8 * n);
        }
        d[l] = v;
    });
}
void shift_pair(warp& w, const instruction& i, std::uint32_t lanes) // shf.{l,r}.{wrap,clamp} d, a, b, c
{
    auto* d = w.at<std::uint32_t>(i.d);
    const auto *a = w.at<std::uint32_t>(i.a), *b = w.at<std::uint32_t>(i.b), *c = w.at<std::uint32_t>(i.c);
    each(lanes, [&](int l) {
        const std::uint32_t n = i.variant & 2 ? c[l] & 31 : std::min(c[l], 32u);
        const std::uint64_t all = static_cast<std::uint64_t>(b[l]) << 32 | a[l];
        d[l] = i.variant & 1 ? static_cast<std::uint32_t>((all << n) >> 32) : static_cast<std::uint32_t>(all >> n);
    });
}
void any_logic(warp& w, const instruction& i, std::uint32_t lanes) // lop3
{
    auto* d = w.at<std::uint32_t>(i.d);
    const auto *a = w.at<std::uint32_t>(i.a), *b = w.at<std::uint32_t>(i.b), *c = w.at<std::uint32_t>(i.c);
    each(lanes, [&](int l) {
        std::uint32_t v = 0;
        for (int n = 0; n < 32; ++n) v |= (static_cast<std::uint32_t>(i.variant) >> ((a[l] >> n & 1) * 4 + (b[l] >> n & 1) * 2 + (c[l] >> n & 1)) & 1) << n;
        d[l] = v;
    });
}

// -- conversions -----------------------------------------------------------------------------------------------------

enum rounding { to_nearest, to_zero, down, up };

/// To a whole number: variant's rounding, clamped.
template <class R, class A, int how>
struct to_whole {
    R operator()(A a) const
    {
        if (a != a) return sizeof(R) == 8 ? static_cast<R>(1ull << 63) : R{0};
        const A v = how == to_nearest ? std::nearbyint(a) : how == to_zero ? std::trunc(a) : how == down ? std::floor(a) : std::ceil(a);
        if (v <= static_cast<A>(std::numeric_limits<R>::min())) return std::numeric_limits<R>::min();
        if (v >= static_cast<A>(std::numeric_limits<R>::max())) return std::numeric_limits<R>::max();
        return static_cast<R>(v);
    }
};
template <class R>
struct cast_op { template <class A> R operator()(A a) const { return static_cast<R>(a); } };
template <int how>
struct round_op {
    template <class T> T operator()(T a) const { return how == to_nearest ? std::nearbyint(a) : how == to_zero ? std::trunc(a) : how == down ? std::floor(a) : std::ceil(a); }
};
struct to_brain_op { std::uint16_t operator()(float a) const { return brain_bits(a); } };
struct to_half_op { std::uint16_t operator()(float a) const { return half_bits(a); } };
struct from_brain_op { float operator()(std::uint16_t a) const { return brain_value(a); } };
struct from_half_op { float operator()(std::uint16_t a) const { return half_value(a); } };
template <class Op> // cvt.rn.bf16x2.f32 d, a, b: a is the upper half
struct pair_op { std::uint32_t operator()(float a, float b) const { return static_cast<std::uint32_t>(Op{}(a)) << 16 | Op{}(b); } };
struct to_code_pair_op { std::uint16_t operator()(float a, float b) const { return static_cast<std::uint16_t>(code_bits(a) << 8 | code_bits(b)); } };
struct codes_to_halves_op {
    std::uint32_t operator()(std::uint16_t a) const
    {
        return static_cast<std::uint32_t>(half_bits(code_value(static_cast<std::uint8_t>(a >> 8)))) << 16 | half_bits(code_value(static_cast<std::uint8_t>(a)));
    }
};

// -- memory ----------------------------------------------------------------------------------------------------------

template <space where>
std::byte* place(warp& w, const instruction& i, int lane, std::uint32_t bytes, bool wide)
{
    const std::uint64_t base = i.a == no_slot ? 0 : wide ? w.at<std::uint64_t>(i.a)[lane] : w.at<std::uint32_t>(i.a)[lane];
    const std::uint64_t at = base + static_cast<std::uint64_t>(i.offset);
    check_align(w, i, at, bytes);
    if constexpr (where == space::param) {
        if (at + bytes > w.code->parameter_bytes) fail(w, i, "behind the parameters");
        return w.home->home->parameters + at;
    } else if constexpr (where == space::shared) {
        return shared_place(w, i, static_cast<std::uint32_t>(at), bytes);
    } else if constexpr (where == space::local) {
        if (at + bytes > w.code->local_bytes) fail(w, i, "behind local memory");
        return w.home->local.data() + (static_cast<std::size_t>(w.number) * 32 + static_cast<std::size_t>(lane)) * w.code->local_bytes + at;
    } else {
        check_global(w, i, at, bytes);
        return reinterpret_cast<std::byte*>(at);
    }
}
/// variant 1: the address is of 8 bytes; 2: registers are.
template <class T, space where>
void load(warp& w, const instruction& i, std::uint32_t lanes)
{
    const auto bytes = static_cast<std::uint32_t>(sizeof(T) * i.count);
    for (std::uint32_t left = lanes; left; left &= left - 1) {
        const int l = std::countr_zero(left);
        T v[4];
        std::memcpy(v, place<where>(w, i, l, bytes, i.variant & 1), bytes);
        for (int n = 0; n < i.count; ++n) {
            const slot to = i.list[static_cast<std::size_t>(n)];
            if (to == no_slot) continue;
            if (i.variant & 2) w.at<std::uint64_t>(to)[l] = static_cast<std::uint64_t>(v[n]);
            else w.at<std::uint32_t>(to)[l] = static_cast<std::uint32_t>(v[n]);
        }
    }
}
template <class T, space where>
void store(warp& w, const instruction& i, std::uint32_t lanes)
{
    const auto bytes = static_cast<std::uint32_t>(sizeof(T) * i.count);
    for (std::uint32_t left = lanes; left; left &= left - 1) {
        const int l = std::countr_zero(left);
        T v[4];
        for (int n = 0; n < i.count; ++n) {
            const slot from = i.list[static_cast<std::size_t>(n)];
            v[n] = static_cast<T>(i.variant & 2 ? w.at<std::uint64_t>(from)[l] : w.at<std::uint32_t>(from)[l]);
        }
        std::memcpy(place<where>(w, i, l, bytes, i.variant & 1), v, bytes);
    }
}
struct exchange_op { template <class T> T operator()(T, T b) const { return b; } };
template <class T, class Op>
void atomic(warp& w, const instruction& i, std::uint32_t lanes)
{
    for (std::uint32_t left = lanes; left; left &= left - 1) {
        const int l = std::countr_zero(left);
        std::byte* at = i.where == space::shared ? place<space::shared>(w, i, l, sizeof(T), i.variant & 1) : place<space::global>(w, i, l, sizeof(T), i.variant & 1);
        T old;
        std::memcpy(&old, at, sizeof(T));
        const T v = Op{}(old, value<T>(w.at<line_of<T>>(i.b)[l]));
        std::memcpy(at, &v, sizeof(T));
        if (i.d != no_slot) w.at<line_of<T>>(i.d)[l] = bits<T>(old);
    }
}
template <class T>
void atomic_swap(warp& w, const instruction& i, std::uint32_t lanes)
{
    for (std::uint32_t left = lanes; left; left &= left - 1) {
        const int l = std::countr_zero(left);
        std::byte* at = i.where == space::shared ? place<space::shared>(w, i, l, sizeof(T), i.variant & 1) : place<space::global>(w, i, l, sizeof(T), i.variant & 1);
        T old;
        std::memcpy(&old, at, sizeof(T));
        if (old == value<T>(w.at<line_of<T>>(i.b)[l])) std::memcpy(at, &w.at<line_of<T>>(i.c)[l], sizeof(T));
        w.at<line_of<T>>(i.d)[l] = bits<T>(old);
    }
}

/// Addresses: generic ones are the host's.
void from_local(warp& w, const instruction& i, std::uint32_t lanes)
{
    each(lanes, [&](int l) {
        const auto base = reinterpret_cast<std::uintptr_t>(w.home->local.data()) + (static_cast<std::size_t>(w.number) * 32 + static_cast<std::size_t>(l)) * w.code->local_bytes;
        w.at<std::uint64_t>(i.d)[l] = base + w.at<std::uint64_t>(i.a)[l];
    });
}
void from_param(warp& w, const instruction& i, std::uint32_t lanes)
{
    each(lanes, [&](int l) { w.at<std::uint64_t>(i.d)[l] = reinterpret_cast<std::uintptr_t>(w.home->home->parameters) + w.at<std::uint64_t>(i.a)[l]; });
}
void from_shared(warp& w, const instruction& i, std::uint32_t lanes)
{
    each(lanes, [&](int l) { w.at<std::uint64_t>(i.d)[l] = reinterpret_cast<std::uintptr_t>(w.home->shared) + w.at<std::uint64_t>(i.a)[l] - shared_window; });
}
void to_shared(warp& w, const instruction& i, std::uint32_t lanes)
{
    for (std::uint32_t left = lanes; left; left &= left - 1) {
        const int l = std::countr_zero(left);
        const std::uint64_t at = w.at<std::uint64_t>(i.a)[l] - reinterpret_cast<std::uintptr_t>(w.home->shared);
        if (at > w.home->shared_bytes) fail(w, i, "a generic address that is not of the block's shared memory");
        w.at<std::uint64_t>(i.d)[l] = at + shared_window;
    }
}
void to_param(warp& w, const instruction& i, std::uint32_t lanes)
{
    each(lanes, [&](int l) { w.at<std::uint64_t>(i.d)[l] = w.at<std::uint64_t>(i.a)[l] - reinterpret_cast<std::uintptr_t>(w.home->home->parameters); });
}

// -- lanes meet ------------------------------------------------------------------------------------------------------

void shuffle(warp& w, const instruction& i, std::uint32_t lanes) // variant: 0 idx, 1 up, 2 down, 3 bfly
{
    std::uint32_t out[32], in_range = 0;
    const auto *a = w.at<std::uint32_t>(i.a), *b = w.at<std::uint32_t>(i.b), *c = w.at<std::uint32_t>(i.c);
    for (std::uint32_t left = lanes; left; left &= left - 1) {
        const int l = std::countr_zero(left);
        const int by = static_cast<int>(b[l] & 31), clamp = static_cast<int>(c[l] & 31), segment = static_cast<int>(c[l] >> 8 & 31);
        const int most = (l & segment) | (clamp & ~segment), least = l & segment;
        int from = 0;
        bool in = false;
        switch (i.variant) {
        case 0: from = least | (by & ~segment); in = from <= most; break;
        case 1: from = l - by; in = from >= most; break;
        case 2: from = l + by; in = from <= most; break;
        default: from = l ^ by; in = from <= most; break;
        }
        if (!in) from = l;
        if (!(lanes >> from & 1)) fail(w, i, "a value of lane " + std::to_string(from) + ", which is not there");
        out[l] = a[from];
        in_range |= static_cast<std::uint32_t>(in) << l;
    }
    for (std::uint32_t left = lanes; left; left &= left - 1) w.at<std::uint32_t>(i.d)[std::countr_zero(left)] = out[std::countr_zero(left)];
    if (i.e != no_slot) {
        auto& e = w.predicate(i.e);
        e = (e & ~lanes) | in_range;
    }
}
void vote(warp& w, const instruction& i, std::uint32_t lanes) // 0 all, 1 any, 2 uni, 3 ballot
{
    const std::uint32_t yes = (i.negated && i.guard == no_slot ? ~w.predicate(i.a) : w.predicate(i.a)) & lanes;
    if (i.variant == 3) {
        each(lanes, [&](int l) { w.at<std::uint32_t>(i.d)[l] = yes; });
        return;
    }
    const bool is = i.variant == 0 ? yes == lanes : i.variant == 1 ? yes != 0 : yes == 0 || yes == lanes;
    auto& d = w.predicate(i.d);
    d = is ? d | lanes : d & ~lanes;
}
template <class T, class Op>
void reduce(warp& w, const instruction& i, std::uint32_t lanes)
{
    T total{};
    bool first = true;
    for (std::uint32_t left = lanes; left; left &= left - 1) {
        const T v = value<T>(w.at<std::uint32_t>(i.a)[std::countr_zero(left)]);
        total = first ? v : Op{}(total, v);
        first = false;
    }
    each(lanes, [&](int l) { w.at<std::uint32_t>(i.d)[l] = bits<T>(total); });
}
void nothing(warp&, const instruction&, std::uint32_t) {}

// -- tables ----------------------------------------------------------------------------------------------------------

template <class Op, class... T>
struct types {};

template <class Op>
action whole_binary(std::string_view t)
{
    if (t == "s16") return binary<std::int16_t, std::int16_t, std::int16_t, Op>;
    if (t == "u16" || t == "b16") return binary<std::uint16_t, std::uint16_t, std::uint16_t, Op>;
    if (t == "s32") return binary<std::int32_t, std::int32_t, std::int32_t, Op>;
    if (t == "u32" || t == "b32") return binary<std::uint32_t, std::uint32_t, std::uint32_t, Op>;
    if (t == "s64") return binary<std::int64_t, std::int64_t, std::int64_t, Op>;
    if (t == "u64" || t == "b64") return binary<std::uint64_t, std::uint64_t, std::uint64_t, Op>;
    return nullptr;
}
template <class Op>
action any_binary(std::string_view t, bool flush, bool saturate)
{
    if (t == "f32") return saturate ? binary<float, float, float, saturating<Op>> : flush ? binary<float, float, float, flushing<Op>> : binary<float, float, float, Op>;
    if (t == "f64") return binary<double, double, double, Op>;
    return whole_binary<Op>(t);
}
template <class Op>
action real_unary(std::string_view t, bool flush)
{
    if (t == "f32") return flush ? unary<float, float, flushing<Op>> : unary<float, float, Op>;
    if (t == "f64") {
        if constexpr (std::is_invocable_r_v<double, Op, double> && !std::is_same_v<decltype(Op{}(0.0)), float>) return unary<double, double, Op>;
    }
    return nullptr;
}
template <class Op>
action any_unary(std::string_view t, bool flush)
{
    if (t == "s16") return unary<std::int16_t, std::int16_t, Op>;
    if (t == "s32") return unary<std::int32_t, std::int32_t, Op>;
    if (t == "s64") return unary<std::int64_t, std::int64_t, Op>;
    return real_unary<Op>(t, flush);
}
template <class Op>
action compare_of(std::string_view t, bool flush)
{
    if (t == "s16") return compare<std::int16_t, Op>;
    if (t == "u16" || t == "b16") return compare<std::uint16_t, Op>;
    if (t == "s32") return compare<std::int32_t, Op>;
    if (t == "u32" || t == "b32") return compare<std::uint32_t, Op>;
    if (t == "s64") return compare<std::int64_t, Op>;
    if (t == "u64" || t == "b64") return compare<std::uint64_t, Op>;
    if (t == "f32") return flush ? nullptr : compare<float, Op>;
    if (t == "f64") return compare<double, Op>;
    return nullptr;
}
action compare_by(std::string_view how, std::string_view t, bool flush)
{
    if (how == "eq") return compare_of<eq_op>(t, flush);
    if (how == "ne") return compare_of<ne_op>(t, flush);
    if (how == "lt" || how == "lo") return compare_of<lt_op>(t, flush);
    if (how == "le" || how == "ls") return compare_of<le_op>(t, flush);
    if (how == "gt" || how == "hi") return compare_of<gt_op>(t, flush);
    if (how == "ge" || how == "hs") return compare_of<ge_op>(t, flush);
    if (how == "equ") return compare_of<or_nan<eq_op>>(t, flush);
    if (how == "neu") return compare_of<or_nan<ne_op>>(t, flush);
    if (how == "ltu") return compare_of<or_nan<lt_op>>(t, flush);
    if (how == "leu") return compare_of<or_nan<le_op>>(t, flush);
    if (how == "gtu") return compare_of<or_nan<gt_op>>(t, flush);
    if (how == "geu") return compare_of<or_nan<ge_op>>(t, flush);
    if (how == "nan") return compare_of<nan_op>(t, flush);
    if (how == "num") return compare_of<num_op>(t, flush);
    return nullptr;
}

template <class R, class A>
action convert_real_to(std::string_view how)
{
    if (how == "rni") return converted<R, A, to_whole<R, A, to_nearest>>;
    if (how == "rzi") return converted<R, A, to_whole<R, A, to_zero>>;
    if (how == "rmi") return converted<R, A, to_whole<R, A, down>>;
    if (how == "rpi") return converted<R, A, to_whole<R, A, up>>;
    return nullptr;
}
template <class A>
action convert_from_real(std::string_view to, std::string_view how)
{
    if (to == "s32") return convert_real_to<std::int32_t, A>(how);
    if (to == "u32") return convert_real_to<std::uint32_t, A>(how);
    if (to == "s64") return convert_real_to<std::int64_t, A>(how);
    if (to == "u64") return convert_real_to<std::uint64_t, A>(how);
    const bool same = to == (sizeof(A) == 4 ? "f32" : "f64");
    if (same && how == "rni") return converted<A, A, round_op<to_nearest>>;
    if (same && how == "rzi") return converted<A, A, round_op<to_zero>>;
    if (same && how == "rmi") return converted<A, A, round_op<down>>;
    if (same && how == "rpi") return converted<A, A, round_op<up>>;
    if (same) return nullptr;
    if (to == "f32" && how == "rn") return converted<float, A, cast_op<float>>;
    if (to == "f64") return converted<double, A, cast_op<double>>;
    return nullptr;
}
template <class A>
action convert_from_whole(std::string_view to)
{
    // The sign goes on by the type of the source; what a register has beyond the result's type does not count.
    if (to == "u8" || to == "s8" || to == "u16") return converted<std::uint16_t, A, cast_op<std::uint16_t>>;
    if (to == "s16") return converted<std::int16_t, A, cast_op<std::int16_t>>;
    if (to == "u32" || to == "s32") return converted<std::uint32_t, A, cast_op<std::uint32_t>>;
    if (to == "u64" || to == "s64") return converted<std::uint64_t, A, cast_op<std::uint64_t>>;
    if (to == "f32") return converted<float, A, cast_op<float>>;
    if (to == "f64") return converted<double, A, cast_op<double>>;
    return nullptr;
}
action convert(const statement& s)
{
    const std::string_view to = s.parts[s.parts.size() - 2], from = s.parts.back();
    std::string_view how;
    for (const auto p : s.parts)
        if (p == "rn" || p == "rz" || p == "rm" || p == "rp" || p == "rni" || p == "rzi" || p == "rmi" || p == "rpi") how = p;
    if (s.has("sat") || s.has("ftz") || s.has("relu")) return nullptr;
    if (to == "bf16" && from == "f32" && how == "rn") return converted<std::uint16_t, float, to_brain_op>;
    if (to == "f16" && from == "f32" && how == "rn") return converted<std::uint16_t, float, to_half_op>;
    if (to == "f32" && from == "bf16") return converted<float, std::uint16_t, from_brain_op>;
    if (to == "f32" && from == "f16") return converted<float, std::uint16_t, from_half_op>;
    if (to == "bf16x2" && from == "f32" && how == "rn") return binary<std::uint32_t, float, float, pair_op<to_brain_op>>;
    if (to == "f16x2" && from == "f32" && how == "rn") return binary<std::uint32_t, float, float, pair_op<to_half_op>>;
    if (to == "e4m3x2" && from == "f32" && s.has("satfinite")) return binary<std::uint16_t, float, float, to_code_pair_op>;
    if (to == "f16x2" && from == "e4m3x2") return converted<std::uint32_t, std::uint16_t, codes_to_halves_op>;
    if (from == "f32") return convert_from_real<float>(to, how);
    if (from == "f64") return convert_from_real<double>(to, how);
    if (from == "u8") return convert_from_whole<std::uint8_t>(to);
    if (from == "s8") return convert_from_whole<std::int8_t>(to);
    if (from == "u16") return convert_from_whole<std::uint16_t>(to);
    if (from == "s16") return convert_from_whole<std::int16_t>(to);
    if (from == "u32") return convert_from_whole<std::uint32_t>(to);
    if (from == "s32") return convert_from_whole<std::int32_t>(to);
    if (from == "u64") return convert_from_whole<std::uint64_t>(to);
    if (from == "s64") return convert_from_whole<std::int64_t>(to);
    return nullptr;
}

template <space where>
action load_of(std::string_view t)
{
    if (t == "u8" || t == "b8") return load<std::uint8_t, where>;
    if (t == "s8") return load<std::int8_t, where>;
    if (t == "u16" || t == "b16") return load<std::uint16_t, where>;
    if (t == "s16") return load<std::int16_t, where>;
    if (t == "u32" || t == "b32" || t == "f32") return load<std::uint32_t, where>;
    if (t == "s32") return load<std::int32_t, where>;
    if (t == "u64" || t == "b64" || t == "f64" || t == "s64") return load<std::uint64_t, where>;
    return nullptr;
}
template <space where>
action store_of(std::string_view t)
{
    const std::string_view bits = t.substr(1);
    if (bits == "8") return store<std::uint8_t, where>;
    if (bits == "16") return store<std::uint16_t, where>;
    if (bits == "32") return store<std::uint32_t, where>;
    if (bits == "64") return store<std::uint64_t, where>;
    return nullptr;
}
bool decode_memory(const statement& s, operand_source& from, instruction& i)
{
    const std::string_view t = s.parts.back();
    const bool loads = s.parts[0] != "st";
    for (const auto p : s.parts)
        if (p == "acquire" || p == "release") i.variant = 0;
    const std::string& list = s.operands.at(loads ? 0 : 1);
    const std::string& address = s.operands.at(loads ? 1 : 0);
    const auto parts = from.parts(list);
    for (const std::string& p : parts) i.list.push_back(from.read(p, t.ends_with("64")));
    i.count = static_cast<std::uint8_t>(parts.size());
    if (parts.size() > 4) return false;
    const bool wide_registers = from.is_wide(parts[0]) || (!loads && t.ends_with("64"));
    std::string base = address.substr(1, address.find_first_of("+]") - 1);
    while (!base.empty() && base.back() == ' ') base.pop_back();
    i.a = from.address(address, i);
    const bool of_call = i.where == space::local;
    // Names are of 8 bytes, as read() made them.
    const bool wide_address = base.front() != '%' || from.is_wide(base);
    i.variant = (wide_address ? 1 : 0) | (wide_registers ? 2 : 0);
    space where = space::generic;
    for (const auto p : s.parts) {
        if (p == "global" || p == "const") where = space::global;
        if (p == "shared" || p.starts_with("shared:")) where = space::shared;
        if (p == "local") where = space::local;
        if (p == "param" || p.starts_with("param:")) where = space::param;
    }
    if (of_call) where = space::local;
    i.where = where;
    if (loads)
        i.run = where == space::shared ? load_of<space::shared>(t) : where == space::local ? load_of<space::local>(t) : where == space::param ? load_of<space::param>(t) : load_of<space::global>(t);
    else
        i.run = where == space::shared ? store_of<space::shared>(t) : where == space::local ? store_of<space::local>(t) : where == space::param ? nullptr : store_of<space::global>(t);
    return i.run != nullptr;
}

template <class T>
action atomic_of(const statement& s)
{
    if (s.has("min")) return atomic<T, least_op>;
    if (s.has("max")) return atomic<T, most_op>;
    if (s.has("add")) return atomic<T, plus_op>;
    if (s.has("exch")) return atomic<T, exchange_op>;
    if (s.has("cas")) return atomic_swap<T>;
    if constexpr (std::is_unsigned_v<T>) {
        if (s.has("and")) return atomic<T, and_op>;
        if (s.has("or")) return atomic<T, or_op>;
        if (s.has("xor")) return atomic<T, xor_op>;
    }
    return nullptr;
}
bool decode_atomic(const statement& s, operand_source& from, instruction& i)
{
    const bool returns = s.parts[0] == "atom";
    const std::string_view t = s.parts.back();
    const bool wide = t.ends_with("64");
    std::size_t n = 0;
    if (returns) i.d = from.read(s.operands.at(n++), wide);
    const std::string& address = s.operands.at(n++);
    i.a = from.address(address, i);
    i.variant = from.is_wide(address.substr(1, address.find_first_of("+]") - 1)) ? 1 : 0;
    i.b = from.read(s.operands.at(n++), wide);
    if (n < s.operands.size()) i.c = from.read(s.operands[n], wide);
    for (const auto p : s.parts)
        if (p.starts_with("shared")) i.where = space::shared;
    i.run = t == "u32" || t == "b32" ? atomic_of<std::uint32_t>(s) : t == "s32" ? atomic_of<std::int32_t>(s) : t == "u64" || t == "b64" ? atomic_of<std::uint64_t>(s) : t == "s64" ? atomic_of<std::int64_t>(s) : nullptr;
    return i.run != nullptr;
}

bool decode_move(const statement& s, operand_source& from, instruction& i)
{
    const std::string_view t = s.parts.back();
    const bool wide = t.ends_with("64");
    const std::string &to = s.operands.at(0), &source = s.operands.at(1);
    if (t == "pred") {
        i.d = from.read(to, false);
        if (source == "0" || source == "1" || source == "-1") {
            i.variant = source != "0";
            i.run = set_predicate;
        } else {
            i.a = from.read(source, false);
            i.run = move_predicate;
        }
        return true;
    }
    const int size = t == "b128" ? 128 : wide ? 64 : t.ends_with("32") ? 32 : 16;
    if (size == 128) return false;
    if (to.front() == '{' || source.front() == '{') {
        const auto parts = from.parts(to.front() == '{' ? to : source);
        i.variant = size / static_cast<int>(parts.size());
        bool wide_parts = false;
        for (const std::string& p : parts) {
            i.list.push_back(from.read(p, false));
            wide_parts |= from.is_wide(p);
        }
        if (wide_parts) return false;
        if (to.front() == '{') {
            i.a = from.read(source, wide);
            i.run = wide ? unpack<std::uint64_t, std::uint32_t> : unpack<std::uint32_t, std::uint32_t>;
        } else {
            i.d = from.read(to, wide);
            i.run = wide ? pack<std::uint64_t, std::uint32_t> : pack<std::uint32_t, std::uint32_t>;
        }
        return true;
    }
    i.d = from.read(to, wide);
    i.a = from.read(source, wide);
    i.run = wide ? move_line<std::uint64_t> : move_line<std::uint32_t>;
    return true;
}

void operands(const statement& s, operand_source& from, instruction& i, bool wide, bool wide_result)
{
    i.d = from.read(s.operands.at(0), wide_result);
    if (s.operands.size() > 1) i.a = from.read(s.operands[1], wide);
    if (s.operands.size() > 2) i.b = from.read(s.operands[2], wide);
    if (s.operands.size() > 3) i.c = from.read(s.operands[3], wide_result);
}

} // namespace

bool decode(const statement& s, operand_source& from, instruction& i)
{
    const std::string_view op = s.parts[0], t = s.parts.back();
    const bool wide = t.ends_with("64"), flush = s.has("ftz"), saturate = s.has("sat");
    const auto simple = [&](action run, bool wide_result) {
        if (!run) return false;
        operands(s, from, i, wide, wide_result);
        i.run = run;
        return true;
    };
    if (op == "ld" || op == "ldu" || op == "st") return decode_memory(s, from, i);
    if (op == "atom" || op == "red") return decode_atomic(s, from, i);
    if (op == "mov") return decode_move(s, from, i);
    if (op == "ret" || op == "exit") {
        i.next = flow::exit;
        return true;
    }
    if (op == "trap") {
        i.next = flow::fault;
        i.run = nothing;
        return true;
    }
    if (op == "griddepcontrol" || op == "fence" || op == "membar" || op == "nanosleep" || op == "prefetch" || op == "discard") {
        i.run = nothing;
        return true;
    }
    if (op == "add") return simple(any_binary<plus_op>(t, flush, saturate), wide);
    if (op == "sub") return simple(any_binary<minus_op>(t, flush, saturate), wide);
    if (op == "mul") {
        if (s.has("hi"))
            return simple(t == "s32" ? binary<std::int32_t, std::int32_t, std::int32_t, high_op> : t == "u32" ? binary<std::uint32_t, std::uint32_t, std::uint32_t, high_op> : t == "s64" ? binary<std::int64_t, std::int64_t, std::int64_t, high_op> : t == "u64" ? binary<std::uint64_t, std::uint64_t, std::uint64_t, high_op> : nullptr, wide);
        if (s.has("wide"))
            return simple(t == "s32" ? binary<std::int64_t, std::int32_t, std::int32_t, wide_op> : t == "u32" ? binary<std::uint64_t, std::uint32_t, std::uint32_t, wide_op> : t == "s16" ? binary<std::int32_t, std::int16_t, std::int16_t, wide_op> : t == "u16" ? binary<std::uint32_t, std::uint16_t, std::uint16_t, wide_op> : nullptr, t.ends_with("32"));
        return simple(any_binary<times_op>(t, flush, saturate), wide);
    }
    if (op == "mad") {
        if (s.has("wide"))
            return simple(t == "s32" ? ternary<std::int64_t, std::int32_t, std::int64_t, mad_wide_op> : t == "u32" ? ternary<std::uint64_t, std::uint32_t, std::uint64_t, mad_wide_op> : nullptr, true);
        if (s.has("hi")) return false;
        return simple(t == "s32" ? ternary<std::int32_t, std::int32_t, std::int32_t, mad_op> : t == "u32" ? ternary<std::uint32_t, std::uint32_t, std::uint32_t, mad_op> : t == "s64" ? ternary<std::int64_t, std::int64_t, std::int64_t, mad_op> : t == "u64" ? ternary<std::uint64_t, std::uint64_t, std::uint64_t, mad_op> : t == "u16" || t == "s16" ? ternary<std::uint16_t, std::uint16_t, std::uint16_t, mad_op> : nullptr, wide);
    }
    if (op == "fma") {
        if (t == "f32") return simple(saturate ? ternary<float, float, float, saturating<fma_op>> : flush ? ternary<float, float, float, flushing<fma_op>> : ternary<float, float, float, fma_op>, false);
        return simple(t == "f64" ? ternary<double, double, double, fma_op> : nullptr, true);
    }
    if (op == "div") {
        if (t == "f32" && (s.has("approx") || s.has("full"))) return simple(flush ? binary<float, float, float, flushing<divide_approx_op>> : binary<float, float, float, divide_approx_op>, false);
        return simple(any_binary<divide_op>(t, flush, false), wide);
    }
    if (op == "rem") return simple(whole_binary<rest_op>(t), wide);
    if (op == "min") return simple(any_binary<least_op>(t, flush, false), wide);
    if (op == "max") return simple(any_binary<most_op>(t, flush, false), wide);
    if (op == "and" || op == "or" || op == "xor") {
        if (t == "pred") return simple(op == "and" ? logic<and_op> : op == "or" ? logic<or_op> : logic<xor_op>, false);
        return simple(op == "and" ? whole_binary<and_op>(t) : op == "or" ? whole_binary<or_op>(t) : whole_binary<xor_op>(t), wide);
    }
    if (op == "not") return simple(t == "pred" ? negate_predicate : t == "b64" ? unary<std::uint64_t, std::uint64_t, not_op> : t == "b32" ? unary<std::uint32_t, std::uint32_t, not_op> : unary<std::uint16_t, std::uint16_t, not_op>, wide);
    if (op == "neg") return simple(any_unary<negate_op>(t, flush), wide);
    if (op == "abs") return simple(any_unary<size_op>(t, flush), wide);
    if (op == "shl" || op == "shr") {
        i.d = from.read(s.operands.at(0), wide);
        i.a = from.read(s.operands.at(1), wide);
        i.b = from.read(s.operands.at(2), false);
        if (op == "shl") i.run = t == "b16" ? binary<std::uint16_t, std::uint16_t, std::uint32_t, left_op> : t == "b32" ? binary<std::uint32_t, std::uint32_t, std::uint32_t, left_op> : binary<std::uint64_t, std::uint64_t, std::uint32_t, left_op>;
        else i.run = t == "s16" ? binary<std::int16_t, std::int16_t, std::uint32_t, right_op> : t == "s32" ? binary<std::int32_t, std::int32_t, std::uint32_t, right_op> : t == "s64" ? binary<std::int64_t, std::int64_t, std::uint32_t, right_op> : t.ends_with("16") ? binary<std::uint16_t, std::uint16_t, std::uint32_t, right_op> : t.ends_with("32") ? binary<std::uint32_t, std::uint32_t, std::uint32_t, right_op> : binary<std::uint64_t, std::uint64_t, std::uint32_t, right_op>;
        return true;
    }
    if (op == "popc") return simple(t == "b64" ? unary<std::uint32_t, std::uint64_t, count_op> : unary<std::uint32_t, std::uint32_t, count_op>, false);
    if (op == "clz") return simple(t == "b64" ? unary<std::uint32_t, std::uint64_t, zeros_op> : unary<std::uint32_t, std::uint32_t, zeros_op>, false);
    if (op == "brev") return simple(t == "b64" ? unary<std::uint64_t, std::uint64_t, reverse_op> : unary<std::uint32_t, std::uint32_t, reverse_op>, wide);
    if (op == "setp") {
        std::string_view how = s.parts.at(1);
        for (const auto p : s.parts) i.variant = p == "and" ? 1 : p == "or" ? 2 : p == "xor" ? 3 : i.variant;
        i.run = compare_by(how, t, flush);
        std::string to = s.operands.at(0);
        if (const std::size_t bar = to.find('|'); bar != std::string::npos) {
            i.e = from.read(to.substr(bar + 1), false);
            to.erase(bar);
        }
        i.d = from.read(to, false);
        i.a = from.read(s.operands.at(1), wide);
        i.b = from.read(s.operands.at(2), wide);
        if (s.operands.size() > 3) i.c = from.read(s.operands[3], false);
        return i.run != nullptr;
    }
    if (op == "selp") {
        i.d = from.read(s.operands.at(0), wide);
        i.a = from.read(s.operands.at(1), wide);
        i.b = from.read(s.operands.at(2), wide);
        i.c = from.read(s.operands.at(3), false);
        i.run = wide ? select<std::uint64_t> : select<std::uint32_t>;
        return true;
    }
    if (op == "bfi") {
        for (auto [n, to] : {std::pair{0, &i.d}, {1, &i.a}, {2, &i.b}}) *to = from.read(s.operands.at(static_cast<std::size_t>(n)), wide);
        i.c = from.read(s.operands.at(3), false);
        i.m = from.read(s.operands.at(4), false);
        i.run = wide ? insert_bits<std::uint64_t> : insert_bits<std::uint32_t>;
        return true;
    }
    if (op == "bfe") {
        i.d = from.read(s.operands.at(0), wide);
        i.a = from.read(s.operands.at(1), wide);
        i.b = from.read(s.operands.at(2), false);
        i.c = from.read(s.operands.at(3), false);
        i.run = t == "u32" ? extract_bits<std::uint32_t> : t == "s32" ? extract_bits<std::int32_t> : t == "u64" ? extract_bits<std::uint64_t> : extract_bits<std::int64_t>;
        return true;
    }
    if (op == "prmt" && s.parts.size() == 2) return simple(permute, false);
    if (op == "shf") {
        i.variant = (s.has("l") ? 1 : 0) | (s.has("wrap") ? 2 : 0);
        return simple(shift_pair, false);
    }
    if (op == "lop3") {
        operands(s, from, i, false, false);
        i.variant = std::stoi(s.operands.at(4), nullptr, 0);
        i.run = any_logic;
        return true;
    }
    if (op == "cvt") {
        const bool from_wide = t.ends_with("64"), to_wide = s.parts[s.parts.size() - 2].ends_with("64");
        i.run = convert(s);
        if (!i.run) return false;
        const bool wide_source = from_wide || from.is_wide(s.operands.at(1));
        i.variant = wide_source && !from_wide;
        i.d = from.read(s.operands.at(0), to_wide);
        i.a = from.read(s.operands[1], wide_source);
        if (s.operands.size() > 2) i.b = from.read(s.operands[2], from_wide);
        return true;
    }
    if (op == "cvta") {
        i.d = from.read(s.operands.at(0), true);
        i.a = from.read(s.operands.at(1), true);
        if (t != "u64") return false;
        const bool to = s.has("to");
        if (s.has("global") || s.has("const")) i.run = move_line<std::uint64_t>;
        else if (s.has("local") && !to) i.run = from_local;
        else if (s.has("param")) i.run = to ? to_param : from_param;
        else if (s.has("shared")) i.run = to ? to_shared : from_shared;
        return i.run != nullptr;
    }
    if (op == "ex2") return simple(t == "f32" ? real_unary<exp2_op>(t, flush) : nullptr, false);
    if (op == "lg2") return simple(real_unary<log2_op>(t, flush), false);
    if (op == "sin") return simple(real_unary<sine_op>(t, flush), false);
    if (op == "cos") return simple(real_unary<cosine_op>(t, flush), false);
    if (op == "tanh") return simple(t == "f32" ? real_unary<tanh_op>(t, flush) : nullptr, false);
    if (op == "rcp") return simple(real_unary<reciprocal_op>(t, flush), wide);
    if (op == "sqrt") return simple(real_unary<root_op>(t, flush), wide);
    if (op == "rsqrt") return simple(real_unary<reciprocal_root_op>(t, flush), wide);
    if (op == "bar" && s.has("warp")) {
        i.next = flow::meeting;
        i.run = nothing;
        i.m = from.read(s.operands.at(0), false);
        return true;
    }
    if ((op == "bar" || op == "barrier") && s.has("sync") && !s.has("cluster")) {
        i.next = flow::barrier;
        i.a = from.read(s.operands.at(0), false);
        if (s.operands.size() > 1) i.b = from.read(s.operands[1], false);
        return true;
    }
    if (op == "barrier" && s.has("cluster")) {
        i.next = flow::cluster_wait;
        i.variant = s.has("wait");
        return true;
    }
    if (op == "shfl" && s.has("sync")) {
        i.next = flow::meeting;
        i.variant = s.has("idx") ? 0 : s.has("up") ? 1 : s.has("down") ? 2 : 3;
        std::string to = s.operands.at(0);
        if (const std::size_t bar = to.find('|'); bar != std::string::npos) {
            i.e = from.read(to.substr(bar + 1), false);
            to.erase(bar);
        }
        i.d = from.read(to, false);
        i.a = from.read(s.operands.at(1), false);
        i.b = from.read(s.operands.at(2), false);
        i.c = from.read(s.operands.at(3), false);
        i.m = from.read(s.operands.at(4), false);
        i.run = shuffle;
        return true;
    }
    if (op == "vote" && s.has("sync")) {
        i.next = flow::meeting;
        i.variant = s.has("all") ? 0 : s.has("any") ? 1 : s.has("uni") ? 2 : 3;
        i.d = from.read(s.operands.at(0), false);
        std::string a = s.operands.at(1);
        if (a.front() == '!') return false;
        i.a = from.read(a, false);
        i.m = from.read(s.operands.at(2), false);
        i.run = vote;
        return true;
    }
    if (op == "redux" && s.has("sync")) {
        i.next = flow::meeting;
        i.d = from.read(s.operands.at(0), false);
        i.a = from.read(s.operands.at(1), false);
        i.m = from.read(s.operands.at(2), false);
        i.run = s.has("add") ? reduce<std::uint32_t, plus_op> : s.has("and") ? reduce<std::uint32_t, and_op> : s.has("or") ? reduce<std::uint32_t, or_op> : s.has("min") ? (t == "s32" ? reduce<std::int32_t, least_op> : reduce<std::uint32_t, least_op>) : s.has("max") ? (t == "s32" ? reduce<std::int32_t, most_op> : reduce<std::uint32_t, most_op>) : nullptr;
        return i.run != nullptr;
    }
    return decode_asynchronous(s, from, i);
}

} // namespace emulator
