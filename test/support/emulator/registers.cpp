// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Instructions that move registers, and bits within them.
#include <algorithm>

#include "support/emulator/lane_values.hpp"

namespace emulator {

namespace {

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
        for (std::size_t n = i.list.size(); n-- > 0;)
            v = (v << i.variant) | (static_cast<std::uint64_t>(w.at<P>(i.list[n])[l]) & ((1ull << i.variant) - 1));
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
            if (i.list[n] != no_slot)
                w.at<P>(i.list[n])[l] = static_cast<P>((v >> (static_cast<std::size_t>(i.variant) * n)) & ((1ull << i.variant) - 1));
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
        for (int n = 0; n < 32; ++n)
            v |= (static_cast<std::uint32_t>(i.variant) >> ((a[l] >> n & 1) * 4 + (b[l] >> n & 1) * 2 + (c[l] >> n & 1)) & 1) << n;
        d[l] = v;
    });
}

action extracted(std::string_view t)
{
    if (t == "u32") return extract_bits<std::uint32_t>;
    if (t == "s32") return extract_bits<std::int32_t>;
    return t == "u64" ? extract_bits<std::uint64_t> : extract_bits<std::int64_t>;
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

} // namespace

bool decode_registers(const statement& s, operand_source& from, instruction& i)
{
    const std::string_view op = s.parts[0], t = s.parts.back();
    const bool wide = t.ends_with("64");
    const auto simple = [&](action run) {
        operands(s, from, i, wide, wide);
        i.run = run;
        return true;
    };
    if (op == "mov") return decode_move(s, from, i);
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
        i.run = extracted(t);
        return true;
    }
    if (op == "prmt" && s.parts.size() == 2) return simple(permute);
    if (op == "shf") {
        i.variant = (s.has("l") ? 1 : 0) | (s.has("wrap") ? 2 : 0);
        return simple(shift_pair);
    }
    if (op == "lop3") {
        operands(s, from, i, false, false);
        i.variant = std::stoi(s.operands.at(4), nullptr, 0);
        i.run = any_logic;
        return true;
    }
    return false;
}

} // namespace emulator
