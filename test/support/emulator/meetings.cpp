// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Where lanes end, wait for each other and exchange values.
#include <string>

#include "support/emulator/lane_values.hpp"
#include "support/emulator/operators.hpp"
#include "support/emulator/races.hpp"

namespace emulator {

namespace {

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
        case 0:
            from = least | (by & ~segment);
            in = from <= most;
            break;
        case 1:
            from = l - by;
            in = from >= most;
            break;
        case 2:
            from = l + by;
            in = from <= most;
            break;
        default:
            from = l ^ by;
            in = from <= most;
            break;
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
    const std::uint32_t yes = w.predicate(i.a) & lanes;
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
void wait_for_kernels(warp& w, const instruction&, std::uint32_t) { w.waited = true; }
void meet(warp& w, const instruction&, std::uint32_t lanes) // of memory, too
{
    if (w.home->home->races) w.home->home->races->meet(w, lanes);
}

action reduced(const statement& s)
{
    const bool is_signed = s.parts.back() == "s32";
    if (s.has("add")) return reduce<std::uint32_t, plus_op>;
    if (s.has("and")) return reduce<std::uint32_t, and_op>;
    if (s.has("or")) return reduce<std::uint32_t, or_op>;
    if (s.has("min")) return is_signed ? reduce<std::int32_t, least_op> : reduce<std::uint32_t, least_op>;
    if (s.has("max")) return is_signed ? reduce<std::int32_t, most_op> : reduce<std::uint32_t, most_op>;
    return nullptr;
}

} // namespace

bool decode_meeting(const statement& s, operand_source& from, instruction& i)
{
    const std::string_view op = s.parts[0];
    if (op == "ret" || op == "exit") {
        i.next = flow::exit;
        return true;
    }
    if (op == "trap") {
        i.next = flow::fault;
        i.run = nothing;
        return true;
    }
    if (op == "griddepcontrol") {
        i.run = s.has("wait") ? wait_for_kernels : nothing;
        return true;
    }
    if ((op == "fence" && !s.has("proxy")) || op == "membar" || op == "nanosleep" || op == "prefetch" || op == "discard") {
        i.run = nothing;
        return true;
    }
    if (op == "bar" && s.has("warp")) {
        i.next = flow::meeting;
        i.run = meet;
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
        i.count = !s.has("relaxed");
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
        i.run = reduced(s);
        return i.run != nullptr;
    }
    return false;
}

} // namespace emulator
