// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The main function of tests that mpirun starts: doctest's on every rank, inside of one session. A check that fails on any
/// rank fails the whole, since mpirun then ends with that rank's status.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>
#include <string>

#include "world.hpp"

namespace {

unsigned cases_run = 0;

/// Counts; says nothing.
struct counter : doctest::IReporter {
    explicit counter(const doctest::ContextOptions&) {}
    void report_query(const doctest::QueryData&) override {}
    void test_run_start() override {}
    void test_run_end(const doctest::TestRunStats& all) override { cases_run = all.numTestCasesPassingFilters; }
    void test_case_start(const doctest::TestCaseData&) override {}
    void test_case_reenter(const doctest::TestCaseData&) override {}
    void test_case_end(const doctest::CurrentTestCaseStats&) override {}
    void test_case_exception(const doctest::TestCaseException&) override {}
    void subcase_start(const doctest::SubcaseSignature&) override {}
    void subcase_end() override {}
    void log_assert(const doctest::AssertData&) override {}
    void log_message(const doctest::MessageData&) override {}
    void test_case_skipped(const doctest::TestCaseData&) override {}
};

DOCTEST_REGISTER_LISTENER("counter", 1, counter);

const fastmoe::mpi* world = nullptr;

} // namespace

const fastmoe::mpi& support::mpi_world() { return *world; }

int main(int argc, char** argv)
{
    int failed = 1;
    {
        const fastmoe::mpi_session session({.deadline = std::chrono::seconds(30)});
        world = &session.world();
        doctest::Context context(argc, argv);
        failed = context.run();
    }
    int finalized = 0;
    MPI_Finalized(&finalized);
    if (failed == 0 && !finalized) std::fputs("the session did not end in good order\n", stderr), failed = 1;
    if (failed == 0 && cases_run == 0) std::fputs("no test case ran: a filter names none\n", stderr), failed = 1;
    return failed;
}
