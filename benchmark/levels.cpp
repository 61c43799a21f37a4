// SPDX-FileCopyrightText: The FastMoE authors
// SPDX-License-Identifier: Apache-2.0 WITH LLVM-exception
/// What -O3 gives over -O2, in speed and in time to compile: loops of vectorized functors ask for vectors at either level.

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <stdexcept>

#include "levels/activation.hpp"
#include "race.hpp"

namespace {

using namespace bench;
namespace fs = std::filesystem;

/// The largest difference of two results, relative to the larger of 1 and the value.
double difference(const std::vector<float>& a, const std::vector<float>& b)
{
    double most = a.size() == b.size() && !a.empty() ? 0 : 1;
    for (std::size_t i = 0; i < a.size() && i < b.size(); ++i)
        most = std::max(most, std::abs(double(a[i]) - double(b[i])) / std::max(1.0, std::abs(double(a[i]))));
    return most;
}

standing hold_activation(bool avx512)
{
    const activation_turn plain = activation_at_o2(avx512), more = activation_at_o3(avx512);
    if (!plain.run) throw std::runtime_error("this machine lacks the instructions");
    race r;
    const int o2 = r.add(plain.run), o3 = r.add(more.run);
    r.run(budget(2));
    if (!(difference(plain.result(), more.result()) < 1e-6)) throw std::runtime_error("the levels differ in their results");
    const std::string set = avx512 ? "AVX-512" : "AVX2";
    return {{{.text = "SwiGLU forward + backward, " + set + ": time at -O2 / at -O3",
              .ratio = r.ratio(o2, o3),
              .kind = target::at_most,
              .value = 1.3,
              .seconds_a_call = r.time(o2).middle}},
            r.rounds()};
}

standing hold_compiler()
{
    const fs::path object = fs::temp_directory_path() / "fastmoe_levels.o";
    const auto compiling = [&](const std::string& level) {
        const std::string command = std::string(FASTMOE_BENCH_COMPILER) + " " + level + " -std=c++20 " + FASTMOE_BENCH_INCLUDES +
                                    " -c " + FASTMOE_BENCH_QUICKSTART + " -o " + object.string();
        return [command] {
            if (std::system(command.c_str()) != 0) throw std::runtime_error("failed: " + command);
        };
    };
    race r;
    const int o2 = r.add(compiling("-O2")), o3 = r.add(compiling("-O3"));
    r.run(budget(1), 3);
    fs::remove(object);
    return {{{.text = "compile time of examples/quickstart.cpp: at -O3 / at -O2",
              .ratio = r.ratio(o3, o2),
              .seconds_a_call = r.time(o2).middle}},
            r.rounds()};
}

} // namespace

int main(int argc, char** argv)
{
    register_lines({"levels/activation/avx2"}, [] { return hold_activation(false); });
    register_lines({"levels/activation/avx512"}, [] { return hold_activation(true); });
    register_lines({"levels/compile_time"}, hold_compiler);
    return run_all(argc, argv);
}
