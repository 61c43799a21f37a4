// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// cvt.
#include <cmath>
#include <limits>

#include "support/emulator/lane_values.hpp"
#include "support/emulator/numbers.hpp"

namespace emulator {

namespace {

/// variant 1: the register is of 8 bytes, and A of its lower ones, as cvt may have it.
template <class R, class A, class Op>
void converted(warp& w, const instruction& i, std::uint32_t lanes)
{
    auto* d = w.at<line_of<R>>(i.d);
    const auto* a = w.at<line_of<A>>(i.a);
    if (i.variant == 0)
        each(lanes, [&](int l) { d[l] = bits<R>(Op{}(value<A>(a[l]))); });
    else
        each(lanes, [&](int l) { d[l] = bits<R>(Op{}(value<A>(a[2 * l]))); });
}

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
struct cast_op {
    template <class A>
    R operator()(A a) const
    {
        return static_cast<R>(a);
    }
};
template <int how>
struct round_op {
    template <class T>
    T operator()(T a) const
    {
        return how == to_nearest ? std::nearbyint(a) : how == to_zero ? std::trunc(a) : how == down ? std::floor(a) : std::ceil(a);
    }
};
struct to_brain_op {
    std::uint16_t operator()(float a) const { return brain_bits(a); }
};
struct to_half_op {
    std::uint16_t operator()(float a) const { return half_bits(a); }
};
struct from_brain_op {
    float operator()(std::uint16_t a) const { return brain_value(a); }
};
struct from_half_op {
    float operator()(std::uint16_t a) const { return half_value(a); }
};
template <class Op> // cvt.rn.bf16x2.f32 d, a, b: a is the upper half
struct pair_op {
    std::uint32_t operator()(float a, float b) const { return static_cast<std::uint32_t>(Op{}(a)) << 16 | Op{}(b); }
};
struct to_code_pair_op {
    std::uint16_t operator()(float a, float b) const { return static_cast<std::uint16_t>(code_bits(a) << 8 | code_bits(b)); }
};
struct codes_to_halves_op {
    std::uint32_t operator()(std::uint16_t a) const
    {
        return static_cast<std::uint32_t>(half_bits(code_value(static_cast<std::uint8_t>(a >> 8)))) << 16 |
               half_bits(code_value(static_cast<std::uint8_t>(a)));
    }
};

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

} // namespace

bool decode_conversion(const statement& s, operand_source& from, instruction& i)
{
    if (s.parts[0] != "cvt") return false;
    const std::string_view t = s.parts.back();
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

} // namespace emulator
