// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
#include <doctest/doctest.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include <signal.h>

#include "support/child_process.hpp"
#include "support/scratch.hpp"
#include "support/temporary_folder.hpp"

using std::chrono::seconds;
using std::chrono::steady_clock;

namespace {

constexpr int deadline = 2000; // ms

/// Whether a process still runs; a zombie does not.
bool lives(int id)
{
    std::string stat;
    if (::kill(id, 0) != 0) return false;
    if (FILE* file = std::fopen(("/proc/" + std::to_string(id) + "/stat").c_str(), "r")) {
        char text[512] = {};
        static_cast<void>(std::fread(text, 1, sizeof text - 1, file));
        std::fclose(file);
        stat = text;
    }
    return stat.find(") Z") == std::string::npos;
}

struct outcome {
    int status = 0;
    std::string all;
    std::vector<std::string> of; ///< what each rank said
    std::vector<int> processes;
    double seconds = 0;
};

outcome run_doomed(const std::string& how, int ranks, const std::vector<std::string>& options = {})
{
    // mpiruns beside each other would make and remove one folder, some of them at the same moment, and one would fail.
    const support::temporary_folder session;
    std::vector<std::string> words{FASTMOE_MPIRUN, "--mca", "orte_tmpdir_base", session.path(), "--oversubscribe", "--enable-recovery", "-np",
                                   std::to_string(ranks)};
    words.insert(words.end(), options.begin(), options.end());
    for (const std::string& word : {std::string(FASTMOE_DOOMED), how, std::to_string(deadline)}) words.push_back(word);
    outcome o;
    const auto start = steady_clock::now();
    const auto finished = support::run_process(words);
    o.seconds = std::chrono::duration<double>(steady_clock::now() - start).count();
    o.status = finished.status;
    o.all = finished.out;
    o.of.resize(static_cast<std::size_t>(ranks));
    std::istringstream lines(finished.out);
    for (std::string line; std::getline(lines, line);) {
        if (line.size() < 4 || line[0] != '[' || line[2] != ']') continue;
        const int rank = line[1] - '0';
        if (rank < 0 || rank >= ranks) continue;
        o.of[static_cast<std::size_t>(rank)] += line.substr(4) + "\n";
        if (line.rfind("is process ", 4) == 4) o.processes.push_back(std::atoi(line.c_str() + 15));
    }
    return o;
}

/// Rank 1 is lost: every other one is told so within the time, at once or after the deadline, and nobody stays behind.
void is_told(const std::string& how, int ranks, const std::string& text, double least, double most,
             const std::vector<std::string>& options = {}, const std::string& also = "")
{
    outcome o = run_doomed(how, ranks, options);
    // Whether a message had begun when its sender stopped is the machine's doing: where it is busy, once more.
    for (int more = 0; more < 2 && how == "exchange_stopped" && !support::has(o.of[0], also.c_str()); ++more) o = run_doomed(how, ranks, options);
    INFO(how, " with ", ranks, " ranks, ", o.seconds, " s, status ", o.status, "\n", o.all);
    CHECK_EQ(o.processes.size(), static_cast<std::size_t>(ranks));
    for (int id : o.processes) CHECK_FALSE(lives(id));
    for (int r = 0; r < ranks; ++r) {
        if (r == 1) continue;
        const std::string& said = o.of[static_cast<std::size_t>(r)];
        CHECK(support::has(said, ("comm_error: fastmoe: " + text).c_str()));
        CHECK(support::has(said, also.c_str()));
        CHECK(support::has(said, "again the same at once"));
        CHECK(support::has(said, "comes to its end"));
        const auto at = said.find("took ");
        if (at == std::string::npos) continue; // the checks above have failed
        const double took = std::atof(said.c_str() + at + 5) / 1000;
        CHECK(took >= least);
        CHECK(took <= most);
    }
    CHECK(o.seconds < (least > 0 ? 15 : 1.9)); // not even the end of a rank waits, where all is known
    if (how == "comes_too_late") CHECK(support::has(o.of[1], ("comm_error: fastmoe: " + text).c_str()));
    if (how == "throws") CHECK(support::has(o.of[1], "threw: of its own"));
}

const double at_once = 1.5, late = 2 + 2.5; // s; the machine may be busy

/// Runs at the same time what mostly waits.
void together(const std::vector<std::function<void()>>& runs)
{
    std::vector<std::thread> threads;
    for (const auto& run : runs) threads.emplace_back(run);
    for (auto& t : threads) t.join();
}

std::string named(const char* verb, int rank, int ranks, const char* what)
{
    return std::string(verb) + ": rank " + std::to_string(rank) + " of " + std::to_string(ranks) + " " + what;
}

const char* const too_late = "did not come within 2000 ms";

} // namespace

TEST_CASE("a rank that throws is named to all others at once")
{
    for (int ranks : {2, 4}) is_told("throws", ranks, named("barrier", 1, ranks, "has left"), 0, at_once);
}

TEST_CASE("a rank that ends early in good order is named at once")
{
    is_told("leaves", 4, named("barrier", 1, 4, "has left"), 0, at_once);
}

TEST_CASE("a rank whose argument is refused is named at once")
{
    is_told("wrong_argument", 4, named("broadcast", 1, 4, "failed"), 0, at_once);
}

TEST_CASE("a rank that exits is named when the deadline has passed")
{
    together({[] { is_told("exits", 4, named("barrier", 1, 4, too_late), 1.9, late); },
              [] { is_told("exits_with_status", 2, named("barrier", 1, 2, too_late), 1.9, late); }});
}

TEST_CASE("a rank that is killed between collectives is named when the deadline has passed")
{
    together({[] { is_told("dies", 2, named("barrier", 1, 2, too_late), 1.9, late); },
              [] { is_told("dies", 4, named("barrier", 1, 4, too_late), 1.9, late); }});
}

TEST_CASE("a rank that is killed in the middle of an exchange is named when the deadline has passed")
{
    for (const char* how : {"exchange_small", "exchange_large"})
        together({[=] { is_told(how, 2, named("all_to_all_v", 1, 2, too_late), 1.9, late); },
                  [=] { is_told(how, 4, named("all_to_all_v", 1, 4, too_late), 1.9, late); }});
    // Where large messages are copied through shared memory in pieces.
    is_told("exchange_large", 4, named("all_to_all_v", 1, 4, too_late), 1.9, late,
            {"--mca", "btl_vader_single_copy_mechanism", "none"});
}

TEST_CASE("who waited for a rank that stopped in the middle of a message is told that it may still come, and it ends in good order")
{
    const std::vector<std::string> in_pieces{"--mca", "btl_vader_single_copy_mechanism", "none"};
    const auto run = [](int ranks, const std::vector<std::string>& options) {
        is_told("exchange_stopped", ranks, named("all_to_all_v", 1, ranks, too_late), 1.9, late, options, "messages are pending");
    };
    together({[&] { run(2, {}); }, [&] { run(2, in_pieces); }, [&] { run(3, in_pieces); }});
    is_told("throws", 2, named("barrier", 1, 2, "has left"), 0, at_once, {}, "no message is pending");
}

TEST_CASE("who fails while messages are on their way throws a comm_error that says so, and what its own failure was")
{
    // Rank 1 stops in its third message; rank 0 throws beside its own, and does not wait for anybody.
    const outcome o = run_doomed("exchange_falters", 2, {"--mca", "btl_vader_single_copy_mechanism", "none"});
    INFO(o.all);
    CHECK(support::has(o.of[0], "comm_error: fastmoe: all_to_all_v: this rank failed: of its own"));
    CHECK(support::has(o.of[0], "messages are pending"));
    CHECK(support::has(o.of[0], "comes to its end"));
    CHECK(support::has(o.of[1], "comm_error: fastmoe: all_to_all_v: rank 0 of 2 failed"));
    for (int id : o.processes) CHECK_FALSE(lives(id));
}

TEST_CASE("a rank that is killed in the middle of an exchange whose rows are staged in parts is named when the deadline has passed")
{
    const auto run = [](int ranks) { // in whichever of its steps the rank was lost
        is_told("staged_exchange_long", ranks, "all_to_all_v, staged: ", 1.9, late, {}, named("", 1, ranks, too_late));
    };
    together({[&] { run(2); }, [&] { run(4); }});
}

TEST_CASE("a rank that does not come is named, and told the same when it comes after all")
{
    is_told("comes_too_late", 4, named("barrier", 1, 4, too_late), 1.9, late);
}

TEST_CASE("a rank of a split is named by its number there")
{
    together({[] { is_told("split_dies", 4, named("barrier", 2, 4, too_late), 1.9, late); },
              [] { is_told("split_exchange_large", 4, named("all_to_all_v", 2, 4, too_late), 1.9, late); }});
}

TEST_CASE("who leaves a part is named to those who wait for him there, the whole goes on, and all come to an end")
{
    const outcome o = run_doomed("leaves_part", 4);
    INFO(o.all);
    for (int r = 0; r < 4; ++r) {
        const std::string& said = o.of[static_cast<std::size_t>(r)];
        if (r != 1) CHECK(support::has(said, "barrier: rank 1 of 4 has left"));
        CHECK(support::has(said, "the whole adds up to 4"));
    }
    for (int id : o.processes) CHECK_FALSE(lives(id));
    CHECK(o.seconds < 1.9); // nobody waits for the deadline
}
