// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
// Instructions of one thread and of a warp, against what "PTX ISA" says of them.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

#include "kernel_text.hpp"
#include "support/emulator/numbers.hpp"

namespace {

using emulated::memory;
using emulated::run;

/// A value of 64 bits a lane, of a and b: instructions find them in %rd11 and %rd12, in %r11 and %r12 their lower halves, in %fd11, %f11
/// and so on the same bits; what is in %rd10 at the end, or in %r10 where the text says so, is the result.
std::vector<std::uint64_t> apply(const std::string& text, const std::vector<std::uint64_t>& a, const std::vector<std::uint64_t>& b)
{
    const memory<std::uint64_t> from_a(a), from_b(b), to(std::vector<std::uint64_t>(32, 77));
    const bool narrow = text.find("%r10,") != std::string::npos || text.find("%f10,") != std::string::npos;
    run("mul.wide.u32 %rd5, %r1, 8;\nadd.s64 %rd6, %rd1, %rd5;\nadd.s64 %rd7, %rd2, %rd5;\nadd.s64 %rd8, %rd3, %rd5;\n"
        "ld.global.u64 %rd11, [%rd6];\nld.global.u64 %rd12, [%rd7];\ncvt.u32.u64 %r11, %rd11;\ncvt.u32.u64 %r12, %rd12;\n"
        "mov.b32 %f11, %r11;\nmov.b32 %f12, %r12;\nmov.b64 %fd11, %rd11;\nmov.b64 %fd12, %rd12;\n" +
            text + "\n" + (text.find("%f10,") != std::string::npos ? "mov.b32 %r10, %f10;\n" : "") +
            (text.find("%fd10,") != std::string::npos ? "mov.b64 %rd10, %fd10;\n" : "") + (narrow ? "cvt.u64.u32 %rd10, %r10;\n" : "") +
            "st.global.u64 [%rd8], %rd10;",
        {from_a.address(), from_b.address(), to.address()});
    return to.values();
}
std::vector<std::uint64_t> any_numbers(unsigned seed)
{
    std::mt19937_64 random(seed);
    std::vector<std::uint64_t> out = {0, 1, ~0ull, 1ull << 63, 1ull << 31, 0x7fffffffull, 0xffffffffull, 0x8000000000000001ull};
    while (out.size() < 32) out.push_back(random() >> random() % 64);
    return out;
}
template <class F>
void same(const char* text, const F& expected)
{
    CAPTURE(text);
    const auto a = any_numbers(1);
    auto b = any_numbers(2);
    std::shuffle(b.begin(), b.end(), std::mt19937(3));
    const auto got = apply(text, a, b);
    for (std::size_t i = 0; i < 32; ++i) CHECK_EQ(got[i], static_cast<std::uint64_t>(expected(a[i], b[i])));
}
std::uint32_t low(std::uint64_t v) { return static_cast<std::uint32_t>(v); }
std::int32_t whole(std::uint64_t v) { return static_cast<std::int32_t>(v); }

template <class F>
void same_real(const char* text, const F& expected)
{
    CAPTURE(text);
    const float inf = std::numeric_limits<float>::infinity(), nan = std::numeric_limits<float>::quiet_NaN();
    std::vector<float> values = {0.0f, -0.0f, 1.0f, -1.0f, inf, -inf, nan, 0x1p-149f, 3.4e38f, -3.4e38f, 0x1p126f, 0x1.8p126f, 0x1p127f};
    std::mt19937 random(4);
    while (values.size() < 32) values.push_back(std::normal_distribution<float>(0, 100)(random));
    std::vector<float> others = values;
    std::shuffle(others.begin(), others.end(), random);
    std::vector<std::uint64_t> a, b;
    for (std::size_t i = 0; i < 32; ++i)
        a.push_back(std::bit_cast<std::uint32_t>(values[i])), b.push_back(std::bit_cast<std::uint32_t>(others[i]));
    const auto got = apply(text, a, b);
    for (std::size_t i = 0; i < 32; ++i) {
        const float is = std::bit_cast<float>(low(got[i])), should = expected(values[i], others[i]);
        CAPTURE(values[i]);
        CAPTURE(others[i]);
        if (std::isnan(should))
            CHECK(std::isnan(is));
        else
            CHECK_EQ(std::bit_cast<std::uint32_t>(is), std::bit_cast<std::uint32_t>(should));
    }
}

} // namespace

TEST_CASE("whole numbers")
{
    same("add.s64 %rd10, %rd11, %rd12;", [](auto a, auto b) { return a + b; });
    same("sub.s32 %r10, %r11, %r12;", [](auto a, auto b) { return low(a - b); });
    same("mul.lo.s32 %r10, %r11, %r12;", [](auto a, auto b) { return low(a * b); });
    same("mul.hi.u32 %r10, %r11, %r12;", [](auto a, auto b) { return (a & 0xffffffff) * (b & 0xffffffff) >> 32; });
    same("mul.wide.s32 %rd10, %r11, %r12;", [](auto a, auto b) { return std::int64_t{whole(a)} * whole(b); });
    same("mad.wide.u32 %rd10, %r11, %r12, %rd12;", [](auto a, auto b) { return std::uint64_t{low(a)} * low(b) + b; });
    same("mad.lo.s32 %r10, %r11, %r12, 7;", [](auto a, auto b) { return low(a * b + 7); });
    same("shl.b32 %r10, %r11, %r12;", [](auto a, auto b) { return low(b) >= 32 ? 0u : low(a) << low(b); });
    same("shr.u64 %rd10, %rd11, %r12;", [](auto a, auto b) { return low(b) >= 64 ? 0 : a >> low(b); });
    same("shr.s32 %r10, %r11, %r12;",
         [](auto a, auto b) { return low(static_cast<std::uint64_t>(whole(a) >> (low(b) > 31 ? 31 : low(b)))); });
    same("min.s32 %r10, %r11, %r12;",
         [](auto a, auto b) { return low(static_cast<std::uint64_t>(whole(a) < whole(b) ? whole(a) : whole(b))); });
    same("max.u64 %rd10, %rd11, %rd12;", [](auto a, auto b) { return a > b ? a : b; });
    same("div.u32 %r10, %r11, %r12;", [](auto a, auto b) { return low(b) ? low(a) / low(b) : ~0u; });
    same("rem.s64 %rd10, %rd11, 7;", [](auto a, auto) { return static_cast<std::int64_t>(a) % 7; });
    same("not.b64 %rd10, %rd11;", [](auto a, auto) { return ~a; });
    same("neg.s32 %r10, %r11;", [](auto a, auto) { return low(0 - a); });
    same("popc.b64 %r10, %rd11;", [](auto a, auto) { return std::popcount(a); });
    same("clz.b32 %r10, %r11;", [](auto a, auto) { return std::countl_zero(low(a)); });
    same("bfi.b64 %rd10, %rd11, %rd12, 16, 16;", [](auto a, auto b) { return (b & ~0xffff0000ull) | (a & 0xffff) << 16; });
    same("bfe.u32 %r10, %r11, 5, 9;", [](auto a, auto) { return low(a) >> 5 & 511; });
    same("prmt.b32 %r10, %r11, %r12, 4180;", [](auto a, auto b) { // 0x1054: bytes 4, 5, 0 and 1
        return low((b & 0xff) | (b & 0xff00) | (a & 0xff) << 16 | (a & 0xff00) << 16);
    });
    same("setp.lt.s64 %p1, %rd11, %rd12;\nselp.b64 %rd10, %rd11, 5, %p1;",
         [](auto a, auto b) { return static_cast<std::int64_t>(a) < static_cast<std::int64_t>(b) ? a : 5; });
    same("setp.ne.s32 %p1, %r11, 0;\nsetp.gt.u32 %p2, %r12, 9;\nand.pred %p3, %p1, %p2;\n@%p3 bra YES;\nmov.u64 %rd10, 0;\nbra "
         "DONE;\nYES:\nmov.u64 %rd10, 1;\nDONE:\n",
         [](auto a, auto b) { return low(a) != 0 && low(b) > 9; });
}

TEST_CASE("conversions and parts of registers")
{
    same("cvt.s64.s32 %rd10, %r11;", [](auto a, auto) { return std::int64_t{whole(a)}; });
    same("cvt.s64.s32 %rd10, %rd11;", [](auto a, auto) { return std::int64_t{whole(a)}; }); // of a register that is wider
    same("mov.b32 {%rs1, %rs2}, %r11;\ncvt.u64.u16 %rd10, %rs1;", [](auto a, auto) { return a & 0xffff; });
    same("mov.b64 {%r20, %r21}, %rd11;\nmov.b64 %rd10, {%r21, %r20};", [](auto a, auto) { return a << 32 | a >> 32; });
    same("mov.b32 {%rs1, %rs2}, %r11;\nmov.b32 %r10, {%rs2, %rs1};", [](auto a, auto) { return low(a << 16 | (a >> 16 & 0xffff)); });
    same("cvt.rn.f64.s64 %fd10, %rd11;",
         [](auto a, auto) { return std::bit_cast<std::uint64_t>(static_cast<double>(static_cast<std::int64_t>(a))); });
    same("cvt.rn.f32.u32 %f10, %r11;", [](auto a, auto) { return std::bit_cast<std::uint32_t>(static_cast<float>(low(a))); });
}

TEST_CASE("real numbers")
{
    same_real("fma.rn.f32 %f10, %f11, %f12, %f11;", [](float a, float b) { return std::fma(a, b, a); });
    same_real("add.f32 %f10, %f11, %f12;", [](float a, float b) { return a + b; });
    same_real("div.rn.f32 %f10, %f11, %f12;", [](float a, float b) { return a / b; });
    same_real("max.f32 %f10, %f11, %f12;", [](float a, float b) {
        return a == b ? (std::signbit(a) ? b : a) : std::isnan(a) ? b : std::isnan(b) ? a : a > b ? a : b;
    });
    same_real("neg.f32 %f10, %f11;", [](float a, float) { return -a; });
    same_real("setp.gtu.f32 %p1, %f11, %f12;\nselp.f32 %f10, %f11, %f12, %p1;", [](float a, float b) { return !(a <= b) ? a : b; });
    same_real("setp.neu.f32 %p1, %f11, %f12;\nselp.f32 %f10, %f11, 0f3F800000, %p1;", [](float a, float b) { return a == b ? 1.0f : a; });
    // Where the reciprocal would be subnormal, the fast one gives zero.
    same_real("div.approx.f32 %f10, %f11, %f12;", [](float a, float b) {
        const bool large = std::fabs(b) > 0x1p126f && !std::isinf(b);
        return !large          ? a / b
               : std::isinf(a) ? NAN
               : std::isnan(a) ? NAN
                               : std::copysign(0.0f, std::signbit(a) == std::signbit(b) ? 1.0f : -1.0f);
    });
    same_real("cvt.rzi.s32.f32 %r10, %f11;", [](float a, float) {
        const std::int32_t v = std::isnan(a) ? 0 : a >= 0x1p31f ? INT32_MAX : a <= -0x1p31f ? INT32_MIN : static_cast<std::int32_t>(a);
        return std::bit_cast<float>(v);
    });
}

TEST_CASE("numbers of 16 and of 8 bits are the nearest, ties to even")
{
    const auto nearest = [](float a, int count, auto value) { // by looking at all of them
        int best = -1;
        double distance = INFINITY;
        for (int b = 0; b < count; ++b) {
            const double v = value(b);
            if (std::isnan(v) || std::isinf(v) || std::signbit(v) != std::signbit(a)) continue;
            const double d = std::fabs(v - static_cast<double>(a));
            if (d < distance || (d == distance && b % 2 == 0)) best = b, distance = d;
        }
        return best;
    };
    std::mt19937 random(5);
    for (int i = 0; i < 60; ++i) {
        const float a = std::ldexp(std::normal_distribution<float>(0, 1)(random), static_cast<int>(random() % 30) - 20);
        CAPTURE(a);
        CHECK_EQ(emulator::half_bits(a), nearest(a, 65536, [](int b) { return emulator::half_value(static_cast<std::uint16_t>(b)); }));
        CHECK_EQ(emulator::brain_bits(a), nearest(a, 65536, [](int b) { return emulator::brain_value(static_cast<std::uint16_t>(b)); }));
        CHECK_EQ(emulator::code_bits(a), nearest(a, 256, [](int b) { return emulator::code_value(static_cast<std::uint8_t>(b)); }));
    }
    for (int b = 0; b < 65536; ++b) { // every number is itself
        const float v = emulator::half_value(static_cast<std::uint16_t>(b));
        if (!std::isnan(v) && emulator::half_bits(v) != b) FAIL("half ", b);
    }
    CHECK_EQ(emulator::half_bits(1.0f), 0x3c00);
    CHECK_EQ(emulator::half_bits(65520.0f), 0x7c00);
    CHECK_EQ(emulator::half_bits(65519.0f), 0x7bff);
    CHECK_EQ(emulator::code_bits(1e9f), 0x7e);
    CHECK_EQ(emulator::code_value(0x7e), 448.0f);
    CHECK_EQ(emulator::brain_bits(1.0f), 0x3f80);
}

TEST_CASE("lanes of a warp exchange values")
{
    const auto shuffled = [](const char* how, const char* c) {
        const memory<std::uint32_t> to(std::vector<std::uint32_t>(32, 99));
        run(std::string("mul.lo.s32 %r2, %r1, 10;\nshfl.sync.") + how + ", " + c +
                ", -1;\nselp.b32 %r4, 0, 1000, %p1;\nadd.s32 %r3, %r3, %r4;\nmul.wide.u32 %rd5, %r1, 4;\n"
                "add.s64 %rd5, %rd1, %rd5;\nst.global.u32 [%rd5], %r3;",
            {to.address()});
        return to.values();
    };
    const auto bfly = shuffled("bfly.b32 %r3|%p1, %r2, 5", "31"), idx = shuffled("idx.b32 %r3|%p1, %r2, 3", "31"),
               up = shuffled("up.b32 %r3|%p1, %r2, 2", "0"), down = shuffled("down.b32 %r3|%p1, %r2, 4", "31"),
               parts = shuffled("idx.b32 %r3|%p1, %r2, 3", "6175"); // 0x181f: of eight lanes
    for (std::uint32_t l = 0; l < 32; ++l) {
        CHECK_EQ(bfly[l], (l ^ 5) * 10);
        CHECK_EQ(idx[l], 30);
        CHECK_EQ(up[l], l < 2 ? l * 10 + 1000 : (l - 2) * 10);
        CHECK_EQ(down[l], l + 4 > 31 ? l * 10 + 1000 : (l + 4) * 10);
        CHECK_EQ(parts[l], (l / 8 * 8 + 3) * 10);
    }
}

TEST_CASE("lanes part and meet again")
{
    // Lane l adds 1 to l, then those that ended early have waited.
    const memory<std::uint32_t> to(std::vector<std::uint32_t>(64, 99));
    run("mov.u32 %r2, 0;\nmov.u32 %r3, 0;\nAGAIN:\nadd.s32 %r3, %r3, %r2;\nadd.s32 %r2, %r2, 1;\nsetp.le.u32 %p1, %r2, %r1;\n@%p1 bra "
        "AGAIN;\nbar.warp.sync -1;\n"
        "shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;\nadd.s32 %r4, %r4, %r3;\nmul.wide.u32 %rd5, %r1, 4;\nadd.s64 %rd5, %rd1, "
        "%rd5;\nst.global.u32 [%rd5], %r4;",
        {to.address()}, {{1, 1, 1}, {64, 1, 1}, 1, 0});
    const auto sum = [](std::uint32_t l) { return l * (l + 1) / 2; };
    for (std::uint32_t l = 0; l < 64; ++l) CHECK_EQ(to[l], sum(l) + sum(l ^ 1));
}

TEST_CASE("warps of a block meet, and blocks have places of their own")
{
    const memory<std::uint32_t> to(std::vector<std::uint32_t>(3 * 96, 99));
    for (unsigned seed = 1; seed <= 20; ++seed) {
        run("mov.u32 %r2, dynamic;\nshl.b32 %r3, %r1, 2;\nadd.s32 %r4, %r2, %r3;\nmov.u32 %r5, %ctaid.x;\nmad.lo.s32 %r6, %r5, 1000, "
            "%r1;\nst.shared.u32 [%r4], %r6;\nbar.sync 0;\n"
            "sub.s32 %r7, 95, %r1;\nshl.b32 %r7, %r7, 2;\nadd.s32 %r7, %r2, %r7;\nld.shared.u32 %r8, [%r7];\nmad.lo.s32 %r9, %r5, 96, "
            "%r1;\nmul.wide.u32 %rd5, %r9, 4;\n"
            "add.s64 %rd5, %rd1, %rd5;\nst.global.u32 [%rd5], %r8;",
            {to.address()}, {{3, 1, 1}, {96, 1, 1}, 1, 384}, seed);
        for (std::uint32_t i = 0; i < 3 * 96; ++i) CHECK_EQ(to[i], i / 96 * 1000 + 95 - i % 96);
    }
}
