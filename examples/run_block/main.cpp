// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// run_block: one MoE block of a published model, from files. `run_block --help` says how.
#include <cstdio>
#include <exception>

#include "run_block/families.hpp"
#include "run_block/options.hpp"

int main(int argc, char** argv)
try {
    using namespace run_block;
    program_options o;
    if (const auto status = parse_options(argc, argv, o)) return *status;
    const description d = describe(config_file(o.config));
    fastmoe::host_executor ex({.threads = o.threads});
    if (o.bfloat16) run_bfloat16(ex, o, d);
    else run_float32(ex, o, d);
    return 0;
} catch (const std::exception& e) {
    std::fprintf(stderr, "run_block: %s\n", e.what());
    return 1;
}
