// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Registers as lines of lanes, and instructions that do the same in each lane.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "support/emulator/device.hpp"

namespace emulator {

template <int bytes>
using word =
    std::conditional_t<bytes == 1, std::uint8_t,
                       std::conditional_t<bytes == 2, std::uint16_t, std::conditional_t<bytes == 4, std::uint32_t, std::uint64_t>>>;
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
#if !defined(__clang__)
#pragma GCC ivdep
#endif
        for (int l = 0; l < 32; ++l) f(l);
    } else {
        for (std::uint32_t left = lanes; left; left &= left - 1) f(std::countr_zero(left));
    }
}

template <class R, class A, class Op>
void unary(warp& w, const instruction& i, std::uint32_t lanes)
{
    auto* d = w.at<line_of<R>>(i.d);
    const auto* a = w.at<line_of<A>>(i.a);
    each(lanes, [&](int l) { d[l] = bits<R>(Op{}(value<A>(a[l]))); });
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

/// d, a, b, c in the text's order.
inline void operands(const statement& s, operand_source& from, instruction& i, bool wide, bool wide_result)
{
    i.d = from.read(s.operands.at(0), wide_result);
    if (s.operands.size() > 1) i.a = from.read(s.operands[1], wide);
    if (s.operands.size() > 2) i.b = from.read(s.operands[2], wide);
    if (s.operands.size() > 3) i.c = from.read(s.operands[3], wide_result);
}

} // namespace emulator
