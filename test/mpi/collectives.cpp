// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Started by mpirun with 1, 2 and 4 ranks; every rank runs every case and checks what it has got.
#include <doctest/doctest.h>

#include <chrono>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include <fastmoe/comm/threads.hpp>

#include "support/communicator_cases.hpp"
#include "support/scratch.hpp"
#include "world.hpp"

namespace fm = fastmoe;
using fm::int64_t;

template <>
inline constexpr bool fastmoe::reached_by_mpi<support::lanes> = true;

static_assert(fm::communicator<fm::mpi, fm::host_executor>);
static_assert(fm::communicator<fm::mpi, support::lanes>);
static_assert(fm::sums_over_ranks<fm::mpi, fm::host_executor, double>);
static_assert(fm::exchanges_rows<fm::mpi, fm::host_executor, fm::bfloat16>);
static_assert(fm::exchanges_blocks<fm::mpi, fm::host_executor, std::byte>);

namespace {

/// What a rank is told; empty if nothing was thrown.
template <class Body>
std::string told(const Body& body)
{
    try {
        body();
    } catch (const fm::comm_error& e) {
        return e.what();
    }
    return "";
}

/// Values of all ranks, which every rank draws alike.
template <class T>
std::vector<std::vector<T>> values_of_all(std::uint64_t seed, int ranks, int64_t n)
{
    support::random rng(seed);
    std::vector<std::vector<T>> out(static_cast<std::size_t>(ranks));
    for (auto& v : out) v = support::normal_vector<T>(rng, n, 100);
    return out;
}

} // namespace

TEST_CASE_TEMPLATE("each collective is its definition, for every element type, short and long", T, FASTMOE_ELEMENTS)
{
    const fm::mpi& c = support::mpi_world();
    {
        auto ex = support::executor_of_rank<fm::host_executor>();
        for (int64_t n : {0, 1, 3, 700, 5000, 70001}) support::all_collectives<T>(c, ex, n);
    }
    auto ex = support::executor_of_rank<support::lanes>();
    for (int64_t n : {2, 3000}) support::all_collectives<T>(c, ex, n);
}

TEST_CASE("sums that do not fit into the staging memory are added piece by piece")
{
    const fm::mpi& c = support::mpi_world();
    fm::host_executor ex({.threads = 2});
    support::all_collectives<double>(c, ex, 1500001);
}

TEST_CASE_TEMPLATE("all_to_all_v moves rows of random counts, zero among them, and leaves the rest alone", T, FASTMOE_ELEMENTS)
{
    FASTMOE_SEEDED(rng, 71);
    auto ex = support::executor_of_rank<fm::host_executor>();
    for (int i = 0; i < 8; ++i) {
        const auto seed = rng.bits();
        for (int64_t width : {1, 17, 0, 900}) support::all_rows<T>(support::mpi_world(), ex, support::random(seed), width);
    }
}

TEST_CASE_TEMPLATE("sums have the bits that ranks in threads get", T, double, float, fm::bfloat16, fm::half)
{
    const fm::mpi& c = support::mpi_world();
    const int ranks = c.size();
    for (int64_t n : {5, 333, 40000, 700003}) {
        const int64_t block = n / ranks;
        const auto values = values_of_all<T>(72 + static_cast<std::uint64_t>(n), ranks, n);
        std::vector<T> all, part;
        fm::run_ranks(ranks, [&](const fm::threads& t) {
            fm::host_executor ex({.threads = 1});
            auto mine = values[static_cast<std::size_t>(t.rank())];
            std::vector<T> out(static_cast<std::size_t>(block));
            t.reduce_scatter(ex, fm::slice(fm::as_vector(mine), 0, ranks * block), fm::as_vector(out));
            t.all_reduce(ex, fm::as_vector(mine));
            if (t.rank() == c.rank()) all = mine, part = out;
        });
        fm::host_executor ex({.threads = 1 + c.rank()}); // whatever the threads
        auto mine = values[static_cast<std::size_t>(c.rank())];
        std::vector<T> out(static_cast<std::size_t>(block));
        c.reduce_scatter(ex, fm::slice(fm::as_vector(mine), 0, ranks * block), fm::as_vector(out));
        c.all_reduce(ex, fm::as_vector(mine));
        CHECK(support::same_bits(mine, all));
        CHECK(support::same_bits(out, part));
    }
}

TEST_CASE("a thousand exchanges of random counts lose nothing")
{
    const fm::mpi& c = support::mpi_world();
    auto ex = support::executor_of_rank<fm::host_executor>();
    support::random shared(73);
    const int ranks = c.size(), me = c.rank();
    const auto hash = [](std::uint64_t a) {
        a = (a ^ (a >> 31)) * 0x9e3779b97f4a7c15u;
        return a ^ (a >> 29);
    };
    std::uint64_t sent_sum = 0, received_sum = 0;
    int64_t wrong = 0, moved = 0;
    for (int round = 0; round < 1000; ++round) {
        const int64_t width = shared.integer(1, 9);
        const bool large = shared.coin(0.03);
        std::vector<std::vector<int64_t>> count(ranks, std::vector<int64_t>(ranks));
        for (auto& row : count)
            for (auto& n : row) n = shared.coin(0.6) ? 0 : shared.integer(1, large ? 20000 : 60);
        std::vector<int64_t> in;
        std::vector<std::int64_t> out;
        int64_t in_rows = 0;
        const auto value = [&](int from, int to, int64_t i) {
            return static_cast<int64_t>(hash(static_cast<std::uint64_t>(((round * 64 + from) * 64 + to) * int64_t{1000003} + i)));
        };
        for (int r = 0; r < ranks; ++r) {
            in.push_back(count[r][me]);
            in_rows += count[r][me];
            for (int64_t i = 0; i < count[me][r] * width; ++i) {
                out.push_back(value(me, r, i));
                sent_sum += static_cast<std::uint64_t>(out.back());
            }
        }
        std::vector<std::int64_t> got(static_cast<std::size_t>(in_rows * width), -1);
        c.all_to_all_v(ex, fm::matrix_view<const int64_t>(out.data(), static_cast<int64_t>(out.size()) / width, width),
                       fm::as_vector(count[me]), fm::matrix_view<int64_t>(got.data(), in_rows, width), fm::as_vector(in));
        std::size_t at = 0;
        for (int r = 0; r < ranks; ++r)
            for (int64_t i = 0; i < count[r][me] * width; ++i, ++at) {
                wrong += got[at] != value(r, me, i);
                received_sum += static_cast<std::uint64_t>(got[at]);
            }
        moved += in_rows;
    }
    CHECK_EQ(wrong, 0);
    CHECK(moved > 0);
    std::vector<int64_t> sums{static_cast<int64_t>(sent_sum), static_cast<int64_t>(received_sum)};
    c.all_reduce(ex, fm::as_vector(sums));
    CHECK_EQ(sums[0], sums[1]);
}

TEST_CASE("ranks that disagree are all told which, what and where, nothing is written, and they may go on")
{
    const fm::mpi& world = support::mpi_world();
    if (world.size() < 3) return; // three can disagree in every way
    const fm::mpi c = world.split(world.rank() < 3 ? 0 : 1, 0);
    if (c.size() != 3) return;
    support::disagreements<fm::mpi>([&](auto body, const char* text) {
        auto ex = support::executor_of_rank<fm::host_executor>();
        std::vector<float> a(12, 1.f), b(36);
        const std::string got = told([&] { body(c, ex, a, b); });
        INFO(got);
        CHECK(support::has(got, text));
        for (float v : b) CHECK_EQ(v, 0.f);
        for (float v : a) CHECK_EQ(v, 1.f);
        support::all_collectives<float>(c, ex, 7);
    });
}

TEST_CASE("two ranks that disagree about what is long are told so, and receive nothing of it")
{
    const fm::mpi& world = support::mpi_world();
    if (world.size() < 2) return;
    auto ex = support::executor_of_rank<fm::host_executor>();
    const int64_t n = 100000;
    std::vector<float> a(static_cast<std::size_t>(world.size() * n), 1.f), b(a.size());
    const int last = world.size() - 1;
    for (int64_t own : {n, int64_t{3}}) { // one that is longer than the other; one that travels with the head
        const int64_t count = world.rank() == last ? own / 2 : own;
        const std::string got = told([&] {
            world.all_gather(ex, fm::slice(fm::as_vector(a), 0, count), fm::slice(fm::as_vector(b), 0, world.size() * count));
        });
        const std::string text = "all_gather: sent (N) of rank " + std::to_string(last) + " is " + std::to_string(own / 2);
        CHECK(support::has(got, text.c_str()));
        for (float v : b) REQUIRE_EQ(v, 0.f);
    }
    std::vector<int64_t> out(static_cast<std::size_t>(world.size()), 9000), in = out;
    if (world.rank() == last) out[0] = 8000;
    const std::string got = told([&] {
        world.all_to_all_v(ex, fm::as_matrix(a, world.size() * n / 10, 10), fm::as_vector(out),
                           fm::as_matrix(b, world.size() * n / 10, 10), fm::as_vector(in));
    });
    const std::string text = "received_rows(" + std::to_string(last) + ") of rank 0 is 9000; expected 8000, as sent_rows(0)";
    CHECK(support::has(got, text.c_str()));
    for (float v : b) REQUIRE_EQ(v, 0.f);
    support::all_collectives<float>(world, ex, 9000);
}

TEST_CASE("a communicator splits by color, ordered by key and then by rank, and again within")
{
    const fm::mpi& c = support::mpi_world();
    auto ex = support::executor_of_rank<fm::host_executor>();
    const int ranks = c.size(), me = c.rank();
    const fm::mpi half = c.split(me % 2, -me);
    const int members = me % 2 ? ranks / 2 : (ranks + 1) / 2;
    CHECK_EQ(half.size(), members);
    CHECK_EQ(half.rank(), members - 1 - me / 2);
    std::vector<int32_t> own{me}, all(static_cast<std::size_t>(members));
    half.all_gather(ex, fm::as_vector(own), fm::as_vector(all));
    for (int i = 0; i < members; ++i) CHECK_EQ(all[static_cast<std::size_t>(i)], 2 * (members - 1 - i) + me % 2);
    const fm::mpi same = c.split(3, 0); // equal keys: by rank
    CHECK_EQ(same.rank(), me);
    const fm::mpi single = half.split(half.rank(), 0);
    CHECK_EQ(single.size(), 1);
    // Calls on one do not disturb the others, in any order.
    support::all_collectives<float>(single, ex, 9);
    support::all_collectives<float>(half, ex, 3000);
    support::all_collectives<double>(same, ex, 9);
    support::all_collectives<float>(half, ex, 9);
    support::all_collectives<float>(c, ex, 9);
    for (int i = 0; i < 500; ++i) c.split(me % 2, i).barrier(ex); // and they go again
}

TEST_CASE("a caller's communicator is duplicated: his own messages and ours do not meet")
{
    const fm::mpi& world = support::mpi_world();
    const int me = world.rank(), ranks = world.size();
    auto ex = support::executor_of_rank<fm::host_executor>();
    MPI_Comm reversed = MPI_COMM_NULL;
    REQUIRE_EQ(MPI_Comm_split(MPI_COMM_WORLD, 0, -me, &reversed), MPI_SUCCESS);
    {
        const fm::mpi c(reversed);
        CHECK_EQ(c.rank(), ranks - 1 - me);
        MPI_Request request = MPI_REQUEST_NULL;
        int theirs = -1;
        MPI_Irecv(&theirs, 1, MPI_INT, (c.rank() + 1) % ranks, MPI_ANY_TAG, reversed, &request);
        support::all_collectives<float>(c, ex, 2000);
        const fm::mpi copy = c;
        MPI_Send(&me, 1, MPI_INT, (c.rank() + ranks - 1) % ranks, 0, reversed);
        MPI_Wait(&request, MPI_STATUS_IGNORE);
        CHECK_EQ(theirs, ranks - 1 - (c.rank() + 1) % ranks);
        support::all_collectives<float>(copy, ex, 5);
    }
    int size = 0;
    CHECK_EQ(MPI_Comm_size(reversed, &size), MPI_SUCCESS); // it is still the caller's
    CHECK_EQ(size, ranks);
    MPI_Comm_free(&reversed);
}

TEST_CASE("a second call of a process while one is under way is refused, and the first goes on")
{
    const fm::mpi& c = support::mpi_world();
    auto ex = support::executor_of_rank<fm::host_executor>();
    if (c.size() == 1) return;
    if (c.rank() == 0) {
        std::thread first([&] {
            auto own = support::executor_of_rank<fm::host_executor>();
            CHECK_EQ(told([&] { c.barrier(own); }), "");
        });
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
        std::vector<float> v(3);
        CHECK(support::has(told([&] { c.all_reduce(ex, fm::as_vector(v)); }),
                           "all_reduce: this process is in barrier already; expected one call of a process at a time"));
        first.join();
    } else {
        std::this_thread::sleep_for(std::chrono::milliseconds(300));
        c.barrier(ex);
    }
    support::all_collectives<float>(c, ex, 5);
}

TEST_CASE("a session in a session neither initializes nor finalizes")
{
    {
        const fm::mpi_session inner;
        CHECK_EQ(inner.world().size(), support::mpi_world().size());
        auto ex = support::executor_of_rank<fm::host_executor>();
        support::all_collectives<float>(inner.world(), ex, 5);
    }
    int finalized = 1;
    MPI_Finalized(&finalized);
    CHECK_FALSE(finalized);
}

TEST_CASE("arguments that make no sense are refused by name")
{
    const auto says = [](auto body, const char* text) {
        const std::string got = support::message_of<fm::invalid_argument>(body);
        INFO(got);
        CHECK(support::has(got, text));
    };
    says([] { fm::mpi c(MPI_COMM_NULL); }, "comm is MPI_COMM_NULL; expected an intracommunicator");
    if (support::mpi_world().size() > 1) {
        const int me = support::mpi_world().rank();
        MPI_Comm part = MPI_COMM_NULL, inter = MPI_COMM_NULL;
        MPI_Comm_split(MPI_COMM_WORLD, me == 0 ? 0 : 1, 0, &part);
        MPI_Intercomm_create(part, 0, MPI_COMM_WORLD, me == 0 ? 1 : 0, 5, &inter);
        says([&] { fm::mpi c(inter); }, "comm is an intercommunicator; expected an intracommunicator");
        MPI_Comm_free(&inter);
        MPI_Comm_free(&part);
    }
    says([] { fm::mpi c(MPI_COMM_WORLD, {.deadline = std::chrono::milliseconds(0)}); },
         "options.deadline is 0; expected 1 to 950400000 ms");
}
