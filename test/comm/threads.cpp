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

#include <fastmoe/comm/threads.hpp>

#include "support/communicator_cases.hpp"
#include "support/compare.hpp"
#include "support/executors.hpp"
#include "support/few_threads.hpp"
#include "support/poison.hpp"
#include "support/scratch.hpp"

namespace fm = fastmoe;
using fm::int64_t;
using std::chrono::milliseconds;

static_assert(fm::communicator<fm::threads, fm::host_executor>);
static_assert(fm::communicator<fm::threads, support::lanes>);
static_assert(fm::sums_over_ranks<fm::threads, fm::host_executor, double>);
static_assert(fm::exchanges_rows<fm::threads, fm::host_executor, fm::bfloat16>);
static_assert(fm::exchanges_blocks<fm::threads, fm::host_executor, std::byte>);

namespace {

/// The texts of the comm_errors that the ranks get.
template <class Body>
std::vector<std::string> texts(int ranks, const Body& body, milliseconds deadline = milliseconds(20000))
{
    std::vector<std::string> out(ranks, "nothing was thrown");
    fm::run_ranks(
        ranks,
        [&](const fm::threads& c) {
            try {
                body(c);
            } catch (const fm::comm_error& e) {
                out[c.rank()] = e.what();
            }
        },
        {.deadline = deadline});
    return out;
}

} // namespace

TEST_CASE_TEMPLATE("each collective is its definition, for every element type and 1 to 5 ranks", T, FASTMOE_ELEMENTS)
{
    for (int ranks = 1; ranks <= 5; ++ranks)
        fm::run_ranks(ranks, [](const fm::threads& c) {
            auto ex = support::executor_of_rank<fm::host_executor>();
            for (int64_t n : {0, 1, 3, 700, 5000}) support::all_collectives<T>(c, ex, n);
        });
    fm::run_ranks(2, [](const fm::threads& c) {
        auto ex = support::executor_of_rank<support::lanes>();
        for (int64_t n : {2, 1500}) support::all_collectives<T>(c, ex, n);
    });
}

TEST_CASE_TEMPLATE("all_to_all_v moves rows of random counts, zero among them, and leaves the rest alone", T, FASTMOE_ELEMENTS)
{
    FASTMOE_SEEDED(rng, 61);
    for (int i = 0; i < 8; ++i) {
        const auto seed = rng.bits();
        fm::run_ranks(static_cast<int>(rng.integer(1, 5)), [&](const fm::threads& c) {
            auto ex = support::executor_of_rank<fm::host_executor>();
            for (int64_t width : {1, 17, 0}) support::all_rows<T>(c, ex, support::random(seed), width);
        });
    }
}

TEST_CASE_TEMPLATE("sums are added in rank order and rounded once, with the same bits on every rank", T, double, float,
                   fm::bfloat16, fm::half)
{
    FASTMOE_SEEDED(rng, 62);
    using sum = fm::accumulate_t<T>;
    const int ranks = 4;
    const int64_t n = 2100;
    std::vector<std::vector<T>> values(ranks), out(ranks);
    for (auto& v : values) v = support::normal_vector<T>(rng, n, 100);
    std::vector<T> expected;
    for (int64_t i = 0; i < n; ++i) {
        sum total = sum(values[0][i]);
        for (int r = 1; r < ranks; ++r) total += sum(values[r][i]);
        expected.push_back(T(total));
    }
    fm::run_ranks(ranks, [&](const fm::threads& c) {
        fm::host_executor ex({.threads = c.rank() + 1}); // whatever the threads
        auto mine = support::upload(ex, values[c.rank()]);
        c.all_reduce(ex, mine.view());
        out[c.rank()] = support::download(ex, mine.view());
    });
    for (const auto& got : out) CHECK(support::same_bits(got, expected));
}

TEST_CASE("integers that overflow wrap around")
{
    fm::run_ranks(2, [](const fm::threads& c) {
        auto ex = support::executor_of_rank<fm::host_executor>();
        std::vector<int32_t> small{INT32_MAX, INT32_MIN};
        std::vector<int64_t> large{INT64_MAX, -1};
        c.all_reduce(ex, fm::as_vector(small));
        c.all_reduce(ex, fm::as_vector(large));
        CHECK_EQ(small, std::vector<int32_t>{-2, 0});
        CHECK_EQ(large, std::vector<int64_t>{-2, -2});
    });
}

TEST_CASE("no rank passes a barrier before all have come")
{
    const int ranks = 4;
    std::atomic<int> come{0};
    fm::run_ranks(ranks, [&](const fm::threads& c) {
        auto ex = support::executor_of_rank<fm::host_executor>();
        for (int round = 1; round <= 50; ++round) {
            ++come;
            c.barrier(ex);
            CHECK_EQ(come.load(), ranks * round);
            c.barrier(ex);
        }
    });
}

TEST_CASE("ranks that disagree all throw a comm_error that names the collective, the rank and the values, and may go on")
{
    const auto says = [](auto body, const char* text) {
        const auto all = texts(3, [&](const fm::threads& c) {
            auto ex = support::executor_of_rank<fm::host_executor>();
            std::vector<float> a(12, 1.f), b(36);
            try {
                body(c, ex, a, b);
            } catch (const fm::comm_error&) {
                for (float v : b) CHECK_EQ(v, 0.f); // nothing is written
                c.barrier(ex);                      // and the ranks go on
                throw;
            }
        });
        for (const std::string& t : all) {
            INFO(t);
            CHECK(support::has(t, text));
        }
    };
    support::disagreements<fm::threads>(says);
}

TEST_CASE("a rank that throws is rethrown to the caller when all have ended, and the others learn of it at once")
{
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::string> told(4);
    std::atomic<int> ended{0};
    const auto run = [&] {
        fm::run_ranks(4, [&](const fm::threads& c) {
            auto ex = support::executor_of_rank<fm::host_executor>();
            std::vector<float> v(4);
            c.all_reduce(ex, fm::as_vector(v));
            if (c.rank() == 2) throw std::domain_error("of its own");
            try {
                c.all_reduce(ex, fm::as_vector(v));
            } catch (const fm::comm_error& e) {
                told[c.rank()] = e.what();
                ++ended;
                throw;
            }
        });
    };
    CHECK_THROWS_WITH_AS(run(), "of its own", std::domain_error);
    CHECK_EQ(ended, 3);
    for (int r : {0, 1, 3}) CHECK(support::has(told[r], "all_reduce: rank 2 of 4 has left"));
    CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(10));
}

TEST_CASE("a rank whose own arguments are wrong gets their names, and the others a comm_error")
{
    std::vector<std::string> told(3);
    fm::run_ranks(3, [&](const fm::threads& c) {
        auto ex = support::executor_of_rank<fm::host_executor>();
        std::vector<float> a(6), b(6);
        try {
            c.all_gather(ex, fm::slice(fm::as_vector(a), 0, 2), fm::slice(fm::as_vector(b), 0, c.rank() == 1 ? 5 : 6));
        } catch (const fm::error& e) {
            told[c.rank()] = e.what();
        }
        CHECK_THROWS_AS(c.barrier(ex), fm::comm_error); // it is broken for good
    });
    CHECK(support::has(told[1], "received (R*N) is of shape (5); expected (6)"));
    for (int r : {0, 2}) CHECK(support::has(told[r], "all_gather: rank 1 of 3 failed"));

    const auto refuses = [&](auto call, const char* text) {
        fm::run_ranks(2, [&](const fm::threads& c) {
            auto ex = support::executor_of_rank<fm::host_executor>();
            if (c.rank() == 0) CHECK(support::has(support::message_of<fm::invalid_argument>([&] { call(c, ex); }), text));
            else CHECK_THROWS_AS(c.barrier(ex), fm::comm_error);
        });
    };
    std::vector<float> v(4);
    const auto rows = [&](const fm::threads& c, fm::host_executor& ex, std::vector<int64_t> out, std::vector<int64_t> in) {
        const fm::matrix_view<float> both(v.data(), 2, 2);
        c.all_to_all_v(ex, both, fm::as_vector(out), both, fm::as_vector(in));
    };
    refuses([&](auto& c, auto& ex) { c.broadcast(ex, fm::as_vector(v), 2); }, "root is 2; expected a rank: 0 to 1");
    refuses([&](auto& c, auto&) { c.split(-1, 0); }, "color is -1; expected zero or more");
    refuses([&](auto& c, auto& ex) { rows(c, ex, {1, 2}, {0, 0}); }, "sent_rows (R) is 2; expected counts from 0 on whose");
    refuses([&](auto& c, auto& ex) { rows(c, ex, {1, 1}, {-1, 0}); }, "received_rows (R) is -1");
    refuses([&](auto& c, auto& ex) { rows(c, ex, {1}, {1, 0}); }, "sent_rows (R) is of shape (1); expected (2)");
    const fm::vector_view<float> nowhere(nullptr, 3);
    refuses([&](auto& c, auto& ex) { c.all_reduce(ex, nowhere); }, "values (N) is a null pointer");
}

TEST_CASE("a fault that an executor has recorded is thrown by the collective on its rank, and breaks it for the others")
{
    fm::run_ranks(2, [&](const fm::threads& c) {
        auto ex = support::executor_of_rank<fm::host_executor>();
        if (c.rank() == 0) {
            ex.faults().record(fm::fault_kind::expert_out_of_range, 3, 77);
            CHECK_THROWS_AS(c.barrier(ex), fm::invalid_argument);
        } else {
            CHECK_THROWS_AS(c.barrier(ex), fm::comm_error);
        }
    });
}

TEST_CASE("a rank that does not come is a comm_error on every other rank when the deadline has passed, and on itself later")
{
    const auto start = std::chrono::steady_clock::now();
    std::atomic<bool> late{false};
    const auto all = texts(
        4,
        [&](const fm::threads& c) {
            auto ex = support::executor_of_rank<fm::host_executor>();
            c.barrier(ex);
            if (c.rank() == 1) {
                while (!late) std::this_thread::sleep_for(milliseconds(1));
            }
            std::vector<float> v(4);
            try {
                c.all_reduce(ex, fm::as_vector(v));
            } catch (...) {
                late = true;
                throw;
            }
        },
        milliseconds(300));
    for (const std::string& text : all) {
        INFO(text);
        CHECK(support::has(text, "all_reduce: rank 1 of 4 did not come within 300 ms"));
    }
    const auto took = std::chrono::steady_clock::now() - start;
    CHECK(took >= milliseconds(300));
    CHECK(took < std::chrono::seconds(20));
}

TEST_CASE("a rank that ends early has left, and one that never calls as well")
{
    const auto all = texts(3, [&](const fm::threads& c) {
        auto ex = support::executor_of_rank<fm::host_executor>();
        if (c.rank() != 0) c.barrier(ex);
    });
    CHECK_EQ(all[0], "nothing was thrown");
    for (int r : {1, 2}) CHECK(support::has(all[r], "barrier: rank 0 of 3 has left"));
}

TEST_CASE("a communicator splits by color, ordered by key and then by rank, and again within")
{
    fm::run_ranks(6, [](const fm::threads& c) {
        auto ex = support::executor_of_rank<fm::host_executor>();
        const fm::threads half = c.split(c.rank() % 2, -c.rank()); // 4 2 0 and 5 3 1
        CHECK_EQ(half.size(), 3);
        CHECK_EQ(half.rank(), 2 - c.rank() / 2);
        std::vector<int32_t> sum{1 << c.rank()}, all(3), own{c.rank()};
        half.all_reduce(ex, fm::as_vector(sum));
        CHECK_EQ(sum[0], c.rank() % 2 ? 0b101010 : 0b010101);
        half.all_gather(ex, fm::as_vector(own), fm::as_vector(all));
        CHECK_EQ(all, c.rank() % 2 ? std::vector<int32_t>{5, 3, 1} : std::vector<int32_t>{4, 2, 0});

        const fm::threads pair = half.split(half.rank() == 0 ? 7 : 3, 0); // equal keys: by rank
        CHECK_EQ(pair.size(), half.rank() == 0 ? 1 : 2);
        CHECK_EQ(pair.rank(), half.rank() == 2 ? 1 : 0);
        sum = {c.rank()};
        pair.all_reduce(ex, fm::as_vector(sum));
        CHECK_EQ(sum[0], c.rank() / 2 == 2 ? c.rank() : (c.rank() % 2 ? 1 + 3 : 0 + 2));
        support::all_collectives<float>(pair, ex, 9);
        support::all_collectives<float>(half, ex, 9);
        support::all_collectives<float>(c, ex, 9); // the parent still is whole
    });
}

TEST_CASE("the failure of a rank reaches those that wait in a split, and spares a split that it is not in")
{
    std::vector<std::string> told(4);
    const auto run = [&] {
        fm::run_ranks(4, [&](const fm::threads& c) {
            auto ex = support::executor_of_rank<fm::host_executor>();
            const fm::threads half = c.split(c.rank() / 2, 0);
            if (c.rank() == 3) throw std::domain_error("of its own");
            try {
                for (int i = 0; i < 20; ++i) half.barrier(ex);
                told[c.rank()] = "whole";
            } catch (const fm::comm_error& e) {
                told[c.rank()] = e.what();
            }
        });
    };
    CHECK_THROWS_AS(run(), std::domain_error);
    CHECK_EQ(told[0], "whole");
    CHECK_EQ(told[1], "whole");
    CHECK(support::has(told[2], "barrier: rank 1 of 2 has left"));
}

TEST_CASE("long random sequences of collectives stay in step")
{
    FASTMOE_SEEDED(rng, 63);
    const auto seed = rng.bits();
    fm::run_ranks(4, [&](const fm::threads& c) {
        auto ex = support::executor_of_rank<fm::host_executor>();
        support::random shared(seed); // the same on all ranks
        for (int i = 0; i < 60; ++i) {
            const int64_t n = shared.integer(0, 50);
            const auto next = shared.bits();
            switch (shared.integer(0, 3)) {
            case 0: support::all_collectives<float>(c, ex, n); break;
            case 1: support::all_rows<double>(c, ex, support::random(next), n); break;
            case 2: support::all_collectives<std::int64_t>(c.split(c.rank() > 1, 0), ex, n); break;
            default: support::all_rows<std::int32_t>(c.split(0, -c.rank()), ex, support::random(next), 3);
            }
        }
    });
}

TEST_CASE("ranks whose threads the system does not start are an error of the library's, and have left for the others")
{
    std::string text, told;
    {
        const support::few_threads narrow;
        text = support::message_of<fm::error>([&] {
            fm::run_ranks(9, [&](const fm::threads& c) {
                fm::host_executor ex({.threads = 1});
                const std::string mine = support::message_of<fm::comm_error>([&] { c.barrier(ex); });
                if (c.rank() == 0) told = mine;
            });
        });
    }
    CHECK(support::has(text, "the thread of a rank could not be started: "));
    CHECK(support::has(told, "barrier: rank "));
    CHECK(support::has(told, " of 9 has left"));
}

TEST_CASE("ranks and deadlines that make no sense are refused by name")
{
    const auto says = [](int ranks, milliseconds deadline, const char* text) {
        const std::string got = support::message_of<fm::invalid_argument>(
            [&] { fm::run_ranks(ranks, [](const fm::threads&) {}, {.deadline = deadline}); });
        INFO(got);
        CHECK(support::has(got, text));
    };
    says(0, milliseconds(10), "ranks is 0; expected 1 to 64");
    says(65, milliseconds(10), "ranks is 65; expected 1 to 64");
    says(2, milliseconds(0), "options.deadline is 0; expected 1 to 950400000 ms");
}
