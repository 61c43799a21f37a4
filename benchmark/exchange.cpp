// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// all_to_all_v of `mpi`, which agrees, has a deadline and names who is missing, against a bare MPI_Alltoallv of the same
/// bytes. Started by mpirun: the two take turns, and rank 0 reports its times.
#include <cstdio>

#include <fastmoe/comm/mpi.hpp>
#include <fastmoe/exec/host_executor.hpp>

#include "race.hpp"

namespace {

namespace fm = fastmoe;

/// A race in which all ranks take every turn together; rank 0 says how often and how long.
bench::standing race(const fm::mpi& c, int64_t rows, const char* size, double target)
{
    constexpr int64_t width = 256; // 1 KB a row
    const auto ranks = static_cast<std::size_t>(c.size());
    const int64_t all = c.size() * rows;
    std::vector<float> sent(static_cast<std::size_t>(all * width), 1.f), received(sent.size());
    const std::vector<int64_t> counts(ranks, rows);
    const std::vector<int> bytes(ranks, static_cast<int>(rows * width * 4));
    std::vector<int> places(ranks);
    for (std::size_t r = 0; r < ranks; ++r) places[r] = static_cast<int>(r) * bytes[r];
    fm::host_executor ex({.threads = 1});
    const std::function<void()> contenders[] = {
        [&] {
            c.all_to_all_v(ex, fm::as_matrix(sent, all, width), fm::as_vector(counts), fm::as_matrix(received, all, width),
                           fm::as_vector(counts));
        },
        [&] {
            MPI_Alltoallv(sent.data(), bytes.data(), places.data(), MPI_BYTE, received.data(), bytes.data(), places.data(),
                          MPI_BYTE, MPI_COMM_WORLD);
        }};
    const auto agreed = [](int value) {
        MPI_Bcast(&value, 1, MPI_INT, 0, MPI_COMM_WORLD);
        return value;
    };
    const auto timed = [&](int who, int repeats) {
        MPI_Barrier(MPI_COMM_WORLD);
        const double begin = bench::now();
        for (int i = 0; i < repeats; ++i) contenders[who]();
        return (bench::now() - begin) / repeats;
    };
    for (int who : {0, 1}) timed(who, 20);
    const int repeats = agreed(1 + static_cast<int>(0.0005 / std::max(timed(1, 5), 1e-7)));
    std::vector<double> ours, bare, ratios;
    const double begin = bench::now(), limit = bench::budget(3);
    for (int round = 0; agreed(round < 101 || bench::now() - begin < limit); ++round) {
        double took[2];
        for (int turn : {0, 1}) {
            const int who = (turn + round) % 2;
            took[who] = timed(who, repeats);
        }
        ours.push_back(took[0]);
        bare.push_back(took[1]);
        ratios.push_back(took[0] / took[1]);
    }
    const bool held_to_it = c.size() == 2;
    char text[160];
    std::snprintf(text, sizeof text, "exchange: all_to_all_v of mpi, %s a pair, %d ranks / MPI_Alltoallv, %.1f us", size, c.size(),
                  1e6 * bench::spread_of(bare).middle);
    bench::claim claim{text, bench::spread_of(ratios), held_to_it ? bench::target::at_most : bench::target::none, target,
                       bench::spread_of(ours).middle};
    return {{claim}, static_cast<int>(ratios.size())};
}

} // namespace

int main(int argc, char** argv)
{
    const fm::mpi_session session;
    const fm::mpi& c = session.world();
    const struct {
        int64_t rows;
        const char* size;
        double target;
    } cases[] = {{1, "1 KB", 1.25}, {64, "64 KB", 1.15}, {4096, "4 MB", 1.15}};
    std::vector<bench::standing> standings;
    for (const auto& one : cases) standings.push_back(race(c, one.rows, one.size, one.target));
    if (c.rank() != 0) return 0;
    for (std::size_t i = 0; i < standings.size(); ++i)
        bench::register_lines({"exchange/" + std::string(cases[i].size) + "/" + std::to_string(c.size())},
                              [s = standings[i]] { return s; });
    return bench::run_all(argc, argv);
}
