// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The training program as mpirun starts it: its processes train what ranks in one process train, and what one rank does.
#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include <doctest/doctest.h>

#include "examples/compare_runs.hpp"

namespace {

using namespace training_run;

words mpirun(int ranks) { return {FASTMOE_MPIRUN, "--oversubscribe", "-np", std::to_string(ranks)}; }

int run_mpi(const place& p, int ranks, const words& arguments)
{
    return child(p, arguments + words{"--threads", "1"}, RLIM_INFINITY, mpirun(ranks)).wait();
}

} // namespace

TEST_CASE("processes have the numbers of as many threads to the bit, and those of one rank but for rounding")
{
    const place p;
    const words sample{"--balance", "0.3", "--sample", "alpha be", "--sample-length", "10"};
    REQUIRE(run(p, p.tiny("one") + sample) == 0);
    const auto one = numbers(p.at("one/log.csv"));
    for (const int ranks : {2, 4}) {
        CAPTURE(ranks);
        const words how{"--expert-parallel", "2"}; // with four, two replicas
        REQUIRE(run(p, p.tiny("whole") + sample + how + words{"--ranks", std::to_string(ranks)}) == 0);
        const auto threads = numbers(p.at("whole/log.csv"));
        const std::string said = p.bytes("stdout");
        REQUIRE(run_mpi(p, ranks, p.tiny("parts") + sample + how) == 0);
        CHECK(p.bytes("stdout") == said); // once, not by every rank
        CHECK(numbers(p.at("parts/log.csv")) == threads);
        CHECK(difference(threads, one) == "");
    }
}

TEST_CASE("processes go on from what threads have written, and the other way round")
{
    const place p;
    REQUIRE(run(p, p.tiny("one")) == 0);
    REQUIRE(run(p, p.tiny("parts") + words{"--ranks", "3", "--stop-at", "4"}) == 0);
    REQUIRE(run_mpi(p, 2, p.resumed("parts") + words{"--stop-at", "8"}) == 0);
    CHECK(p.bytes("stdout").find("resumed after step 4\n") != std::string::npos);
    REQUIRE(run(p, p.resumed("parts")) == 0);
    CHECK(difference(numbers(p.at("parts/log.csv")), numbers(p.at("one/log.csv"))) == "");
}

TEST_CASE("processes on GPUs have the numbers of one rank there, and without a GPU are refused for the reason that one rank is")
{
    const place p;
    const words cuda{"--device", "cuda"};
    const int one = run(p, p.tiny("one") + cuda);
    const std::string said = p.bytes("stderr"), reason = said.substr(std::min(said.size(), said.find("--device cuda: ")));
    REQUIRE(reason.empty() == (one == 0));
    REQUIRE((run_mpi(p, 2, p.tiny("parts") + cuda) == 0) == (one == 0));
    if (one == 0) CHECK(difference(numbers(p.at("parts/log.csv")), numbers(p.at("one/log.csv"))) == "");
    else CHECK(p.bytes("stderr").find(reason) != std::string::npos);
}

TEST_CASE("one process under mpirun is one rank")
{
    const place p;
    REQUIRE(run(p, p.tiny("one")) == 0);
    REQUIRE(run_mpi(p, 1, p.tiny("parts")) == 0);
    CHECK(p.bytes("parts/checkpoint.safetensors") == p.bytes("one/checkpoint.safetensors"));
}

TEST_CASE("SIGUSR1 for mpirun saves and stops all ranks after the same step")
{
    const place p;
    const words options{"--steps", "100000", "--validate-every", "0", "--checkpoint-every", "0", "--threads", "1"};
    child c(p, p.tiny("parts") + options, RLIM_INFINITY, mpirun(2));
    wait_for_steps(p, "parts/log.csv", c);
    c.send(SIGUSR1);
    CHECK(c.wait() != 0);
    INFO("it said ", p.bytes("stderr"));
    CHECK(p.bytes("stdout").find("--resume goes on") != std::string::npos);
    const auto done = std::to_string(static_cast<int>(numbers(p.at("parts/log.csv")).back()[0]));
    REQUIRE(run_mpi(p, 2, {"--out", p.at("parts"), "--resume", "--stop-at", std::to_string(std::stoi(done) + 1)}) == 0);
    CHECK(p.bytes("stdout").find("resumed after step " + done + "\n") != std::string::npos);
}

TEST_CASE("a rank that fails ends the job with its message and a status that is not zero")
{
    const place p;
    // Rank 1 may write no file of more than 4 KB.
    const std::string limited = "if [ \"$OMPI_COMM_WORLD_RANK\" = 1 ]; then ulimit -f 8; trap '' XFSZ; fi; exec \"$@\"";
    const words launcher = mpirun(2) + words{"--mca", "btl", "self,tcp", "sh", "-c", limited, "sh"};
    child c(p, p.tiny("parts"), RLIM_INFINITY, launcher);
    CHECK(c.wait() != 0);
    CHECK(p.bytes("stderr").find("rank 1: fastmoe: cannot write '" + p.at("parts/checkpoint/manifest")) != std::string::npos);
    CHECK(run_mpi(p, 2, p.tiny("other") + words{"--ranks", "2"}) != 0);
    CHECK(p.bytes("stderr").find("--ranks is given under mpirun") != std::string::npos);
    CHECK(!fs::exists(p.folder / "other"));
}
