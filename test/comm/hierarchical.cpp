// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include <fastmoe/comm/hierarchical.hpp>
#include <fastmoe/comm/threads.hpp>

#include "support/compare.hpp"
#include "support/counting_communicator.hpp"
#include "support/counting_memory.hpp"
#include "support/executors.hpp"
#include "support/poison.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
using fm::int64_t;
using std::chrono::milliseconds;

using two_levels = fm::hierarchical<fm::threads, fm::threads>;
static_assert(fm::communicator<two_levels, fm::host_executor>);
static_assert(fm::communicator<two_levels, support::lanes>);
static_assert(fm::communicator<fm::hierarchical<fm::self, fm::threads>, fm::host_executor>);
static_assert(fm::communicator<fm::hierarchical<two_levels, fm::threads>, fm::host_executor>);
static_assert(fm::sums_over_ranks<two_levels, fm::host_executor, double>);
static_assert(fm::exchanges_rows<two_levels, fm::host_executor, fm::bfloat16>);
static_assert(fm::exchanges_blocks<two_levels, fm::host_executor, std::byte>);

namespace {

struct grid {
    int nodes, places;
    int ranks() const { return nodes * places; }
};
constexpr grid grids[] = {{1, 1}, {1, 4}, {4, 1}, {2, 2}, {2, 3}, {4, 2}};

/// body(world, the same ranks in two levels) on each rank.
template <class Body>
void on_grid(grid g, const Body& body, milliseconds deadline = milliseconds(20000))
{
    fm::run_ranks(
        g.ranks(), [&](const fm::threads& world) { body(world, fm::make_hierarchical(world, g.places)); },
        {.deadline = deadline});
}

/// Small integers in every type, so that all sums are exact.
template <class T>
std::vector<T> small_values(support::random& rng, int64_t n)
{
    std::vector<T> out;
    for (int64_t i = 0; i < n; ++i) {
        const auto v = static_cast<int>(rng.integer(-9, 9));
        if constexpr (std::is_same_v<T, std::byte>) out.push_back(static_cast<std::byte>(v));
        else if constexpr (std::is_integral_v<T>) out.push_back(static_cast<T>(v));
        else out.push_back(support::narrow<T>(v));
    }
    return out;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b)
{
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

/// What collective(communicator, out) leaves in a poisoned `out` of n elements.
template <class T, class Executor, class C, class F>
std::vector<T> result_of(const C& c, Executor& ex, int64_t n, F collective)
{
    fm::buffer<T, Executor> out(ex, n);
    support::poison(out.view());
    collective(c, out.view());
    return support::download(ex, out.view());
}

/// Every collective of c gives what the flat communicator gives. `seed` is that of this rank and its place.
template <class T, class Flat, class C, class Executor>
void same_as(const Flat& flat, const C& c, Executor& ex, std::uint64_t seed, int64_t n)
{
    CHECK_EQ(c.rank(), flat.rank());
    CHECK_EQ(c.size(), flat.size());
    const int ranks = c.size();
    support::random rng(seed * 1000 + static_cast<std::uint64_t>(c.rank()));
    const auto own = support::upload(ex, small_values<T>(rng, ranks * n));
    const auto head = fm::slice(own.view(), 0, n);
    const auto agree = [&](int64_t size, auto f) {
        CHECK(same(result_of<T>(c, ex, size, f), result_of<T>(flat, ex, size, f)));
    };
    agree(ranks * n, [&](const auto& by, fm::vector_view<T> out) { by.all_gather(ex, head, out); });
    agree(ranks * n, [&](const auto& by, fm::vector_view<T> out) { by.all_to_all(ex, own.view(), out); });
    const auto copied = [&](fm::vector_view<T> to) {
        if (to.extent(0) > 0) std::memcpy(static_cast<void*>(to.data_handle()), own.data(), to.extent(0) * sizeof(T));
    };
    for (int root = 0; root < ranks; ++root)
        agree(n, [&](const auto& by, fm::vector_view<T> out) {
            copied(out);
            by.broadcast(ex, out, root);
        });
    if constexpr (!std::is_same_v<T, std::byte>) {
        agree(n, [&](const auto& by, fm::vector_view<T> out) {
            copied(out);
            by.all_reduce(ex, out);
        });
        agree(n, [&](const auto& by, fm::vector_view<T> out) { by.reduce_scatter(ex, own.view(), out); });
    }
    c.barrier(ex);
}

/// Counts of an exchange, which every rank draws alike: many zeros, now and then a rank that gets or sends nothing.
std::vector<std::vector<int64_t>> draw_counts(support::random& rng, int ranks, int64_t most)
{
    std::vector<std::vector<int64_t>> count(ranks, std::vector<int64_t>(ranks));
    const double zeros = rng.uniform(0.2, 1.0);
    const int idle = static_cast<int>(rng.integer(0, 2 * ranks));
    for (int from = 0; from < ranks; ++from)
        for (int to = 0; to < ranks; ++to)
            count[from][to] = from == idle || to == idle - ranks || rng.coin(zeros) ? 0 : rng.integer(1, most);
    return count;
}

/// What one rank sends and gets of an exchange.
struct own_counts {
    std::vector<int64_t> out, in;
    int64_t sent = 0, received = 0;

    own_counts(const std::vector<std::vector<int64_t>>& count, int rank) : out(count[rank])
    {
        for (const auto& row : count) in.push_back(row[rank]);
        for (const int64_t n : out) sent += n;
        for (const int64_t n : in) received += n;
    }
};

/// The texts of the comm_errors that the ranks get.
template <class Body>
std::vector<std::string> texts(grid g, const Body& body, milliseconds deadline = milliseconds(20000))
{
    std::vector<std::string> out(g.ranks(), "nothing was thrown");
    on_grid(
        g,
        [&](const fm::threads& world, const two_levels& c) {
            try {
                body(c);
            } catch (const fm::comm_error& e) {
                out[world.rank()] = e.what();
            }
        },
        deadline);
    return out;
}

fm::host_executor one_thread() { return fm::host_executor({.threads = 1}); }

#define ELEMENTS FASTMOE_DTYPES, std::int32_t, std::int64_t, std::byte

} // namespace

TEST_CASE_TEMPLATE("each collective gives what a flat communicator gives, on six grids and for every element type", T,
                   ELEMENTS)
{
    FASTMOE_SEEDED(rng, 71);
    for (const grid g : grids) {
        const auto seed = rng.bits() >> 20;
        on_grid(g, [&](const fm::threads& world, const two_levels& c) {
            auto ex = one_thread();
            CHECK_EQ(c.nodes(), g.nodes);
            CHECK_EQ(c.places(), g.places);
            for (int64_t n : {0, 1, 3, 12, 701}) same_as<T>(world, c, ex, seed, n);
        });
    }
}

TEST_CASE("three levels and another executor give what a flat communicator gives")
{
    fm::run_ranks(8, [](const fm::threads& world) {
        auto ex = one_thread();
        same_as<float>(world, fm::make_hierarchical(fm::make_hierarchical(world, 2), 4), ex, 72, 23);
    });
    fm::run_ranks(4, [](const fm::threads& world) {
        support::lanes ex;
        same_as<float>(world, fm::make_hierarchical(world, 2), ex, 73, 23);
    });
    fm::run_ranks(3, [](const fm::threads& world) {
        auto ex = one_thread();
        same_as<float>(world, fm::hierarchical(fm::self{}, world), ex, 74, 23);
        same_as<float>(world, fm::hierarchical(world, fm::self{}), ex, 75, 23);
    });
}

TEST_CASE_TEMPLATE("sums of any numbers are within the dtype's bound of a sum in double, with the same bits on every rank "
                   "and on every run",
                   T, double, float, fm::bfloat16, fm::half)
{
    FASTMOE_SEEDED(rng, 76);
    const int64_t n = 1203;
    for (const grid g : grids) {
        std::vector<std::vector<T>> values(g.ranks()), out(g.ranks());
        for (auto& v : values) v = support::normal_vector<T>(rng, n, 100);
        std::vector<double> expected(n, 0.0), magnitudes(n, 0.0);
        for (const auto& v : values)
            for (int64_t i = 0; i < n; ++i) expected[i] += double(v[i]), magnitudes[i] += std::fabs(double(v[i]));
        // Once for the node's sum, once for the sum of those.
        const support::tolerance bound{.length = double(g.ranks()), .roundings = 2, .magnitudes = &magnitudes};
        on_grid(g, [&](const fm::threads&, const two_levels& c) {
            fm::host_executor ex({.threads = 1 + c.rank() % 2});
            for (int run = 0; run < 2; ++run) {
                auto mine = support::upload(ex, values[c.rank()]);
                c.all_reduce(ex, mine.view());
                const auto got = support::download(ex, mine.view());
                if (run == 1) CHECK(support::same_bits(got, out[c.rank()]));
                out[c.rank()] = got;
            }
            // A scattered sum has the bits of the sum of all.
            const int64_t share = n / c.size();
            const auto mine = support::upload(ex, values[c.rank()]);
            fm::buffer<T, fm::host_executor> part(ex, share);
            c.reduce_scatter(ex, fm::slice(mine.view(), 0, share * c.size()), part.view());
            const auto first = out[c.rank()].begin() + c.rank() * share;
            CHECK(support::same_bits(support::download(ex, part.view()), std::vector<T>(first, first + share)));
        });
        for (const auto& got : out) {
            CHECK(support::close(got, expected, bound));
            CHECK(support::same_bits(got, out[0]));
        }
    }
}

TEST_CASE("floats are added within the node first, in rank order")
{
    on_grid({2, 2}, [](const fm::threads&, const two_levels& c) {
        auto ex = one_thread();
        // (1e8 + 1) + (-1e8 + 1) is 0 in float, and any order that pairs 1e8 with -1e8 first gives 1 or 2.
        const float mine[] = {1e8f, 1.f, -1e8f, 1.f};
        std::vector<float> v(5, mine[c.rank()]);
        c.all_reduce(ex, fm::as_vector(v));
        CHECK_EQ(v, std::vector<float>(5, 0.f));
    });
}

TEST_CASE_TEMPLATE("all_to_all_v moves rows of random counts as a flat communicator does, and leaves the rest alone", T,
                   ELEMENTS)
{
    FASTMOE_SEEDED(rng, 77);
    for (const grid g : grids) {
        const auto seed = rng.bits() >> 20;
        on_grid(g, [&](const fm::threads& world, const two_levels& c) {
            auto ex = one_thread();
            support::random shared(seed);
            for (int64_t width : {1, 17, 0}) {
                const own_counts n(draw_counts(shared, c.size(), 40), c.rank());
                const int64_t out_rows = n.sent + shared.integer(0, 2), in_rows = n.received + shared.integer(0, 2);
                support::random own(seed + static_cast<std::uint64_t>(c.rank()));
                const auto sent = support::upload(ex, small_values<T>(own, out_rows * width));
                support::guarded<T> a(in_rows, width), b(in_rows, width);
                const auto exchange = [&](const auto& by, support::guarded<T>& to) {
                    by.all_to_all_v(ex, fm::matrix_view<const T>(sent.data(), out_rows, width), fm::as_vector(n.out),
                                    to.view(), fm::as_vector(n.in));
                };
                exchange(world, a);
                exchange(c, b);
                CHECK(same(std::vector<T>(a.data(), a.data() + in_rows * width),
                           std::vector<T>(b.data(), b.data() + in_rows * width)));
                CHECK_EQ(b.damage(), "");
            }
        });
    }
}

TEST_CASE("200 exchanges in a row with random counts lose nothing: every row arrives where it belongs, checksums agree")
{
    FASTMOE_SEEDED(rng, 78);
    const auto seed = rng.bits() >> 20;
    for (const grid g : {grid{2, 3}, grid{4, 2}})
        on_grid(g, [&](const fm::threads& world, const two_levels& c) {
            auto ex = one_thread();
            support::random shared(seed);
            const int me = c.rank(), ranks = c.size();
            int64_t wrong = 0, moved = 0;
            for (int round = 0; round < 200; ++round) {
                const auto count = draw_counts(shared, ranks, 9);
                const own_counts n(count, me);
                const auto value = [&](int from, int to, int64_t i) {
                    return support::random(seed ^ static_cast<std::uint64_t>(((int64_t{round} * 64 + from) * 64 + to) * 4096 + i)).bits();
                };
                std::vector<int64_t> sent, received(n.received * 2), sums(2);
                for (int to = 0; to < ranks; ++to)
                    for (int64_t i = 0; i < 2 * n.out[to]; ++i) sent.push_back(static_cast<int64_t>(value(me, to, i)));
                c.all_to_all_v(ex, fm::as_matrix(sent, n.sent, 2), fm::as_vector(n.out),
                               fm::as_matrix(received, n.received, 2), fm::as_vector(n.in));
                std::uint64_t out = 0, in = 0;
                for (const int64_t v : sent) out += static_cast<std::uint64_t>(v);
                for (const int64_t v : received) in += static_cast<std::uint64_t>(v);
                sums = {static_cast<int64_t>(out), static_cast<int64_t>(in)};
                world.all_reduce(ex, fm::as_vector(sums));
                wrong += sums[0] != sums[1];
                int64_t at = 0;
                for (int from = 0; from < ranks; ++from)
                    for (int64_t i = 0; i < 2 * n.in[from]; ++i, ++at)
                        wrong += received[at] != static_cast<int64_t>(value(from, me, i));
                moved += n.received;
            }
            CHECK_EQ(wrong, 0);
            CHECK(moved > 200); // there was something to lose
        });
}

TEST_CASE("ranks that disagree all throw a comm_error in the words of threads, write nothing, and may go on")
{
    using floats = std::vector<float>&;
    using host = fm::host_executor;
    const auto says = [](auto body, const char* text) {
        const auto all = texts({2, 2}, [&](const two_levels& c) {
            auto ex = one_thread();
            std::vector<float> a(16, 1.f), b(64);
            try {
                body(c, ex, a, b);
            } catch (const fm::comm_error&) {
                for (float v : b) CHECK_EQ(v, 0.f);
                c.barrier(ex);
                c.all_reduce(ex, fm::as_vector(a));
                CHECK_EQ(a[15], 4.f);
                throw;
            }
        });
        for (const std::string& t : all) {
            INFO(t);
            CHECK(support::has(t, text));
        }
    };
    const auto head = [](floats v, int64_t n) { return fm::slice(fm::as_vector(v), 0, n); };
    says([&](auto& c, host& ex, floats a, floats) { c.all_reduce(ex, head(a, c.rank() == 2 ? 5 : 4)); },
         "all_reduce: values (N) of rank 2 is 5; expected 4, as on rank 0");
    says([&](auto& c, host& ex, floats a, floats b) { c.all_gather(ex, head(a, c.rank() ? 2 : 3), head(b, c.rank() ? 8 : 12)); },
         "all_gather: sent (N) of rank 1 is 2; expected 3, as on rank 0");
    says([&](auto& c, host& ex, floats a, floats b) { c.all_to_all(ex, head(a, c.rank() ? 8 : 12), head(b, c.rank() ? 8 : 12)); },
         "all_to_all: a block of sent (R*N) of rank 1 is 2; expected 3, as on rank 0");
    says([&](auto& c, host& ex, floats a, floats b) { c.reduce_scatter(ex, head(a, c.rank() == 3 ? 8 : 12), head(b, c.rank() == 3 ? 2 : 3)); },
         "reduce_scatter: received (N) of rank 3 is 2; expected 3, as on rank 0");
    says([&](auto& c, host& ex, floats a, floats) { c.broadcast(ex, head(a, 4), c.rank() == 1); },
         "broadcast: root of rank 1 is 1; expected 0, as on rank 0");
    says([&](auto& c, host& ex, floats a, floats) {
             if (c.rank() == 3) c.barrier(ex);
             else c.broadcast(ex, head(a, 4), 0);
         },
         "broadcast: the collective of rank 3 is barrier; expected broadcast, as on rank 0");
    says([&](auto& c, host& ex, floats a, floats) {
             std::vector<double> d(4);
             if (c.rank() == 2) c.all_reduce(ex, fm::as_vector(d));
             else c.all_reduce(ex, head(a, 4));
         },
         "all_reduce: the element type of rank 2 is float64; expected float32, as on rank 0");
    const auto rows = [](const two_levels& c, host& ex, floats a, floats b, int64_t width, std::vector<int64_t> out,
                         std::vector<int64_t> in) {
        c.all_to_all_v(ex, fm::matrix_view<const float>(a.data(), 16 / width, width), fm::as_vector(out),
                       fm::matrix_view<float>(b.data(), 64 / width, width), fm::as_vector(in));
    };
    says([&](auto& c, host& ex, floats a, floats b) { rows(c, ex, a, b, c.rank() ? 2 : 4, {1, 1, 1, 1}, {1, 1, 1, 1}); },
         "all_to_all_v: the width D of rank 1 is 2; expected 4, as on rank 0");
    says([&](auto& c, host& ex, floats a, floats b) {
             rows(c, ex, a, b, 2, {1, 1, c.rank() == 1 ? 2 : 1, 1}, {1, 1, 1, 1});
         },
         "all_to_all_v: received_rows(1) of rank 2 is 1; expected 2, as sent_rows(2) of rank 1");
}

TEST_CASE("a rank that refuses its own arguments gets their names, the others a comm_error, and all may go on")
{
    std::vector<float> a(64), b(64);
    const auto refuses = [&](auto call, const char* text, const char* others) {
        std::vector<std::string> told(4);
        on_grid({2, 2}, [&](const fm::threads&, const two_levels& c) {
            auto ex = one_thread();
            try {
                call(c, ex, c.rank() == 2);
            } catch (const fm::error& e) {
                told[c.rank()] = e.what();
            }
            c.barrier(ex);
        });
        for (int r = 0; r < 4; ++r) {
            INFO(told[r]);
            CHECK(support::has(told[r], r == 2 ? text : others));
        }
    };
    const auto head = [](std::vector<float>& v, int64_t n) { return fm::slice(fm::as_vector(v), 0, n); };
    refuses([&](auto& c, auto& ex, bool wrong) { c.all_gather(ex, head(a, 2), head(b, wrong ? 7 : 8)); },
            "received (R*N) is of shape (7); expected (8)", "all_gather: rank 2 of 4 failed");
    refuses([&](auto& c, auto& ex, bool wrong) { c.broadcast(ex, head(a, 2), wrong ? 4 : 0); },
            "root is 4; expected a rank: 0 to 3", "broadcast: rank 2 of 4 failed");
    refuses([&](auto& c, auto&, bool wrong) { c.split(wrong ? -1 : 0, 0); }, "color is -1; expected zero or more",
            "split: rank 2 of 4 failed");
    refuses([&](auto& c, auto& ex, bool wrong) { c.all_reduce(ex, fm::vector_view<float>(wrong ? nullptr : a.data(), 0 + wrong)); },
            "values (N) is a null pointer", "all_reduce: rank 2 of 4 failed");
    const auto rows = [&](const two_levels& c, fm::host_executor& ex, std::vector<int64_t> out, std::vector<int64_t> in) {
        c.all_to_all_v(ex, fm::matrix_view<const float>(a.data(), 4, 2), fm::as_vector(out),
                       fm::matrix_view<float>(b.data(), 4, 2), fm::as_vector(in));
    };
    const std::vector<int64_t> ones{1, 1, 1, 1};
    refuses([&](auto& c, auto& ex, bool w) { rows(c, ex, w ? std::vector<int64_t>{1, 1, 1, 2} : ones, ones); },
            "sent_rows (R) is 2; expected counts from 0 on whose sum is at most the 4 rows of sent (N,D)", "rank 2 of 4 failed");
    refuses([&](auto& c, auto& ex, bool w) { rows(c, ex, ones, w ? std::vector<int64_t>{-1, 1, 1, 1} : ones); },
            "received_rows (R) is -1", "all_to_all_v: rank 2 of 4 failed");
    refuses([&](auto& c, auto& ex, bool w) { rows(c, ex, w ? std::vector<int64_t>{1} : ones, ones); },
            "sent_rows (R) is of shape (1); expected (4)", "all_to_all_v: rank 2 of 4 failed");
    refuses(
        [&](auto& c, auto& ex, bool wrong) {
            if (wrong) ex.faults().record(fm::fault_kind::expert_out_of_range, 3, 77);
            c.barrier(ex);
        },
        "77", "barrier: rank 2 of 4 failed");
}

TEST_CASE("staging takes as many bytes of the workspace as the queries say and none of the executor; with less, all throw")
{
    const grid g{2, 3};
    const int64_t n = 35, width = 5;
    fm::run_ranks(g.ranks(), [&](const fm::threads& world) {
        support::counting_memory counted;
        fm::host_executor ex({.threads = 1, .memory = &counted});
        const auto plain = fm::make_hierarchical(world, g.places);
        std::vector<float> a(n * g.ranks(), 1.f), b(n * g.ranks());
        const std::vector<int64_t> rows(g.ranks(), 2 + (world.rank() == 0)), from = [&] {
            std::vector<int64_t> v(g.ranks(), 2);
            v[0] = 3;
            return v;
        }();
        int64_t sent = 0, passing = 0; // from a rank of node 0: one has 3 rows for each
        for (const int64_t r : rows) sent += r;
        for (int i = 0; i < g.places; ++i)
            passing += g.nodes * (world.rank() / g.places == 0 && i == 0 ? 3 : 2);
        const auto all = fm::as_vector(a), out = fm::as_vector(b);
        const auto try_all = [&](auto name, int64_t bytes, auto call) {
            INFO(name);
            for (const int64_t less : {0, 1}) {
                if (bytes - less < 1) continue;
                fm::buffer<std::byte, fm::host_executor> memory(ex, bytes - less);
                const auto c = fm::make_hierarchical(world, g.places, memory.view());
                const auto before = counted.calls();
                if (less == 0) call(c);
                else CHECK_THROWS_AS(call(c), fm::error); // whose memory it is that lacks depends on the rank
                CHECK_EQ(counted.calls(), before);
                c.barrier(ex);
            }
        };
        try_all("all_reduce", plain.all_reduce_bytes<float>(n), [&](auto& c) { c.all_reduce(ex, fm::slice(all, 0, n)); });
        try_all("reduce_scatter", plain.reduce_scatter_bytes<float>(n),
                [&](auto& c) { c.reduce_scatter(ex, all, fm::slice(out, 0, n)); });
        try_all("all_gather", plain.all_gather_bytes<float>(n), [&](auto& c) { c.all_gather(ex, fm::slice(all, 0, n), out); });
        try_all("all_to_all", plain.all_to_all_bytes<float>(n), [&](auto& c) { c.all_to_all(ex, all, out); });
        try_all("all_to_all_v", two_levels::all_to_all_v_bytes<float>(sent, passing, width), [&](auto& c) {
            c.all_to_all_v(ex, fm::as_matrix(a, n * g.ranks() / width, width), fm::as_vector(rows),
                           fm::as_matrix(b, n * g.ranks() / width, width), fm::as_vector(from));
        });
        // Without a workspace the executor gives, once a collective, and gets all of it back.
        const auto before = counted.calls();
        const auto live = counted.live();
        plain.all_to_all(ex, all, out);
        CHECK_EQ(counted.calls(), before + 1);
        CHECK_EQ(counted.live(), live);
    });
}

TEST_CASE("a rank that throws is a comm_error on all others at once, wherever it is")
{
    for (const grid g : {grid{4, 2}, grid{2, 3}, grid{1, 4}, grid{4, 1}})
        for (int failing = 0; failing < g.ranks(); ++failing) {
            const auto start = std::chrono::steady_clock::now();
            std::atomic<int> told{0};
            const auto run = [&] {
                on_grid(g, [&](const fm::threads&, const two_levels& c) {
                    auto ex = one_thread();
                    std::vector<float> v(8);
                    c.all_reduce(ex, fm::as_vector(v));
                    if (c.rank() == failing) throw std::domain_error("of its own");
                    for (int again = 0; again < 2; ++again)
                        try {
                            c.all_reduce(ex, fm::as_vector(v));
                        } catch (const fm::comm_error& e) {
                            told += support::has(e.what(), "has left");
                        }
                });
            };
            CHECK_THROWS_WITH_AS(run(), "of its own", std::domain_error);
            CHECK_EQ(told, 2 * (g.ranks() - 1));
            CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(10));
        }
}

TEST_CASE("a comm_error says in which level and among which ranks of the world a rank was missed")
{
    const auto all = texts({2, 2}, [](const two_levels& c) {
        auto ex = one_thread();
        if (c.rank() != 3) c.barrier(ex);
    });
    CHECK(support::has(all[2], "all_to_all: rank 1 of 2 has left (within a node, ranks 2 to 3)"));
    CHECK(support::has(all[1], "all_to_all: rank 1 of 2 has left (across nodes, ranks 1 to 3 in steps of 2)"));
    CHECK(support::has(all[0], "has left (across nodes, ranks 0 to 2 in steps of 2)"));
}

TEST_CASE("a rank that does not come is a comm_error on every other rank when the deadline has passed, and on itself later")
{
    std::atomic<int> told{0};
    const auto start = std::chrono::steady_clock::now();
    const auto all = texts(
        {2, 2},
        [&](const two_levels& c) {
            auto ex = one_thread();
            c.barrier(ex);
            while (c.rank() == 1 && told < 3) std::this_thread::sleep_for(milliseconds(1));
            try {
                c.barrier(ex);
            } catch (...) {
                ++told;
                throw;
            }
        },
        milliseconds(300));
    for (const std::string& t : all) {
        INFO(t);
        CHECK(t != "nothing was thrown");
    }
    CHECK(support::has(all[0], "rank 1 of 2 did not come within 300 ms (within a node, ranks 0 to 1)"));
    const auto took = std::chrono::steady_clock::now() - start;
    CHECK(took >= milliseconds(300));
    CHECK(took < std::chrono::seconds(20));
}

namespace {

/// Throws in the middle: in the n-th call of an inner collective.
struct breaking {
    fm::threads to;
    std::shared_ptr<int> left;

    int rank() const { return to.rank(); }
    int size() const { return to.size(); }
    void count() const
    {
        if (--*left == 0) throw std::domain_error("in the middle");
    }
    template <class... Arguments>
    void all_gather(Arguments&&... a) const
    {
        count();
        to.all_gather(std::forward<Arguments>(a)...);
    }
    template <class... Arguments>
    void all_to_all(Arguments&&... a) const
    {
        count();
        to.all_to_all(std::forward<Arguments>(a)...);
    }
    template <class Executor, class T>
    void all_to_all_v(Executor& ex, fm::matrix_view<const T> sent, fm::vector_view<const int64_t> out,
                      fm::matrix_view<T> received, fm::vector_view<const int64_t> in) const
    {
        count();
        to.all_to_all_v(ex, sent, out, received, in);
    }
};

} // namespace

TEST_CASE("a rank that fails in any hop of an exchange is a comm_error on all others at once, and its own error on itself")
{
    const grid g{2, 2};
    for (int hop = 1; hop <= 3; ++hop) // announce with counts, announce, rows
        for (int failing = 0; failing < 4; ++failing) {
            const auto start = std::chrono::steady_clock::now();
            std::atomic<int> own{0}, told{0};
            fm::run_ranks(g.ranks(), [&](const fm::threads& world) {
                auto ex = one_thread();
                const fm::hierarchical<breaking, fm::threads> c(
                    {world.split(world.rank() / 2, 0), std::make_shared<int>(world.rank() == failing ? hop : 1000)},
                    world.split(world.rank() % 2, 0));
                std::vector<float> a(8), b(8);
                const std::vector<int64_t> one(4, 1);
                const auto exchange = [&] {
                    c.all_to_all_v(ex, fm::matrix_view<const float>(a.data(), 4, 2), fm::as_vector(one),
                                   fm::matrix_view<float>(b.data(), 4, 2), fm::as_vector(one));
                };
                try {
                    exchange();
                } catch (const std::domain_error&) {
                    ++own;
                } catch (const fm::comm_error&) {
                    ++told;
                }
                CHECK_THROWS_AS(exchange(), fm::comm_error);
            });
            CHECK_EQ(own, 1);
            CHECK_EQ(told, 3);
            CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(10));
        }
}

TEST_CASE("a split into grids gives the ranks of a flat split, with all collectives; other groups are refused on all ranks")
{
    struct pattern {
        grid on;
        int (*color)(int rank);
    };
    const pattern patterns[] = {{{4, 2}, [](int r) { return r / 4; }},      // two nodes each
                                {{4, 2}, [](int r) { return r % 2; }},      // a place of every node
                                {{4, 2}, [](int r) { return r % 4; }},      // a place of every other node
                                {{2, 4}, [](int r) { return r % 4 / 2; }},  // half of every node
                                {{2, 4}, [](int r) { return r / 2; }},      // half of one node
                                {{2, 3}, [](int r) { return r; }},          // alone
                                {{2, 3}, [](int) { return 7; }},            // all
                                {{2, 4}, [](int r) { return int(r == 0); }}}; // not a grid: one rank, and the others
    for (const auto& [g, color] : patterns) {
        const bool fits = color(1) != 0 || color(0) != 1;
        for (const int sign : {1, 0})
            on_grid(g, [&, color = color](const fm::threads& world, const two_levels& c) {
                auto ex = one_thread();
                const int of = color(c.rank()), key = sign * c.rank();
                const auto flat = world.split(of, key);
                if (fits) {
                    const auto part = c.split(of, key);
                    same_as<std::int32_t>(flat, part, ex, 79, 5);
                } else {
                    CHECK_THROWS_AS(c.split(of, key), fm::invalid_argument);
                }
                same_as<std::int32_t>(world, c, ex, 80, 5); // the whole goes on
            });
    }
    on_grid({2, 2}, [&](const fm::threads& world, const two_levels& c) { // keys may turn nodes and places around
        auto ex = one_thread();
        same_as<float>(world.split(0, -c.rank()), c.split(0, -c.rank()), ex, 81, 5);
        const int between[] = {0, 2, 1, 3}; // but not mix nodes
        CHECK(support::has(support::message_of<fm::invalid_argument>([&] { c.split(0, between[c.rank()]); }),
                           "split by color is 0; expected the same places of each node of a color"));
    });
    fm::run_ranks(6, [](const fm::threads& world) {
        CHECK(support::has(support::message_of<fm::invalid_argument>([&] { fm::make_hierarchical(world, 4); }),
                           "node_size is 4; expected a divisor of 6"));
    });
}

TEST_CASE("nodes exchange one message a pair of ranks with one place, whose bytes are those of the rows that cross, and the "
          "metadata that the header documents")
{
    FASTMOE_SEEDED(rng, 82);
    const grid g{3, 4};
    const int R = g.ranks(), width = 7;
    const auto count = draw_counts(rng, R, 20);
    std::atomic<int64_t> messages{0}, flat_messages{0};
    using counted = support::counting_communicator<fm::threads>;
    fm::run_ranks(R, [&](const fm::threads& world) {
        auto ex = one_thread();
        const int me = world.rank(), node = me / g.places, place = me % g.places;
        const counted inner(world.split(node, me)), outer(world.split(place, me)), flat(world);
        const fm::hierarchical<counted, counted> c(inner, outer);
        const own_counts n(count, me);
        std::vector<float> sent(n.sent * width), received(n.received * width);
        const auto exchange = [&](const auto& by) {
            by.all_to_all_v(ex, fm::as_matrix(sent, n.sent, width), fm::as_vector(n.out),
                            fm::as_matrix(received, n.received, width), fm::as_vector(n.in));
        };
        exchange(c);
        exchange(flat);
        for (int to = 0; to < g.nodes; ++to) { // what this node's ranks send to that node's rank with my place
            if (to == node) continue;
            int64_t rows = 0;
            for (int i = 0; i < g.places; ++i) rows += count[node * g.places + i][to * g.places + place];
            CHECK_EQ(outer.log().of("all_to_all_v", to), support::traffic{rows * width * 4, rows > 0});
            CHECK_EQ(outer.log().of("all_gather", to), support::traffic{64 * g.places, 1});
            CHECK_EQ(outer.log().of("all_to_all", to), support::traffic{72 * g.places, 1});
        }
        for (int to = 0; to < g.places; ++to) { // what I send to that place, on any node
            if (to == place) continue;
            int64_t rows = 0;
            for (int o = 0; o < g.nodes; ++o) rows += count[me][o * g.places + to];
            CHECK_EQ(inner.log().of("all_to_all_v", to), support::traffic{rows * width * 4, rows > 0});
            CHECK_EQ(inner.log().of("all_gather", to), support::traffic{64, 1});
            CHECK_EQ(inner.log().of("all_to_all", to), support::traffic{64 + 8 * g.nodes, 1});
        }
        for (const char* hop : {"all_to_all", "all_gather", "all_to_all_v"}) { // once each on either level: six hops in all
            CHECK_EQ(inner.log().calls(hop), 1);
            CHECK_EQ(outer.log().calls(hop), 1);
        }
        messages += outer.log().of("all_to_all_v").messages;
        for (int r = 0; r < R; ++r)
            if (r / g.places != node) flat_messages += flat.log().of("all_to_all_v", r).messages;

        // What a rank has, or a node's sum, crosses over once.
        const int64_t N = 24;
        std::vector<float> all(R * N), one(N);
        const auto crossing = [&](auto call) {
            outer.log().reset();
            call();
            return outer.log().of().bytes - 72 * g.places * (g.nodes - 1);
        };
        CHECK_EQ(crossing([&] { c.all_gather(ex, fm::as_vector(one), fm::as_vector(all)); }), (g.nodes - 1) * N * 4);
        CHECK_EQ(crossing([&] { c.reduce_scatter(ex, fm::as_vector(all), fm::as_vector(one)); }), (g.nodes - 1) * N * 4);
        CHECK_EQ(crossing([&] { c.all_to_all(ex, fm::as_vector(all), fm::as_vector(all)); }),
                 (g.nodes - 1) * g.places * N * 4);
        CHECK_EQ(crossing([&] { c.all_reduce(ex, fm::as_vector(one)); }), 2 * (g.nodes - 1) * N / g.places / g.nodes * 4);
        CHECK_EQ(crossing([&] { c.broadcast(ex, fm::as_vector(one), 5); }), me == 5 ? (g.nodes - 1) * N * 4 : 0);
        CHECK_EQ(crossing([&] { c.barrier(ex); }), 0);
    });
    CHECK(messages <= R * (g.nodes - 1));
    CHECK(flat_messages > messages);
}
