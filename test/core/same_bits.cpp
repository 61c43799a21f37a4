// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// CUDA's half types, and one of a user, as scalars of the library: the same numbers in the same memory.
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/core/same_bits.hpp>
#include <fastmoe/exec/host_executor.hpp>

#if __has_include(<cuda_bf16.h>) && __has_include(<cuda_fp16.h>)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define CUDA_TYPES __nv_bfloat16, __half,
#else
#define CUDA_TYPES
#endif

namespace fm = fastmoe;
using std::int64_t;

namespace user {
/// As a framework might have it.
struct bf16 {
    std::uint16_t x;
    explicit bf16(float value) : x(fm::bfloat16(value).bits) {}
    bf16() = default;
    explicit operator float() const
    {
        fm::bfloat16 b;
        b.bits = x;
        return b;
    }
};
} // namespace user

template <>
struct fastmoe::same_bits<user::bf16> {
    using type = fastmoe::bfloat16;
};

namespace {

template <class T>
struct add_half {
    fm::matrix_view<const T> x; // (rows,n)
    fm::matrix_view<T> y;       // (rows,n)
    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t row) const
    {
        team.for_each(x.extent(1), [&](int64_t i) { y(row, i) = T(x(row, i) + 0.5f); });
    }
};

} // namespace

TEST_CASE_TEMPLATE("every bit pattern is the same number under either name", Foreign, CUDA_TYPES user::bf16)
{
    std::vector<Foreign> foreign(65536);
    for (int b = 0; b < 65536; ++b) {
        const auto bits = static_cast<std::uint16_t>(b);
        std::memcpy(static_cast<void*>(&foreign[b]), &bits, 2);
    }
    const auto view = fm::as_scalars(fm::as_vector(foreign));
    static_assert(std::is_same_v<decltype(view(0)), typename fm::same_bits<Foreign>::type&>);
    CHECK(static_cast<const void*>(view.data_handle()) == foreign.data());
    int wrong = 0;
    for (int b = 0; b < 65536; ++b) {
        const float here = view(b), there = static_cast<float>(foreign[b]);
        wrong += !(here == there || (here != here && there != there));
    }
    CHECK(wrong == 0);
}

TEST_CASE_TEMPLATE("work through the views is seen through the other name, and the other way round", Foreign, CUDA_TYPES user::bf16)
{
    using T = typename fm::same_bits<Foreign>::type;
    for (const int threads : {1, 2}) {
        fm::host_executor ex({.threads = threads});
        for (const int64_t rows : {1, 50}) {
            std::vector<Foreign> x(rows * 64), y(rows * 64, Foreign(-1.0f));
            for (int round = 0; round < 3; ++round) {
                for (auto& v : x) v = Foreign(static_cast<float>(round));
                const std::vector<Foreign>& read = x;
                const auto from = fm::as_scalars(fm::as_matrix(read, rows, 64));
                static_assert(std::is_same_v<decltype(from), const fm::matrix_view<const T>>);
                fm::for_each_row(ex, rows, add_half<T>{from, fm::as_scalars(fm::as_matrix(y, rows, 64))}, {.width = 64});
                int wrong = 0;
                for (const auto& v : y) wrong += static_cast<float>(v) != static_cast<float>(round) + 0.5f;
                CHECK(wrong == 0);
            }
        }
    }
}

TEST_CASE("only types that are said to have the same bits are taken")
{
    static_assert(!fm::has_same_bits<float> && !fm::has_same_bits<std::uint16_t> && !fm::has_same_bits<fm::half>);
    static_assert(fm::has_same_bits<const user::bf16>);
    const user::bf16* none = nullptr;
    CHECK(fm::as_scalars(none) == nullptr);
}
