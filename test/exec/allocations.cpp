// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The executor's loops allocate nothing: what a verb allocates is its own.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/exec/host_executor.hpp>

#include "support/allocations.hpp"
#include "support/skip.hpp"

namespace fm = fastmoe;
using std::int64_t;

namespace {

struct add_one {
    float* y;
    using vectorized = void;
    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { y[i] += 1; }
};
struct add_row {
    float* y;
    int64_t n;
    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t row) const
    {
        float* at = y + row * n;
        team.for_each(n, [at](int64_t i) { at[i] += 1; });
    }
};

} // namespace

TEST_CASE("the counter sees every form of operator new")
{
    // Called by name: the compiler may leave out a new-expression that nothing looks at.
    const support::allocations before;
    ::operator delete(::operator new(8));
    ::operator delete[](::operator new[](24));
    ::operator delete(::operator new(64, std::align_val_t{256}), std::align_val_t{256});
    ::operator delete[](::operator new[](64, std::align_val_t{64}), std::align_val_t{64});
    ::operator delete(::operator new(64, std::nothrow));
    ::operator delete(::operator new(64, std::align_val_t{256}, std::nothrow), std::align_val_t{256});
    CHECK(before.since() == 6);
}

TEST_CASE("the counter sees malloc and its kin apart from operator new, from libraries too")
{
    if (!support::counts_malloc) FASTMOE_SKIP("a sanitizer has replaced malloc");
    const support::allocations before;
    void* volatile p = std::malloc(8); // volatile: the compiler may leave out what nothing looks at
    p = std::realloc(p, 100);
    std::free(p);
    p = std::calloc(2, 4);
    std::free(p);
    p = std::aligned_alloc(64, 128);
    std::free(p);
    void* aligned = nullptr;
    CHECK(::posix_memalign(&aligned, 256, 1000) == 0);
    CHECK(reinterpret_cast<std::uintptr_t>(aligned) % 256 == 0);
    std::free(aligned);
    const auto five = before.mallocs();
    std::free(::strdup("by the C library"));
    const auto six = before.mallocs();
    ::operator delete(::operator new(8));
    const auto still_six = before.mallocs();
    CHECK(five == 5);
    CHECK(six == 6);
    CHECK(still_six == 6);
    CHECK(before.since() == 1);
}

TEST_CASE("parallel loops over elements, rows and tasks allocate nothing")
{
    for (const int threads : {1, 2, 4}) {
        fm::host_executor ex({.threads = threads});
        std::vector<float> y(1 << 16, 0.0f);
        const support::allocations before;
        for (int round = 0; round < 20; ++round) {
            fm::for_each(ex, 1 << 16, add_one{y.data()});
            fm::for_each_row(ex, 256, add_row{y.data(), 256}, {.width = 256, .scratch_bytes = 1024});
            ex.for_each_task(16, [&](int, int64_t t) { y[t] += 1; });
            ex.synchronize();
        }
        CHECK(before.since() == 0);
        CHECK(y[0] == 60);
        CHECK(y[20] == 40);
    }
}

TEST_CASE("a workspace is taken apart without allocating")
{
    std::vector<std::byte> memory(4096 + 256);
    const auto at = reinterpret_cast<std::uintptr_t>(memory.data());
    const fm::vector_view<std::byte> storage(memory.data() + (256 - at % 256) % 256, 4096);
    const support::allocations before;
    fm::arena measure, real(storage);
    for (fm::arena* a : {&measure, &real}) {
        a->vector<float>(100);
        a->matrix<double>(10, 10);
    }
    CHECK(before.since() == 0);
    CHECK(real.bytes() == measure.bytes());
}
