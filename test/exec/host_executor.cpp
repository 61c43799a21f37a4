// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The CPU executor: the same bits for any thread count, exceptions, sharing, instruction sets, starting and stopping.
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <doctest/doctest.h>

#include <fastmoe/exec/host_executor.hpp>

#include "support/compare.hpp"
#include "support/few_threads.hpp"
#include "support/random.hpp"

namespace fm = fastmoe;
using fm::instruction_set;
using std::int64_t;

namespace {

struct plus {
    FASTMOE_HOST_DEVICE float operator()(float a, float b) const { return a + b; }
};

/// Sums whose rounding depends on their order, so that a different order shows.
struct normalize_rows {
    fm::matrix_view<const float> x; // (rows,n)
    fm::matrix_view<float> y;       // (rows,n)
    using vectorized = void;
    template <class Team>
    FASTMOE_HOST_DEVICE void operator()(Team& team, int64_t row) const
    {
        const int64_t n = x.extent(1);
        const float* from = x.data_handle() + row * n;
        float* to = y.data_handle() + row * n;
        const float sum = team.reduce(n, 0.0f, plus{}, [from](int64_t i) { return from[i] * from[i]; });
        const float scale = 1 / (1 + sum);
        team.for_each(n, [from, to, scale](int64_t i) { to[i] = from[i] * scale; });
    }
};

struct polynomial {
    const float* x; // (n)
    float* y;       // (n)
    using vectorized = void;
    FASTMOE_HOST_DEVICE void operator()(int64_t i) const { y[i] = (x[i] * 3 + 1) * x[i] - 2; }
};

struct count {
    std::atomic<int>* seen; // (n)
    void operator()(int64_t i) const { ++seen[i]; }
};

struct throw_at {
    int64_t where;
    std::atomic<int64_t>* done;
    void operator()(int64_t i) const
    {
        if (i == where) throw std::runtime_error("element " + std::to_string(i));
        ++*done;
    }
};
struct throw_at_row {
    int64_t where;
    template <class Team>
    void operator()(Team&, int64_t row) const
    {
        fm::expects(row != where, "row", row, "any other");
    }
};

/// Marks its scratch, lets others run, and looks whether the marks are still its own.
struct keep_scratch {
    std::atomic<int>* wrong;
    template <class Team>
    void operator()(Team& team, int64_t row) const
    {
        auto* mine = team.template scratch<int64_t>(64);
        for (int64_t i = 0; i < 64; ++i) mine[i] = row;
        std::this_thread::yield();
        for (int64_t i = 0; i < 64; ++i) *wrong += mine[i] != row;
    }
};

std::vector<float> normalized(fm::host_options options, const std::vector<float>& x, int64_t rows, int64_t n)
{
    fm::host_executor ex(options);
    std::vector<float> y(x.size(), NAN);
    fm::for_each_row(ex, rows, normalize_rows{fm::as_matrix(x, rows, n), fm::as_matrix(y, rows, n)}, {.width = n});
    return y;
}

} // namespace

TEST_CASE("every element is visited exactly once by any number of threads")
{
    for (const int threads : {1, 2, 3, 4, 7, 16}) {
        fm::host_executor ex({.threads = threads});
        CHECK(ex.threads() == threads);
        for (const int64_t n : {1, 2, 63, 64, 65, 2047, 2048, 2049, 4096, 131071, 131073}) {
            std::vector<std::atomic<int>> seen(n);
            fm::for_each(ex, n, count{seen.data()});
            int64_t wrong = 0;
            for (const auto& s : seen) wrong += s != 1;
            INFO(threads, " threads, n ", n);
            CHECK(wrong == 0);
        }
    }
}

TEST_CASE("every task runs once, and a worker's number is below the number of threads and its own")
{
    for (const int threads : {1, 2, 5}) {
        fm::host_executor ex({.threads = threads});
        std::vector<std::atomic<int>> seen(1000), busy(threads);
        std::atomic<int> wrong{0};
        ex.for_each_task(1000, [&](int worker, int64_t task) {
            wrong += worker < 0 || worker >= threads || busy[worker].fetch_add(1) != 0;
            ++seen[task];
            --busy[worker];
        });
        for (const auto& s : seen) wrong += s != 1;
        CHECK(wrong == 0);
    }
}

TEST_CASE("rows give the same bits with 1, 2 and 4 threads and on every run")
{
    FASTMOE_SEEDED(r, 99);
    for (int trial = 0; trial < 12; ++trial) {
        const int64_t rows = r.integer(1, 300), n = r.one_of(1, 15, 16, 17, 100, 1000);
        INFO(rows, " rows of ", n);
        const auto x = support::normal_vector<float>(r, rows * n);
        for (const auto best : {instruction_set::baseline, fm::native_instruction_set()}) {
            const auto one = normalized({.threads = 1, .best = best}, x, rows, n);
            for (const int threads : {1, 2, 4})
                CHECK(support::same_bits(normalized({.threads = threads, .best = best}, x, rows, n), one));
        }
    }
}

TEST_CASE("every instruction set up to the machine's computes what plain arithmetic does")
{
    FASTMOE_SEEDED(r, 7);
    const int64_t rows = 37, n = 101;
    const auto x = support::normal_vector<float>(r, rows * n);
    std::vector<double> sums(rows, 1.0), expected(rows * n), polynomials;
    for (int64_t i = 0; i < rows * n; ++i) sums[i / n] += static_cast<double>(x[i]) * x[i];
    for (int64_t i = 0; i < rows * n; ++i) expected[i] = x[i] / sums[i / n];
    std::vector<double> magnitudes;
    for (double v : support::widened(x)) {
        polynomials.push_back((v * 3 + 1) * v - 2);
        magnitudes.push_back((std::fabs(v) * 3 + 1) * std::fabs(v) + 2);
    }
    for (int level = 0; level <= static_cast<int>(fm::native_instruction_set()); ++level) {
        INFO("level ", level);
        fm::host_executor ex({.threads = 2, .best = static_cast<instruction_set>(level)});
        CHECK(static_cast<int>(ex.best()) == level);
        CHECK(support::close(normalized({.threads = 2, .best = ex.best()}, x, rows, n), expected, {.length = 2.0 * n}));
        std::vector<float> y(rows * n, NAN);
        fm::for_each(ex, rows * n, polynomial{x.data(), y.data()});
        CHECK(support::close(y, polynomials, {.length = 4, .magnitudes = &magnitudes}));
    }
}

TEST_CASE("threads beyond what is sensible are refused by name, zero means the machine's")
{
    for (const int threads : {-1, 1025, INT32_MIN}) {
        std::string text;
        try {
            fm::host_executor ex({.threads = threads});
        } catch (const fm::invalid_argument& e) {
            text = e.what();
        }
        CHECK(text.find("threads is " + std::to_string(threads) + "; expected 0 to 1024") != std::string::npos);
    }
    CHECK(fm::host_executor().threads() >= 1);
}

TEST_CASE("an instruction set beyond the machine's is refused by name")
{
    const auto native = fm::native_instruction_set();
    for (int level = static_cast<int>(native) + 1; level <= 4; ++level) { // 4 is no level at all
        const auto best = static_cast<instruction_set>(level);
        const std::string expected = "best is " + std::string(fm::name_of(best)) + "; expected at most " + fm::name_of(native);
        CHECK_THROWS_WITH_AS(fm::host_executor({.threads = 1, .best = best}), doctest::Contains(expected.c_str()), fm::invalid_argument);
    }
    CHECK(fm::host_executor({.threads = 1, .best = native}).best() == native);
}

TEST_CASE("an exception in any worker reaches the caller, and the executor works on")
{
    for (const int threads : {1, 2, 4}) {
        fm::host_executor ex({.threads = threads});
        const int64_t n = 100000;
        for (const int64_t where : {int64_t{0}, int64_t{50000}, n - 1}) {
            std::atomic<int64_t> done{0};
            CHECK_THROWS_WITH_AS(fm::for_each(ex, n, throw_at{where, &done}),
                                 ("element " + std::to_string(where)).c_str(), std::runtime_error);
            CHECK(done < n);
            CHECK_THROWS_AS(fm::for_each_row(ex, 1000, throw_at_row{999}, {}), fm::invalid_argument);
            std::vector<std::atomic<int>> seen(3000);
            fm::for_each(ex, 3000, count{seen.data()});
            int64_t wrong = 0;
            for (const auto& s : seen) wrong += s != 1;
            CHECK(wrong == 0);
        }
    }
}

TEST_CASE("when every task throws, one exception arrives and none is lost in a worker")
{
    fm::host_executor ex({.threads = 4});
    for (int round = 0; round < 200; ++round)
        CHECK_THROWS_AS(ex.for_each_task(64, [](int, int64_t t) { throw std::out_of_range(std::to_string(t)); }),
                        std::out_of_range);
}

TEST_CASE("threads that share one executor each get their own work done")
{
    fm::host_executor ex({.threads = 2});
    std::atomic<int> wrong{0};
    std::vector<std::thread> users;
    for (int u = 0; u < 4; ++u)
        users.emplace_back([&ex, &wrong, u] {
            const int64_t rows = 40 + u, n = 64 + u;
            support::random r(100 + u);
            const auto x = support::normal_vector<float>(r, rows * n);
            const auto expected = normalized({.threads = 1}, x, rows, n);
            for (int round = 0; round < 100; ++round) {
                std::vector<float> y(x.size(), NAN);
                fm::for_each_row(ex, rows, normalize_rows{fm::as_matrix(x, rows, n), fm::as_matrix(y, rows, n)},
                                 {.width = n});
                wrong += !support::same_bits(y, expected);
                try {
                    ex.for_each_task(8, [](int, int64_t t) {
                        if (t == 3) throw std::runtime_error("mine");
                    });
                    ++wrong;
                } catch (const std::runtime_error&) {
                }
            }
        });
    for (std::thread& t : users) t.join();
    CHECK(wrong == 0);
}

TEST_CASE("no two rows that run at the same time share scratch, nor two tasks a worker's number")
{
    fm::host_executor ex({.threads = 4});
    std::atomic<int> wrong{0};
    std::vector<std::atomic<int>> busy(4);
    std::vector<std::thread> users;
    for (int u = 0; u < 2; ++u)
        users.emplace_back([&] {
            for (int round = 0; round < 20; ++round) {
                fm::for_each_row(ex, 400, keep_scratch{&wrong}, {.width = 2048, .scratch_bytes = 512});
                ex.for_each_task(50, [&](int worker, int64_t) {
                    wrong += busy[worker].fetch_add(1) != 0;
                    std::this_thread::yield();
                    --busy[worker];
                });
            }
        });
    for (std::thread& t : users) t.join();
    CHECK(wrong == 0);
}

TEST_CASE("all workers take part when there is work for all")
{
    fm::host_executor ex({.threads = 4});
    std::atomic<int> present{0};
    std::set<int> workers;
    std::mutex mutex;
    // Every task waits until four are running, which only four threads can bring about.
    ex.for_each_task(4, [&](int worker, int64_t) {
        ++present;
        const auto start = std::chrono::steady_clock::now();
        while (present < 4 && std::chrono::steady_clock::now() - start < std::chrono::seconds(60))
            std::this_thread::yield();
        std::lock_guard lock(mutex);
        workers.insert(worker);
    });
    CHECK(workers == std::set<int>{0, 1, 2, 3});
}

TEST_CASE("executors start and stop by the hundred, used or not")
{
    std::atomic<int64_t> done{0};
    for (int round = 0; round < 300; ++round) {
        fm::host_executor ex({.threads = 1 + round % 5});
        for (int use = 0; use < round % 3; ++use) ex.for_each_task(7, [&](int, int64_t) { ++done; });
    }
    CHECK(done == 7 * 300);
    done = 0;
    fm::host_executor ex({.threads = 4});
    for (int round = 0; round < 20000; ++round) ex.for_each_task(1 + round % 5, [&](int, int64_t) { ++done; });
    CHECK(done == 20000 * 3);
}

TEST_CASE("run_rows gives a host algorithm's worker its own team")
{
    FASTMOE_SEEDED(r, 12);
    const int64_t rows = 64, n = 33;
    const auto x = support::normal_vector<float>(r, rows * n);
    std::vector<float> y(x.size(), NAN);
    fm::host_executor ex({.threads = 3});
    const normalize_rows f{fm::as_matrix(x, rows, n), fm::as_matrix(y, rows, n)};
    ex.for_each_task(rows / 8, [&](int worker, int64_t t) { ex.run_rows(worker, t * 8, t * 8 + 8, f); });
    CHECK(support::same_bits(y, normalized({.threads = 1}, x, rows, n)));
}

TEST_CASE("an executor whose threads cannot all be started throws how many it got, and leaves nothing behind")
{
    std::string text;
    for (int round = 0; round < 3; ++round) {
        try {
            const support::few_threads narrow;
            fm::host_executor ex({.threads = 9});
            text = "nothing was thrown";
        } catch (const fm::error& e) {
            text = e.what();
        }
        INFO(text);
        CHECK(text.find("threads is 9; expected no more than can be started: 3 (") != std::string::npos);
    }
    fm::host_executor ex({.threads = 9});
    std::atomic<int> done{0};
    ex.for_each_task(100, [&](int, int64_t) { ++done; });
    CHECK(done == 100);
}

namespace {

struct nested_loop {
    fm::host_executor* ex;
    void operator()(int64_t) const { fm::for_each(*ex, 3, *this); }
};

/// A loop of `inner` in each of some tasks of `outer`.
void run_inside(fm::host_executor& outer, fm::host_executor& inner, std::atomic<int>& done)
{
    outer.for_each_task(4, [&](int, int64_t) { inner.for_each_task(5, [&](int, int64_t) { ++done; }); });
}

const char* const refusal = "a parallel loop is started inside of another";

} // namespace

TEST_CASE("a loop inside of a loop is refused instead of waiting for itself")
{
    for (const int threads : {1, 2}) {
        fm::host_executor ex({.threads = threads});
        CHECK_THROWS_WITH_AS(fm::for_each(ex, 10000, nested_loop{&ex}), doctest::Contains(refusal), fm::invalid_argument);
        CHECK_THROWS_AS(fm::for_each(ex, 1, nested_loop{&ex}), fm::invalid_argument);
    }
}

TEST_CASE("a loop inside of a loop is run by an executor that was made later, and refused by one that was made before")
{
    fm::host_executor first({.threads = 2}), second({.threads = 3}), third({.threads = 1});
    std::atomic<int> done{0};
    run_inside(first, second, done);
    run_inside(second, third, done);
    run_inside(first, third, done);
    CHECK(done == 3 * 20);
    CHECK_THROWS_WITH_AS(run_inside(second, first, done), doctest::Contains(refusal), fm::invalid_argument);
    CHECK_THROWS_AS(run_inside(third, second, done), fm::invalid_argument);
    CHECK(done == 3 * 20);
    // Back to where it came from, by way of another's workers: nobody there belongs to the first.
    CHECK_THROWS_AS(first.for_each_task(2, [&](int, int64_t) { run_inside(second, first, done); }), fm::invalid_argument);
    run_inside(first, second, done); // and all of them go on
    CHECK(done == 4 * 20);
}

TEST_CASE("threads that start loops of two executors inside of each other's never wait for each other for ever")
{
    fm::host_executor a({.threads = 2}), b({.threads = 2});
    std::atomic<int> done{0}, refused{0};
    std::thread other([&] {
        for (int round = 0; round < 200; ++round) {
            try {
                run_inside(b, a, done);
            } catch (const fm::invalid_argument&) {
                ++refused;
            }
        }
    });
    for (int round = 0; round < 200; ++round) run_inside(a, b, done);
    other.join();
    CHECK(refused == 200);
    CHECK(done == 200 * 20);
}
