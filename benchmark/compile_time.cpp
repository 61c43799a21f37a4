// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What including <fastmoe/moe.hpp> costs a consumer, in units of <cuda/std/mdspan>, which every view needs anyway.

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <stdexcept>

#include "race.hpp"

namespace {

namespace fs = std::filesystem;

/// A source file with one include, and the command that compiles it.
std::function<void()> compiling(const fs::path& folder, const std::string& name, const std::string& header)
{
    const fs::path source = folder / (name + ".cpp");
    std::ofstream(source) << "#include <" << header << ">\n";
    const std::string command = std::string(FASTMOE_BENCH_COMPILER) + " -O2 -std=c++20 " + FASTMOE_BENCH_INCLUDES + " -c " +
                                source.string() + " -o " + (folder / (name + ".o")).string();
    return [command] {
        if (std::system(command.c_str()) != 0) throw std::runtime_error("failed: " + command);
    };
}

bench::standing hold()
{
    const fs::path folder = fs::temp_directory_path() / "fastmoe_compile_time";
    fs::create_directories(folder);
    bench::race r;
    const int moe = r.add(compiling(folder, "moe", "fastmoe/moe.hpp"));
    const int mdspan = r.add(compiling(folder, "mdspan", "cuda/std/mdspan"));
    r.run(bench::budget(12));
    fs::remove_all(folder);
    return {{{.text = "compile time: <fastmoe/moe.hpp> alone / <cuda/std/mdspan> alone",
              .ratio = r.ratio(moe, mdspan),
              .kind = bench::target::at_most,
              .value = 2.5,
              .seconds_a_call = r.time(moe).middle,
              .also = {{"mdspan_ms", 1e3 * r.time(mdspan).middle}}}},
            r.rounds()};
}

} // namespace

int main(int argc, char** argv)
{
    bench::register_lines({"compile_time/moe"}, hold);
    return bench::run_all(argc, argv);
}
