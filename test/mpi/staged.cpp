// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Processes whose executor has memory that the host cannot read: staged, or handed to MPI where it lies. Part of the
/// program of collectives.cpp.
#include <doctest/doctest.h>

#include <cstdint>
#include <string>
#include <vector>

#include <fastmoe/comm/hierarchical.hpp>
#include <fastmoe/comm/staged.hpp>

#include "support/communicator_cases.hpp"
#include "support/queued.hpp"
#include "support/scratch.hpp"
#include "world.hpp"

namespace fm = fastmoe;
using fm::int64_t;
using support::queued;

namespace {

/// A device whose memory MPI reaches, though no loop of the host may be thought to: what is queued runs later.
struct reached : queued {
    void* allocate(int64_t bytes) { return heap.allocate(bytes); }
    void deallocate(void* memory, int64_t bytes) noexcept { heap.deallocate(memory, bytes); }
    fm::host_memory heap;
};
static_assert(!fm::has_readable_memory<reached> && !fm::reached_by_mpi<reached>);
static_assert(fm::reaches_devices<fm::mpi> && !fm::reaches_devices<fm::self>);
static_assert(fm::communicator<fm::staged<fm::mpi>, queued>);

fm::host_memory heap;

/// Rows of so many elements between all ranks: more of them than travel with a head.
template <class C, class Executor>
void long_rows(const C& c, Executor& ex, int64_t rows, int64_t width)
{
    const int ranks = c.size();
    const std::vector<int64_t> counts(static_cast<std::size_t>(ranks), rows);
    auto from = support::upload(ex, support::values_of<float>(c.rank(), ranks * rows * width));
    fm::buffer<float, Executor> to(ex, ranks * rows * width);
    c.all_to_all_v(ex, from.matrix(ranks * rows, width), fm::as_vector(counts), to.matrix(ranks * rows, width),
                   fm::as_vector(counts));
    const int64_t block = rows * width;
    support::is(ex, to.view(), [&](int64_t i) {
        return support::value_of<float>(static_cast<int>(i / block), c.rank() * block + i % block);
    });
}

} // namespace

TEST_CASE_TEMPLATE("staged, each collective is its definition, in whole and in parts", T, float, fm::bfloat16, std::int64_t,
                   std::byte)
{
    for (int64_t bytes : {int64_t{1} << 22, int64_t{20000}}) {
        const fm::staged s(support::mpi_world(), bytes, heap);
        queued ex;
        for (int64_t n : {0, 3, 3000}) support::all_collectives<T>(s, ex, n);
        FASTMOE_SEEDED(rng, 76);
        for (int i = 0; i < 4; ++i) support::all_rows<T>(s, ex, support::random(rng.bits()), 13);
        if constexpr (std::is_same_v<T, float>) long_rows(s, ex, 300, 50);
    }
}

TEST_CASE("staged over two levels of MPI, each collective is its definition")
{
    const auto& world = support::mpi_world();
    if (world.size() % 2) return;
    const fm::staged s(fm::make_hierarchical(world, 2), 1 << 16, heap);
    queued ex;
    for (int64_t n : {1, 3000}) support::all_collectives<float>(s, ex, n);
    support::all_rows<float>(s, ex, support::random(77), 9);
}

TEST_CASE_TEMPLATE("rows that go directly arrive in whole, and what is added is staged all the same", T, float, fm::half,
                   std::int32_t, std::byte)
{
    alignas(256) static std::byte memory[4096];
    const auto bytes = fm::vector_view<std::byte>(memory, 4096);
    const fm::staged s(support::mpi_world(), bytes, {.rows = fm::direct_rows::always});
    reached ex;
    for (int64_t n : {0, 3, 3000}) support::all_collectives<T>(s, ex, n);
    FASTMOE_SEEDED(rng, 78);
    for (int i = 0; i < 6; ++i) support::all_rows<T>(s, ex, support::random(rng.bits()), 13);
    std::memset(memory, 0xff, sizeof memory); // nothing of these passes through it
    long_rows(s, ex, 300, 50);
    fm::buffer<float, reached> own(ex, 2000), all(ex, 2000 * s.size());
    s.all_gather(ex, own.view(), all.view());
    CHECK_EQ(support::poisoned(bytes), 4096);
}

TEST_CASE("MPI is asked whether it reaches devices, and one rank that does not keeps all from it")
{
    const auto& world = support::mpi_world();
    // The MPI of this machine may; then pointers of `queued` would end the program here, as they should not.
    if (!fm::mpi::reaches_devices()) {
        const fm::staged asked(world, 1 << 16, heap);
        queued ex;
        support::all_collectives<float>(asked, ex, 1000);
    }
    const bool last = world.rank() == world.size() - 1;
    const fm::staged s(world, 1 << 16, heap, {.rows = last ? fm::direct_rows::never : fm::direct_rows::always});
    queued ex; // whose memory ends the program that touches it
    support::all_collectives<float>(s, ex, 1000);
    long_rows(s, ex, 20, 100);
}

TEST_CASE("a rank whose rows are on the host disagrees with ranks whose rows are on a device")
{
    const auto& world = support::mpi_world();
    if (world.size() == 1) return;
    reached ex;
    fm::unstaged<reached> direct(ex);
    auto host = support::executor_of_rank<fm::host_executor>();
    std::vector<float> own(5), all(5 * static_cast<std::size_t>(world.size()));
    const std::string told = support::message_of<fm::comm_error>([&] {
        if (world.rank() == 1) world.all_gather(host, fm::as_vector(own), fm::as_vector(all));
        else world.all_gather(direct, fm::as_vector(own), fm::as_vector(all));
    });
    INFO(told);
    CHECK(support::has(told, "device gather: the collective of rank 1 is all_gather; expected device gather, as on rank 0"));
    support::all_collectives<float>(world, host, 10);
}

TEST_CASE("an executor whose memory MPI is handed is sent from once its queue has been waited for")
{
    const auto& world = support::mpi_world();
    reached ex;
    fm::unstaged<reached> direct(ex);
    fm::buffer<float, reached> own(ex, 3000), all(ex, 3000 * world.size());
    struct fill {
        float* to;
        float first;
        void operator()(int64_t i) const { to[i] = first + static_cast<float>(i); }
    };
    for (int step = 0; step < 3; ++step) {
        fm::for_each(ex, 3000, fill{own.data(), static_cast<float>(10000 * world.rank() + step)});
        world.all_gather(direct, own.view(), all.view());
        support::is(ex, all.view(), [&](int64_t i) {
            return static_cast<float>(10000 * (i / 3000) + step + i % 3000);
        });
    }
    auto root = support::upload(ex, support::values_of<double>(world.rank(), 40000)); // in two steps
    world.broadcast(direct, root.view(), world.size() - 1);
    support::is(ex, root.view(), [&](int64_t i) { return support::value_of<double>(world.size() - 1, i); });
}
