// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// run_block: one MoE block of a published model, from files. `run_block --help` says how.
#include <cstdio>
#include <exception>
#include <filesystem>
#include <system_error>

#include "run_block/families.hpp"
#include "run_block/options.hpp"

namespace {

/// The output must not take the place of what it is made from.
void expect_other_files(const run_block::program_options& o)
{
    std::error_code none;
    for (const auto& file : {o.config, o.weights, o.input})
        fastmoe::expects(!std::filesystem::equivalent(o.output, file, none), "--output", "'" + o.output + "'",
                         "a file that is not read");
}

} // namespace

int main(int argc, char** argv)
try {
    using namespace run_block;
    program_options o;
    if (const auto status = parse_options(argc, argv, o)) return *status;
    expect_other_files(o);
    const description d = describe(config_file(o.config));
    fastmoe::host_executor ex({.threads = o.threads});
    if (o.dtype == "bfloat16") run_bfloat16(ex, o, d);
    else run_float32(ex, o, d);
    return 0;
} catch (const std::exception& e) {
    std::fprintf(stderr, "run_block: %s\n", e.what());
    return 1;
}
