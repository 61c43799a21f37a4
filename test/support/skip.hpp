// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// How a test case says that this machine cannot run it. The program then exits with 77 unless something has failed, and
/// ctest reports it as skipped, never as passed. Where some cases of a program need a device, CMake registers them as a
/// test of their own, so that the others still pass.
#pragma once

#include <atomic>

namespace support {

inline constexpr int skipped_exit_code = 77;

/// How many test cases have said so.
inline std::atomic<int> skipped_cases{0};

} // namespace support

/// Ends a test case; the reason may have several parts.
#define FASTMOE_SKIP(...)                                                                                             \
    do {                                                                                                              \
        MESSAGE("skipped: ", __VA_ARGS__);                                                                            \
        ++::support::skipped_cases;                                                                                   \
        return;                                                                                                       \
    } while (false)
