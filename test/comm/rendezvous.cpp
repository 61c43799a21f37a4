// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How ranks get rank 0's bytes before there is a communicator: by TCP and by file, in whatever order they come, in spite of
/// strangers and of what a dead job has left.
#include <array>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <vector>

#include <signal.h>
#include <sys/resource.h>

#include <doctest/doctest.h>

#include <fastmoe/comm/file_rendezvous.hpp>
#include <fastmoe/comm/threads.hpp>
#include <fastmoe/exec/host_executor.hpp>

#include "support/temporary_folder.hpp"

using namespace fastmoe;

namespace {

using value = std::array<unsigned char, 128>;

value numbered(int first)
{
    value v;
    for (std::size_t i = 0; i < v.size(); ++i) v[i] = static_cast<unsigned char>(first + static_cast<int>(i));
    return v;
}

/// A port that was free a moment ago.
int free_port()
{
    const detail::descriptor s(::socket(AF_INET, SOCK_STREAM, 0));
    sockaddr_in where{};
    where.sin_family = AF_INET;
    socklen_t size = sizeof where;
    REQUIRE(::bind(s.get(), reinterpret_cast<sockaddr*>(&where), sizeof where) == 0);
    REQUIRE(::getsockname(s.get(), reinterpret_cast<sockaddr*>(&where), &size) == 0);
    return ntohs(where.sin_port);
}

/// share(rank, value) on all ranks at a time, rank r after wait(r) ms; the texts of what they threw.
template <class Share, class Wait>
std::vector<std::string> meet(int ranks, const Share& share, const Wait& wait, std::vector<value>& out)
{
    std::vector<std::string> failures(ranks);
    out.assign(ranks, value{});
    if (ranks > 0) out[0] = numbered(3);
    std::vector<std::thread> threads;
    for (int r = 0; r < ranks; ++r)
        threads.emplace_back([&, r] {
            std::this_thread::sleep_for(milliseconds(wait(r)));
            try {
                share(r, out[r]);
            } catch (const error& e) {
                failures[r] = e.what();
            }
        });
    for (auto& t : threads) t.join();
    return failures;
}

constexpr auto at_once = [](int) { return 0; };

} // namespace

TEST_CASE("every rank has rank 0's bytes, whoever comes first, over TCP and through a file")
{
    const support::temporary_folder folder;
    for (const int ranks : {1, 2, 5}) {
        CAPTURE(ranks);
        const int port = free_port();
        const std::string path = folder / ("id" + std::to_string(ranks));
        const auto tcp = [&](int r, value& v) { share_by_tcp({r, ranks, "localhost", port}, v, milliseconds(20000)); };
        const auto file = [&](int r, value& v) { share_by_file(r, ranks, path, v, milliseconds(20000)); };
        const auto zero_first = [](int r) { return r == 0 ? 0 : 40; };
        const auto zero_last = [](int r) { return r == 0 ? 60 : 0; };
        std::vector<value> got;
        const auto check = [&](const std::vector<std::string>& failures) {
            for (int r = 0; r < ranks; ++r) {
                CHECK(failures[r] == "");
                CHECK(got[r] == numbered(3));
            }
        };
        check(meet(ranks, tcp, zero_first, got));
        check(meet(ranks, tcp, zero_last, got));
        check(meet(ranks, file, zero_first, got));
        check(meet(ranks, file, zero_last, got));
        CHECK(folder.entries() == 0);
    }
}

TEST_CASE("whoever waits in vain says for whom, within the deadline")
{
    const support::temporary_folder folder;
    const int port = free_port();
    const std::string path = folder / "id";
    value v{};
    const milliseconds soon(150);
    const auto start = std::chrono::steady_clock::now();
    CHECK_THROWS_WITH_AS(share_by_tcp({0, 3, "localhost", port}, v, soon), doctest::Contains("rank 1 and 1 others to come"), comm_error);
    CHECK_THROWS_WITH_AS(share_by_tcp({1, 3, "localhost", port}, v, soon), doctest::Contains("rank 0 to answer at localhost"), comm_error);
    CHECK_THROWS_WITH_AS(share_by_file(0, 3, path, v, soon), doctest::Contains("rank 1 to answer"), comm_error);
    CHECK(folder.entries() == 0);
    CHECK_THROWS_WITH_AS(share_by_file(2, 3, path, v, soon), doctest::Contains("rank 0 to write"), comm_error);
    CHECK_THROWS_AS(share_by_file(0, 2, folder / "none/id", v, soon), comm_error);
    CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(4));
}

TEST_CASE("signals that the program handles end no wait, and a process without descriptors waits no longer than its deadline")
{
    struct sigaction action{}, before{};
    action.sa_handler = [](int) {};
    REQUIRE(::sigaction(SIGURG, &action, &before) == 0); // without SA_RESTART
    int port = free_port();
    std::exception_ptr failure; // looked at later: sanitizers need descriptors to do so
    const auto wait_as_zero = [&](milliseconds deadline) {
        return std::thread([&, deadline] {
            try {
                value v = numbered(3);
                share_by_tcp({0, 2, "localhost", port}, v, deadline);
            } catch (...) {
                failure = std::current_exception();
            }
        });
    };
    std::thread zero = wait_as_zero(milliseconds(20000));
    for (int i = 0; i < 50; ++i) {
        ::pthread_kill(zero.native_handle(), SIGURG);
        std::this_thread::sleep_for(milliseconds(2));
    }
    value v{};
    share_by_tcp({1, 2, "localhost", port}, v, milliseconds(20000));
    zero.join();
    CHECK(!failure);
    CHECK(v == numbered(3));
    ::sigaction(SIGURG, &before, nullptr);

    port = free_port();
    const detail::descriptor guest(::socket(AF_INET, SOCK_STREAM, 0));
    sockaddr_in where{};
    where.sin_family = AF_INET;
    where.sin_port = htons(static_cast<std::uint16_t>(port));
    where.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const auto start = std::chrono::steady_clock::now();
    zero = wait_as_zero(milliseconds(1000));
    std::this_thread::sleep_for(milliseconds(200)); // it listens
    rlimit limit{};
    REQUIRE(::getrlimit(RLIMIT_NOFILE, &limit) == 0);
    const rlimit none{0, limit.rlim_max};
    REQUIRE(::setrlimit(RLIMIT_NOFILE, &none) == 0);
    const int connected = ::connect(guest.get(), reinterpret_cast<sockaddr*>(&where), sizeof where);
    zero.join();
    REQUIRE(::setrlimit(RLIMIT_NOFILE, &limit) == 0);
    CHECK(connected == 0);
    REQUIRE(failure);
    CHECK_THROWS_WITH_AS(std::rethrow_exception(failure), doctest::Contains("rank 1"), comm_error);
    CHECK(std::chrono::steady_clock::now() - start < std::chrono::seconds(10));
}

TEST_CASE("strangers at the port, silent, talking or gone, are passed over")
{
    const int port = free_port(), ranks = 2;
    std::vector<value> got;
    std::thread strangers;
    const auto failures = meet(
        ranks,
        [&](int r, value& v) {
            if (r == 0)
                strangers = std::thread([port] {
                    const auto there = detail::look_up_host("localhost", port);
                    for (int i = 0; i < 3; ++i) {
                        int fd = -1;
                        for (int tries = 0; fd < 0 && tries < 200; ++tries) {
                            for (const addrinfo* a = there.get(); a && fd < 0; a = a->ai_next) fd = detail::connect_to(a, milliseconds(100));
                            detail::nap();
                        }
                        const detail::descriptor line(fd);
                        if (i == 0) (void)detail::send_all(fd, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n..", 38, detail::patience(milliseconds(100)));
                        if (i == 1) std::this_thread::sleep_for(milliseconds(300));
                    }
                });
            share_by_tcp({r, ranks, "localhost", port}, v, milliseconds(20000));
        },
        [](int r) { return r * 100; }, got);
    strangers.join();
    CHECK(failures[0] == "");
    CHECK(failures[1] == "");
    CHECK(got[1] == numbered(3));
}

TEST_CASE("ranks that disagree about their number, and a rank that comes twice, are errors on both sides")
{
    std::vector<value> got;
    const int port = free_port();
    auto failures = meet(
        2, [&](int r, value& v) { share_by_tcp({r, 2 + r, "localhost", port}, v, milliseconds(5000)); }, at_once, got);
    CHECK(failures[0].find("it is one of 3") != std::string::npos);
    CHECK(failures[1].find("it expects 2 ranks") != std::string::npos);

    const int other = free_port();
    failures = meet(
        3, [&](int r, value& v) { share_by_tcp({r > 0 ? 1 : 0, 3, "localhost", other}, v, milliseconds(5000)); },
        [](int r) { return r * 100; }, got);
    CHECK(failures[0].find("each rank once") != std::string::npos);
    CHECK(failures[2].find("each once") != std::string::npos);
}

TEST_CASE("what a dead job left in the files misleads nobody")
{
    const support::temporary_folder folder;
    const std::string path = folder / "id";
    // Rank 0 of the dead job wrote its bytes, and its rank 1 an answer.
    for (const bool complete : {false, true}) {
        CAPTURE(complete);
        const detail::file_mark old{detail::greeting::sign, 12345, 3, sizeof(value), complete};
        const value stale = numbered(100);
        detail::write_whole(path, &old, sizeof old, &stale, sizeof stale);
        detail::write_whole(path + ".1", &old, sizeof old, nullptr, 0);
        std::vector<value> got;
        const auto failures = meet(
            3, [&](int r, value& v) { share_by_file(r, 3, path, v, milliseconds(20000)); },
            [](int r) { return r == 0 ? 100 : 0; }, got); // the others read what is old first
        for (int r = 0; r < 3; ++r) {
            CHECK(failures[r] == "");
            CHECK(got[r] == numbered(3));
        }
        CHECK(folder.entries() == 0);
    }
}

TEST_CASE("what a dead job left misleads nobody either if its files are removed between two looks at them")
{
    const support::temporary_folder folder;
    const std::string path = folder / "id";
    const detail::file_mark old{detail::greeting::sign, 12345, 2, sizeof(value), false};
    const value stale = numbered(100);
    detail::write_whole(path, &old, sizeof old, &stale, sizeof stale);
    std::vector<value> got;
    const auto failures = meet(
        2,
        [&](int r, value& v) {
            if (r == 0) { // its launcher tidies up once rank 1 has answered to what is old
                while (::access((path + ".1").c_str(), F_OK) != 0) std::this_thread::sleep_for(milliseconds(1));
                std::remove((path + ".1").c_str());
                std::remove(path.c_str());
                std::remove((path + ".1").c_str());
                std::this_thread::sleep_for(milliseconds(100));
            }
            share_by_file(r, 2, path, v, milliseconds(20000));
        },
        at_once, got);
    for (int r = 0; r < 2; ++r) {
        CHECK(failures[r] == "");
        CHECK(got[r] == numbered(3));
    }
    CHECK(folder.entries() == 0);
}

TEST_CASE("an answer that cannot be looked at for a while is not taken for one that is gone")
{
    const support::temporary_folder folder;
    const std::string path = folder / "id", answer = path + ".1";
    std::atomic<bool> returned{false};
    std::thread zero([&] {
        value v = numbered(3);
        share_by_file(0, 2, path, v, milliseconds(20000));
        returned = true;
    });
    // Rank 1, by hand.
    detail::file_mark seen{};
    value v{};
    const auto read = [&] { return detail::read_whole(path, &seen, sizeof seen, &v, sizeof v); };
    while (!read()) std::this_thread::sleep_for(milliseconds(1));
    detail::write_whole(answer, &seen, sizeof seen, nullptr, 0);
    while (!read() || !seen.is_complete) std::this_thread::sleep_for(milliseconds(1));
    detail::write_whole(answer, "", 0, nullptr, 0);
    // Still there, but nothing can be read from it.
    std::this_thread::sleep_for(milliseconds(100));
    CHECK_FALSE(returned);
    std::remove(answer.c_str());
    zero.join();
    CHECK(returned);
    CHECK(v == numbered(3));
}

TEST_CASE("ranks of a communicator share a value over it")
{
    std::vector<value> got(4);
    got[0] = numbered(9);
    run_ranks(4, [&](const threads& c) {
        host_executor ex({.threads = 1});
        share_over(ex, c, got[c.rank()]);
    });
    for (const value& v : got) CHECK(v == numbered(9));
}

TEST_CASE("a process is who its launcher says, and a launcher that says nothing useful is refused by name")
{
    const auto set = [](const char* rank, const char* size, const char* port) {
        ::setenv("RANK", rank, 1);
        ::setenv("WORLD_SIZE", size, 1);
        ::setenv("MASTER_ADDR", "node-3", 1);
        ::setenv("MASTER_PORT", port, 1);
    };
    const auto read = [] { return launched_process::from_environment(); };
    set("5", "8", "29500");
    const auto p = read();
    CHECK(p.rank == 5);
    CHECK(p.ranks == 8);
    CHECK(p.host == "node-3");
    CHECK(p.port == 29501);
    set("8", "8", "29500");
    CHECK_THROWS_WITH_AS(read(), doctest::Contains("RANK is 8; expected 0 to 7"), invalid_argument);
    set("1", "8x", "29500");
    CHECK_THROWS_WITH_AS(read(), doctest::Contains("WORLD_SIZE is 8x"), invalid_argument);
    set("1", "8", "65535");
    CHECK_THROWS_WITH_AS(read(), doctest::Contains("MASTER_PORT is 65535"), invalid_argument);
    ::unsetenv("RANK");
    CHECK_THROWS_WITH_AS(read(), doctest::Contains("RANK is not set"), invalid_argument);
}
