// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Instructions that compute: whole and real numbers, comparisons, predicates.
#include "support/emulator/lane_values.hpp"
#include "support/emulator/operators.hpp"

namespace emulator {

namespace {

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

inline float flushed(float a) { return std::fpclassify(a) == FP_SUBNORMAL ? std::copysign(0.0f, a) : a; }
/// .ftz: subnormal operands and results count as zero.
template <class Op>
struct flushing {
    template <class... A>
    auto operator()(A... a) const
    {
        if constexpr (std::is_same_v<decltype(Op{}(flushed(static_cast<float>(a))...)), float>)
            return flushed(Op{}(flushed(a)...));
        else
            return Op{}(flushed(a)...);
    }
};
template <class Op>
struct saturating {
    template <class... A>
    auto operator()(A... a) const
    {
        const auto v = Op{}(a...);
        return v >= 1 ? decltype(v)(1) : v > 0 ? v : decltype(v)(0); // NaN is zero
    }
};

struct eq_op {
    template <class T>
    bool operator()(T a, T b) const
    {
        return a == b;
    }
};
struct ne_op {
    template <class T>
    bool operator()(T a, T b) const
    {
        if constexpr (real_type<T>)
            return a < b || a > b;
        else
            return a != b;
    }
};
struct lt_op {
    template <class T>
    bool operator()(T a, T b) const
    {
        return a < b;
    }
};
struct le_op {
    template <class T>
    bool operator()(T a, T b) const
    {
        return a <= b;
    }
};
struct gt_op {
    template <class T>
    bool operator()(T a, T b) const
    {
        return a > b;
    }
};
struct ge_op {
    template <class T>
    bool operator()(T a, T b) const
    {
        return a >= b;
    }
};
template <class Op>
struct or_nan {
    template <class T>
    bool operator()(T a, T b) const
    {
        return a != a || b != b || Op{}(a, b);
    }
};
struct nan_op {
    template <class T>
    bool operator()(T a, T b) const
    {
        return a != a || b != b;
    }
};
struct num_op {
    template <class T>
    bool operator()(T a, T b) const
    {
        return a == a && b == b;
    }
};

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
    if (t == "f32")
        return saturate ? binary<float, float, float, saturating<Op>>
               : flush  ? binary<float, float, float, flushing<Op>>
                        : binary<float, float, float, Op>;
    if (t == "f64") return binary<double, double, double, Op>;
    return whole_binary<Op>(t);
}
template <class Op>
action real_unary(std::string_view t, bool flush)
{
    if (t == "f32") return flush ? unary<float, float, flushing<Op>> : unary<float, float, Op>;
    if (t == "f64") {
        if constexpr (std::is_invocable_r_v<double, Op, double> && !std::is_same_v<decltype(Op{}(0.0)), float>)
            return unary<double, double, Op>;
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

action high_product(std::string_view t)
{
    if (t == "s32") return binary<std::int32_t, std::int32_t, std::int32_t, high_op>;
    if (t == "u32") return binary<std::uint32_t, std::uint32_t, std::uint32_t, high_op>;
    if (t == "s64") return binary<std::int64_t, std::int64_t, std::int64_t, high_op>;
    if (t == "u64") return binary<std::uint64_t, std::uint64_t, std::uint64_t, high_op>;
    return nullptr;
}
action wide_product(std::string_view t)
{
    if (t == "s16") return binary<std::int32_t, std::int16_t, std::int16_t, wide_op>;
    if (t == "u16") return binary<std::uint32_t, std::uint16_t, std::uint16_t, wide_op>;
    if (t == "s32") return binary<std::int64_t, std::int32_t, std::int32_t, wide_op>;
    if (t == "u32") return binary<std::uint64_t, std::uint32_t, std::uint32_t, wide_op>;
    return nullptr;
}
action product_and_sum(std::string_view t, bool is_wide)
{
    if (is_wide) {
        if (t == "s32") return ternary<std::int64_t, std::int32_t, std::int64_t, mad_wide_op>;
        if (t == "u32") return ternary<std::uint64_t, std::uint32_t, std::uint64_t, mad_wide_op>;
        return nullptr;
    }
    if (t == "s16" || t == "u16") return ternary<std::uint16_t, std::uint16_t, std::uint16_t, mad_op>;
    if (t == "s32" || t == "u32") return ternary<std::uint32_t, std::uint32_t, std::uint32_t, mad_op>;
    if (t == "s64" || t == "u64") return ternary<std::uint64_t, std::uint64_t, std::uint64_t, mad_op>;
    return nullptr;
}
action fused(std::string_view t, bool flush, bool saturate)
{
    if (t == "f64") return ternary<double, double, double, fma_op>;
    if (t != "f32") return nullptr;
    if (saturate) return ternary<float, float, float, saturating<fma_op>>;
    return flush ? ternary<float, float, float, flushing<fma_op>> : ternary<float, float, float, fma_op>;
}
template <class T, class Op>
constexpr action shift_of = binary<T, T, std::uint32_t, Op>;
action shift(bool left, std::string_view t)
{
    const std::string_view size = t.substr(1);
    if (left) {
        if (size == "16") return shift_of<std::uint16_t, left_op>;
        return size == "32" ? shift_of<std::uint32_t, left_op> : shift_of<std::uint64_t, left_op>;
    }
    if (t == "s16") return shift_of<std::int16_t, right_op>;
    if (t == "s32") return shift_of<std::int32_t, right_op>;
    if (t == "s64") return shift_of<std::int64_t, right_op>;
    if (size == "16") return shift_of<std::uint16_t, right_op>;
    return size == "32" ? shift_of<std::uint32_t, right_op> : shift_of<std::uint64_t, right_op>;
}
template <class Op>
action bits_unary(std::string_view t)
{
    if (t == "b16") return unary<std::uint16_t, std::uint16_t, Op>;
    if (t == "b32") return unary<std::uint32_t, std::uint32_t, Op>;
    return t == "b64" ? unary<std::uint64_t, std::uint64_t, Op> : nullptr;
}
template <class Op>
action bits_counted(std::string_view t)
{
    return t == "b64" ? unary<std::uint32_t, std::uint64_t, Op> : unary<std::uint32_t, std::uint32_t, Op>;
}

} // namespace

bool decode_arithmetic(const statement& s, operand_source& from, instruction& i)
{
    const std::string_view op = s.parts[0], t = s.parts.back();
    const bool wide = t.ends_with("64"), flush = s.has("ftz"), saturate = s.has("sat");
    const auto simple = [&](action run, bool wide_result) {
        if (!run) return false;
        operands(s, from, i, wide, wide_result);
        i.run = run;
        return true;
    };
    if (op == "add") return simple(any_binary<plus_op>(t, flush, saturate), wide);
    if (op == "sub") return simple(any_binary<minus_op>(t, flush, saturate), wide);
    if (op == "mul") {
        if (s.has("hi")) return simple(high_product(t), wide);
        if (s.has("wide")) return simple(wide_product(t), t.ends_with("32"));
        return simple(any_binary<times_op>(t, flush, saturate), wide);
    }
    if (op == "mad") return simple(s.has("hi") ? nullptr : product_and_sum(t, s.has("wide")), wide || s.has("wide"));
    if (op == "fma") return simple(fused(t, flush, saturate), wide);
    if (op == "div") {
        if (t == "f32" && (s.has("approx") || s.has("full")))
            return simple(flush ? binary<float, float, float, flushing<divide_approx_op>> : binary<float, float, float, divide_approx_op>,
                          false);
        return simple(any_binary<divide_op>(t, flush, false), wide);
    }
    if (op == "rem") return simple(whole_binary<rest_op>(t), wide);
    if (op == "min") return simple(any_binary<least_op>(t, flush, false), wide);
    if (op == "max") return simple(any_binary<most_op>(t, flush, false), wide);
    if (op == "and" || op == "or" || op == "xor") {
        if (t == "pred") return simple(op == "and" ? logic<and_op> : op == "or" ? logic<or_op> : logic<xor_op>, false);
        return simple(op == "and" ? whole_binary<and_op>(t) : op == "or" ? whole_binary<or_op>(t) : whole_binary<xor_op>(t), wide);
    }
    if (op == "not") return simple(t == "pred" ? negate_predicate : bits_unary<not_op>(t), wide);
    if (op == "neg") return simple(any_unary<negate_op>(t, flush), wide);
    if (op == "abs") return simple(any_unary<size_op>(t, flush), wide);
    if (op == "shl" || op == "shr") {
        i.d = from.read(s.operands.at(0), wide);
        i.a = from.read(s.operands.at(1), wide);
        i.b = from.read(s.operands.at(2), false);
        i.run = shift(op == "shl", t);
        return true;
    }
    if (op == "popc") return simple(bits_counted<count_op>(t), false);
    if (op == "clz") return simple(bits_counted<zeros_op>(t), false);
    if (op == "brev") return simple(bits_unary<reverse_op>(t), wide);
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
    if (op == "ex2") return simple(t == "f32" ? real_unary<exp2_op>(t, flush) : nullptr, false);
    if (op == "lg2") return simple(real_unary<log2_op>(t, flush), false);
    if (op == "sin") return simple(real_unary<sine_op>(t, flush), false);
    if (op == "cos") return simple(real_unary<cosine_op>(t, flush), false);
    if (op == "tanh") return simple(t == "f32" ? real_unary<tanh_op>(t, flush) : nullptr, false);
    if (op == "rcp") return simple(real_unary<reciprocal_op>(t, flush), wide);
    if (op == "sqrt") return simple(real_unary<root_op>(t, flush), wide);
    if (op == "rsqrt") return simple(real_unary<reciprocal_root_op>(t, flush), wide);
    return false;
}

} // namespace emulator
