// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// A program that mpirun starts and that does not end well: one rank is lost in the way that the first argument names. Every
/// other rank prints what it is told, how long it took, and what the next call says. Driven by failures.cpp.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <signal.h>
#include <unistd.h>

#include <fastmoe/comm/mpi.hpp>
#include <fastmoe/exec/host_executor.hpp>

namespace fm = fastmoe;
using clock_type = std::chrono::steady_clock;

namespace {

constexpr int lost = 1; ///< who is lost

void say(int rank, const std::string& text)
{
    std::printf("[%d] %s\n", rank, text.c_str());
    std::fflush(stdout);
}

/// Exchanges until something is thrown.
void exchange_for_ever(const fm::mpi& c, fm::host_executor& ex, int64_t rows)
{
    const auto ranks = static_cast<std::size_t>(c.size());
    std::vector<float> out(ranks * static_cast<std::size_t>(rows) * 4, 1.f), in(out.size());
    const std::vector<int64_t> counts(ranks, rows);
    for (;;)
        c.all_to_all_v(ex, fm::as_matrix(out, c.size() * rows, 4), fm::as_vector(counts), fm::as_matrix(in, c.size() * rows, 4),
                       fm::as_vector(counts));
}

void be_lost(const std::string& how, const fm::mpi& c, fm::host_executor& ex)
{
    std::vector<float> v(8);
    if (how == "throws") throw std::domain_error("of its own");
    if (how == "exits") std::exit(0);
    if (how == "exits_with_status") std::_Exit(3);
    if (how == "dies") ::raise(SIGKILL);
    if (how == "comes_too_late") {
        std::this_thread::sleep_for(std::chrono::seconds(4));
        for (;;) c.barrier(ex); // the first may yet be completed
    }
    if (how == "wrong_argument") c.broadcast(ex, fm::as_vector(v), 99);
    if (how == "leaves") return;
}

/// Rank `lost` leaves a part that all are in, and the whole goes on.
void leave_part(const fm::mpi& world, fm::host_executor& ex)
{
    const int me = world.rank();
    {
        const fm::mpi part = world.split(0, 0);
        part.barrier(ex);
        try {
            if (me != lost) part.barrier(ex);
        } catch (const fm::comm_error& e) {
            say(me, e.what());
        }
    }
    std::vector<int32_t> ones(2000, 1);
    world.all_reduce(ex, fm::as_vector(ones));
    say(me, "the whole adds up to " + std::to_string(ones.back()));
}

} // namespace

/// doomed how milliseconds
int main(int argc, char** argv)
{
    if (argc < 3) return 2;
    const std::string how = argv[1];
    const fm::mpi_session session({.deadline = std::chrono::milliseconds(std::atoi(argv[2]))});
    const fm::mpi& world = session.world();
    const int me = world.rank();
    say(me, "is process " + std::to_string(::getpid()));
    fm::host_executor ex({.threads = 1});
    world.barrier(ex);
    if (how == "leaves_part") {
        leave_part(world, ex);
        return 0;
    }
    // In a split, the ranks have other numbers there: 3 2 1 0.
    const bool split = how.rfind("split_", 0) == 0;
    const fm::mpi c = split ? world.split(0, -me) : world;
    const std::string what = split ? how.substr(6) : how;
    const bool in_exchange = what.rfind("exchange_", 0) == 0;
    std::thread killer;
    if (in_exchange && me == lost)
        killer = std::thread([&] {
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
            ::kill(::getpid(), SIGKILL);
        });
    auto start = clock_type::now();
    int status = 0;
    try {
        if (in_exchange) exchange_for_ever(c, ex, what == "exchange_small" ? 8 : 300000);
        if (me == lost) {
            be_lost(what, c, ex);
        } else {
            for (int i = 0; i < 100000; ++i) {
                start = clock_type::now();
                c.barrier(ex);
            }
            say(me, "was told nothing");
        }
    } catch (const fm::comm_error& e) {
        const auto took = std::chrono::duration_cast<std::chrono::milliseconds>(clock_type::now() - start).count();
        say(me, std::string("comm_error: ") + e.what());
        say(me, "took " + std::to_string(took) + " ms");
        start = clock_type::now();
        try {
            c.barrier(ex);
        } catch (const fm::comm_error& again) {
            const bool at_once = clock_type::now() - start < std::chrono::milliseconds(100);
            const bool same = std::string(again.what()).substr(0, 40) == std::string(e.what()).substr(0, 40);
            say(me, at_once && same ? "again the same at once" : std::string("again: ") + again.what());
        }
        status = 4;
    } catch (const std::exception& e) {
        say(me, std::string("threw: ") + e.what());
        status = 5;
    }
    if (killer.joinable()) killer.detach();
    say(me, "comes to its end");
    return status;
}
