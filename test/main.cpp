// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The main function that all tests share: doctest's, which also fails if no test case ran, and tells a skip by its exit
/// status. A filter that leaves out all of them is such a skip.
#define DOCTEST_CONFIG_IMPLEMENT
#include <doctest/doctest.h>

#include <cstdio>
#include <cstring>

#include "support/skip.hpp"

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

} // namespace

int main(int argc, char** argv)
{
    doctest::Context context(argc, argv);
    const int failed = context.run();
    if (context.shouldExit() || failed != 0) return failed;
    for (int i = 1; i < argc && cases_run == 0; ++i)
        if (std::strncmp(argv[i], "--test-case-exclude=", 20) == 0) {
            std::puts("skipped: all test cases are a device's");
            return support::skipped_exit_code;
        }
    if (cases_run == 0) {
        std::fputs("no test case ran: a filter names none\n", stderr);
        return 1;
    }
    return support::skipped_cases > 0 ? support::skipped_exit_code : 0;
}
