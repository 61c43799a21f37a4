// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The communicator over NCCL's verbs, with R threads and verbs that move host memory: what is grouped, skipped, summed,
/// polled and given up.
#include <cstring>

#include <doctest/doctest.h>

#include <fastmoe/comm/threads.hpp>

#include "support/fake_nccl.hpp"
#include "support/random.hpp"

using namespace fastmoe;
using support::fake_nccl;
using support::fake_ranks;

static_assert(communicator<nccl_ranks<fake_nccl>, host_executor>);

namespace {

template <class T>
std::vector<T> numbers(std::uint64_t seed, int64_t n)
{
    support::random r(seed);
    std::vector<T> out;
    for (int64_t i = 0; i < n; ++i) {
        if constexpr (std::is_integral_v<T>) out.push_back(static_cast<T>(r.integer(-1000000, 1000000)));
        else out.push_back(T(static_cast<float>(r.normal())));
    }
    return out;
}

/// What `body` leaves in each rank's vector, with one communicator and with the other.
template <class T, class Body>
void check_same_as_threads(int ranks, const Body& body, const nccl_options& options = {})
{
    std::vector<std::vector<T>> mine(static_cast<std::size_t>(ranks)), expected(mine.size());
    const auto failures = fake_ranks(
        ranks, [&](const auto& c, auto& ex) { mine[static_cast<std::size_t>(c.rank())] = body(c, ex); }, options);
    run_ranks(ranks, [&](const threads& c) {
        host_executor ex({.threads = 1});
        expected[static_cast<std::size_t>(c.rank())] = body(c, ex);
    });
    for (int r = 0; r < ranks; ++r) {
        CAPTURE(r);
        REQUIRE(failures[r] == "");
        REQUIRE(mine[r].size() == expected[r].size());
        CHECK((mine[r].empty() || std::memcmp(mine[r].data(), expected[r].data(), mine[r].size() * sizeof(T)) == 0));
    }
}

} // namespace

TEST_CASE_TEMPLATE("every collective gives the bits that ranks of one process get", T, double, float, bfloat16, std::int32_t, int64_t)
{
    for (const int ranks : {1, 2, 3, 8})
        for (const int64_t sum_bytes : {1, 400, 1 << 20}) { // of the scratch: pieces of R elements, of some, one piece
            CAPTURE(ranks);
            CAPTURE(sum_bytes);
            check_same_as_threads<T>(
                ranks,
                [&](const auto& c, auto& ex) {
                    std::vector<T> all;
                    const auto keep = [&all](const std::vector<T>& v) { all.insert(all.end(), v.begin(), v.end()); };
                    for (const int64_t n : {0, 1, 7, 200}) {
                        auto v = numbers<T>(10 + c.rank(), n), root = numbers<T>(90 + c.rank(), n);
                        const auto sent = numbers<T>(50 + c.rank(), n), blocks = numbers<T>(70 + c.rank(), ranks * n);
                        std::vector<T> part(n), gathered(ranks * n), exchanged(ranks * n);
                        c.all_reduce(ex, as_vector(v));
                        c.template reduce_scatter<host_executor, T>(ex, as_vector(blocks), as_vector(part));
                        c.template all_gather<host_executor, T>(ex, as_vector(sent), as_vector(gathered));
                        c.template all_to_all<host_executor, T>(ex, as_vector(blocks), as_vector(exchanged));
                        c.broadcast(ex, as_vector(root), ranks - 1);
                        for (const auto* each : {&v, &part, &gathered, &exchanged, &root}) keep(*each);
                    }
                    c.barrier(ex);
                    return all;
                },
                {.sum_bytes = sum_bytes});
        }
}

TEST_CASE("rows arrive for any counts, and ranks between which none goes do not meet")
{
    constexpr int ranks = 4, rounds = 150;
    const auto failures = fake_ranks(ranks, [&](const auto& c, auto& ex) {
        support::random r(5); // the same on all ranks: everyone knows all counts
        for (int round = 0; round < rounds; ++round) {
            int64_t counts[ranks][ranks];
            for (auto& row : counts)
                for (int64_t& n : row) n = r.integer(0, 3) == 0 ? r.integer(1, 6) : 0;
            const int64_t width = r.integer(0, 5);
            std::vector<int64_t> to(ranks), from(ranks);
            int64_t out = 0, in = 0;
            int sends = 0, receives = 0;
            for (int other = 0; other < ranks; ++other) {
                out += to[other] = counts[c.rank()][other];
                in += from[other] = counts[other][c.rank()];
                sends += other != c.rank() && to[other] * width > 0;
                receives += other != c.rank() && from[other] * width > 0;
            }
            std::vector<std::int32_t> sent(out * width), received((in + 2) * width, -7);
            int64_t at = 0;
            for (int other = 0; other < ranks; ++other)
                for (int64_t i = 0; i < to[other] * width; ++i) sent[at++] = static_cast<std::int32_t>(((round * ranks + c.rank()) * ranks + other) * 100 + i);
            const auto before = fake_nccl::count;
            c.template all_to_all_v<host_executor, std::int32_t>(ex, as_matrix(sent, out, width), as_vector(to), as_matrix(received, in + 2, width),
                                                                 as_vector(from));
            bool right = fake_nccl::count.sends - before.sends == sends && fake_nccl::count.receives - before.receives == receives;
            at = 0;
            for (int other = 0; other < ranks; ++other)
                for (int64_t i = 0; i < from[other] * width; ++i)
                    right = right && received[at++] == ((round * ranks + other) * ranks + c.rank()) * 100 + i;
            for (int64_t i = at; i < static_cast<int64_t>(received.size()); ++i) right = right && received[i] == -7;
            if (!right) throw std::logic_error("round " + std::to_string(round));
        }
        if (fake_nccl::count.groups_begun != fake_nccl::count.groups_ended) throw std::logic_error("a group stayed open");
    });
    for (const auto& f : failures) CHECK(f == "");
}

TEST_CASE("a rank that does not come is an error on the others within the deadline, and on every later call")
{
    const auto start = std::chrono::steady_clock::now();
    const auto failures = fake_ranks(
        3,
        [](const auto& c, auto& ex) {
            std::vector<float> v(10, 1.0f);
            c.all_reduce(ex, as_vector(v));
            if (c.rank() == 1) throw std::runtime_error("gone");
            try {
                c.all_reduce(ex, as_vector(v));
            } catch (const comm_error& first) {
                if (fake_nccl::count.aborted != 1) throw std::logic_error("not aborted");
                try {
                    c.barrier(ex);
                } catch (const comm_error& e) {
                    if (std::string(e.what()).find("this communicator has ended: all_reduce") == std::string::npos)
                        throw std::logic_error(e.what());
                    if (fake_nccl::count.aborted != 1) throw std::logic_error("aborted twice");
                    throw first;
                }
            }
        },
        {.deadline = milliseconds(300)});
    const auto took = std::chrono::steady_clock::now() - start;
    CHECK(failures[1] == "not a comm_error: gone");
    for (const int r : {0, 2}) {
        CHECK(failures[r].find("all_reduce of rank " + std::to_string(r) + ": no end within 300 ms") != std::string::npos);
    }
    CHECK(took >= std::chrono::milliseconds(300));
    CHECK(took < std::chrono::seconds(5));
}

TEST_CASE("a rank that never begins is an error on the others within the deadline")
{
    const auto id = fake_nccl::fresh_id();
    CHECK_THROWS_WITH_AS(nccl_ranks<fake_nccl>(id, 0, 2, {.deadline = milliseconds(100)}),
                         doctest::Contains("the start of rank 0: no end within 100 ms"), comm_error);
    CHECK(fake_nccl::own.empty());
}

TEST_CASE("what NCCL reports while it is polled is thrown, with its words, and the communicator is aborted")
{
    const auto failures = fake_ranks(2, [](const auto& c, auto& ex) {
        std::vector<float> v(10, 1.0f);
        c.all_reduce(ex, as_vector(v));
        fake_nccl::fail_after_polls = fake_nccl::count.polls + 1;
        try {
            c.all_reduce(ex, as_vector(v));
        } catch (const comm_error&) {
            if (fake_nccl::count.aborted != 1 || !fake_nccl::own.empty()) throw std::logic_error("not aborted");
            throw;
        }
    });
    for (const auto& f : failures) CHECK(f.find("NCCL reports: remote process exited") != std::string::npos);
}

TEST_CASE("a call that fails within a group still closes the group, and is what is reported")
{
    const auto failures = fake_ranks(
        2,
        [](const auto& c, auto& ex) {
            std::vector<float> from(4), to(4);
            if (c.rank() == 0) fake_nccl::next_send = fake_nccl::status::invalid_usage;
            try {
                c.template all_to_all<host_executor, float>(ex, as_vector(from), as_vector(to));
            } catch (const comm_error&) {
                if (fake_nccl::count.groups_begun != fake_nccl::count.groups_ended) throw std::logic_error("a group stayed open");
                throw;
            }
        },
        {.deadline = milliseconds(300)});
    CHECK(failures[0].find("NCCL reports: invalid usage") != std::string::npos);
    CHECK(failures[1].find("no end within 300 ms") != std::string::npos);
}

TEST_CASE("parts of a split are ordered by key, then by rank, and can be split again")
{
    constexpr int ranks = 6;
    std::vector<std::vector<int64_t>> seen(ranks);
    const auto failures = fake_ranks(ranks, [&](const auto& c, auto& ex) {
        const auto part = c.split(c.rank() % 2, -c.rank() / 4);
        const auto half = part.split(part.rank() == 0, 0);
        std::vector<int64_t> v{c.rank() + 1};
        part.all_reduce(ex, as_vector(v));
        std::vector<int64_t> w{c.rank() + 1};
        half.all_reduce(ex, as_vector(w));
        seen[c.rank()] = {part.rank(), part.size(), v[0], half.size(), w[0]};
    });
    for (const auto& f : failures) REQUIRE(f == "");
    std::vector<std::vector<int64_t>> expected(ranks);
    run_ranks(ranks, [&](const threads& c) {
        host_executor ex({.threads = 1});
        const auto part = c.split(c.rank() % 2, -c.rank() / 4);
        const auto half = part.split(part.rank() == 0, 0);
        std::vector<int64_t> v{c.rank() + 1}, w{c.rank() + 1};
        part.all_reduce(ex, as_vector(v));
        half.all_reduce(ex, as_vector(w));
        expected[c.rank()] = {part.rank(), part.size(), v[0], half.size(), w[0]};
    });
    CHECK(seen == expected);
}

TEST_CASE("copies are one rank, which ends once, with the others")
{
    const auto failures = fake_ranks(3, [](const auto& c, auto& ex) {
        {
            const auto part = c.split(0, 0);
            const auto copy = part;
            copy.barrier(ex);
        }
        if (fake_nccl::count.begun != 2 || fake_nccl::count.destroyed != 1 || fake_nccl::count.aborted != 0) throw std::logic_error("ended wrongly");
        if (fake_nccl::own.size() != 1) throw std::logic_error("left over");
    });
    for (const auto& f : failures) CHECK(f == "");
}

TEST_CASE("queued collectives return before their peers have come, wait() waits, and what failed comes up there")
{
    const nccl_options options{.deadline = milliseconds(300), .completion = nccl_completion::queued};
    const auto failures = fake_ranks(
        2,
        [](const auto& c, auto& ex) {
            std::vector<float> from(4, 1.0f + c.rank()), to(4);
            c.template all_to_all<host_executor, float>(ex, as_vector(from), as_vector(to));
            c.wait(ex);
            if (to[0] != 1.0f || to[2] != 2.0f) throw std::logic_error("wrong values");
            fake_nccl::fail_after_polls = fake_nccl::count.polls;
            c.wait(ex);
        },
        options);
    for (const auto& f : failures) CHECK(f.find("wait of rank") != std::string::npos);
}

TEST_CASE("registered memory is given back, before the communicator ends")
{
    const auto failures = fake_ranks(2, [](const auto& c, auto&) {
        std::vector<float> v(8);
        {
            auto first = c.register_memory(as_vector(v));
            auto moved = std::move(first);
        }
        if (fake_nccl::count.enrolled != 1 || fake_nccl::count.dismissed != 1) throw std::logic_error("not dismissed once");
    });
    for (const auto& f : failures) CHECK(f == "");
}

TEST_CASE("arguments that break the contract are refused before anybody is asked")
{
    const auto failures = fake_ranks(1, [](const auto& c, auto& ex) {
        std::vector<float> a(4), b(3);
        const std::vector<int64_t> one{1}, two{2}, five{5};
        const auto v = [](auto& m) { return as_vector(m); };
        CHECK_THROWS_AS((c.template all_gather<host_executor, float>(ex, v(a), v(b))), invalid_argument);
        CHECK_THROWS_AS((c.template all_to_all<host_executor, float>(ex, v(a), v(b))), invalid_argument);
        CHECK_THROWS_AS(c.broadcast(ex, v(a), 1), invalid_argument);
        CHECK_THROWS_AS(c.split(-1, 0), invalid_argument);
        const auto rows = [&](const auto& sent, const auto& received) {
            c.template all_to_all_v<host_executor, float>(ex, as_matrix(a, 4, 1), v(sent), as_matrix(a, 4, 1), v(received));
        };
        CHECK_THROWS_AS(rows(one, two), invalid_argument);
        CHECK_THROWS_AS(rows(five, five), invalid_argument);
        CHECK(fake_nccl::count.groups_begun == 0);
    });
    CHECK(failures[0] == "");
    CHECK_THROWS_AS(nccl_ranks<fake_nccl>({1}, 2, 2), invalid_argument);
    CHECK_THROWS_AS(nccl_ranks<fake_nccl>({1}, 0, 1, {.deadline = milliseconds(0)}), invalid_argument);
}
