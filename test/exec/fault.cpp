// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Faults found in parallel work: the smallest position is the one that is reported, once.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>
#include <thread>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/exec/executor.hpp>
#include <fastmoe/exec/fault.hpp>

#include "support/executors.hpp"
#include "support/random.hpp"

namespace fm = fastmoe;
using fm::fault_kind;
using std::int32_t;
using std::int64_t;

namespace {

/// Reports every element that is out of [-1, limit).
struct find_faults {
    fm::vector_view<const int32_t> ids; // (n)
    int32_t limit;
    fault_kind kind;
    fm::fault_recorder faults;
    FASTMOE_HOST_DEVICE void operator()(int64_t i) const
    {
        if (ids(i) < -1 || ids(i) >= limit) faults.record(kind, i, ids(i));
    }
};

/// What the work so far has found: told at the end of a verb, and by a stream to whoever waits.
template <class Executor>
std::string delivered(Executor& ex)
{
    try {
        if constexpr (support::is_stream<Executor>) ex.synchronize();
        else ex.deliver_faults();
    } catch (const fm::invalid_argument& e) {
        return e.what();
    }
    return "";
}

bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

} // namespace

TEST_CASE_TEMPLATE("the fault at the smallest position is thrown, with its value, whatever ran first", Cell,
                   FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    FASTMOE_SEEDED(r, 2);
    for (int trial = 0; trial < 30; ++trial) {
        const int64_t n = r.integer(1, 20000);
        std::vector<int32_t> ids(n);
        int64_t first = n;
        for (int64_t i = 0; i < n; ++i) ids[i] = static_cast<int32_t>(r.integer(-1, 7));
        for (int64_t bad = r.integer(1, 50); bad > 0; --bad) {
            const int64_t at = r.integer(0, n - 1);
            ids[at] = r.one_of(-2, 8, INT32_MAX, INT32_MIN);
            first = std::min(first, at);
        }
        fm::for_each(ex, n, find_faults{fm::as_vector(ids), 8, fault_kind::expert_out_of_range, ex.faults()});
        const std::string text = delivered(ex);
        INFO(text);
        CHECK(contains(text, "routing.experts(" + std::to_string(first) + ") is " + std::to_string(ids[first]) +
                                 "; expected -1 or an id below E"));
        CHECK(delivered(ex) == "");
    }
}

TEST_CASE_TEMPLATE("without a fault nothing is thrown, and each kind has its own text", Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    CHECK_NOTHROW(ex.synchronize());
    ex.faults().record(fault_kind::expert_repeated, 5, 3);
    CHECK(contains(delivered(ex), "routing.experts(5) is 3; expected each expert once in a token"));
    CHECK(delivered(ex) == ""); // and a stream has done what it had to, so that the host may record again
    ex.faults().record(fault_kind::token_out_of_range, 0, -9);
    CHECK_THROWS_WITH_AS(ex.synchronize(), doctest::Contains("token_ids(0) is -9"), fm::invalid_argument);
    CHECK_NOTHROW(ex.synchronize());
}

TEST_CASE_TEMPLATE("a later fault never hides an earlier one, and of one position the first value is a recorded one",
                   Cell, FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    CHECK(delivered(ex) == "");
    ex.faults().record(fault_kind::expert_out_of_range, 4, 100);
    ex.faults().record(fault_kind::expert_out_of_range, 9, -5);
    ex.faults().record(fault_kind::expert_repeated, 0, 1);
    CHECK(contains(delivered(ex), "routing.experts(4) is 100"));
    // Delivery forgets all kinds: they belong to one verb.
    CHECK(delivered(ex) == "");
    ex.faults().record(fault_kind::expert_out_of_range, INT32_MAX, -2);
    CHECK(contains(delivered(ex), "routing.experts(2147483647) is -2"));
}

TEST_CASE("the smallest position wins when two threads record at the same moment")
{
    // The threads walk along the same logs in opposite directions, so that wherever they meet they record in one log
    // within the same nanoseconds: a store of what was compared before would bring the larger position back.
    const int rounds = 10000, length = 48;
    std::vector<fm::fault_words> logs(rounds * length);
    for (fm::fault_words& words : logs) fm::detail::clear(words);
    std::atomic<int> arrived{0};
    const auto record_all = [&](int32_t position) {
        for (int round = 0; round < rounds; ++round) {
            ++arrived;
            for (int tries = 0; arrived < 2 * (round + 1); ++tries)
                if (tries > 1000) std::this_thread::yield();
            for (int i = 0; i < length; ++i) {
                const int log = round * length + (position == 3 ? i : length - 1 - i);
                fm::fault_recorder{&logs[log]}.record(fault_kind::expert_repeated, position, 0);
            }
        }
    };
    std::thread larger(record_all, 7), smaller(record_all, 3);
    larger.join();
    smaller.join();
    int lost = 0;
    for (const fm::fault_words& words : logs) {
        fm::fault found{};
        lost += !fm::detail::first_fault(words, found) || found.position != 3;
    }
    CHECK(lost == 0);
}

TEST_CASE("two executors keep their faults apart")
{
    fm::host_executor a({.threads = 2}), b({.threads = 2});
    a.faults().record(fault_kind::expert_out_of_range, 1, 50);
    CHECK(delivered(b) == "");
    CHECK(contains(delivered(a), "(1) is 50"));
}

TEST_CASE_TEMPLATE("of threads that share an executor each is thrown its own faults, and no other's; a stream has one record", Cell,
                   FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    const int users = 3, rounds = 300;
    const int64_t n = 64;
    if constexpr (support::is_stream<typename Cell::executor>) {
        std::vector<std::vector<int32_t>> ids(users, std::vector<int32_t>(n, 1));
        std::vector<std::thread> threads;
        for (int user = 0; user < users; ++user)
            threads.emplace_back([&, user] {
                if (user > 0) ids[user][user] = 100 + user;
                for (int round = 0; round < rounds; ++round)
                    fm::for_each(ex, n, find_faults{fm::as_vector(ids[user]), 8, fault_kind::expert_out_of_range, ex.faults()});
            });
        for (std::thread& t : threads) t.join();
        CHECK(contains(delivered(ex), "routing.experts(1) is 101;"));
        CHECK(delivered(ex) == "");
        return;
    }
    std::atomic<int> wrong{0};
    // What a verb does: a loop that may record, and the delivery at its end. The last user makes no mistake.
    const auto use = [&](int user) {
        std::vector<int32_t> ids(n, 1);
        if (user < users - 1) ids[user] = 100 + user;
        const std::string expected = "routing.experts(" + std::to_string(user) + ") is " + std::to_string(100 + user) + ";";
        for (int round = 0; round < rounds; ++round) {
            fm::for_each(ex, n, find_faults{fm::as_vector(ids), 8, fault_kind::expert_out_of_range, ex.faults()});
            const std::string text = delivered(ex);
            wrong += user < users - 1 ? !contains(text, expected) : text != "";
        }
    };
    std::vector<std::thread> threads;
    for (int user = 0; user < users; ++user) threads.emplace_back(use, user);
    for (std::thread& t : threads) t.join();
    CHECK(wrong == 0);
    CHECK(delivered(ex) == "");
}

TEST_CASE_TEMPLATE("a fault waits for the thread whose work found it, whoever asks before, and on a stream for whoever asks", Cell,
                   FASTMOE_EXECUTORS)
{
    FASTMOE_EXECUTOR(ex, Cell);
    const std::vector<int32_t> ids{0, 9, 1};
    fm::for_each(ex, 3, find_faults{fm::as_vector(ids), 8, fault_kind::expert_out_of_range, ex.faults()});
    std::string others = "?";
    std::thread([&] {
        fm::for_each(ex, 3, find_faults{fm::as_vector(ids), 10, fault_kind::expert_out_of_range, ex.faults()});
        others = delivered(ex);
    }).join();
    const std::string own = delivered(ex);
    CHECK((support::is_stream<typename Cell::executor> ? own : others) == "");
    CHECK(contains(support::is_stream<typename Cell::executor> ? others : own, "routing.experts(1) is 9"));
}

TEST_CASE("threads by the hundred, one after the other, keep their faults apart")
{
    fm::host_executor ex({.threads = 1});
    int wrong = 0;
    for (int i = 0; i < 500; ++i)
        std::thread([&] {
            wrong += delivered(ex) != "";
            if (i % 2) ex.faults().record(fault_kind::expert_out_of_range, i, -7);
            wrong += contains(delivered(ex), "routing.experts(" + std::to_string(i) + ") is -7") != (i % 2 == 1);
        }).join();
    CHECK(wrong == 0);
}
