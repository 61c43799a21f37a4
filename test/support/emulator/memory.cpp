// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Loads, stores, atomics and addresses.
#include <cstring>

#include "support/emulator/lane_values.hpp"
#include "support/emulator/operators.hpp"
#include "support/emulator/races.hpp"

namespace emulator {

namespace {

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
void note(warp& w, const instruction& i, int lane, const std::byte* at, std::uint32_t bytes, access_kind kind)
{
    if (race_check* const races = w.home->home->races) races->access(w, i, lane, at, bytes, kind);
}
/// variant 1: the address is of 8 bytes; 2: registers are.
template <class T, space where>
void load(warp& w, const instruction& i, std::uint32_t lanes)
{
    const auto bytes = static_cast<std::uint32_t>(sizeof(T) * i.count);
    for (std::uint32_t left = lanes; left; left &= left - 1) {
        const int l = std::countr_zero(left);
        T v[4];
        const std::byte* const from = place<where>(w, i, l, bytes, i.variant & 1);
        if constexpr (where == space::shared || where == space::global) note(w, i, l, from, bytes, access_kind::read);
        std::memcpy(v, from, bytes);
        for (int n = 0; n < i.count; ++n) {
            const slot to = i.list[static_cast<std::size_t>(n)];
            if (to == no_slot) continue;
            if (i.variant & 2)
                w.at<std::uint64_t>(to)[l] = static_cast<std::uint64_t>(v[n]);
            else
                w.at<std::uint32_t>(to)[l] = static_cast<std::uint32_t>(v[n]);
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
        std::byte* const to = place<where>(w, i, l, bytes, i.variant & 1);
        if constexpr (where == space::shared || where == space::global) note(w, i, l, to, bytes, access_kind::write);
        std::memcpy(to, v, bytes);
        if (where == space::shared && to >= w.home->shared && to < w.home->shared + w.home->shared_bytes)
            w.home->note_write(static_cast<std::uint32_t>(to - w.home->shared) + shared_window, bytes, w.number);
    }
}
struct exchange_op {
    template <class T>
    T operator()(T, T b) const
    {
        return b;
    }
};
std::byte* atomic_place(warp& w, const instruction& i, int lane, std::uint32_t bytes)
{
    std::byte* const at = i.where == space::shared ? place<space::shared>(w, i, lane, bytes, i.variant & 1)
                                                   : place<space::global>(w, i, lane, bytes, i.variant & 1);
    note(w, i, lane, at, bytes, access_kind::atomic);
    return at;
}
template <class T, class Op>
void atomic(warp& w, const instruction& i, std::uint32_t lanes)
{
    for (std::uint32_t left = lanes; left; left &= left - 1) {
        const int l = std::countr_zero(left);
        std::byte* at = atomic_place(w, i, l, sizeof(T));
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
        std::byte* at = atomic_place(w, i, l, sizeof(T));
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
        const auto base = reinterpret_cast<std::uintptr_t>(w.home->local.data()) +
                          (static_cast<std::size_t>(w.number) * 32 + static_cast<std::size_t>(l)) * w.code->local_bytes;
        w.at<std::uint64_t>(i.d)[l] = base + w.at<std::uint64_t>(i.a)[l];
    });
}
void from_param(warp& w, const instruction& i, std::uint32_t lanes)
{
    each(lanes, [&](int l) {
        w.at<std::uint64_t>(i.d)[l] = reinterpret_cast<std::uintptr_t>(w.home->home->parameters) + w.at<std::uint64_t>(i.a)[l];
    });
}
void from_shared(warp& w, const instruction& i, std::uint32_t lanes)
{
    each(lanes, [&](int l) {
        w.at<std::uint64_t>(i.d)[l] = reinterpret_cast<std::uintptr_t>(w.home->shared) + w.at<std::uint64_t>(i.a)[l] - shared_window;
    });
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
    each(lanes, [&](int l) {
        w.at<std::uint64_t>(i.d)[l] = w.at<std::uint64_t>(i.a)[l] - reinterpret_cast<std::uintptr_t>(w.home->home->parameters);
    });
}

void same_address(warp& w, const instruction& i, std::uint32_t lanes)
{
    each(lanes, [&](int l) { w.at<std::uint64_t>(i.d)[l] = w.at<std::uint64_t>(i.a)[l]; });
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
bool decode_access(const statement& s, operand_source& from, instruction& i)
{
    const std::string_view t = s.parts.back();
    const bool loads = s.parts[0] != "st";
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
    switch (where) {
    case space::shared:
        i.run = loads ? load_of<space::shared>(t) : store_of<space::shared>(t);
        break;
    case space::local:
        i.run = loads ? load_of<space::local>(t) : store_of<space::local>(t);
        break;
    case space::param:
        i.run = loads ? load_of<space::param>(t) : nullptr;
        break;
    default:
        i.run = loads ? load_of<space::global>(t) : store_of<space::global>(t);
    }
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
    if (t == "u32" || t == "b32")
        i.run = atomic_of<std::uint32_t>(s);
    else if (t == "s32")
        i.run = atomic_of<std::int32_t>(s);
    else if (t == "u64" || t == "b64")
        i.run = atomic_of<std::uint64_t>(s);
    else if (t == "s64")
        i.run = atomic_of<std::int64_t>(s);
    return i.run != nullptr;
}

} // namespace

bool decode_memory(const statement& s, operand_source& from, instruction& i)
{
    const std::string_view op = s.parts[0], t = s.parts.back();
    if (op == "ld" || op == "ldu" || op == "st") return decode_access(s, from, i);
    if (op == "atom" || op == "red") return decode_atomic(s, from, i);
    if (op == "cvta") {
        i.d = from.read(s.operands.at(0), true);
        i.a = from.read(s.operands.at(1), true);
        if (t != "u64") return false;
        const bool to = s.has("to");
        if (s.has("global") || s.has("const"))
            i.run = same_address;
        else if (s.has("local") && !to)
            i.run = from_local;
        else if (s.has("param"))
            i.run = to ? to_param : from_param;
        else if (s.has("shared"))
            i.run = to ? to_shared : from_shared;
        return i.run != nullptr;
    }
    return false;
}

} // namespace emulator
