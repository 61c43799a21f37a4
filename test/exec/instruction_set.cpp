// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Conversions in loops that the compiler vectorizes: the same bits as one by one, with every instruction set.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <initializer_list>
#include <string>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/exec/instruction_set.hpp>

#include "support/random.hpp"

namespace fm = fastmoe;
using fm::instruction_set;
using std::int64_t;

namespace {

template <class To, class From>
struct convert {
    const From* x; // (n)
    To* y;         // (n)
    using vectorized = void;
    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { y[i] = To(x[i]); }
};

template <class To, class From>
std::vector<To> converted(int level, const std::vector<From>& x)
{
    fm::host_executor ex({.threads = 1, .best = static_cast<instruction_set>(level)});
    std::vector<To> y(x.size());
    fm::for_each(ex, static_cast<int64_t>(x.size()), convert<To, From>{x.data(), y.data()});
    return y;
}

} // namespace

TEST_CASE_TEMPLATE("every 16-bit pattern widens in a loop to what it widens to alone", T, fm::half, fm::bfloat16)
{
    std::vector<T> x(65536);
    for (int b = 0; b < 65536; ++b) x[b].bits = static_cast<std::uint16_t>(b);
    for (int level = 0; level <= static_cast<int>(fm::native_instruction_set()); ++level) {
        const std::vector<float> y = converted<float>(level, x);
        int wrong = 0;
        for (int b = 0; b < 65536; ++b) {
            const volatile std::uint16_t bits = x[b].bits; // keeps this loop scalar
            T alone;
            alone.bits = bits;
            const float expected = alone;
            wrong += std::isnan(expected) ? !std::isnan(y[b]) : std::memcmp(&expected, &y[b], sizeof expected) != 0;
        }
        INFO("level ", level);
        CHECK(wrong == 0);
    }
}

TEST_CASE_TEMPLATE("floats of every size narrow in a loop to what they narrow to alone", T, fm::half, fm::bfloat16)
{
    FASTMOE_SEEDED(r, 8);
    std::vector<float> x;
    for (std::uint64_t bits = 0; bits < (std::uint64_t{1} << 32); bits += 8191) {
        const auto word = static_cast<std::uint32_t>(bits);
        float v;
        std::memcpy(&v, &word, sizeof v);
        x.push_back(v);
    }
    for (int i = 0; i < 300000; ++i)
        x.push_back(static_cast<float>(std::ldexp(r.uniform(-1, 1), static_cast<int>(r.integer(-28, 17)))));
    for (int level = 0; level <= static_cast<int>(fm::native_instruction_set()); ++level) {
        const std::vector<T> y = converted<T>(level, x);
        int wrong = 0;
        for (std::size_t i = 0; i < x.size(); ++i) {
            const volatile float alone = x[i];
            const T expected(alone);
            wrong += std::isnan(x[i]) ? !std::isnan(static_cast<float>(y[i])) : expected.bits != y[i].bits;
        }
        INFO("level ", level);
        CHECK(wrong == 0);
    }
}

TEST_CASE("the machine's level is the best one all of whose instructions the system lists")
{
    std::ifstream file("/proc/cpuinfo");
    std::string line, flags;
    while (flags.empty() && std::getline(file, line))
        if (line.rfind("flags", 0) == 0) flags = line.substr(line.find(':') + 1) + " ";
    if (flags.empty()) {
        MESSAGE("skipped: no list of x86 instructions in /proc/cpuinfo");
        return;
    }
    const auto all = [&](std::initializer_list<const char*> names) {
        for (const char* name : names)
            if (flags.find(" " + std::string(name) + " ") == std::string::npos) return false;
        return true;
    };
    const bool avx2 = all({"avx2", "fma", "f16c"}), avx512 = avx2 && all({"avx512f", "avx512bw", "avx512dq", "avx512vl"});
    const auto expected = avx512 && all({"avx512_bf16"}) ? instruction_set::avx512_bf16
                          : avx512                       ? instruction_set::avx512
                          : avx2                         ? instruction_set::avx2
                                                         : instruction_set::baseline;
    CHECK(std::string(fm::name_of(fm::native_instruction_set())) == fm::name_of(expected));
#if FASTMOE_X86_DISPATCH
    CHECK(fm::detail::has_f16c() == all({"f16c"}));
#endif
}
