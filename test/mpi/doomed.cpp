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
#include <fastmoe/comm/staged.hpp>
#include <fastmoe/exec/host_executor.hpp>

#include "support/queued.hpp"

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
template <class C, class Executor>
void exchange_for_ever(const C& c, Executor& ex, int64_t rows)
{
    const int64_t all = c.size() * rows;
    fm::buffer<float, Executor> out(ex, 4 * all), in(ex, 4 * all);
    const std::vector<int64_t> counts(static_cast<std::size_t>(c.size()), rows);
    for (;;) c.all_to_all_v(ex, out.matrix(all, 4), fm::as_vector(counts), in.matrix(all, 4), fm::as_vector(counts));
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

int stop_after = 0; ///< large messages; 0: never

/// Throws in its n-th large loop: what `mpi` copies to itself while its messages are on their way.
struct faltering : fm::host_executor {
    int large_loops;

    explicit faltering(int n) : fm::host_executor({.threads = 1}), large_loops(n) {}
    template <class F>
    void for_each(int64_t n, const F& f)
    {
        if (n > (1 << 16) && --large_loops == 0) throw std::domain_error("of its own");
        fm::host_executor::for_each(n, f);
    }
};

clock_type::time_point last_call; ///< of a collective, if do_it says when

/// What a rank is told in do_it(c, ex), when, and by the next call. Its exit status.
template <class C, class Executor, class F>
int listen(int me, const C& c, Executor& ex, const F& do_it)
{
    last_call = clock_type::now();
    try {
        do_it(c, ex);
    } catch (const fm::comm_error& e) {
        const auto took = std::chrono::duration_cast<std::chrono::milliseconds>(clock_type::now() - last_call).count();
        say(me, std::string("comm_error: ") + e.what());
        say(me, e.messages_pending ? "messages are pending" : "no message is pending");
        say(me, "took " + std::to_string(took) + " ms");
        const auto start = clock_type::now();
        try {
            c.barrier(ex);
        } catch (const fm::comm_error& again) {
            const bool at_once = clock_type::now() - start < std::chrono::milliseconds(100);
            const bool same = std::string(again.what()).substr(0, 40) == std::string(e.what()).substr(0, 40);
            say(me, at_once && same ? "again the same at once" : std::string("again: ") + again.what());
        }
        return 4;
    } catch (const std::exception& e) {
        say(me, std::string("threw: ") + e.what());
        return 5;
    }
    return 0;
}

} // namespace

/// Rank `lost` may be stopped once it has said that it will send, and goes on when the others have given it up.
extern "C" int MPI_Isend(const void* data, int count, MPI_Datatype type, int to, int tag, MPI_Comm comm, MPI_Request* request)
{
    const int code = PMPI_Isend(data, count, type, to, tag, comm, request);
    if (count > (1 << 16) && stop_after > 0 && --stop_after == 0) {
        const pid_t me = ::getpid();
        if (::fork() == 0) {
            ::usleep(3'500'000);
            ::kill(me, SIGCONT);
            ::_exit(0);
        }
        ::raise(SIGSTOP);
    }
    return code;
}

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
    const bool in_exchange = what.find("exchange_") != std::string::npos;
    std::thread killer;
    if (what == "exchange_stopped" || what == "exchange_falters") stop_after = me == lost ? 3 : 0;
    else if (in_exchange && me == lost)
        killer = std::thread([&] {
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
            ::kill(::getpid(), SIGKILL);
        });
    int status = 0;
    if (what.rfind("staged_", 0) == 0) { // over memory that MPI does not reach, in parts
        fm::host_memory heap;
        support::queued device;
        status = listen(me, fm::staged(c, 1 << 16, heap), device, [&](const auto& s, auto& on) { exchange_for_ever(s, on, 30000); });
    } else if (what == "exchange_falters" && me != lost) {
        faltering on(3);
        status = listen(me, c, on, [](const fm::mpi& all, faltering& here) { exchange_for_ever(all, here, 300000); });
    } else {
        status = listen(me, c, ex, [&](const fm::mpi&, fm::host_executor&) {
            if (in_exchange) exchange_for_ever(c, ex, what == "exchange_small" ? 8 : 300000);
            if (me == lost) return be_lost(what, c, ex);
            for (int i = 0; i < 100000; ++i) {
                last_call = clock_type::now();
                c.barrier(ex);
            }
            say(me, "was told nothing");
        });
    }
    if (killer.joinable()) killer.detach();
    say(me, "comes to its end");
    return status;
}
