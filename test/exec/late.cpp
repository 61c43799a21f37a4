// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// The executor that stands for a CUDA stream finds out what it is there to find out.
#include <csignal>
#include <cstdint>
#include <vector>

#include <sys/wait.h>
#include <unistd.h>

#include <doctest/doctest.h>

#include <fastmoe/exec/executor.hpp>

#include "support/late.hpp"

namespace fm = fastmoe;
using std::int32_t;
using std::int64_t;

namespace {

struct write_place {
    int32_t* to;
    fm::fault_recorder faults;
    void operator()(int64_t i) const
    {
        to[i] = static_cast<int32_t>(i);
        if (i == 2) faults.record(fm::fault_kind::expert_out_of_range, i, 9);
    }
};

} // namespace

TEST_CASE("a result is there, and a fault thrown, when somebody has waited")
{
    support::late ex;
    std::vector<int32_t> to(4, -1);
    fm::for_each(ex, 4, write_place{to.data(), ex.faults()});
    CHECK_NOTHROW(ex.deliver_faults());
    CHECK(to == std::vector<int32_t>(4, -1));
    CHECK_THROWS_WITH_AS(ex.synchronize(), doctest::Contains("routing.experts(2) is 9"), fm::invalid_argument);
    CHECK(to == std::vector<int32_t>{0, 1, 2, 3});
    ex.faults().record(fm::fault_kind::expert_out_of_range, 0, 7); // before the stream has forgotten the other
    CHECK_NOTHROW(ex.synchronize());
}

TEST_CASE("who gives memory back has waited")
{
    support::late ex;
    std::vector<int32_t> to(4, -1);
    fm::for_each(ex, 4, write_place{to.data(), ex.faults()});
    ex.deallocate(ex.allocate(8), 8);
    CHECK(to == std::vector<int32_t>{0, 1, 2, 3});
}

#if !FASTMOE_STACKS_ARE_WATCHED
TEST_CASE("what lies on the stack ends the program")
{
    const pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
        signal(SIGSEGV, SIG_DFL); // doctest has its own
        support::late ex;
        int32_t to[4];
        fm::for_each(ex, 4, write_place{to, ex.faults()});
        try {
            ex.synchronize();
        } catch (...) {
        }
        _exit(0);
    }
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child);
    CHECK(WIFSIGNALED(status));
}
#endif
