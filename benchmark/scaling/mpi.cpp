// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// Weak scaling and messages over MPI, for bench_scaling to predict from:
///
///     mpirun -np 2 bench_scaling_mpi mpi-2.json

#include <cstdio>
#include <optional>
#include <string>
#include <thread>

#include <fastmoe/comm/mpi.hpp>

#include "scaling/measure.hpp"
#include "scaling/progress.hpp"
#include "scaling/results.hpp"

int main(int argc, char** argv)
{
    using namespace scaling;
    if (argc != 2) {
        std::fputs("mpirun -np R bench_scaling_mpi FILE\n", stderr);
        return 2;
    }
    const fm::mpi_session session;
    try {
        const fm::mpi& c = session.world();
        constexpr int sessions = 4, rounds = 8;
        std::vector<std::vector<sample>> messages;
        std::vector<step_time> steps;
        const double load = load_average();
        std::optional<progress> bar; // one line for all ranks
        if (c.rank() == 0) bar.emplace(2 * sessions);
        const auto next = [&](const char* what) {
            if (bar) bar->next(std::string(what) + " over mpi, R " + std::to_string(c.size()));
        };
        for (int turn = 0; turn < sessions; ++turn) {
            next("messages");
            if (c.size() > 1) time_messages(c, rounds, messages);
            next("weak scaling");
            time_steps(c, {weak_shape(c.size())}, rounds, steps);
        }
        bar.reset();
        if (c.rank() != 0) return 0;
        measurements m;
        m.cores = static_cast<int>(std::thread::hardware_concurrency());
        m.processor = processor_name();
        m.load_before = load;
        m.load_after = load_average();
        if (c.size() > 1) {
            link_times l{"mpi", c.size(), message_bytes, {}};
            for (const auto& t : messages) l.seconds.push_back(undisturbed(t).middle);
            m.links.push_back(l);
        }
        const spread s = undisturbed(steps[0].rounds);
        m.weak.push_back({"mpi", steps[0].sizes, steps[0].busiest, s.low, s.middle, s.high,
                          static_cast<int>(steps[0].rounds.size())});
        write(argv[1], m);
        return 0;
    } catch (const std::exception& e) {
        std::fprintf(stderr, "%s\n", e.what());
        return 1;
    }
}
