// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What every communicator has to do, whatever carries its messages: called by each rank, which checks what it has got.
#pragma once

#include <doctest/doctest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include <fastmoe/comm/communicator.hpp>

#include "compare.hpp"
#include "executors.hpp"
#include "poison.hpp"
#include "random.hpp"

namespace support {

namespace fm = fastmoe;
using fm::int64_t;

template <class Executor>
Executor executor_of_rank()
{
    if constexpr (std::is_same_v<Executor, fm::host_executor>) return fm::host_executor({.threads = 1});
    else return Executor();
}

/// What rank r holds at i: different everywhere, exact in every type, small enough that sums are exact too.
template <class T>
T value_of(int rank, int64_t i)
{
    const auto n = static_cast<int>((rank * 37 + i * 11) % 23) - (std::is_same_v<T, std::byte> ? 0 : 9);
    if constexpr (std::is_same_v<T, std::byte>) return static_cast<std::byte>(n);
    else if constexpr (std::is_integral_v<T>) return static_cast<T>(n);
    else return narrow<T>(n);
}

template <class T>
std::vector<T> values_of(int rank, int64_t n)
{
    std::vector<T> out;
    for (int64_t i = 0; i < n; ++i) out.push_back(value_of<T>(rank, i));
    return out;
}

template <class T>
bool same(const T& a, const T& b)
{
    return std::memcmp(&a, &b, sizeof(T)) == 0;
}

/// Every element of the result is expected(i).
template <class Executor, class T, class F>
void is(Executor& ex, fm::vector_view<T> result, F expected)
{
    const auto got = download(ex, result);
    int64_t wrong = 0;
    for (int64_t i = 0; i < result.extent(0); ++i) wrong += !same<T>(got[i], expected(i));
    CHECK_EQ(wrong, 0);
}

/// Each collective against its definition.
template <class T, class C, class Executor>
void all_collectives(const C& c, Executor& ex, int64_t n)
{
    const int me = c.rank(), ranks = c.size();
    const auto own = upload(ex, values_of<T>(me, ranks * n));
    fm::buffer<T, Executor> out(ex, ranks * n);
    const auto fresh = [&](int64_t count) {
        on_host(ex, [&] { poison(out.view()); });
        return fm::slice(out.view(), 0, count);
    };
    c.all_gather(ex, fm::slice(own.view(), 0, n), fresh(ranks * n));
    is(ex, out.view(), [&](int64_t i) { return value_of<T>(static_cast<int>(i / n), i % n); });

    c.all_to_all(ex, own.view(), fresh(ranks * n));
    is(ex, out.view(), [&](int64_t i) { return value_of<T>(static_cast<int>(i / n), me * n + i % n); });

    for (int root = 0; root < ranks; ++root) {
        auto mine = upload(ex, values_of<T>(me, n));
        c.broadcast(ex, mine.view(), root);
        is(ex, mine.view(), [&](int64_t i) { return value_of<T>(root, i); });
    }
    if constexpr (!std::is_same_v<T, std::byte>) {
        const auto sum = [&](int64_t i) {
            double total = 0;
            for (int r = 0; r < ranks; ++r) total += double(value_of<T>(r, i));
            if constexpr (std::is_integral_v<T>) return static_cast<T>(total);
            else return narrow<T>(total);
        };
        auto mine = upload(ex, values_of<T>(me, n));
        c.all_reduce(ex, mine.view());
        is(ex, mine.view(), sum);
        c.reduce_scatter(ex, own.view(), fresh(n));
        is(ex, fm::slice(out.view(), 0, n), [&](int64_t i) { return sum(me * n + i); });
    }
    c.barrier(ex);
}

/// Rows of random counts, which every rank draws alike; rows past them and guards stay.
template <class T, class C, class Executor>
void all_rows(const C& c, Executor& ex, random rng, int64_t width)
{
    const int me = c.rank(), ranks = c.size();
    std::vector<std::vector<int64_t>> count(ranks, std::vector<int64_t>(ranks));
    for (auto& row : count)
        for (auto& n : row) n = rng.coin(0.3) ? 0 : rng.integer(1, 40);
    int64_t out_rows = rng.integer(0, 2), in_rows = rng.integer(0, 2);
    std::vector<int64_t> in;
    for (int r = 0; r < ranks; ++r) out_rows += count[me][r], in_rows += count[r][me], in.push_back(count[r][me]);
    const auto sent = upload(ex, values_of<T>(me, out_rows * width));
    guarded<T> received(in_rows, width);
    c.all_to_all_v(ex, fm::matrix_view<const T>(sent.data(), out_rows, width), fm::as_vector(count[me]), received.view(),
                   fm::as_vector(in));
    int64_t at = 0, wrong = 0;
    for (int r = 0; r < ranks; ++r) {
        int64_t before = 0;
        for (int other = 0; other < me; ++other) before += count[r][other];
        for (int64_t i = 0; i < count[r][me] * width; ++i, ++at)
            wrong += !same(received.data()[at], value_of<T>(r, before * width + i));
    }
    CHECK_EQ(wrong, 0);
    for (; at < in_rows * width; ++at) CHECK(is_poison(received.data()[at]));
    CHECK_EQ(received.damage(), "");
}

/// Calls says(body, text) for each way in which three ranks can disagree: body(c, ex, a, b) is what a rank does, with 12 floats
/// and 36; text is what every rank is to be told.
template <class C, class Executor = fm::host_executor, class Says>
void disagreements(const Says& says)
{
    using floats = std::vector<float>&;
    using host = Executor;
    const auto head = [](std::vector<float>& v, int64_t n) { return fm::slice(fm::as_vector(v), 0, n); };
    says([&](auto& c, host& ex, floats a, floats) { c.all_reduce(ex, head(a, c.rank() == 2 ? 5 : 4)); },
         "all_reduce: values (N) of rank 2 is 5; expected 4, as on rank 0");
    const auto gather = [&](auto& c, host& ex, floats a, floats b, int64_t n) {
        c.all_gather(ex, head(a, n), head(b, 3 * n));
    };
    const auto exchange = [&](auto& c, host& ex, floats a, floats b, int64_t n) {
        c.all_to_all(ex, head(a, n), head(b, n));
    };
    const auto scatter = [&](auto& c, host& ex, floats a, floats b, int64_t n) {
        c.reduce_scatter(ex, head(a, 3 * n), head(b, n));
    };
    says([&](auto& c, host& ex, floats a, floats b) { gather(c, ex, a, b, c.rank() ? 2 : 3); },
         "all_gather: sent (N) of rank 1 is 2; expected 3, as on rank 0");
    says([&](auto& c, host& ex, floats a, floats b) { exchange(c, ex, a, b, c.rank() ? 6 : 9); },
         "all_to_all: a block of sent (R*N) of rank 1 is 2; expected 3, as on rank 0");
    says([&](auto& c, host& ex, floats a, floats b) { scatter(c, ex, a, b, c.rank() ? 2 : 3); },
         "reduce_scatter: received (N) of rank 1 is 2; expected 3, as on rank 0");
    says([&](auto& c, host& ex, floats a, floats) { c.broadcast(ex, head(a, 4), c.rank() == 1); },
         "broadcast: root of rank 1 is 1; expected 0, as on rank 0");
    says([&](auto& c, host& ex, floats a, floats) {
             if (c.rank() == 1) c.barrier(ex);
             else c.broadcast(ex, head(a, 4), 0);
         },
         "broadcast: the collective of rank 1 is barrier; expected broadcast, as on rank 0");
    says([&](auto& c, host& ex, floats a, floats) {
             std::vector<double> d(4);
             if (c.rank() == 2) c.all_reduce(ex, fm::as_vector(d));
             else c.all_reduce(ex, head(a, 4));
         },
         "all_reduce: the element type of rank 2 is float64; expected float32, as on rank 0");
    const auto rows = [](const C& c, host& ex, floats a, floats b, int64_t width, std::vector<int64_t> out,
                         std::vector<int64_t> in) {
        c.all_to_all_v(ex, fm::matrix_view<const float>(a.data(), 12 / width, width), fm::as_vector(out),
                       fm::matrix_view<float>(b.data(), 36 / width, width), fm::as_vector(in));
    };
    says([&](auto& c, host& ex, floats a, floats b) { rows(c, ex, a, b, c.rank() ? 2 : 3, {1, 1, 1}, {1, 1, 1}); },
         "all_to_all_v: the width D of rank 1 is 2; expected 3, as on rank 0");
    says([&](auto& c, host& ex, floats a, floats b) { rows(c, ex, a, b, 2, {1, 1, c.rank() == 1 ? 2 : 1}, {1, 1, 1}); },
         "all_to_all_v: received_rows(1) of rank 2 is 1; expected 2, as sent_rows(2) of rank 1");
}

} // namespace support

#define FASTMOE_ELEMENTS FASTMOE_DTYPES, std::int32_t, std::int64_t, std::byte
