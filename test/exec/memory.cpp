// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The arena, whose measure is its use; the owning buffer; and memory resources from outside.
#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/core/dtype.hpp>
#include <fastmoe/exec/host_executor.hpp>
#include <fastmoe/exec/memory.hpp>

#include "support/executors.hpp"
#include "support/random.hpp"

namespace fm = fastmoe;
using std::int64_t;

// Sanitizers' own allocators then refuse an impossible size as the real one does.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }
extern "C" const char* __tsan_default_options() { return "allocator_may_return_null=1"; }

namespace {

/// Storage at the arena's alignment, with a byte to spare at either side.
struct workspace {
    explicit workspace(int64_t n) : bytes(n), memory(n + 2 * fm::memory_alignment, std::byte{0x5a})
    {
        const auto base = reinterpret_cast<std::uintptr_t>(memory.data());
        first =
            static_cast<int64_t>((base + fm::memory_alignment) / fm::memory_alignment * fm::memory_alignment - base);
    }
    fm::vector_view<std::byte> view() { return fm::vector_view<std::byte>(memory.data() + first, bytes); }
    bool intact() const
    {
        return memory[first - 1] == std::byte{0x5a} && memory[first + bytes] == std::byte{0x5a};
    }
    int64_t bytes, first;
    std::vector<std::byte> memory;
};

/// Takes some blocks; on an arena with storage, writes every element of each.
struct request {
    std::vector<std::pair<int, int64_t>> blocks; // element size, count

    void operator()(fm::arena& a) const
    {
        for (const auto& [size, count] : blocks) {
            if (size == 1) touch(a, a.vector<std::uint8_t>(count));
            if (size == 2) touch(a, a.vector<fm::half>(count));
            if (size == 4) touch(a, a.matrix<float>(count / 3, 3));
            if (size == 8) touch(a, a.vector<double>(count));
        }
    }
    template <class View>
    static void touch(const fm::arena& a, View v)
    {
        if (a.measuring()) CHECK(v.data_handle() == nullptr);
        else if (v.size() > 0)
            std::memset(static_cast<void*>(v.data_handle()), 0x77, v.size() * sizeof(*v.data_handle()));
    }
};

std::string message_of(const auto& f)
{
    try {
        f();
    } catch (const fm::error& e) {
        return e.what();
    }
    return "nothing was thrown";
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

} // namespace

TEST_CASE("an arena of exactly the measured size serves the request, and one byte less throws out_of_memory")
{
    FASTMOE_SEEDED(r, 31);
    for (int trial = 0; trial < 200; ++trial) {
        request wanted;
        for (int64_t n = r.integer(1, 8); n > 0; --n)
            wanted.blocks.push_back({r.one_of(1, 2, 4, 8), r.integer(0, 3000)});
        fm::arena measure;
        wanted(measure);
        workspace exact(measure.bytes());
        fm::arena memory(exact.view());
        wanted(memory);
        CHECK(memory.bytes() == measure.bytes());
        CHECK(memory.used() == measure.used());
        CHECK(memory.available() == 0);
        CHECK(exact.intact());
        if (measure.bytes() == 0) continue;
        workspace small(measure.bytes() - 1);
        fm::arena short_by_one(small.view());
        CHECK_THROWS_AS(wanted(short_by_one), fm::out_of_memory);
        CHECK(small.intact());
    }
}

TEST_CASE("a workspace that is too small is named with its bytes and the bytes needed")
{
    workspace w(1023);
    fm::arena a(w.view());
    a.vector<float>(64);
    const std::string text = message_of([&] { a.vector<float>(192); });
    CHECK(contains(text, "workspace is 1023; expected 1024 bytes or more"));
    CHECK(a.used() == 256);
    CHECK(a.vector<float>(128).extent(0) == 128);
    CHECK_NOTHROW(a.require(255));
    CHECK_THROWS_AS(a.require(256), fm::out_of_memory);
}

TEST_CASE("every block of an arena is aligned, inside of the storage and apart from all others")
{
    FASTMOE_SEEDED(r, 77);
    workspace w(1 << 16);
    fm::arena a(w.view());
    const std::byte* end = w.view().data_handle();
    for (int i = 0; i < 40; ++i) {
        const int64_t n = r.integer(1, 300);
        const auto v = a.vector<float>(n);
        const auto* p = reinterpret_cast<const std::byte*>(v.data_handle());
        CHECK(reinterpret_cast<std::uintptr_t>(p) % fm::memory_alignment == 0);
        CHECK(p >= end);
        end = p + n * 4;
        CHECK(end <= w.view().data_handle() + w.bytes);
    }
}

TEST_CASE("rewinding gives back what was taken since, and the peak remembers it")
{
    workspace w(2048);
    fm::arena a(w.view());
    a.vector<float>(10);
    const int64_t mark = a.used();
    const float* first = a.vector<float>(256).data_handle();
    a.rewind(mark);
    CHECK(a.vector<float>(1).data_handle() == first);
    CHECK(a.used() == 512);
    CHECK(a.bytes() == 1280);
    a.rewind(0);
    CHECK(a.available() == 2048);
    fm::arena measure;
    measure.vector<double>(100);
    measure.rewind(0);
    measure.vector<double>(10);
    CHECK(measure.bytes() == 1024);
}

TEST_CASE("a scope gives back what was taken in it and nothing else, however it ends")
{
    workspace w(4096);
    fm::arena real(w.view()), measure;
    for (fm::arena* a : {&real, &measure}) {
        a->vector<float>(10);
        {
            const fm::arena::scope outer(*a);
            a->vector<float>(64);
            {
                const fm::arena::scope inner(*a);
                a->vector<float>(128);
                CHECK(a->used() == 1024);
            }
            CHECK(a->used() == 512);
        }
        CHECK(a->used() == 256);
        const auto fails = [&] {
            const fm::arena::scope lent(*a);
            a->vector<float>(512);
            a->vector<float>(-1);
        };
        CHECK_THROWS_AS(fails(), fm::invalid_argument);
        CHECK(a->used() == 256);
        CHECK(a->bytes() == 256 + 2048);
    }
}

TEST_CASE("negative extents and sizes that overflow are refused by measuring and by real arenas")
{
    workspace w(256);
    fm::arena real(w.view()), measure;
    for (fm::arena* a : {&real, &measure}) {
        CHECK_THROWS_AS(a->vector<float>(-1), fm::invalid_argument);
        CHECK_THROWS_AS(a->matrix<float>(2, -3), fm::invalid_argument);
        CHECK_THROWS_AS(a->matrix<float>(-2, 0), fm::invalid_argument);
        CHECK_THROWS_AS(a->vector<double>(INT64_MAX), fm::invalid_argument);
        CHECK_THROWS_AS(a->matrix<double>(INT64_MAX / 2, 3), fm::invalid_argument);
        CHECK_THROWS_AS(a->matrix<double>(int64_t{1} << 32, int64_t{1} << 32), fm::invalid_argument);
        CHECK(a->used() == 0);
        CHECK(a->matrix<float>(0, INT64_MAX).extent(1) == INT64_MAX);
        CHECK(a->matrix<float>(INT64_MAX, 0).extent(0) == INT64_MAX);
    }
    CHECK(contains(message_of([&] { measure.vector<float>(-7); }), "extent is -7; expected zero or more"));
}

TEST_CASE("a sum of blocks that overflows is refused, not wrapped around")
{
    fm::arena measure;
    const auto take = [&] {
        for (int i = 0; i < 5; ++i) measure.vector<std::uint8_t>(INT64_MAX / 4);
    };
    CHECK_THROWS_AS(take(), fm::invalid_argument);
    CHECK(measure.used() > 0);
}

TEST_CASE("a misaligned workspace and one without memory are refused, an empty one serves requests for nothing")
{
    workspace w(1024);
    const fm::vector_view<std::byte> odd(w.view().data_handle() + 64, 512);
    CHECK(contains(message_of([&] { fm::arena a(odd); }), "expected a pointer aligned to 256 bytes"));
    CHECK(contains(message_of([&] { fm::arena a(fm::vector_view<std::byte>(nullptr, 512)); }),
                   "workspace is a null pointer; expected 512 bytes of memory"));
    CHECK_THROWS_AS(fm::arena(fm::vector_view<std::byte>(nullptr, -1)), fm::invalid_argument);
    fm::arena nothing(fm::vector_view<std::byte>(nullptr, 0));
    CHECK_FALSE(nothing.measuring());
    CHECK(nothing.vector<float>(0).extent(0) == 0);
    CHECK_THROWS_AS(nothing.vector<float>(1), fm::out_of_memory);
}

namespace {

/// Counts what an executor takes and gives back, with its size.
struct counting_resource final : fm::memory_resource {
    void* allocate(int64_t bytes) override
    {
        if (bytes > limit) throw fm::out_of_memory("counting_resource: " + std::to_string(bytes));
        void* p = heap.allocate(bytes);
        live[p] = bytes;
        ++taken;
        return p;
    }
    void deallocate(void* p, int64_t bytes) noexcept override
    {
        matched = matched && live.count(p) && live[p] == bytes;
        live.erase(p);
        heap.deallocate(p, bytes);
    }
    fm::host_memory heap;
    std::map<void*, int64_t> live;
    int64_t limit = INT64_MAX, taken = 0;
    bool matched = true;
};

} // namespace

TEST_CASE("a buffer takes its memory from the executor's resource and gives all of it back")
{
    counting_resource memory;
    {
        fm::host_executor ex({.threads = 2, .memory = &memory});
        fm::buffer<float, fm::host_executor> a(ex, 100);
        CHECK(memory.live.size() == 1);
        CHECK(memory.live[a.data()] == 400);
        CHECK(reinterpret_cast<std::uintptr_t>(a.data()) % fm::memory_alignment == 0);
        fm::buffer<float, fm::host_executor> b(std::move(a));
        CHECK(a.data() == nullptr);
        CHECK(a.size() == 0);
        CHECK(b.size() == 100);
        fm::buffer<float, fm::host_executor> c(ex, 7);
        c = std::move(b);
        CHECK(c.size() == 100);
        const fm::buffer<float, fm::host_executor> none(ex, 0);
        CHECK(none.data() == nullptr);
        CHECK(memory.taken == 2);
    }
    CHECK(memory.live.empty());
    CHECK(memory.matched);
}

TEST_CASE("a resource that has no more memory makes the buffer throw, and nothing leaks")
{
    counting_resource memory;
    memory.limit = 1000;
    fm::host_executor ex({.threads = 1, .memory = &memory});
    using bytes = fm::buffer<std::uint8_t, fm::host_executor>;
    CHECK_NOTHROW(bytes(ex, 1000));
    CHECK_THROWS_AS(bytes(ex, 1001), fm::out_of_memory);
    CHECK(memory.live.empty());
    fm::host_executor real({.threads = 1});
    const std::string text = message_of([&] { bytes(real, INT64_MAX / 8); });
    CHECK(contains(text, "allocation is " + std::to_string(INT64_MAX / 8)));
}

TEST_CASE_TEMPLATE("a buffer refuses negative and overflowing sizes, and matrices that it cannot hold", Cell,
                   FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    using floats = fm::buffer<float, typename Cell::executor>;
    const volatile int64_t most = INT64_MAX / 2; // g++ 12 warns of memory that is never asked for, if it knows the number
    CHECK_THROWS_AS(floats(ex, -1), fm::invalid_argument);
    CHECK_THROWS_AS(floats(ex, most), fm::invalid_argument);
    floats b(ex, 12);
    CHECK(b.matrix(3, 4).extent(1) == 4);
    CHECK(b.matrix(2, 2).data_handle() == b.data());
    CHECK_THROWS_AS(b.matrix(3, 5), fm::invalid_argument);
    CHECK_THROWS_AS(b.matrix(-3, -4), fm::invalid_argument);
    CHECK_THROWS_AS(b.matrix(int64_t{1} << 32, int64_t{1} << 32), fm::invalid_argument);
}
